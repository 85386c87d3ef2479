"""``triloom verify``: the same training in two arrangements, and how far apart the results are."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from ..config import Config, load
from ..config.rules import at_least, one_of
from ..config.schema import Section, TrainConfig
from ..errors import ConfigError, DivergedError, ProgramError, TriloomError
from .options import describe, read

if TYPE_CHECKING:
    from ..boot import World
    from ..compare import Comparison, Trace
    from ..groups.base import Group
    from ..plan import Plan
    from ..train import Job

USAGE = """\
triloom verify: run a few steps of a training on its mesh and again on one rank, and compare.

  triloom verify --config run.toml --parallel.tp 2 --parallel.pp 2         ranks are threads of this process
  mpirun -n 4 triloom verify --config run.toml --parallel.tp 2             ranks are processes; the second run: rank 0
  triloom verify --parallel.pp 2 --against --schedule.kind gpipe           a second run of your own, from here on

Takes every key of triloom train. Keys behind --against hold for the second run, which starts from those of the first;
without it, the second run is one rank with everything whole. Compared are the loss of every step, the gradient of
the first, and the weights at the end; also, that parameters which ranks hold alike are alike.

Where only schedule or placement differ on the same mesh, every bit must be equal, and both run as configured. Otherwise
sums are added in another order, and both run in float64, where rounding hides no mistake (--dtype own: as configured,
with a tolerance for that dtype). Ranks are threads only on a CPU.

Exit code: 0 equal, 1 not equal, 2 nothing was run.

"""

OK, FAILED, REFUSED = 0, 1, 2
LONGEST = 7 * 86400.0
"""Seconds that ranks wait for those that run the second arrangement."""
SHOWN = 8
"""Tensors and problems in the text."""
WAY_OUT = (
    "gradients go wrong from the end of the model to its beginning, so look at the last unit named first. A unit of "
    "your own must give the same numbers on every mesh: no state between microbatches, no draws but triloom's"
)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Section):
    """Options that are not keys of the configuration."""

    config: str | None = None
    """TOML file of a training; the command line overrides it."""
    steps: Annotated[int, at_least(1)] = 3
    """Optimizer steps of each run."""
    ranks: Annotated[int | None, at_least(1)] = None
    """Ranks, as threads, for a mesh that leaves parallel.dp open."""
    dtype: Annotated[str | None, one_of(("own", "float64"))] = None
    """own: as configured. float64: both runs in it. none: float64 unless every bit must be equal."""
    all: bool = False
    """Show every tensor, not only the largest differences."""
    json: bool = False
    """Print one JSON object instead of text."""


def run_verify(words: Sequence[str]) -> int:
    """``triloom verify``."""
    if "--help" in words or "-h" in words:
        print(USAGE + describe(VerifyOptions), end="")
        return OK
    from .. import boot

    return (_on_ranks if boot.announced().size > 1 else _on_threads)(words)


def _on_ranks(words: Sequence[str]) -> int:
    """Every problem is told once, by rank 0; that of the words too, which every rank has."""
    from .. import boot
    from ..together import together

    try:
        train = _read(words)[1].train
    except ConfigError:
        train = TrainConfig()
    with boot.init(threads=train.threads, deadline=train.deadline) as world:
        try:
            return verify(world, *together(world.group, lambda: _read(words)))
        except (ConfigError, ProgramError, DivergedError) as problem:
            if world.rank == 0:
                _say(problem)
            return FAILED if isinstance(problem, DivergedError) else REFUSED


def _read(words: Sequence[str]) -> tuple[VerifyOptions, Config, Config | None]:
    """Options, the first configuration, and the second one if there is an ``--against``."""
    before, _, after = _partition(list(words), "--against")
    own, keys = split_keys(before)
    stray, other = split_keys(after)
    if stray:
        raise ConfigError(f"{stray[0]!r} is not a key of the second run; give it before --against")
    options, rest = read(VerifyOptions, own)
    if rest:
        raise ConfigError(f"{rest[0]!r} is not an option; keys look like --section.key value")
    first = load(keys, options.config).config
    if "--against" not in words:
        return options, first, None
    given = {word.partition("=")[0] for word in other if word.startswith("--")}
    kept = [word for name, *values in _pairs(keys) if name.partition("=")[0] not in given for word in (name, *values)]
    return options, first, load([*kept, *other], options.config).config


def _partition(words: list[str], at: str) -> tuple[list[str], list[str], list[str]]:
    where = words.index(at) if at in words else len(words)
    return words[:where], words[where : where + 1], words[where + 1 :]


def _pairs(words: Sequence[str]) -> Iterator[list[str]]:
    """Each option with the words that follow it."""
    pair: list[str] = []
    for word in words:
        if word.startswith("--") and pair:
            yield pair
            pair = []
        pair.append(word)
    if pair:
        yield pair


def split_keys(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own options, and those with a section, each with the words that follow it."""
    own: list[str] = []
    keys: list[str] = []
    for pair in _pairs(words):
        (keys if "." in pair[0].partition("=")[0] else own).extend(pair)
    return own, keys


def _say(problem: TriloomError) -> None:
    print(f"triloom: {problem}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the two runs


def _on_threads(words: Sequence[str]) -> int:
    import torch

    from .. import boot
    from ..groups.threads import run_threads

    options, first, second = _read(words)
    sizes = [_ranks(config, options.ranks or 1) for config in (first, second) if config is not None]
    threads, before = first.train.threads or 1, torch.get_num_threads()

    def body(group: Group) -> int:
        world = boot.init(group=group, hooks=False, threads=threads, device="cpu", local_rank=0, local_size=1)
        return verify(world, options, first, second)

    try:
        return run_threads(max(sizes), body)[0]
    except DivergedError as problem:
        _say(problem)
        return FAILED
    finally:
        torch.set_num_threads(before)


def _ranks(config: Config, world: int) -> int:
    """Of a configuration's mesh; one that leaves dp open takes the whole world."""
    p = config.parallel
    inner = p.pp * p.tp
    return max(world, inner) if p.dp is None else p.dp * inner


def verify(world: World, options: VerifyOptions, first: Config, second: Config | None) -> int:
    """Both runs, and what rank 0 prints about them; collective. Returns the exit code, the same on every rank."""
    from ..arrangements import in_float64, is_bitwise, tolerance
    from ..compare import compare
    from ..groups.objects import broadcast_object

    jobs, found = _jobs(world, first, second)
    if options.dtype == "float64" or (options.dtype is None and not is_bitwise(found)):
        jobs = [replace(job, plan=_planned(in_float64(job.plan.config), job.plan)) for job in jobs]
    allowed = tolerance(jobs[0].plan, found)
    traces = [_trace(world, job, options.steps) for job in jobs]
    code = OK
    if world.rank == 0:
        result = compare(traces[0], traces[1], allowed)
        show = _as_json if options.json else _as_text
        print(show(result, jobs, traces, options), flush=True)
        code = OK if result.equal else FAILED
    return int(broadcast_object(world.group, code))


def _jobs(world: World, first: Config, second: Config | None) -> tuple[list[Job], dict[str, tuple[str, str]]]:
    """Both runs, and the keys in which they differ. Raises SetupError on every rank."""
    from ..arrangements import alone, check_pair
    from ..together import together
    from ..tokenising import tokenise_together
    from ..train import prepare

    tokenised = tokenise_together(first, world, sys.stderr)
    one = together(world.group, lambda: prepare(first, _size(first, world), None, lambda: tokenised))

    def pair() -> tuple[Job, dict[str, tuple[str, str]]]:
        config = second or alone(one.plan)
        two = _planned(config, one.plan, _size(config, world))
        return replace(one, plan=two), check_pair(one.plan, two)

    two, found = together(world.group, pair)
    return [one, two], found


def _planned(config: Config, like: Plan, size: int | None = None) -> Plan:
    from ..plan import make_plan

    return make_plan(config, size or like.mesh.size, data_vocab=like.decoder.vocab)


def _size(config: Config, world: World) -> int:
    """Ranks of a run; raises MeshError if there are not as many."""
    from ..errors import MeshError

    size = _ranks(config, world.size)
    if size > world.size:
        raise MeshError(f"the mesh of a run needs {size} ranks, {world.size} were started")
    return size


def _trace(world: World, job: Job, steps: int) -> Trace:
    """Run a job on the first ranks of the world; the others wait. What they get is empty.

    Raises DivergedError on every rank if it ends with an error of triloom's.
    """
    from ..compare import Trace, trace
    from ..groups.objects import gather_objects

    size, error = job.plan.mesh.size, None
    result = Trace((), {}, {}, {}, 0)
    group = world.group if size == world.size else world.group.split([list(range(size))], "verify")
    if world.rank < size:
        try:
            result = trace(job, replace(world, group=group, size=size, _lifetime=None), steps)
        except TriloomError as problem:
            error = str(problem)
    world.group.barrier().wait(LONGEST)
    said = [text for text in gather_objects(world.group, error) if text is not None]
    if said:
        raise DivergedError(f"the run on {job.plan.mesh} ended: {said[0]}")
    if group is not world.group:
        group.close()
    return result


# ---------------------------------------------------------------- what is printed


def _about(plan: Plan) -> str:
    config = plan.config
    return (
        f"{plan.mesh}, {plan.order.name}, {plan.microbatches} microbatches, {config.placement.name}"
        f"{', sequence parallel' if config.parallel.sequence else ''}, {config.train.dtype}"
    )


def _as_text(result: Comparison, jobs: Sequence[Job], traces: Sequence[Trace], options: VerifyOptions) -> str:
    return "\n".join(_lines(result, jobs, traces, options))


def _lines(result: Comparison, jobs: Sequence[Job], traces: Sequence[Trace], options: VerifyOptions) -> Iterator[str]:
    from ..compare import loss_share

    for number, (job, one) in enumerate(zip(jobs, traces, strict=True), 1):
        verdict = "differ" if one.drifted else "are equal"
        alike = f"; replicas {verdict} ({one.replicated} parameters of a rank)" if one.replicated else ""
        yield f"run {number}: {_about(job.plan)}{alike}"
    yield f"must be equal: {result.tolerance}"
    shares = [loss_share(a, b) for a, b in result.losses]
    step = max(range(len(shares)), key=shares.__getitem__)
    yield f"loss: furthest apart at step {step}: {result.losses[step][0]:.9g} and {result.losses[step][1]:.9g} " + (
        f"({shares[step]:.1e} of it)" if shares[step] else "(the same)"
    )
    shown = sorted(result.tensors, key=lambda d: max(d.grads, d.weights), reverse=True)
    shown = shown if options.all else shown[:SHOWN]
    wide = max((len(d.name) for d in shown), default=0)
    yield f"{'':{wide}}  first gradient: share  largest   weights after {len(shares)}: share  largest  bits"
    for d in shown:
        noise = f"  {d.noise} elements are noise" if d.noise else ""
        yield (
            f"{d.name:{wide}}  {d.grads:21.1e}  {d.grads_most:7.1e}  {d.weights:21.1e}  {d.weights_most:7.1e}  "
            f"{'same' if d.same else 'differ'}{noise}"
        )
    if len(result.tensors) > len(shown):
        yield f"{len(result.tensors) - len(shown)} tensors that are no further apart are not shown (--all)"
    if result.equal:
        yield f"equal: loss, gradients and weights of {len(result.tensors)} tensors"
        return
    more = f", and {len(result.problems) - SHOWN} more" if len(result.problems) > SHOWN else ""
    yield f"NOT EQUAL: {'; '.join(result.problems[:SHOWN])}{more}"
    yield f"what to do: {WAY_OUT}"


def _as_json(result: Comparison, jobs: Sequence[Job], traces: Sequence[Trace], options: VerifyOptions) -> str:
    from ..compare import loss_share

    def run(job: Job, one: Trace) -> dict[str, Any]:
        plan = job.plan
        return {
            "mesh": dict(plan.mesh.axes),
            "schedule": plan.order.name,
            "microbatches": plan.microbatches,
            "placement": plan.config.placement.name,
            "dtype": plan.config.train.dtype,
            "replicated": one.replicated,
        }

    tolerance = result.tolerance
    return json.dumps(
        _finite(
            {
                "equal": result.equal,
                "problems": result.problems,
                "tolerance": {**asdict(tolerance), "bitwise": tolerance.exact},
                "steps": options.steps,
                "runs": [run(job, one) for job, one in zip(jobs, traces, strict=True)],
                "losses": [{"one": a, "two": b, "share": loss_share(a, b)} for a, b in result.losses],
                "tensors": [asdict(d) for d in result.tensors],
            }
        )
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
