"""The parameters of a decoder out of a Hugging Face folder: any part of each, without the rest of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError
from ..models.config import DecoderConfig
from ..parts import Part, local_shape
from .folder import Folder, Stored, open_folder
from .names import Block, Table
from .shapes import Family, from_json

Ranges = Sequence[tuple[int, int]]

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names under which older versions stored constants."""

SAME = ("vocab", "hidden", "layers", "heads", "kv_heads", "ffn", "norm", "act", "positions", "bias", "norm_eps")
"""Fields of a decoder in which folder and model must agree."""


@dataclass(frozen=True)
class Weights:
    """An opened folder, as the parameters of the decoder ``config``."""

    folder: Folder
    family: Family
    config: DecoderConfig
    table: Table

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our parameter."""
        *_, last = blocks = self.table[name]
        shape = blocks[0].shape[::-1] if last.transposed else last.shape
        return (last.rows[1], *shape[1:])

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Flat elements of a parameter, in the folder's dtype: those of ``part``, or all."""
        shape = self.shape(name)
        part = part or Part(0, math.prod(shape))
        local = local_shape(shape, part)
        width = math.prod(local[1:])
        if not part.numel:
            return torch.empty(0)
        first, last = part.start // width, -(-part.stop // width)
        rows = list(_inside(part.slices if part.dim == 0 else ((0, shape[0]),), first, last))
        values = self._box(name, rows, part.slices if part.dim == 1 else None)
        return values.reshape(-1)[part.start - first * width : part.stop - first * width]

    def _box(self, name: str, rows: Ranges, cols: Ranges | None) -> torch.Tensor:
        """The rows and, of a matrix, columns of a parameter, in the order given."""
        parts = [
            _read(block, self.folder.tensors[block.name], (a - block.rows[0], b - block.rows[0]), cols)
            for lo, hi in rows
            for block in self.table[name]
            for a, b in ((max(lo, block.rows[0]), min(hi, block.rows[1])),)
            if a < b
        ]
        return torch.cat(parts)


def _inside(ranges: Ranges, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The global ranges of elements ``first`` to ``last`` of the concatenation of ``ranges``."""
    at = 0
    for lo, hi in ranges:
        a, b = max(first, at), min(last, at + hi - lo)
        if a < b:
            yield lo + a - at, lo + b - at
        at += hi - lo


def _read(block: Block, stored: Stored, rows: tuple[int, int], cols: Ranges | None) -> torch.Tensor:
    if len(block.shape) == 1:
        return stored.read(rows)
    cols = cols or ((0, block.shape[0 if block.transposed else 1]),)
    if block.transposed:
        return torch.cat([stored.read(c, rows) for c in cols]).t()
    return torch.cat([stored.read(rows, c) for c in cols], dim=1)


def open_weights(path: str | Path, config: DecoderConfig | None = None) -> Weights:
    """Open a folder as the parameters of ``config``, or of the decoder it describes itself.

    Learned positions may be more than the decoder's max_seq, the rest is left out; a tied folder fills an untied
    decoder. Raises ConfigError naming every other difference, and every tensor that is missing, has another shape, or
    belongs to no parameter.
    """
    folder = open_folder(path)
    try:
        family, theirs = from_json(folder.config)
    except ConfigError as error:
        raise ConfigError(f"{folder.path}: {error}") from None
    ours = config or theirs
    if differences := _differences(ours, theirs):
        raise ConfigError(f"{folder.path} holds another model: {'; '.join(differences)}")
    prefix = family.prefix if any(name.startswith(family.prefix) for name in folder.tensors) else ""
    table = family.table(ours, prefix)
    tensors = {name: t for name, t in folder.tensors.items() if not name.endswith(BUFFERS)}
    if theirs.tied:
        embedding = table["embed.tokens.weight"][0].name
        tensors.pop("lm_head.weight", None)
        if not ours.tied and embedding in tensors:
            tensors["lm_head.weight"] = tensors[embedding]
    _check(folder.path, table, tensors)
    return Weights(Folder(folder.path, folder.config, tensors), family, ours, table)


def _differences(ours: DecoderConfig, theirs: DecoderConfig) -> list[str]:
    """In words of the [model] section."""
    fields = (*SAME, "rope_theta") if ours.positions == "rope" else SAME
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in fields]
    out = [f"model.{name} = {mine}, there {there}" for name, mine, there in pairs if mine != there]
    if ours.tied and not theirs.tied:
        out.append("model.tied = true, there the output projection is a matrix of its own")
    if ours.positions == "learned" and ours.max_seq > theirs.max_seq:
        out.append(f"model.seq = {ours.max_seq}, there only {theirs.max_seq} positions were learned")
    return out


def _check(path: Path, table: Table, tensors: dict[str, Stored]) -> None:
    blocks = [block for blocks in table.values() for block in blocks]
    wrong = []
    for block in blocks:
        stored = tensors.get(block.name)
        if stored is None:
            wrong.append(f"{block.name} is missing")
        elif not _fits(block, stored.shape):
            wrong.append(f"{block.name} has shape {list(stored.shape)}, not {list(block.shape)}")
    wrong += [f"{name} belongs to no parameter" for name in sorted(set(tensors) - {b.name for b in blocks})]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConfigError(f"{path} does not hold what its config.json says: {'; '.join(wrong[:5])}{more}")


def _fits(block: Block, shape: tuple[int, ...]) -> bool:
    if block.name.endswith("wpe.weight") and len(shape) == 2:
        return shape[0] >= block.shape[0] and shape[1] == block.shape[1]
    return shape == block.shape
