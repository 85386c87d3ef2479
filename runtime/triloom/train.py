"""The main job: a decoder trained on bytes, from a Config to a run directory.

:func:`train` is collective over the ranks of a world; ``triloom train`` is a thin shell around it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TextIO
from zlib import crc32

import torch

from .boot import World
from .config import Config
from .config.show import plain
from .data import Batch, Data, Feed, Tokenised, cut, find, is_long, open_found
from .dealing import deal
from .engine import Engine
from .errors import ConfigError, ProgramError
from .evaluation import Evaluation, HeldOut
from .foreseen import compared
from .groups.nccl_world import device_world
from .groups.objects import gather_objects
from .models import Model, decoder
from .optim.configured import make_optimizer as make_optimizer
from .parallel.executor import Recorder
from .parallel.reduction import REDUCTIONS
from .parallel.splitting import describe_unsplit
from .plan import Plan, make_plan
from .plan_rules import held_out
from .program_file import check, has_state
from .replicas import check_replicas
from .resuming import RunCheckpoints, find_start, go_on
from .runlog import Log, Result, check_run_dir, keep_tokenizer, open_log
from .scaling import dynamic, fixed
from .sinks import Sink, check_sinks
from .spans import spans_on
from .timing import Timing, make_timing
from .together import agree_on, together
from .tokenising import cache_folder, tokenise_here, tokenise_together
from .topology import describe_placement

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@dataclass(frozen=True)
class Job:
    """Everything about a run that one rank can know without asking the others."""

    plan: Plan
    data: Data
    model: Model

    def batch(self, step: int, rank: int) -> Batch:
        """Inputs and targets that a rank has of the batch number ``step``: the data position of a run in batches."""
        return self.data.train.batch(step, self.plan.config.train.batch, self.plan.dp, self._dp_rank(rank))

    def feed(self, rank: int, first: int = 0) -> Feed:
        """The batches of a rank one after the other, from sample ``first`` on: ``Feed.position`` of an earlier run."""
        config, dp = self.plan.config, self.plan.dp
        return Feed(
            self.data.train,
            config.train.batch,
            dp=dp,
            dp_rank=self._dp_rank(rank),
            first=first,
            ahead=config.data.prefetch,
        )

    def held_out(self, rank: int) -> HeldOut:
        """What an evaluation runs over."""
        t = self.plan.config.train
        return HeldOut(self.data, t.batch, t.eval_batches, self.plan.dp, self._dp_rank(rank))

    def _dp_rank(self, rank: int) -> int:
        return self.plan.mesh.coords(rank)["dp"]


def prepare(
    config: Config,
    world_size: int,
    sources: Mapping[str, str] | None = None,
    tokenised: Callable[[], Tokenised | None] | None = None,
) -> Job:
    """Check everything and open the data, allocating nothing. Raises ConfigError with every problem found.

    tokenised: gives what was made of text that must be tokenised first; none: it is done here if there is some.
    """
    found = find(config.data)
    if tokenised is None:
        _plan_before(config, world_size, sources)
        ready = tokenise_here(config, sys.stderr)
    else:
        ready = tokenised()
    opened = open_found(config.data, found, cache_folder(config), ready)
    vocab = opened.vocab or config.model.vocab
    if vocab is None:
        name = opened.train[0].name
        raise ConfigError(f"{name} is token ids, and does not say how many there are; set model.vocab")
    plan = make_plan(config, world_size, data_vocab=vocab, sources=sources)
    plan = deal(plan, make_optimizer(plan.config))
    if not has_state(plan.order):
        with _naming_file(plan):
            check(plan.order)  # now, without a world; the engine proves it again with the actions on state
    d = config.data
    data = cut(
        opened,
        seq=config.model.seq,
        seed=d.seed,
        vocab=plan.decoder.vocab,
        held_out=held_out(d),
        weights=d.weights,
    )
    return Job(plan, data, decoder(plan.decoder))


def _plan_before(config: Config, world_size: int, sources: Mapping[str, str] | None) -> None:
    """Raise what a plan would, before text is tokenised for long; of a vocabulary too small to be its reason."""
    if is_long(config.data, find(config.data)):
        make_plan(config, world_size, data_vocab=config.model.vocab or 2, sources=sources)


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
    cannot start, DivergedError on every rank if the gradient stops being finite, CheckpointError on every rank if a
    checkpoint cannot be written, or none be read to go on from.
    """
    job = prepare_together(config, world, sources, out or sys.stdout)
    agree_on(world.group, _must_agree(job), "start every rank with the same configuration and data")
    placed = describe_placement(world.group, job.plan.mesh, world.topology)
    if placed and world.rank == 0:
        print(placed, file=out or sys.stdout, flush=True)
    spans = spans_on(world.device) if job.plan.config.run.timeline else None
    with _naming_file(job.plan):
        engine = make_engine(job, world, spans)
    restored, goes_on = go_on(engine, config, world, job.data.digest)
    timing = make_timing(engine, spans, world.group, job.plan.config.run.timeline)
    log = together(world.group, lambda: open_log(job.plan, job.data.about, world, out or sys.stdout, sinks, goes_on))
    keep_tokenizer(job.data, log.folder)
    saves = RunCheckpoints(job.plan.config, engine, log.folder, world, job.data.digest, restored)
    with log, saves:
        result = Loop(job, engine, log, world, timing, saves).run()
    unsplit = describe_unsplit(gather_objects(world.group, engine.unsplit))
    if unsplit and world.rank == 0:
        print(unsplit, file=out or sys.stdout, flush=True)
    # Not after an error: releasing a group may wait for ranks that wait for this one.
    engine.close()
    return result


def prepare_together(
    config: Config, world: World, sources: Mapping[str, str] | None, out: TextIO, *, checked: bool = True
) -> Job:
    """:func:`prepare` on all ranks of ``world``, collective: one rank of each host tokenises, if that is needed.

    checked: look at the run directory and the sinks as well. Raises SetupError on every rank.
    """

    def first() -> None:
        if world.rank == 0 and checked:
            check_run_dir(config.run.dir, config.run.overwrite, goes_on=find_start(config).run is not None)
            check_sinks(config.log)
        _plan_before(config, world.size, sources)

    together(world.group, first)
    tokenised = tokenise_together(config, world, out)
    return together(world.group, lambda: prepare(config, world.size, sources, lambda: tokenised))


def _must_agree(job: Job) -> dict[str, str]:
    """Everything that ranks must have in common; run.* concerns rank 0 alone, train.threads and paths each host."""
    paths = ("path", "paths", "validation", "tokenizer", "cache")
    own = (("train", "threads"), ("schedule", "file"), ("schedule", "measured"), *(("data", name) for name in paths))
    values = {
        f"{section}.{name}": plain(value)
        for section, part in asdict(job.plan.config).items()
        for name, value in part.items()
        if section != "run" and (section, name) not in own
    }
    values["run.timeline"] = plain(job.plan.config.run.timeline)  # all ranks measure, or none
    order = job.plan.order
    values["the program"] = f"{order.name}, {sum(map(len, order.ranks))} actions, {crc32(order.to_csv().encode()):08x}"
    return values | {"the data": job.data.digest}


def make_engine(job: Job, world: World, record: Recorder | None = None) -> Engine:
    return engine_of(job.plan, job.model, world, record)


def engine_of(plan: Plan, model: Model, world: World, record: Recorder | None = None) -> Engine:
    config = plan.config
    return Engine(
        model.units,
        model.loss,
        ties=model.ties,
        world=device_world(world.group, world.device),
        mesh=plan.mesh,
        optimizer=make_optimizer(config),
        schedule=plan.schedule,
        stages=config.schedule.stages,
        microbatches=plan.microbatches,
        placement=plan.placement,
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

    def __init__(self, job: Job, engine: Engine, log: Log, world: World, timing: Timing, saves: RunCheckpoints) -> None:
        self._config = job.plan.config
        self._plan = job.plan
        self._job = job
        self._engine = engine
        self._log = log
        self._world = world
        self._timing = timing
        self._saves = saves

    def run(self) -> Result:
        begin = time.perf_counter()
        losses: list[float] = []
        held_out = self._job.held_out(self._world.rank)
        evaluation: Evaluation | None = None
        check_every = self._config.check.replicas
        with self._job.feed(self._world.rank, self._saves.position) as feed:
            while self._engine.steps < self._config.train.steps:  # a skipped step is not counted, but uses up its batch
                if check_every and self._engine.steps % check_every == 0:
                    check_replicas(self._engine)
                start = time.perf_counter()
                chosen = self._engine.chosen
                metrics = self._engine.step(*feed.next())
                seconds = time.perf_counter() - start
                if self._engine.chosen is not chosen and self._engine.chosen is not None:
                    self._log.say(self._engine.chosen.text)
                pipeline = self._timing.step(metrics.step)
                losses.append(metrics.loss)
                due = not metrics.skipped and self._due(metrics.step)
                evaluation = held_out.run(self._engine) if due else evaluation
                memory_now = self._engine.memory().shown
                times = self._engine.state.spent.seconds()
                self._log.step(metrics, seconds, memory_now, evaluation if due else None, pipeline, times)
                if self._saves.after(metrics, feed.position):
                    break
        self._saves.finish()
        spent = time.perf_counter() - begin
        memory = gather_objects(self._world.group, self._engine.memory().shown)
        self._timing.finish(self._log.folder)
        foreseen = "" if self._world.rank else compared(self._plan, self._engine.optimizer, memory, self._world.device)
        first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)  # nothing was left to do
        result = Result(self._log.folder, first, last, evaluation, spent, tuple(memory), foreseen, self._saves.stopped)
        self._log.finish(result)
        return result

    def _due(self, step: int) -> bool:
        t = self._config.train
        last = step + 1 == t.steps
        return t.eval_batches > 0 and (last or (t.eval_every > 0 and (step + 1) % t.eval_every == 0))
