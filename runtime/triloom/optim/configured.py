"""The optimizer of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..config import Config
from ..config.schema import OPTIMIZER_KEYS
from .adafactor import Adafactor
from .base import Rule, matrices
from .elementwise import SGD, AdamW, AdamW8bit, Lion
from .muon import muon_with_adamw
from .rates import LrSchedule, constant, warmup_cosine, wsd

KINDS: Mapping[str, Callable[..., Rule]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "sgd": partial(SGD, decay=matrices),
    "lion": Lion,
    "muon": muon_with_adamw,
    "adafactor": Adafactor,
}
"""By ``optim.kind``."""


def make_optimizer(config: Config) -> Rule:
    """The optimizer of a filled Config."""
    o = config.optim
    given = {name: value for name in OPTIMIZER_KEYS if (value := getattr(o, name)) is not None}
    return KINDS[o.kind](lr=make_rates(config), weight_decay=o.weight_decay, **given)


def make_rates(config: Config) -> LrSchedule:
    """The learning-rate schedule of a filled Config."""
    o = config.optim
    warmup, steps, floor = o.warmup or 0, o.steps or 1, o.min_lr or 0.0
    rates: dict[str, Callable[[], LrSchedule]] = {
        "constant": lambda: constant(o.lr, warmup=warmup),
        "cosine": lambda: warmup_cosine(o.lr, warmup=warmup, steps=steps, floor=floor),
        "wsd": lambda: wsd(o.lr, warmup=warmup, steps=steps, cooldown=o.cooldown or 0, floor=floor),
    }
    return rates[o.decay]()
