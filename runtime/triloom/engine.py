"""The engine: a model, a mesh, a schedule and a placement, composed into a training step.

Composition only: every part is usable without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from . import schedules
from .actions import Action, Program
from .budget import fit
from .checkpoint import Restored, load, save
from .choosing import Auto, Choice, Chooser
from .compiling import evaluation, needs_headers, prove, state_layout
from .described import describe
from .diagnose import explained
from .errors import ConfigError
from .groups.base import Group
from .groups.mesh_groups import mesh_groups
from .groups.objects import agree, gather_objects
from .groups.solo import Solo
from .impossible import refuse_budget
from .measured import measurement
from .memory import Ledger, Report, largest
from .mesh import Mesh, make_mesh
from .metrics import Metrics as Metrics
from .microbatches import cut_batch, nbytes, signature, to_device
from .native import Pool
from .operations import Kernels, operations
from .optim import AdamW, Optimizer
from .parallel import build, views
from .parallel.accounting import enter, feedback_bytes
from .parallel.assembly import assemble
from .parallel.buffers import of_first
from .parallel.build import UnitLike
from .parallel.cut import boundary
from .parallel.executor import Executor, Recorder, StepState
from .parallel.gather import gather_full
from .parallel.norms import Clip
from .parallel.partition import partition
from .parallel.precision import model_dtype
from .parallel.reduction import Reduction
from .parallel.sharded import ShardedState
from .parallel.totals import Totals
from .parallel.trainable import Watch, retrain, unit_runs
from .parallel.wire import Wire
from .passes import add_recompute, recomputed_units
from .placement import Placement, zero1
from .program_file import complete
from .scaling import Scaling, dynamic, fixed
from .schedules import Schedule
from .scope import Scope
from .together import together
from .verify import Verdict


class Engine:
    """Trains a list of units on a mesh.

    units: modules (or functions of a Scope that build them, so that a rank holds only its own), in
    order, optionally by name. loss: the last unit, ``forward(x, targets) -> (sum, weight)`` with a
    method ``weight(targets)``; ``mean_loss(f)`` makes one of a mean. ties: groups of global parameter
    names (``unit.parameter``) that share one value; one Parameter object used in several units is
    tied without being named. Buffers (running statistics of batch norms) start as dp rank 0's; then each dp rank's
    modules change their own, and the model's are those of dp rank 0: evaluations and checkpoints take them.

    world: group of all ranks (``triloom.init().group``), a single rank if left out. mesh: how they are
    arranged, all data parallel if left out. schedule: a name of ``schedules.NAMED``, a Schedule, or ``"auto"``
    (``Auto(...)``), which measures the first steps and then runs the shortest program found.
    microbatches: pieces each dp rank's batch is cut into. stages: number of units of each stage,
    even if left out. clip: largest global gradient norm (2-norm, or a Clip), None for no clipping. scaling: of the
    loss, and how many steps with a gradient that is not finite may be skipped in a row; dynamic for fp16.
    reduction: how gradients are summed over dp (``parallel.reduction``: exactly, or compressed). dtype: of the
    parameters that functions of a Scope make, and of activations; the placement's, or fp32, if left out.
    shapes: what those between stages follow from, those of the ``batch`` or its ``data`` too; then activations travel
    behind headers, and memory is measured in each step. kernels: what layers compute with, ``operations()`` if left
    out. record: is told when each action ran (``spans.Spans``).

    Raises ConfigError, MeshError or ProgramError, on every rank, before the first step.
    """

    def __init__(
        self,
        units: Sequence[UnitLike] | Mapping[str, UnitLike],
        loss: UnitLike,
        *,
        world: Group | None = None,
        mesh: Mesh | None = None,
        optimizer: Optimizer | None = None,
        schedule: str | Schedule | Auto = "1f1b",
        microbatches: int = 1,
        placement: Placement | None = None,
        clip: float | Clip | None = 1.0,
        scaling: Scaling | None = None,
        reduction: Reduction | None = None,
        shapes: Literal["batch", "data"] = "batch",
        ties: Sequence[Sequence[str]] = (),
        stages: Sequence[int] | None = None,
        sequence_parallel: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        kernels: Kernels | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.world = world or Solo()
        self.mesh = mesh or make_mesh(self.world.size)
        self.placement = placement or zero1()
        dtype = model_dtype(dtype, self.placement)
        self.optimizer = optimizer or AdamW()
        self.groups = mesh_groups(self.world, self.mesh)
        self.steps = 0
        self.ledger = Ledger()
        self._microbatches = microbatches
        self.named = build.name_units(units, loss)
        pp = self.groups.axis("pp")
        make = _schedule(schedule)
        order = make(pp.size, microbatches)
        self._stages = partition(len(self.named), len(order.stages), stages)
        self._where = order.stages
        self._headers = needs_headers(shapes)
        same = self._fingerprint(order, [clip, scaling, reduction, seed, shapes], ties)
        agree(self.world, "the engine's configuration", same)
        self.scope = Scope(
            tp=self.groups.axis("tp"),
            sequence_parallel=sequence_parallel and self.groups.axis("tp").size > 1,
            seed=seed,
            device=device or torch.device("cpu"),
            dtype=dtype,
            selective=self.placement.activations == "selective",
            kernels=kernels or operations(),
        )
        self._build(ties, reduction)
        self._watch = Watch(self.named, self.modules.values(), alone=pp.size == 1)
        rule = scaling or (dynamic() if dtype == torch.float16 else fixed())
        self.totals = self._make_totals(clip, rule)
        self._record = record
        self._adopt(order, record)
        self.chosen: Choice | None = None
        """What the automatic schedule chose; None before, and for other schedules."""
        self._chooser = None if pp.size == 1 or not isinstance(make, Auto) else self._measure(make)

    # -- composition -----------------------------------------------------------------------------

    def _fingerprint(self, order: Program, numbers: list[Any], ties: Sequence[Sequence[str]]) -> list[Any]:
        """What must be equal on every rank, as JSON."""
        return [
            list(self.named), order.to_csv(), *map(describe, numbers), [list(t) for t in ties],
            [len(s) for s in self._stages], str(self.placement), describe(self.optimizer),
        ]  # fmt: skip

    def _build(self, ties: Sequence[Sequence[str]], reduction: Reduction | None) -> None:
        coord_of = [self._where[s] for s, run in enumerate(self._stages) for _ in run]
        self.ties = build.find_ties(self.named, ties, coord_of)

        tie_groups = build.tie_groups(self.ties, self.groups.axis("pp"))
        shard, replicas = build.shard_groups(self.groups.axis("dp"), self.placement.shard_ranks)
        self.state = ShardedState(
            dp=shard,
            replicas=replicas,
            tp=self.groups.axis("tp"),
            coord=self.groups.axis("pp").rank,
            tie_groups=tie_groups,
            placement=self.placement,
            optimizer=self.optimizer,
            device=self.scope.device,
            pool=Pool(torch.get_num_threads()) if torch.get_num_threads() > 1 else None,
            reduction=reduction,
            seed=self.scope.seed,
        )
        self.modules, self._collector = assemble(
            self.named, coord_of, scope=self.scope, ties=self.ties, tie_groups=tie_groups,
            groups=self.groups, world=self.world, state=self.state,
        )  # fmt: skip
        enter(self.ledger, self.state, self.state.buckets, self.modules.values())
        self._units = unit_runs(self.modules, self.state, len(self.named) - 1)

    def refresh(self) -> None:
        """Take notice of parameters whose ``requires_grad`` was changed; collective. A step does it by itself, but
        where ranks have only some of the units (functions of a Scope with pp > 1) nobody else can tell."""
        new = retrain(self._units, self._collector, self.state, self.steps)
        enter(self.ledger, self.state, new, self.modules.values())
        self.totals.renew()
        self._adopt(self.order, self._record)
        if self._chooser is not None:  # what it measured was another program
            self._chooser = self._measure(self._chooser.rule)
        self._watch.settle()

    def _make_totals(self, clip: float | Clip | None, scaling: Scaling) -> Totals:
        loss: Any = self.modules.get(len(self.named) - 1)
        tp = self.groups.axis("tp")
        return Totals(
            world=self.world,
            dp=self.groups.axis("dp"),
            state=self.state,
            weigh=None if loss is None else loss.weight,
            counts=loss is not None and tp.rank == 0,
            clip=clip if isinstance(clip, Clip) else Clip(clip),
            scaling=scaling,
        )

    def _make_executor(self, record: Recorder | None) -> Executor:
        return Executor(
            stages=self._stages,
            where=self._where,
            here=self.groups.axis("pp").rank,
            units=self._units,
            wire=Wire(
                self.groups.link, self.scope.device, self.state.spent.receives(None if record is None else record.wait)
            ),
            scope=self.scope,
            handlers={**self.state.handlers(), **self.totals.handlers()},
            ready=self.state.ready,
            record=record,
            ledger=self.ledger,
            flops=self.placement.activations == "budget",
            headers=self._headers,
        )

    def _adopt(self, order: Program, record: Recorder | None) -> None:
        """Run ``order`` from now on."""
        self.order = order
        self._executor = self._make_executor(record)
        self.program, self.verdict = self._compile(order)
        self._eval_program: Program | None = None
        self._recomputed = recomputed_units(self.placement, len(self.named))
        self._budget = self.placement.activation_bytes  # until the units to recompute are chosen

    def _measure(self, rule: Auto) -> Chooser:
        steps = measurement(self.program, self._stages, self.mesh)
        chooser = Chooser(rule, self.world, steps, self.scope.device, self._record)
        self._executor = self._make_executor(chooser.recorder)
        return chooser

    def _choose(self, chooser: Chooser) -> None:
        """Before a step: run the chosen program from it on, once enough is measured."""
        self.chosen = chooser.choose()
        if self.chosen is not None:
            self._chooser = None
            self._adopt(self.chosen.program, self._record)

    def _compile(self, order: Program) -> tuple[Program, Verdict]:
        """Schedule, communication, state; then the proof."""
        self._layout = state_layout(self._stages, self.state, self.groups.axis("pp"))
        if recomputed_units(self.placement, len(self.named)):
            order = add_recompute(order)
        return self._prove(complete(order, self._layout, self.placement))

    def _prove(self, program: Program) -> tuple[Program, Verdict]:
        return program, prove(program, self._layout, self.placement, self.groups, self._headers)

    # -- use -------------------------------------------------------------------------------------

    def step(self, inputs: Any, targets: Any) -> Metrics:
        """One optimizer step on this dp rank's samples (pytrees of tensors, dim 0 is the batch).

        Every rank of a dp coordinate passes the same samples.
        """
        if self._chooser is not None:
            self._choose(self._chooser)
        if self._watch.changed():
            self.refresh()
        if self._budget is not None:
            refuse_budget(self, inputs, targets)
        self._mode(training=True)
        state = self._begin(inputs, targets, training=True)
        state.lr = self.optimizer.lr(self.steps) if callable(self.optimizer.lr) else self.optimizer.lr
        self.state.begin_step()
        self._executor.run(self._actions(self.program), state)
        self.state.end_step()
        self.ledger.set("feedback", feedback_bytes(self.state.buckets))
        if self._budget is not None:
            self._recomputed, self._budget = self._fit(self._budget), None
        if self._chooser is not None:
            self._chooser.note()
        self.groups.check()
        self.steps += not state.skipped
        if state.diverged:
            raise explained(self, state.diverged, inputs, targets)
        return Metrics(
            state.step, state.loss, state.total_weight, state.grad_norm, state.lr,
            scale=state.scale, skipped=state.skipped, note=state.note, notices=state.notices,
        )  # fmt: skip

    def _fit(self, budget: int) -> frozenset[int]:
        """The units to recompute from now on, from what the first step measured; the same on every rank of tp."""
        everyone = gather_objects(self.groups.axis("tp"), self._executor.activations.largest())
        row, coord = self._actions(self.program), self.groups.axis("pp").rank
        return together(self.world, lambda: fit(row, self._layout, coord, largest(everyone), budget))

    def evaluate(self, inputs: Any, targets: Any) -> Metrics:
        """Loss without a gradient or an update; gradient norm and learning rate are 0. Buffers are dp rank 0's
        (``parallel.buffers``)."""
        if self._eval_program is None:
            self._eval_program = self._prove(evaluation(self.order, self._layout, self.placement))[0]
        self._mode(training=False)
        state = self._begin(inputs, targets, training=False)
        with of_first(self.modules.values(), self.groups.axis("dp")):
            self._executor.run(self._actions(self._eval_program), state)
        self.totals.finish_evaluation(state)
        return Metrics(state.step, state.loss, state.total_weight, 0.0, 0.0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole parameters inside the ``with``, to read or change (the same on every rank), whatever is sharded."""
        with self.state.gathered():
            yield

    def full_state(self, kind: str = "params") -> dict[str, torch.Tensor]:
        """Whole tensors by global name on every rank: ``params``, ``master``, or a state of the optimizer.

        Collective. Holds the whole model on every rank: for tests, export and small models.
        """
        mine = views.whole(self.state, kind)
        state = gather_full(mine, views.specs(self.state, mine), self.groups)
        if not state:
            raise ConfigError(f"no parameter has a state {kind!r}; ask for params, master or a state of the optimizer")
        return state

    def memory(self) -> Report:
        """Bytes this rank holds by class (``memory.CLASSES``), now and at the peak since the engine was built."""
        return self.ledger.report()

    @property
    def unsplit(self) -> dict[str, list[str]]:
        """This rank's units in which no weight gradient can wait for W, and their parameters; known after a step."""
        return {list(self.named)[u]: names for u, names in self._executor.unsplit().items()}

    @property
    def stage_units(self) -> Sequence[range]:
        """The global unit numbers of each stage."""
        return self._stages

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write all state to a new folder, or in place of an older checkpoint, with ``extra`` (JSON); collective."""
        save(self, folder, extra)

    def load(self, folder: str | Path) -> Restored:
        """Set all state to that of a checkpoint, written on any mesh; collective. Gives back what was ``extra``."""
        return load(self, folder)

    def close(self) -> None:
        """Release the groups made for the mesh; the world stays the caller's."""
        self.groups.close()

    # -- details ---------------------------------------------------------------------------------

    def _actions(self, program: Program) -> Sequence[Action]:
        return program.ranks[self.groups.axis("pp").rank]

    def _mode(self, *, training: bool) -> None:
        for m in self.modules.values():
            if m.training != training:
                m.train(training)

    def _begin(self, inputs: Any, targets: Any, *, training: bool) -> StepState:
        device = self.scope.device
        x, sizes = cut_batch(to_device(inputs, device), self._microbatches)
        y, _ = cut_batch(to_device(targets, device), self._microbatches)
        batch = sum(sizes)
        first = self.groups.axis("dp").rank * batch
        starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
        bounds = [boundary(t) for t in x]
        self.ledger.set("batch", nbytes((x, y)))
        return StepState(
            inputs=bounds,
            targets=y,
            signatures=[(training, *signature(b)) for b in bounds],
            samples=starts,
            step=self.steps,
            training=training,
            recomputed=self._recomputed,
        )


def _schedule(schedule: str | Schedule | Auto) -> Schedule:
    if not isinstance(schedule, str):
        return schedule
    if schedule == "auto":
        return Auto()
    if schedule not in schedules.NAMED:
        raise ConfigError(f"schedule {schedule!r} is not known; choose one of auto, {', '.join(schedules.NAMED)}")
    return schedules.NAMED[schedule]
