"""Logistic regressions on uncertainty scores, each fitted again in every bootstrap resample.

A fitted score that is judged with its fits held fixed looks surer than it is. Here one fit is made for each resample
and tried on the questions that the resample left out, so that an interval contains the fit's own uncertainty. All
rivals are fitted on the same resamples and the same folds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from isouq.studies import require
from isouq.studies.evaluation import CONSTANT, Interval, Ranking, moderate, on_all, weighted_auroc
from isouq.studies.resamples import (
    Column,
    Resamples,
    Statistic,
    UndefinedStatisticError,
    Weights,
    by_blocks,
    one_by_one,
)

N_BINS = 5  # of the calibration error
N_REPEATS = 20  # of the folds behind a fitted score's own value
FLAT = 1e-3  # standard deviations; a ridge does not see features whose values mostly lie nearer to each other


def fit_logistic(features: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Fit a logistic regression to every row of `weights` (fit, example) at once, by Newton's method.

    The penalty is scikit-learn's default (C = 1), on features standardised with each fit's own mean and spread.
    Returns coefficients (fit, 1 + feature) for `features` as given, the intercept first; NaN where a class has no
    weight.

    Raises RuntimeError if a fit does not converge.
    """
    # A feature 10,000 standard deviations from 0, such as a constant one, would leave rounding to fit: it is moved.
    middle = np.median(features, axis=0)
    moved = np.where(np.abs(middle) > 1e4 * features.std(axis=0), middle, 0.0)
    whole = _newton(features - moved, wrong, np.ones((1, len(wrong))))[0]
    beta = by_blocks(functools.partial(_newton, features - moved, wrong, start=np.nan_to_num(whole)), weights)
    beta[:, 0] -= beta[:, 1:] @ moved
    return beta


@np.errstate(all="ignore")
def _newton(features: Column, wrong: NDArray[np.bool_], weights: Weights, start: float | Column = 0.0) -> Column:
    x = np.column_stack([np.ones(len(features)), features])
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    n_fits, size = len(weights), x.shape[1]
    defined = (weights @ wrong > 0) & (weights @ ~wrong > 0)
    used = np.where(defined[:, None], weights, 1.0)
    mean = used @ features / used.sum(axis=1, keepdims=True)
    variance = np.maximum(used @ features**2 / used.sum(axis=1, keepdims=True) - mean**2, 0)
    # β of a standardised feature is β·s of the plain one, so the penalty β² becomes s²β². A constant one is left alone.
    constant = variance <= (CONSTANT * np.abs(features).max(axis=0)) ** 2
    penalty = np.column_stack([np.zeros(n_fits), np.where(constant, 1.0, variance)])
    units = np.sqrt(np.where(penalty > 0, penalty, 1.0))
    beta = np.zeros((n_fits, size)) + start
    of_wrong = (used * wrong) @ x
    for n_steps in range(100):
        if n_steps == 25:  # a resample of few examples may have its fit far from the start, or steps may overshoot
            beta[:] = 0
        p = special.expit(beta @ x.T)
        expected = used * p
        gradient = of_wrong - expected @ x - penalty * beta
        p *= expected
        hessian = ((expected - p) @ products).reshape(n_fits, size, size)
        hessian[:, range(size), range(size)] += penalty
        step = np.linalg.solve(hessian + 1e-12 * np.eye(size), gradient[..., None])[..., 0]
        longest = np.abs(step * units).max(axis=1, keepdims=True)
        beta += step / np.maximum(longest, 1) if n_steps >= 25 else step
        if longest.max() < 1e-7:  # its square is what is left
            beta[~defined] = np.nan
            return beta
    raise RuntimeError(f"logistic regression: {n_fits} fits, not all converged after {n_steps + 1} steps")


def draw_folds(
    wrong: ArrayLike, *, clusters: ArrayLike | None = None, n_folds: int = 5, seed: int = 0
) -> NDArray[np.int64]:
    """Return each example's fold, (example,), stratified by `wrong`; `clusters` (example,) stay whole.

    A fit that saw a question's sisters has seen something of the question. Raises UndefinedStatisticError when a class
    has fewer examples than folds, and when clusters leave a fit without one of the classes.
    """
    wrong, n_folds = require.labels("wrong", wrong), require.count("n_folds", n_folds, 2)
    if min(wrong.sum(), (~wrong).sum()) < n_folds:
        counts = f"{(~wrong).sum()} right and {wrong.sum()} wrong answers"
        raise UndefinedStatisticError(f"wrong: {counts} given, of each as many as the {n_folds} folds wanted")
    if clusters is not None:
        require.same_rows(wrong=wrong, clusters=clusters)
        clusters = require.groups("clusters", clusters)
        clusters = clusters if clusters.max() < len(wrong) - 1 else None  # each example is its own
    kind: Any = StratifiedKFold if clusters is None else StratifiedGroupKFold
    splitter = kind(n_folds, shuffle=True, random_state=require.seed("seed", seed))
    folds = np.empty(len(wrong), dtype=np.int64)
    for fold, (train, test) in enumerate(splitter.split(wrong, wrong, clusters)):
        if len(np.unique(wrong[train])) < 2:
            given = "one that holds nearly all right or all wrong answers given"
            raise UndefinedStatisticError(f"clusters: {given}, both kinds in several of them wanted")
        folds[test] = fold
    return folds


def out_of_fold_scores(
    features: ArrayLike, wrong: ArrayLike, *, clusters: ArrayLike | None = None, n_folds: int = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Return each example's log-odds of being wrong from a logistic regression that never saw it, nor its cluster.

    `features`: (example, feature). Folds are those of `draw_folds`; see `fit_logistic` for the fit. Without any signal
    the pooled AUROC of such scores lies a little BELOW one half: a fold with more wrong answers in training has fewer
    in its test part.

    Raises ValueError on a feature that is not finite or has a value far beyond all others, and as `draw_folds`.
    """
    require.same_rows(features=features, wrong=wrong)
    features, wrong = steady("features", features), require.labels("wrong", wrong)
    folds = draw_folds(wrong, clusters=clusters, n_folds=n_folds, seed=seed)
    beta = fit_logistic(features, wrong, (folds != np.arange(n_folds)[:, None]).astype(float))
    return beta[folds, 0] + np.sum(beta[folds, 1:] * features, axis=1)


def cross_fitted(
    features: ArrayLike, wrong: ArrayLike, *, clusters: ArrayLike | None = None, n_folds: int = 5, seed: int = 0
) -> Column:
    """Return `out_of_fold_scores` for N_REPEATS draws of the folds, (repeat, example). Raises as these."""
    how: Any = {"clusters": clusters, "n_folds": n_folds}
    seeds = range(require.seed("seed", seed), seed + N_REPEATS)
    return np.stack([out_of_fold_scores(features, wrong, seed=one % 2**32, **how) for one in seeds])


def brier(probability: ArrayLike, wrong: ArrayLike) -> float:
    """Return the Brier score, the mean of (probability − wrong)²; low is good.

    `probability`: (example,) that the answer is wrong. Raises ValueError as `auroc`, and beyond [0, 1].
    """
    require.same_rows(probability=probability, wrong=wrong)
    return on_all(weighted_brier, _probability(probability), wrong)


def ece(probability: ArrayLike, wrong: ArrayLike) -> float:
    """Return the expected calibration error: the mean distance of the mean probability from the share of wrong answers.

    The mean is over N_BINS bins of as many answers each; equal probabilities share one. A calibrated score does not
    have 0 but what chance makes of N_BINS shares. Raises as `brier`.
    """
    require.same_rows(probability=probability, wrong=wrong)
    return on_all(weighted_ece, _probability(probability), wrong)


def weighted_log_score(log_odds: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Return the mean log-probability of what happened, in nats per answer, of every row of `weights`."""
    return _mean(special.log_expit(np.where(wrong, log_odds, -log_odds)), weights)


def weighted_brier(probability: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Return the Brier score of every row of `weights`; see `evaluation.Statistic`."""
    return _mean((probability - wrong) ** 2, weights)


def weighted_ece(probability: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Return the calibration error of every row of `weights`, in bins of equal weight; see `evaluation.Statistic`."""
    if probability.ndim > 1:
        return one_by_one(weighted_ece, probability, wrong, weights)
    order = np.argsort(probability)
    last = np.flatnonzero(np.append(probability[order][1:] != probability[order][:-1], True))

    def of(weights: Weights) -> Column:
        sorted_weights = weights[:, order].astype(float)
        mass, gap = (
            np.diff(np.cumsum(column, axis=1)[:, last], axis=1, prepend=0)
            for column in (sorted_weights, sorted_weights * (probability - wrong)[order])
        )
        total = mass.sum(axis=1, keepdims=True)
        bins = (N_BINS * (np.cumsum(mass, axis=1) - mass / 2) / np.maximum(total, 1)).astype(int)
        bins += N_BINS * np.arange(len(bins))[:, None]
        gaps = np.bincount(bins.ravel(), gap.ravel(), N_BINS * len(bins)).reshape(-1, N_BINS)
        return np.abs(gaps).sum(axis=1) / np.where(total > 0, total, np.nan)[:, 0]

    return by_blocks(of, weights)


def of_probability(statistic: Statistic) -> Statistic:
    """Return a statistic of log-odds that is `statistic` of the probabilities they stand for."""

    def of_log_odds(log_odds: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
        if log_odds.ndim == 1:
            return statistic(special.expit(log_odds), wrong, weights)
        return by_blocks(lambda w, z: statistic(special.expit(z), wrong, w), weights, log_odds)

    return of_log_odds


def _mean(values: Column, weights: Weights) -> Column:
    total = weights.sum(axis=1)
    weighted = np.where(weights > 0, weights * values, 0.0).sum(axis=1)
    return np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)


def _probability(given: ArrayLike) -> ArrayLike:
    column = require.numbers("probability", given)
    if column.min() < 0 or column.max() > 1:
        raise ValueError(
            f"probability: values {column.min():g} to {column.max():g} given, 0 to 1 wanted; expit takes log-odds"
        )
    return given


@dataclass(frozen=True, eq=False)
class Fit:
    """A logistic regression on some features, on the same folds and resamples as its rivals.

    out_of_fold: (repeat, example) log-odds of being wrong. out_of_bag: (resample, example) log-odds from the fit to
    each resample, of use where the resample left the example out. beta: (resample, feature), per standard deviation of
    the feature over all examples. coefficients: (feature,), the same of the fit to all examples.
    """

    out_of_fold: Column
    out_of_bag: Column
    beta: Column
    coefficients: Column
    wrong: NDArray[np.bool_]
    plan: Resamples

    @classmethod
    def of(cls, features: ArrayLike, wrong: ArrayLike, plan: Resamples, *, n_folds: int = 5) -> Fit:
        """Fit once for each resample of `plan`, and on N_REPEATS draws of the folds, which keep its clusters whole.

        Raises as `out_of_fold_scores`.
        """
        held_out = cross_fitted(features, wrong, clusters=plan.clusters, n_folds=n_folds, seed=plan.seed)
        features, wrong = steady("features", features), require.labels("wrong", wrong)
        spread = features.std(axis=0)
        beta = fit_logistic(features, wrong, plan.counts)
        whole = fit_logistic(features, wrong, np.ones((1, len(wrong))))[0, 1:]
        scores = beta @ np.column_stack([np.ones(len(features)), features]).T
        return cls(held_out, scores, beta[:, 1:] * spread, whole * spread, wrong, plan)

    def ranking(self, statistic: Statistic = weighted_auroc) -> Ranking:
        """Return the AUROC, or another `statistic` of log-odds: out of fold, mean over repeats, and out of bag."""
        value = statistic(self.out_of_fold, self.wrong, np.ones(self.out_of_fold.shape)).mean()
        undefined = np.isnan(self.beta).any(axis=1)  # a resample of one class has no fit
        draws = np.where(undefined, np.nan, statistic(self.out_of_bag, self.wrong, self.plan.unseen))
        n_units = min(len(self.plan.left_out), int(self.wrong.sum()), int((~self.wrong).sum()))
        return Ranking(float(value), draws, draws, None, len(self.wrong), n_units)

    def coefficient(self, feature: int) -> Interval:
        """Return one feature's coefficient per standard deviation, with its 95 % interval over refits."""
        return Interval.of(float(self.coefficients[feature]), self.beta[:, feature], len(self.wrong))


def residual_ranks(score: ArrayLike, given: ArrayLike) -> Column:
    """Return the ranks of a score less what a smooth curve in the ranks of `given` explains of them.

    given: (example, feature), such as log p and L. The curve is a cubic in each feature's ranks, by least squares. What
    is left ranks the answers as if `given` were the same for all.

    Raises UndefinedStatisticError where nothing is left: the score is a function of `given`.
    """
    require.same_rows(score=score, given=given)
    score, given = require.numbers("score", score, finite=False), require.numbers("given", given, 2)
    ranks = stats.rankdata(score)
    centred = (stats.rankdata(given, axis=0) - (len(given) + 1) / 2) / len(given)
    design = np.column_stack([np.ones(len(given)), centred, centred**2, centred**3])
    left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    if np.abs(left).max() <= 1e-6 * len(ranks):
        raise UndefinedStatisticError("score: a function of what is given; nothing is left to rank")
    return left


def questions_needed(gap: float, spread: float) -> int:
    """Return how many questions tell a difference of `gap` from none in 80 % of studies, at 5 %, two-sided.

    spread: the standard error of the difference times the root of the number of questions it was found on.
    """
    gap, spread = require.number("gap", gap, 0.0), require.number("spread", spread, 0.0, or_equal=True)
    return math.ceil(((special.ndtri(0.975) + special.ndtri(0.8)) * spread / gap) ** 2)


def auroc_spread(value: float, share_wrong: float) -> float:
    """Return the standard error of an AUROC times the root of n, by Hanley and McNeil (1982), for planning."""
    most = 1 - 2**-52
    a, share = require.number("value", value, 0.0, most), require.number("share_wrong", share_wrong, 0.0, most)
    return math.sqrt((a / (2 - a) - a**2) / share + (2 * a**2 / (1 + a) - a**2) / (1 - share))


def steady(name: str, features: ArrayLike) -> Column:
    """Return (example, feature). Raises ValueError for one that a ridge on standardised features would flatten."""
    columns = moderate(name, require.numbers(name, features, 2), 1e140)
    spreads = np.quantile(np.abs(columns - np.median(columns, axis=0)), [0.25, 0.5, 0.75], axis=0)
    if ((spreads > 0) & (spreads < FLAT * columns.std(axis=0))).any():
        why = "a feature with values far beyond the others given, which leave these alike once standardised"
        raise ValueError(f"{name}: {why}; one without them wanted, such as its logarithm or ranks")
    return columns
