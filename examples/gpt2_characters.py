"""GPT-2's shape on characters, in a loop of one's own, over the ranks by pipeline, tensor and data parallelism.

    mpirun -n 4 python examples/gpt2_characters.py [TEXT]

Without a text: the sources of Python's own json, http, email and asyncio.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from pathlib import Path

import numpy as np

import triloom
from triloom.data import Windows
from triloom.models import decoder, gpt2


def read(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for name in ("json", "http", "email", "asyncio") for f in (library / name).rglob("*.py"))
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def main(path: str | None = None, steps: int = 500, batch: int = 16, seq: int = 128, hidden: int = 128) -> float:
    text = read(path)
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    tokens = np.array([number[c] for c in text], dtype=np.uint16)
    cut = len(tokens) * 9 // 10
    train, held_out = Windows.of(tokens[:cut], seq, seed=1), Windows.of(tokens[cut:], seq, seed=1, shuffle=False)

    model = decoder(gpt2(vocab=len(characters), hidden=hidden, layers=4, heads=4, max_seq=seq, dropout=0.1))
    with triloom.init() as world:
        pp, tp = {1: (1, 1), 2: (2, 1)}.get(world.size, (2, 2))
        mesh = triloom.make_mesh(world.size, pp=pp, tp=tp)
        engine = triloom.Engine(
            model.units,
            model.loss,
            ties=model.ties,
            world=world.group,
            mesh=mesh,
            optimizer=triloom.AdamW(lr=triloom.warmup_cosine(1e-3, warmup=steps // 10, steps=steps)),
            microbatches=4,
            sequence_parallel=tp > 1,
        )
        dp, mine = mesh.axis("dp"), mesh.coords(world.rank)["dp"]
        for step in range(steps):
            metrics = engine.step(*train.batch(step, batch, dp, mine))
            if world.rank == 0 and step % 50 == 0:
                print(f"step {step:4}  loss {metrics.loss:.4f}")
        rounds = min(8, held_out.count // batch)
        loss = sum(engine.evaluate(*held_out.batch(i, batch, dp, mine)).loss for i in range(rounds)) / rounds
        if world.rank == 0:
            print(f"held out: {loss / math.log(2):.3f} bits a character, {len(characters)} different ones")
        return loss


if __name__ == "__main__":
    main(*sys.argv[1:2])
