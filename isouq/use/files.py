"""A file of questions → a file of scores: what `isouq score` does.

Finished rows are appended to `OUTPUT.partial`, one JSON line each, so that a killed run resumes where it stopped; the
output itself appears whole or not at all. A run resumes only with the same texts, options and weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from isouq import models
from isouq.language import encoding, generation, scoring
from isouq.language.examples import each, from_pairs
from isouq.language.scoring import SCORES, Scoring
from isouq.use import tables

COLUMNS = {"n_tokens": "Int64", **dict.fromkeys(SCORES[1:], "Float64"), "straddles": "boolean", "error": "string"}
Record = dict[str, Any]


class Question(NamedTuple):
    """A row's texts, and why it cannot be scored. An empty answer is to be generated."""

    prompt: str
    answer: str
    error: str | None


def score_file(
    source: Path, target: Path, *, load: Callable[[], tuple[Any, Any]], how: Scoring, max_new_tokens: int
) -> list[Record]:
    """Score every row of `source` into `target`; return its records: row from 0, answer where generated, scores, error.

    `load` gives (model, tokenizer) and is called once the files are known to be right. `how` has one aggregation and a
    number of rows as its batch size. `max_new_tokens` is for answers that are missing.

    A row that cannot be scored says why in its `error`. Raises ValueError or OSError for files that cannot be read or
    written as they are, if possible before the model is loaded.
    """
    table = tables.read(source)
    if taken := [name for name in COLUMNS if name in table]:
        raise ValueError(f"{source}: column {taken[0]!r} is there, and a result is written under this name; rename it")
    path = tables.target(target, source)
    answers = table["answer"].tolist() if "answer" in table else [None] * len(table)
    questions = [_question(*cells) for cells in zip(table["prompt"].tolist(), answers, strict=True)]
    with tables.locked(path):
        with open(os.devnull, "wb") as nowhere:
            tables.write(_scored(table, questions, [{}] * len(questions)), path, nowhere)
        partial = path.with_name(path.name + ".partial")
        done = _finish(partial, questions, load, how, max_new_tokens)
        with tables.replacing(path) as out:
            tables.write(_scored(table, questions, done), path, out)
        partial.unlink(missing_ok=True)
    return done


def _question(prompt: Any, answer: Any) -> Question:
    """The texts of two cells. A whole number is its digits; any other value that is no text is an error."""
    texts, errors = [], []
    for name, cell in (("prompt", prompt), ("answer", answer)):
        cell = "" if cell is None or cell is pd.NA else cell
        texts.append(str(cell) if isinstance(cell, str | Decimal) else json.dumps(cell, default=str))
        if isinstance(cell, bool) or not isinstance(cell, str | int | Decimal):
            errors.append(f"{name}: {texts[-1]:.40} given, a text wanted; write it as the text to be scored")
    errors += [] if texts[0] else ["prompt: empty, a text wanted"]
    return Question(texts[0], texts[1], errors[0] if errors else None)


def _scored(table: pd.DataFrame, questions: list[Question], done: list[Record]) -> pd.DataFrame:
    """The table with its answers, given or generated, and the results."""
    answers = [row.get("answer") or question.answer or None for row, question in zip(done, questions, strict=True)]
    results = {name: pd.Series([row.get(name) for row in done], dtype=kind) for name, kind in COLUMNS.items()}
    return table.assign(answer=pd.Series(answers, dtype="string"), **results)


# ---- resuming --------------------------------------------------------------------------------------------------------


def _finish(
    partial: Path, questions: list[Question], load: Callable[[], tuple[Any, Any]], how: Scoring, max_new_tokens: int
) -> list[Record]:
    """Every row's record: those that an interrupted run stored, and the others, scored now."""
    run: Record = {name: metadata.version(name) for name in ("isouq", "torch", "transformers")}
    run["input"] = hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:12]
    run |= {"aggregation": how.aggregations[0], "engine": how.engine}
    if missing := sum(not (question.answer or question.error) for question in questions):
        run["max_new_tokens"] = max_new_tokens
    _stored(partial, run)  # refuses another run's file before the model is loaded
    if not questions:
        return []
    subject = _Subject(*load(), how, max_new_tokens)
    run["model"] = models.weights(subject.model, subject.tokenizer)
    done = _stored(partial, run)
    todo = [row for row in range(len(questions)) if row not in done]
    records = tqdm(subject.records(questions, todo), total=len(todo), unit="row", desc=f"{missing} answers to generate")
    try:
        with tables.replacing(partial) as out:
            out.writelines(json.dumps(line).encode() + b"\n" for line in [{"isouq score": run}, *done.values()])
        with partial.open("ab") as out:
            for record in records:
                out.write(json.dumps(record).encode() + b"\n")
                out.flush()
                done[record["row"]] = record
    except OSError as error:
        raise ValueError(f"{partial}: {error.strerror}; its {len(done)} rows stay, the same command resumes") from error
    finally:
        if not done:
            partial.unlink(missing_ok=True)
    return [done[row] for row in range(len(questions))]


def _stored(partial: Path, run: Record) -> dict[int, Record]:
    """The rows that an interrupted run stored, if it had the same identity; a torn last line is dropped."""
    if not partial.exists():
        return {}
    try:
        header, *rows = (json.loads(line) for line in partial.read_text(encoding="utf-8").split("\n")[:-1])
        stored, done = header["isouq score"], {row["row"]: row for row in rows}
        other = [f"{k} {stored[k]!r} there, {v!r} here" for k, v in run.items() if stored[k] != v]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{partial}: no rest of an interrupted run; move it away or name another --output") from error
    if other and done:
        ways = "finish that one by its own command, delete this file to start afresh, or name another --output"
        raise ValueError(f"{partial}: {len(done)} rows of another run ({', '.join(other)}); {ways}")
    return {} if other else done


# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A model that answers and is scored."""

    model: Any
    tokenizer: Any
    how: Scoring
    max_new_tokens: int

    @functools.cached_property
    def stops(self) -> generation.Stops:
        return generation.stop_token_ids(self.tokenizer, self.model)

    def records(self, questions: list[Question], todo: list[int]) -> Iterator[Record]:
        """The record of every row of `todo`; one that cannot be scored has an `error` in place of scores."""
        size = int(self.how.batch_size)
        for rows in (todo[start : start + size] for start in range(0, len(todo), size)):
            errors = {row: questions[row].error for row in rows if questions[row].error}
            asked = {row: questions[row] for row in rows if row not in errors}
            answered = each(self._given, {row: x for row, x in asked.items() if x.answer}, errors)
            answered |= each(self._generated, {row: x for row, x in asked.items() if not x.answer}, errors)
            scores = each(self._score, {row: pair for row, (pair, _) in answered.items()}, errors)
            for row in rows:
                record = {"row": row, "answer": answered[row][1] if row in answered else None}
                yield record | dict.fromkeys(COLUMNS) | scores.get(row, {}) | {"error": errors.get(row)}

    def _given(self, questions: list[Question]) -> list[tuple[encoding.Pair, None]]:
        return [(encoding.pair(self.tokenizer, x.prompt, x.answer), None) for x in questions]

    def _generated(self, questions: list[Question]) -> list[tuple[encoding.Pair, str]]:
        prompts = [encoding.prompt_ids(self.tokenizer, x.prompt) for x in questions]
        options: dict[str, Any] = {"stops": self.stops, "max_new_tokens": self.max_new_tokens}
        answers = generation.generate(self.model, self.tokenizer, prompts, **options)
        return [
            (encoding.Pair(prompt, list(answer.token_ids), False), answer.text)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _score(self, pairs: list[encoding.Pair]) -> list[Record]:
        if not all(pair.answer for pair in pairs):
            raise ValueError("answer: the model wrote none, its first token ends the text; give one")
        [scores] = scoring.score(self.model, from_pairs(pair[:2] for pair in pairs), self.how).values()
        columns = [getattr(scores, name).tolist() for name in SCORES]
        finite = [[x if math.isfinite(x) else None for x in row] for row in zip(*columns, strict=True)]
        return [
            {**dict(zip(SCORES, row, strict=True)), "straddles": pair.straddles}
            for row, pair in zip(finite, pairs, strict=True)
        ]
