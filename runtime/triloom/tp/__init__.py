"""Tensor-parallel layers: usable piece by piece, with or without the engine."""

from .comm import (
    copy_to_tp,
    gather_from_sequence,
    reduce_from_tp,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    unscatter_from_sequence,
)
from .cross_entropy import (
    loss_parts,
    loss_weight,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from .dropout import Dropout, HeadDropout
from .embedding import VocabParallelEmbedding
from .layout import Layout, layout_of
from .linear import ColumnParallelLinear, RowParallelLinear, linear
from .norm import LayerNorm, RMSNorm, reduce_partial_grads
from .vocab import gather_vocab
from .weights import Init, parameter

__all__ = [
    "ColumnParallelLinear",
    "Dropout",
    "HeadDropout",
    "Init",
    "LayerNorm",
    "Layout",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tp",
    "gather_from_sequence",
    "gather_vocab",
    "layout_of",
    "linear",
    "loss_parts",
    "loss_weight",
    "parameter",
    "reduce_from_tp",
    "reduce_partial_grads",
    "reduce_scatter_to_sequence",
    "scatter_to_sequence",
    "unscatter_from_sequence",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
