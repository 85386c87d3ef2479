"""From what the user asked for to what will run: the mesh, the numbers left open, the checks across keys.

Deterministic and free of processes, so every rank finds the same problem before anything is allocated, and
``triloom train --dry-run`` can answer without a single rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .actions import Program
from .choosing import Auto
from .config import Config
from .config.schema import AUTO, OPTIMIZER_KEYS, OPTIMIZERS, ModelConfig, PlacementConfig, ScheduleConfig
from .errors import ConfigError
from .measured import costs_of
from .mesh import Mesh, make_mesh
from .models.config import DecoderConfig, gpt2, llama
from .placement import NAMED as PLACEMENTS
from .placement import Placement
from .plan_rules import filled, held_out, problems_alone, problems_on
from .program_file import load_program
from .schedules import NAMED as SCHEDULES
from .schedules import Schedule
from .search import auto
from .trace import load

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with nothing left open."""

    config: Config
    mesh: Mesh
    placement: Placement
    decoder: DecoderConfig
    order: Program
    """What the pipeline runs: a schedule of compute actions, or the program of schedule.file."""

    @property
    def schedule(self) -> Schedule:
        """``order`` as an engine takes it; the automatic schedule may replace it after some steps."""
        s = self.config.schedule
        return make_schedule(s) if s.kind == AUTO and s.measured is None else lambda ranks, microbatches: self.order

    @property
    def dp(self) -> int:
        return self.mesh.axis("dp")

    @property
    def microbatches(self) -> int:
        return filled(self.config.schedule.microbatches)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch * self.config.model.seq


def make_plan(config: Config, world: int, *, data_vocab: int, sources: Mapping[str, str] | None = None) -> Plan:
    """Plan of ``config`` on ``world`` ranks for data of ``data_vocab`` tokens.

    sources: where each key was given, for the messages. Raises ConfigError with every problem found,
    MeshError if the world does not factor.
    """
    problems = problems_alone(config, data_vocab, sources or {})
    if problems:
        raise ConfigError("\n".join(problems))
    par = config.parallel
    mesh = make_mesh(world, dp=par.dp, pp=par.pp, tp=par.tp, order=par.order)
    program = None if config.schedule.file is None else load_program(config.schedule.file)
    config = _fill(config, mesh, data_vocab, program)
    order = program or make_schedule(config.schedule)(mesh.axis("pp"), filled(config.schedule.microbatches))
    problems = problems_on(config, mesh, order, sources or {})
    if problems:
        raise ConfigError("\n".join(problems))
    decoder = decoder_config(config.model, data_vocab)
    return Plan(config=config, mesh=mesh, placement=make_placement(config.placement), decoder=decoder, order=order)


def make_schedule(s: ScheduleConfig) -> Schedule:
    """The named schedule, or the automatic one; of a measured run it is searched for when it is called."""
    if s.kind != AUTO:
        return SCHEDULES[s.kind or "1f1b"]
    if s.measured is None:
        return Auto(memory=s.memory)
    trace = load(s.measured)
    costs, coords = costs_of(trace.typical), len(trace.measurement.program.ranks)

    def found(ranks: int, microbatches: int) -> Program:
        if ranks != coords:
            raise ConfigError(
                f"schedule.measured = {s.measured!r}: that run had pp = {coords}, this one has {ranks}; measure a run "
                "with as many, or leave schedule.measured out and this run measures its first steps"
            )
        memory = Auto(memory=s.memory).limit(ranks, microbatches)
        return auto(ranks, microbatches, costs, memory=memory, split=trace.typical.split).program

    return found


def make_placement(p: PlacementConfig) -> Placement:
    """The placement table of ``[placement]``."""
    row = PLACEMENTS[p.name]()
    return row.with_(
        bucket_bytes=int(p.bucket_mb * MIB),
        grads=replace(row.grads, dtype=p.grad_dtype),
        optimizer=replace(row.optimizer, dtype=p.state_dtype),
        rounding=p.rounding,
        persist=p.persist,
        cadence=p.cadence or row.cadence,
        prefetch=p.prefetch,
        keep=p.keep,
        shard_ranks=p.shard_ranks,
        activations=p.activations,
        activation_bytes=None if p.activation_mb is None else int(p.activation_mb * MIB),
    )


# ---------------------------------------------------------------- what none leaves open


def _fill(config: Config, mesh: Mesh, data_vocab: int, program: Program | None) -> Config:
    """Every ``none`` that stands for a value replaced by it."""
    m, s, o, dp, pp = config.model, config.schedule, config.optim, mesh.axis("dp"), mesh.axis("pp")
    decoder = decoder_config(m, data_vocab)
    wanted = 2 * pp if pp > 1 else 1
    microbatches = max(1, min(wanted, config.train.batch // dp)) if program is None else program.microbatches
    falling, steps = o.decay != "constant", o.steps or config.train.steps
    warmup = min(100, config.train.steps // 10) if o.warmup is None else o.warmup
    cooldown = min(steps // 5, steps - warmup) if o.cooldown is None else o.cooldown
    known = OPTIMIZERS[o.kind]
    special: dict[str, Any] = {n: known.get(n) if getattr(o, n) is None else getattr(o, n) for n in OPTIMIZER_KEYS}
    return replace(
        config,
        model=replace(
            m,
            kv_heads=decoder.kv_heads,
            ffn=decoder.ffn,
            vocab=decoder.vocab,
            tied=decoder.tied,
            bias=decoder.bias,
        ),
        data=replace(config.data, held_out=held_out(config.data)),
        parallel=replace(config.parallel, dp=dp),
        schedule=replace(
            s, kind=s.kind or ("1f1b" if program is None else None), microbatches=s.microbatches or microbatches
        ),
        optim=replace(
            o,
            warmup=warmup,
            min_lr=(o.lr / 10 if o.min_lr is None else o.min_lr) if falling else None,
            steps=steps if falling else None,
            cooldown=cooldown if o.decay == "wsd" else None,
            **special,
        ),
    )


def decoder_config(m: ModelConfig, data_vocab: int) -> DecoderConfig:
    """The decoder of ``[model]``; what is none there is the shape's own default."""
    values: dict[str, Any] = {
        "vocab": m.vocab or data_vocab,
        "hidden": m.hidden,
        "layers": m.layers,
        "heads": m.heads,
        "kv_heads": m.kv_heads,
        "ffn": m.ffn,
        "max_seq": m.seq,
        "dropout": m.dropout,
        "norm_eps": m.norm_eps,
        "fused_loss": m.fused_loss,
    }
    values |= {name: given for name in ("tied", "bias") if (given := getattr(m, name)) is not None}
    if m.shape == "llama":
        return llama(**values, rope_theta=m.rope_theta)
    return gpt2(**values, attention_dropout=m.attention_dropout)
