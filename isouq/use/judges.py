"""References in place of labels: whether an answer agrees with one of those that are accepted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd

from isouq.studies import require
from isouq.studies.qa.judge import F1_RIGHT, exact_match, normalise_answer, token_f1
from isouq.use.evaluate import with_scores


def contains(answer: str, accepted: Iterable[str]) -> bool:
    """Return whether an accepted answer stands in the answer, word for word, both normalised as by `exact_match`."""
    words = f" {normalise_answer(answer)} "
    references = [normalise_answer(text) for text in accepted]
    return any(text != "" and f" {text} " in words for text in references)


JUDGES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "exact": exact_match,
    "f1": lambda answer, accepted: token_f1(answer, accepted) >= F1_RIGHT,
    "contains": contains,
}


def judged(table: pd.DataFrame, judge: str, reference: str) -> pd.Series:
    """Return whether each `answer` is right, by one of JUDGES; rows with an `error` have None.

    Texts are normalised as TriviaQA's script does: case, punctuation and articles do not count. "f1" takes an answer
    for right that shares enough words with a reference (F1 of F1_RIGHT).

    reference: a column of texts or of lists of texts, as lists or written as JSON; any of them will do.

    Raises ValueError for an unknown judge or column, and for a row without a reference.
    """
    require.one_of("judge", judge, JUDGES)
    for name in ("answer", reference):
        require.one_of("reference" if name == reference else "table", name, map(str, table))
    scored = with_scores(table)
    if len(lost := np.flatnonzero(scored["answer"].isna())):
        raise ValueError(f"answer: nothing given in row {scored.index[lost[0]] + 1}, a text wanted")
    verdicts = {
        row: JUDGES[judge](str(answer), _accepted(reference, row, cell))
        for row, answer, cell in zip(scored.index, scored["answer"], scored[reference], strict=True)
    }
    return pd.Series([verdicts.get(row) for row in range(len(table))], index=table.index, dtype=object)


def _accepted(name: str, row: int, cell: Any) -> list[str]:
    read: Any = cell
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # else it is a text that begins with a bracket
            read = json.loads(cell)
    texts = list(read) if isinstance(read, list | tuple | np.ndarray) else [read]
    if not texts or not all(isinstance(text, str | Number) and text == text and text != "" for text in texts):
        raise ValueError(f"{name}: {cell!r} given in row {row + 1}, a text or a list of texts wanted")
    return [str(text) for text in texts]
