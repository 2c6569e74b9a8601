"""Scores and labels → metrics with intervals, gains, warnings in words, and what is refused by row."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from isouq import cli
from isouq.estimate import Estimate
from isouq.studies import evaluation, fits, rejection
from isouq.studies.fits import Fit
from isouq.use.evaluate import Evaluation, evaluate, features_of, score_of
from labelled import made_up

QUICK = {"n_resamples": 100}
ENDS, GAIN = ["value", "low", "high"], ["gain", "gain_low", "gain_high"]


def rows_of(found: Evaluation, score: str) -> pd.DataFrame:
    return found.table[found.table["score"] == score].set_index("metric")


def test_raw_scores_have_the_studies_statistics_intervals_and_paired_gains() -> None:
    table = made_up()
    wrong, plan = ~table["right"].to_numpy(), evaluation.Resamples.of(table["right"], n_resamples=100)
    control = -table["log_prob"].to_numpy()
    raw = {
        "likelihood_per_token": control / table["n_tokens"].to_numpy(),
        "epistemic": table["log_epistemic"].to_numpy(),
        "aleatoric": table["aleatoric"].to_numpy(),
        "log_gradient": (table["log_epistemic"] - 2 * table["log_prob"]).to_numpy(),
    }
    found = evaluate(table, **QUICK)
    how = {"auroc": evaluation.weighted_auroc, "aurc": rejection.weighted_aurc, "prr": rejection.weighted_prr}
    for metric, sign in {"auroc": 1, "aurc": -1, "prr": 1}.items():
        plain = evaluation.ranking(control, wrong, plan, how[metric])
        assert np.isnan(rows_of(found, "likelihood").loc[metric, "gain"])
        for name, score in raw.items():
            row, one = rows_of(found, name).loc[metric], evaluation.ranking(score, wrong, plan, how[metric])
            interval, gain = one.interval(), one.minus(plain).interval()
            assert [row["value"], row["low"], row["high"]] == pytest.approx(
                [interval.value, interval.low, interval.high]
            )
            ends = sorted([sign * gain.low, sign * gain.high])
            assert row[GAIN].tolist() == pytest.approx([sign * gain.value, *ends])


def test_the_fitted_pair_is_chapter_04s_and_is_judged_as_a_probability_too() -> None:
    table = made_up()
    wrong, plan = ~table["right"].to_numpy(), evaluation.Resamples.of(table["right"], n_resamples=100)
    log_p = table["log_prob"].to_numpy()
    pair = np.column_stack([table["log_epistemic"], log_p + np.log(-np.expm1(log_p))])
    fit, control = (Fit.of(features, wrong, plan) for features in (pair, log_p[:, None]))
    found = evaluate(table, scores=["combined"], **QUICK)
    row, interval = rows_of(found, "combined").loc["auroc"], fit.ranking().interval()
    assert row[ENDS].tolist() == pytest.approx([interval.value, interval.low, interval.high])
    for metric in ("brier", "ece"):
        of_scores = [
            np.mean([getattr(fits, metric)(expit(z), wrong) for z in one.out_of_fold]) for one in (fit, control)
        ]
        assert rows_of(found, "combined").loc[metric, "value"] == pytest.approx(of_scores[0])
        assert rows_of(found, "combined").loc[metric, "gain"] == pytest.approx(of_scores[1] - of_scores[0])
        assert rows_of(found, "likelihood_fitted").loc[metric, "value"] == pytest.approx(of_scores[1])


def test_clusters_are_drawn_whole_for_raw_and_fitted_scores_and_their_gains() -> None:
    table = pd.concat([made_up(40)] * 5, ignore_index=True).assign(document=[*range(40)] * 5)
    wrong = ~table["right"].to_numpy()
    plan = evaluation.Resamples.of(wrong, clusters=table["document"].astype(str), n_resamples=100)
    found, alone = evaluate(table, clusters="document", **QUICK), evaluate(table, **QUICK)
    control, score = -table["log_prob"].to_numpy(), table["log_epistemic"].to_numpy()
    one, plain = (evaluation.ranking(x, wrong, plan) for x in (score, control))
    row, interval, gain = rows_of(found, "epistemic").loc["auroc"], one.interval(), one.minus(plain).interval()
    assert row[ENDS].tolist() == pytest.approx([interval.value, interval.low, interval.high])
    assert row[GAIN].tolist() == pytest.approx([gain.value, gain.low, gain.high])
    fit = Fit.of(features_of(table, "combined"), wrong, plan).ranking().interval()
    assert rows_of(found, "combined").loc["auroc", ENDS].tolist() == pytest.approx([fit.value, fit.low, fit.high])
    narrow = rows_of(alone, "epistemic").loc["auroc"]
    assert row["high"] - row["low"] > 1.5 * (narrow["high"] - narrow["low"]), "five copies are no news"


@pytest.mark.parametrize("cell", [None, "", np.nan])
def test_a_row_without_a_cluster_and_an_unknown_column_are_refused(cell) -> None:
    table = made_up().assign(document=["a", "b", "c", "d", cell] * 40)
    with pytest.raises(ValueError, match="document: an empty cell given in row 5, the name of its cluster wanted"):
        evaluate(table, clusters="document", **QUICK)
    with pytest.raises(ValueError, match="clusters: 'documents' given"):
        evaluate(table, clusters="documents", **QUICK)


@pytest.mark.parametrize("aggregation", ["sequence", "geometric"])
def test_log_g_and_log_u_a_are_those_of_the_estimate_for_either_aggregation(aggregation) -> None:
    table = made_up(aggregation=aggregation)
    names = ("log_prob", "n_tokens", "probability", "aleatoric", "log_epistemic")
    columns = {name: torch.tensor(table[name].to_numpy()) for name in names}
    log_p = columns["log_prob"] / (columns["n_tokens"] if aggregation == "geometric" else 1)
    scores = Estimate(**columns, log_probability=log_p, engine="ghost", n_parameters=1)
    assert score_of(table, "log_gradient") == pytest.approx(scores.log_gradient.numpy())
    assert np.exp(score_of(table, "aleatoric")) == pytest.approx(table["aleatoric"].to_numpy())


def test_means_over_tokens_are_taken_as_they_are_and_underflow_keeps_its_order() -> None:
    table = made_up().assign(probability=0.5, aleatoric=0.1)
    assert score_of(table, "log_gradient") == pytest.approx(table["log_epistemic"].to_numpy() + 2 * np.log(2))
    assert score_of(table, "aleatoric") == pytest.approx(np.log(0.1))
    far = made_up().assign(log_prob=-800.0 - np.arange(200), probability=0.0, aleatoric=0.0)
    assert features_of(far, "combined")[:, 1] == pytest.approx(far["log_prob"].to_numpy())


def test_failed_rows_change_nothing_but_the_count_and_a_files_texts_are_read(tmp_path, capsys) -> None:
    table = made_up(60)
    plain = evaluate(table, **QUICK)
    failed = table.iloc[:5].assign(error="a text wanted", right=None, log_prob=np.nan)
    mixed = evaluate(pd.concat([failed, table]), **QUICK)
    pd.testing.assert_frame_equal(mixed.table, plain.table)
    assert mixed.warnings[0].startswith("5 of 65 rows have no scores and are left out")
    pd.concat([failed, table]).to_csv(tmp_path / "scores.csv", index=False)
    out = tmp_path / "out.csv"
    command = ["evaluate", str(tmp_path / "scores.csv"), "--right", "right", "--resamples", "100", "--out", str(out)]
    assert cli.main(command) == 0
    pd.testing.assert_frame_equal(pd.read_csv(out), plain.table, rtol=1e-9)
    assert mixed.warnings[0] in capsys.readouterr().out


def test_warnings_name_a_reversed_score_a_useless_one_and_straddling_rows() -> None:
    table = made_up(300)
    table["noise"], table["reversed"] = np.random.default_rng(1).normal(size=300), table["log_prob"]
    table["nearly"] = -table["log_prob"] + 0.1 * table["noise"]
    table.loc[:6, "straddles"] = True
    found = evaluate(table, scores=["noise", "reversed", "nearly"], **QUICK)
    said = {name: [text for text in found.warnings if text.startswith(name)] for name in table}
    assert "points the wrong way" in said["reversed"][0]
    assert [text.split(":")[0] for text in said["noise"]][1] == "noise is worse than the plain negative log-likelihood"
    assert "shows no gain over the plain negative log-likelihood" in said["nearly"][0]
    assert found.warnings[0].startswith("7 of 300 rows straddle")
    assert all(text in str(found) and text in found._repr_html_() for text in found.warnings)
    few = evaluate(made_up(40).assign(right=np.arange(40) > 3), **QUICK)
    assert few.warnings[0].startswith("too few for intervals to hold: 36 right and 4 wrong answers")
    assert few.warnings[1].startswith("combined: not fitted")


def test_a_score_that_knows_more_is_said_to_gain() -> None:
    table = made_up(300)
    table["oracle"] = -table["log_prob"] + 5.0 * ~table["right"]
    found = evaluate(table, scores=["oracle"], **QUICK)
    assert (rows_of(found, "oracle")["gain_low"] > 0).all()
    assert not found.warnings


def test_the_figure_has_a_line_for_each_score_between_random_and_perfect(tmp_path) -> None:
    table = made_up(100)
    found = evaluate(table, **QUICK)
    [ax] = found.figure().axes
    random, perfect = ax.lines[-2:]
    assert len(ax.lines) == len(found.curves) + 2
    for line in ax.lines[:-2]:
        assert line.get_ydata()[-1] == pytest.approx(table["right"].mean())
        assert (line.get_ydata() <= np.interp(line.get_xdata(), *perfect.get_data()) + 1e-2).all()
    assert set(random.get_ydata()) == {table["right"].mean()}


BAD = {
    "right: 2 given in row 3, true or false": {"right": [1, 0, 2, *[1] * 17]},
    "right: nan given in row 2, true or false": {"right": [True, np.nan, *[False] * 18]},
    "right: 20 right and 0 wrong answers given, some of both wanted": {"right": True},
    "log_prob: nan given in row 4, a finite number wanted": {"log_prob": [-1.0, -1, -1, np.nan, *[-1.0] * 16]},
    "log_epistemic: -inf given in row 1, a finite number wanted": {"log_epistemic": [-np.inf, *range(19)]},
    "n_tokens: 'two' given in row 1, a finite number wanted": {"n_tokens": ["two", *["1"] * 19]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_labels_and_scores_are_refused_by_row(message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate(made_up(20).assign(**BAD[message]), **QUICK)


def test_a_column_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"right: 'rihgt' given.*did you mean 'right'"):
        evaluate(made_up(20), "rihgt")
    with pytest.raises(ValueError, match=r"column: 'log_epistemic' given.*did you mean 'epistemic'"):
        evaluate(made_up(20).drop(columns="log_epistemic"), **QUICK)
    with pytest.raises(ValueError, match=r"scores: 'epistemc' given.*did you mean 'epistemic'"):
        evaluate(made_up(20), scores=["epistemc"], **QUICK)


@pytest.mark.parametrize("given", [None, [1], {"right": [1]}, "scores.parquet", made_up(20)["right"]])
def test_what_is_no_table_is_refused(unchecked, given) -> None:
    with pytest.raises(ValueError, match=r"^table: .* given, a DataFrame whose columns differ in their names wanted"):
        evaluate(given, **QUICK)


def test_names_of_columns_are_texts_each_given_once(unchecked) -> None:
    table = made_up(100)
    for name in ("right", "log_prob", "prompt"):
        with pytest.raises(ValueError, match=r"^table: DataFrame given, a DataFrame whose columns differ"):
            evaluate(pd.concat([table, table[[name]]], axis=1), **QUICK)
    numbered = table.rename(columns={"right": 0, "n_tokens": 1})
    found = evaluate(numbered, "0", scores=["likelihood", "1"], **QUICK).table
    pd.testing.assert_series_equal(
        found["value"], evaluate(table, scores=["likelihood", "n_tokens"], **QUICK).table["value"]
    )
    for name in (["right"], table["right"], 3):
        with pytest.raises(ValueError, match=r"(?s)^right: .* given, one of prompt, "):
            evaluate(table, name, **QUICK)
    alone = evaluate(table, scores="epistemic", **QUICK).table
    assert set(alone["score"]) == {"epistemic"}


def test_few_clusters_and_rows_that_all_failed_are_named_as_such() -> None:
    table = made_up(100)
    with pytest.raises(ValueError, match=r"^clusters: 2 given, too few for 40 different resamples"):
        evaluate(table.assign(kind=["a", "b"] * 50), clusters="kind", **QUICK)
    with pytest.raises(ValueError, match=r"^right: 0 right and 0 wrong answers given beside errors, some of both"):
        evaluate(table.assign(error="too long"), **QUICK)


def test_what_memory_does_not_take_is_refused_with_the_number_that_it_does() -> None:
    with pytest.raises(ValueError, match=r"n_resamples: 10000000 of 20 rows given.*n_resamples of at most 5000000"):
        evaluate(made_up(20), n_resamples=10**7)


def test_a_pair_that_whole_clusters_cannot_fit_is_named_and_the_rest_stays() -> None:
    table = made_up()
    sides = table.assign(document=np.where(table["right"], "all that are right", table.index.astype(str)))
    found = evaluate(sides, clusters="document", **QUICK)
    assert set(found.table["score"]) == set(evaluate(sides, **QUICK).table["score"]) - {"combined", "likelihood_fitted"}
    assert [text for text in found.warnings if text.startswith("combined: not fitted; clusters: one that holds nearly")]
