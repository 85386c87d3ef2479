"""Decoders to and from the folders of Hugging Face's transformers library, which is not needed for it."""

from .convert import load_folder, save_folder
from .weights import open_weights

__all__ = ["load_folder", "open_weights", "save_folder"]
