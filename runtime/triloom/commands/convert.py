"""``triloom checkpoint convert``: to and from a Hugging Face folder of a Llama or a GPT-2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config import load
from ..config.rules import above, at_least, one_of
from ..config.schema import Section
from ..errors import CheckpointError, ConfigError

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Section):
    """Options of ``triloom checkpoint convert``."""

    config: str | None = None
    """TOML file of the run. From a Hugging Face folder: of the training to come, whose mesh, dtype and optimizer the
    checkpoint is for; none: defaults for the folder's model. To one: none takes what the checkpoint says."""
    dtype: Annotated[str | None, one_of(DTYPES)] = None
    """Of the tensors in a Hugging Face folder; none: that of the parameters. Where there are copies in a wider dtype,
    those are taken."""
    vocab: Annotated[int | None, at_least(1)] = None
    """Tokens in a Hugging Face folder, if the vocabulary was padded; none: all."""
    shard_gb: Annotated[float, above(0)] = 5.0
    """Most GB in one file of a Hugging Face folder."""


def convert(options: ConvertOptions, places: Sequence[str]) -> int:
    """Either way; what the first place holds says which."""
    if len(places) != 2:
        raise ConfigError(f"triloom checkpoint convert takes FROM and TO, got {' '.join(places) or 'nothing'}")
    source = Path(places[0]).expanduser()
    return (_from_folder if (source / "config.json").exists() else _to_folder)(options, places[0], places[1])


def _from_folder(options: ConvertOptions, source: str, out: str) -> int:
    """On all ranks there are."""
    from .. import boot
    from ..hf.checkpoints import to_checkpoint
    from ..together import SetupError, together

    if options.dtype is not None or options.vocab is not None:
        raise ConfigError(
            "dtype and vocab are of a Hugging Face folder to be written; a checkpoint's stand in --config"
        )
    with boot.init() as world:
        try:
            given = options.config
            config = together(world.group, lambda: None if given is None else load((), given).config)
            resolved = to_checkpoint(world, source, out, config)
        except (SetupError, CheckpointError) as problem:  # on every rank alike: told once
            if world.rank == 0:
                print(f"triloom: {problem}", file=sys.stderr, flush=True)
            return 2 if isinstance(problem, SetupError) else 1
        if world.rank == 0:
            m = resolved.model
            print(
                f"{out}: {m.shape}, {m.layers} layers x {m.hidden} wide; to train it on tokens of its own vocabulary:"
            )
            print(f"  triloom train --config {out}/config.toml --run.resume {out} --run.dir NEW --data.path TOKENS")
    return 0


def _to_folder(options: ConvertOptions, source: str, out: str) -> int:
    """In one process; further ranks have nothing to do."""
    import torch

    from .. import boot
    from ..hf.checkpoints import to_folder
    from .checkpoint import checkpoints_at

    if boot.announced().rank not in ("0", "?"):
        return 0
    model = None if options.config is None else load((), options.config).config.model
    checkpoint = checkpoints_at([source])[-1]
    config = to_folder(
        checkpoint,
        Path(out),
        model,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        vocab=options.vocab,
        shard_bytes=int(options.shard_gb * 10**9),
    )
    print(f"{out}: {config.parameters:,} parameters of {checkpoint}")
    return 0
