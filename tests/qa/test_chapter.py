"""What the chapter shows: its tables and figures from two models' made-up answers, and its size."""

import inspect

import matplotlib
import numpy as np
import pandas as pd
import pytest
from test_across import asked
from test_analysis import QUICK, made_up

from isouq.studies import plotting, widgets
from isouq.studies.qa import analysis, details, plots, rivals, tables
from isouq.studies.results import Result

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figure_style")
SMOL = "smollm2-135m-instruct"
PAIRS = ((SMOL, "triviaqa"), (SMOL, "truthfulqa_choose"), ("owner/Other-1", "triviaqa"), (SMOL, "wikidata"))


def with_texts(table: pd.DataFrame) -> pd.DataFrame:
    texts = {"question": "Why?", "answer": "Because.", "reference": "because", "ended_by": "newline"}
    table = table.assign(**texts)
    table.attrs |= {"failed": {}, "made": "CPU, torch 2.13.0"}
    return table


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], pd.DataFrame]:
    """The last pair has too few right answers; the second is a choice."""
    found = {pair: with_texts(asked(seed, n=80)) for seed, pair in enumerate(PAIRS)}
    choice = found[PAIRS[1]]
    choice["right_by_mean"], choice["right_by_chance"] = choice["right"], 0.25
    found[PAIRS[3]] = with_texts(asked(3, n=12))
    return found


@pytest.fixture(scope="module")
def ranked(answers):
    return {pair: analysis.rank(table, QUICK) for pair, table in answers.items()}


@pytest.fixture(scope="module")
def results(answers, ranked) -> dict[str, Result]:
    return details.all_results(answers, ranked, {PAIRS[0]: answers[PAIRS[0]].head(60)}, QUICK)


def test_all_results_are_those_of_each_pair_of_all_models_and_of_the_bare_prompt(answers, results) -> None:
    prefix = f"qa.{SMOL}.triviaqa"
    assert results[f"{prefix}.accuracy"].value == answers[PAIRS[0]]["right"].mean()
    assert results[f"{prefix}.bare.accuracy"].n == results[f"{prefix}.p_true_bare.auroc"].n == 60
    for metric in ("prr", "aurc", "brier", "ece"):
        one = results[f"{prefix}.likelihood_fitted.{metric}"]
        assert one.low <= one.value <= one.high
    assert "qa.mean.triviaqa.combined.auroc_over_p_true" in results
    assert "qa.owner-other-1.triviaqa.epistemic.auroc" in results
    assert not any(key.startswith("qa.mean.truthfulqa_choose") for key in results), "one model is no mean"
    gains = [results[f"qa.{model}.combined.auroc_gain"] for model in (f"{SMOL}.triviaqa", "owner-other-1.triviaqa")]
    gains.append(results[f"qa.{SMOL}.truthfulqa_choose.combined.auroc_gain"])  # Wikidata has too few right answers
    counts = [results[f"qa.gain.combined.{name}"].value for name in ("pairs", "above", "below")]
    assert counts == [3, sum(one.low > 0 for one in gains), sum(one.high < 0 for one in gains)]


def test_a_rival_that_points_the_wrong_way_is_turned_by_a_fit_of_its_own(answers, ranked, results) -> None:
    turned = {pair: table.assign(p_true=-table["p_true"]) for pair, table in answers.items() if pair[1] == "triviaqa"}
    of_turned = {pair: analysis.rank(table, QUICK) for pair, table in turned.items()}
    for pair in turned:
        raw, back = (of[pair]["sequence"]["p_true"].value for of in (ranked, of_turned))
        fitted, again = (of[pair]["sequence"]["p_true_fitted"].value for of in (ranked, of_turned))
        assert back == pytest.approx(1 - raw)
        assert again == pytest.approx(fitted)
    table = tables.fair(results)
    assert list(table) == ["raw", "fitted", "pair", "pair − fitted"]
    one = results["qa.mean.triviaqa.combined.auroc_over_p_true_fitted"]
    assert table.loc[("TriviaQA", "P(True)"), "pair − fitted"].startswith(f"{one.value:.2f}")
    assert tables.fair({}).iloc[0, 0].startswith("fewer than two models")


def test_a_pair_is_called_by_short_names() -> None:
    assert tables.label(PAIRS[1]) == ("SmolLM2", "TruthfulQA (choice)")
    assert tables.label(("owner/Other-1", "my/Some file.csv")) == ("Other-1", "some-file")


def test_the_question_of_p_true_is_the_shortest_of_the_table_with_its_answer(answers) -> None:
    table = answers[PAIRS[0]].assign(question="A longer question?")
    table.loc[table.index[3], ["question", "answer"]] = "Short?", "Yes."
    lines = tables.p_true_question(table).splitlines()
    assert "Question: Short?" in lines
    assert "Possible answer: Yes." in lines
    assert lines[-1].endswith(f": {rivals.SAME_MEANING}")


def test_named_results_stand_under_their_model_and_data_set(results) -> None:
    table = tables.named(results, "epistemic.auroc", "transfer.*", "combined.auroc_over_*", "within_length.pairs")
    one = results[f"qa.{SMOL}.triviaqa.epistemic.auroc"]
    wanted = f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]".replace(" ", "\u00a0")
    assert table.loc[("SmolLM2", "TriviaQA"), "epistemic: AUROC"] == wanted
    assert list(table)[:3] == ["epistemic: AUROC", "transfer: AUROC", "transfer: AUROC standardised"]
    transfer = results["qa.transfer.mean.triviaqa.auroc"]
    assert table.loc[("mean", "TriviaQA"), "transfer: AUROC"].startswith(f"{transfer.value:.2f}")
    pairs = results[f"qa.{SMOL}.triviaqa.within_length.pairs"].value
    assert table.loc[("SmolLM2", "TriviaQA"), "within length: pairs"] == f"{pairs:.0f}"
    assert "fitted pair − P(True): AUROC" in table
    assert tables.named(results, "no.such*").iloc[0, 0] == tables.TOO_FEW


def test_the_browser_has_the_first_questions_of_each_pair_with_verdicts_and_all_scores(answers) -> None:
    shown = tables.browsed(answers, 8)
    assert shown.groupby(["model", "data set"], observed=True).size().tolist() == [2, 2, 2, 2]
    assert list(shown)[:7] == ["model", "data set", "question", "answer", "reference", "right", "right by f1"]
    assert set(shown["right"]) <= {"yes", "no"}
    assert shown["right by mean"].isna().tolist() == [True] * 2 + [False] * 2 + [True] * 4
    first = answers[PAIRS[0]].iloc[0]
    scores = ["log_epistemic_sequence", "log_gradient", "p_true"]
    assert list(shown[["log U_E, sequence", "log G", "P(True)"]].iloc[0]) == list(first[scores])
    assert "right by chance" not in shown
    page = widgets.browser(tables.browsed({pair: pd.concat([table] * 9) for pair, table in answers.items()}), title="")
    assert page.data.count("<tr>") > 250
    assert len(page.data.encode()) < 300_000


def test_the_description_counts_and_has_the_chance_of_a_choice(answers) -> None:
    rows = tables.description(answers)
    right = rows.loc[("SmolLM2", "TriviaQA"), "right"].replace("\u00a0", " ")
    assert right == str(analysis.accuracy(answers[PAIRS[0]])).removesuffix(", n = 80")
    assert rows.loc[("SmolLM2", "TruthfulQA (choice)"), "by chance"] == "0.25"
    assert rows.loc[("Other-1", "TriviaQA"), "by chance"] == ""
    assert list(rows["questions"]) == [80, 80, 80, 12]


def test_rejection_ends_with_what_knowing_nothing_has(answers, results) -> None:
    rows = tables.rejection(answers, results)
    key = f"qa.{SMOL}.triviaqa.combined.ece"
    assert rows.loc[("SmolLM2", "TriviaQA", "fitted pair")].iloc[3].startswith(f"{results[key].value:.2f}")
    share = answers[PAIRS[0]]["wrong"].mean()
    nothing = rows.loc[("SmolLM2", "TriviaQA", "(knows nothing)")]
    assert list(nothing) == ["0.00", f"{share:.2f}", f"{share * (1 - share):.2f}", "0.00"]
    assert rows.loc[("SmolLM2", "TriviaQA", "P(True)"), "Brier"] == ""
    assert list(rows) == ["PRR, under 50% withheld", "AURC", "Brier", "ECE, 5 bins"]
    assert ("SmolLM2", "Wikidata") not in rows.index.droplevel(-1)
    assert tables.rejection({PAIRS[3]: answers[PAIRS[3]]}, results).iloc[0, 0] == tables.TOO_FEW


def test_prompts_stand_side_by_side_and_say_where_there_is_no_number(answers) -> None:
    table = tables.prompts(answers, {PAIRS[0]: answers[PAIRS[0]].head(12)}, QUICK)
    assert [column[2] for column in table] == ["examples", "bare"]
    assert table.loc["accuracy"].str.endswith("n = 12").all()
    assert (table.loc["P(True)"] == tables.TOO_FEW).all()
    assert tables.prompts(answers, {}, QUICK).iloc[0, 0] == "not asked"


def test_rows_by_pair_are_joined_and_a_table_without_rows_says_why(answers) -> None:
    rows = tables.by_pair(answers, details.judges)
    assert list(rows.loc[("SmolLM2", "TriviaQA"), "judge"]) == ["own", "f1"]
    assert not rows.isna().any(axis=None)
    few = {PAIRS[3]: answers[PAIRS[3]]}
    assert tables.by_pair(few, lambda table: analysis.added_signal(table, QUICK)).iloc[0, 0] == tables.TOO_FEW


@pytest.mark.parametrize("name", ["accuracies", "layers", "within", "against_probability", "worth", "aurocs"])
def test_a_figure_has_a_panel_for_each_pair_and_shows_what_is_missing(name, answers, ranked) -> None:
    if name == "within":  # of one model
        answers = {pair: table for pair, table in answers.items() if pair[0] == SMOL}
    found = {"answers": answers, "ranked": ranked, "analysed": QUICK}
    found["found"] = {pair: analysis.auroc_table(table, ranked[pair]) for pair, table in answers.items()}
    draw = getattr(plots, name)
    figure = draw(*(found[argument] for argument in inspect.signature(draw).parameters))
    axes = [ax for ax in figure.axes if ax.get_visible()]
    n_rows = {"within": 2, "against_probability": 3}.get(name, 1)
    assert len(axes) == n_rows * len(answers)
    assert all(ax.lines or ax.collections or ax.texts for ax in axes)


def test_the_curve_of_a_panel_is_the_accuracy_by_share(answers) -> None:
    figure = plots.accuracies({PAIRS[0]: answers[PAIRS[0]]}, QUICK)
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for name, curve in details.curves(answers[PAIRS[0]], QUICK).items():
        assert drawn[plotting.METHODS[name].label] == pytest.approx(curve)


def test_u_a_lies_on_its_curve(answers) -> None:
    figure = plots.against_probability({PAIRS[0]: answers[PAIRS[0]]})
    points = np.concatenate([np.asarray(drawn.get_offsets()) for drawn in figure.axes[0].collections])
    assert points[:, 1] == pytest.approx(np.exp(points[:, 0]) * (1 - np.exp(points[:, 0])))


def test_made_up_answers_without_rivals_have_figures_too() -> None:
    table = with_texts(made_up(80))
    assert set(details.curves(table, QUICK)) == {"aleatoric", "epistemic", "likelihood", "combined"}
