"""transformers' own decoders with random weights, and the same through an engine: shared by threads and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.hf.convert import load_folder, save_folder
from triloom.hf.weights import open_weights
from triloom.mesh import make_mesh
from triloom.models import DecoderConfig, decoder
from triloom.optim import SGD
from triloom.placement import NAMED

SEQ, BATCH, VOCAB = 10, 4, 37
"""37 is prime: no tp divides the vocabulary."""

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.2,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 500.0}),
    "llama tied biases": ("Llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
}


def theirs(which: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of transformers; every parameter random, biases and norms too."""
    import transformers

    kind, options = MODELS[which]
    head = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel"}[kind]
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(4)
    model = getattr(transformers, kind + head)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(9)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=gen)
    targets = ids[:, 1:].clone()
    targets[0, :4] = -100
    return ids[:, :-1].contiguous(), targets


def their_loss(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients by their names."""
    ids, targets = batch()
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}


def our_engine(world: Group, config: DecoderConfig, dtype: torch.dtype, mesh: dict[str, int], **options: Any) -> Engine:
    """SGD at rate 1, without clipping or decay: weights before minus after are the gradient."""
    model = decoder(config)
    return Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=make_mesh(world.size, **mesh), microbatches=2,
        placement=NAMED[options.pop("placement", "zero1")](), optimizer=SGD(lr=1.0, momentum=0.0, weight_decay=0.0),
        clip=None, dtype=dtype, **options,
    )  # fmt: skip


def converted(world: Group, folder: Path, out: Path, mesh: dict[str, int], **options: Any) -> dict[str, Any]:
    """Load a folder on a mesh, write it out again, take one step: loss and gradients under their names."""
    weights = open_weights(folder)
    dtype = next(iter(weights.folder.tensors.values())).dtype
    engine = our_engine(world, weights.config, dtype, mesh, **options)
    load_folder(engine, folder, weights.config)
    save_folder(engine, out, weights.config, shard_bytes=4000)
    dp = engine.groups.axis("dp")
    loss = engine.step(*(t.tensor_split(dp.size)[dp.rank] for t in batch())).loss
    grads = {}
    for name, grad in engine.full_state("grads").items():
        for block in weights.table[name]:
            part = grad[slice(*block.rows)]
            grads[block.name] = part.t() if block.transposed else part
    return {"loss": loss, "grads": grads}
