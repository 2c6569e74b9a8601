"""A model's answers to a study's questions, and whether they are right: the stages answer, verdict and choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from isouq.gradients import Engine
from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.studies.qa import generation, judge
from isouq.studies.qa.data import Question
from isouq.studies.qa.subject import Record, Subject


def answer(subject: Subject, rows: Sequence[int], max_new_tokens: int) -> list[Record]:
    """Answer some questions, in the order of `rows`.

    The answer is the model's greedy completion or, in a choice, the reference answer of the highest log p.
    """
    questions, prompts = [subject.questions[row] for row in rows], [subject.prompts[row] for row in rows]
    if subject.choose:
        ids = [subject.reference_ids(question) for question in questions]
        log_probs = generation.candidate_log_probs(subject.model, prompts, ids)
        return [_chosen(*row) for row in zip(questions, ids, (s.tolist() for s in log_probs), strict=True)]
    answers = generation.generate(
        subject.model, subject.tokenizer, prompts, stops=subject.stops, max_new_tokens=max_new_tokens
    )
    return [asdict(answer) for answer in answers]


def _chosen(question: Question, ids: Sequence[Sequence[int]], log_probs: Sequence[float]) -> Record:
    """Return the choice among references by log p (a sum over tokens), and each one's length and log p."""
    best = int(np.argmax(log_probs))
    text = [*question.answers, *question.false_answers][best]
    scored = [[len(tokens), s] for tokens, s in zip(ids, log_probs, strict=True)]
    return {"token_ids": list(ids[best]), "text": text, "ended_by": "given", "candidates": scored}


def verdict(subject: Subject, row: int, answer: Record) -> Record:
    """Judge an answer: `right` is the verdict that the study goes by, and what other judges say stands beside it.

    A choice is right when the reference is a true one. A free answer is right by exact match, or by the contrast of
    embeddings where a question has false references; the study's `judge`, if any, has its own, by entailment.
    """
    question, text = subject.questions[row], answer["text"]
    if subject.choose:
        n_true, scores = len(question.answers), np.array(answer["candidates"])
        by_sum, by_mean = (bool(s.argmax() < n_true) for s in (scores[:, 1], scores[:, 1] / scores[:, 0]))
        return {"right": by_sum, "right_by_mean": by_mean, "right_by_chance": n_true / len(scores)}
    if not question.false_answers:
        f1 = judge.token_f1(text, question.answers)
        right = judge.exact_match(text, question.answers)
        return {"right": right, "right_by_f1": f1 >= judge.F1_RIGHT, "f1": f1}
    references = [*question.answers, *question.false_answers]
    directions = subject.encode([text, *references])
    similar = {"embedding": (directions[1:] @ directions[0]).tolist()}
    similar["rouge"] = [judge.rouge_l(text, other) for other in references]
    if subject.judge is not None:
        similar["entailment"] = subject.judge.shares(question.question, text, references)
    n_true = len(question.answers)
    found = {name: judge.contrast(scores, n_true) if text else -1.0 for name, scores in similar.items()}
    return {
        **{f"right_by_{name}".removesuffix("_by_embedding"): contrast > 0 for name, contrast in found.items()},
        **{f"{name}_contrast": contrast for name, contrast in found.items()},
    }


def choice(subject: Subject, row: int, engine: Engine) -> Record:
    """Return the uncertainty of every reference under p_c = softmax over the references' S, on the bare prompt.

    Here p(y|x) is the probability of one class among several, as in the paper's formula. With S_c = log p of reference
    c, K the Gram matrix of ∇S and v = e_c − p: ∇p_c = p_c Σ_j v_j ∇S_j, so log U_E = 2 log p_c + log vᵀKv. K has
    the digits of the model's dtype, so vᵀKv is set to at least that share (float32: 1e-7) of its terms' sizes.
    """
    question = subject.questions[row]
    ids = subject.reference_ids(question)
    examples = from_pairs((subject.bare_prompt(question), answer) for answer in ids)
    S = scoring.log_probs(subject.model, examples)[0]
    K = scoring.gram(subject.model, examples, engine=engine).rows
    log_p = S.log_softmax(0)
    v = torch.eye(len(S), dtype=torch.float64) - log_p.exp()
    size = torch.einsum("ci,ij,cj->c", v.abs(), K.abs(), v.abs())
    digits = 1e-7 if subject.model.dtype == torch.float32 else torch.finfo(subject.model.dtype).eps
    square = torch.maximum(torch.einsum("ci,ij,cj->c", v, K, v), digits * size).clamp(min=1e-300)
    return {
        "n_tokens": [len(answer) for answer in ids],
        "log_prob": S.tolist(),
        "log_p": log_p.tolist(),
        "log_epistemic": (2 * log_p + square.log()).tolist(),
        "log_gradient": K.diagonal().log().tolist(),
        "n_true": len(question.answers),
    }
