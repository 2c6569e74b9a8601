"""What the scores say about right and wrong answers: the chapter's tables and its named results.

Declared after a first look at another model: the headline aggregation is `sequence`, the literal reading of p(y|x),
and its keys have no suffix. "epistemic" and "aleatoric" are the raw estimates, high = wrong. A suffix _fitted means
through a logistic regression, on the same folds and resamples for every score; "combined" is that of log U_E and
log U_A, which as a pair have no raw form. The claims compare it with raw rivals, as the paper does; FAIR are these
rivals, and the length, with a fit of their own, added when the numbers of the raw ones were known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from isouq.studies import evaluation, fits, require
from isouq.studies.evaluation import Column, Interval, Ranking, Resamples, UndefinedStatisticError
from isouq.studies.fits import Fit
from isouq.studies.results import Result

HEADLINE = "sequence"
AGGREGATIONS = ("sequence", "geometric", "token_mean")
WITHIN = {"epistemic": "log_epistemic_sequence", "log_gradient": "log_gradient", "likelihood": "likelihood"}
RIVALS = ("p_true", "semantic_entropy", "naive_entropy")  # columns of the table, high = wrong, where a study has them
CHEAP = ("semantic_entropy_discrete", "distinct_samples", "lowest_token", "token_entropy", "embedding_gradient")
FAIR = tuple(f"{name}_fitted" for name in (*RIVALS, "length"))
CONTROLS = ("likelihood_fitted", "likelihood_length_fitted", "likelihood_length_gradient_fitted")

# Columns of a number and the ends of its interval.
VALUE = ("value", "low", "high")
GAIN = ("versus_likelihood", "versus_likelihood_low", "versus_likelihood_high")
COEFFICIENT, LOG_SCORE = ("coefficient", "coefficient_low", "coefficient_high"), ("gain", "gain_low", "gain_high")

NO_COMMENT = "I have no comment."  # TruthfulQA counts it as true, and its official prompt shows it
RELATION = re.compile(
    r"The (?P<of>country of citizenship|.+?) (?:of|by|in) .+ is$|.+ (?P<verb>(?:is|shares) .+ (?:in|of|with))$"
)


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

    def resamples(self, table: pd.DataFrame) -> Resamples:
        """Draw resamples of the table's questions, by `cluster` where it has such a column.

        They go by the questions' ids, or the clusters' names, so that several models' answers are resampled together,
        whatever other questions each was asked or left empty.
        """
        options = {"n_resamples": self.n_resamples, "seed": self.seed}
        return Resamples.of(table["wrong"], clusters=table.get("cluster", table["item_id"]), by_name=True, **options)


def if_defined(statistic: Callable[..., Any], *given: Any, otherwise: Any = None, **how: Any) -> Any:
    """Return what a statistic gives, or `otherwise` where it is not defined."""
    try:
        return statistic(*given, **how)
    except UndefinedStatisticError:
        return otherwise


def clustered(table: pd.DataFrame, data_set: str) -> pd.DataFrame:
    """Return the table with a column `cluster` where its questions come in kinds: the relations of Wikidata.

    "The country of Ahvaz is" and "The country of Białystok is" share one, and errors with it; they are resampled
    together. A statement of no known form is a cluster of its own. Other sets come back as they are.
    """
    if data_set != "wikidata":
        return table
    matches = {text: RELATION.match(text) for text in table["question"]}
    names = {text: (match["of"] or match["verb"]) if match else text for text, match in matches.items()}
    return table.assign(cluster=table["question"].map(names))


def scored(table: pd.DataFrame, aggregation: str = HEADLINE) -> pd.DataFrame:
    """Return the rows that this aggregation scored: no empty answers, and for token_mean those it was asked."""
    require.one_of("aggregation", aggregation, AGGREGATIONS)
    return table[table[f"log_epistemic_{aggregation}"].notna()]


def has_enough(table: pd.DataFrame) -> bool:
    """Whether right and wrong answers are enough for a number: each also in two clusters, or no fold could do without.

    A model that knows the capitals and nothing else has right answers in one relation.
    """
    alone = "cluster" in table and table.groupby("wrong")["cluster"].nunique().min() < 2
    return evaluation.enough_of_both(table["wrong"]) and not alone


def rankings(table: pd.DataFrame, aggregation: str, analysis: Analysis) -> dict[str, Ranking]:
    """Return the ranking of every score of an aggregation by name, all on the same resamples and folds.

    Raw: aleatoric, epistemic, and minus_log_prob (−S), which raw scores are compared with. Fitted: aleatoric_fitted,
    epistemic_fitted, combined, and the control likelihood_fitted (log p). With the headline also combined_curved (the
    pair with squares and product) and what has no aggregation: likelihood (−S), likelihood_per_token (−S/L),
    log_gradient (log G), length (L), those of RIVALS and CHEAP that the table has, last_layers (log G over the last
    five blocks alone), FAIR, and the controls on (log p, log L) and (log p, log L, log G).

    Raises ValueError as `scores`.
    """
    raw, fitted = scores(table, aggregation)
    wrong, plan = table["wrong"].to_numpy(dtype=bool), analysis.resamples(table)
    ranked = {name: evaluation.ranking(score, wrong, plan) for name, score in raw.items()}
    return ranked | {
        name: Fit.of(features, wrong, plan, n_folds=analysis.n_folds).ranking() for name, features in fitted.items()
    }


def scores(table: pd.DataFrame, aggregation: str = HEADLINE) -> tuple[dict[str, Column], dict[str, Column]]:
    """Return the raw scores (question,) that `rankings` ranks, and the features (question, feature) that it fits.

    Raises ValueError for a score that a question lacks, by the question's id.
    """
    require.one_of("aggregation", aggregation, AGGREGATIONS)
    log_u = table[[f"log_aleatoric_{aggregation}", f"log_epistemic_{aggregation}"]].to_numpy()
    control = np.column_stack([table["log_prob"], np.log(table["n_tokens"]), table["log_gradient"]])
    raw: dict[str, Any] = {"aleatoric": log_u[:, 0], "epistemic": log_u[:, 1], "minus_log_prob": table["likelihood"]}
    fitted = {"aleatoric_fitted": log_u[:, :1], "epistemic_fitted": log_u[:, 1:], "combined": log_u}
    fitted[CONTROLS[0]] = control[:, :1]
    if aggregation == HEADLINE:
        fitted |= {CONTROLS[1]: control[:, :2], CONTROLS[2]: control, "combined_curved": curved(log_u)}
        raw |= {"likelihood": table["likelihood"], "likelihood_per_token": table["likelihood"] / table["n_tokens"]}
        raw |= {"log_gradient": table["log_gradient"], "length": table["n_tokens"]}
        raw |= {name: table[name] for name in (*RIVALS, *CHEAP) if name in table}
        if any(str(name).startswith("layer:") for name in table):
            raw["last_layers"] = last_layers(table) - 2 * table["log_prob"].to_numpy()
        by_itself = {name: name.removesuffix("_fitted") for name in FAIR}
        fitted |= {name: np.asarray(raw[of], float)[:, None] for name, of in by_itself.items() if of in raw}
    columns = {name: np.asarray(score, float) for name, score in raw.items()}
    for name, column in columns.items():
        if len(lacking := table["item_id"][~np.isfinite(column)]):
            where = f"{len(lacking)} of {len(table)} questions, the first {lacking.iloc[0]!r}"
            raise ValueError(f"{name}: NaN or infinite at {where}; a score for each wanted")
    return columns, fitted


def curved(features: ArrayLike) -> Column:
    """Return features (question, feature) with their squares and products, all of the standardised ones.

    A plane through log U_E and log U_A cannot follow p beyond one half, where both fall again; this can.
    """
    centred = stats.zscore(require.numbers("features", features, 2), axis=0)
    first, second = np.triu_indices(centred.shape[1])
    return np.column_stack([centred, centred[:, first] * centred[:, second]])


def last_layers(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return log U_E over the parameters of the last five blocks alone, (example,).

    Grad Detect (arXiv 2606.24790) takes gradients of the last five layers; which norm and of what is our reading.
    """
    blocks = table.columns.str.extract(r"^layer:(\d+)\.", expand=False).astype(float)
    return special.logsumexp(table.loc[:, blocks > np.nanmax(blocks) - 5].to_numpy(), axis=1)


def rank(table: pd.DataFrame, analysis: Analysis) -> dict[str, dict[str, Ranking]]:
    """Return the `rankings` of each aggregation that has answers; none where too few of them are right or wrong."""
    ranked: dict[str, dict[str, Ranking]] = {}
    for aggregation in AGGREGATIONS:
        used = scored(table, aggregation)
        if len(used):  # token_mean may have been asked of no question
            ranked[aggregation] = rankings(used, aggregation, analysis) if has_enough(used) else {}
    return ranked


def auroc_table(table: pd.DataFrame, ranked: Mapping[str, Mapping[str, Ranking]]) -> pd.DataFrame:
    """Return the AUROC for "the answer is wrong" of every score, one row each, with its interval.

    `ranked` is what `rank` makes of the table.

    Columns: method, aggregation, value, low, high, n, n_wrong, note, and versus_likelihood(_low, _high), the paired
    difference to the likelihood on the same questions: raw scores against −S, fitted ones against a fit on log p. Where
    right or wrong answers are fewer than `evaluation.MIN_PER_CLASS` the numbers are NaN and `note` says so.
    """
    rows = []
    for aggregation, of_scores in ranked.items():
        wrong = require.labels("wrong", scored(table, aggregation)["wrong"])
        row = {"aggregation": aggregation, "n": len(wrong), "n_wrong": int(wrong.sum()), "note": ""}
        if not of_scores:
            row["note"] = f"too few: {(~wrong).sum()} right, {wrong.sum()} wrong"
            names = ("aleatoric", "epistemic", "aleatoric_fitted", "epistemic_fitted", "combined")
            rows += [{"method": name, **row, **_columns(None)} for name in names]
        for name, one in of_scores.items():
            control = of_scores["minus_log_prob" if one.jackknife is not None else CONTROLS[0]]
            if name != "minus_log_prob":
                gain = if_defined(one.minus(control).interval)
                rows.append({"method": name, **row, **_columns(if_defined(one.interval)), **_columns(gain, GAIN)})
    return pd.DataFrame(rows, columns=["method", "aggregation", "n", "n_wrong", "note", *VALUE, *GAIN])


def _columns(interval: Interval | None, names: tuple[str, str, str] = VALUE) -> dict[str, Any]:
    found = (interval.value, interval.low, interval.high) if interval else (np.nan,) * 3
    return dict(zip(names, found, strict=True))


def within(table: pd.DataFrame, analysis: Analysis) -> pd.DataFrame:
    """Return the AUROC of raw scores with the answer's probability held fixed, and with its length: is anything left?

    length: over pairs of answers with exactly as many tokens. probability: of the ranks that are left once a smooth
    curve in log p is taken off. both: the same with log p and L. Columns: method, within, value, low, high, n, n_pairs;
    NaN where too few are right or wrong, where all lengths are the same, and where the score is a function of what is
    held fixed.
    """
    used = scored(table)
    wrong = require.labels("wrong", used["wrong"], least=0)
    plan = analysis.resamples(used) if evaluation.enough_of_both(wrong) else None
    rows = []
    for by, given in {"length": ["n_tokens"], "probability": ["log_prob"], "both": ["log_prob", "n_tokens"]}.items():
        for method, column in WITHIN.items():
            interval = if_defined(_fixed, used, column, given, plan) if plan else None
            pairs = evaluation.n_pairs(wrong, used["n_tokens"]) if by == "length" and len(used) else np.nan
            rows.append({"method": method, "within": by, **_columns(interval), "n": len(used), "n_pairs": pairs})
    return pd.DataFrame(rows)


def _fixed(table: pd.DataFrame, column: str, given: list[str], plan: Resamples) -> Interval:
    if given == ["n_tokens"]:
        return evaluation.stratified_ranking(table[column], table["wrong"], table["n_tokens"], plan).interval()
    left = fits.residual_ranks(table[column].to_numpy(), table[given].to_numpy(float))
    return evaluation.ranking(left, table["wrong"].to_numpy(), plan).interval()


def added_signal(table: pd.DataFrame, analysis: Analysis) -> pd.DataFrame:
    """Return what log U_E adds to log p and log L in a logistic regression, for each aggregation with its own p.

    Columns: aggregation, n; coefficient(_low, _high) of log U_E, in log-odds of being wrong per standard deviation;
    gain(_low, _high), the gain in out-of-sample log score, in nats per answer. No row where too few are right or wrong,
    or where log U_E is linear in the others.
    """
    rows = []
    for aggregation in AGGREGATIONS:
        used = scored(table, aggregation)
        if not has_enough(used):
            continue
        log_p = np.log(used["probability_token_mean"]) if aggregation == "token_mean" else used["log_prob"]
        log_p = log_p / used["n_tokens"] if aggregation == "geometric" else log_p
        base = np.column_stack([log_p, np.log(used["n_tokens"])])
        # Only what is not linear in the others: a ridge would share p's own slope between log p and 2 log p + log G.
        log_u_e = used[f"log_epistemic_{aggregation}"].to_numpy()
        design = np.column_stack([np.ones(len(base)), base])
        extra = log_u_e - design @ np.linalg.lstsq(design, log_u_e, rcond=None)[0]
        if np.abs(extra).max() <= evaluation.CONSTANT * np.abs(log_u_e).max():
            continue
        both = np.column_stack([base, extra])
        plan, wrong = analysis.resamples(used), used["wrong"].to_numpy()
        small, large = (Fit.of(features, wrong, plan, n_folds=analysis.n_folds) for features in (base, both))
        gain = large.ranking(fits.weighted_log_score).minus(small.ranking(fits.weighted_log_score)).interval()
        columns = _columns(large.coefficient(2), COEFFICIENT) | _columns(gain, LOG_SCORE)
        rows.append({"aggregation": aggregation, "n": len(used), **columns})
    names = [*COEFFICIENT, *LOG_SCORE]
    return pd.DataFrame(rows, columns=["aggregation", "n", *names]).astype(dict.fromkeys(names, float))


def agreement(table: pd.DataFrame, analysis: Analysis) -> dict[str, Interval | None]:
    """Return how far U_E and G follow p (Spearman's ρ with log p), and the share of answers with p < ½.

    None for what is not defined: for fewer than five answers, for scores that are all the same.
    """
    used = scored(table)
    options = {"clusters": used.get("cluster"), "n_resamples": analysis.n_resamples, "seed": analysis.seed}
    interval = functools.partial(if_defined, evaluation.bootstrap_interval, evaluation.spearman, **options)
    return {
        "epistemic": interval(used["log_epistemic_sequence"], used["log_prob"]),
        "log_gradient": interval(used["log_gradient"], used["log_prob"]),
        "below_half": _share(used, used["log_prob"] < np.log(0.5)) if len(used) else None,
    }


def accuracy(table: pd.DataFrame, column: str = "right") -> Interval:
    """Return the share of right answers with its 95 % interval: Wilson's, or one over clusters where there are any."""
    return _share(table, require.labels(column, table[column]))


def _share(table: pd.DataFrame, chosen: Any) -> Interval:
    """Return the share of rows that are chosen; answers to questions of one cluster are not so many answers."""
    interval = evaluation.wilson_interval(int(np.sum(chosen)), len(table))
    if "cluster" not in table or not 0 < interval.value < 1 or table["cluster"].nunique() < 5:
        return interval
    return evaluation.bootstrap_interval(np.mean, np.asarray(chosen, float), clusters=table["cluster"])


def named_results(
    table: pd.DataFrame, ranked: Mapping[str, Mapping[str, Ranking]], subject: str, analysis: Analysis
) -> dict[str, Result]:
    """Return the named results of one `subject`, "<model>.<data set>"; what is undefined has no key.

    `ranked` is what `rank` makes of the table.
    """
    prefix, aurocs = f"qa.{subject}", auroc_table(table, ranked)
    results = {f"{prefix}.accuracy": result_of(accuracy(table), _SHARE)}
    if "right_by_mean" in table:
        results[f"{prefix}.by_mean.accuracy"] = result_of(accuracy(table, "right_by_mean"), _SHARE)
        chance = float(table["right_by_chance"].mean())
        results[f"{prefix}.by_chance.accuracy"] = Result(value=chance, n=len(table))
        results |= _committed_results(table, prefix, analysis)
    results[f"{prefix}.failed.count"] = Result(value=float(len(table.attrs.get("failed", ()))), n=len(table))
    results[f"{prefix}.empty.count"] = Result(value=float(table["empty"].sum()), n=len(table))
    for row in aurocs.dropna(subset=["value"]).to_dict("records"):
        method, fitted, _ = row["method"].partition("_fitted")
        suffix = "" if row["aggregation"] == HEADLINE else f"_{row['aggregation']}"
        key = f"{prefix}.{method}{suffix}{fitted}"
        claim = {"truthfulqa_choose": "C6", "triviaqa": "C7"}.get(subject.split(".")[-1])
        results[f"{key}.auroc"] = _of_row(row, claim=claim)
        if row["method"] not in ("likelihood", CONTROLS[0]):
            results[f"{key}.auroc_gain"] = _of_row(row, GAIN, "paired with likelihood")
    for row in within(table, analysis).dropna(subset=["value"]).to_dict("records"):
        metric = "auroc_within_length" if row["within"] == "length" else f"auroc_given_{row['within']}"
        results[f"{prefix}.{row['method']}.{metric}"] = _of_row(row)
        if row["within"] == "length":
            results[f"{prefix}.within_length.pairs"] = Result(value=int(row["n_pairs"]), n=row["n"])
    for row in added_signal(table, analysis).to_dict("records"):
        key, note = f"{prefix}.epistemic_{row['aggregation']}", "refitted in every resample"
        results[f"{key}.coefficient_given_p_and_length"] = _of_row(row, COEFFICIENT, note)
        results[f"{key}.log_score_gain"] = _of_row(row, LOG_SCORE, note)
    results |= _compared(table, prefix, ranked.get(HEADLINE, {}))
    for method, interval in agreement(table, analysis).items():
        key, note = ("share", _SHARE) if method == "below_half" else ("spearman_with_log_prob", _INTERVAL)
        if interval is not None:
            results[f"{prefix}.{method}.{key}"] = result_of(interval, note)
    return results


def _compared(table: pd.DataFrame, prefix: str, ranked: Mapping[str, Ranking]) -> dict[str, Result]:
    """Return the combined estimate minus each rival and control, paired, with max-t and the questions they take."""
    if not ranked:
        return {}
    used = scored(table)
    gaps = {name: ranked["combined"].minus(ranked[name]) for name in (*RIVALS, *CONTROLS) if name in ranked}
    n, note = len(used), "paired, refitted in every resample"
    results = {f"{prefix}.combined.auroc_over_{name}": result_of(gap, note) for name, gap in gaps.items()}
    results[f"{prefix}.combined.max_t"] = Result(value=evaluation.max_t(list(gaps.values())), n=n)
    # Where P(True) is not run log G stands in for it, a score of another kind than the combined one.
    rival = ranked.get("p_true", ranked["log_gradient"])
    spread = float(np.nanstd(ranked["combined"].minus(rival).draws) * np.sqrt(n))
    alone = fits.auroc_spread(0.575, float(used["wrong"].mean()))
    results[f"{prefix}.power.paired_008"] = Result(value=fits.questions_needed(0.08, spread), unit="questions")
    results[f"{prefix}.power.chance_060_055"] = Result(value=fits.questions_needed(0.05, alone), unit="questions")
    return results


def _committed_results(table: pd.DataFrame, prefix: str, analysis: Analysis) -> dict[str, Result]:
    """Return how often the answer was NO_COMMENT, and the headline AUROCs (suffix _committed) without those."""
    committed = table[table["answer"] != NO_COMMENT]
    share = evaluation.wilson_interval(len(table) - len(committed), len(table))
    results = {f"{prefix}.no_comment.share": result_of(share, "Wilson")}
    enough = has_enough(scored(committed))
    aurocs = auroc_table(committed, {HEADLINE: rankings(scored(committed), HEADLINE, analysis)} if enough else {})
    for row in aurocs.dropna(subset=["value"]).to_dict("records"):
        results[f"{prefix}.{row['method']}_committed.auroc"] = _of_row(row)
    return results


_INTERVAL = "95 % bootstrap over questions"
_SHARE = "Wilson, or bootstrap over clusters of questions"


def result_of(one: Ranking | Interval, note: str) -> Result:
    """Return a statistic with its interval as a named result."""
    interval = one.interval() if isinstance(one, Ranking) else one
    return Result(**_columns(interval), n=interval.n, note=note)


def _of_row(
    row: Mapping[Any, Any], names: tuple[str, str, str] = VALUE, note: str = _INTERVAL, claim: str | None = None
) -> Result:
    """A table's row as a named result; `names`: the columns of the value and its ends."""
    value, low, high = (row[name] for name in names)
    return Result(value=value, low=low, high=high, n=row["n"], claim=claim, note=note)
