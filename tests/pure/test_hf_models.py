"""Decoders to and from transformers' own classes, with random weights: the same logits and gradients on any mesh."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cases import MODELS, batch, converted, our_engine, their_loss, theirs
from triloom.cli import main
from triloom.config import load
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.hf.convert import load_folder, save_folder
from triloom.hf.weights import open_weights
from triloom.models import decoder, llama
from triloom.runlog import read_metrics
from triloom.scope import Scope
from triloom.train import prepare

transformers = pytest.importorskip("transformers")

MESHES: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({}, {"placement": "zero0"}),
    ({"tp": 2, "pp": 2}, {"sequence_parallel": True}),
    ({"dp": 2, "tp": 2}, {"placement": "zero3"}),
    ({"dp": 2, "pp": 2}, {"placement": "zero2"}),
]
TOLERANCE = {"llama": {"rtol": 1e-4, "atol": 5e-6}, "gpt2": {"rtol": 1e-9, "atol": 1e-11}}
"""Both in fp64, but transformers' Llama computes norms and rotations in fp32 all the same."""


def again(folder: Path) -> Any:
    """The folder as transformers loads it; tied, missing and unexpected tensors are its own to complain about."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float64
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def our_logits(folder: Path) -> torch.Tensor:
    """By the layers alone, without an engine's loss."""
    weights = open_weights(folder)
    model = decoder(weights.config)
    scope = Scope(dtype=torch.float64)
    engine = our_engine(Solo(), weights.config, torch.float64, {})
    load_folder(engine, folder, weights.config)
    units = {name: make(scope) for name, make in {**model.units, "loss": model.loss}.items()}
    state = engine.full_state()
    if weights.config.tied:
        state["loss.head.weight"] = state["embed.tokens.weight"]
    x: Any = batch()[0]
    with torch.no_grad():
        for name, unit in units.items():
            unit.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
            x = unit.logits(x) if name == "loss" else unit(x)
    return x  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", MODELS)
def test_there_and_back_on_every_mesh(tmp_path: Path, which: str) -> None:
    model = theirs(which)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    loss, grads = their_loss(model)
    want = model(batch()[0]).logits.detach()
    close = TOLERANCE[which.split()[0]]
    torch.testing.assert_close(our_logits(tmp_path / "hf"), want, **close)
    for mesh, options in MESHES:
        ranks = max(1, mesh.get("dp", 1) * mesh.get("tp", 1) * mesh.get("pp", 1))
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        body = partial(converted, folder=tmp_path / "hf", out=out, mesh=mesh, **options)
        for got in run_threads(ranks, body):
            assert got["loss"] == pytest.approx(loss, rel=close["rtol"] / 10)
            assert got["grads"].keys() == grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(got["grads"][name], grad, **close, msg=lambda m, n=name: f"{n}: {m}")
        back = again(out)
        for (name, p), (same, q) in zip(model.named_parameters(), back.named_parameters(), strict=True):
            assert name == same and torch.equal(p, q), name
        assert torch.equal(back(batch()[0]).logits, want), "the very same bits"


def test_16_bit_folders_and_wider_masters(tmp_path: Path) -> None:
    model = theirs("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")

    def body(group: Group) -> None:
        config = open_weights(tmp_path / "hf").config
        engine = our_engine(group, config, torch.bfloat16, {"tp": 2}, placement="zero3")
        load_folder(engine, tmp_path / "hf", config)
        masters = engine.full_state("master")
        assert all(m.dtype == torch.float32 for m in masters.values())
        params = engine.full_state()
        assert all(torch.equal(params[n].float(), m) for n, m in masters.items())
        engine.step(*(t.tensor_split(2)[engine.groups.axis("dp").rank] for t in batch()))
        save_folder(engine, tmp_path / "wide", config, dtype=torch.float32)
        save_folder(engine, tmp_path / "narrow", config)

    run_threads(4, body)
    wide, narrow = open_weights(tmp_path / "wide"), open_weights(tmp_path / "narrow")
    assert wide.folder.config["dtype"] == "float32" and narrow.folder.config["dtype"] == "bfloat16"
    name = "blocks.0.mlp.up.weight"
    assert torch.equal(wide.read(name).bfloat16(), narrow.read(name))
    assert not torch.equal(wide.read(name), narrow.read(name).float())
    again(tmp_path / "narrow")


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    config = llama(vocab=40, hidden=16, layers=1, heads=2)
    engine = our_engine(Solo(), config, torch.float64, {})
    save_folder(engine, tmp_path / "hf", config, vocab=37)
    model = again(tmp_path / "hf")
    assert model.config.vocab_size == 37
    assert torch.equal(model.lm_head.weight, engine.full_state()["loss.head.weight"][:37])
    with pytest.raises(ConfigError, match="vocab = 41 is more than the 40 tokens"):
        save_folder(engine, tmp_path / "other", config, vocab=41)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        save_folder(engine, tmp_path / "hf", config)


def test_a_folder_that_cannot_be_written_is_told_by_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the third tensor; nobody waits for the writer for ever."""
    config = llama(vocab=40, hidden=16, layers=2, heads=2)

    def full(folder: Path, config: Any, shapes: Any, dtype: Any, tensors: Any, shard_bytes: int) -> None:
        for number, _ in enumerate(tensors):
            if number == 3:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr("triloom.hf.convert.write_folder", full)

    def body(group: Group) -> None:
        engine = our_engine(group, config, torch.float64, {"tp": 2, "pp": 2})
        with pytest.raises(ConfigError, match="could not be written: .*No space left"):
            save_folder(engine, tmp_path / "hf", config)
        assert engine.step(torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)).loss > 0

    run_threads(4, body)


def test_a_folder_of_another_model_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path / "hf")

    def body(group: Group) -> None:
        config = llama(vocab=37, hidden=16, layers=2, heads=4)
        engine = our_engine(group, config, torch.float64, {"pp": 2})
        before = engine.full_state()
        with pytest.raises(ConfigError, match="model.hidden = 16, there 32"):
            load_folder(engine, tmp_path / "hf", config)
        assert all(torch.equal(v, before[k]) for k, v in engine.full_state().items())

    run_threads(2, body)


# ---------------------------------------------------------------- triloom checkpoint convert


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_a_folder_becomes_a_run_and_a_run_a_folder(
    tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the converted weights: its first loss is that of transformers on the same tokens."""
    model = theirs(which, torch.float32)
    model.save_pretrained(tmp_path / "hf")
    run, back = str(tmp_path / "run"), str(tmp_path / "back")
    assert main(["checkpoint", "convert", str(tmp_path / "hf"), run]) == 0
    assert f"--run.resume {run}" in capsys.readouterr().out
    assert main(["checkpoint", "convert", run, back]) == 0
    for (name, p), (_, q) in zip(model.named_parameters(), again(Path(back)).named_parameters(), strict=True):
        assert torch.equal(p.double(), q), name

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    new = str(tmp_path / "new")
    words = f"--run.resume {run} --run.dir {new} --data.path {text} --data.tokenizer char --train.steps 2"
    words += " --train.batch 4 --train.threads 1 --run.plot false --checkpoint.every 1 --train.eval_batches 0"
    before = torch.get_num_threads()
    assert main(["train", "--config", f"{run}/config.toml", *words.split()]) == 0
    torch.set_num_threads(before)
    config = load([*words.split()], f"{run}/config.toml").config
    x, y = prepare(config, 1).batch(0, 0)
    want = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    assert read_metrics(Path(new) / "metrics.jsonl")[0]["loss"] == pytest.approx(float(want.detach()), rel=1e-5)

    trained = str(tmp_path / "trained")
    assert main(["checkpoint", "convert", new, trained, "--vocab", "30", "--dtype", "bfloat16"]) == 0
    assert again(Path(trained)).config.vocab_size == 30


def test_what_convert_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs("llama").save_pretrained(tmp_path / "hf")
    hf = str(tmp_path / "hf")
    engine = our_engine(Solo(), open_weights(hf).config, torch.float64, {})
    engine.save(tmp_path / "own")
    small = tmp_path / "small.toml"
    small.write_text("[model]\nhidden = 16\nheads = 4\nlayers = 2\n")
    capsys.readouterr()
    for words, message in (
        ([hf], "takes FROM and TO"),
        ([hf, hf], "is not an empty folder"),
        ([hf, str(tmp_path / "x"), "--vocab", "9"], "are of a Hugging Face folder to be written"),
        ([hf, str(tmp_path / "x"), "--config", str(small)], "model.hidden = 16, there 32"),
        ([str(tmp_path / "own"), str(tmp_path / "x")], "does not say what model it is of; give the run's TOML"),
        ([str(tmp_path / "own"), str(tmp_path / "x"), "--config", str(small)], "model.vocab is not given"),
    ):
        assert main(["checkpoint", "convert", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
