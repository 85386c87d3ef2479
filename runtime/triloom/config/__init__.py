"""Configuration of a training run: frozen dataclasses, a TOML file, command-line overrides."""

from .load import Loaded, load
from .schema import Config
from .show import help_fields, to_toml

__all__ = ["Config", "Loaded", "help_fields", "load", "to_toml"]
