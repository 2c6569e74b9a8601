"""How well an uncertainty estimate does its work: correlations, AUROC, and intervals for both.

Orientation, everywhere: a score is an uncertainty, so high means "the answer is wrong". Every statistic
refuses NaN, masked values, pandas columns of other rows, and input on which it is not defined, rather than return a
number that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from isouq.studies import require

N_RESAMPLES = 300  # as many as behind the paper's Table 2
MIN_PER_CLASS = 10  # with fewer right or fewer wrong answers than this, an AUROC is not reported
FLAT = 1e-3  # standard deviations; a ridge does not see features whose values mostly lie nearer to each other

Column = NDArray[np.float64]


class UndefinedStatisticError(ValueError):
    """The statistic has no value on this sample (one class only, or a constant column)."""


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

    def __str__(self) -> str:
        """Return for example ``0.63 [0.55, 0.71], n = 120``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Return Pearson's correlation r of two columns; raises ValueError on NaN and on a constant column."""
    a, b = (_moderate(name, column) for name, column in zip("ab", _two_columns(a, b), strict=True))
    return float(stats.pearsonr(a, b)[0])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation ρ, ties at their mean rank; raises ValueError as `pearson` does."""
    a, b = _two_columns(a, b)
    return float(stats.pearsonr(stats.rankdata(a), stats.rankdata(b))[0])


def auroc(score: ArrayLike, wrong: ArrayLike) -> float:
    """Return the chance that a wrong answer scores above a right one, a tie counting one half.

    `score`: (example,), high = uncertain. `wrong`: (example,), true where the answer is wrong. This is the
    Mann-Whitney U statistic divided by the number of pairs.

    Raises ValueError when a score is NaN, when lengths differ, and when all answers are right or all wrong.
    """
    score, wrong = _score_and_wrong(score, wrong)
    concordant, pairs = _concordant_pairs(score, wrong)
    if pairs == 0:
        side = "wrong" if wrong.all() else "right"
        raise UndefinedStatisticError(f"AUROC needs right and wrong answers; all {len(wrong)} are {side}")
    return concordant / pairs


def stratified_auroc(score: ArrayLike, wrong: ArrayLike, stratum: ArrayLike) -> float:
    """Return the AUROC over the pairs of answers that lie in the same stratum.

    Comparing only within strata of, say, the answer's probability asks what the score adds once that is
    known: 0.5 means nothing. `stratum`: (example,) labels. A stratum of one class has no pairs.

    Raises ValueError as `auroc` does, for an example without a stratum, and when no stratum holds both classes.
    """
    codes = require.groups("stratum", stratum)
    require.same_rows(score=score, wrong=wrong, stratum=stratum)
    score, wrong = _score_and_wrong(score, wrong)
    counts = [_concordant_pairs(score[codes == s], wrong[codes == s]) for s in np.unique(codes)]
    pairs = sum(pairs for _, pairs in counts)
    if pairs == 0:
        raise UndefinedStatisticError("no stratum holds both right and wrong answers")
    return sum(concordant for concordant, _ in counts) / pairs


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return `statistic(*columns)` with its percentile bootstrap interval.

    Rows are drawn with replacement, the same rows from every column, so a difference of two statistics on
    the same questions is paired. A resample on which the statistic is undefined (one class) is drawn again.

    Raises ValueError when columns differ in length or rows, when the statistic refuses the full sample or returns
    something other than a finite number, and when more resamples are undefined than asked for. It takes 2/(1 − level)
    resamples, 40 at 95 %, for one of them to lie beyond each end, and rows that have as many different ones: four rows
    have 35, and so no interval at 95 %.
    """
    arrays = [require.array_of(f"columns[{k}]", column) for k, column in enumerate(columns)]
    if not arrays or any(not array.ndim for array in arrays):
        raise ValueError(f"columns: {len(arrays)} given, at least one wanted, each with a row per example")
    require.same_rows(**{f"columns[{k}]": column for k, column in enumerate(columns)})
    needed = math.ceil(round(2 / (1 - _level(level)), 6))
    n_resamples, n = require.count("n_resamples", n_resamples, needed), len(arrays[0])
    if not n or math.comb(2 * min(n, 30) - 1, min(n, 30)) < needed:
        raise UndefinedStatisticError(f"columns: {n} rows given, too few for {needed} different resamples")
    value = _value(statistic, arrays)
    rng = np.random.default_rng(require.seed("seed", seed))
    draws: list[float] = []
    for _ in range(2 * n_resamples):
        rows = rng.integers(0, n, n)
        try:
            draws.append(_value(statistic, [array[rows] for array in arrays]))
        except UndefinedStatisticError:
            continue
        if len(draws) == n_resamples:
            break
    if len(draws) < n_resamples:
        raise UndefinedStatisticError(f"the statistic is undefined on more than half of the resamples ({n} rows)")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)


def auroc_interval(score: ArrayLike, wrong: ArrayLike, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Interval:
    """Return the AUROC for "the answer is wrong" with its 95 % bootstrap interval over questions."""
    return bootstrap_interval(auroc, *_score_and_wrong(score, wrong), n_resamples=n_resamples, seed=seed)


def auroc_difference(
    score: ArrayLike, control: ArrayLike, wrong: ArrayLike, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Return AUROC(score) − AUROC(control) on the same questions, with its paired 95 % bootstrap interval."""

    def difference(score: ArrayLike, control: ArrayLike, wrong: ArrayLike) -> float:
        return auroc(score, wrong) - auroc(control, wrong)

    require.same_rows(score=score, control=control, wrong=wrong)
    control = require.numbers("control", control, finite=False)
    score, wrong = _score_and_wrong(score, wrong)
    return bootstrap_interval(difference, score, control, wrong, n_resamples=n_resamples, seed=seed)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval, which stays inside [0, 1] also near its ends.

    Raises ValueError for no trial, for more successes than trials, and for a level outside (0, 1).
    """
    n = require.count("n", n)
    successes = require.count("successes", successes, 0, n)
    interval = stats.binomtest(successes, n).proportion_ci(_level(level), method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def out_of_fold_scores(
    features: ArrayLike, wrong: ArrayLike, *, n_folds: int = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Return each example's log-odds of being wrong from a logistic regression that never saw it.

    `features`: (example, feature). Folds are stratified and shuffled by `seed`; the features are
    standardised with the training folds' mean and spread; the ridge penalty is scikit-learn's default (C =
    1). Without any signal the pooled AUROC of such scores lies a little BELOW one half: a fold with more
    wrong answers in training has fewer in its test part.

    Raises ValueError on a feature that is not finite or has a value far beyond all others, and when a class has
    fewer examples than folds.
    """
    require.same_rows(features=features, wrong=wrong)
    features, wrong = _features("features", features), require.labels("wrong", wrong)
    n_folds, seed = require.count("n_folds", n_folds, 2), require.seed("seed", seed)
    if min(wrong.sum(), (~wrong).sum()) < n_folds:
        counts = f"{(~wrong).sum()} right and {wrong.sum()} wrong answers"
        raise UndefinedStatisticError(f"wrong: {counts} given, of each as many as the {n_folds} folds wanted")
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    return cross_val_predict(classifier, features, wrong, cv=folds, method="decision_function")


def likelihood_ratio_test(base: ArrayLike, extra: ArrayLike, wrong: ArrayLike) -> tuple[float, float]:
    """Test whether `extra` features tell right from wrong once the `base` features are known.

    Both: (example, feature). Two nested logistic regressions are fitted; twice the gain in log-likelihood
    is χ² with as many degrees of freedom as the extra features add directions, when these say nothing. Returns χ²
    and its p-value.

    Raises ValueError on features that are not finite, that have a value so far out that all others look alike, on
    extra ones that are constant or combinations of the base, and when all answers are right or all are wrong.
    """
    require.same_rows(base=base, extra=extra, wrong=wrong)
    base, extra, wrong = _features("base", base), _features("extra", extra), require.labels("wrong", wrong)
    if wrong.all() or not wrong.any():
        raise UndefinedStatisticError("wrong: a logistic regression needs right and wrong answers")
    both = np.column_stack([base, extra])
    n_directions = _rank(both) - _rank(base)
    if not n_directions:
        raise UndefinedStatisticError("extra: constant, or the same as base; features that base does not hold wanted")
    statistic = 2 * (_log_likelihood(both, wrong) - _log_likelihood(base, wrong))
    return statistic, float(stats.chi2.sf(statistic, n_directions))


def _log_likelihood(features: Column, wrong: NDArray[np.bool_]) -> float:
    """Return the maximised log-likelihood (nats); the ridge is only there to keep separable data finite."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e6, tol=1e-8, max_iter=10_000))
    return float(-log_loss(wrong, model.fit(features, wrong).predict_proba(features), normalize=False))


def _features(name: str, features: ArrayLike) -> Column:
    """Return (example, feature), none of which a ridge on standardised features would flatten."""
    columns = _moderate(name, require.numbers(name, features, 2), 1e140)
    spreads = np.quantile(np.abs(columns - np.median(columns, axis=0)), [0.25, 0.5, 0.75], axis=0)
    if ((spreads > 0) & (spreads < FLAT * columns.std(axis=0))).any():
        why = "a feature with values far beyond the others given, which leave these alike once standardised"
        raise ValueError(f"{name}: {why}; one without them wanted, such as its logarithm or ranks")
    return columns


def _rank(features: Column) -> int:
    return int(np.linalg.matrix_rank(StandardScaler().fit_transform(features)))


def enough_of_both(wrong: ArrayLike, minimum: int = MIN_PER_CLASS) -> bool:
    """Return whether there are `minimum` right and `minimum` wrong answers: the rule for an AUROC."""
    wrong = require.labels("wrong", wrong, least=0)
    return bool(min(wrong.sum(), (~wrong).sum()) >= require.count("minimum", minimum))


def _concordant_pairs(score: Column, wrong: NDArray[np.bool_]) -> tuple[float, int]:
    """Return how many (wrong, right) pairs the score orders rightly (ties one half), and of how many."""
    n_wrong = int(wrong.sum())
    concordant = stats.rankdata(score)[wrong].sum() - n_wrong * (n_wrong + 1) / 2
    return float(concordant), n_wrong * (len(wrong) - n_wrong)


def _score_and_wrong(score: ArrayLike, wrong: ArrayLike) -> tuple[Column, NDArray[np.bool_]]:
    found = require.numbers("score", score, finite=False), require.labels("wrong", wrong)
    require.same_rows(score=score, wrong=wrong)
    return found


def _two_columns(a: ArrayLike, b: ArrayLike) -> tuple[Column, Column]:
    columns = require.numbers("a", a), require.numbers("b", b)
    require.same_rows(a=a, b=b)
    for name, column in zip("ab", columns, strict=True):
        if column.min() == column.max():
            raise UndefinedStatisticError(f"{name} is constant; a correlation with it is not defined")
    return columns


def _moderate(name: str, columns: Column, most: float = 1e300) -> Column:
    """Refuse numbers so large that a sum of them, or of their squares, overflows."""
    if np.abs(columns).max() > most:
        raise ValueError(f"{name}: values up to {np.abs(columns).max():.1e} given, at most {most:.0e} wanted")
    return columns


def _level(level: float) -> float:
    return require.number("level", level, 0.0, 1 - 2**-52)  # nearer to 1 its upper tail rounds to nothing


def _value(statistic: Callable[..., float], columns: list[NDArray]) -> float:
    return require.number("statistic: its value", statistic(*columns))
