"""One training run in two arrangements: the losses, gradients and weights of both, and how far they are apart.

Both runs start from the same weights and see the same samples. A run holds its whole gradient and two copies of
the whole model on every rank: for models, or sizes of one, that fit there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .boot import World
from .errors import DivergedError
from .groups.objects import gather_objects
from .replicas import compare_replicas
from .train import Job, make_engine

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trace:
    """What a run left behind; the same on every rank of it. Tensors are whole, on the CPU, by global name."""

    losses: tuple[float, ...]
    start: Tensors
    """Weights before the first step."""
    grads: Tensors
    """Of the first step that was not skipped, before clipping and without the loss scale."""
    weights: Tensors
    replicated: int
    """Parameters of a rank that other ranks hold too, of the rank with most of them."""
    drifted: tuple[str, ...] = ()
    """Those whose holders do not agree after the last step."""


def trace(job: Job, world: World, steps: int) -> Trace:
    """Train ``steps`` steps of a job on all ranks of ``world``; collective.

    Raises SetupError as training does, DivergedError if the gradient is finite in no step.
    """
    engine = make_engine(job, world)
    start = _copy(engine.full_state())
    losses: list[float] = []
    grads: Tensors = {}
    for step in range(steps):
        metrics = engine.step(*job.batch(step, world.rank))
        losses.append(metrics.loss)
        if not grads and not metrics.skipped:
            grads = {name: g / metrics.scale for name, g in _copy(engine.full_state("grads")).items()}
    if not grads:
        raise DivergedError(f"no gradient of {steps} steps was finite ({metrics.note}); verify more steps")
    replicas = compare_replicas(engine)
    most = max(gather_objects(world.group, replicas.alike))
    weights = _copy(engine.full_state())
    engine.close()
    return Trace(tuple(losses), start, grads, weights, most, replicas.differing)


def _copy(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


# ---------------------------------------------------------------- how far apart


@dataclass(frozen=True)
class Tolerance:
    """What is still equal, as shares (:class:`Difference`), and why; all 0: every bit."""

    loss: float
    grads: float
    weights: float
    eps: float
    """Relative rounding error of the coarsest numbers that take part."""
    why: str

    @property
    def exact(self) -> bool:
        return not (self.loss or self.grads or self.weights)

    def __str__(self) -> str:
        if self.exact:
            return f"every bit ({self.why})"
        return f"loss {self.loss:g}, gradients {self.grads:g}, weights {self.weights:g} ({self.why})"


@dataclass(frozen=True)
class Difference:
    """Of one tensor. Shares are norms of differences (2-norm) over norms of what they are differences of."""

    name: str
    shape: tuple[int, ...]
    grads: float
    """Share of the gradient, whose norm counts as no less than a thousandth of what an average tensor of its size
    has: what is zero but for rounding cannot be judged by itself."""
    grads_most: float
    """Largest difference of an element."""
    weights: float
    """Share of how far training has moved the tensor, beyond the rounding of the weights themselves; without
    elements whose gradient is rounding noise, which Adam and Lion turn into steps of any sign."""
    weights_most: float
    noise: int
    """Elements left out of ``weights`` for that reason."""
    same: bool
    """Gradient and weights are equal bit for bit."""


@dataclass(frozen=True)
class Comparison:
    """Two traces side by side."""

    losses: tuple[tuple[float, float], ...]
    tensors: tuple[Difference, ...]
    tolerance: Tolerance
    problems: tuple[str, ...]
    """What is not equal within the tolerance; empty if all is."""

    @property
    def equal(self) -> bool:
        return not self.problems


NOISE = 1e3
"""A gradient below so many rounding errors of the largest one is noise."""
FLOOR = 1e-3


def compare(one: Trace, two: Trace, tolerance: Tolerance) -> Comparison:
    """How far ``one`` is from ``two``, which counts as right."""
    losses = tuple(zip(one.losses, two.losses, strict=True))
    names = sorted(set(one.weights) | set(two.weights))
    apart = [name for name in names if name not in one.weights or name not in two.weights]
    shared = [name for name in names if name not in apart]
    scale = _Scale(two, tolerance.eps)
    tensors = tuple(_difference(name, one, two, scale) for name in shared)
    problems = [f"ranks of run {run} differ in {text}" for run, t in ((1, one), (2, two)) for text in t.drifted]
    problems += [f"{name} is in one of the two models only" for name in apart]
    problems += _problems(losses, tensors, tolerance)
    return Comparison(losses, tensors, tolerance, tuple(problems))


class _Scale:
    """Sizes of the whole gradient, against which those of a tensor are seen."""

    def __init__(self, trace: Trace, eps: float) -> None:
        grads = [g.double() for g in trace.grads.values() if g.numel()]
        largest = max((float(g.abs().max()) for g in grads), default=0.0)
        count = sum(g.numel() for g in grads)
        self.mean = math.sqrt(sum(float(g.norm()) ** 2 for g in grads) / max(1, count))
        """Root of the mean square of an element."""
        self.noise = NOISE * eps * largest
        self.eps = eps
        self.steps = len(trace.losses)


def _difference(name: str, one: Trace, two: Trace, scale: _Scale) -> Difference:
    g, want_g = one.grads[name].double(), two.grads[name].double()
    w, want_w, start = one.weights[name].double(), two.weights[name].double(), two.start[name].double()
    dg, dw = (g - want_g).abs(), (w - want_w).abs()
    least = FLOOR * scale.mean * math.sqrt(max(1, g.numel()))
    noise = want_g.abs() <= scale.noise
    # Where there is no difference, noise has done no harm and need not be left out.
    noise &= dw > 0
    judged = dw.masked_fill(noise, 0.0)
    eps = torch.finfo(two.weights[name].dtype).eps
    rounding = 2 * scale.steps * eps * float(want_w.norm())
    return Difference(
        name=name,
        shape=tuple(w.shape),
        grads=_share(float(dg.norm()), float(want_g.norm()) + least),
        grads_most=float(dg.max()) if dg.numel() else 0.0,
        weights=_share(float(judged.norm()) - rounding, float((want_w - start).norm())),
        weights_most=float(dw.max()) if dw.numel() else 0.0,
        noise=int(noise.sum()),
        same=torch.equal(one.grads[name], two.grads[name]) and torch.equal(one.weights[name], two.weights[name]),
    )


def _share(difference: float, size: float) -> float:
    """NaN stays NaN, which is within no tolerance."""
    if difference <= 0:
        return 0.0
    return difference / size if size else math.inf


def loss_share(one: float, two: float) -> float:
    return _share(abs(one - two), abs(two))


def _problems(
    losses: tuple[tuple[float, float], ...], tensors: tuple[Difference, ...], tolerance: Tolerance
) -> Iterator[str]:
    for step, (a, b) in enumerate(losses):
        if not (a == b if tolerance.exact else loss_share(a, b) <= tolerance.loss):
            yield f"loss of step {step}: {a!r} and {b!r}"
            break
    if tolerance.exact:
        yield from (f"{d.name} differs" for d in tensors if not d.same)
        return
    yield from (f"gradient of {d.name} by {d.grads:.2g}" for d in tensors if not d.grads <= tolerance.grads)
    yield from (f"weights of {d.name} by {d.weights:.2g}" for d in tensors if not d.weights <= tolerance.weights)
