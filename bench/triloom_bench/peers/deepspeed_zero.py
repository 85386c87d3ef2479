"""DeepSpeed ZeRO stages 1 to 3 on the CPU accelerator, fp32, over gloo, with its own compiled AdamW for CPUs."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from functools import partial
from typing import Any

from ..work import BETAS, CLIP, EPS, LR, Absent, Setting, Step
from . import gloo
from .gpt import GPT, groups_of, token_loss

INSTALL = 'pip install --no-build-isolation "triloom[bench]" (deepspeed and ninja; needs a C++ compiler)'


def config(setting: Setting, stage: int) -> dict[str, Any]:
    rows = setting.size.batch // setting.world.size
    return {
        "train_batch_size": setting.size.batch,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def build(setting: Setting, stage: int) -> Step:
    world = setting.world
    if importlib.util.find_spec("deepspeed") is None:
        raise Absent(INSTALL)
    if shutil.which("c++") is None or importlib.util.find_spec("ninja") is None:
        raise Absent(f"its AdamW for CPUs is compiled on the spot: {INSTALL}")
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(world.rank), "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank), "LOCAL_SIZE": str(world.local_size),
    }  # fmt: skip
    gloo.start(world)
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = GPT(setting.size, setting.weights)
    optimizer = DeepSpeedCPUAdam(groups_of(model.parameters()), lr=LR, betas=BETAS, eps=EPS, adamw_mode=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(setting, stage), dist_init_required=False
    )

    def step(i: int) -> float:
        x, y = setting.batch(i, world.size, world.rank)
        loss = token_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


stage1 = partial(build, stage=1)
stage2 = partial(build, stage=2)
stage3 = partial(build, stage=3)
