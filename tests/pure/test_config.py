"""Configuration: precedence, types, suggestions, sources, help, and the rules across keys."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from triloom.config import Config, help_fields, load, to_toml
from triloom.config.load import kinds
from triloom.config.schema import SECTIONS, ModelConfig, OptimConfig
from triloom.config.show import field_docs
from triloom.errors import ConfigError, MeshError
from triloom.plan import make_plan


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def problems(words: list[str] | str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(words.split() if isinstance(words, str) else words, path)
    return str(caught.value)


# ---------------------------------------------------------------- precedence and types


def test_default_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nlayers = 3\nheads = 2\n[train]\nsteps = 7\n")
    loaded = load(["--model.layers", "5", "--optim.lr=0.5"], path)
    assert (loaded.config.model.layers, loaded.config.model.heads, loaded.config.train.steps) == (5, 2, 7)
    assert loaded.config.optim.lr == 0.5
    assert loaded.config.model.hidden == Config().model.hidden
    assert loaded.sources == {
        "model.heads": f"{path}:3",
        "train.steps": f"{path}:5",
        "model.layers": "command line",
        "optim.lr": "command line",
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.layers", "12", 12),
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("optim.betas", "0.8,0.99", (0.8, 0.99)),
        ("optim.clip", "none", None),
        ("optim.clip", "0.5", 0.5),
        ("parallel.order", "tp,pp,dp", ("tp", "pp", "dp")),
        ("parallel.dp", "none", None),
        ("model.tied", "true", True),
        ("model.tied", "No", False),
        ("data.path", "/some/where=else", "/some/where=else"),
        ("train.seed", "-3", -3),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_words_are_typed_by_the_annotation(key: str, text: str, value: object, joined: bool) -> None:
    words = [f"--{key}={text}"] if joined else [f"--{key}", text]
    section, name = key.split(".")
    got = getattr(getattr(load(words).config, section), name)
    assert got == value and type(got) is type(value)


def test_bare_bool_means_true_also_before_another_option() -> None:
    config = load(["--model.tied", "--run.overwrite", "--model.layers", "2"]).config
    assert config.model.tied and config.run.overwrite and config.model.layers == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.layers", "3.5"], "model.layers = '3.5' (command line): must be of type int, got str '3.5'"),
        (["--model.tied", "maybe"], "write true or false"),
        (["--optim.betas", "0.9"], "must be of type float,float"),
        (["--optim.betas", "0.9,1.5"], "must be at least 0 and below 1 in every place"),
        (["--optim.lr", "nan"], "must be a finite number"),
        (["--optim.lr", "-1"], "must be above 0"),
        (["--model.layers", "0"], "must be at least 1"),
        (["--model.layers", "none"], "must be of type int"),
        (["--model.shape", "lama"], "must be one of llama, gpt2; did you mean 'llama'?"),
        (["--parallel.order", "dp,pp"], "must be dp, pp, tp once each"),
        (["--model.layers"], "--model.layers (command line) needs a value of type int"),
        (["--model.layers", "--model.heads=2"], "--model.layers (command line) needs a value"),
        (["--model.layers=2", "--model.layers", "3"], "given twice on the command line: '2' and '3'"),
        (["stray"], "'stray' (command line) is not an option"),
        (["--model.layer", "3"], "is not a key; did you mean 'model.layers'?"),
        (["--lr", "3"], "did you mean 'optim.lr'?"),
        (["--train.heads", "3"], "did you mean 'train.threads'?"),
        (["--quux.zz", "3"], "sections are model, data, parallel"),
        (["--model.zzzzzz", "3"], "keys of [model] are model.shape, model.layers"),
    ],
)
def test_what_cannot_work_on_the_command_line_says_so(words: list[str], says: str) -> None:
    assert says in problems(words)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[model]\nlayers = '3'\n", 2, "must be of type int, got str '3'"),
        ("[model]\n\nlayers = true\n", 3, "must be of type int, got bool True"),
        ("[parallel]\nsequence = 1\n", 2, "must be of type bool, got int 1"),
        ("[optim]\nbetas = 0.9\n", 2, "must be of type float,float"),
        ("[optim]\nbetas = [0.9, 'x']\n", 2, "must be of type float,float"),
        ("[optim]\nlr = inf\n", 2, "must be a finite number"),
        ("# c\nmodel.layer = 3\n", 2, "did you mean 'model.layers'?"),
        ("[mdel]\nlayers = 3\n", 2, "did you mean 'model.layers'?"),
        ("layers = 3\n", 1, "a key needs a section"),
        ("[modle]\n", 1, "is not a section; did you mean 'model'?"),
        ("[model.inner]\nlayers = 3\n", 1, "is not a key"),
        ("[[model]]\nlayers = 3\n", None, "a key needs a section"),
    ],
)
def test_what_cannot_work_in_the_file_names_file_and_line(
    tmp_path: Path, text: str, line: int | None, says: str
) -> None:
    path = write(tmp_path, text)
    message = problems([], path)
    assert says in message
    assert (f"{path}:{line}" if line else str(path)) in message


def test_file_that_is_missing_or_not_toml(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problems([], tmp_path / "no.toml")
    assert "is not valid TOML" in problems([], write(tmp_path, "[model\n"))
    assert "line 2" in problems([], write(tmp_path, "[model]\nlayers = \n"))


def test_ints_in_toml_do_for_floats(tmp_path: Path) -> None:
    config = load([], write(tmp_path, "[optim]\nlr = 1\nbetas = [0, 0.5]\nclip = 'none'\n")).config
    assert config.optim.lr == 1.0 and type(config.optim.lr) is float
    assert config.optim.betas == (0.0, 0.5) and config.optim.clip is None


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nlayer = 3\n[train]\nsteps = 0\n")
    message = problems(["--optim.lr", "x", "--schedule.kind", "1f1"], path)
    assert len(message.splitlines()) == 4


def test_sections_built_in_python_keep_the_same_rules() -> None:
    with pytest.raises(ConfigError, match=r"ModelConfig.layers = 0: must be at least 1"):
        ModelConfig(layers=0)
    with pytest.raises(ConfigError, match=r"OptimConfig.lr = '1': must be of type float"):
        OptimConfig(lr="1")  # type: ignore[arg-type]
    assert OptimConfig(lr=1).lr == 1


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_text_a_type_and_a_default_in_help(section: str) -> None:
    cls = SECTIONS[section]
    docs = field_docs(cls)
    shown = help_fields(width=10**6)
    assert cls.__doc__ and f"[{section}] {cls.__doc__}" in shown
    for f in fields(cls):
        assert len(docs[f.name]) > 10, f"{section}.{f.name} has no text under it"
        assert f"  --{section}.{f.name} {kinds()[f'{section}.{f.name}'].name.upper()}\n" in shown
    assert len(kinds()) == shown.count("Default: ")


def test_toml_loads_back_equal(tmp_path: Path) -> None:
    words = ["--model.kv_heads", "2", "--data.path", 'a "b" \\ ü\t\x7f', "--optim.eps", "1e-12", "--parallel.sequence"]
    config = load(words).config
    again = load([], write(tmp_path, to_toml(config, "a head\nof two lines"))).config
    assert again == config
    assert load([], write(tmp_path, to_toml(Config()))).config == Config()


# ---------------------------------------------------------------- rules across keys


def plan(words: str, world: int = 4, vocab: int = 256):  # type: ignore[no-untyped-def]
    loaded = load(words.split())
    return make_plan(loaded.config, world, data_vocab=vocab, sources=loaded.sources)


def test_a_plan_leaves_nothing_open() -> None:
    p = plan("--parallel.pp 2")
    assert (p.dp, p.microbatches) == (2, 4)
    assert (p.config.parallel.dp, p.config.model.kv_heads, p.config.model.vocab) == (2, 4, 256)
    assert p.config.model.tied is False and plan("--model.shape gpt2").config.model.tied is True
    assert (p.config.model.ffn, p.config.optim.min_lr, p.config.optim.steps) == (352, 1e-4, 200)
    assert plan("--model.shape gpt2").config.model.ffn == 512
    assert plan("--parallel.pp 2 --train.batch 2").microbatches == 1
    assert plan("").microbatches == 1


def test_a_filled_config_makes_the_same_plan() -> None:
    for words in ("--parallel.pp 2 --model.shape gpt2", "--optim.decay constant", "--parallel.tp 4",
                  "--optim.decay wsd --optim.kind muon", "--optim.kind sgd --optim.momentum 0"):  # fmt: skip
        first = plan(words)
        again = make_plan(first.config, 4, data_vocab=256)
        assert again.config == first.config and again.mesh == first.mesh and again.placement == first.placement


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--model.hidden 100 --model.heads 8", "hidden = 100 must be a multiple of heads = 8: 96 or 104 would do"),
        ("--model.kv_heads 3", "model.kv_heads = 3 (command line): heads = 4 must be a multiple of kv_heads = 3"),
        ("--model.attention_dropout 0.1", "the llama shape has no dropout on attention weights"),
        ("--model.hidden 12 --model.heads 4", "rotary positions need an even head size, hidden / heads is 3"),
        ("--optim.lr 1e-3 --optim.min_lr 0.1", "cannot decay upwards"),
        ("--optim.decay constant --optim.min_lr 0.1", "does not use optim.min_lr"),
        ("--optim.decay cosine --optim.cooldown 5", "does not use optim.cooldown"),
        ("--optim.decay wsd --optim.cooldown 150 --optim.warmup 60", "must fit into 200 steps"),
        ("--optim.kind lion --optim.eps 1e-6 --optim.momentum 0.5", "lion does not use optim.eps and optim.momentum"),
        ("--optim.kind sgd --optim.momentum 0 --optim.nesterov true", "no momentum to look ahead along"),
        ("--placement.rounding kahan", "kahan rounding is for bfloat16 parameters"),
        ("--placement.state_dtype bfloat16 --optim.kind adamw8bit", "in 8 bits already"),
        ("--placement.persist 100", "leave out placement.persist, or use zero3"),
        ("--optim.warmup 500", "must end before the decay does, at step 200"),
        ("--train.eval_every 5 --train.eval_batches 0", "evaluations need batches"),
        ("--data.held_out 0", "nothing is held out"),
        ("--run.overwrite", "give run.dir"),
        ("--parallel.sequence", "the sequence is split over tp, which is 1"),
        ("--parallel.sequence --parallel.tp 4 --model.seq 126", "seq = 126 must be a multiple of tp = 4"),
        ("--train.batch 6", "batch = 6 must be a multiple of dp = 4: 4 or 8 would do"),
        ("--schedule.microbatches 9", "a dp rank has 8 samples a step"),
        ("--model.vocab 100", "the data has 256 different tokens"),
        ("--model.heads 6 --model.hidden 96 --parallel.tp 4", "does not divide"),
        ("--model.layers 1 --parallel.pp 4", "need at least 4 units; 1 layers"),
    ],
)
def test_keys_that_do_not_go_together(words: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(words)
    assert says in str(caught.value)
    assert "(command line)" in str(caught.value)


def test_a_world_that_does_not_factor_shows_meshes_that_would() -> None:
    with pytest.raises(MeshError, match=r"must divide the 4 ranks of the world; meshes that work"):
        plan("--parallel.tp 3")
