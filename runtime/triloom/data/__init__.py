"""Text or tokens in, batches out."""

from .batches import Batch, Blend, Samples, Stretch, Windows
from .prefetch import Feed
from .sources import Sources, Tokenised, find, is_long, open_found, tokenise
from .split import Data, cut

__all__ = [
    "Batch",
    "Blend",
    "Data",
    "Feed",
    "Samples",
    "Sources",
    "Stretch",
    "Tokenised",
    "Windows",
    "cut",
    "find",
    "is_long",
    "open_found",
    "tokenise",
]
