"""How well an uncertainty estimate does its work: correlations, AUROC, and intervals for both.

Orientation, everywhere: a score is an uncertainty, so high means "the answer is wrong". Every statistic refuses NaN,
masked values, pandas columns of other rows, and input on which it is not defined.

Intervals of raw scores are BCa bootstrap intervals. Those of fitted scores (`isouq.studies.fits`) refit in every
resample. A `Ranking` holds either, so that any two can be compared on the same resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from isouq.studies import require
from isouq.studies.resamples import N_RESAMPLES as N_RESAMPLES
from isouq.studies.resamples import Column as Column
from isouq.studies.resamples import Pooled, by_blocks, one_by_one
from isouq.studies.resamples import Resamples as Resamples
from isouq.studies.resamples import Statistic as Statistic
from isouq.studies.resamples import UndefinedStatisticError as UndefinedStatisticError
from isouq.studies.resamples import Weights as Weights

N_AS_IN_PAPER = 300  # resamples behind the paper's mean ± standard deviation
MIN_PER_CLASS = 10  # with fewer right or fewer wrong answers than this, an AUROC is not reported
CONSTANT = 1e-9  # of a column's largest absolute value; what varies by less is rounding


@dataclass(frozen=True)
class Interval:
    """A statistic with its interval: `value` on all `n` rows, `low` and `high` the interval's ends.

    Raises ValueError for what is not finite and for ends in the wrong order.
    """

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not (np.isfinite([self.value, self.low, self.high]).all() and self.low <= self.high):
            raise ValueError(f"interval: {self.value} [{self.low}, {self.high}] given, finite low <= high wanted")

    @classmethod
    def of(cls, value: float, draws: Column, n: int, levels: Sequence[float] | Column = (0.025, 0.975)) -> Interval:
        """Return the interval between two quantiles of `draws`, which `value` widens where it lies outside."""
        low, high = np.quantile(defined(draws, n), levels)
        return cls(value, min(float(low), value), max(float(high), value), n)

    def __str__(self) -> str:
        """Return for example ``0.63 [0.55, 0.71], n = 120``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Return Pearson's correlation r of two columns; raises ValueError on NaN and on a constant column."""
    a, b = (moderate(name, column) for name, column in zip("ab", _two_columns(a, b), strict=True))
    return float(stats.pearsonr(a, b)[0])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation ρ, ties at their mean rank; raises ValueError as `pearson` does."""
    a, b = _two_columns(a, b)
    return float(stats.pearsonr(stats.rankdata(a), stats.rankdata(b))[0])


def is_constant(column: ArrayLike) -> bool:
    """Return whether a column varies by no more than CONSTANT times its largest absolute value."""
    values = require.numbers("column", column)
    return bool(np.ptp(values) <= CONSTANT * np.abs(values).max())


def auroc(score: ArrayLike, wrong: ArrayLike) -> float:
    """Return the chance that a wrong answer scores above a right one, a tie counting one half.

    `score`: (example,), high = uncertain. `wrong`: (example,), true where the answer is wrong. This is the
    Mann-Whitney U statistic divided by the number of pairs.

    Raises ValueError when a score is NaN, when lengths differ, and when all answers are right or all wrong.
    """
    return on_all(weighted_auroc, score, wrong)


def on_all(statistic: Statistic, score: ArrayLike, wrong: ArrayLike) -> float:
    """Return a statistic of all answers, each once. Raises ValueError as `auroc` does."""
    score, wrong = _score_and_wrong(score, wrong)
    return _defined_on_all(statistic(score, wrong, np.ones((1, len(wrong)))), wrong)


def _defined_on_all(values: Column, wrong: NDArray[np.bool_]) -> float:
    if wrong.all() or not wrong.any():
        side = "wrong" if wrong.all() else "right"
        raise UndefinedStatisticError(f"a ranking needs right and wrong answers; all {len(wrong)} are {side}")
    if np.isnan(values[0]):
        raise UndefinedStatisticError(f"the statistic has no value on {len(wrong)} answers; more are wanted")
    return float(values[0])


def n_pairs(wrong: ArrayLike, stratum: ArrayLike) -> int:
    """Return how many pairs of a right and a wrong answer lie in the same stratum."""
    require.same_rows(wrong=wrong, stratum=stratum)
    codes, wrong = require.groups("stratum", stratum), require.labels("wrong", wrong)
    return int(
        np.bincount(codes[wrong], minlength=codes.max() + 1) @ np.bincount(codes[~wrong], minlength=codes.max() + 1)
    )


def bca(value: float, draws: Column, jackknife: Column, n: int, *, n_units: int, level: float = 0.95) -> Interval:
    """Return the bias-corrected and accelerated bootstrap interval of a statistic (Efron 1987).

    draws: (resample,), jackknife: (cluster,), both NaN where the statistic is undefined. With few units a bootstrap's
    spread is too narrow, so quantiles of t with n_units − 1 degrees of freedom take the normal ones' place (Hesterberg
    2015). Units are clusters, or answers of the rarer class. Raises ValueError when most resamples are undefined.
    """
    draws, jackknife = defined(draws, n), jackknife[np.isfinite(jackknife)]
    below = (np.sum(draws < value) + np.sum(draws == value) / 2) / len(draws)
    edge = 0.5 / len(draws)
    bias = special.ndtri(np.clip(below, edge, 1 - edge))
    away = jackknife.mean() - jackknife if len(jackknife) else np.zeros(1)
    scale = np.sum(away**2) ** 1.5
    acceleration = np.sum(away**3) / (6 * scale) if scale > 0 else 0.0
    z = bias + special.stdtrit(max(1, n_units - 1), [(1 - level) / 2, (1 + level) / 2])
    return Interval.of(value, draws, n, special.ndtr(bias + z / (1 - acceleration * z)))


def defined(draws: Column, n: int) -> Column:
    """Return the resamples on which a statistic is defined; refuses it when they are fewer than half."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < len(draws) / 2:
        raise UndefinedStatisticError(f"the statistic is undefined on more than half of the resamples ({n} rows)")
    return finite


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    clusters: ArrayLike | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return `statistic(*columns)` with its BCa bootstrap interval, for any statistic.

    Rows are drawn with replacement, the same rows from every column, so a difference of two statistics on
    the same questions is paired. A resample on which the statistic is undefined (one class) is left out.

    Raises ValueError when columns differ in length or rows, when the statistic refuses the full sample or returns
    something other than a finite number, when more than half of the resamples are undefined, and as `Resamples.of`.
    It takes 2/(1 − level) resamples for one of them to lie beyond each end.
    """
    arrays = [require.array_of(f"columns[{k}]", column) for k, column in enumerate(columns)]
    if not arrays or any(not array.ndim for array in arrays):
        raise ValueError(f"columns: {len(arrays)} given, at least one wanted, each with a row per example")
    require.same_rows(**{f"columns[{k}]": column for k, column in enumerate(columns)})
    level = require.number("level", level, 0.0, 1 - 2**-52)  # nearer to 1 its upper tail rounds to nothing
    n_resamples = require.count("n_resamples", n_resamples, math.ceil(round(2 / (1 - level), 6)))
    plan = Resamples.of(arrays[0], clusters=clusters, n_resamples=n_resamples, seed=seed)
    value, rows = _value(statistic, arrays), np.arange(len(arrays[0]))

    def draw(counts: Weights) -> float:
        try:
            return _value(statistic, [array[np.repeat(rows, counts.astype(int))] for array in arrays])
        except UndefinedStatisticError:
            return math.nan

    draws, jackknife = ([draw(counts) for counts in part] for part in (plan.counts, plan.left_out))
    n_units = len(plan.left_out)
    return bca(value, np.array(draws), np.array(jackknife), len(rows), n_units=n_units, level=level)


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well a score ranks wrong above right: on all n questions, on each resample, and beside it.

    value: the AUROC or another `Statistic`, or a difference of two. draws: (resample,) on the questions drawn.
    out_of_bag: (resample,) on those left out. jackknife: (cluster,) without one cluster. The draws of a fitted score
    are its out_of_bag, since its scores are of use only on questions that the fit has not seen, and it has no
    jackknife. n_units: clusters, or answers of the rarer class, if they are fewer.
    """

    value: float
    draws: Column
    out_of_bag: Column
    jackknife: Column | None
    n: int
    n_units: int

    def interval(self) -> Interval:
        """Return the 95 % interval: BCa for a raw score, out-of-bag percentiles for a fitted one."""
        if self.jackknife is not None:
            return bca(self.value, self.draws, self.jackknife, self.n, n_units=self.n_units)
        return Interval.of(self.value, self.out_of_bag, self.n)

    def as_in_paper(self) -> tuple[float, float]:
        """Return mean and standard deviation over the first N_AS_IN_PAPER resamples, as the paper reports AUROCs."""
        draws = defined(self.draws[:N_AS_IN_PAPER], self.n)
        return float(draws.mean()), float(draws.std())

    def minus(self, other: Ranking) -> Ranking:
        """Return the paired difference, on the same questions and the same resamples.

        Raises ValueError for rankings of different questions or resamples.
        """
        if self.n != other.n or self.draws.shape != other.draws.shape:
            given = f"{self.n} questions with {len(self.draws)} resamples and {other.n} with {len(other.draws)}"
            raise ValueError(f"other: {given} given, the same questions on both sides wanted")
        out_of_bag, value = self.out_of_bag - other.out_of_bag, self.value - other.value
        if self.jackknife is None or other.jackknife is None:
            return replace(self, value=value, draws=out_of_bag, out_of_bag=out_of_bag, jackknife=None)
        draws, jackknife = self.draws - other.draws, self.jackknife - other.jackknife
        return replace(self, value=value, draws=draws, out_of_bag=out_of_bag, jackknife=jackknife)


def max_t(rankings: Sequence[Ranking]) -> float:
    """Return the critical value that makes intervals of all `rankings` hold at once, at 95 %: 1.96 for one alone.

    It is the 95 % quantile, over shared resamples, of the largest distance from the mean in standard deviations. A
    ranking that does not vary adds nothing. Raises ValueError for no ranking and for rankings of different resamples.
    """
    if not rankings or len({ranking.draws.shape for ranking in rankings}) > 1:
        raise ValueError(f"rankings: {len(rankings)} given, at least one wanted, all of the same resamples")
    draws = np.stack([ranking.draws for ranking in rankings])
    draws = draws[:, np.isfinite(draws).all(axis=0)]
    spread = draws.std(axis=1, keepdims=True)
    if not draws.shape[1]:
        raise UndefinedStatisticError("rankings: no resample on which all are defined given")
    away = np.abs(draws - draws.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, np.inf)
    return max(float(np.quantile(away.max(axis=0), 0.95)), -float(special.ndtri(0.025)))


def ranking(
    score: ArrayLike, wrong: ArrayLike, plan: Resamples, statistic: Statistic | None = None, *, out_of_bag: bool = True
) -> Ranking:
    """Return the AUROC of a raw score, or another `statistic`, on all questions and over the resamples of `plan`.

    `out_of_bag`: whether also on those left out, which only a comparison with a fitted score asks for.
    """
    score, wrong = _score_and_wrong(score, wrong)
    return _rank(functools.partial(statistic or weighted_auroc, score, wrong), wrong, plan, out_of_bag)


def stratified_ranking(score: ArrayLike, wrong: ArrayLike, stratum: ArrayLike, plan: Resamples) -> Ranking:
    """Return the AUROC over the pairs of answers in the same stratum, on all questions and over resamples.

    Comparing only within strata of, say, the answer's probability asks what the score adds once that is known: 0.5
    means nothing. `stratum`: (example,) labels. A stratum of one class has no pairs.

    Raises ValueError as `auroc` does, for an example without a stratum, when no stratum holds both classes, and when
    there is one stratum only: the value would be that of `auroc`.
    """
    codes = require.groups("stratum", stratum)
    require.same_rows(score=score, wrong=wrong, stratum=stratum)
    score, wrong = _score_and_wrong(score, wrong)
    if len(np.unique(codes)) < 2:
        raise UndefinedStatisticError("stratum: one stratum given, at least two wanted; in one this is the plain AUROC")
    if not n_pairs(wrong, codes):
        raise UndefinedStatisticError("no stratum holds both right and wrong answers")
    return _rank(functools.partial(weighted_auroc, score, wrong, codes=codes), wrong, plan)


def _rank(of: Callable[[Weights], Column], wrong: NDArray[np.bool_], plan: Resamples, unseen: bool = True) -> Ranking:
    if plan.counts.shape[1] != len(wrong):
        raise ValueError(f"plan: resamples of {plan.counts.shape[1]} questions given, of {len(wrong)} wanted")
    value = _defined_on_all(of(np.ones((1, len(wrong)))), wrong)
    draws, jackknife = of(plan.counts), of(plan.left_out)
    out_of_bag = of(plan.unseen) if unseen else np.full(len(draws), np.nan)
    n_units = min(len(plan.left_out), int(wrong.sum()), int((~wrong).sum()))
    return Ranking(value, draws, out_of_bag, jackknife, len(wrong), n_units)


def weighted_auroc(
    score: Column, wrong: NDArray[np.bool_], weights: Weights, codes: NDArray[np.int64] | None = None
) -> Column:
    """Return the AUROC of every row of `weights` (resample, example), by ranks; NaN where a class has no weight.

    score: (example,) or, where it differs between resamples, (resample, example). codes: (example,) strata, of a score
    (example,); only pairs within one count.
    """
    if score.ndim > 1:
        return one_by_one(weighted_auroc, score, wrong, weights)
    strata = [np.ones(len(wrong), dtype=bool)] if codes is None else [codes == code for code in np.unique(codes)]
    of_each = [
        by_blocks(functools.partial(_won, Pooled.of(score[rows], wrong[rows])), weights[:, rows]) for rows in strata
    ]
    won, pairs = np.sum(of_each, axis=0).T
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def _won(pools: Pooled, weights: Weights) -> Column:
    """Return pairs that the wrong answer wins, and all pairs, (resample, 2).

    By the rank sum of wrong answers: the sum of ranks up to r is r²/2, but for the half of ties.
    """
    ranks = pools.cumulated(weights).astype(float)
    n_wrong = pools.total(ranks)
    ties = np.sum(pools.sizes(ranks, pools.tied) * pools.sizes(ranks, pools.tied + 1), axis=1)
    won = (pools.total(ranks**2) - n_wrong**2 - ties) / 2
    return np.column_stack([won, n_wrong * (ranks[:, -1] - n_wrong)])


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval, which stays inside [0, 1] also near its ends.

    Raises ValueError for no trial, for more successes than trials, and for a level outside (0, 1).
    """
    n, level = require.count("n", n), require.number("level", level, 0.0, 1 - 2**-52)
    successes = require.count("successes", successes, 0, n)
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def enough_of_both(wrong: ArrayLike, minimum: int = MIN_PER_CLASS) -> bool:
    """Return whether there are `minimum` right and `minimum` wrong answers: the rule for an AUROC."""
    wrong = require.labels("wrong", wrong, least=0)
    return bool(min(wrong.sum(), (~wrong).sum()) >= require.count("minimum", minimum))


def _score_and_wrong(score: ArrayLike, wrong: ArrayLike) -> tuple[Column, NDArray[np.bool_]]:
    found = require.numbers("score", score, finite=False), require.labels("wrong", wrong)
    require.same_rows(score=score, wrong=wrong)
    return found


def _two_columns(a: ArrayLike, b: ArrayLike) -> tuple[Column, Column]:
    columns = require.numbers("a", a), require.numbers("b", b)
    require.same_rows(a=a, b=b)
    for name, column in zip("ab", columns, strict=True):
        if is_constant(column):
            raise UndefinedStatisticError(f"{name} is constant; a correlation with it is not defined")
    return columns


def moderate(name: str, columns: Column, most: float = 1e300) -> Column:
    """Refuse numbers so large that a sum of them, or of their squares, overflows."""
    if np.abs(columns).max() > most:
        raise ValueError(f"{name}: values up to {np.abs(columns).max():.1e} given, at most {most:.0e} wanted")
    return columns


def _value(statistic: Callable[..., float], columns: list[NDArray]) -> float:
    return require.number("statistic: its value", statistic(*columns))
