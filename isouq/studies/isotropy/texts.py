"""The texts of the language model's study: answered statements, and proxies at graded distances from them.

Queries are a model's answers to statements of Wikidata. Some of them, drawn at random, also occur among the proxies in
a second wording, the positive control: a covariance made from these has to bend their variance, if it bends any.
"""

from __future__ import annotations

import functools
import itertools
import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isouq.studies import require
from isouq.studies.qa import answers, data, generation
from isouq.studies.qa import study as qa_study
from isouq.studies.qa.data import Question
from isouq.studies.qa.subject import Subject


class Source(NamedTuple):
    """A kind of proxies: its distance from the queries in topic, declared beforehand, and its name on a page."""

    distance: int
    title: str


# Where the rows of F come from: an empirical Fisher each, with the model's own greedy answers in the first three kinds
# and gold ones in the fourth. None of these is the model's training data as such.
PROXIES = {
    "paraphrase": Source(0, "second wording of some queries"),
    "relation": Source(1, "same relations, other entities"),
    "other_relations": Source(2, "other relations"),
    "triviaqa": Source(3, "TriviaQA, gold answers"),
    "prose": Source(4, "ordinary prose"),
    "random": Source(5, "random tokens"),
}
N_SHOTS = 3  # of the queries' prompts; no proxy has any
PROSE_PROMPT, PROSE_ANSWER = 16, 8  # tokens
MAX_NEW_TOKENS = 8
MAX_TOKENS = 64  # of a query or a question among the proxies
BATCH = 16  # prompts a batch of generation
Pair = tuple[list[int], list[int]]  # ids of prompt and answer


@functools.cache
def _wordings() -> dict[str, str]:
    """Every relation's first wording → its second, the longest first."""
    wordings = tomllib.loads((Path(__file__).parent / "relations.toml").read_text(encoding="utf-8"))
    return dict(sorted(wordings.items(), key=lambda item: -len(item[0])))


@functools.cache
def parse(statement: str) -> tuple[str, str]:
    """Return a statement's relation (its wording with {} for the entity) and its entity.

    Raises ValueError for a statement of no relation in relations.toml.
    """
    for wording in _wordings():
        if entity := re.fullmatch(re.escape(wording).replace(r"\{\}", "(.+)"), statement):
            return wording, entity[1]
    raise ValueError(f"statement: {statement!r} given, one that fits a wording in relations.toml wanted")


def second_wording(statement: str) -> str:
    """Return a statement in the second wording of its relation, open at its end as it is. Raises as `parse` does."""
    relation, entity = parse(statement)
    return _wordings()[relation].replace("{}", entity)


def draw_paraphrased(n_queries: int, n: int, seed: int) -> NDArray[np.bool_]:
    """Return which n of n_queries are asked in a second wording too, at random by `seed` alone.

    Raises ValueError for fewer than three, and for more than half of the queries: the others are the comparison.
    """
    if require.count("n", n, 3) > require.count("n_queries", n_queries) // 2:
        raise ValueError(f"n: {n} second wordings given, at most half of the {n_queries} queries wanted")
    return np.random.default_rng([require.seed("seed", seed), 18]).permutation(n_queries) < n


def same_relations(statements: Sequence[str], pool: Sequence[Question], n_each: int = 2) -> list[Question]:
    """Return `n_each` questions of `pool` for every statement, of its relation and never the same twice, in rounds."""
    by_relation: dict[str, list[Question]] = defaultdict(list)
    for question in reversed(pool):
        by_relation[parse(question.question)[0]].append(question)
    relations = [parse(statement)[0] for statement in statements] * n_each
    return [by_relation[relation].pop() for relation in relations if by_relation[relation]]


def other_relations(statements: Sequence[str], pool: Sequence[Question]) -> list[Question]:
    """Return the questions of `pool` whose relation none of the statements has."""
    taken = {parse(statement)[0] for statement in statements}
    return [question for question in pool if parse(question.question)[0] not in taken]


def queries(model: Any, tokenizer: Any, n: int, *, n_paraphrased: int, seed: int = 0) -> pd.DataFrame:
    """n greedy answers to Wikidata statements after N_SHOTS examples, right by exact match.

    Columns: kind, question, relation, text (both together), wrong, prompt_ids, answer_ids, and paraphrased by
    `draw_paraphrased`. Empty answers and texts over MAX_TOKENS are left out.
    """
    paraphrased = draw_paraphrased(n, n_paraphrased, seed)
    content, asked, shots = _statements(seed)
    rows = _answered(model, tokenizer, content, asked[: 3 * n], shots, n)
    relations = [parse(row["question"])[0] for row in rows]
    return pd.DataFrame(rows).assign(kind="query", relation=relations, paraphrased=paraphrased)


def proxies(model: Any, tokenizer: Any, queries: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Texts from each of PROXIES, as many of each as queries are paraphrased: kind, text, prompt_ids, answer_ids.

    The first three kinds are statements in their second wording with the model's own answers, and differ in nothing
    but the statements. None but the first has a question in common with the queries.

    Raises ValueError when a source has too few.
    """
    content, asked, shots = _statements(seed)
    given = set(queries["question"])
    pool = [question for question in asked if question.question not in given]
    n = len(paraphrased := queries[queries["paraphrased"]])
    answer = functools.partial(_answered, model, tokenizer, content, shots=shots, n=n)
    pairs = {
        "paraphrase": _reworded(tokenizer, paraphrased),
        "relation": _reworded(tokenizer, answer(same_relations(list(paraphrased["question"]), pool))),
        "other_relations": _reworded(tokenizer, answer(other_relations(list(given), pool)[: 3 * n])),
        "triviaqa": _trivia(tokenizer, n, seed),
        "prose": _prose(tokenizer, n),
        "random": _random(tokenizer, n, seed),
    }
    for kind, of_kind in pairs.items():
        if len(of_kind) < n:
            raise ValueError(
                f"n: {n} texts of kind {kind} wanted, there are {len(of_kind)} of at most {MAX_TOKENS} tokens"
            )
    rows = [(kind, tokenizer.decode([*p, *a]), p, a) for kind, of_kind in pairs.items() for p, a in of_kind]
    return pd.DataFrame(rows, columns=["kind", "text", "prompt_ids", "answer_ids"])


def _statements(seed: int) -> tuple[data.DataSet, list[Question], list[Question]]:
    """Return the data set, all its statements in an order drawn by `seed`, and N_SHOTS examples.

    Eight of the set's statements end with "[MASK]", a slip of its makers, and are left out.
    """
    content = qa_study.load_questions("wikidata")
    kept = tuple(question for question in content.questions if not question.question.endswith("[MASK]"))
    content = replace(content, questions=kept)
    return content, *data.sample(content, len(kept) - N_SHOTS, n_shots=N_SHOTS, seed=seed)


def _answered(
    model: Any, tokenizer: Any, content: data.DataSet, asked: list[Question], shots: list[Question], n: int
) -> list[dict[str, Any]]:
    """Return the model's first n answers to the questions asked: question, text, wrong, prompt_ids, answer_ids."""
    prompts = generation.encode_prompts(tokenizer, [content.prompt(question, shots) for question in asked])
    subject = Subject(model, tokenizer, content, asked, prompts)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(asked), BATCH):
        places = range(start, min(start + BATCH, len(asked)))
        for place, answer in zip(places, answers.answer(subject, places, MAX_NEW_TOKENS), strict=True):
            ids, question = list(answer["token_ids"]), asked[place].question
            if answer["text"] and len(prompts[place]) + len(ids) <= MAX_TOKENS:
                row = {"question": question, "text": f"{question} {answer['text']}", "prompt_ids": prompts[place]}
                rows.append({**row, "answer_ids": ids, "wrong": not answers.verdict(subject, place, answer)["right"]})
        if len(rows) >= n:
            return rows[:n]
    raise ValueError(f"n: {n} answered statements wanted, only {len(rows)} of at most {MAX_TOKENS} tokens found")


def _reworded(tokenizer: Any, answered: pd.DataFrame | list[dict[str, Any]]) -> list[Pair]:
    """Return answered statements in their second wording, each with its answer, without examples."""
    table = pd.DataFrame(answered)
    prompts = generation.encode_prompts(tokenizer, [second_wording(statement) for statement in table["question"]])
    return list(zip(prompts, table["answer_ids"], strict=True))


def _trivia(tokenizer: Any, n: int, seed: int) -> list[Pair]:
    """Return n questions of TriviaQA, if it has as many short ones, with their first accepted answers."""
    content = qa_study.load_questions("triviaqa")
    asked, _ = data.sample(content, len(content.questions), n_shots=0, seed=seed)
    prompts = (generation.encode_prompts(tokenizer, [content.prompt(question)])[0] for question in asked)
    golds = (generation.encode_answer(tokenizer, question.answers[0]) for question in asked)
    pairs = zip(prompts, golds, strict=True)
    return list(itertools.islice((pair for pair in pairs if sum(map(len, pair)) <= MAX_TOKENS), n))


def _prose(tokenizer: Any, n: int) -> list[Pair]:
    text = tomllib.loads((Path(__file__).parent / "prose.toml").read_text(encoding="utf-8"))["text"]
    ids = tokenizer(text.replace("\n\n", " ").strip(), add_special_tokens=False)["input_ids"]
    width = PROSE_PROMPT + PROSE_ANSWER
    pieces = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    return [(piece[:PROSE_PROMPT], piece[PROSE_PROMPT:]) for piece in pieces[:n]]


def _random(tokenizer: Any, n: int, seed: int) -> list[Pair]:
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    drawn = np.random.default_rng([seed, 3]).choice(ordinary, (n, PROSE_PROMPT + PROSE_ANSWER)).tolist()
    return [(row[:PROSE_PROMPT], row[PROSE_PROMPT:]) for row in drawn]
