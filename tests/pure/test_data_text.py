"""Text to tokens: UTF-8, characters, BPE, the cache, bits per byte, one rank of a host tokenising for the others."""

from __future__ import annotations

import builtins
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triloom import boot
from triloom.cli import main
from triloom.config import load, to_toml
from triloom.config.schema import DataConfig
from triloom.data import Data, Tokenised, cut, find, is_long, open_found, text, tokenise, tokenizers
from triloom.data.text import Text, find_text
from triloom.data.tokenizers import END_OF_TEXT, Characters, Subwords, characters_of, given_tokenizer, trained_bpe
from triloom.errors import ConfigError
from triloom.evaluation import HeldOut
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.plan import make_plan
from triloom.runlog import read_metrics
from triloom.together import SetupError
from triloom.tokenising import tokenise_together
from triloom.train import prepare, train

WORDS = "the quick brown fox jumps over the lazy dog, naïve café Ωmega 日本語 🙂\n"
SLOW = [HealthCheck.function_scoped_fixture]


def heard(size: int) -> None: ...


def text_of(folder: Path, *parts: str) -> Text:
    """A folder of one file for each part."""
    root = folder / "text"
    root.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        (root / f"{number}.txt").write_bytes(part.encode())
    return find_text(str(root), "data.path")


# ---------------------------------------------------------------- reading


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(content=st.text(max_size=60), chunk=st.integers(4, 9))
def test_text_is_read_in_pieces_that_join_again(tmp_path: Path, content: str, chunk: int) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", chunk)
        pieces = list(Text((file,), "a", False).pieces())
    assert "".join(piece for piece, _, _ in pieces) == content
    assert sum(size for _, size, _ in pieces) == len(content.encode())
    assert [ended for _, _, ended in pieces] == [False] * (len(pieces) - 1) + [True]


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(
    before=st.text(max_size=30),
    chunk=st.sampled_from([4, 7, 1 << 20]),
    bad=st.sampled_from([b"\xff", b"\xc3", b"\x80"]),
)
def test_what_is_not_utf_8_is_told_with_file_and_byte(tmp_path: Path, before: str, chunk: int, bad: bytes) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(before.encode() + bad + b"abc")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr(text, "CHUNK", chunk)
        list(Text((file,), "bad", False).pieces())
    where = len(before.encode())
    assert f"{file} is not UTF-8: byte {where} is 0x{bad[0]:02x}" in str(caught.value)


# ---------------------------------------------------------------- tokenizers


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(parts=st.lists(st.text(st.characters(exclude_characters="\0"), max_size=20), min_size=1, max_size=4))
def test_characters_are_sorted_code_points_and_give_the_text_back(tmp_path: Path, parts: list[str]) -> None:
    for file in tmp_path.glob("text/*"):
        file.unlink()
    source = text_of(tmp_path, *parts)
    made = characters_of([source], heard)
    joined = "\0".join(parts)
    assert made.points == tuple(sorted({ord(c) for c in joined}))
    ids = np.concatenate([*made.encode(source, heard), np.empty(0, np.uint16)])
    assert "".join(chr(made.points[i]) for i in ids.astype(int)) == joined
    assert made.byte_count(ids.astype(int)) == len(joined.encode())


def test_a_character_that_a_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the character 'c', which is not among the 2 characters"):
        list(Characters((97, 98)).encode(text_of(tmp_path, "abcab"), heard))


def test_bpe_is_trained_the_same_again_and_gives_the_text_back(tmp_path: Path) -> None:
    source = text_of(tmp_path, WORDS * 30, "", "another file\n")
    made = trained_bpe([source], 300, heard)
    assert made.content == trained_bpe([source], 300, heard).content
    assert 257 < made.vocab <= 300
    ids = np.concatenate(list(made.encode(source, heard)))
    assert ids.dtype == np.uint16
    ends = np.flatnonzero(ids == made.id_of(END_OF_TEXT))
    assert len(ends) == 3 and ends[2] == len(ids) - 1 and ends[1] == ends[0] + 1
    assert made._made.decode(ids.tolist(), skip_special_tokens=True) == WORDS * 30 + "another file\n"
    assert made.byte_count(ids) == source.size()


def test_bytes_of_a_tokenizer_that_is_not_byte_level_are_those_of_its_text() -> None:
    tokenizers_ = pytest.importorskip("tokenizers")
    made = tokenizers_.Tokenizer(tokenizers_.models.WordLevel({"naïve": 0, "café": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers_.pre_tokenizers.Whitespace()
    assert Subwords(made.to_str(), None).byte_count(np.array([0, 1])) == len("naïve café".encode())


def test_a_tokenizer_is_made_again_from_its_file(tmp_path: Path) -> None:
    source = text_of(tmp_path, WORDS * 30)
    for made in (characters_of([source], heard), trained_bpe([source], 300, heard)):
        name, content = made.file
        (tmp_path / name).write_text(content)
        again = given_tokenizer(str(tmp_path / name), None)
        assert again == made and again.name == made.name
        first, second = (np.concatenate(list(one.encode(source, heard))) for one in (made, again))
        assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("content", "eos", "says"),
    [
        (None, None, "cannot be read: No such file or directory; give byte, char, bpe or the path"),
        ("{", None, "is not JSON"),
        ("{}", None, "is neither a tokenizer.json"),
        ('{"model": {"type": "What"}}', None, "not a tokenizer.json of the tokenizers library"),
        ('{"characters": "ba"}', None, "ascending order"),
        ('{"characters": "ab"}', 1, "data.eos = 1 is not used"),
    ],
)
def test_a_file_that_is_no_tokenizer_says_so(tmp_path: Path, content: str | None, eos: int | None, says: str) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        given_tokenizer(str(tmp_path / "t.json"), eos)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("tokenizers") and not rest[3:4] == (1,):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'triloom\[data\]'"):
        trained_bpe([], 300, heard)


# ---------------------------------------------------------------- the cache


def tokenised(config: DataConfig, folder: Path, said: list[str] | None = None) -> tuple[Tokenised, Data]:
    found = find(config)
    shown: list[tuple[str, int, int]] = []
    result = tokenise(config, found, folder, lambda *doing: shown.append(doing), ([] if said is None else said).append)
    assert shown and all(0 < done <= total for _, done, total in shown)
    sources = open_found(config, found, folder, result)
    assert Tokenised.from_json(json.loads(json.dumps(result.as_json()))) == result
    return result, cut(sources, seq=8, seed=0, vocab=4096, held_out=0.1)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_was_tokenised_is_found_again_and_made_anew_when_damaged(tmp_path: Path, kind: str) -> None:
    source, cache = text_of(tmp_path, WORDS * 40, WORDS * 20), tmp_path / "cache"
    config = DataConfig(path=str(source.name), tokenizer=kind, vocab=300 if kind == "bpe" else None)
    first, data = tokenised(config, cache)
    tokens, manifest = cache / first.texts[0] / "tokens.bin", cache / first.texts[0] / "manifest.json"
    before = tokens.read_bytes()
    stamp = tokens.stat().st_mtime_ns
    assert tokenised(config, cache)[0] == first and tokens.stat().st_mtime_ns == stamp
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]
    made = first.tokenizer
    assert made is not None
    for damage in (
        lambda: tokens.write_bytes(before[:-2]),
        lambda: tokens.write_bytes(before[:9] + bytes([before[9] ^ 1]) + before[10:]),
        lambda: tokens.unlink(),
        lambda: manifest.write_text("{}"),
        lambda: manifest.unlink(),
        lambda: (cache / made[1] / made[0]).write_text("{}"),
    ):
        damage()
        said: list[str] = []
        again, anew = tokenised(config, cache, said)
        assert again == first and tokens.read_bytes() == before and anew.digest == data.digest
        assert len(said) == 1 and "is damaged and is made anew" in said[0]


def test_other_text_another_vocabulary_and_another_separator_are_kept_apart(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text(WORDS * 40)
    seen = set()
    for vocab in (280, 300):
        seen.add(tokenised(DataConfig(path=str(file), tokenizer="bpe", vocab=vocab), cache)[0])
    seen.add(tokenised(DataConfig(path=str(file), tokenizer="bpe", vocab=300, eos=5), cache)[0])
    file.write_text(WORDS * 39 + WORDS.upper())
    seen.add(tokenised(DataConfig(path=str(file), tokenizer="bpe", vocab=300), cache)[0])
    assert len({one.texts for one in seen}) == 4


def test_a_follower_refuses_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    config = DataConfig(path=text_of(tmp_path, WORDS * 40).name, tokenizer="char")
    first, _ = tokenised(config, tmp_path)
    (tmp_path / first.texts[0] / "tokens.bin").write_bytes(b"ab")
    with pytest.raises(ConfigError, match="has 1 tokens, not"):
        open_found(config, find(config), tmp_path, first)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = DataConfig(path=text_of(tmp_path, WORDS).name, tokenizer="char")
    with pytest.raises(ConfigError, match=r"file/cache cannot be written: .*; give another folder \(data.cache\)"):
        tokenise(config, find(config), tmp_path / "file" / "cache", lambda *_: None, print)


def test_a_large_folder_of_bytes_is_joined_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=text_of(tmp_path, "one", "two" * 40).name)
    assert not is_long(config, find(config))
    monkeypatch.setattr("triloom.data.sources.IN_MEMORY", 8)
    assert is_long(config, find(config))
    _, data = tokenised(config, tmp_path / "cache")
    assert data.train.take(0, 1)[0].max() < 256 and data.about.endswith("124 bytes")


def test_validation_text_adds_characters_but_trains_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("ab" * 200)
    (tmp_path / "val.txt").write_text("abc" * 200)
    paths = {"path": str(tmp_path / "train.txt"), "validation": str(tmp_path / "val.txt")}
    _, data = tokenised(DataConfig(**paths, tokenizer="char", held_out=0.0), tmp_path)
    assert data.tokenizer == Characters((97, 98, 99)) and data.held_out is not None
    assert data.held_out.take(0, 1)[0][0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    _, subwords = tokenised(DataConfig(**paths, tokenizer="bpe", vocab=257, held_out=0.0), tmp_path)
    alone, _ = tokenised(DataConfig(path=paths["path"], tokenizer="bpe", vocab=257), tmp_path)
    assert isinstance(subwords.tokenizer, Subwords)
    assert subwords.tokenizer.content == (tmp_path / alone.tokenizer[1] / alone.tokenizer[0]).read_text()  # type: ignore[index]


# ---------------------------------------------------------------- runs


TINY = """
[model]
layers = 1
hidden = 16
heads = 2
seq = 16
[train]
batch = 4
steps = 2
threads = 1
eval_batches = 2
[run]
plot = false
timeline = 0
"""


def config_file(folder: Path, content: str, *lines: str) -> Path:
    (folder / "text.txt").write_text(content)
    path = folder / "tiny.toml"
    path.write_text(TINY + f"dir = '{folder / 'run'}'\n[data]\npath = '{folder / 'text.txt'}'\n" + "\n".join(lines))
    return path


def on_ranks(count: int, body: Callable[[boot.World], Any]) -> list[Any]:
    """Threads as ranks of one host, numbered as a launcher would."""

    def rank(group: Group) -> Any:
        return body(
            boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=group.rank, local_size=count)
        )

    return run_threads(count, rank)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_run_on_text_leaves_its_tokenizer_and_another_can_take_it(tmp_path: Path, kind: str) -> None:
    path = config_file(tmp_path, WORDS * 60, f"tokenizer = '{kind}'", "vocab = 300" if kind == "bpe" else "")
    out = io.StringIO()
    config = load(["--parallel.dp", "2"], path).config
    results = on_ranks(2, lambda world: train(config, world, out=out))
    assert results[0].held_out_loss == results[1].held_out_loss
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["held_out_perplexity"] is None for r in records] == [True, False]
    last = records[-1]
    assert last["held_out_perplexity"] == pytest.approx(math.exp(last["held_out_loss"]))
    name = "characters.json" if kind == "char" else "tokenizer.json"
    kept = tmp_path / "run" / name
    words = ["--run.dir", str(tmp_path / "again"), "--data.tokenizer", str(kept), "--data.vocab", "none"]
    other = on_ranks(1, lambda world: train(load(words, path).config, world, out=out))[0]
    assert other.held_out_loss == pytest.approx(results[0].held_out_loss, abs=1e-5)
    assert (tmp_path / "again" / name).read_text() == kept.read_text()
    # Bits per byte by hand: 2 batches of 4 windows, from the beginning of the held-out tokens.
    job = prepare(config, 2)
    assert job.data.held_out is not None and job.data.tokenizer is not None
    targets = job.data.held_out.take(0, 8)[1].numpy()
    size = job.data.tokenizer.byte_count(targets)
    assert size != targets.size
    assert last["held_out_bits_per_byte"] == pytest.approx(last["held_out_loss"] / math.log(2) * targets.size / size)
    assert f"{last['held_out_bits_per_byte']:.4f} bits a byte" in out.getvalue()


def test_tokens_without_text_have_no_bits_per_byte(tmp_path: Path) -> None:
    path = config_file(tmp_path, "")
    (np.arange(3000) % 50).astype(np.uint16).tofile(tmp_path / "train.bin")
    (np.arange(300) % 50).astype(np.uint16).tofile(tmp_path / "val.bin")
    words = ["--data.path", str(tmp_path / "train.bin"), "--data.validation", str(tmp_path / "val.bin")]
    out = io.StringIO()
    with pytest.raises(SetupError, match=r"train.bin is token ids, and does not say how many there are; set model.voc"):
        on_ranks(1, lambda world: train(load(words, path).config, world, out=out))
    config = load([*words, "--model.vocab", "50"], path).config
    result = on_ranks(1, lambda world: train(config, world, out=out))[0]
    assert result.evaluation is not None and result.evaluation.bits_per_byte is None
    assert "bits a byte unknown: the tokens come without text" in out.getvalue()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["held_out_bits_per_byte"] is None
    config = load([*words, "--model.vocab", "49", "--run.overwrite"], path).config
    with pytest.raises(SetupError, match=r"train.bin has the token id 49, and the vocabulary has 49 tokens"):
        on_ranks(2, lambda world: train(config, world, out=out))


def test_prefetching_changes_nothing(tmp_path: Path) -> None:
    path = config_file(tmp_path, WORDS * 60)
    losses = []
    for ahead in ("0", "3"):
        words = ["--data.prefetch", ahead, "--run.overwrite"]
        on_ranks(1, lambda world, words=words: train(load(words, path).config, world, out=io.StringIO()))
        losses.append([r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_an_evaluation_is_at_most_all_that_is_held_out(tmp_path: Path) -> None:
    path = config_file(tmp_path, WORDS * 60, "held_out = 0.1")
    job = prepare(load(["--train.eval_batches", "1000"], path).config, 1)
    assert job.data.held_out is not None
    assert HeldOut(job.data, 4, 1000, 1, 0).batches == job.data.held_out.count // 4 < 100


def test_one_rank_of_a_host_tokenises_and_an_error_is_everybodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, WORDS * 60, "tokenizer = 'char'")
    config = load([], path).config
    calls = []
    made = tokenizers.characters_of
    monkeypatch.setattr("triloom.data.sources.characters_of", lambda *given: (calls.append(1), made(*given))[1])
    results = on_ranks(3, lambda world: tokenise_together(config, world, io.StringIO()))
    assert results[0] is not None and results.count(results[0]) == 3 and len(calls) == 1
    (tmp_path / "text.txt").write_bytes(b"abc\xff")
    with pytest.raises(SetupError, match=r"rank 0: .*text.txt is not UTF-8: byte 3 is 0xff"):
        on_ranks(3, lambda world: tokenise_together(config, world, io.StringIO()))


def test_a_plan_that_cannot_work_is_refused_before_text_is_tokenised(tmp_path: Path) -> None:
    path = config_file(tmp_path, WORDS * 60, "tokenizer = 'char'")
    with pytest.raises(SetupError, match="heads"):
        on_ranks(2, lambda world: train(load(["--model.hidden", "17"], path).config, world, out=io.StringIO()))
    assert not (tmp_path / "tokens").exists()
    prepare(load([], path).config, 2)
    assert (tmp_path / "tokens").is_dir()


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--data.path a --data.paths a,b", "two answers to the same question"),
        ("--data.weights 1,2", "2 weights for 0 paths"),
        ("--data.paths a,b --data.weights 1", "1 weights for 2 paths"),
        ("--data.paths a,b --data.weights 1,0", "must be above 0 in every place"),
        ("--data.paths ()", "no path is given"),
        ("--data.validation v --data.held_out 0.1", "the validation file is what is evaluated"),
        ("--data.vocab 300", "a vocabulary is trained for tokenizer = bpe only"),
        ("--data.vocab 256 --data.tokenizer bpe", "must be at least 257"),
        ("--data.token_dtype int32", "must be one of uint16, uint32"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_plan(load(words.split()).config, 1, data_vocab=256)


def test_sources_and_weights_are_said_alike_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "blend.toml"
    path.write_text('[data]\npaths = ["a (1)", "b"]\nweights = [7, 3]\n')
    words = ["--data.paths", "a (1), b", "--data.weights", "7,3"]
    config = make_plan(load(words).config, 1, data_vocab=256).config
    assert config.data.paths == ("a (1)", "b") and config.data.held_out == 0.01
    assert make_plan(load([], path).config, 1, data_vocab=256).config == config
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load([], tmp_path / "again.toml").config == config


# ---------------------------------------------------------------- the command


def test_text_tokenised_into_files_trains_like_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, WORDS * 60)
    source, out = tmp_path / "text.txt", tmp_path / "out"
    assert main(["data", "inspect", str(source), "--seq", "16", "--batch", "4", "--tokenizer", "char"]) == 0
    said = capsys.readouterr().out
    windows = (len(WORDS) * 60 - 16) // 16
    assert f"text, 1 file, {len(WORDS.encode()) * 60:,} bytes" in said and f"ids 0 to {len(set(WORDS)) - 1}; " in said
    assert f"{windows:,} windows of 16 tokens: {windows / 4:,.1f} steps of 4 an epoch" in said
    assert main(["data", "tokenize", str(source), "--tokenizer", "bpe", "--vocab", "300", "--out", str(out)]) == 0
    assert f"--data.path {out / 'tokens.bin'} --data.tokenizer {out / 'tokenizer.json'}" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["tokenizer.json", "tokens.bin"]
    words = ["--data.path", str(out / "tokens.bin"), "--data.tokenizer", str(out / "tokenizer.json")]
    written = prepare(load(words, path).config, 1)
    direct = prepare(load(["--data.tokenizer", "bpe", "--data.vocab", "300"], path).config, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(written.data.train.take(0, 9), direct.data.train.take(0, 9), strict=True)
    )
    assert written.held_out(0).tokens_per_byte == direct.held_out(0).tokens_per_byte
    assert main(["data", "inspect", str(out / "tokens.bin"), "--tokenizer", str(out / "tokenizer.json")]) == 0
    assert "flat file of uint16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect"], "takes inspect or tokenize and one path, got inspect"),
        (["show", "x"], "takes inspect or tokenize and one path, got show x"),
        (["tokenize", "text.txt"], "needs --out FOLDER"),
        (["tokenize", "ids.bin", "--out", "o"], "ids.bin is tokens already; give text"),
        (["tokenize", "text.txt", "--out", "full"], "tokens.bin cannot be written: File exists"),
        (["inspect", "text.txt", "--token_dtype", "uint32"], "no source is a flat token file"),
    ],
)
def test_a_command_about_data_that_cannot_work_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(WORDS)
    (tmp_path / "ids.bin").write_bytes(b"ab" * 9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "tokens.bin").write_bytes(b"mine")
    assert main(["data", *words]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "full" / "tokens.bin").read_bytes() == b"mine"
