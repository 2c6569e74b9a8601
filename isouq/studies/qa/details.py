"""Beside the chapter's main table: other judges, a true choice, layers, and what a second of compute buys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from isouq.studies import evaluation
from isouq.studies.evaluation import Interval, Ranking, UndefinedStatisticError
from isouq.studies.fits import Fit
from isouq.studies.qa.across import result_of
from isouq.studies.qa.analysis import HEADLINE, Analysis, accuracy, last_layers, scored
from isouq.studies.results import Result

JUDGED = {"likelihood": "likelihood", "epistemic": f"log_epistemic_{HEADLINE}", "p_true": "p_true"}
STAGES = {  # what has to be computed for each score, after the answer itself
    "likelihood": ("cheap",),
    "token_entropy": ("cheap",),
    "embedding_gradient": ("cheap",),
    "aleatoric": ("cheap",),
    "epistemic": ("estimate",),
    "combined": ("estimate",),
    "last_layers": ("estimate",),
    "naive_entropy": ("sample",),
    "semantic_entropy": ("sample", "meaning"),
    "p_true": ("sample", "p_true"),
}


def judges(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each verdict on the same answers: the study's own, and by token F1, ROUGE-L or entailment.

    Columns: judge; right, the share; kappa, Cohen's κ with the study's own verdict; length, Spearman's ρ of "right"
    with the answer's number of tokens; auroc_S for each S of JUDGED that the table has. NaN where it is not defined.
    """
    names = ["right", *(name for name in map(str, table) if re.fullmatch("right_by_(f1|rouge|entailment)", name))]
    rows = []
    for name in names:
        used = scored(table)
        right = used[name].astype(bool).to_numpy()
        row: dict[str, Any] = {
            "judge": name.removeprefix("right_by_").replace("right", "own"),
            "right": accuracy(table, name).value,
        }
        row["kappa"] = cohen_kappa_score(table["right"].astype(bool), table[name].astype(bool))
        row["length"] = _defined(evaluation.spearman, right.astype(float), used["n_tokens"])
        for score, column in JUDGED.items():
            if column in used:
                enough = evaluation.enough_of_both(~right)
                row[f"auroc_{score}"] = evaluation.auroc(used[column], ~right) if enough else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _defined(statistic: Any, *columns: Any) -> float:
    try:
        return float(statistic(*columns))
    except UndefinedStatisticError:
        return np.nan


def choice(table: pd.DataFrame, analysis: Analysis) -> dict[str, Ranking]:
    """Return rankings of the estimates under a true choice, p_c = softmax over the reference answers.

    epistemic, aleatoric and minus_log_p are raw, combined is fitted on the logs of both. Right and wrong are those of
    the reference that is likeliest on the bare prompt. Empty where too few are right or wrong.
    """
    used = table[table["log_p_choice"].notna()]
    wrong = ~used["right_as_choice"].astype(bool).to_numpy()
    if not evaluation.enough_of_both(wrong):
        return {}
    plan = analysis.resamples(used)
    features = used[["log_epistemic_choice", "log_aleatoric_choice"]]
    raw = {"epistemic": features.iloc[:, 0], "aleatoric": features.iloc[:, 1], "minus_log_p": -used["log_p_choice"]}
    ranked = {name: evaluation.ranking(score.to_numpy(), wrong, plan) for name, score in raw.items()}
    return ranked | {"combined": Fit.of(features.to_numpy(), wrong, plan, n_folds=analysis.n_folds).ranking()}


def layers(table: pd.DataFrame, analysis: Analysis) -> tuple[pd.DataFrame, Interval | None]:
    """Return the AUROC of log U_E over each block's parameters of each kind, and that of the last five blocks less all.

    The table has columns block (−1 outside blocks), kind, auroc and share, the mean share of U_E. The difference is
    paired; None where too few are right or wrong.
    """
    used = scored(table)
    wrong, whole = used["wrong"].to_numpy(dtype=bool), used[f"log_epistemic_{HEADLINE}"].to_numpy()
    if not evaluation.enough_of_both(wrong):
        return pd.DataFrame(columns=["block", "kind", "auroc", "share"]), None
    rows = []
    for name in (str(name) for name in used if str(name).startswith("layer:")):
        block, _, kind = name.removeprefix("layer:").rpartition(".")
        values = used[name].to_numpy()
        share = float(np.exp(values - whole).mean())
        rows.append({"block": int(block or -1), "kind": kind, "auroc": evaluation.auroc(values, wrong), "share": share})
    plan = analysis.resamples(used)
    last, every = (evaluation.ranking(score, wrong, plan) for score in (last_layers(used), whole))
    return pd.DataFrame(rows), last.minus(every).interval()


def costs(table: pd.DataFrame, rankings: Mapping[str, Ranking]) -> pd.DataFrame:
    """Return what a question's score costs and how well it ranks: method, seconds, value, low, high.

    seconds: the mean over questions of the stages that the score needs after the answer, as they ran in batches.
    """
    rows = []
    for name, stages in STAGES.items():
        if name in rankings:
            interval = rankings[name].interval()
            seconds = sum(float(table[f"seconds_{stage}"].mean()) for stage in stages)
            ends = {"value": interval.value, "low": interval.low, "high": interval.high}
            rows.append({"method": name, "seconds": seconds, **ends})
    return pd.DataFrame(rows)


def named_results(table: pd.DataFrame, subject: str, analysis: Analysis) -> dict[str, Result]:
    """Return the named results of one `subject`, "<model>.<data set>", about judges, layers, cost and a true choice."""
    prefix = f"qa.{subject}"
    results: dict[str, Result] = {}
    for row in judges(table).iloc[1:].to_dict("records"):
        for metric in ("right", "kappa", "auroc_likelihood", "auroc_epistemic"):
            if not np.isnan(row.get(metric, np.nan)):
                results[f"{prefix}.judge.{row['judge']}.{metric}"] = Result(value=row[metric], n=len(table))
    if "log_p_choice" in table:
        for name, one in choice(table, analysis).items():
            results[f"{prefix}.{name}_choice.auroc"] = result_of(one, "p is the softmax over references, bare prompt")
    if any(str(name).startswith("layer:") for name in table):
        gap = layers(table, analysis)[1]
        if gap is not None:
            results[f"{prefix}.last_layers.auroc_of_u_e_over_all"] = result_of(gap, "paired")
    for stage in ("estimate", "sample", "p_true"):
        seconds = table[f"seconds_{stage}"].mean()
        if not np.isnan(seconds):
            results[f"{prefix}.{stage}.seconds"] = Result(value=float(seconds), unit="s", n=len(table))
    return results
