"""What the scores say about right and wrong answers: the chapter's tables and its named results.

Declared before any result was seen: the headline aggregation is `sequence`, the literal reading of p(y|x),
and its keys have no suffix. "epistemic" and "aleatoric" are the raw estimates, high = wrong (suffix _fitted
for the same through a logistic regression); "combined" is the logistic regression on log U_E and log U_A,
as a pair it has no raw form. Fitted scores are out of fold; their intervals are over questions, with the
fits held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from isouq.studies import evaluation, require
from isouq.studies.evaluation import Interval, UndefinedStatisticError
from isouq.studies.results import Result

HEADLINE = "sequence"
AGGREGATIONS = ("sequence", "geometric", "token_mean")
SHOWN = ("aleatoric", "epistemic", "combined", "likelihood", "log_gradient", "length")
WITHIN = {"epistemic": "log_epistemic_sequence", "log_gradient": "log_gradient", "likelihood": "likelihood"}
NO_COMMENT = "I have no comment."  # TruthfulQA counts it as true, and its official prompt shows it
N_BINS = 4  # quantile bins of probability and of length

# The paper's Table 2: AUROC, mean and standard deviation of 300 bootstrap runs over its four language models.
_METHODS = ("p_true", "semantic_entropy", "naive_entropy", "aleatoric", "epistemic", "combined")
_MEANS_AND_STDS = {
    "triviaqa": ((0.69, 0.06), (0.55, 0.03), (0.52, 0.04), (0.60, 0.04), (0.52, 0.07), (0.61, 0.05)),
    "truthfulqa": ((0.55, 0.06), (0.54, 0.08), (0.51, 0.08), (0.60, 0.09), (0.55, 0.07), (0.63, 0.08)),
}
PAPER_TABLE_2 = {name: dict(zip(_METHODS, numbers, strict=True)) for name, numbers in _MEANS_AND_STDS.items()}


@dataclass(frozen=True)
class Analysis:
    """How intervals and fits are made: bootstrap resamples, folds of the logistic regression, seed.

    Raises ValueError for fewer resamples than a 95 % interval takes, and for more folds than
    `evaluation.MIN_PER_CLASS`, which could not all have right and wrong answers.
    """

    n_resamples: int = evaluation.N_RESAMPLES
    n_folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require.count("n_resamples", self.n_resamples, 40), require.seed("seed", self.seed)
        require.count("n_folds", self.n_folds, 2, evaluation.MIN_PER_CLASS)

    def interval(self, statistic: Any, *columns: Any) -> Interval | None:
        """Return `statistic(*columns)` with its percentile bootstrap interval over questions, None if undefined."""
        try:
            return evaluation.bootstrap_interval(statistic, *columns, n_resamples=self.n_resamples, seed=self.seed)
        except UndefinedStatisticError:
            return None


def scored(table: pd.DataFrame, aggregation: str = HEADLINE) -> pd.DataFrame:
    """Return the rows that this aggregation scored: no empty answers, and for token_mean those it was asked."""
    require.one_of("aggregation", aggregation, AGGREGATIONS)
    return table[table[f"log_epistemic_{aggregation}"].notna()]


def score_columns(table: pd.DataFrame, aggregation: str, analysis: Analysis) -> dict[str, np.ndarray]:
    """Return every score of an aggregation by name, high = wrong; `table` holds only scored rows.

    Raw: aleatoric, epistemic. Fitted: aleatoric_fitted, epistemic_fitted, combined. With the headline also
    the controls, which have no aggregation: likelihood (−S), likelihood_per_token (−S/L), log_gradient (log
    G), length (L).
    """
    require.one_of("aggregation", aggregation, AGGREGATIONS)
    features = table[[f"log_aleatoric_{aggregation}", f"log_epistemic_{aggregation}"]].to_numpy()
    scores = dict(zip(("aleatoric", "epistemic"), features.T, strict=True))
    for name, used in (("aleatoric_fitted", [0]), ("epistemic_fitted", [1]), ("combined", [0, 1])):
        scores[name] = evaluation.out_of_fold_scores(
            features[:, used], table["wrong"].to_numpy(), n_folds=analysis.n_folds, seed=analysis.seed
        )
    if aggregation == HEADLINE:
        scores |= {
            "likelihood": table["likelihood"].to_numpy(),
            "likelihood_per_token": (table["likelihood"] / table["n_tokens"]).to_numpy(),
            "log_gradient": table["log_gradient"].to_numpy(),
            "length": table["n_tokens"].to_numpy(float),
        }
    return scores


def auroc_table(table: pd.DataFrame, analysis: Analysis) -> pd.DataFrame:
    """Return the AUROC for "the answer is wrong" of every score, one row each, with its interval.

    Columns: method, aggregation, value, low, high, n, n_wrong, note, and versus_likelihood(_low, _high),
    the paired difference to the AUROC of −S on the same questions. Where right or wrong answers are fewer
    than `evaluation.MIN_PER_CLASS` the numbers are NaN and `note` says so.
    """
    rows = []
    for aggregation in AGGREGATIONS:
        used = scored(table, aggregation)
        if used.empty:  # token_mean, when it was asked of no question
            continue
        wrong = require.labels("wrong", used["wrong"])
        row = {"aggregation": aggregation, "n": len(used), "n_wrong": int(wrong.sum()), "note": ""}
        if not evaluation.enough_of_both(wrong):
            row["note"] = f"too few: {(~wrong).sum()} right, {wrong.sum()} wrong"
            names = ("aleatoric", "epistemic", "aleatoric_fitted", "epistemic_fitted", "combined")
            rows += [{"method": name, **row, "value": np.nan, "low": np.nan, "high": np.nan} for name in names]
            continue
        for name, score in score_columns(used, aggregation, analysis).items():
            found = _columns(analysis.interval(evaluation.auroc, score, wrong), len(used))
            gain = _columns(analysis.interval(_auroc_gain, score, used["likelihood"], wrong), len(used))
            rows.append({"method": name, **row, **found} | dict(zip(_GAIN, gain.values(), strict=False)))
    return pd.DataFrame(rows, columns=["method", "aggregation", "n", "n_wrong", "note", "value", "low", "high", *_GAIN])


_GAIN = ("versus_likelihood", "versus_likelihood_low", "versus_likelihood_high")


def _auroc_gain(score: Any, likelihood: Any, wrong: Any) -> float:
    return evaluation.auroc(score, wrong) - evaluation.auroc(likelihood, wrong)


def within_bins(table: pd.DataFrame, analysis: Analysis) -> pd.DataFrame:
    """Return the AUROC among answers of like probability, and of like length: is anything left to say?

    Bins are quartiles of log p and of L, fixed once on all answers; the value counts only pairs inside a
    bin. Columns: method, within (probability or length), value, low, high, n; NaN when too few are right or
    wrong, or when no bin holds both.
    """
    used = scored(table)
    wrong = require.labels("wrong", used["wrong"], least=0)
    enough = evaluation.enough_of_both(wrong)
    rows = []
    for within, column in (("probability", "log_prob"), ("length", "n_tokens")):
        for method, score in WITHIN.items():
            found = None
            if enough:
                bins = quantile_bins(used[column], N_BINS)
                found = analysis.interval(evaluation.stratified_auroc, used[score], wrong, bins)
            rows.append({"method": method, "within": within, **_columns(found, len(used))})
    return pd.DataFrame(rows)


def quantile_bins(column: ArrayLike, n_bins: int) -> np.ndarray:
    """Return each row's quantile bin, 0 the lowest; equal values share a bin, so there may be fewer."""
    values = require.numbers("column", column)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, require.count("n_bins", n_bins) + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def added_signal(table: pd.DataFrame) -> pd.DataFrame:
    """Return the likelihood-ratio test of log U_E beside log p and log L, for each aggregation.

    Columns: aggregation, statistic (χ², one degree of freedom), p_value, n; no row when too few are right
    or wrong, or when U_E says nothing that the others do not say too.
    """
    rows = []
    for aggregation in AGGREGATIONS:
        used = scored(table, aggregation)
        if not evaluation.enough_of_both(used["wrong"]):
            continue
        log_p = np.log(used["probability_token_mean"]) if aggregation == "token_mean" else used["log_prob"]
        log_p = log_p / used["n_tokens"] if aggregation == "geometric" else log_p
        base = np.column_stack([log_p, np.log(used["n_tokens"])])
        try:
            extra = used[[f"log_epistemic_{aggregation}"]]
            statistic, p_value = evaluation.likelihood_ratio_test(base, extra, used["wrong"])
        except UndefinedStatisticError:
            continue
        rows.append({"aggregation": aggregation, "statistic": statistic, "p_value": p_value, "n": len(used)})
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame, analysis: Analysis) -> dict[str, Interval | None]:
    """Return how far U_E and G follow p (Spearman's ρ with log p), and the share of answers with p < ½.

    None for what is not defined: for fewer than five answers, for scores that are all the same.
    """
    used = scored(table)
    log_p = used["log_prob"]
    return {
        "epistemic": analysis.interval(evaluation.spearman, used["log_epistemic_sequence"], log_p),
        "log_gradient": analysis.interval(evaluation.spearman, used["log_gradient"], log_p),
        "below_half": evaluation.wilson_interval(int((log_p < np.log(0.5)).sum()), len(used)) if len(used) else None,
    }


def accuracy(table: pd.DataFrame, column: str = "right") -> Interval:
    """Return the share of right answers with Wilson's 95 % interval."""
    return evaluation.wilson_interval(int(require.labels(column, table[column]).sum()), len(table))


def named_results(table: pd.DataFrame, aurocs: pd.DataFrame, subject: str, analysis: Analysis) -> dict[str, Result]:
    """Return the named results of one `subject`, "<model>.<data set>"; what is undefined has no key.

    `aurocs` is the `auroc_table` of `table`.
    """
    prefix = f"qa.{subject}"
    results = {f"{prefix}.accuracy": _result(accuracy(table), note="Wilson")}
    if "right_by_mean" in table:
        results[f"{prefix}.by_mean.accuracy"] = _result(accuracy(table, "right_by_mean"), note="Wilson")
        chance = float(table["right_by_chance"].mean())
        results[f"{prefix}.by_chance.accuracy"] = Result(value=chance, n=len(table))
        results |= _committed_results(table, prefix, analysis)
    results[f"{prefix}.empty.count"] = Result(value=float(table["empty"].sum()), n=len(table))
    for row in aurocs.dropna(subset=["value"]).to_dict("records"):
        suffix = "" if row["aggregation"] == HEADLINE else f"_{row['aggregation']}"
        key = f"{prefix}.{row['method'].removesuffix('_fitted')}{suffix}"
        key += "_fitted" if row["method"].endswith("_fitted") else ""
        claim = {"truthfulqa_choose": "C6", "triviaqa": "C7"}.get(subject.split(".")[-1])
        results[f"{key}.auroc"] = _of_row(row, claim=claim)
        if row["method"] != "likelihood":
            gain = dict(zip(("value", "low", "high"), (row[name] for name in _GAIN), strict=True))
            results[f"{key}.auroc_gain"] = Result(**gain, n=row["n"], note="paired with likelihood")
    for row in within_bins(table, analysis).dropna(subset=["value"]).to_dict("records"):
        results[f"{prefix}.{row['method']}.auroc_within_{row['within']}"] = _of_row(row)
    for row in added_signal(table).to_dict("records"):
        key = f"{prefix}.epistemic_{row['aggregation']}.added_signal_p_value"
        results[key] = Result(value=row["p_value"], n=row["n"], note="likelihood-ratio test given log p and log L")
    found = agreement(table, analysis)
    for method, interval in found.items():
        key, note = ("share", "Wilson") if method == "below_half" else ("spearman_with_log_prob", _INTERVAL)
        if interval is not None:
            results[f"{prefix}.{method}.{key}"] = _result(interval, note=note)
    return results


def _committed_results(table: pd.DataFrame, prefix: str, analysis: Analysis) -> dict[str, Result]:
    """Return how often the answer was NO_COMMENT, and the headline AUROCs (suffix _committed) without those."""
    committed = table[table["answer"] != NO_COMMENT]
    share = evaluation.wilson_interval(len(table) - len(committed), len(table))
    results = {f"{prefix}.no_comment.share": _result(share, note="Wilson")}
    aurocs = auroc_table(committed, analysis)
    for row in aurocs[aurocs["aggregation"] == HEADLINE].dropna(subset=["value"]).to_dict("records"):
        results[f"{prefix}.{row['method']}_committed.auroc"] = _of_row(row)
    return results


_INTERVAL = "95 % percentile bootstrap over questions"


def _columns(interval: Interval | None, n: int) -> dict[str, Any]:
    value, low, high = (interval.value, interval.low, interval.high) if interval else (np.nan, np.nan, np.nan)
    return {"value": value, "low": low, "high": high, "n": n}


def _result(interval: Interval, *, note: str) -> Result:
    return Result(**_columns(interval, interval.n), note=note)


def _of_row(row: Mapping[Any, Any], claim: str | None = None) -> Result:
    return Result(**{name: row[name] for name in ("value", "low", "high", "n")}, claim=claim, note=_INTERVAL)


def beside_paper(aurocs: pd.DataFrame, data_set: str) -> pd.DataFrame:
    """Return the headline rows in the order of SHOWN, with a column `paper`: the mean in its Table 2.

    Every data set gives the same rows, NaN where there is no number, so that panels stay aligned.
    """
    published = {name: mean for name, (mean, _) in PAPER_TABLE_2.get(data_set.removesuffix("_choose"), {}).items()}
    headline = aurocs[aurocs["aggregation"] == HEADLINE].set_index("method")
    rows = headline.reindex(SHOWN).rename_axis("method").reset_index()
    return rows.assign(paper=rows["method"].map(published))


def compare(found: Mapping[str, pd.DataFrame], column: str = "value") -> pd.DataFrame:
    """Return one model's `auroc_table`s, keyed by data set, as text: a row per score, a column per data set.

    `column`: "value", with the paper's Table 2 beside it at the headline's rows (what its p(y|x) is, we do not
    know), or "versus_likelihood". Where right or wrong answers are too few the text says how many there are.
    """
    require.one_of("column", column, ("value", "versus_likelihood"))
    if not found:
        raise ValueError("found: no table given, at least one wanted")
    columns = {}
    for data_set, aurocs in found.items():
        rows = aurocs.set_index(["aggregation", "method"])
        columns[data_set] = rows.apply(_as_text, axis=1, column=column)
        published = PAPER_TABLE_2.get(data_set.removesuffix("_choose"), {})
        if column == "value" and published:
            text = {
                (HEADLINE, method): f"{mean:.2f}\u00a0±\u00a0{std:.2f}" for method, (mean, std) in published.items()
            }
            columns[f"paper, {data_set}"] = rows.index.to_series().map(text)
    order = max(found.values(), key=len).set_index(["aggregation", "method"]).index
    return pd.DataFrame(columns).reindex(order).fillna("")


def _as_text(row: pd.Series, column: str) -> str:
    if row["note"]:
        return row["note"]
    low, high = (row[f"{column}_{end}"] if column != "value" else row[end] for end in ("low", "high"))
    sign = "+" if column != "value" else ""
    return f"{row[column]:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]".replace(" ", "\u00a0")
