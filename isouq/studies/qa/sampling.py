"""What a model's own samples say about its answers: the stages sample, meaning and p_true, and their examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from isouq.studies.qa import generation, judge, rivals
from isouq.studies.qa.data import Question
from isouq.studies.qa.subject import Record, Subject

N_IDEAS = 5  # of a question's samples are shown to P(True)


def uniform(item_id: str, n_samples: int, n_tokens: int, seed: int) -> NDArray[np.float64]:
    """Return the numbers that a question's samples are drawn by, (sample, token), uniform on [0, 1).

    They hang on the question and the sample alone, so a study may be cut into batches or shards in any way.
    """
    number = int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8])
    return np.stack([np.random.default_rng([seed, number, i]).random(n_tokens) for i in range(n_samples)])


def sample(
    subject: Subject, asked: Sequence[tuple[Question, Sequence[int]]], *, n_samples: int, max_new_tokens: int, seed: int
) -> list[Record]:
    """Draw answers to some questions, given with their prompts: ids, texts, log p and number of tokens of each."""
    numbers = np.stack([uniform(question.item_id, n_samples, max_new_tokens, seed) for question, _ in asked])
    prompts = [prompt for _, prompt in asked]
    found = generation.draw(subject.model, subject.tokenizer, prompts, numbers, stops=subject.stops)
    return [{name: [getattr(one, name) for one in samples] for name in generation.Sample._fields} for samples in found]


def meaning(subject: Subject, row: int, texts: Sequence[str]) -> Record:
    """Return the number of each sample's meaning, by embeddings and, where the study has an nli model, entailment."""
    distinct = list(dict.fromkeys(texts))
    directions = subject.encode([text or "(no answer)" for text in distinct])

    def numbered(same: Callable[[int, int], bool]) -> list[int]:
        number = dict(zip(distinct, rivals.meanings(distinct, same), strict=True))
        return [number[text] for text in texts]

    groups = {"embedding": numbered(rivals.by_embedding(directions))}
    if subject.nli is not None:
        groups["entailment"] = numbered(subject.nli.of(subject.questions[row].question, distinct))
    return groups


def solved_examples(shots: Sequence[tuple[Question, Sequence[str]]]) -> str:
    """Write the solved examples of P(True), of questions with the texts of their samples.

    Every second possible answer is wrong: one of the model's own, or another question's answer where it has none.
    """
    parts = []
    for i, (question, samples) in enumerate(shots):
        wrong = [text for text in samples if text and not judge.exact_match(text, question.answers)]
        possible = [*wrong, shots[i - 1][0].answers[0]][0] if i % 2 else question.answers[0]
        parts.append(rivals.p_true_prompt(question.question, samples[:N_IDEAS], possible, rivals.LABELS[i % 2]))
    return "".join(f"{part}\n\n" for part in parts)


def p_true(subject: Subject, solved: str, asked: Sequence[tuple[Question, Sequence[str], str]]) -> list[Record]:
    """Return log p of the labels true and false for answers, each given with its question and its samples' texts.

    Tokens that both labels begin with are part of the prompt. Raises ValueError for labels of the same tokens.
    """
    labels = [generation.encode_answer(subject.tokenizer, label.strip()) for label in rivals.LABELS]
    n_common = next((i for i, (a, b) in enumerate(zip(*labels, strict=False)) if a != b), None)
    if n_common is None:
        raise ValueError(f"tokenizer: the same tokens for{' and'.join(rivals.LABELS)}, which ask for P(True)")
    texts = [solved + rivals.p_true_prompt(q.question, ideas[:N_IDEAS], answer) for q, ideas, answer in asked]
    prompts = [[*ids, *labels[0][:n_common]] for ids in generation.encode_prompts(subject.tokenizer, texts)]
    log_probs = generation.next_log_probs(subject.model, prompts, [label[n_common] for label in labels])
    return [{"log_probs": row} for row in log_probs.tolist()]
