"""bf16 training steps of Llama-shaped models on one GPU, against plain PyTorch: tokens/s, MFU and peak memory.

Both sides: bf16 parameters and activations, fp32 masters and fp32 gradients, AdamW (decay on matrices only), clipping
at norm 1, nothing recomputed, the same initial weights and batches of tokens, in one process and in turn. Ours: the
Engine with its kernels. The peer: torch.compile, fused AdamW, scaled_dot_product_attention (``peers/llama.py``). Before
anything is timed the losses of the first steps must agree to RTOL, or the bench refuses to report.

    FLOPs of a token = 6 (matrices of the blocks and the head) + 12 layers hidden sequence
    MFU = FLOPs of a token * tokens/s / peak

A matrix costs a multiplication and an addition for each entry forward, twice that backward; attention the two products
of whole ``[s, s]`` scores, as in Narayanan et al., arXiv 2104.04473, section 5.1 (72 B s l h^2 (1 + s/(6h) + V/(12 l
h)) without recompute for GPT's shape; the causal half is not taken off). The peak is the dense bf16 one of the
datasheet; the share of the product measured in the same run is given beside it.

Peak memory: the most bytes that torch held in the first steps of a side, less what it held before the side was built.

Run: ``python -m triloom_bench gpu_step`` or ``python -m triloom_bench.gpu_step [--size 125m 1b] [--rounds 7]
[--json FILE]``; ``--device cpu --size tiny`` goes the same way without torch.compile, for the path and not for figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from triloom.engine import Engine
from triloom.groups.solo import Solo
from triloom.models import decoder, llama
from triloom.optim import AdamW
from triloom.placement import State, zero0
from triloom_kernels.bench.timing import ceilings

from . import harness
from .harness import Pair, Result
from .peers.llama import Shape, build
from .work import BETAS, CLIP, DECAY, EPS, LR, Batch, Step, make_batches

CHECKED_STEPS = 4
RTOL = 2e-3
"""Of the losses of the first steps: bf16 holds three digits, and Adam's first steps follow signs of gradients."""
OURS, PEER = "triloom", "torch"


@dataclass(frozen=True)
class Size:
    shape: Shape
    batch: int
    """Sequences a step."""
    steps: int
    """In a block."""

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.seq

    @property
    def vocab(self) -> int:
        return self.shape.vocab

    @property
    def seq(self) -> int:
        return self.shape.seq


SIZES = {
    "tiny": Size(Shape(97, 32, 2, 4, 2, 64, 24), 2, 1),
    "125m": Size(Shape(32000, 768, 12, 12, 12, 2048, 2048), 16, 4),
    "1b": Size(Shape(32000, 2048, 20, 16, 8, 5632, 2048), 8, 2),
}
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of the datasheets, by a part of the device's name, the first that is in it."""


def parameters(shape: Shape) -> tuple[int, int]:
    """``(all, those of matrices that are multiplied with)``; norms and the embedding are not among the latter."""
    dim = shape.hidden // shape.heads
    block = shape.hidden * ((2 * shape.heads + 2 * shape.kv_heads) * dim + 3 * shape.ffn)
    matrices = shape.layers * block + shape.vocab * shape.hidden
    return matrices + shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden, matrices


def flops_of_token(shape: Shape) -> float:
    """As in the head of this file."""
    return 6.0 * parameters(shape)[1] + 12.0 * shape.layers * shape.hidden * shape.seq


def peak_of(name: str) -> float | None:
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def ours(shape: Shape, device: torch.device) -> Engine:
    config = llama(
        vocab=shape.vocab, hidden=shape.hidden, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
        ffn=shape.ffn, max_seq=shape.seq, rope_theta=shape.theta, norm_eps=shape.eps,
    )  # fmt: skip
    model = decoder(config)
    return Engine(
        model.units, model.loss, ties=model.ties, device=device, dtype=torch.bfloat16, clip=CLIP,
        placement=zero0().with_(grads=State(dtype="float32")),
        optimizer=AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
    )  # fmt: skip


@dataclass
class Memory:
    """Peak bytes of each side in its first steps, beyond what was held before it was built; nothing on a CPU."""

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)
    before: int = 0

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated(self.device)

    def first_losses(self, who: str, step: Step) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # building a side is not training it
        losses = [step(i) for i in range(CHECKED_STEPS)]
        if self.device.type == "cuda":
            self.peaks[who] = torch.cuda.max_memory_allocated(self.device) - self.before
        return losses


def measure(name: str, device: torch.device, rounds: int, ceiling: float | None) -> Result:
    """Both sides of one size. ceiling: the product measured here. Raises ValueError where they train apart."""
    size = SIZES[name]
    batches: list[Batch] = [(x.to(device), y.to(device)) for x, y in make_batches(size, size.batch)]
    memory, losses, steps = Memory(device), dict[str, list[float]](), dict[str, Step]()
    memory.begin()
    engine = ours(size.shape, device)
    weights = {key: value.to("cpu", torch.float32, copy=True) for key, value in engine.full_state("master").items()}
    steps[OURS] = lambda i: engine.step(*batches[i % len(batches)]).loss
    losses[OURS] = memory.first_losses(OURS, steps[OURS])
    memory.begin()
    compiled = device.type == "cuda"
    steps[PEER] = build(size.shape, device, weights, batches, compiled=compiled)
    losses[PEER] = memory.first_losses(PEER, steps[PEER])
    means = harness.same_losses(Solo(), losses, rtol=RTOL)
    times = harness.interleave(Solo(), {who: _block(s, size.steps, device) for who, s in steps.items()}, rounds=rounds)
    notes = [] if compiled else ["on a CPU and without torch.compile: for the path, not for figures"]
    result = harness.summarise(
        f"bf16 step, llama {name}, sequence {size.seq}, batch {size.batch}", "tokens/s", size.tokens * size.steps,
        times, [Pair(OURS, (PEER,), 1.0 if compiled else None)],
        setup={
            "size": name, "shape": vars(size.shape), "parameters": parameters(size.shape)[0], "batch": size.batch,
            "compiled": compiled, "rtol": RTOL, "first_losses": means, "peak_bytes": memory.peaks,
            "torch": torch.__version__, "device": device_name(device),
        },
        notes=notes,
    )  # fmt: skip
    rates = {who: c.rate for who, c in result.contenders.items()}
    result.setup["mfu"] = shares(rates, size.shape, peak_of(device_name(device)))
    result.setup["share_of_product"] = shares(rates, size.shape, ceiling)
    result.notes.extend(lines(result.setup))
    return result


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def shares(rates: Mapping[str, float], shape: Shape, peak: float | None) -> dict[str, float]:
    """Of ``peak`` FLOP/s by side; nothing without one."""
    return {} if peak is None else {who: rate * flops_of_token(shape) / peak for who, rate in rates.items()}


def lines(setup: Mapping[str, Any]) -> list[str]:
    """What the table says beside times."""
    told = [f"{who}: MFU {share:.1%}" for who, share in setup["mfu"].items()]
    told += [f"{who}: {share:.1%} of the measured product" for who, share in setup["share_of_product"].items()]
    return told + [f"{who}: peak memory {peak / 2**30:.2f} GiB" for who, peak in setup["peak_bytes"].items()]


def _block(step: Step, count: int, device: torch.device) -> harness.Block:
    done = CHECKED_STEPS

    def block() -> None:
        nonlocal done
        for i in range(done, done + count):
            step(i)
        done += count
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["125m", "1b"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=harness.MIN_ROUNDS)
    parser.add_argument("--json", type=Path, help="file for the results, rewritten after each size")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU on this machine: no step was measured; --device cpu --size tiny goes through the path")
        if options.json:
            options.json.write_text("[]")
        return
    device = torch.device(options.device)
    ceiling = ceilings(device, options.rounds).flops_per_s if device.type == "cuda" else None
    for name in options.size:
        rows.append(measure(name, device, options.rounds, ceiling).as_json())
        print(harness.table(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
