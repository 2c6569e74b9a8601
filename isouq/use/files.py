"""A file of questions → a file of scores: what `isouq score` does.

The input is read to check it, to score it, and to write its rows beside their scores. Each time it goes by frames, so
that memory does not grow with the number of rows. Finished rows are appended to `OUTPUT.partial`, one JSON
line each, so that a killed run resumes where it stopped; the output itself appears whole or not at all. A run resumes
only with the same texts, options and weights.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from isouq import models
from isouq.language import encoding, generation, scoring
from isouq.language.chat import Prompting
from isouq.language.examples import Example, each, from_pairs
from isouq.language.forward import pass_cost
from isouq.language.scoring import Scoring
from isouq.use import tables

if TYPE_CHECKING:
    from isouq.use.calibrate import Calibrator

WINDOW = 64  # rows that are taken together where --memory decides how many make a pass
PROBE = 64  # tokens at the end of a row too large for a card, from which its bytes are told
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked of a run. `load` gives (model, tokenizer) and is called once the files are known to be right.

    `chat` and `system` as in `score_texts`; `max_new_tokens` is for answers that are missing, which None makes errors.
    A `calibrator` adds p_wrong.
    """

    model: str
    load: Callable[[], tuple[Any, Any]]
    how: Scoring
    chat: bool = False
    system: str | None = None
    max_new_tokens: int | None = 32
    calibrator: Calibrator | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a result adds to the input's, and their types."""
        scores = [*scoring.columns(self.how.aggregations), *(["p_wrong"] if self.calibrator else [])]
        return dict.fromkeys(scores, "Float64") | {"n_tokens": "Int64", "straddles": "boolean", "error": "string"}


class Question(NamedTuple):
    """A row's texts, and why it cannot be scored. An empty answer is to be generated."""

    prompt: str
    answer: str
    error: str | None


class Summary(NamedTuple):
    """How many rows were written, had their answers generated, straddle, and have no scores."""

    rows: int
    generated: int
    straddles: int
    errors: int


def score_file(source: tables.Source, target: Path, run: Run) -> Summary:
    """Score every row of `source` into `target`; a row that cannot be scored says why in its `error`, and on stderr.

    Raises ValueError or OSError for files that cannot be read or written as they are, if possible before the model is
    loaded.
    """
    path = tables.target(target, *source.paths)
    with tables.locked(path):
        stamps, sink, partial = source.stamps(), tables.Sink(path), path.with_name(path.name + ".partial")
        asked = _survey(source, sink, run)
        _finish(partial, source, asked, run)
        if source.stamps() != stamps:
            way_out = "put back the file as it was and resume by the same command, or delete this one to start afresh"
            raise ValueError(f"{source.paths[0]}: changed while it was scored; its scores are in {partial}; {way_out}")
        tally: Counter[str] = Counter()
        sink.about = {"model": run.model, **next(_stored(partial), {}).get("isouq score", {})}
        with tables.replacing(path) as out:
            sink.write(_results(source, partial, run, tally), out)
        partial.unlink(missing_ok=True)
    return Summary(*(tally[name] for name in Summary._fields))


class _Asked(NamedTuple):
    """What a first reading tells: the number of rows, that of answers to generate, a digest of all texts."""

    rows: int
    missing: int
    digest: str


def _survey(source: tables.Source, sink: tables.Sink, run: Run) -> _Asked:
    """Read all rows before any is scored. Raises ValueError for what cannot be read, or not be written by `sink`."""
    digest, n_rows, n_missing = hashlib.sha256(), 0, 0
    for frame in source.frames():
        if taken := [name for name in run.columns if name in frame]:
            given = f"{source.paths[0]}: column {taken[0]!r} is there"
            raise ValueError(f"{given}, and a result is written under this name; rename it")
        prompts, answers = _cells(frame)
        digest.update(json.dumps([prompts, answers], default=lambda cell: [str(cell)]).encode())
        n_rows += len(frame)
        n_missing += answers.count(None) + answers.count("")
        sink.check(_blank(frame, run))
    if run.calibrator:  # which refuses a table without its columns
        run.calibrator.apply(_blank(frame.iloc[:0], run))
    if sink.schema is not None:  # do the cells of all frames fit the types that these have in common?
        with open(os.devnull, "wb") as nowhere:
            sink.write((_blank(frame, run) for frame in source.frames()), nowhere)
    return _Asked(n_rows, n_missing, digest.hexdigest()[:12])


def _cells(frame: pd.DataFrame) -> tuple[list[Any], list[Any]]:
    """The prompts and answers of a frame, None where it has no such column."""
    prompts, answers = (tables.cells(frame[x]) if x in frame else [None] * len(frame) for x in ("prompt", "answer"))
    return prompts, answers


def _questions(frame: pd.DataFrame) -> Iterator[Question]:
    return itertools.starmap(_question, zip(*_cells(frame), strict=True))


def _question(prompt: Any, answer: Any) -> Question:
    """The texts of two cells. A whole number is its digits; any other value that is no text is an error."""
    texts, errors = [], []
    for name, cell in (("prompt", prompt), ("answer", answer)):
        cell = "" if cell is None else cell
        texts.append(str(cell) if isinstance(cell, str | Decimal) else json.dumps(cell, default=str))
        if isinstance(cell, bool) or not isinstance(cell, str | int | Decimal):
            errors.append(f"{name}: {texts[-1]:.40} given, a text wanted; write it as the text to be scored")
    errors += [] if texts[0] else ["prompt: empty, a text wanted"]
    return Question(texts[0], texts[1], errors[0] if errors else None)


def _blank(frame: pd.DataFrame, run: Run) -> pd.DataFrame:
    """A frame with the columns and types of its result."""
    kinds = {"answer": "string", **run.columns}
    return frame.assign(**{name: pd.Series(pd.NA, index=frame.index, dtype=kind) for name, kind in kinds.items()})


def _results(source: tables.Source, partial: Path, run: Run, tally: Counter[str]) -> Iterator[pd.DataFrame]:
    """The frames with their answers, given or generated, and the results, counted in `tally`; errors go to stderr."""
    kinds, records = run.columns, itertools.islice(_stored(partial), 1, None)
    for frame in source.frames():
        done = list(itertools.islice(records, len(frame)))
        answers = [row["answer"] or x.answer or None for row, x in zip(done, _questions(frame), strict=True)]
        results = {name: pd.Series([row.get(name) for row in done], dtype=kind) for name, kind in kinds.items()}
        for row in done:
            tally.update(rows=1, generated=row["answer"] is not None, straddles=row["straddles"] is True)
            if row["error"]:
                tally["errors"] += 1
                _say(f"row {row['row'] + 1}: {row['error']}")
        scored = frame.assign(answer=pd.Series(answers, dtype="string"), **results)
        if run.calibrator:
            complete = scored[[*scoring.columns(run.how.aggregations)]].notna().all(axis=1)
            scored.loc[complete, "p_wrong"] = run.calibrator.apply(scored[complete])
        yield scored


def _say(line: str) -> None:
    tqdm.write(f"isouq: {line}", file=sys.stderr)


# ---- resuming --------------------------------------------------------------------------------------------------------


def _finish(partial: Path, source: tables.Source, asked: _Asked, run: Run) -> None:
    """Score the rows that `partial` lacks and append their records to it."""
    how = run.how
    identity: Record = {name: metadata.version(name) for name in ("isouq", "torch", "transformers")}
    identity |= {"input": asked.digest, "aggregation": ", ".join(how.aggregations), "engine": how.engine}
    identity |= {"chat": run.chat, "system": run.system}
    if asked.missing:
        identity["max_new_tokens"] = run.max_new_tokens
    _resume(partial, identity)  # refuses another run's file before the model is loaded
    if not asked.rows:
        return
    model, tokenizer = run.load()
    subject = _Subject(model, Prompting(tokenizer, run.chat, run.system), run)
    devices = sorted({p.device.type for p in model.parameters()})  # accelerate leaves on "meta" what it keeps elsewhere
    placed = {"dtype": str(model.dtype).removeprefix("torch."), "device": " and ".join(devices)}
    identity |= {"weights": models.weights(model, tokenizer), **placed}
    if run.calibrator:
        run.calibrator.check({"model": run.model, **identity})
    n_done = _resume(partial, identity)
    commit = getattr(model.config, "_commit_hash", None) or f"none (weights {identity['weights']})"
    passes = f"sequences a pass: {f'as fit {how.memory:.3g} bytes' if how.memory else how.batch_size}"
    _say(f"{run.model}, revision {commit}, {', '.join(placed.values())}, engine {how.engine}, {passes}")
    bar: Record = {"total": asked.rows, "initial": n_done, "unit": "row", "disable": None}  # at a terminal only
    bar["desc"] = f"{asked.missing} answers to generate"
    try:
        if not n_done:
            with tables.replacing(partial) as out:
                out.write(json.dumps({"isouq score": identity}).encode() + b"\n")
        with partial.open("ab") as out:
            questions = itertools.chain.from_iterable(map(_questions, source.frames()))
            rest = itertools.islice(questions, n_done, None)
            for record in tqdm(subject.records(rest, n_done), **bar):
                out.write(json.dumps(record).encode() + b"\n")
                out.flush()
                n_done += 1
    except OSError as error:
        raise ValueError(f"{partial}: {error.strerror}; its {n_done} rows stay, the same command resumes") from error
    finally:
        if not n_done:
            partial.unlink(missing_ok=True)


def _resume(partial: Path, identity: Record) -> int:
    """How many rows an interrupted run of the same identity stored; a torn last line is cut off."""
    if not partial.exists():
        return 0
    n_done = size = 0
    try:
        with partial.open("rb") as file:
            lines = (line for line in file if line.endswith(b"\n"))
            header = next(lines, b"")
            stored, size = json.loads(header)["isouq score"], len(header)
            for n_done, line in enumerate(lines, 1):
                size += len(line)
                if (row := json.loads(line))["row"] != n_done - 1 or not {"answer", "straddles", "error"} <= row.keys():
                    raise ValueError("a row is missing")
        other = [f"{k} {stored[k]!r} there, {v!r} here" for k, v in identity.items() if stored[k] != v]
    except (ValueError, TypeError, LookupError, IsADirectoryError) as error:
        raise ValueError(f"{partial}: no rest of an interrupted run; move it away or name another --output") from error
    if other and n_done:
        ways = "finish that one by its own command, delete this file to start afresh, or name another --output"
        raise ValueError(f"{partial}: {n_done} rows of another run ({', '.join(other)}); {ways}")
    os.truncate(partial, size)
    return n_done


def _stored(partial: Path) -> Iterator[Record]:
    """What a run is and, after that, the records of its rows; nothing for a table of no rows."""
    if partial.exists():
        with partial.open("rb") as lines:
            yield from map(json.loads, lines)


# ---- the rows --------------------------------------------------------------------------------------------------------


class _Subject:
    """A model that answers and is scored."""

    def __init__(self, model: Any, ask: Prompting, run: Run) -> None:
        self.model, self.ask, self.run = model, ask, run
        self.size = WINDOW if run.how.batch_size == "auto" else int(run.how.batch_size)  # rows together, at most

    @functools.cached_property
    def stops(self) -> generation.Stops:
        return generation.stop_token_ids(self.ask.tokenizer, self.model)

    def records(self, questions: Iterator[Question], first: int) -> Iterator[Record]:
        """The record of every row, from number `first`; one that cannot be scored has an `error` in place of scores."""
        rows, window, empty = enumerate(questions, first), self.size, self.run.columns
        while taken := dict(itertools.islice(rows, window)):
            errors = {row: question.error for row, question in taken.items() if question.error}
            if self.run.max_new_tokens is None:
                none = "answer: empty, a text of at least one token wanted"
                errors = {row: none for row, question in taken.items() if not question.answer} | errors
            asked = {row: question for row, question in taken.items() if row not in errors}
            answered = each(self._given, {row: x for row, x in asked.items() if x.answer}, errors)
            missing = {row: x for row, x in asked.items() if not x.answer}
            answered |= each(functools.partial(self._in_passes, self._generated), missing, errors)
            pairs = {row: pair for row, (pair, _) in answered.items()}
            scores = each(functools.partial(self._in_passes, self._score), pairs, errors)
            for row in taken:
                record = {"row": row, "answer": answered[row][1] if row in answered else None}
                yield record | dict.fromkeys(empty) | scores.get(row, {}) | {"error": errors.get(row)}

    def _in_passes(self, work: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
        """`work` on as many items at a time as the card's memory holds."""
        results: list[Any] = []
        before = self.size
        while len(results) < len(items):
            part = items[len(results) :][: self.size]
            try:
                results += work(part)
            except torch.OutOfMemoryError:
                self.size = len(part) // 2 or before
                if len(part) == 1:  # too large by itself, which says nothing of the others
                    raise
                _say(f"out of memory with {len(part)} sequences a pass; going on with {self.size}")
        return results

    def _given(self, questions: list[Question]) -> list[tuple[encoding.Pair, None]]:
        return [(self.ask.pair(x.prompt, x.answer), None) for x in questions]

    def _generated(self, questions: list[Question]) -> list[tuple[encoding.Pair, str]]:
        prompts = [self.ask.prompt_ids(x.prompt) for x in questions]
        options: dict[str, Any] = {"stops": self.stops, "max_new_tokens": self.run.max_new_tokens}
        answers = generation.generate(self.model, self.ask.tokenizer, prompts, **options)
        return [
            (encoding.Pair(prompt, list(answer.token_ids), False), answer.text)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _score(self, pairs: list[encoding.Pair]) -> list[Record]:
        if not all(pair.answer for pair in pairs):
            raise ValueError("answer: the model wrote none, its first token ends the text; give one")
        examples = from_pairs(pair[:2] for pair in pairs)
        try:
            estimates = scoring.score(self.model, examples, self.run.how)
        except torch.OutOfMemoryError:
            if len(examples) > 1:
                raise
            estimates = {}
        if not estimates:  # what the pass held is given back by now
            raise ValueError(f"memory: {self._need(examples[0])}, more than the card has left; shorten the row")
        scores = scoring.table(estimates)
        values = zip(*map(Tensor.tolist, scores.values()), strict=True)
        finite = [[x if math.isfinite(x) else None for x in row] for row in values]
        return [
            {**dict(zip(scores, row, strict=True)), "straddles": pair.straddles}
            for row, pair in zip(finite, pairs, strict=True)
        ]

    def _need(self, example: Example) -> str:
        """The bytes that an example takes, told from its last tokens, as the whole of it does not fit."""
        end = Example(example.ids[-PROBE:], example.answer[-PROBE:])
        need = pass_cost(self.model, [end], self.run.how.parameters)([example])
        return f"{len(example)} tokens take about {need:.3g} bytes above the model's weights"
