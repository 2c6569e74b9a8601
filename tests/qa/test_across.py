"""Several models at once, on made-up scores of which the truth is known, and what stands beside the main table."""

import numpy as np
import pandas as pd
import pytest
from test_analysis import QUICK, made_up

from isouq.studies import evaluation, rejection
from isouq.studies.qa import across, analysis, details, tables

MODELS = ("small", "large", "other")


def asked(seed: int, *, signal: float = 1.0, n: int = 200) -> pd.DataFrame:
    """Answers with all columns that a study gives; P(True) knows what is wrong, and the entropies know nothing."""
    rng = np.random.default_rng(seed + 100)
    table = made_up(n, signal=signal, seed=seed)
    table["p_true"] = 1 / (1 + np.exp(-3 * table["wrong"] - rng.normal(size=n)))
    table["semantic_entropy"], table["naive_entropy"] = rng.random(n), rng.random(n)
    for block in range(7):
        noise = rng.normal(size=n) if block < 2 else 0.0
        table[f"layer:{block}.mlp"] = table["log_epistemic_sequence"] - np.log(7) + noise
    table["right_by_f1"] = table["right"] | (rng.random(n) < 0.1)
    for stage in ("cheap", "estimate", "sample", "meaning", "p_true"):
        table[f"seconds_{stage}"] = 2.0
    return table


@pytest.fixture(scope="module")
def answers() -> dict[str, pd.DataFrame]:
    return {model: asked(seed) for seed, model in enumerate(MODELS)}


@pytest.fixture(scope="module")
def ranked(answers) -> dict[str, dict[str, dict[str, evaluation.Ranking]]]:
    return {model: analysis.rank(table, QUICK) for model, table in answers.items()}


def test_a_mean_over_models_is_the_mean_of_values_and_of_draws(ranked) -> None:
    parts = [ranked[model]["sequence"]["p_true"] for model in MODELS]
    whole = across.mean(parts)
    assert whole.value == pytest.approx(np.mean([one.value for one in parts]))
    interval = whole.interval()
    assert interval.low < whole.value < interval.high
    assert interval.high - interval.low < min(i.high - i.low for i in (one.interval() for one in parts))
    with pytest.raises(ValueError, match="0 given, at least one wanted"):
        across.mean([])


def test_models_are_resampled_together_whatever_else_each_was_asked(answers) -> None:
    """The same answers by two models, of which one was asked fewer questions and left some empty."""
    whole = answers["small"]
    part = whole.drop(index=[3, 50, 51]).iloc[:150]
    counts = {name: QUICK.resamples(table).counts for name, table in (("whole", whole), ("part", part))}
    assert np.array_equal(counts["whole"][:, part.index], counts["part"])
    assert counts["whole"].mean() == pytest.approx(1, abs=0.05)
    assert counts["whole"].var() == pytest.approx(1, abs=0.1)
    one, two = (analysis.rank(table, QUICK)["sequence"]["likelihood"] for table in (whole, part))
    assert np.corrcoef(one.draws, two.draws)[0, 1] > 0.6
    kinds = whole.assign(cluster=[f"k{i % 9}" for i in range(len(whole))])
    drawn = QUICK.resamples(kinds).counts
    assert np.array_equal(drawn[:, 0], drawn[:, 9])


def test_a_rival_that_knows_more_is_ahead_and_one_that_knows_nothing_behind(answers, ranked) -> None:
    results = across.named_results(answers, ranked, "triviaqa", QUICK)
    assert results["qa.mean.triviaqa.combined.auroc_over_p_true"].high < 0
    assert results["qa.mean.triviaqa.p_true.auroc_over_combined"].low > 0
    assert results["qa.mean.triviaqa.combined.auroc_over_semantic_entropy"].low > 0
    assert results["qa.mean.triviaqa.combined.max_t"].value >= 1.95
    assert results["qa.mean.triviaqa.models.count"].value == 3
    assert results["qa.mean.triviaqa.epistemic.auroc"].value < 0.3


def test_agreement_is_with_p_true_itself_not_with_its_complement(answers) -> None:
    """U_E is large where answers are likely, hence right, hence where P(True) is high."""
    for one in across.agreement(answers, QUICK).values():
        assert one.value > 0.2
        assert one.interval().low > 0


def test_preference_holds_for_all_models_at_once(ranked) -> None:
    headline = {model: of["sequence"] for model, of in ranked.items()}
    for model, interval in across.preference(headline).items():
        gap = headline[model]["epistemic"].minus(headline[model]["aleatoric"])
        assert interval.value == gap.value
        assert interval.high - interval.low > 2 * 1.95 * gap.draws.std()


def test_a_scale_that_carries_over_does_and_one_that_is_shifted_does_not(answers) -> None:
    same = across.transfer(answers, QUICK)
    assert all(one.value > 0.7 for one in same.values())
    turned = answers | {"other": asked(9, signal=-1.0)}
    assert across.transfer(turned, QUICK)["other"].value < 0.3
    with pytest.raises(ValueError, match="1 models given, at least two wanted"):
        across.transfer({"small": answers["small"]}, QUICK)


def test_standardising_takes_a_models_own_scale_away(answers) -> None:
    moved = {model: table.copy() for model, table in answers.items()}
    moved["small"][across.FEATURES] = moved["small"][across.FEATURES] * [5, 0.2] + [3, -3]
    plain, standard = (across.transfer(moved, QUICK, standardise=s)["small"].value for s in (False, True))
    unmoved = across.transfer(answers, QUICK, standardise=True)["small"].value
    assert standard == pytest.approx(unmoved)
    assert plain != pytest.approx(standard)


def test_one_model_with_enough_answers_says_nothing_about_several(answers, ranked) -> None:
    alone = {"small": ranked["small"], "large": {"sequence": {}}}
    assert across.named_results({m: answers[m] for m in alone}, alone, "triviaqa", QUICK) == {}


def test_table_2_stands_beside_the_paper_with_a_mean_of_those_that_have_numbers(ranked) -> None:
    pairs = {(model, "triviaqa"): of for model, of in (ranked | {"silent": {"sequence": {}}}).items()}
    table = tables.table_2(pairs | {("small", "wikidata"): ranked["small"]})
    assert list(table.columns) == ["mean", "paper", *MODELS, "silent"]
    assert table.loc[("TriviaQA", "P(True)"), "paper"] == "0.69\u00a0±\u00a00.06"
    assert (table.loc["TriviaQA", "silent"] == "too few").all()
    assert (table.loc["Wikidata", "silent"] == "").all(), "it was not asked"
    assert (table.loc["Wikidata", "mean"] == "").all()
    one = across.mean([ranked[model]["sequence"]["p_true"] for model in MODELS])
    mean, std = one.as_in_paper()
    cell = table.loc[("TriviaQA", "P(True)"), "mean"]
    assert cell.startswith(f"{one.value:.2f}\u00a0[")
    assert cell.endswith(f"({mean:.2f}\u00a0±\u00a0{std:.2f})")


def test_rejection_and_calibration_rest_on_the_resamples_of_the_auroc(answers, ranked) -> None:
    table = answers["small"]
    found = details.rejections(table, QUICK)
    assert set(found) == {*details.REJECTED, "combined", "likelihood_fitted"}
    wrong = table["wrong"].to_numpy()
    for name, column in {"p_true": "p_true", "epistemic": "log_epistemic_sequence"}.items():
        assert found[name]["prr"].value == rejection.prr(table[column], wrong)
        assert found[name]["aurc"].value == rejection.aurc(table[column], wrong)
        assert len(found[name]["prr"].draws) == len(ranked["small"]["sequence"][name].draws)
        assert set(found[name]) == {"prr", "aurc"}, "a raw score is no probability"
    assert found["p_true"]["prr"].value > found["combined"]["prr"].value > found["epistemic"]["prr"].value
    assert found["combined"]["brier"].value < wrong.mean() * (1 - wrong.mean())
    assert details.rejections(table.head(12), QUICK) == details.curves(table.head(12), QUICK) == {}


def test_the_curves_start_with_the_most_certain_and_end_at_the_accuracy(answers) -> None:
    table = answers["small"]
    curves = details.curves(table, QUICK)
    for curve in curves.values():
        assert len(curve) == len(table)
        assert curve[-1] == pytest.approx(table["right"].mean())
    assert curves["p_true"][:40].mean() > curves["naive_entropy"][:40].mean() > curves["epistemic"][:40].mean()


def test_prompts_are_compared_on_the_questions_that_both_were_asked(answers) -> None:
    usual = answers["small"].assign(reference="Paris", answer="Paris")
    bare = asked(7, n=120).assign(reference="Paris", answer="It is paris, I think")
    bare.loc[60:, "answer"] = "London"
    found = details.prompts(usual, bare, QUICK)
    assert [found[prompt]["accuracy"].n for prompt in ("examples", "bare")] == [120, 120]
    assert found["examples"]["accuracy"].value == usual["right"][:120].mean()
    assert found["bare"]["contained"].value == 0.5
    wanted = evaluation.auroc(bare["p_true"], bare["wrong"])
    assert found["bare"]["p_true"].value == pytest.approx(wanted)
    few = details.prompts(usual, bare.head(12), QUICK)["bare"]
    assert set(few) == {"accuracy", "contained"}


def test_another_judge_is_compared_with_the_studys_own(answers) -> None:
    rows = details.judges(answers["small"]).set_index("judge")
    assert list(rows.index) == ["own", "f1"]
    assert rows["kappa"]["own"] == 1
    assert 0.7 < rows["kappa"]["f1"] < 1
    assert rows["right"]["f1"] > rows["right"]["own"]
    assert rows["auroc_likelihood"]["own"] > rows["auroc_likelihood"]["f1"] > 0.5


def test_the_last_five_blocks_are_a_sum_over_them(answers) -> None:
    table = answers["small"]
    assert np.allclose(analysis.last_layers(table), table["log_epistemic_sequence"] + np.log(5 / 7))
    rows, gap = details.layers(table, QUICK)
    assert gap is not None
    assert gap.value == pytest.approx(0, abs=1e-9)
    assert list(rows["block"]) == list(range(7))


def test_a_true_choice_is_ranked_by_its_own_verdict() -> None:
    rng = np.random.default_rng(0)
    log_p = np.log(rng.uniform(0.3, 0.99, 200))
    table = pd.DataFrame({"log_p_choice": log_p, "right_as_choice": rng.random(200) < np.exp(log_p)})
    table = table.assign(item_id=[f"q{i}" for i in range(200)], wrong=~table["right_as_choice"])
    table["log_aleatoric_choice"] = log_p + np.log(-np.expm1(log_p))
    table["log_epistemic_choice"] = table["log_aleatoric_choice"] + rng.normal(size=200)
    ranked = details.choice(table, QUICK)
    assert ranked["minus_log_p"].value > 0.6
    assert ranked["aleatoric"].value > 0.55  # p is above one half for most, so here U_A points the right way
    table["right_as_choice"] = True
    assert details.choice(table, QUICK) == {}


def test_costs_add_up_the_stages_that_a_score_needs(answers, ranked) -> None:
    costs = details.costs(answers["small"], ranked["small"]["sequence"]).set_index("method")
    assert costs["seconds"]["epistemic"] == 2
    assert costs["seconds"]["semantic_entropy"] == costs["seconds"]["p_true"] == 4
    assert costs["value"]["p_true"] == ranked["small"]["sequence"]["p_true"].value
