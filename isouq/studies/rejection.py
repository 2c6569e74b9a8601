"""What it buys to leave the least certain answers unsaid: accuracy by share answered, AURC and rejection ratio.

Tied scores are left unsaid in random order: every number is the mean over all such orders. lm-polygraph breaks ties by
position and estimates by 1,000 shuffles what rejecting at random gives; here that is exact: the share of right answers.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from isouq.studies import require
from isouq.studies.evaluation import Column, Weights, on_all
from isouq.studies.resamples import Pooled, by_blocks, one_by_one

MAX_REJECTION = 0.5  # the rejection ratio counts while less than this share is left unsaid; 1: down to one answer


def accuracies(score: ArrayLike, wrong: ArrayLike) -> Column:
    """Return the share of right answers among the k most certain, (k,) for k = 1 … n.

    `score`: (example,), high = uncertain. At a coverage of k/n the risk is one minus this (El-Yaniv and Wiener 2010).
    Raises ValueError as `evaluation.auroc`, but for answers that are all right or all wrong.
    """
    score, wrong = require.numbers("score", score, finite=False), require.labels("wrong", wrong)
    require.same_rows(score=score, wrong=wrong)
    order = np.argsort(score)
    last = np.flatnonzero(np.append(score[order][1:] != score[order][:-1], True))
    k = np.arange(1, len(score) + 1)
    return np.interp(k, np.append(0, last + 1), np.append(0, np.cumsum(~wrong[order])[last])) / k


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


def weighted_aurc(score: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Return the AURC of every row of `weights`, which are counts; see `evaluation.Statistic`."""
    if score.ndim > 1:
        return one_by_one(weighted_aurc, score, wrong, weights)
    return 1 - _accuracy(score, wrong, weights, weights.sum(axis=1))


def weighted_prr(
    score: Column, wrong: NDArray[np.bool_], weights: Weights, max_rejection: float = MAX_REJECTION
) -> Column:
    """Return the rejection ratio of every row of `weights`, which are counts; NaN where a class has no weight."""
    if score.ndim > 1:
        return one_by_one(functools.partial(weighted_prr, max_rejection=max_rejection), score, wrong, weights)
    n, n_wrong = weights.sum(axis=1), weights @ wrong
    n_right, rejected = n - n_wrong, (max_rejection * n).astype(int)
    full = np.maximum(n - rejected, n_right)  # the oracle's accuracy falls from here on, and is 1 before
    above = special.digamma(n + 1) - special.digamma(full + 1)  # the sum of 1/k over k from full + 1 to n
    defined = (n_right > 0) & (n_wrong > 0) & (rejected > 1)  # of one number of answers kept, all orders are alike
    rejected, n = np.where(defined, rejected, 1), np.where(defined, n, 1)
    oracle, random = (full - n + rejected + n_right * above) / rejected, n_right / n
    area = _accuracy(score, wrong, weights, rejected)
    return np.divide(area - random, oracle - random, out=np.full(len(n), np.nan), where=defined)


def _accuracy(score: Column, wrong: NDArray[np.bool_], weights: Weights, rejected: Weights) -> Column:
    """Return the mean accuracy of the k most certain answers over the `rejected` (resample,) largest k; NaN for none.

    The answer in place j is one of the k most certain for all k from j on. With H(j) = 1 + 1/2 + … + 1/j its share of
    the sum over k above `first` is H(n) − H(max(j − 1, first)), of which `gone` has the second part, cumulated over
    places. Tied answers have the mean of their places.
    """
    harmonic, summed = _harmonic(int(weights.sum(axis=1).max(initial=0)).bit_length())
    pools = Pooled.of(score, wrong)

    def of(weights: Weights, rejected: Weights) -> Column:
        places = pools.cumulated(weights).astype(int)
        n, first = places[:, -1:], places[:, -1:] - rejected[:, None]
        gone = summed.take(places)
        if first.any():
            flat = first * harmonic[first]
            gone = np.where(places <= first, places * harmonic[first], gone - summed[first] + flat)
        right, wrong = (pools.sizes(places, pools.tied + k) for k in (0, 1))
        of_right, of_wrong = (pools.sizes(gone, pools.tied + k) for k in (0, 1))
        both, swapped = right + wrong, right * of_wrong - wrong * of_right
        swapped = np.divide(swapped, both, out=np.zeros(both.shape), where=both > 0)
        spent = gone[:, -1] - pools.total(gone) + swapped.sum(axis=1)
        n_right = n[:, 0] - pools.total(places)
        total = n_right * harmonic[n[:, 0]] - spent
        return np.divide(total, rejected, out=np.full(len(total), np.nan), where=rejected > 0)

    return by_blocks(of, weights, rejected)


@functools.lru_cache(maxsize=2)
def _harmonic(bits: int) -> tuple[Column, Column]:
    """H(k) and the sum of H(j − 1) over j = 1 … k, for k below 2 to the power of `bits`."""
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, 2**bits)))
    return harmonic, np.append(0.0, np.cumsum(harmonic[:-1]))
