"""A decoder as a list of units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from triloom_kernels.rope import rope_tables

from ..scope import Scope
from .attention import RopeTables
from .blocks import HEAD, TOKENS, Block, Embed, Loss
from .config import DecoderConfig

Factory = Callable[[Scope], nn.Module]


@dataclass(frozen=True)
class Model:
    """What the Engine takes: how to build each unit on the rank that runs it."""

    units: dict[str, Factory]
    """By name, in order: ``embed``, ``blocks.0``, ``blocks.1``, ..."""
    loss: Factory
    """Builds the unit of ``forward(x, targets) -> (sum, weight)``."""
    ties: tuple[tuple[str, ...], ...]
    """Global names of parameters that share one value."""
    config: DecoderConfig


def decoder(config: DecoderConfig) -> Model:
    """The units of a decoder, unbuilt: nothing is allocated until a factory is called with a Scope."""

    @cache  # the blocks of a rank share one pair of tables
    def tables(device: torch.device, dtype: torch.dtype) -> RopeTables:
        wide = torch.promote_types(dtype, torch.float32)
        return rope_tables(config.max_seq, config.head_dim, config.rope_theta, dtype=wide, device=device)

    def block(name: str) -> Factory:
        def build(scope: Scope) -> nn.Module:
            rotation = tables(scope.device, scope.dtype) if config.positions == "rope" else None
            return Block(config, scope, name, rotation)

        return build

    units: dict[str, Factory] = {"embed": lambda scope: Embed(config, scope)}
    units |= {name: block(name) for name in (f"blocks.{i}" for i in range(config.layers))}
    ties = ((f"{TOKENS}.weight", f"{HEAD}.weight"),) if config.tied else ()
    return Model(units, lambda scope: Loss(config, scope), ties, config)
