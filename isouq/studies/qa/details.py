"""Beside the chapter's main table: rejection and calibration, judges, prompts, a true choice, layers, compute."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from isouq.studies import evaluation, fits, rejection
from isouq.studies.evaluation import Column, Interval, Ranking
from isouq.studies.fits import Fit
from isouq.studies.qa import across, analysis
from isouq.studies.qa.analysis import HEADLINE, RIVALS, Analysis, accuracy, if_defined, last_layers, result_of, scored
from isouq.studies.qa.data import key_part
from isouq.studies.results import Result, key_of

Pair = tuple[str, str]  # a model and a data set

JUDGED = {"likelihood": "likelihood", "epistemic": f"log_epistemic_{HEADLINE}", "p_true": "p_true"}
REJECTED = (*RIVALS, "aleatoric", "epistemic", "likelihood")
FITTED = ("combined", "likelihood_fitted")
METRICS = {"prr": rejection.weighted_prr, "aurc": rejection.weighted_aurc}
OF_PROBABILITY = {  # of scores that are probabilities: the fitted ones
    "brier": fits.of_probability(fits.weighted_brier),
    "ece": fits.of_probability(fits.weighted_ece),
}
PROMPTED = ("likelihood", "log_gradient", "epistemic", "aleatoric", "p_true", "combined")
STAGES = {  # what has to be computed for each score, after the answer itself
    **dict.fromkeys(("likelihood", "token_entropy", "embedding_gradient", "aleatoric"), ("cheap",)),
    **dict.fromkeys(("epistemic", "combined", "combined_curved", "last_layers"), ("estimate",)),
    "naive_entropy": ("sample",),
    "semantic_entropy": ("sample", "meaning"),
    "p_true": ("sample", "p_true"),
}


def rejections(table: pd.DataFrame, analysed: Analysis) -> dict[str, dict[str, Ranking]]:
    """Return METRICS of REJECTED, and these and OF_PROBABILITY of FITTED.

    Keyed by score and metric, on the resamples of the AUROCs. Empty where too few are right or wrong.
    """
    used = scored(table)
    if not analysis.has_enough(used):
        return {}
    wrong, plan = used["wrong"].to_numpy(dtype=bool), analysed.resamples(used)
    raw, features = analysis.scores(used)
    found = {
        name: {metric: evaluation.ranking(raw[name], wrong, plan, how) for metric, how in METRICS.items()}
        for name in REJECTED
        if name in raw
    }
    for name in FITTED:
        fit = Fit.of(features[name], wrong, plan, n_folds=analysed.n_folds)
        found[name] = {metric: fit.ranking(how) for metric, how in (METRICS | OF_PROBABILITY).items()}
    return found


def curves(table: pd.DataFrame, analysed: Analysis) -> dict[str, Column]:
    """Return the accuracy of the k most certain answers, (k,), by each of REJECTED and by the pair, out of fold."""
    used = scored(table)
    if not analysis.has_enough(used):
        return {}
    raw, features = analysis.scores(used)
    how: Any = {"clusters": used.get("cluster"), "n_folds": analysed.n_folds, "seed": analysed.seed}
    held_out = fits.cross_fitted(features["combined"], used["wrong"], **how)
    found = {name: rejection.accuracies(raw[name], used["wrong"]) for name in REJECTED if name in raw}
    return found | {"combined": np.mean([rejection.accuracies(row, used["wrong"]) for row in held_out], axis=0)}


def prompts(usual: pd.DataFrame, bare: pd.DataFrame, analysed: Analysis) -> dict[str, dict[str, Interval]]:
    """Return `accuracy` and the AUROCs of PROMPTED with `examples` in the prompt and `bare`, on the same questions.

    `contained` is the share of answers with the reference somewhere in them. No AUROCs with too few right or wrong.
    """
    shared = set(usual["item_id"]) & set(bare["item_id"])
    columns = {}
    for name, table in {"examples": usual, "bare": bare}.items():
        asked = table[table["item_id"].isin(shared)]
        texts = zip(asked["reference"], asked["answer"], strict=True)
        holding = asked.assign(contained=[reference.lower() in answer.lower() for reference, answer in texts])
        columns[name] = {"accuracy": accuracy(asked), "contained": accuracy(holding, "contained")}
        if analysis.has_enough(scored(asked)):
            ranked = analysis.rankings(scored(asked), HEADLINE, analysed)
            columns[name] |= {score: ranked[score].interval() for score in PROMPTED if score in ranked}
    return columns


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
        row["length"] = if_defined(evaluation.spearman, right.astype(float), used["n_tokens"], otherwise=np.nan)
        for score, column in JUDGED.items():
            if column in used:
                enough = evaluation.enough_of_both(~right)
                row[f"auroc_{score}"] = evaluation.auroc(used[column], ~right) if enough else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def choice(table: pd.DataFrame, analysed: Analysis) -> dict[str, Ranking]:
    """Return rankings of the estimates under a true choice, p_c = softmax over the reference answers.

    epistemic, aleatoric and minus_log_p are raw, combined is fitted on the logs of both. Right and wrong are those of
    the reference that is likeliest on the bare prompt. Empty where too few are right or wrong.
    """
    used = table[table["log_p_choice"].notna()]
    wrong = ~used["right_as_choice"].astype(bool).to_numpy()
    if not evaluation.enough_of_both(wrong):
        return {}
    plan = analysed.resamples(used)
    features = used[["log_epistemic_choice", "log_aleatoric_choice"]]
    raw = {"epistemic": features.iloc[:, 0], "aleatoric": features.iloc[:, 1], "minus_log_p": -used["log_p_choice"]}
    ranked = {name: evaluation.ranking(score.to_numpy(), wrong, plan) for name, score in raw.items()}
    return ranked | {"combined": Fit.of(features.to_numpy(), wrong, plan, n_folds=analysed.n_folds).ranking()}


def layers(table: pd.DataFrame, analysed: Analysis) -> tuple[pd.DataFrame, Interval | None]:
    """Return the AUROC of log U_E over each block's parameters of each kind, and that of the last five blocks less all.

    The table has columns block (−1 outside blocks), kind and auroc. The difference is paired; None where too few are
    right or wrong.
    """
    used = scored(table)
    wrong, whole = used["wrong"].to_numpy(dtype=bool), used[f"log_epistemic_{HEADLINE}"].to_numpy()
    if not evaluation.enough_of_both(wrong):
        return pd.DataFrame(columns=["block", "kind", "auroc"]), None
    rows = []
    for name in (str(name) for name in used if str(name).startswith("layer:")):
        block, _, kind = name.removeprefix("layer:").rpartition(".")
        rows.append({"block": int(block or -1), "kind": kind, "auroc": evaluation.auroc(used[name].to_numpy(), wrong)})
    plan = analysed.resamples(used)
    last, every = (evaluation.ranking(score, wrong, plan) for score in (last_layers(used), whole))
    return pd.DataFrame(rows), last.minus(every).interval()


def costs(table: pd.DataFrame, rankings: Mapping[str, Ranking]) -> pd.DataFrame:
    """Return what a question's score costs and how well it ranks: method, seconds, value, low, high.

    seconds: the sum over the stages that the score needs after the answer of each one's median over questions, as they
    ran in batches. A mean would count every pause of a machine that did other work, too.
    """
    rows = []
    for name, stages in STAGES.items():
        if name in rankings:
            interval = rankings[name].interval()
            seconds = sum(float(table[f"seconds_{stage}"].median()) for stage in stages)
            ends = {"value": interval.value, "low": interval.low, "high": interval.high}
            rows.append({"method": name, "seconds": seconds, **ends})
    return pd.DataFrame(rows)


def all_results(
    answers: Mapping[Pair, pd.DataFrame],
    ranked: Mapping[Pair, Mapping[str, Mapping[str, Ranking]]],
    bare: Mapping[Pair, pd.DataFrame],
    analysed: Analysis,
) -> dict[str, Result]:
    """Return every named result of the chapter; `ranked` is what `analysis.rank` makes of each table of `answers`."""
    results: dict[str, Result] = {}
    for data_set in dict.fromkeys(data_set for _, data_set in answers):
        pairs = {key_of(pair[0]): pair for pair in answers if pair[1] == data_set}
        tables = {model: answers[pair] for model, pair in pairs.items()}
        of_models = {model: ranked[pair] for model, pair in pairs.items()}
        results |= across.named_results(tables, of_models, key_part(data_set), analysed)
    for (model, data_set), table in answers.items():
        subject = f"{key_of(model)}.{key_part(data_set)}"
        results |= analysis.named_results(table, ranked[model, data_set], subject, analysed)
        results |= named_results(table, subject, analysed)
    gains = [one for key, one in results.items() if key.endswith(".combined.auroc_gain")]
    low, high = (np.array([getattr(one, end) for one in gains], float) for end in ("low", "high"))
    for name, of in {"pairs": np.isfinite(low), "above": low > 0, "below": high < 0}.items():
        note = "the fitted pair minus the fit on log p: pairs of model and data set, whole intervals above or below 0"
        results[f"qa.gain.combined.{name}"] = Result(value=int(of.sum()), note=note)
    for (model, data_set), table in bare.items():
        prefix = f"qa.{key_of(model)}.{key_part(data_set)}"
        for name, interval in prompts(answers[model, data_set], table, analysed)["bare"].items():
            key = f"bare.{name}" if name in ("accuracy", "contained") else f"{name}_bare.auroc"
            results[f"{prefix}.{key}"] = result_of(interval, "asked without examples")
    return results


def named_results(table: pd.DataFrame, subject: str, analysed: Analysis) -> dict[str, Result]:
    """Return the named results of one `subject`, "<model>.<data set>", about all that this module is about."""
    prefix = f"qa.{subject}"
    results: dict[str, Result] = {}
    for name, of_metrics in rejections(table, analysed).items():
        for metric, one in of_metrics.items():
            results[f"{prefix}.{name}.{metric}"] = result_of(one, "on the resamples of the AUROC")
    for row in judges(table).iloc[1:].to_dict("records"):
        for metric in ("right", "kappa", "auroc_likelihood", "auroc_epistemic"):
            if not np.isnan(row.get(metric, np.nan)):
                results[f"{prefix}.judge.{row['judge']}.{metric}"] = Result(value=row[metric], n=len(table))
    if "log_p_choice" in table:
        for name, one in choice(table, analysed).items():
            results[f"{prefix}.{name}_choice.auroc"] = result_of(one, "p is the softmax over references, bare prompt")
    if any(str(name).startswith("layer:") for name in table):
        gap = layers(table, analysed)[1]
        if gap is not None:
            results[f"{prefix}.last_layers.auroc_of_u_e_over_all"] = result_of(gap, "paired")
    for stage in ("estimate", "sample", "p_true"):
        seconds = table[f"seconds_{stage}"].median()
        if not np.isnan(seconds):
            note = f"{table.attrs['made']}, perhaps beside other work"
            results[f"{prefix}.{stage}.seconds"] = Result(value=float(seconds), unit="s", n=len(table), note=note)
    return results
