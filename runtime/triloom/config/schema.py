"""What a training run can be told. The text under each field is what ``triloom train --help`` prints.

Rules of one value stand in its annotation; what several values must satisfy together is checked by
:mod:`triloom.plan`, which also fills in what ``none`` leaves open. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

from ..errors import ConfigError
from ..mesh import DEFAULT_ORDER
from ..placement import ACTIVATIONS, CADENCES, REDUCTIONS, ROUNDINGS
from ..placement import NAMED as PLACEMENTS
from ..schedules import NAMED as SCHEDULES
from .rules import Rule, above, at_least, between, check, each, kind_of, one_of

SHAPES = ("llama", "gpt2")
AUTO = "auto"
TRAINING_SCHEDULES = (*(name for name in SCHEDULES if name != "forward"), AUTO)
BALANCES = ("even", "counted", "measured")
DTYPES = ("float32", "float64", "bfloat16")
TOKEN_DTYPES = ("uint16", "uint32")
DECAYS = ("cosine", "constant", "wsd")
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
    "adamw8bit": {"betas": (0.9, 0.95), "eps": 1e-8},
    "sgd": {"momentum": 0.9, "nesterov": False},
    "lion": {"betas": (0.9, 0.99)},
    "muon": {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "nesterov": True},
    "adafactor": {},
}
"""Kind of optimizer -> the keys of [optim] that only some have, and what ``none`` stands for there."""
OPTIMIZER_KEYS = ("betas", "eps", "momentum", "nesterov")

_AXES_ONCE = Rule(f"{', '.join(DEFAULT_ORDER)} once each, in any order", lambda v: sorted(v) == sorted(DEFAULT_ORDER))


class Section:
    """Holds every section to its annotations, also where it is built in Python."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            try:
                check(kind_of(hints[f.name]), value)
            except ConfigError as error:
                raise ConfigError(f"{type(self).__name__}.{f.name} = {value!r}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The decoder that is trained."""

    shape: Annotated[str, one_of(SHAPES)] = "llama"
    """llama: RMSNorm, rotary positions, SwiGLU, no biases. gpt2: LayerNorm, learned positions, GELU, biases."""
    layers: Annotated[int, at_least(1)] = 4
    """Number of transformer blocks."""
    hidden: Annotated[int, at_least(1)] = 128
    """Width of the residual stream; a multiple of heads."""
    heads: Annotated[int, at_least(1)] = 4
    """Attention heads; a multiple of parallel.tp."""
    kv_heads: Annotated[int | None, at_least(1)] = None
    """Key and value heads, shared by heads / kv_heads query heads each (grouped-query attention); none: as heads."""
    ffn: Annotated[int | None, at_least(1)] = None
    """Inner width of the feed-forward layer; none: 4 x hidden for gpt2, 8/3 x hidden rounded up to 32 for llama."""
    seq: Annotated[int, at_least(1)] = 128
    """Tokens per sample: the context length of the model and the window of the data."""
    vocab: Annotated[int | None, at_least(2)] = None
    """Size of the vocabulary; none: that of the data (256 for bytes). Larger pads, smaller is an error."""
    dropout: Annotated[float, between(0, 1)] = 0.0
    """Probability of dropping an element after the embedding, the attention and the feed-forward layer."""
    attention_dropout: Annotated[float, between(0, 1)] = 0.0
    """Probability of dropping an attention weight (gpt2 only); above 0 the weights are held in memory."""
    tied: bool | None = None
    """Use one matrix for the token embedding and the output projection; none: true for gpt2, false for llama."""
    bias: bool | None = None
    """Biases in the linear layers of the blocks and in LayerNorm; none: true for gpt2, false for llama."""
    norm_eps: Annotated[float, above(0)] = 1e-5
    """Added to the mean square (llama) or the variance (gpt2) under the root of a norm."""
    rope_theta: Annotated[float, above(0)] = 10000.0
    """Base of the wavelengths of rotary positions (llama only)."""
    fused_loss: bool | None = None
    """Compute the output projection with its loss, 4096 tokens at a time, so that the logits of a microbatch never
    exist whole; holds an fp32 gradient of the projection. none: on a GPU, for more tokens than that in a microbatch."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The text or the tokens that are trained on."""

    path: str | None = None
    """Text file; folder whose files are joined in sorted order (hidden files left out); flat file of token ids
    (.bin, as nanoGPT writes it); or Megatron's pair of .bin and .idx (either, or their common prefix).
    none: the sources of this Python's standard library, read in place."""
    paths: tuple[str, ...] | None = None
    """Several sources instead of one data.path."""
    weights: Annotated[tuple[float, ...] | None, each(above(0))] = None
    """Share of each of data.paths among the samples, in any unit; none: all windows of all of them once an epoch."""
    validation: str | None = None
    """A source of its own to evaluate on, instead of a part of the others."""
    held_out: Annotated[float | None, between(0, 1)] = None
    """Part of each source, at its end, that is kept for evaluation and never trained on; none: 0.01, or 0 with
    data.validation."""
    tokenizer: str = "byte"
    """How text becomes tokens. byte. char: every character that occurs. bpe: byte-pair encoding trained on the text
    (needs tokenizers: pip install 'triloom[data]'). Otherwise the path of a tokenizer.json or of a run's
    characters.json. What is made from the text is kept in the run directory."""
    vocab: Annotated[int | None, at_least(257)] = None
    """Tokens of the vocabulary that bpe trains, all bytes among them; none: 4096."""
    token_dtype: Annotated[str | None, one_of(TOKEN_DTYPES)] = None
    """Type of the ids in flat token files, little-endian; none: uint16, which is nanoGPT's."""
    eos: Annotated[int | None, at_least(0)] = None
    """Id of a token to put after every document of Megatron files, and after every file of text with a
    tokenizer.json; none: nothing after the former, and after the latter <|endoftext|> if the vocabulary has it."""
    cache: str | None = None
    """Folder for tokenised text, which is found again by its content; none: tokens, beside the run directory."""
    prefetch: Annotated[int, at_least(0)] = 2
    """Batches that a thread cuts ahead of their use; 0: no thread. Changes no batch."""
    seed: int = 0
    """Seed of the order of samples."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the ranks of the world share the work; dp x pp x tp is their number."""

    dp: Annotated[int | None, at_least(1)] = None
    """Data-parallel size; none: what pp and tp leave over."""
    pp: Annotated[int, at_least(1)] = 1
    """Pipeline stages."""
    tp: Annotated[int, at_least(1)] = 1
    """Tensor-parallel size: ranks that share each layer."""
    sequence: bool = False
    """Split the activations between tensor-parallel regions along the sequence over tp."""
    order: Annotated[tuple[str, ...], _AXES_ONCE] = DEFAULT_ORDER
    """Mesh axes, slowest first: the ranks along the last one are neighbours."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The order of forwards and backwards in the pipeline."""

    kind: Annotated[str | None, one_of(TRAINING_SCHEDULES)] = None
    """Name of the schedule; ``triloom schedule NAME`` draws it. auto: the shortest program found for measured times, of
    the run schedule.measured, or else of this run's first steps. none: 1f1b, or the program of schedule.file."""
    file: str | None = None
    """A program to run instead of a named schedule: a row of actions per pipeline coordinate, as ``triloom schedule
    NAME --save FILE`` writes. Computes only or complete; it is verified like any other."""
    microbatches: Annotated[int | None, at_least(1)] = None
    """Parts that the samples of a dp rank are split into; none: 2 x pp as far as there are samples, 1 without pp,
    or what schedule.file says."""
    measured: str | None = None
    """A run whose timeline.json says what computes take, for kind = auto and balance = measured."""
    memory: Annotated[float | None, above(0)] = None
    """Microbatches that a rank may hold under kind = auto; none: as many as the first rank of 1f1b."""
    stages: Annotated[tuple[int, ...] | None, each(at_least(1))] = None
    """Number of units of each stage: embedding, blocks, and head with loss; none: by schedule.balance."""
    balance: Annotated[str, one_of(BALANCES)] = "even"
    """How units are dealt to stages. even: in equal numbers. counted: the shortest step by counted FLOPs. measured:
    the same, with the FLOPs of a stage taking the times of schedule.measured."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig(Section):
    """Where the training state lives."""

    name: Annotated[str, one_of(PLACEMENTS)] = "zero1"
    """zero0: everything whole on every dp rank. zero1: optimizer state sharded over dp. zero2: gradients too.
    zero3: parameters too, which are gathered around their use."""
    shard_ranks: Annotated[int | None, at_least(1)] = None
    """Shard inside neighbouring dp ranks of this number and replicate across them; none: over all of dp."""
    cadence: Annotated[str | None, one_of(CADENCES)] = None
    """When gradients are reduced over dp: once a step, or after each microbatch; none: step for zero0 and zero1,
    microbatch for zero2 and zero3."""
    prefetch: Annotated[int, at_least(0)] = 1
    """Computes before their use at which the gather of sharded parameters starts."""
    keep: bool = False
    """Keep gathered parameters whole from their first use of a step to their last."""
    grad_dtype: Annotated[str | None, one_of(DTYPES)] = None
    """Type in which gradients are accumulated and reduced; none: float32, or float64 for float64 models."""
    state_dtype: Annotated[str | None, one_of(("bfloat16",))] = None
    """Type in which the optimizer keeps its averages; bfloat16 is rounded by chance, which changes the result; none:
    that of its arithmetic, float32, or float64 for float64 models."""
    rounding: Annotated[str, one_of(ROUNDINGS)] = "master"
    """How updates get into 16-bit parameters. master: there is a float32 copy of them. Without one, for bfloat16 and
    with another result: stochastic rounds by chance, kahan keeps what was rounded off in a second bfloat16."""
    persist: Annotated[int, at_least(0)] = 0
    """Parameters of fewer elements than this stay whole where zero3 shards the others."""
    reduction: Annotated[str, one_of(REDUCTIONS)] = "exact"
    """How gradients travel over dp. bfloat16: rounded. int8: in 8 bits, a scale for every 64. topk: the largest 5%, the
    rest is added in later steps. All but exact change the result."""
    activations: Annotated[str, one_of(ACTIVATIONS)] = "keep"
    """What becomes of tensors saved for the backward. keep: held. selective: the inside of attention is recomputed.
    recompute: every unit keeps its input only. budget: the cheapest units are recomputed that fit activation_mb."""
    activation_mb: Annotated[float | None, above(0)] = None
    """Most MiB of activations on a rank, for activations = budget."""
    bucket_mb: Annotated[float, above(0)] = 16.0
    """MiB of gradient that travel together; at least one parameter."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The update rule, and warm-up and decay of its learning rate."""

    kind: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    """adamw. adamw8bit: its averages in 8 bits. sgd: with momentum. lion: the sign of a momentum. muon: orthogonal
    updates of the matrices in the blocks, adamw for the rest. adafactor: factored second moments, and lr relative to
    the size of a parameter."""
    lr: Annotated[float, above(0)] = 1e-3
    """Highest learning rate."""
    min_lr: Annotated[float | None, at_least(0)] = None
    """Learning rate at the end of the decay, at most lr; none: lr / 10."""
    warmup: Annotated[int | None, at_least(0)] = None
    """Steps over which the learning rate grows linearly from 0 to lr; none: a tenth of train.steps, at most 100."""
    decay: Annotated[str, one_of(DECAYS)] = "cosine"
    """cosine: from lr to min_lr at optim.steps. constant: lr after the warm-up. wsd: lr, and in the last
    optim.cooldown steps in a straight line to min_lr."""
    cooldown: Annotated[int | None, at_least(0)] = None
    """Steps of wsd's decay, the last before optim.steps; none: a fifth of optim.steps."""
    steps: Annotated[int | None, at_least(1)] = None
    """Step at which the decay ends; none: train.steps."""
    betas: Annotated[tuple[float, float] | None, each(between(0, 1))] = None
    """Decay rates of the averages (adamw, adamw8bit, lion, muon's rest); none: 0.9,0.95, of lion 0.9,0.99."""
    eps: Annotated[float | None, above(0)] = None
    """Added to the root of the second moment (adamw, adamw8bit, muon's rest); none: 1e-8."""
    momentum: Annotated[float | None, between(0, 1)] = None
    """Decay rate of the momentum (sgd, muon); none: 0.9, of muon 0.95."""
    nesterov: bool | None = None
    """Look ahead along the momentum (sgd, muon); none: false, of muon true."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Decay of matrices, of sgd added to the gradient, otherwise decoupled; vectors (norms, biases) are not decayed."""
    clip: Annotated[float | None, above(0)] = 1.0
    """Global norm that gradients are scaled down to; none: no clipping."""
    max_skips: Annotated[int, at_least(0)] = 10
    """Steps in a row that may be skipped because a gradient was not finite; one more ends the run."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The run itself."""

    steps: Annotated[int, at_least(1)] = 200
    """Optimizer steps."""
    batch: Annotated[int, at_least(1)] = 32
    """Samples per step over all ranks; a multiple of dp."""
    seed: int = 0
    """Seed of initial weights and dropout; draws depend on it, not on the mesh."""
    dtype: Annotated[str, one_of((*DTYPES, "float16"))] = "float32"
    """Type of parameters and activations; the loss of float16 is scaled, by as much as its gradients allow."""
    log_every: Annotated[int, at_least(1)] = 10
    """Steps between lines of progress where the output is not a terminal."""
    eval_every: Annotated[int, at_least(0)] = 0
    """Steps between evaluations on the held-out text; 0: once, at the end."""
    eval_batches: Annotated[int, at_least(0)] = 4
    """Batches of one evaluation, at most all that is held out; 0: no evaluation."""
    threads: Annotated[int | None, at_least(1)] = None
    """CPU threads of a rank; none: the cores this process may use, shared among the ranks of the host."""
    deadline: Annotated[float, above(0)] = 600.0
    """Seconds a rank waits for the others before it gives up and names them."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Section):
    """What a run checks about itself."""

    replicas: Annotated[int, at_least(0)] = 0
    """Every so many steps, compare the parameters that several ranks hold alike, by a 64-bit sum of each: a
    difference ends the run, naming parameter and ranks. 0: never."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Where the numbers of metrics.jsonl go besides."""

    tensorboard: bool = False
    """Write events for TensorBoard to the folder tensorboard of the run (needs tensorboard: pip install
    'triloom[log]')."""
    wandb: bool = False
    """Write an offline run of Weights & Biases to the folder wandb of the run, for ``wandb sync`` (needs wandb: pip
    install 'triloom[log]')."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is kept of a run, to go on from (run.resume) on any mesh."""

    every: Annotated[int, at_least(0)] = 0
    """Steps between checkpoints; the last step is saved too. 0: only when the run is told to stop, by SIGTERM, SIGUSR1
    or Ctrl-C."""
    keep: Annotated[int | None, at_least(1)] = 2
    """So many of the newest stay; none: all."""
    keep_every: Annotated[int | None, at_least(1)] = None
    """Checkpoints of steps that are multiples of this stay too."""
    asynchronous: bool = True
    """Steps wait only for a copy of the state in memory, which is written in the background."""
    dir: str | None = None
    """Folder of the checkpoints, seen by all ranks; none: checkpoints in the run directory."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """What a run leaves behind."""

    dir: str | None = None
    """Folder for config.toml, metrics.jsonl (one object a step; bytes and seconds are those of rank 0), timeline.json
    and the plot; none: a new runs/<date>-<time>."""
    resume: str | None = None
    """Go on from a checkpoint: of a run directory (the newest that is whole), or one. In the run directory itself
    unless run.dir names another. auto: as run.dir, from the beginning if there is no checkpoint yet."""
    overwrite: bool = False
    """Replace the files of an earlier run in run.dir, instead of refusing a folder that is not empty. Does nothing
    where run.resume is given."""
    timeline: Annotated[int, at_least(0)] = 3
    """Steps at the end of the run that go to timeline.json (for Perfetto, chrome://tracing and triloom timeline);
    0: nothing is measured, and metrics.jsonl says nothing of the pipeline."""
    plot: bool = True
    """Draw loss.svg and loss.png at the end (needs matplotlib: pip install 'triloom[plot]')."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, one field per section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "schedule": ScheduleConfig,
    "placement": PlacementConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "check": CheckConfig,
    "log": LogConfig,
    "checkpoint": CheckpointConfig,
    "run": RunConfig,
}
"""Section name to its class, in the order of ``Config``."""
