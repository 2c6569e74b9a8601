"""What several models say together: means over models, which estimate each prefers, and whether a scale carries over.

Claims C6 to C10 are about these. A question is drawn as often for one model as for another (`Analysis.resamples`), also
where one was asked more of them; the models themselves are taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from isouq.studies import evaluation, fits
from isouq.studies.evaluation import Interval, Ranking
from isouq.studies.qa.analysis import FAIR, HEADLINE, RIVALS, Analysis, if_defined, result_of, scored
from isouq.studies.results import Result

Rankings = Mapping[str, Ranking]  # one model's, by score
FEATURES = [f"log_epistemic_{HEADLINE}", f"log_aleatoric_{HEADLINE}"]


def mean(rankings: Sequence[Ranking]) -> Ranking:
    """Return the mean of statistics over models, with percentile intervals of the mean's own resamples.

    Raises ValueError for none, and for different numbers of resamples.
    """
    if not rankings or len({len(one.draws) for one in rankings}) > 1:
        raise ValueError(f"rankings: {len(rankings)} given, at least one wanted, all of as many resamples")
    draws = np.mean([one.draws for one in rankings], axis=0)
    n, n_units = sum(one.n for one in rankings), min(one.n_units for one in rankings)
    return Ranking(float(np.mean([one.value for one in rankings])), draws, draws, None, n, n_units)


def advantage(
    ranked: Mapping[str, Rankings], score: str = "combined", rivals: Sequence[str] = RIVALS
) -> dict[str, Ranking]:
    """Return, for each of `rivals` that all models have, the mean over models of `score` minus rival, paired."""
    names = [name for name in rivals if all(name in of_model for of_model in ranked.values())]
    return {name: mean([of_model[score].minus(of_model[name]) for of_model in ranked.values()]) for name in names}


def preference(ranked: Mapping[str, Rankings]) -> dict[str, Interval]:
    """Return each model's AUROC of U_E minus that of U_A, paired, with intervals that hold for all models at once."""
    gaps = {model: of_model["epistemic"].minus(of_model["aleatoric"]) for model, of_model in ranked.items()}
    reach = evaluation.max_t(list(gaps.values()))
    intervals = {}
    for model, gap in gaps.items():
        half = reach * float(np.nanstd(gap.draws))
        intervals[model] = Interval(gap.value, gap.value - half, gap.value + half, gap.n)
    return intervals


def agreement(tables: Mapping[str, pd.DataFrame], analysis: Analysis) -> dict[str, Ranking]:
    """Return each model's Spearman's ρ of U_E with P(True), the probability itself and not its complement."""
    found = {}
    for model, table in tables.items():
        used, plan = scored(table), analysis.resamples(scored(table))
        epistemic, p_false = used[FEATURES[0]].to_numpy(), used["p_true"].to_numpy()
        drawn = [np.repeat(np.arange(len(used)), counts.astype(int)) for counts in plan.counts]
        draws = -np.array([if_defined(evaluation.spearman, p_false[i], epistemic[i], otherwise=np.nan) for i in drawn])
        value = -evaluation.spearman(p_false, epistemic)
        found[model] = Ranking(value, draws, draws, None, len(used), len(plan.left_out))
    return found


def transfer(
    tables: Mapping[str, pd.DataFrame], analysis: Analysis, *, standardise: bool = False
) -> dict[str, Ranking]:
    """Return the AUROC on each model of a classifier of wrong answers that was fitted on all other models.

    A logistic regression on log U_E and log U_A, fitted again in every resample of the other models' questions.
    `standardise`: each model's two scores are first brought to mean 0 and spread 1 over its own questions, which needs
    no labels. Raises ValueError for fewer than two models.
    """
    if len(tables) < 2:
        raise ValueError(f"tables: {len(tables)} models given, at least two wanted")
    parts = {model: scored(table) for model, table in tables.items()}
    features = {model: table[FEATURES].to_numpy() for model, table in parts.items()}
    if standardise:
        features = {model: (x - x.mean(axis=0)) / x.std(axis=0) for model, x in features.items()}
    wrong = {model: table["wrong"].to_numpy(dtype=bool) for model, table in parts.items()}
    plans = {model: analysis.resamples(table) for model, table in parts.items()}
    of_held_out = {}
    for model in tables:
        others = [other for other in tables if other != model]
        x, y = np.concatenate([features[o] for o in others]), np.concatenate([wrong[o] for o in others])
        drawn = np.concatenate([plans[o].counts for o in others], axis=1)
        beta = fits.fit_logistic(x, y, np.vstack([np.ones(len(y)), drawn]))
        scores = beta[:, :1] + beta[:, 1:] @ features[model].T
        weights = np.vstack([np.ones(len(wrong[model])), plans[model].counts])
        value, *draws = evaluation.weighted_auroc(scores, wrong[model], weights)
        n_units = min(int(wrong[model].sum()), int((~wrong[model]).sum()))
        of_held_out[model] = Ranking(float(value), np.array(draws), np.array(draws), None, len(wrong[model]), n_units)
    return of_held_out


def named_results(
    tables: Mapping[str, pd.DataFrame], ranked: Mapping[str, Mapping[str, Rankings]], data_set: str, analysis: Analysis
) -> dict[str, Result]:
    """Return the results of several models on one data set; models with too few right or wrong answers are left out.

    `tables` and `ranked` (what `analysis.rank` makes of each table) are keyed by the model's name in a key.
    """
    headline = {model: rankings[HEADLINE] for model, rankings in ranked.items() if rankings.get(HEADLINE)}
    if len(headline) < 2:
        return {}
    tables, prefix = {model: tables[model] for model in headline}, f"qa.mean.{data_set}"
    models = f"{len(headline)} models: {', '.join(headline)}"
    results = {f"{prefix}.models.count": Result(value=len(headline), note=models)}
    shared = [name for name in next(iter(headline.values())) if all(name in of for of in headline.values())]
    for name in shared:
        if name != "minus_log_prob":
            results[f"{prefix}.{name}.auroc"] = result_of(mean([of[name] for of in headline.values()]), models)
    gaps = advantage(headline)
    fair = advantage(headline, rivals=FAIR)
    for score, of_score in {"combined": gaps | fair, "combined_curved": advantage(headline, "combined_curved")}.items():
        for name, gap in of_score.items():
            results[f"{prefix}.{score}.auroc_over_{name}"] = result_of(gap, f"paired; {models}")
    if gaps:
        critical = evaluation.max_t(list(gaps.values()))
        results[f"{prefix}.combined.max_t"] = Result(value=critical, note=models)
    if "p_true" in gaps:
        ahead = mean([of["p_true"].minus(of["combined"]) for of in headline.values()])
        results[f"{prefix}.p_true.auroc_over_combined"] = result_of(ahead, f"paired; {models}")
        of_models = agreement(tables, analysis)
        for model, one in of_models.items():
            results[f"qa.{model}.{data_set}.p_true.spearman_with_epistemic"] = result_of(one, "")
        results[f"{prefix}.p_true.spearman_with_epistemic"] = result_of(mean(list(of_models.values())), models)
    preferred = preference(headline)
    for end, choose in {"largest": max, "smallest": min}.items():
        model = choose(preferred, key=lambda name: preferred[name].value)
        key = f"qa.models.{data_set}.epistemic_over_aleatoric.{end}"
        results[key] = result_of(preferred[model], f"{model}, of {models}; simultaneous")
    for standardise, metric in ((False, "auroc"), (True, "auroc_standardised")):
        of_held_out = transfer(tables, analysis, standardise=standardise)
        for model, one in of_held_out.items():
            results[f"qa.transfer.{model}.{data_set}.{metric}"] = result_of(one, "fitted on the other models")
        results[f"qa.transfer.mean.{data_set}.{metric}"] = result_of(mean(list(of_held_out.values())), models)
    return results
