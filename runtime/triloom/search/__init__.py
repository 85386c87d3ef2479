"""Automatic schedules: a program for given costs and memory, with a bound on how good it can be. Pure."""

from .auto import EFFORT, Found, auto, automatic
from .bound import lower_bound

__all__ = ["EFFORT", "Found", "auto", "automatic", "lower_bound"]
