"""Texts → token ids: where a prompt ends and its answer begins.

Tokens that a tokenizer adds in front of every text (BOS, [CLS]) come before the prompt; those it adds at the end (EOS,
[SEP]) are left out, since the answer follows. A pair is encoded as one text and split where the answer's characters
begin, so its ids are those of the whole text: encoded apart, many tokenizers would add a space before the answer. If
one token has characters of both ("http:" before "//x", or a prompt that ends with a space before "Paris"), the two are
encoded apart, and the pair's `straddles` is True.
"""

import itertools
from typing import Any, NamedTuple

ANCHORS = (":", "\n", ".", "a", "0")  # texts that an answer may follow


class Pair(NamedTuple):
    """The ids of a prompt and of its answer; `straddles`: a token of the whole text has characters of both."""

    prompt: list[int]
    answer: list[int]
    straddles: bool


def pair(tokenizer: Any, prompt: str, answer: str, place: int | None = None) -> Pair:
    """The ids of a prompt, after the opening special tokens, and of the answer that continues it.

    Together they are the ids of `prompt + answer`. If a token `straddles` the border, they are the prompt's own ids, as
    a model reads them to generate, and the answer's own. `place` is the pair's number, for errors.

    Raises TypeError if either is not a string, ValueError if the prompt or the answer has no token.
    """
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str):
            raise TypeError(f"{_named(name, place)} is {text!r}, a text wanted")
    split = _split(tokenizer, prompt, answer)
    content, continuation = split or (_ids(tokenizer, prompt), answer_ids(tokenizer, answer))
    ids = [*_opening(tokenizer), *content]
    if not continuation:
        raise ValueError(f"{_named('answer', place)} is empty, a text of at least one token wanted")
    if not ids:
        raise ValueError(f"{_named('prompt', place)} is empty and the tokenizer has no start token; write a prompt")
    return Pair(ids, continuation, split is None)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt before its answer: the opening special tokens and the text's own, without closing ones."""
    return [*_opening(tokenizer), *_ids(tokenizer, prompt)]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """The ids of an answer after any prompt, without the space that a tokenizer may put before every text."""
    plain = _ids(tokenizer, answer)
    splits = [_split(tokenizer, anchor, answer) for anchor in ANCHORS]
    after = [split[1] for split in splits if split and split[0]]
    return plain if plain in after or not after else after[0]


def _named(kind: str, place: int | None) -> str:
    return f"the {kind}" if place is None else f"{kind}s: number {place}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _split(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]] | None:
    """The ids of the whole text without special tokens, cut where the answer begins; None if a token straddles.

    Offsets alone do not decide, since some tokenizers leave spaces out of them. So either the tokens on both sides must
    touch the border, or the prompt's part must equal the ids of the prompt alone.
    """
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=fast)
    ids, alone, border = list(encoded["input_ids"]), _ids(tokenizer, prompt), len(prompt)
    same = ids[: len(alone)] == alone
    if not fast:  # no offsets; an unknown token at the border may stand for characters of both
        return (alone, ids[len(alone) :]) if same and alone[-1:] != [tokenizer.unk_token_id] else None
    spans = encoded["offset_mapping"]
    begun = sum(start < border for start, _ in spans)
    tight = 0 < begun < len(ids) and spans[begun - 1][1] == border == spans[begun][0]
    n = len(alone) if same else begun
    clean = all(end <= border for _, end in spans[:n]) and all(start >= border for start, _ in spans[n:])
    return (ids[:n], ids[n:]) if clean and (same or tight) else None


def _opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text, found with a text whose own ids occur once in the result."""
    words = (tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer)))
    for probe in itertools.chain("a0", words):
        content, whole = _ids(tokenizer, probe), list(tokenizer(probe)["input_ids"])
        places = [k for k in range(len(whole)) if content and whole[k : k + len(content)] == content]
        if len(places) == 1:
            return whole[: places[0]]
    raise ValueError("tokenizer: no text has the same ids with and without special tokens; pass ids to score_tokens")
