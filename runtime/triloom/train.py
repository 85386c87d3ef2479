"""The main job: a decoder trained on bytes, from a Config to a run directory.

:func:`train` is collective over the ranks of a world; ``triloom train`` is a thin shell around it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TextIO
from zlib import crc32

import torch

from .boot import World
from .config import Config
from .config.show import plain
from .data import Batch, Corpus, Split, Windows, open_corpus, split
from .engine import Engine
from .errors import ProgramError
from .foreseen import compared
from .groups.nccl_world import device_world
from .groups.objects import gather_objects
from .models import Model, decoder
from .optim.configured import make_optimizer as make_optimizer
from .parallel.executor import Recorder
from .parallel.reduction import REDUCTIONS
from .plan import Plan, make_plan
from .program_file import check, has_state
from .runlog import Log, Result, check_run_dir, open_log
from .scaling import dynamic, fixed
from .sinks import Sink, check_sinks
from .spans import spans_on
from .timing import Timing, make_timing
from .together import agree_on, together
from .topology import describe_placement

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """Everything about a run that one rank can know without asking the others."""

    plan: Plan
    corpus: Corpus
    data: Split
    model: Model


def prepare(config: Config, world_size: int, sources: Mapping[str, str] | None = None) -> Job:
    """Check everything and open the data, allocating nothing. Raises ConfigError with every problem found."""
    corpus = open_corpus(config.data.path)
    plan = make_plan(config, world_size, data_vocab=corpus.vocab, sources=sources)
    if not has_state(plan.order):
        with _naming_file(plan):
            check(plan.order)  # now, without a world; the engine proves it again with the actions on state
    config = plan.config
    data = split(corpus, seq=config.model.seq, seed=config.data.seed, held_out=config.data.held_out)
    return Job(plan, corpus, data, decoder(plan.decoder))


@contextmanager
def _naming_file(plan: Plan) -> Iterator[None]:
    """A refusal of the program names the file it is from."""
    try:
        yield
    except ProgramError as error:
        file = plan.config.schedule.file
        raise ProgramError(str(error) if file is None else f"schedule.file = {file!r}: {error}") from None


def train(
    config: Config,
    world: World,
    *,
    sources: Mapping[str, str] | None = None,
    out: TextIO | None = None,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train as ``config`` says on all ranks of ``world``; rank 0 prints to ``out`` and writes the run directory.

    sources: where each key was given, for error messages. sinks: functions that take the record of each step, on
    rank 0 (``triloom.sinks``). Raises SetupError on every rank if the run
    cannot start, DivergedError on every rank if the gradient stops being finite.
    """
    job = together(world.group, lambda: _prepare_rank(config, world, sources))
    agree_on(world.group, _must_agree(job), "start every rank with the same configuration and data")
    placed = describe_placement(world.group, job.plan.mesh, world.topology)
    if placed and world.rank == 0:
        print(placed, file=out or sys.stdout, flush=True)
    spans = spans_on(world.device) if job.plan.config.run.timeline else None
    with _naming_file(job.plan):
        engine = make_engine(job, world, spans)
    timing = make_timing(engine, spans, world.group, job.plan.config.run.timeline)
    data = f"{job.corpus.name}, {len(job.corpus.tokens):,} bytes"
    log = together(world.group, lambda: open_log(job.plan, data, world, out or sys.stdout, sinks))
    with log:
        result = Loop(job, engine, log, world, timing).run()
    # Not after an error: releasing a group may wait for ranks that wait for this one.
    engine.close()
    return result


def _prepare_rank(config: Config, world: World, sources: Mapping[str, str] | None) -> Job:
    if world.rank == 0:
        check_run_dir(config.run.dir, config.run.overwrite)
        check_sinks(config.log)
    return prepare(config, world.size, sources)


def _must_agree(job: Job) -> dict[str, str]:
    """Everything that ranks must have in common; run.* concerns rank 0 alone, train.threads and paths each host."""
    own = (("train", "threads"), ("data", "path"), ("schedule", "file"))
    values = {
        f"{section}.{name}": plain(value)
        for section, part in asdict(job.plan.config).items()
        for name, value in part.items()
        if section != "run" and (section, name) not in own
    }
    values["run.timeline"] = plain(job.plan.config.run.timeline)  # all ranks measure, or none
    order = job.plan.order
    values["the program"] = f"{order.name}, {sum(map(len, order.ranks))} actions, {crc32(order.to_csv().encode()):08x}"
    return values | {"the data": f"{len(job.corpus.tokens)} bytes, digest {job.corpus.digest():016x}"}


def make_engine(job: Job, world: World, record: Recorder | None = None) -> Engine:
    config = job.plan.config
    return Engine(
        job.model.units,
        job.model.loss,
        ties=job.model.ties,
        world=device_world(world.group, world.device),
        mesh=job.plan.mesh,
        optimizer=make_optimizer(config),
        schedule=lambda ranks, microbatches: job.plan.order,
        microbatches=job.plan.microbatches,
        placement=job.plan.placement,
        clip=config.optim.clip,
        scaling=(dynamic if config.train.dtype == "float16" else fixed)(max_skips=config.optim.max_skips),
        reduction=REDUCTIONS[config.placement.reduction](),
        seed=config.train.seed,
        dtype=DTYPES[config.train.dtype],
        device=world.device,
        sequence_parallel=config.parallel.sequence,
        record=record,
    )


class Loop:
    """The steps of one run, on one rank."""

    def __init__(self, job: Job, engine: Engine, log: Log, world: World, timing: Timing) -> None:
        self._config = job.plan.config
        self._plan = job.plan
        self._data = job.data
        self._engine = engine
        self._log = log
        self._world = world
        self._timing = timing
        self._dp_rank = job.plan.mesh.coords(world.rank)["dp"]

    def run(self) -> Result:
        begin = time.perf_counter()
        losses: list[float] = []
        held_out: float | None = None
        for batch in itertools.count():  # a skipped step uses up its batch, and is not counted
            if self._engine.steps == self._config.train.steps:
                break
            start = time.perf_counter()
            metrics = self._engine.step(*self._batch(self._data.train, batch))
            seconds = time.perf_counter() - start
            pipeline = self._timing.step(metrics.step)
            losses.append(metrics.loss)
            evaluated = not metrics.skipped and self._due(metrics.step)
            held_out = self._evaluate() if evaluated else held_out
            self._log.step(metrics, seconds, self._engine.memory().shown, held_out if evaluated else None, pipeline)
        spent = time.perf_counter() - begin
        memory = gather_objects(self._world.group, self._engine.memory().shown)
        self._timing.finish(self._log.folder)
        foreseen = "" if self._world.rank else compared(self._plan, self._engine.optimizer, memory, self._world.device)
        result = Result(self._log.folder, losses[0], losses[-1], held_out, spent, tuple(memory), foreseen)
        self._log.finish(result)
        return result

    def _batch(self, windows: Windows, step: int) -> Batch:
        return windows.batch(step, self._config.train.batch, self._plan.dp, self._dp_rank)

    def _due(self, step: int) -> bool:
        t = self._config.train
        last = step + 1 == t.steps
        return t.eval_batches > 0 and (last or (t.eval_every > 0 and (step + 1) % t.eval_every == 0))

    def _evaluate(self) -> float:
        """Mean loss over the same held-out batches every time."""
        windows = self._data.held_out
        if windows is None:
            raise TypeError("nothing is held out; make_plan refuses evaluations then")
        count = self._config.train.eval_batches
        return sum(self._engine.evaluate(*self._batch(windows, i)).loss for i in range(count)) / count
