"""nanoGPT's CPU settings: the validation loss of ``triloom train`` against a plain PyTorch loop, mesh by mesh.

4 layers, 4 heads, 128 wide, sequences of 64 characters, 12 a step, no dropout, AdamW with a cosine (its
train_shakespeare_char on a CPU). The text is the sources of Python's standard library, which every machine has.
Both sides start from the same weights and see the same samples; the plain side has a model, an optimizer, a
learning rate, a vocabulary and an evaluation of its own. A loss, not a time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triloom import boot
from triloom.boot import World
from triloom.config import Config, load
from triloom.data.text import find_text
from triloom.groups.objects import gather_objects
from triloom.groups.solo import Solo
from triloom.train import Job, make_engine, prepare, train

from .peers.gpt import GPT, token_loss
from .work import Size

LAYERS, HEADS, HIDDEN, SEQ, BATCH = 4, 4, 128, 64, 12
LR, MIN_LR, WARMUP, BETAS, DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0
EVAL_BATCHES = 20
TARGET = 0.02
"""Largest difference of the validation loss, in nats per character."""

MESHES: Mapping[str, tuple[str, ...]] = {
    "one rank": (),
    "tp=2": ("--parallel.tp=2",),
    "pp=2": ("--parallel.pp=2",),
    "dp=2": ("--parallel.dp=2",),
}


def settings(steps: int, folder: Path, mesh: Sequence[str] = (), path: str | None = None) -> Config:
    """The configuration of one run below ``folder``. path: text to train on, none for the standard library."""
    values: dict[str, object] = {
        "model.shape": "gpt2", "model.layers": LAYERS, "model.heads": HEADS, "model.hidden": HIDDEN, "model.seq": SEQ,
        "data.tokenizer": "char", "data.path": path or "none", "data.cache": folder / "tokens",
        "optim.lr": LR, "optim.min_lr": MIN_LR, "optim.warmup": min(WARMUP, steps // 10), "optim.weight_decay": DECAY,
        "optim.betas": f"{BETAS[0]},{BETAS[1]}", "optim.clip": CLIP,
        "train.steps": steps, "train.batch": BATCH, "train.eval_batches": EVAL_BATCHES, "train.threads": 1,
        "run.dir": folder / "run", "run.overwrite": "true", "run.plot": "false", "run.timeline": 0,
    }  # fmt: skip
    return load([*(f"--{key}={value}" for key, value in values.items()), *mesh]).config


def ours(world: World, steps: int, folder: Path, mesh: Sequence[str], path: str | None = None) -> float:
    """Validation loss of ``triloom train`` on all ranks of ``world``."""
    loss = train(settings(steps, folder, mesh, path), world, out=io.StringIO()).held_out_loss
    if loss is None:
        raise RuntimeError("the run did not evaluate")
    return loss


def plain(world: World, steps: int, folder: Path, path: str | None = None) -> float:
    """Validation loss of a loop in plain PyTorch, in this process: only weights and samples are triloom's."""
    job = prepare(settings(steps, folder, path=path), 1)
    engine = make_engine(job, world)
    weights = {name: t.clone() for name, t in engine.full_state().items()}
    engine.close()
    tokens, vocab = characters(path)
    model = GPT(Size("nanoGPT", LAYERS, HEADS, HIDDEN, SEQ, vocab, BATCH, BATCH, 1, 1), weights)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=BETAS,
    )
    cut = len(tokens) - int(len(tokens) * 0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        x, y = batch(tokens[:cut], starts(job, step))
        optimizer.zero_grad(set_to_none=True)
        token_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    with torch.no_grad():
        held_out = tokens[cut:]
        count = min(EVAL_BATCHES, (len(held_out) - 1) // SEQ // BATCH)
        firsts = torch.arange(count * BATCH).view(count, BATCH) * SEQ
        losses = [token_loss(model(x), y).item() for x, y in (batch(held_out, f.tolist()) for f in firsts)]
    return sum(losses) / len(losses)


def characters(path: str | None) -> tuple[torch.Tensor, int]:
    """The text as indices into its sorted characters, as nanoGPT prepares it, and their number."""
    text = "\0".join(file.read_bytes().decode() for file in find_text(path, "path").files)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    vocabulary, index = np.unique(points, return_inverse=True)
    return torch.from_numpy(index), len(vocabulary)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to MIN_LR."""
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return LR * (step + 1) / warmup
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (LR - MIN_LR)


def starts(job: Job, step: int) -> list[int]:
    """Where the samples of a step begin in the text: the one thing, but for the weights, that both sides share."""
    first = step * BATCH
    where = job.data.train.locate(np.arange(first, first + BATCH, dtype=np.int64))
    return [int(start) for start in where.start]


def batch(tokens: torch.Tensor, firsts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([tokens[i : i + SEQ] for i in firsts])
    return x, torch.stack([tokens[i + 1 : i + 1 + SEQ] for i in firsts])


def compare(world: World, steps: int, folder: Path, path: str | None = None) -> dict[str, Any]:
    """Validation loss of the plain loop and of every mesh, on the two ranks of ``world``; the same on both."""
    alone = replace(world, rank=0, size=1, local_rank=0, local_size=1, group=Solo())
    reference = plain(alone, steps, folder / f"plain{world.rank}", path)
    losses = {}
    for name, mesh in MESHES.items():
        here = (alone, folder / f"alone{world.rank}") if not mesh else (world, folder)
        losses[name] = ours(here[0], steps, here[1], mesh, path)
    return {
        "steps": steps, "unit": "nats per character", "plain PyTorch": reference, "triloom": losses,
        "largest_difference": max(abs(loss - reference) for loss in losses.values()), "target": TARGET,
        "text": "sources of Python's standard library" if path is None else path,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="file for the results, beside standard output")
    options = parser.parse_args()
    with boot.init(threads=1) as world, tempfile.TemporaryDirectory() as temp:
        result = compare(world, options.steps, Path(gather_objects(world.group, temp)[0]))
        if world.rank == 0:
            print(json.dumps(result, indent=1), flush=True)
            if options.json:
                options.json.write_text(json.dumps([result]))


if __name__ == "__main__":
    main()
