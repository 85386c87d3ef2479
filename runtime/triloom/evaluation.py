"""What a model makes of held-out text: loss, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .data import Data
from .engine import Engine
from .errors import ConfigError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. bits_per_byte: None where the text of the tokens is not known."""

    loss: float
    """Mean over the tokens, in nats."""
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss): infinite where that is not a number any more."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def as_dict(self) -> dict[str, Any]:
        return {
            "held_out_loss": self.loss,
            "held_out_perplexity": self.perplexity,
            "held_out_bits_per_byte": self.bits_per_byte,
        }

    def __str__(self) -> str:
        bits = "bits a byte unknown: the tokens come without text"
        if self.bits_per_byte is not None:
            bits = f"{self.bits_per_byte:.4f} bits a byte"
        return f"perplexity {self.perplexity:.4g}, {bits}"


NOT_EVALUATED: Mapping[str, None] = dict.fromkeys(Evaluation(0.0, None).as_dict())
"""The numbers of a step without an evaluation."""


@dataclass(frozen=True)
class HeldOut:
    """The batches of an evaluation: the same ones every time, at most all windows that are held out."""

    data: Data
    size: int
    """Samples of a batch, over all dp ranks."""
    wanted: int
    """Batches, if there are so many."""
    dp: int
    dp_rank: int

    @property
    def batches(self) -> int:
        """Batches of one evaluation; the last windows, too few for another, are left out."""
        if self.data.held_out is None:
            raise ConfigError("nothing is held out to evaluate on; raise data.held_out, or give data.validation")
        return min(self.wanted, max(1, self.data.held_out.count // self.size))

    def run(self, engine: Engine) -> Evaluation:
        """Evaluate, forward only; collective over the engine's ranks."""
        windows, count = self.data.held_out, self.batches
        if windows is None:
            raise TypeError("batches has refused this")
        each = [engine.evaluate(*windows.batch(i, self.size, self.dp, self.dp_rank)).loss for i in range(count)]
        loss = sum(each) / count
        per_byte = self.tokens_per_byte
        return Evaluation(loss, None if per_byte is None else loss / math.log(2) * per_byte)

    @cached_property
    def tokens_per_byte(self) -> float | None:
        """Of the evaluated targets: their number by the bytes of UTF-8 that they stand for; None without a text."""
        if self.data.tokenizer is None or self.data.held_out is None:
            return None
        targets = [self.data.held_out.take(i * self.size, self.size)[1].numpy() for i in range(self.batches)]
        size = sum(self.data.tokenizer.byte_count(ids) for ids in targets)
        return sum(int(np.size(ids)) for ids in targets) / size if size else None
