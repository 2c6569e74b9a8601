"""The chapter's tables on made-up scores of which the truth is known."""

import numpy as np
import pandas as pd
import pytest

from isouq.studies.fits import Fit
from isouq.studies.qa import analysis, tables
from isouq.studies.qa.analysis import Analysis
from isouq.studies.resamples import Resamples
from isouq.studies.results import Result

QUICK = Analysis(n_resamples=40)


def made_up(n: int = 240, *, signal: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Answers of which the likely ones are right; log G is noise, so that U_E knows nothing but p."""
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(2, 9, n)
    log_prob = -rng.gamma(4.0, 1.5, n) - 0.01
    wrong = rng.random(n) < 1 / (1 + np.exp(signal * (log_prob + 6)))
    log_gradient = 10 + 0.2 * rng.normal(size=n)
    table = pd.DataFrame({"log_prob": log_prob, "likelihood": -log_prob, "n_tokens": n_tokens, "wrong": wrong})
    table = table.assign(item_id=[f"q{i}" for i in range(n)], right=~wrong, empty=False, log_gradient=log_gradient)
    for name, log_p in (("sequence", log_prob), ("geometric", log_prob / n_tokens), ("token_mean", log_prob / 9)):
        table[f"probability_{name}"] = np.exp(log_p)
        table[f"log_aleatoric_{name}"] = log_p + np.log(-np.expm1(log_p))
        table[f"log_epistemic_{name}"] = 2 * log_p + log_gradient
    table.loc[n // 2 :, [c for c in table if c.endswith("_token_mean")]] = np.nan
    return table


def named(table: pd.DataFrame, subject: str) -> dict[str, Result]:
    return analysis.named_results(table, analysis.rank(table, QUICK), subject, QUICK)


def aurocs_of(table: pd.DataFrame) -> pd.DataFrame:
    return analysis.auroc_table(table, analysis.rank(table, QUICK))


def value_of(aurocs: pd.DataFrame, method: str, aggregation: str = "sequence") -> pd.Series:
    return aurocs[(aurocs["method"] == method) & (aurocs["aggregation"] == aggregation)].iloc[0]


def test_raw_scores_keep_their_orientation_and_fits_find_it() -> None:
    aurocs = aurocs_of(made_up())
    assert value_of(aurocs, "likelihood")["value"] > 0.75
    for method in ("aleatoric", "epistemic"):  # both grow with p below one half
        assert value_of(aurocs, method)["value"] < 0.25
        assert value_of(aurocs, f"{method}_fitted")["value"] > 0.7
    assert value_of(aurocs, "combined")["value"] > 0.7
    assert value_of(aurocs, "combined_curved")["value"] > 0.7
    assert value_of(aurocs, "log_gradient")["value"] == pytest.approx(0.5, abs=0.1)
    assert value_of(aurocs, "combined", "token_mean")["n"] == 120
    assert (aurocs["low"] <= aurocs["value"]).all()
    assert (aurocs["value"] <= aurocs["high"]).all()


def test_right_answers_of_one_relation_alone_have_no_number() -> None:
    table = made_up().assign(cluster=lambda rows: np.where(rows["wrong"], rows["item_id"], "capital"))
    assert not analysis.has_enough(table)
    assert aurocs_of(table)["value"].isna().all()
    assert analysis.has_enough(table.assign(cluster=table["item_id"]))


def test_a_curved_fit_follows_a_score_that_falls_on_both_sides() -> None:
    features = np.random.default_rng(0).normal(size=(400, 2))
    wrong = np.abs(features[:, 0]) > 0.7
    plan = Resamples.of(wrong, n_resamples=40)
    plane, bent = (Fit.of(x, wrong, plan).ranking().value for x in (features, analysis.curved(features)))
    assert plane < 0.6
    assert bent > 0.95
    assert analysis.curved(features).shape == (400, 5)


def test_the_gain_is_the_difference_to_the_likelihood_on_the_same_questions() -> None:
    aurocs = aurocs_of(made_up())
    own, control = value_of(aurocs, "epistemic"), value_of(aurocs, "likelihood")
    assert own["versus_likelihood"] == pytest.approx(own["value"] - control["value"])
    assert control["versus_likelihood"] == control["versus_likelihood_high"] == 0


def test_too_few_right_answers_say_so_instead_of_a_number() -> None:
    table = made_up(60)
    table["wrong"] = np.arange(60) >= 9
    table["right"] = ~table["wrong"]
    aurocs = aurocs_of(table)
    assert aurocs["value"].isna().all()
    assert value_of(aurocs, "epistemic")["note"] == "too few: 9 right, 51 wrong"
    assert analysis.within(table, QUICK)["value"].isna().all()
    assert analysis.added_signal(table, QUICK).empty
    results = named(table, "m.triviaqa")
    assert results["qa.m.triviaqa.accuracy"].value == 9 / 60
    assert not any(key.endswith("auroc") for key in results)


def test_an_empty_answer_counts_as_wrong_but_has_no_score() -> None:
    table = made_up()
    table.loc[:19, [c for c in table if c.startswith(("log_", "probability", "likelihood"))]] = np.nan
    table.loc[:19, ["wrong", "right", "empty"]] = [True, False, True]
    results = named(table, "m.wikidata")
    assert results["qa.m.wikidata.accuracy"].n == 240
    assert results["qa.m.wikidata.epistemic.auroc"].n == 220
    assert results["qa.m.wikidata.empty.count"].value == 20


def test_with_probability_held_fixed_noise_stays_noise_and_a_function_of_it_is_no_number() -> None:
    rows = analysis.within(made_up(600), QUICK).set_index(["method", "within"])
    assert rows["value"]["log_gradient", "probability"] == pytest.approx(0.5, abs=0.08)
    assert rows["value"]["epistemic", "probability"] == pytest.approx(0.5, abs=0.08)
    assert np.isnan(rows["value"]["likelihood", "probability"])
    assert rows["value"]["epistemic", "length"] < 0.3


def test_only_answers_of_exactly_one_length_are_compared_and_their_pairs_are_reported() -> None:
    table = made_up(200)
    rows = analysis.within(table, QUICK).set_index(["method", "within"]).loc[("likelihood", "length")]
    lengths = table.groupby("n_tokens")["wrong"]
    assert rows["n_pairs"] == (lengths.sum() * (lengths.size() - lengths.sum())).sum()
    alike = analysis.within(table.assign(n_tokens=1), QUICK).set_index(["method", "within"])["value"]
    assert np.isnan(alike["likelihood", "length"]), "one length is no stratum"


def test_added_signal_has_its_sign_and_is_found_when_it_is_there() -> None:
    table = made_up(600)
    for row in analysis.added_signal(table, QUICK).itertuples():
        assert row.coefficient_low < 0.3, row.aggregation
        assert row.gain < 0.01, row.aggregation
    for sign in (1, -1):
        told = table.assign(log_epistemic_sequence=table["log_epistemic_sequence"] + sign * table["wrong"])
        row = analysis.added_signal(told, QUICK).set_index("aggregation").loc["sequence"]
        assert sign * row["coefficient"] > 1
        assert row["gain_low"] > 0


def test_every_rival_goes_through_the_same_folds() -> None:
    found = analysis.rankings(made_up(), "sequence", QUICK)
    assert set(analysis.CONTROLS) < set(found)
    flipped = made_up().assign(log_prob=lambda table: -table["log_prob"])  # a fit learns the sign of its own
    again = analysis.rankings(flipped, "sequence", QUICK)
    assert again["likelihood_fitted"].value == pytest.approx(found["likelihood_fitted"].value)
    aurocs = aurocs_of(made_up())
    gap = value_of(aurocs, "combined")["value"] - value_of(aurocs, "likelihood_fitted")["value"]
    assert value_of(aurocs, "combined")["versus_likelihood"] == pytest.approx(gap)


def test_a_rival_is_compared_in_pairs_and_must_have_every_question() -> None:
    table = made_up().assign(p_true=lambda rows: rows["likelihood"] + 0.1)
    results = named(table, "m.triviaqa")
    gap = results["qa.m.triviaqa.combined.auroc_over_p_true"]
    values = (results[f"qa.m.triviaqa.{name}.auroc"].value for name in ("combined", "p_true"))
    assert gap.value == pytest.approx(np.subtract(*values))
    assert results["qa.m.triviaqa.combined.max_t"].value >= 1.96
    table.loc[3, "p_true"] = np.nan
    with pytest.raises(ValueError, match="p_true: NaN or infinite at 1 of 240 questions, the first 'q3'"):
        analysis.rankings(table, "sequence", QUICK)


def test_statements_of_one_relation_are_a_cluster() -> None:
    texts = ("The country of Ahvaz is", "The country of Siemens of Mobility is", "The country of citizenship of A is")
    texts = (*texts, "Hyderabad is located in", "Surrey is located in", "Long Island shares a border with", "Why?")
    table = analysis.clustered(pd.DataFrame({"question": texts}), "wikidata")
    first, also, citizen, here, there, border, other = table["cluster"]
    assert first == also == "country"
    assert here == there
    assert len({first, citizen, here, border, other}) == 5
    assert "cluster" not in analysis.clustered(table[["question"]], "triviaqa")


def test_named_results_have_the_fixed_keys() -> None:
    results = named(made_up(), "smollm2-135m-instruct.triviaqa")
    prefix = "qa.smollm2-135m-instruct.triviaqa"
    wanted = ("aleatoric", "epistemic", "combined", "likelihood", "epistemic_geometric", "combined_token_mean")
    for name in (*wanted, "epistemic_fitted", "epistemic_geometric_fitted"):
        assert 0 <= results[f"{prefix}.{name}.auroc"].low <= results[f"{prefix}.{name}.auroc"].high <= 1
    assert results[f"{prefix}.epistemic.auroc"].claim == "C7"
    assert results[f"{prefix}.epistemic.spearman_with_log_prob"].value > 0.9
    assert results[f"{prefix}.below_half.share"].value > 0.9


def test_panels_have_the_same_rows_with_the_papers_values_where_it_has_them() -> None:
    rows = tables.beside_paper(aurocs_of(made_up()), "truthfulqa")
    assert tuple(rows["method"]) == tables.SHOWN
    assert rows.set_index("method")["paper"]["combined"] == 0.63
    assert np.isnan(rows.set_index("method")["paper"]["likelihood"])
    for not_asked in ("truthfulqa_choose", "wikidata"):
        assert tables.beside_paper(aurocs_of(made_up()), not_asked)["paper"].isna().all()


def test_an_aggregation_that_was_not_asked_for_has_no_row() -> None:
    table = made_up()
    table[[c for c in table if c.endswith("_token_mean")]] = np.nan
    assert set(aurocs_of(table)["aggregation"]) == {"sequence", "geometric"}


def test_a_choice_also_reports_what_is_left_without_no_comment() -> None:
    table = made_up().assign(answer="Yes.", right_by_chance=0.5)
    table["right_by_mean"] = table["right"]
    table.loc[:59, ["answer", "right", "wrong"]] = [analysis.NO_COMMENT, True, False]
    results = named(table, "m.truthfulqa_choose")
    assert results["qa.m.truthfulqa_choose.no_comment.share"].value == 0.25
    assert results["qa.m.truthfulqa_choose.likelihood_committed.auroc"].n == 180
    assert results["qa.m.truthfulqa_choose.likelihood.auroc"].n == 240


def test_the_table_shows_numbers_and_reasons() -> None:
    few = made_up(60)
    few["wrong"] = np.arange(60) >= 9
    found = {("m", name): aurocs_of(table) for name, table in (("triviaqa", few), ("wikidata", made_up()))}
    table = tables.compare(found)
    assert list(table) == [("m", "TriviaQA"), ("m", "Wikidata")]
    assert table.loc[("sequence", "epistemic"), ("m", "TriviaQA")] == "too few: 9 right, 51 wrong"
    row = value_of(found["m", "wikidata"], "combined")
    text = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    assert table.loc[("sequence", "combined"), ("m", "Wikidata")].split("\u00a0") == text.split(" ")
    gains = tables.compare(found, "versus_likelihood")
    assert gains.loc[("sequence", "likelihood"), ("m", "Wikidata")].split() == ["+0.00", "[+0.00,", "+0.00]"]


def test_a_set_without_any_scored_answer_has_a_table_without_rows() -> None:
    table = made_up(30)
    table[[c for c in table if c.startswith("log_")]] = np.nan
    assert aurocs_of(table).dropna(subset=["value"]).empty


def test_a_label_that_is_missing_is_not_counted_as_wrong() -> None:
    table = made_up().astype({"wrong": float, "right": float})
    table.loc[3, ["wrong", "right"]] = np.nan
    for call in (
        lambda: aurocs_of(table),
        lambda: analysis.within(table, QUICK),
        lambda: analysis.added_signal(table, QUICK),
    ):
        with pytest.raises(ValueError, match="wrong: NaN"):
            call()
    with pytest.raises(ValueError, match="right: NaN"):
        analysis.accuracy(table)


def test_a_share_knows_that_answers_of_one_cluster_are_not_so_many() -> None:
    table = pd.DataFrame({"right": np.repeat([True, False], 60)})
    alone = analysis.accuracy(table)
    by_ten = analysis.accuracy(table.assign(cluster=np.repeat(np.arange(12), 10)))
    by_one = analysis.accuracy(table.assign(cluster=np.arange(120)))
    assert alone.value == by_ten.value == by_one.value == 0.5
    assert by_ten.high - by_ten.low > 2.5 * (alone.high - alone.low)
    assert by_one.high - by_one.low == pytest.approx(alone.high - alone.low, rel=0.15)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_few_scored_answers_have_results_without_what_is_undefined(n: int) -> None:
    table = made_up(30)
    table.loc[table.index[n:], [c for c in table if c.startswith("log_")]] = np.nan
    assert analysis.agreement(table, QUICK)["epistemic"] is None
    results = named(table, "m.triviaqa")
    assert results["qa.m.triviaqa.accuracy"].n == 30
    assert ("qa.m.triviaqa.below_half.share" in results) == (n > 0)
    assert not any(key.endswith(("auroc", "spearman_with_log_prob")) for key in results)


def test_a_constant_gradient_leaves_no_number() -> None:
    table = made_up(80).assign(log_gradient=1.0)
    table["wrong"] = table["log_prob"].rank() <= 40
    table["right"] = ~table["wrong"]
    table["log_epistemic_sequence"] = 2 * table["log_prob"] + 1
    assert "sequence" not in set(analysis.added_signal(table, QUICK)["aggregation"])
    results = named(table, "m.triviaqa")
    assert "qa.m.triviaqa.log_gradient.spearman_with_log_prob" not in results
    assert "qa.m.triviaqa.epistemic.auroc_given_probability" not in results
