"""What several values of a configuration must satisfy together: tables of the keys concerned and the rule. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .actions import Program
from .config import Config
from .config.schema import AUTO, OPTIMIZER_KEYS, OPTIMIZERS, DataConfig, ModelConfig, PlacementConfig
from .config.show import plain
from .errors import MeshError
from .mesh import Mesh, check_divides
from .placement import NAMED as PLACEMENTS

Keys = tuple[str, ...]


def _multiple(what: str, value: int, of: str, divisor: int) -> str | None:
    if value % divisor == 0:
        return None
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    near = f"{below} or {above}" if below else f"{above}"
    return f"{what} = {value} must be a multiple of {of} = {divisor}: {near} would do"


def _heads(c: Config) -> str | None:
    return _multiple("hidden", c.model.hidden, "heads", c.model.heads)


def _kv_heads(c: Config) -> str | None:
    return _multiple("heads", c.model.heads, "kv_heads", c.model.kv_heads or 1)


def _llama_options(c: Config) -> str | None:
    m = c.model
    if m.shape != "llama":
        return None
    if m.attention_dropout:
        return "the llama shape has no dropout on attention weights; set it to 0, or use the gpt2 shape"
    if m.hidden % m.heads == 0 and (m.hidden // m.heads) % 2:
        return f"rotary positions need an even head size, hidden / heads is {m.hidden // m.heads}; change either"
    return None


def _rope(c: Config) -> str | None:
    unused = ModelConfig().rope_theta
    given = c.model.shape != "llama" and c.model.rope_theta != unused
    return "the gpt2 shape has learned positions; leave rope_theta out, or use the llama shape" if given else None


def _rates(c: Config) -> str | None:
    o = c.optim
    unused = {"constant": ("min_lr", "steps", "cooldown"), "cosine": ("cooldown",), "wsd": ()}[o.decay]
    given = [f"optim.{n}" for n in unused if getattr(o, n) is not None]
    if given:
        return f"a {o.decay} learning rate does not use {' and '.join(given)}; leave it out"
    if o.decay == "constant":
        return None
    if o.min_lr is not None and o.min_lr > o.lr:
        return "the learning rate cannot decay upwards; lower min_lr or raise lr"
    end = o.steps or c.train.steps
    if o.warmup is not None and o.cooldown is not None and o.warmup + o.cooldown > end:
        return f"warm-up and cooldown must fit into {end} steps; shorten one of them"
    late = o.warmup is not None and o.warmup >= end
    return f"the warm-up must end before the decay does, at step {end}" if late else None


def _optimizer(c: Config) -> str | None:
    o, known = c.optim, OPTIMIZERS[c.optim.kind]
    given = [f"optim.{n}" for n in OPTIMIZER_KEYS if getattr(o, n) is not None and n not in known]
    if given:
        return f"{o.kind} does not use {' and '.join(given)}; leave it out"
    if o.nesterov and not (known["momentum"] if o.momentum is None else o.momentum):
        return "there is no momentum to look ahead along; raise it, or leave nesterov out"
    return None


def _evaluation(c: Config) -> str | None:
    if c.train.eval_every and not c.train.eval_batches:
        return "evaluations need batches; raise eval_batches, or set eval_every to 0"
    if c.train.eval_batches and not held_out(c.data) and c.data.validation is None:
        return "nothing is held out to evaluate on; raise data.held_out, or set train.eval_batches to 0"
    return None


def _sources(c: Config) -> str | None:
    d = c.data
    if d.path is not None and d.paths is not None:
        return "these are two answers to the same question; leave one out"
    if d.weights is not None and len(d.weights) != len(d.paths or ()):
        return f"{len(d.weights)} weights for {len(d.paths or ())} paths; give one each, or leave the weights out"
    return "no path is given; name one, or leave it out" if d.paths == () else None


def _validation(c: Config) -> str | None:
    both = c.data.validation is not None and c.data.held_out
    return "the validation file is what is evaluated; leave held_out out" if both else None


def _vocab(c: Config) -> str | None:
    unused = c.data.vocab is not None and c.data.tokenizer != "bpe"
    return "a vocabulary is trained for tokenizer = bpe only; leave vocab out" if unused else None


def _overwrite(c: Config) -> str | None:
    return "there is nothing to overwrite in a new folder; give run.dir" if c.run.overwrite and not c.run.dir else None


def _one_schedule(c: Config) -> str | None:
    both = c.schedule.kind is not None and c.schedule.file is not None
    return "the file is the schedule; leave one of the two out" if both else None


def _automatic(c: Config) -> str | None:
    s = c.schedule
    if s.memory is not None and s.kind != AUTO:
        return "memory limits the search of kind = auto; use that, or leave memory out"
    if s.measured is not None and s.kind != AUTO and s.balance != "measured":
        return "measured times are for kind = auto or balance = measured; use one of them, or leave measured out"
    if s.measured is None and s.balance == "measured":
        return "give the run that was measured, schedule.measured = its folder, or use balance = counted"
    return None


def _layout(c: Config) -> str | None:
    both = c.schedule.stages is not None and c.schedule.balance != "even"
    return "stages say how units are dealt; leave one of the two out" if both else None


def _sequence(c: Config) -> str | None:
    if c.parallel.sequence and c.parallel.tp == 1:
        return "the sequence is split over tp, which is 1; raise parallel.tp, or leave parallel.sequence out"
    return _multiple("seq", c.model.seq, "tp", c.parallel.tp) if c.parallel.sequence else None


def _budget(c: Config) -> str | None:
    if (c.placement.activations == "budget") == (c.placement.activation_mb is not None):
        return None
    return "activation_mb is the budget of activations = budget; give both or neither"


def _gathers(c: Config) -> str | None:
    p, unused = c.placement, PlacementConfig()
    given = [f"placement.{n}" for n in ("prefetch", "keep", "persist") if getattr(p, n) != getattr(unused, n)]
    if PLACEMENTS[p.name]().params.sharded or not given:
        return None
    return f"parameters that are whole are not gathered; leave out {' and '.join(given)}, or use zero3"


def _rounding(c: Config) -> str | None:
    if c.placement.rounding == "master" or c.train.dtype == "bfloat16":
        return None
    return f"{c.placement.rounding} rounding is for bfloat16 parameters; leave it out, or set train.dtype to bfloat16"


def _states(c: Config) -> str | None:
    wanted = c.placement.state_dtype
    if wanted is not None and c.optim.kind == "adamw8bit":
        return "the states of adamw8bit are in 8 bits already; leave it out"
    if wanted == "bfloat16" and c.train.dtype == "float64":
        return "only fp32 arithmetic is rounded to bfloat16; leave it out, or train in another dtype"
    return None


RULES: tuple[tuple[Keys, Callable[[Config], str | None]], ...] = (
    (("model.hidden", "model.heads"), _heads),
    (("model.heads", "model.kv_heads"), _kv_heads),
    (("model.shape", "model.hidden", "model.heads", "model.attention_dropout"), _llama_options),
    (("model.shape", "model.rope_theta"), _rope),
    (("optim.decay", "optim.lr", "optim.min_lr", "optim.warmup", "optim.steps", "optim.cooldown"), _rates),
    (("optim.kind", *(f"optim.{name}" for name in OPTIMIZER_KEYS)), _optimizer),
    (("train.eval_every", "train.eval_batches", "data.held_out"), _evaluation),
    (("data.path", "data.paths", "data.weights"), _sources),
    (("data.validation", "data.held_out"), _validation),
    (("data.tokenizer", "data.vocab"), _vocab),
    (("run.dir", "run.overwrite"), _overwrite),
    (("schedule.kind", "schedule.file"), _one_schedule),
    (("schedule.kind", "schedule.balance", "schedule.measured", "schedule.memory"), _automatic),
    (("schedule.stages", "schedule.balance"), _layout),
    (("parallel.tp", "parallel.sequence", "model.seq"), _sequence),
    (("placement.activations", "placement.activation_mb"), _budget),
    (("placement.name", "placement.prefetch", "placement.keep", "placement.persist"), _gathers),
    (("placement.rounding", "train.dtype"), _rounding),
    (("placement.state_dtype", "train.dtype", "optim.kind"), _states),
)
"""The keys a rule is about, and the rule: a sentence if it is broken."""


def _share(c: Config, mesh: Mesh, order: Program) -> str | None:
    return _multiple("batch", c.train.batch, "dp", mesh.axis("dp"))


def _shard_ranks(c: Config, mesh: Mesh, order: Program) -> str | None:
    n = c.placement.shard_ranks
    return None if n is None else _multiple("dp", mesh.axis("dp"), "shard_ranks", n)


def _microbatches(c: Config, mesh: Mesh, order: Program) -> str | None:
    share = c.train.batch // mesh.axis("dp")
    if filled(c.schedule.microbatches) > share:
        return f"a dp rank has {share} samples a step and cannot split them further; lower microbatches or raise batch"
    return None


def _tp(c: Config, mesh: Mesh, order: Program) -> str | None:
    """Whole attention heads and feed-forward columns on every tp rank."""
    sizes = (("heads", c.model.heads), ("kv_heads", filled(c.model.kv_heads)), ("ffn", filled(c.model.ffn)))
    try:
        for what, size in sizes:
            check_divides(what, size, "tp", mesh.axis("tp"))
    except MeshError as error:
        return str(error)
    return None


def _stages(c: Config, mesh: Mesh, order: Program) -> str | None:
    """Embedding, blocks, head with loss: at least one unit a stage."""
    units, need = c.model.layers + 2, len(order.stages)
    if units < need:
        what = f"{need} pipeline stages need at least {need} units"
        return f"{what}; {c.model.layers} layers, embedding and head are {units}"
    sizes = c.schedule.stages
    if sizes is not None and (len(sizes) != need or sum(sizes) != units):
        have = f"{len(sizes)} stages of {sum(sizes)} units"
        return f"the schedule has {need} stages and the model {units} units, embedding and head included, not {have}"
    return None


def _file(c: Config, mesh: Mesh, order: Program) -> str | None:
    """A program is of as many pipeline coordinates and microbatches as the run."""
    if c.schedule.file is None:
        return None
    wanted = {"pp": mesh.axis("pp"), "microbatches": filled(c.schedule.microbatches)}
    there = {"pp": len(order.ranks), "microbatches": order.microbatches}
    wrong = [f"{what} = {there[what]}, the run has {wanted[what]}" for what in wanted if there[what] != wanted[what]]
    return f"the program is for {' and '.join(wrong)}" if wrong else None


MESH_RULES: tuple[tuple[Keys, Callable[[Config, Mesh, Program], str | None]], ...] = (
    (("train.batch", "parallel.dp"), _share),
    (("parallel.dp", "placement.shard_ranks"), _shard_ranks),
    (("train.batch", "parallel.dp", "schedule.microbatches"), _microbatches),
    (("model.heads", "model.kv_heads", "model.ffn", "parallel.tp"), _tp),
    (("model.layers", "parallel.pp", "schedule.kind", "schedule.file", "schedule.stages"), _stages),
    (("schedule.file", "parallel.pp", "schedule.microbatches"), _file),
)


def problems_alone(config: Config, data_vocab: int, sources: Mapping[str, str]) -> list[str]:
    """What is wrong with a configuration whatever the world."""
    out = [_at(text, keys, config, sources) for keys, rule in RULES for text in (rule(config),) if text]
    if config.model.vocab is not None and config.model.vocab < data_vocab:
        text = f"the data has {data_vocab} different tokens; raise model.vocab or leave it out"
        out.append(_at(text, ("model.vocab",), config, sources))
    return out


def problems_on(config: Config, mesh: Mesh, order: Program, sources: Mapping[str, str]) -> list[str]:
    """What is wrong with a filled configuration on this mesh."""
    found = ((keys, rule(config, mesh, order)) for keys, rule in MESH_RULES)
    return [_at(text, keys, config, sources) for keys, text in found if text]


def _at(text: str, keys: Keys, config: Config, sources: Mapping[str, str]) -> str:
    """The problem, led by the keys it is about: those that were given, or all if none was."""
    given = [key for key in keys if key in sources] or keys
    led = ", ".join(f"{key} = {plain(_get(config, key))} ({sources.get(key, 'default')})" for key in given)
    return f"{led}: {text}"


def _get(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def held_out(d: DataConfig) -> float:
    """The part of each source that is kept for evaluation."""
    default = 0.01 if d.validation is None else 0.0
    return default if d.held_out is None else d.held_out


def filled(value: int | None) -> int:
    if value is None:
        raise TypeError("a Plan holds a filled Config; make it with make_plan")
    return value
