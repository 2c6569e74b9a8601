"""How well an uncertainty estimate does its work: correlations, AUROC, and intervals for both.

Orientation, everywhere: a score is an uncertainty, so high means "the answer is wrong". Every statistic
refuses NaN, and input on which it is not defined, rather than return a number that means nothing.
"""

from __future__ import annotations

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

N_RESAMPLES = 300  # as many as behind the paper's Table 2
MIN_PER_CLASS = 10  # with fewer right or fewer wrong answers than this, an AUROC is not reported

Column = NDArray[np.float64]


class UndefinedStatisticError(ValueError):
    """The statistic has no value on this sample (one class only, or a constant column)."""


@dataclass(frozen=True)
class Interval:
    """A statistic with its interval: `value` on all `n` rows, `low` and `high` the interval's ends."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Return for example ``0.63 [0.55, 0.71], n = 120``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Return Pearson's correlation r of two columns; raises ValueError on NaN and on a constant column."""
    a, b = _two_columns(a, b)
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

    Raises ValueError as `auroc` does, and when no stratum holds both classes.
    """
    score, wrong = _score_and_wrong(score, wrong)
    stratum = np.asarray(stratum)
    if stratum.shape != score.shape:
        raise ValueError(f"stratum has shape {stratum.shape}, score {score.shape}; they must be equal")
    counts = [_concordant_pairs(score[stratum == s], wrong[stratum == s]) for s in np.unique(stratum)]
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

    Raises ValueError when columns differ in length, when the statistic refuses the full sample, and when
    more resamples are undefined than asked for.
    """
    arrays = [np.asarray(column) for column in columns]
    n = len(arrays[0]) if arrays else 0
    if n == 0 or any(len(array) != n for array in arrays):
        raise ValueError(f"columns must have one common length > 0, got {[len(array) for array in arrays]}")
    value = float(statistic(*arrays))
    rng = np.random.default_rng(seed)
    draws: list[float] = []
    for _ in range(2 * n_resamples):
        rows = rng.integers(0, n, n)
        try:
            draws.append(float(statistic(*(array[rows] for array in arrays))))
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
    return bootstrap_interval(auroc, score, wrong, n_resamples=n_resamples, seed=seed)


def auroc_difference(
    score: ArrayLike, control: ArrayLike, wrong: ArrayLike, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Return AUROC(score) − AUROC(control) on the same questions, with its paired 95 % bootstrap interval."""

    def difference(score: ArrayLike, control: ArrayLike, wrong: ArrayLike) -> float:
        return auroc(score, wrong) - auroc(control, wrong)

    return bootstrap_interval(difference, score, control, wrong, n_resamples=n_resamples, seed=seed)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval, which stays inside [0, 1] also near its ends."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def out_of_fold_scores(
    features: ArrayLike, wrong: ArrayLike, *, n_folds: int = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Return each example's log-odds of being wrong from a logistic regression that never saw it.

    `features`: (example, feature). Folds are stratified and shuffled by `seed`; the features are
    standardised with the training folds' mean and spread; the ridge penalty is scikit-learn's default (C =
    1). Without any signal the pooled AUROC of such scores lies a little BELOW one half: a fold with more
    wrong answers in training has fewer in its test part.

    Raises ValueError on a feature that is not finite and when a class has fewer examples than folds.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features must be a finite (example, feature) array, got shape {features.shape}")
    _, wrong = _score_and_wrong(features[:, 0], wrong)
    if min(wrong.sum(), (~wrong).sum()) < n_folds:
        raise UndefinedStatisticError(
            f"{n_folds} folds need {n_folds} right and wrong answers, got {(~wrong).sum()} and {wrong.sum()}"
        )
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    return cross_val_predict(classifier, features, wrong, cv=folds, method="decision_function")


def likelihood_ratio_test(base: ArrayLike, extra: ArrayLike, wrong: ArrayLike) -> tuple[float, float]:
    """Test whether `extra` features tell right from wrong once the `base` features are known.

    Both: (example, feature). Two nested logistic regressions are fitted; twice the gain in log-likelihood
    is χ² with as many degrees of freedom as there are extra features, when these say nothing. Returns χ²
    and its p-value.

    Raises ValueError on features that are not finite and when all answers are right or all are wrong.
    """
    base, extra = np.asarray(base, dtype=np.float64), np.asarray(extra, dtype=np.float64)
    both = np.column_stack([base, extra])
    if not np.isfinite(both).all():
        raise ValueError("base and extra must be finite")
    _, wrong = _score_and_wrong(both[:, 0], wrong)
    if wrong.all() or not wrong.any():
        raise UndefinedStatisticError("a logistic regression needs right and wrong answers")
    statistic = 2 * (_log_likelihood(both, wrong) - _log_likelihood(base, wrong))
    return statistic, float(stats.chi2.sf(statistic, extra.shape[1]))


def _log_likelihood(features: Column, wrong: NDArray[np.bool_]) -> float:
    """Return the maximised log-likelihood (nats); the ridge is only there to keep separable data finite."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e6, tol=1e-8, max_iter=10_000))
    return float(-log_loss(wrong, model.fit(features, wrong).predict_proba(features), normalize=False))


def enough_of_both(wrong: ArrayLike, minimum: int = MIN_PER_CLASS) -> bool:
    """Return whether there are `minimum` right and `minimum` wrong answers: the rule for an AUROC."""
    wrong = np.asarray(wrong, dtype=bool)
    return bool(min(wrong.sum(), (~wrong).sum()) >= minimum)


def _concordant_pairs(score: Column, wrong: NDArray[np.bool_]) -> tuple[float, int]:
    """Return how many (wrong, right) pairs the score orders rightly (ties one half), and of how many."""
    n_wrong = int(wrong.sum())
    concordant = stats.rankdata(score)[wrong].sum() - n_wrong * (n_wrong + 1) / 2
    return float(concordant), n_wrong * (len(wrong) - n_wrong)


def _score_and_wrong(score: ArrayLike, wrong: ArrayLike) -> tuple[Column, NDArray[np.bool_]]:
    score, labels = np.asarray(score, dtype=np.float64), np.asarray(wrong)
    if score.ndim != 1 or score.shape != labels.shape:
        raise ValueError(f"score and wrong must be columns of one length, got {score.shape}, {labels.shape}")
    if np.isnan(score).any():
        raise ValueError(f"score is NaN at {int(np.isnan(score).sum())} of {len(score)} examples")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("wrong must hold only true/false (or 1/0)")
    return score, labels.astype(bool)


def _two_columns(a: ArrayLike, b: ArrayLike) -> tuple[Column, Column]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b must be columns of one length, got shapes {a.shape} and {b.shape}")
    for name, column in (("a", a), ("b", b)):
        if not np.isfinite(column).all():
            raise ValueError(f"{name} is not finite at {int((~np.isfinite(column)).sum())} of {len(column)} rows")
        if np.ptp(column) == 0:
            raise UndefinedStatisticError(f"{name} is constant; a correlation with it is not defined")
    return a, b
