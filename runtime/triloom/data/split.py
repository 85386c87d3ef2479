"""Open sources cut into what is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..errors import ConfigError
from .batches import OTHER_VOCABULARY, Blend, Samples, Stretch, Windows
from .order import keys
from .sources import Source, Sources
from .tokenizers import Bytes, Tokenizer, digest_of


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. held_out: None where nothing is; tokenizer: None for tokens without text."""

    train: Samples
    held_out: Samples | None
    tokenizer: Tokenizer | None
    about: str
    """Names and sizes, for people."""
    digest: str
    """Fingerprint of all tokens and of the tokenizer: equal on ranks that have the same data."""


def cut(
    sources: Sources,
    *,
    seq: int,
    seed: int,
    vocab: int,
    held_out: float,
    weights: Sequence[float] | None = None,
) -> Data:
    """Cut ``held_out`` (a fraction) off the end of every source, unless the sources have a validation file.

    vocab: of the model; the ids of token files must be below it, and below the tokenizer's if one is given.
    weights: of the sources, None to go through all of them together. Raises ConfigError for ids that are not, and
    if a part holds no window.
    """
    vocab = min(vocab, sources.vocab or vocab)
    for source in sources.every:
        _check_ids(source, vocab)
    halves = [_halves(source, held_out, vocab) for source in sources.train]
    fronts, backs = [front for front, _ in halves], [back for _, back in halves if back is not None]
    _check_lengths(fronts, backs, seq, held_out)
    train = _samples(fronts, seq, seed, weights, shuffle=True)
    evaluation: Samples | None = None
    if sources.validation is not None:
        evaluation = _samples([_validation(sources.validation, vocab, seq)], seq, seed, None, shuffle=False)
    elif backs:
        evaluation = _samples(backs, seq, seed, weights, shuffle=False)
    return Data(train, evaluation, sources.tokenizer, _about(sources), _digest(sources))


def _samples(parts: list[Stretch], seq: int, seed: int, weights: Sequence[float] | None, shuffle: bool) -> Samples:
    if weights is None:
        return Windows(tuple(parts), seq, seed, shuffle)
    seeds = [seed if k == 0 else int(keys(seed, k, -1)[0]) for k in range(len(parts))]
    each = tuple(Windows((part,), seq, s, shuffle) for part, s in zip(parts, seeds, strict=True))
    return Blend(each, tuple(weights))


def _stretch(source: Source, vocab: int) -> Stretch:
    return Stretch(source.tokens, source.name, None if source.checked else vocab)


def _halves(source: Source, held_out: float, vocab: int) -> tuple[Stretch, Stretch | None]:
    whole = _stretch(source, vocab)
    total = len(source.tokens)
    at = total - int(total * held_out)
    if held_out == 0:
        return whole, None
    return (
        Stretch(source.tokens.part(0, at), whole.name, whole.limit),
        Stretch(source.tokens.part(at, total), f"the held-out part of {whole.name}", whole.limit),
    )


def _check_lengths(fronts: Sequence[Stretch], backs: Sequence[Stretch], seq: int, held_out: float) -> None:
    for front in fronts:
        if len(front.tokens) < 2 * seq:
            raise ConfigError(
                f"the training part of {front.name} has {len(front.tokens)} tokens, fewer than the {2 * seq} that "
                f"model.seq = {seq} needs; lower model.seq or give more text (data.path)"
            )
    for front, back in zip(fronts, backs, strict=False):  # no back where nothing is held out
        if len(back.tokens) < seq + 1:
            raise ConfigError(
                f"data.held_out = {held_out:g} of {len(front.tokens) + len(back.tokens)} tokens leaves "
                f"{len(back.tokens)} ({front.name}), fewer than the {seq + 1} that one sample of model.seq = {seq} "
                "needs; raise it, or set it to 0 together with train.eval_batches = 0"
            )


def _validation(source: Source, vocab: int, seq: int) -> Stretch:
    if len(source.tokens) < seq + 1:
        raise ConfigError(
            f"data.validation = {source.name!r} has {len(source.tokens)} tokens, fewer than the {seq + 1} that one "
            f"sample of model.seq = {seq} needs"
        )
    return _stretch(source, vocab)


def _check_ids(source: Source, vocab: int) -> None:
    """Refuse ids outside of the vocabulary now, as far as a look at the file can (all of it up to 64 Mi tokens)."""
    if source.checked:
        return
    low, high = source.tokens.bounds()
    if low < 0 or high >= vocab:
        raise ConfigError(
            f"{source.name} has the token id {low if low < 0 else high}, and the vocabulary has {vocab} tokens "
            f"(model.vocab); {OTHER_VOCABULARY}"
        )


def _about(sources: Sources) -> str:
    made, parts = sources.tokenizer, []
    for source in sources.train:
        unit = "bytes" if source.checked and isinstance(made, Bytes) else "tokens"
        parts.append(f"{source.name}, {len(source.tokens):,} {unit}")
    note = "" if made is None or made.file is None else f" ({made.name})"
    return "; ".join(parts) + note


def _digest(sources: Sources) -> str:
    made = "" if sources.tokenizer is None else digest_of(sources.tokenizer)
    parts = [f"{len(source.tokens)}:{source.tokens.digest():016x}" for source in sources.every]
    total = sum(len(source.tokens) for source in sources.every)
    return f"{total} tokens, digest {blake2b('|'.join([*parts, made]).encode(), digest_size=8).hexdigest()}"
