"""Hugging Face folders into and out of an engine, on any mesh, and from a checkpoint of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..models.config import DecoderConfig
from ..parallel.gather import gather_full
from ..parallel.pieces import held_pieces, spread
from ..parallel.views import by_bucket
from ..together import together
from .folder import SHARD_BYTES, check_target, write_folder
from .names import Table
from .shapes import family_of, to_json
from .weights import Weights, open_weights

if TYPE_CHECKING:
    from ..engine import Engine

VALUES = ("params", "master")
"""States that are set: the parameters, and their copies in a wider dtype."""


def load_folder(engine: Engine, path: str | Path, config: DecoderConfig) -> None:
    """Give the parameters of a decoder the values of a Hugging Face folder; collective, between steps.

    config: that of the engine's model. Every rank reads the rows and columns that it holds and no others. The
    optimizer's other state is left as it is: load before the first step. Raises SetupError on every rank, and changes
    nothing, if the folder is damaged or of another model.
    """
    weights = together(engine.world, lambda: open_weights(path, config))
    together(engine.world, lambda: _fill(engine, weights))
    spread(engine.state)


def _fill(engine: Engine, weights: Weights) -> None:
    for piece in held_pieces(engine.state):
        kind, _, name = piece.tensor.partition("/")
        if kind in VALUES:
            piece.flat.copy_(weights.read(name, piece.part))


def save_folder(
    engine: Engine,
    path: str | Path,
    config: DecoderConfig,
    *,
    dtype: torch.dtype | None = None,
    vocab: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a decoder as a Hugging Face folder; collective, between steps. Rank 0 writes, one bucket is whole at once.

    dtype: of the tensors; None: that of the parameters, a wider one takes the masters. vocab: leave out the rows of a
    padded vocabulary from there on. Raises SetupError on every rank.
    """
    world, own = engine.world, engine.scope.dtype
    dtype = dtype or own
    plan = together(world, lambda: Export(config, vocab, path if world.rank == 0 else None))
    kind = "master" if dtype.itemsize > own.itemsize else "params"
    whole, problem = _stream(engine, kind), None
    if world.rank == 0:
        try:
            plan.write(dtype, whole, shard_bytes)
        except (OSError, ConfigError) as error:
            problem = ConfigError(f"{path} could not be written: {error}; give a folder with room")
    for _ in whole:  # on ranks that do not write, and on one that could not: the others wait for it
        pass
    together(world, lambda: _tell(problem))


def _tell(problem: ConfigError | None) -> None:
    if problem is not None:
        raise problem


def _stream(engine: Engine, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, whole, in the same order on every rank: buckets of all pipeline coordinates in turn."""
    specs = {name: p.spec for name, p in engine.state.params.items()}
    count = torch.tensor([len(engine.state.buckets)])
    engine.groups.axis("pp").all_reduce(count, "max").wait()
    buckets, seen = by_bucket(engine.state, kind), set[str]()
    for _ in range(int(count)):
        part = gather_full(next(buckets, {}), specs, engine.groups, engine.scope.device)
        for name, tensor in part.items():
            if name not in seen:
                seen.add(name)
                yield name, tensor


class Export:
    """What becomes of a decoder's parameters in a folder. path: checked to be free; None on ranks that do not write."""

    def __init__(self, config: DecoderConfig, vocab: int | None, path: str | Path | None) -> None:
        self.config, self.vocab = config, vocab or config.vocab
        family = family_of(config)
        self.table: Table = family.table(config, family.prefix)
        if self.vocab > config.vocab:
            raise ConfigError(f"vocab = {vocab} is more than the {config.vocab} tokens of the model")
        self.folder = None if path is None else check_target(path)

    def write(
        self,
        dtype: torch.dtype,
        parameters: Iterator[tuple[str, torch.Tensor]],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """parameters: every one of ours, whole, in any order."""
        if self.folder is None:
            raise TypeError("an Export without a folder cannot write")
        blocks = {block.name: block for blocks in self.table.values() for block in blocks}
        cut = {block.name for name in PADDED for block in self.table.get(name, ())}
        shapes = {name: (self.vocab, *b.shape[1:]) if name in cut else b.shape for name, b in blocks.items()}
        config = {**to_json(self.config, str(dtype).removeprefix("torch.")), "vocab_size": self.vocab}
        write_folder(self.folder, config, shapes, dtype, self._theirs(parameters, cut), shard_bytes)

    def _theirs(
        self, parameters: Iterator[tuple[str, torch.Tensor]], cut: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in parameters:
            for block in self.table[name]:
                rows = tensor[slice(*block.rows)]
                part = rows.t() if block.transposed else rows
                yield block.name, part[: self.vocab] if block.name in cut else part


PADDED = ("embed.tokens.weight", "loss.head.weight")
"""Parameters with a row for each token."""
