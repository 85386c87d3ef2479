"""Dropout whose draws depend on the place in the whole computation, not on the mesh.

An element's draw is keyed by (seed, step, unit, site) and its index in the whole batch, sequence and
channels, so that any split over tp, the sequence or the batch drops the same elements. The scope is read
at the forward; a recomputed forward under the same scope repeats the draws.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import philox
from ..errors import ConfigError
from ..scope import Scope
from .layout import layout_of


class _Dropout(nn.Module):
    def __init__(self, p: float, *, scope: Scope, site: str) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout probability at {site!r} must be in [0, 1), got {p}")
        self.p, self.site, self.scope = p, site, scope
        self._drop = scope.kernels.pick("dropout", scope.device)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0.0

    def _key(self) -> int:
        return philox.key(self.scope.seed, self.scope.step, self.scope.unit, self.site)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site!r}"


class Dropout(_Dropout):
    """On activations between tensor-parallel regions. site: name of the place within its unit."""

    def __init__(self, p: float, *, scope: Scope, site: str) -> None:
        super().__init__(p, scope=scope, site=site)
        self.layout = layout_of(scope)
        self._drop_add = scope.kernels.pick("bias_dropout_residual", scope.device)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[b, s, h]``, with sequence parallelism ``[s / tp, b, h]``."""
        if not self.active:
            return x
        out: Tensor = self._drop(x, self.p, self._key(), *self._place(x))
        return out

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + dropout(x)``, both of x's shape."""
        if not self.active:
            return residual + x
        out: Tensor = self._drop_add(x, None, residual, self.p, self._key(), *self._place(x))
        return out

    def _place(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """Index of the first element in the whole batch, and the index strides."""
        length, h = self.layout.length(x), x.shape[-1]
        first, sample = self.layout.positions(length).start, length * h
        base = self.scope.sample0 * sample + first * h
        return base, (h, sample, 1) if self.layout.sequence else (sample, h, 1)


class HeadDropout(_Dropout):
    """On attention probabilities; heads are split over tp, ``heads`` counts them all."""

    def __init__(self, p: float, *, scope: Scope, site: str, heads: int) -> None:
        super().__init__(p, scope=scope, site=site)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[b, heads / tp, s, s]``."""
        if not self.active:
            return x
        local, rows, columns = x.shape[1:]
        head = rows * columns
        base = (self.scope.sample0 * self.heads + self.scope.tp.rank * local) * head
        out: Tensor = self._drop(x, self.p, self._key(), base, (self.heads * head, head, columns, 1))
        return out
