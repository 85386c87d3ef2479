"""torch.distributed.tensor over gloo: parallelize_module with ColwiseParallel and RowwiseParallel.

The query, key and value projections stay one matrix: its rows are put in the order of the ranks, so that a
column-wise shard holds whole heads, and a block needs one all_reduce in its backward there instead of
three. The two ends of the model exist in two forms: replicated on every rank (no communication, and the
vocabularies of the benches are small), or split over the vocabulary, with loss_parallel.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from ..work import BETAS, CLIP, EPS, LR, Setting, Step
from . import gloo
from .gpt import GPT, groups_of, token_loss

BLOCK = {
    "attention.qkv": ColwiseParallel,
    "attention.out": RowwiseParallel,
    "mlp.up": ColwiseParallel,
    "mlp.down": RowwiseParallel,
}


def rank_order(model: GPT, heads: int, ranks: int) -> None:
    """Reorder the rows of the fused projections from (q, k, v) to (q, k, v of rank 0), (of rank 1), ..."""
    for block in model.blocks:
        qkv = block.attention.qkv
        for param in (qkv.weight, qkv.bias):
            rows = param.data.view(3, ranks, heads // ranks, block.attention.head_dim, *param.shape[1:])
            param.data = rows.transpose(0, 1).reshape(param.shape).contiguous()


def start(setting: Setting) -> tuple[GPT, DeviceMesh]:
    """The model with its blocks split."""
    gloo.start(setting.world)
    mesh = init_device_mesh("cpu", (setting.world.size,), mesh_dim_names=("tp",))
    model = GPT(setting.size, setting.weights)
    rank_order(model, setting.size.heads, setting.world.size)
    for block in model.blocks:
        parallelize_module(block, mesh, {name: style() for name, style in BLOCK.items()})
    return model, mesh


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Parameter groups hold either DTensors or plain tensors: the fused kernel takes no mixture."""
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    groups = [g for g in (*groups_of(split), *groups_of(whole)) if g["params"]]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)


def clip(model: nn.Module) -> None:
    """clip_grad_norm_ for a mixture: split parameters count over all ranks, whole ones once.

    The norm of the split ones is taken over the local shards and summed by one all_reduce, which is what the
    DTensor form does with more steps; the replicated parameters inside the blocks are plain tensors.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    split = [_local(g) for g in grads if isinstance(g, DTensor) and _is_split(g)]
    whole = [_local(g) for g in grads if not (isinstance(g, DTensor) and _is_split(g))]
    square = torch.nn.utils.get_total_norm(split).square()
    dist.all_reduce(square)
    total = (square + torch.nn.utils.get_total_norm(whole).square()).sqrt()
    factor = torch.clamp(CLIP / (total + 1e-6), max=1.0)
    torch._foreach_mul_([*split, *whole], factor)


def _is_split(t: DTensor) -> bool:
    return any(isinstance(p, Shard) for p in t.placements)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def replicated(setting: Setting) -> Step:
    """Embedding, final norm and logits whole on every rank."""
    model, _ = start(setting)
    optimizer = optimizer_of(model)

    def step(i: int) -> float:
        x, y = setting.batch(i)
        optimizer.zero_grad(set_to_none=True)
        loss = token_loss(model(x), y)
        loss.backward()
        clip(model)
        optimizer.step()
        return loss.item()

    return step


def vocab_parallel(setting: Setting) -> Step:
    """Embedding and logits split over the vocabulary, the loss without gathering the logits."""
    model, mesh = start(setting)
    split_ends(model, mesh)
    optimizer = optimizer_of(model)

    def step(i: int) -> float:
        x, y = setting.batch(i)
        optimizer.zero_grad(set_to_none=True)
        with loss_parallel() if setting.size.vocab % mesh.size() == 0 else contextlib.nullcontext():
            loss = F.cross_entropy(model(x).flatten(0, 1), y.reshape(-1))
            loss.backward()
        clip(model)
        optimizer.step()
        return float(loss.full_tensor()) if isinstance(loss, DTensor) else loss.item()

    return step


def split_ends(model: GPT, mesh: DeviceMesh) -> None:
    """Shard the tied matrix by rows; loss_parallel wants shards of equal size, else the logits are gathered."""
    even = model.embed.tokens.num_embeddings % mesh.size() == 0
    logits = Shard(-1) if even else Replicate()
    parallelize_module(model.embed, mesh, {"tokens": RowwiseParallel(input_layouts=Replicate())})
    parallelize_module(model.loss, mesh, {"head": ColwiseParallel(output_layouts=logits, use_local_output=not even)})
    model.loss.head.weight = model.embed.tokens.weight
