"""Between checkpoints and Hugging Face folders, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..boot import World
from ..checkpoint import Manifest, path_of, read_manifest, read_tensor, save
from ..checkpoint.manifest import DTYPES
from ..config import Config, to_toml
from ..config.schema import ModelConfig, RunConfig
from ..errors import ConfigError
from ..models import DecoderConfig, decoder
from ..plan import Plan, decoder_config, make_plan
from ..resuming import FOLDER
from ..together import together
from ..train import engine_of
from .convert import Export, load_folder
from .folder import SHARD_BYTES, check_target
from .shapes import family_of
from .weights import open_weights


def to_folder(
    checkpoint: Path,
    out: Path,
    model: ModelConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    vocab: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> DecoderConfig:
    """Write a checkpoint's weights as a Hugging Face folder; reads one parameter at a time, in one process.

    model: the ``[model]`` of the run; None: what the run stored. dtype and vocab: as ``convert.save_folder``'s. Raises
    ConfigError for a model without a class there, CheckpointError for a damaged file.
    """
    manifest = read_manifest(checkpoint)
    config = decoder_of(manifest, model)
    export = Export(config, vocab, out)
    names = [name for name in export.table if f"params/{name}" not in manifest.tensors]
    if names:
        raise ConfigError(f"{checkpoint} is of another model: it holds no params/{names[0]}")
    wide = dtype is not None and any(f"master/{name}" in manifest.tensors for name in export.table)
    kind = "master" if wide else "params"

    def parameters() -> Iterator[tuple[str, torch.Tensor]]:
        for name in export.table:
            yield name, read_tensor(checkpoint, manifest, f"{kind}/{name}")

    stored = manifest.tensors[f"params/{next(iter(export.table))}"].dtype
    export.write(dtype or getattr(torch, DTYPES[stored][0]), parameters(), shard_bytes)
    return config


def decoder_of(manifest: Manifest, model: ModelConfig | None) -> DecoderConfig:
    """The decoder that a checkpoint is of. Raises ConfigError if a loop of one's own stored nothing about it."""
    if model is None:
        stored: Mapping[str, Any] | None = manifest.extra.get("config", {}).get("model")
        if stored is None:
            raise ConfigError("the checkpoint does not say what model it is of; give the run's TOML file with --config")
        model = ModelConfig(**stored)
    if model.vocab is None:
        raise ConfigError("model.vocab is not given; take the config.toml that the run has written, or set it")
    return decoder_config(model, model.vocab)


def model_section(config: DecoderConfig) -> ModelConfig:
    """The ``[model]`` that stands for a decoder of one of the two families."""
    return ModelConfig(
        shape=family_of(config).name,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        ffn=config.ffn,
        seq=config.max_seq,
        vocab=config.vocab,
        tied=config.tied,
        bias=config.bias,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,  # one that is not used has its default
    )


def to_checkpoint(world: World, source: str | Path, out: str | Path, config: Config | None = None) -> Config:
    """Make a run directory, as of a training that has done no step, from a Hugging Face folder; collective.

    Each rank reads and writes its part on the mesh of ``config``. config: of the training to come; None: one for the
    folder's model with all other keys at their defaults, whose config.toml is written. Returns it resolved. Raises
    SetupError on every rank.
    """
    out = Path(out).expanduser()

    def plan_it() -> Plan:
        if world.rank == 0:
            check_target(out)
        theirs = open_weights(source).config
        return make_plan(config or Config(model=model_section(theirs)), world.size, data_vocab=theirs.vocab)

    plan = together(world.group, plan_it)
    resolved = replace(plan.config, run=RunConfig())
    engine = engine_of(plan, decoder(plan.decoder), world)
    load_folder(engine, source, plan.decoder)
    if world.rank == 0:
        (out / FOLDER).mkdir(parents=True)
        (out / "config.toml").write_text(to_toml(resolved, f"from {Path(source).name}"), encoding="utf-8")
    world.group.barrier().wait()
    save(engine, path_of(out / FOLDER, 0), {"config": asdict(resolved)})
    engine.close()
    return resolved
