"""Llama's shape with byte-pair encoding, by configuration: the same as `triloom train`, from a program.

    mpirun -n 4 python examples/llama_bpe.py [--data.path FOLDER] [--train.steps 1000] ...

The tokenizer is trained on the text. The run directory gets metrics, checkpoints, tokenizer and plots; started
again with `--run.resume auto` it goes on where it was. `told` is a sink: it takes what metrics.jsonl gets.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import triloom
from triloom.config import load
from triloom.train import train

RUN = """
    --model.shape llama --model.layers 4 --model.hidden 192 --model.heads 6 --model.kv_heads 2 --model.seq 128
    --data.tokenizer bpe --data.vocab 2048
    --parallel.tp 2 --parallel.sequence true --placement.name zero2
    --train.steps 300 --train.batch 16 --train.eval_every 100 --optim.lr 2e-3
    --checkpoint.every 100 --check.replicas 100 --run.dir runs/llama_bpe
"""


def told(record: Mapping[str, Any]) -> None:
    """On rank 0, after every step."""
    if record["held_out_loss"] is not None:
        print(f"after {record['tokens']:,} tokens: {record['held_out_bits_per_byte']:.3f} bits a byte")


def main(words: Sequence[str] = ()) -> float:
    given = {word.partition("=")[0] for word in words}
    defaults = [word for option in RUN.split("--")[1:] if f"--{option.split()[0]}" not in given
                for word in f"--{option}".split()]  # fmt: skip
    with triloom.init() as world:
        loaded = load([*defaults, *words])
        return train(loaded.config, world, sources=loaded.sources, sinks=[told]).last_loss


if __name__ == "__main__":
    main(sys.argv[1:])
