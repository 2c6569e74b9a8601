"""What it buys to leave the least certain answers unsaid: accuracy by share answered, AURC and rejection ratio.

Tied scores are left unsaid in random order: every number is the mean over all such orders. lm-polygraph breaks ties by
position and estimates by 1,000 shuffles what rejecting at random gives; here that is exact: the share of right answers.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isouq.studies import require
from isouq.studies.evaluation import Column, on_all

MAX_REJECTION = 0.5  # the rejection ratio counts while less than this share is left unsaid; 1: down to one answer


def accuracies(score: ArrayLike, wrong: ArrayLike) -> Column:
    """Return the share of right answers among the k most certain, (k,) for k = 1 … n.

    `score`: (example,), high = uncertain. At a coverage of k/n the risk is one minus this (El-Yaniv and Wiener 2010).
    Raises ValueError as `evaluation.auroc`, but for answers that are all right or all wrong.
    """
    score, wrong = require.numbers("score", score, finite=False), require.labels("wrong", wrong)
    require.same_rows(score=score, wrong=wrong)
    return _curve(score, wrong, np.ones(len(wrong)))


def aurc(score: ArrayLike, wrong: ArrayLike) -> float:
    """Return the area under the risk-coverage curve, the mean over k of the risk among the k most certain answers.

    Geifman et al. (2019). Low is good; a score that knows nothing has the share of wrong answers. Raises as `auroc`.
    """
    return on_all(weighted_aurc, score, wrong)


def prr(score: ArrayLike, wrong: ArrayLike, *, max_rejection: float = MAX_REJECTION) -> float:
    """Return the prediction rejection ratio: 1 for a perfect score, 0 for one that knows nothing.

    As lm-polygraph defines it (Malinin et al. 2017): with A the mean accuracy of the answers kept over all numbers of
    rejected ones below `max_rejection` · n, (A − A of random) / (A of the oracle − A of random). With `max_rejection` 1
    it ranks scores as AURC does. Raises ValueError as `auroc`, and for a limit outside (0, 1].
    """
    limit = require.number("max_rejection", max_rejection, 0.0, np.nextafter(1.0, 2.0))
    return on_all(functools.partial(weighted_prr, max_rejection=limit), score, wrong)


def weighted_aurc(score: Column, wrong: NDArray[np.bool_], weights: Column) -> Column:
    """Return the AURC of every row of `weights`, which are counts; see `evaluation.Statistic`."""
    rows = zip(np.broadcast_to(score, weights.shape), weights, strict=True)
    return np.array([1 - _curve(s, wrong, w).mean() if w.any() else np.nan for s, w in rows])


def weighted_prr(
    score: Column, wrong: NDArray[np.bool_], weights: Column, max_rejection: float = MAX_REJECTION
) -> Column:
    """Return the rejection ratio of every row of `weights`, which are counts; NaN where a class has no weight."""
    values = np.full(len(weights), np.nan)
    for row, (s, w) in enumerate(zip(np.broadcast_to(score, weights.shape), weights, strict=True)):
        n, n_wrong = int(w.sum()), w @ wrong
        if 0 < n_wrong < n and (n_rejected := int(max_rejection * n)):
            random = 1 - n_wrong / n
            area, oracle = (_curve(x, wrong, w)[-n_rejected:].mean() for x in (s, wrong.astype(float)))
            if oracle > random:  # of two answers no one is left unsaid, and all orders are alike
                values[row] = (area - random) / (oracle - random)
    return values


def _curve(score: Column, wrong: NDArray[np.bool_], weights: Column) -> Column:
    """How many of the k most certain are right, as a share, k = 1 … the sum of weights; linear within tied scores."""
    used = np.flatnonzero(weights)
    order = used[np.argsort(score[used])]
    last = np.append(score[order][1:] != score[order][:-1], True)
    kept, right = (np.append(0, np.cumsum(part[order])[last]) for part in (weights, weights * ~wrong))
    k = np.arange(1, int(kept[-1]) + 1)
    return np.interp(k, kept, right) / k
