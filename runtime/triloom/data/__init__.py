"""Text in, batches out."""

from .batches import Batch, Split, Windows, split
from .corpus import Corpus, open_corpus

__all__ = ["Batch", "Corpus", "Split", "Windows", "open_corpus", "split"]
