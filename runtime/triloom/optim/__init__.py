'''Optimizers: rules over pieces of parameters, and learning-rate schedules.

Element-wise on flat shards: AdamW, SGD, Lion, AdamW8bit (block-wise), TorchOptimizer (those of ``torch.optim``).
On whole tensors, each of which one dp rank then updates (its tp ranks put it together and all compute the same):
Muon, Adafactor. Any of them runs under every placement. A parameter that had no gradient on any rank is left alone, as
by torch: no decay, no change of its states, and its count of updates stays.
Parameters can be treated differently by ``groups``, in the order given, by name and shape::

    AdamW(lr=3e-4, groups=(Group(match=lambda name, shape: "embed" in name, lr_scale=0.1, weight_decay=0.0),))

A rule of your own names what it keeps and updates a piece in place. Element-wise, it gets flat pieces, and
single operations in torch keep it bitwise equal under every placement::

    from dataclasses import dataclass
    import torch
    from triloom.optim import Rule, Spec

    @dataclass(frozen=True, kw_only=True)
    class SignDescent(Rule):
        """The sign of an averaged gradient (Bernstein et al., arXiv 1802.04434)."""

        beta: float = 0.9

        def states(self, shape, dtype):
            return {"momentum": Spec(shape, dtype)}

        @torch.no_grad()
        def update(self, param, grad, states, hyper, low):
            m = states["momentum"]
            m.mul_(self.beta).add_(grad * (hyper.grad_scale * (1 - self.beta)))
            param.mul_(1 - hyper.lr * hyper.weight_decay).sub_(m.sign() * hyper.lr)
            if low is not None:
                low.copy_(param)

    engine = triloom.Engine(units, loss, optimizer=SignDescent(lr=1e-3))

With ``reach = None`` in the class it would get whole tensors in their own shape.
'''

from .adafactor import Adafactor
from .adapter import TorchOptimizer
from .base import BLOCK, Group, Hyper, Match, Optimizer, Rule, Spec, Treatment, everything, matrices
from .elementwise import SGD, AdamW, AdamW8bit, Lion
from .muon import Muon, hidden_matrices, muon_with_adamw
from .rates import LrSchedule, constant, inverse_sqrt, warmup_cosine, wsd

__all__ = [
    "BLOCK",
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Group",
    "Hyper",
    "Lion",
    "LrSchedule",
    "Match",
    "Muon",
    "Optimizer",
    "Rule",
    "Spec",
    "TorchOptimizer",
    "Treatment",
    "constant",
    "everything",
    "hidden_matrices",
    "inverse_sqrt",
    "matrices",
    "muon_with_adamw",
    "warmup_cosine",
    "wsd",
]
