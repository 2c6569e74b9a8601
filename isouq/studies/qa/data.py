"""Questions with their accepted answers, the draw of those to ask, and the prompts that ask them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.io.common import get_handle

from isouq.studies.results import key_of

SHOT_CHARACTERS = 80  # question and answer together


@dataclass(frozen=True)
class Question:
    """One question; `answers` are accepted, the canonical one first, `false_answers` known to be wrong."""

    item_id: str
    question: str
    answers: tuple[str, ...]
    false_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """All questions of a set, and its way of asking: `template` is filled with a question and an answer."""

    name: str
    questions: tuple[Question, ...]
    template: str
    prefix: str = ""  # a set with an official prefix is asked with it, not with few-shot examples
    sentences: bool = False  # whether answers are sentences, which may have twice as many tokens

    def prompt(self, question: Question, shots: Sequence[Question] = ()) -> str:
        """Return prefix, answered `shots` and the open `question`; an answer follows with a leading space."""
        solved = [self.template.format(question=shot.question, answer=f" {shot.answers[0]}") for shot in shots]
        return "".join([self.prefix, *solved, self.template.format(question=question.question, answer="").rstrip()])


def load(name: str, path: Path) -> DataSet:
    """Return the data set `name` read from its asset at `path`: triviaqa, wikidata or truthfulqa."""
    return {"triviaqa": _triviaqa, "wikidata": _wikidata, "truthfulqa": _truthfulqa}[name](path)


def is_file(name: str) -> bool:
    """Return whether a data set's name is that of a file of questions, by its ending."""
    return Path(name).suffix in READERS


def key_part(name: str) -> str:
    """Return a data set's name as a part of a result's key; of a file that is its stem."""
    return key_of(Path(name).stem) if is_file(name) else name


def read_file(name: str) -> DataSet:
    """Return the questions of a CSV, JSON Lines or Parquet file, on this machine or on the Hub (`hf://datasets/…`).

    Columns: question; answer, a text or, except in CSV, a list of accepted ones; optionally false_answers, a list of
    known wrong ones, which makes the contrast of embeddings the judge; optionally id.

    Raises ValueError for a file that cannot be read, a column, row or text that is missing, a question asked twice, and
    an answer that is both right and wrong.
    """
    try:
        table = READERS[Path(name).suffix](name)
    except Exception as error:  # the file's own, or of whatever client its address needs
        raise ValueError(f"{name}: cannot be read: {' '.join(str(error).split())}") from error
    for column in ("question", "answer"):
        if column not in table:
            given = ", ".join(map(str, table)) or "none"
            raise ValueError(f"{name}: columns {given} given, {column!r} wanted among them")
    if table.empty:
        raise ValueError(f"{name}: no row given, at least one question wanted")
    questions = [_row(name, number, row) for number, row in enumerate(table.to_dict("records"), 1)]
    ids = [question.item_id for question in questions]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(f"{name}: two rows of one question or id ({twice[0]}); each only once wanted")
    return DataSet(name, tuple(questions), "Q: {question}\nA:{answer}\n\n")


def _row(name: str, number: int, row: dict[Any, Any]) -> Question:
    texts = {}
    for column in ("question", "answer", "false_answers"):
        cell = row.get(column)
        several = list(cell) if isinstance(cell, list | tuple | np.ndarray) else [] if cell is None else [cell]
        if not all(isinstance(text, str) and text.strip() for text in several):
            raise ValueError(f"{name}: row {number}: {column} {cell!r} given, a text wanted")
        texts[column] = tuple(text.strip() for text in several)
    if len(texts["question"]) != 1 or not texts["answer"]:
        raise ValueError(f"{name}: row {number}: one question and at least one answer wanted")
    if both := {*texts["answer"]} & {*texts["false_answers"]}:
        raise ValueError(f"{name}: row {number}: {min(both)!r} given as right and as wrong; one of them wanted")
    identifier = str(row["id"]) if "id" in row else _identify(texts["question"][0])
    if identifier in ("", "nan", "None"):
        raise ValueError(f"{name}: row {number}: no id given; wanted in every row, or no column of that name")
    return Question(identifier, texts["question"][0], texts["answer"], texts["false_answers"])


def _csv(name: str) -> pd.DataFrame:
    """All cells as texts. Where rows are longer than the head, pandas takes first cells for names of rows."""
    read: Any = functools.partial(pd.read_csv, name, dtype=str, keep_default_na=False)
    table, head = read(), read(header=None, nrows=1)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"rows have more cells than its {len(table.columns)} columns; quote texts that have commas")
    unique((cell, None) for cell in head.iloc[0])
    return table


def _json_lines(name: str) -> pd.DataFrame:
    with get_handle(name, "r", encoding="utf-8") as file:
        return pd.DataFrame([json.loads(line, object_pairs_hook=unique) for line in file.handle if line.strip()])


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of pairs. Raises ValueError for a key, such as the name of a column, that is there twice."""
    pairs = list(pairs)
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


READERS: dict[str, Callable[[str], pd.DataFrame]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".parquet": pd.read_parquet,
}


def sample(data_set: DataSet, n_questions: int, *, n_shots: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return the questions to ask and the few-shot examples, drawn by `seed` without replacement.

    The draw is one shuffle of the whole set: examples are the last in it that are at most SHOT_CHARACTERS
    long (each costs its tokens in every prompt), and questions come from the front of what remains. So the
    first 60 of 100 questions are the 60 of a smaller run, and no example is ever asked.

    Raises ValueError when the set is too small for both.
    """
    order = np.random.default_rng(seed).permutation(len(data_set.questions))
    shuffled = [data_set.questions[i] for i in order]
    short = [q for q in reversed(shuffled) if len(q.question) + len(q.answers[0]) <= SHOT_CHARACTERS]
    shots = short[:n_shots]
    rest = [question for question in shuffled if question not in shots]
    if len(shots) < n_shots or not 0 < n_questions <= len(rest):
        has = f"{len(shuffled)} questions, {len(short)} of them short, {n_shots} serve as examples"
        given = f"n_questions must be between 1 and {len(shuffled) - n_shots}, got {n_questions}"
        raise ValueError(f"{given}: {data_set.name} has {has}")
    return rest[:n_questions], shots


def _triviaqa(path: Path) -> DataSet:
    """Read TriviaQA (rc.wikipedia.nocontext, validation) from its arrow stream; the value comes first."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all().select(["question_id", "question", "answer"])
    questions = []
    for row in table.to_pylist():
        answers = dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])
        questions.append(Question(row["question_id"], row["question"].strip(), tuple(answers)))
    return DataSet("triviaqa", tuple(questions), "Q: {question}\nA:{answer}\n\n")


def _wikidata(path: Path) -> DataSet:
    """Read Wikidata recall; a statement that occurs twice becomes one question with both targets accepted."""
    questions: dict[str, Question] = {}
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        target = example["target"]
        targets = [target] if isinstance(target, str) else target
        text = example["input"].strip()
        known = questions.get(text) or Question(_identify(text), text, ())
        questions[text] = replace(known, answers=tuple(dict.fromkeys([*known.answers, *targets])))
    # A statement to be completed, not a question: the set's own form, one statement a line.
    return DataSet("wikidata", tuple(questions.values()), "{question}{answer}\n")


def _truthfulqa(path: Path) -> DataSet:
    """Read TruthfulQA with its official prompt prefix; the best answer comes first among the true ones."""
    content = json.loads(path.read_text(encoding="utf-8"))
    questions = []
    for example in content["examples"]:
        true = dict.fromkeys([example["Best answer"], *example["True answers"]])
        text = example["Question"].strip()
        questions.append(Question(_identify(text), text, tuple(true), tuple(dict.fromkeys(example["False answers"]))))
    return DataSet("truthfulqa", tuple(questions), "Q: {question}\nA:{answer}\n\n", content["prefix"], True)


def _identify(text: str) -> str:
    """Return an id derived from the question's text, which survives any reordering of the set."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
