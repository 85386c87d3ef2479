"""triloom: tensor, pipeline and data parallelism and a memory hierarchy woven into one training step.

The names below are imported when they are first used: ``import triloom`` itself only costs this file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boot import World as World
    from .boot import adopt as adopt
    from .boot import init as init
    from .checkpoint import Checkpoints as Checkpoints
    from .engine import Engine as Engine
    from .engine import Metrics as Metrics
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DeadlineError as DeadlineError
    from .errors import DeadlockError as DeadlockError
    from .errors import DivergedError as DivergedError
    from .errors import GroupError as GroupError
    from .errors import MeshError as MeshError
    from .errors import MismatchError as MismatchError
    from .errors import ProgramError as ProgramError
    from .errors import TriloomError as TriloomError
    from .groups.base import Group as Group
    from .groups.solo import Solo as Solo
    from .groups.threads import run_threads as run_threads
    from .mesh import Mesh as Mesh
    from .mesh import make_mesh as make_mesh
    from .microbatches import Microbatches as Microbatches
    from .optim import SGD as SGD
    from .optim import Adafactor as Adafactor
    from .optim import AdamW as AdamW
    from .optim import AdamW8bit as AdamW8bit
    from .optim import Lion as Lion
    from .optim import Muon as Muon
    from .optim import TorchOptimizer as TorchOptimizer
    from .optim import warmup_cosine as warmup_cosine
    from .optim import wsd as wsd
    from .parallel.build import mean_loss as mean_loss
    from .parallel.recompute import recompute as recompute
    from .parallel.skips import with_skips as with_skips
    from .parallel.splitting import second_pass as second_pass
    from .placement import Placement as Placement
    from .placement import zero0 as zero0
    from .placement import zero1 as zero1
    from .replicas import check_replicas as check_replicas
    from .scope import Scope as Scope

__version__ = "0.1.0"

_HOME = {
    "boot": ("World", "adopt", "init"),
    "checkpoint": ("Checkpoints",),
    "engine": ("Engine", "Metrics"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DeadlineError",
        "DeadlockError",
        "DivergedError",
        "GroupError",
        "MeshError",
        "MismatchError",
        "ProgramError",
        "TriloomError",
    ),
    "groups.base": ("Group",),
    "groups.solo": ("Solo",),
    "groups.threads": ("run_threads",),
    "mesh": ("Mesh", "make_mesh"),
    "microbatches": ("Microbatches",),
    "optim": (
        "Adafactor",
        "AdamW",
        "AdamW8bit",
        "Lion",
        "Muon",
        "SGD",
        "TorchOptimizer",
        "warmup_cosine",
        "wsd",
    ),
    "parallel.build": ("mean_loss",),
    "parallel.recompute": ("recompute",),
    "parallel.skips": ("with_skips",),
    "parallel.splitting": ("second_pass",),
    "placement": ("Placement", "zero0", "zero1"),
    "replicas": ("check_replicas",),
    "scope": ("Scope",),
}
"""Module -> the public names it holds; the imports above say the same to type checkers."""

_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_MODULE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE])
