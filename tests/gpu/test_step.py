"""The engine on one GPU, against the same training in fp64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triloom.engine import Engine
from triloom.models import decoder, gpt2, llama
from triloom.models.config import DecoderConfig
from triloom.operations import operations
from triloom.optim import AdamW, warmup_cosine
from triloom_kernels.attention import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

STEPS, BATCH = 20, 16

LLAMA = llama(vocab=256, hidden=128, layers=4, heads=4, kv_heads=2, max_seq=128)
"""The model of `triloom demo`."""
GPT2 = gpt2(vocab=256, hidden=128, layers=2, heads=4, max_seq=64, dropout=0.1)


def batch(step: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with something to learn: each follows from the one before, but for some noise."""
    gen = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 256, (BATCH, seq + 1), generator=gen)
    for i in range(1, seq + 1):
        keep = torch.rand(BATCH, generator=gen) < 0.8
        ids[:, i] = torch.where(keep, (ids[:, i - 1] * 3 + 1) % 256, ids[:, i])
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train(config: DecoderConfig, device: str, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """fp64 with torch's attention: the kernels have none."""
    model, kernels = decoder(config), operations()
    if dtype == torch.float64:
        kernels = kernels.using("attention", attention, "cuda")
    engine = Engine(
        model.units, model.loss, ties=model.ties, microbatches=4, seed=1, device=torch.device(device), dtype=dtype,
        kernels=kernels,
        optimizer=AdamW(lr=warmup_cosine(3e-3, warmup=10, steps=100)),
    )  # fmt: skip
    losses = [engine.step(*batch(step, config.max_seq)).loss for step in range(STEPS)]
    return losses, {name: value.cpu().double() for name, value in engine.full_state().items()}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_twenty_steps_equal_fp64(config: DecoderConfig) -> None:
    """fp32 on the GPU (torch's default, no TF32) to 1e-3 of fp64: 20 Adam steps at a high rate amplify rounding."""
    losses, _ = train(config, "cuda", torch.float32)
    exact, _ = train(config, "cpu", torch.float64)
    assert losses == pytest.approx(exact, rel=1e-3)
    assert exact[-1] < exact[0] - 0.2


def test_fp64_on_the_gpu_equals_the_cpu() -> None:
    small = replace(LLAMA, layers=2, hidden=64)
    losses, params = train(small, "cuda", torch.float64)
    exact, expected = train(small, "cpu", torch.float64)
    assert losses == pytest.approx(exact, rel=1e-9)
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-6, atol=1e-8)


def test_run_twice_gives_the_same_bits() -> None:
    first, second = train(LLAMA, "cuda", torch.float32), train(LLAMA, "cuda", torch.float32)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_bf16_learns_with_fp32_masters() -> None:
    losses, _ = train(LLAMA, "cuda", torch.bfloat16)
    exact, _ = train(LLAMA, "cpu", torch.float64)
    assert losses[0] == pytest.approx(exact[0], rel=0.02)
    assert losses[-1] == pytest.approx(exact[-1], rel=0.1)
