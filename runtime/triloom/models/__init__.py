"""Models as lists of units."""

from .config import DecoderConfig, gpt2, llama
from .decoder import Model, decoder

__all__ = ["DecoderConfig", "Model", "decoder", "gpt2", "llama"]
