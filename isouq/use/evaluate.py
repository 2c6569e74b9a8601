"""Scores and labels → how well each score tells wrong answers from right ones: what `isouq evaluate` does.

Orientation, fixed: a score is an uncertainty, so high means "the answer is wrong". The control is the negative
log-likelihood, which costs nothing; a score is of use where it gains on that.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

try:
    from matplotlib.figure import Figure
    from scipy import special as special
    from threadpoolctl import threadpool_limits

    from isouq.studies import evaluation, fits, plotting, rejection, require
    from isouq.studies.evaluation import Column, Ranking, Resamples, UndefinedStatisticError
except ImportError as missing:
    package = str(missing.name).partition(".")[0]
    raise ImportError(f"{package} is not installed; pip install 'isouq[evaluate]'") from missing

CONTROL, FITTED_CONTROL = "likelihood", "likelihood_fitted"
N_FOLDS = 5  # of a fitted score
MOST = 10**8  # rows times resamples: about 2 GB
RANKED = {"auroc": evaluation.weighted_auroc, "aurc": rejection.weighted_aurc, "prr": rejection.weighted_prr}
OF_PROBABILITY = {"brier": fits.of_probability(fits.weighted_brier), "ece": fits.of_probability(fits.weighted_ece)}
LOW_IS_GOOD = ("aurc", "brier", "ece")
Ranked = tuple[dict[str, Ranking], Column]  # by metric, and the curve
VALUE, GAIN = ["value", "low", "high"], ["gain", "gain_low", "gain_high"]
COLUMNS = ["score", "metric", *VALUE, "n", *GAIN]


@dataclass(frozen=True)
class Evaluation:
    """How well scores tell wrong answers from right ones.

    table: a row for each score and metric, with value, low, high (a 95 % interval), n, and gain, gain_low, gain_high:
    how much better than the control, on the same resamples, above 0 where it is better. warnings: sentences. curves: by
    score, the share of right answers among the k most certain, (k,).
    """

    table: pd.DataFrame
    warnings: tuple[str, ...]
    curves: Mapping[str, Column]

    def figure(self) -> Figure:
        """Draw the share of right answers among those given against the share given, a line for each score.

        Dashed: at random. Dotted: a score that knows which answers are wrong.
        """
        figure = Figure(figsize=(plotting.WIDTH, 0.6 * plotting.WIDTH), layout="constrained")
        right = float(next(iter(self.curves.values()))[-1])
        ax = plotting.accuracy_by_share(self.curves, figure.subplots(), right=right)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
        return figure

    def to_json(self) -> str:
        """Return the table's rows and the warnings as JSON; null where a number is not defined."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        return json.dumps({"scores": rows, "warnings": self.warnings}, indent=1, allow_nan=False)

    def __str__(self) -> str:
        """Return the table, and a line for each warning."""
        return "\n".join([self._shown().to_string(index=False), *(f"- {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{text}</li>" for text in self.warnings)
        return self._shown().to_html(index=False, border=0) + (f"<ul>{items}</ul>" if items else "")

    def _shown(self) -> pd.DataFrame:
        ends = {"value [95 %]": self.table[VALUE], "gain [95 %]": self.table[GAIN]}
        texts = {title: [shown(row) for row in of.to_numpy()] for title, of in ends.items()}
        return self.table[["score", "metric", "n"]].assign(**texts)


def shown(ends: Iterable[float], digits: int = 3) -> str:
    """Return a value with its interval, such as ``0.612 [0.570, 0.660]``; nothing where it is not defined."""
    value, low, high = ends
    return "" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def evaluate(
    table: pd.DataFrame,
    right: str = "right",
    *,
    scores: Sequence[str] | None = None,
    clusters: str | None = None,
    n_resamples: int = evaluation.N_RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Say how well each score tells wrong answers from right ones, beside the plain negative log-likelihood.

    A raw score keeps its sign, high = wrong. "combined" is a logistic regression on the standardised log U_E and
    log U_A, fitted out of fold (5 folds, 20 times) and again in every resample, which tests it on the answers left out.

    Args:
        table: What `score_texts` or `isouq score` gives, with a column of labels. Rows with an `error` are left out.
        right: The column of labels: true and false, 1 and 0, or yes and no.
        scores: Of likelihood (the control, −log p), likelihood_per_token, epistemic (log U_E), aleatoric (U_A),
            log_gradient (log U_E − 2 log p), combined, and any columns of the table; None for all of these names.
        clusters: A column whose equal cells mark questions that err alike, such as those of one document or kind: they
            are drawn together, and intervals are as wide as so few independent units make them.
        n_resamples: Bootstrap resamples behind the intervals, at least 40.
        seed: Of the resamples and folds.

    Returns:
        An `Evaluation` with `.table`, `.warnings` and `.figure()`. Metrics: auroc, aurc (area under the risk-coverage
        curve, low is good), prr (lm-polygraph's prediction rejection ratio, up to half rejected); of "combined" also
        brier and ece (the latter in 5 bins of as many answers each), beside those of "likelihood_fitted", the same
        regression on log p alone. Gains are over the control, on the same resamples, and above 0 where it is better.

    Raises:
        ValueError: A column is missing, a label is not one of two values, a score is not a finite number (by row), all
            answers are right or all wrong, there are fewer than five, or more than memory takes.

    Example:
        >>> import numpy as np, pandas as pd
        >>> rng = np.random.default_rng(0)
        >>> log_prob = -rng.gamma(2.0, size=200)
        >>> table = pd.DataFrame({"log_prob": log_prob, "right": rng.random(200) < np.exp(log_prob)})
        >>> found = isouq.evaluate(table, scores=["likelihood"], n_resamples=100)
        >>> found.table["metric"].tolist(), bool(found.table["low"][0] > 0.5)
        (['auroc', 'aurc', 'prr'], True)
    """
    used, wrong, warnings = labelled(table, right)
    plan = resamples(wrong, n_resamples, seed, clusters_of(used, clusters))
    names = [scores] if isinstance(scores, str) else [*SCORES, "combined"] if scores is None else scores
    names = list(dict.fromkeys(names))
    fitted = ["combined", FITTED_CONTROL] if "combined" in names else []
    if fitted and min(wrong.sum(), (~wrong).sum()) < N_FOLDS:
        warnings.append(f"combined: not fitted; that takes {N_FOLDS} right and {N_FOLDS} wrong answers at least")
        fitted = []
    raw = [name for name in dict.fromkeys([CONTROL, *names]) if name not in ("combined", *fitted)]
    # NumPy computes without Python's lock. Threads of its BLAS wait for each other more than they compute.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(_fitted, used, name, wrong, plan) for name in fitted}
        jobs |= {name: pool.submit(_raw, used, name, wrong, plan) for name in raw}
        ranked, curves = {}, {}
        for name in (*raw, *fitted):
            try:
                ranked[name], curves[name] = jobs[name].result()
            except UndefinedStatisticError as error:  # of folds that cannot keep the clusters whole
                if name not in fitted:
                    raise
                warnings.append(f"{name}: not fitted; {error}")
    rows = [_row(name, metric, ranked) for name in (*names, *fitted[1:]) for metric in ranked.get(name, ())]
    found = pd.DataFrame(rows, columns=COLUMNS)
    return Evaluation(found, (*warnings, *_warnings(found)), {name: curves[name] for name in names if name in curves})


def resamples(wrong: NDArray[np.bool_], n_resamples: int, seed: int, clusters: NDArray[Any] | None = None) -> Resamples:
    """Draw resamples of the answers, or of their clusters. Raises ValueError for more than memory takes."""
    n_resamples = require.count("n_resamples", n_resamples, 40)
    if len(wrong) * n_resamples > MOST:
        ways = f"n_resamples of at most {MOST // len(wrong)}, or a sample of the rows"
        raise ValueError(f"n_resamples: {n_resamples} of {len(wrong)} rows given, beyond memory; {ways} wanted")
    return Resamples.of(wrong, clusters=clusters, n_resamples=n_resamples, seed=seed)


def _raw(used: pd.DataFrame, name: str, wrong: NDArray[np.bool_], plan: Resamples) -> Ranked:
    """Return a raw score's rankings by metric, and its curve."""
    score = score_of(used, name)
    of = functools.partial(evaluation.ranking, score, wrong, plan, out_of_bag=name == CONTROL)
    return {metric: of(how) for metric, how in RANKED.items()}, rejection.accuracies(score, wrong)


def _fitted(used: pd.DataFrame, name: str, wrong: NDArray[np.bool_], plan: Resamples) -> Ranked:
    """Return a fitted score's rankings by metric, and its curve, the mean over repeats of the folds."""
    fit = fits.Fit.of(features_of(used, name.removesuffix("_fitted")), wrong, plan, n_folds=N_FOLDS)
    metrics = OF_PROBABILITY if name == FITTED_CONTROL else RANKED | OF_PROBABILITY
    curve = np.mean([rejection.accuracies(row, wrong) for row in fit.out_of_fold], axis=0)
    return {metric: fit.ranking(how) for metric, how in metrics.items()}, curve


def _row(name: str, metric: str, ranked: Mapping[str, Mapping[str, Ranking]]) -> dict[str, Any]:
    one, control = ranked[name][metric], CONTROL if metric in RANKED else FITTED_CONTROL
    sign = -1 if metric in LOW_IS_GOOD else 1
    values, gains = _ends(one), (np.nan,) * 3
    if name != control:
        value, *ends = (sign * end + 0.0 for end in _ends(one.minus(ranked[control][metric])))  # no −0
        gains = (value, min(ends), max(ends))
    return dict(zip(COLUMNS, (name, metric, *values, one.n, *gains), strict=True))


def _ends(one: Ranking) -> tuple[float, float, float]:
    try:
        interval = one.interval()
    except UndefinedStatisticError:
        return (np.nan,) * 3
    return interval.value, interval.low, interval.high


def _warnings(table: pd.DataFrame) -> list[str]:
    """What the AUROCs say in words: which scores point the wrong way, add nothing, or lose on the control."""
    texts = []
    for row in table[table["metric"] == "auroc"].to_dict("records"):
        name, low, high = row["score"], row["low"], row["high"]
        interval, gain = (shown((row[name] for name in names), 2) for names in (VALUE, GAIN))
        if high < 0.5:
            texts.append(f"{name} points the wrong way: AUROC {interval}; it is high where answers are right")
            continue
        if low <= 0.5:
            texts.append(f"{name} cannot be distinguished from chance: AUROC {interval}")
        if row["gain_high"] < 0:
            texts.append(f"{name} is worse than the plain negative log-likelihood: gain in AUROC {gain}")
        elif row["gain_low"] <= 0:
            texts.append(f"{name} shows no gain over the plain negative log-likelihood: gain in AUROC {gain}")
    return texts


# ---- columns -------------------------------------------------------------------------------------------------------


def labelled(table: pd.DataFrame, right: str) -> tuple[pd.DataFrame, NDArray[np.bool_], list[str]]:
    """Return the rows that have scores, whether their answers are wrong, and what a reader has to know of them.

    The rows are numbered from 0, as in the given table. Raises ValueError as `evaluate`.
    """
    scored = with_scores(table)
    require.one_of("right", right, map(str, scored))
    wrong = np.array([not _is_right(right, row, cell) for row, cell in scored[right].items()], dtype=bool)
    counts = f"{(~wrong).sum()} right and {wrong.sum()} wrong answers"
    if not len(wrong) or wrong.all() or not wrong.any():
        raise ValueError(f"{right}: {counts} given{' beside errors' * (len(wrong) < len(table))}, some of both wanted")
    warnings = []
    if failed := len(table) - len(scored):
        warnings.append(f"{failed} of {len(table)} rows have no scores and are left out; column error says why")
    if "straddles" in scored and (straddling := int(scored["straddles"].map(_is_true).sum())):
        why = "one token has characters of prompt and answer, tokenised apart; end no prompt with a space"
        warnings.append(f"{straddling} of {len(scored)} rows straddle and are counted: {why}")
    if not evaluation.enough_of_both(wrong):
        least = evaluation.MIN_PER_CLASS
        warnings.append(f"too few for intervals to hold: {counts}; at least {least} of each wanted")
    return scored, wrong, warnings


def clusters_of(table: pd.DataFrame, name: str | None) -> NDArray[Any] | None:
    """Return the column that says which rows belong together, (row,), None where none is named.

    Raises ValueError for a missing column, and for an empty cell (by row).
    """
    if name is None:
        return None
    require.one_of("clusters", name, map(str, table))
    if len(empty := np.flatnonzero(table[name].isna() | (table[name].astype(str) == ""))):
        row = table.index[empty[0]] + 1
        raise ValueError(f"{name}: an empty cell given in row {row}, the name of its cluster wanted")
    return table[name].astype(str).to_numpy()


def with_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without an `error`, numbered from 0 as in the given table."""
    if not isinstance(table, pd.DataFrame) or table.columns.map(str).has_duplicates:
        raise ValueError(f"table: {type(table).__name__} given, a DataFrame whose columns differ in their names wanted")
    numbered = table.reset_index(drop=True).rename(columns=str)
    return numbered[numbered["error"].isna() | (numbered["error"] == "")] if "error" in numbered else numbered


def _is_true(cell: Any) -> bool:
    return str(cell).strip().casefold() in ("true", "1", "1.0", "yes")


def _is_right(name: str, row: Any, cell: Any) -> bool:
    if not _is_true(cell) and str(cell).strip().casefold() not in ("false", "0", "0.0", "no"):
        raise ValueError(f"{name}: {cell!r} given in row {row + 1}, true or false (1 or 0, yes or no) wanted")
    return _is_true(cell)


def numbers_of(table: pd.DataFrame, name: str) -> Column:
    """Return a column as float64, (row,). Raises ValueError for a missing column, and for a cell that is no number."""
    require.one_of("column", name, map(str, table))
    column = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    if len(bad := np.flatnonzero(~np.isfinite(column))):
        row, cell = table.index[bad[0]] + 1, table[name].iloc[bad[0]]
        given = f"{cell:g}" if isinstance(cell, float) else repr(cell)
        raise ValueError(f"{name}: {given} given in row {row}, a finite number wanted; remove {len(bad)} such rows")
    return column


def log_p(table: pd.DataFrame) -> Column:
    """Return log p under the aggregation that made the table, told from `probability`, (row,), in nats."""
    total = numbers_of(table, "log_prob")
    if "probability" not in table:
        return total
    probability = numbers_of(table, "probability")
    for log_probability in (total, total / numbers_of(table, "n_tokens")):
        if np.allclose(np.exp(log_probability), probability, rtol=1e-6, atol=0):
            return log_probability
    return np.log(np.maximum(probability, np.finfo(float).tiny))


def log_aleatoric(table: pd.DataFrame) -> Column:
    """Return log U_A = log p + log(1 − p), (row,); where `aleatoric` is a mean over tokens, its logarithm."""
    given, log_probability = numbers_of(table, "aleatoric"), log_p(table)
    from_p = log_probability + np.log(np.maximum(-np.expm1(log_probability), 2.0**-53))
    if np.allclose(np.exp(from_p), given, rtol=1e-6, atol=1e-15):
        return from_p  # finite where U_A underflows
    return np.log(np.maximum(given, np.finfo(float).tiny))


SCORES: dict[str, Callable[[pd.DataFrame], Column]] = {  # high = wrong
    CONTROL: lambda table: -numbers_of(table, "log_prob"),
    "likelihood_per_token": lambda table: -numbers_of(table, "log_prob") / numbers_of(table, "n_tokens"),
    "epistemic": lambda table: numbers_of(table, "log_epistemic"),
    "aleatoric": log_aleatoric,
    "log_gradient": lambda table: numbers_of(table, "log_epistemic") - 2 * log_p(table),
}


def score_of(table: pd.DataFrame, name: str) -> Column:
    """Return one of SCORES, or a column of the table as it is, (row,). Raises ValueError as `numbers_of`."""
    require.one_of("scores", name, itertools.chain([*SCORES, "combined"], map(str, table)))
    return SCORES.get(name, functools.partial(numbers_of, name=name))(table)


def features_of(table: pd.DataFrame, name: str) -> Column:
    """Return what a fit of a score is made of, (row, feature): log U_E and log U_A for "combined"."""
    names = ("epistemic", "aleatoric") if name == "combined" else (name,)
    return np.column_stack([score_of(table, one) for one in names])
