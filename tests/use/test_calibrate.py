"""The probability that an answer is wrong, what it is worth on new answers, and when to answer."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from isouq import cli
from isouq.studies import fits
from isouq.use import commands
from isouq.use.calibrate import METHODS, Calibrator, calibrate
from isouq.use.evaluate import features_of
from labelled import made_up

QUICK = {"n_resamples": 100}
ABOUT = {"model": "tiny", "weights": "12", "aggregation": "sequence", "dtype": "float32"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return made_up(400)


def line(features: np.ndarray, wrong: np.ndarray):
    return make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000)).fit(features, wrong)


def plain_p_wrong(train: np.ndarray, wrong: np.ndarray, test: np.ndarray, method: str) -> np.ndarray:
    """scikit-learn alone: a logistic regression, and for isotonic the steps of its log-odds."""
    fitted = line(train, wrong)
    if method == "logistic":
        return fitted.predict_proba(test)[:, 1]
    steps = IsotonicRegression(out_of_bounds="clip").fit(fitted.decision_function(train), wrong)
    return steps.predict(fitted.decision_function(test))


@pytest.mark.parametrize("method", METHODS)
def test_p_wrong_is_scikit_learns_of_all_answers_and_errors_are_of_unseen_ones(table, method) -> None:
    features, wrong = features_of(table, "combined"), ~table["right"].to_numpy()
    found = calibrate(table, method=method, **QUICK)
    assert found.apply(table).to_numpy() == pytest.approx(plain_p_wrong(features, wrong, features, method), abs=1e-5)
    brier = []
    for seed in range(20):
        held_out = np.empty(len(wrong))
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(features, wrong):
            held_out[test] = plain_p_wrong(features[train], wrong[train], features[test], method)
        brier.append(fits.brier(held_out, wrong))
    assert found.brier[0] == pytest.approx(np.mean(brier), abs=1e-5)
    assert found.brier[1] < found.brier[0] < found.brier[2]
    assert found.n == 400


def test_p_wrong_is_the_share_of_wrong_answers_among_new_ones(table) -> None:
    new = made_up(20_000, seed=1)
    for score, method in (("combined", "logistic"), ("likelihood", "isotonic")):
        found = calibrate(table, score=score, method=method, **QUICK)
        p = found.apply(new)
        assert found.ece[1] <= fits.ece(p, ~new["right"]) <= 0.08
        assert found.brier[1] <= fits.brier(p, ~new["right"]) <= found.brier[2]


def test_a_calibrator_is_plain_json_that_reads_back_as_itself(table, tmp_path) -> None:
    found = calibrate(table, score="likelihood", method="isotonic", abstain=0.8, about=ABOUT, **QUICK)
    found.save(tmp_path / "mine.json")
    again = Calibrator.load(tmp_path / "mine.json")
    assert again == found
    assert json.loads((tmp_path / "mine.json").read_text())["isouq calibrator"]["about"] == ABOUT
    assert again.apply(table).tolist() == found.apply(table).tolist()


def test_failed_rows_have_no_p_wrong_and_a_tables_own_index_stays(table) -> None:
    failed = table.iloc[:2].assign(error="too long", log_prob=None, right=None)
    mixed = pd.concat([failed, table]).set_axis(np.arange(402) * 10)
    found = calibrate(table, **QUICK)
    assert calibrate(mixed, **QUICK).coefficients == found.coefficients
    p = found.apply(mixed)
    assert p.index.equals(mixed.index)
    assert p.isna().tolist() == [True, True] + [False] * 400
    assert p.to_numpy()[2:].tolist() == found.apply(table).tolist()
    assert found.apply(mixed.iloc[:2]).isna().all()


# When to answer


def test_the_threshold_keeps_the_accuracy_on_new_answers(table) -> None:
    new = made_up(20_000, seed=1)
    found = calibrate(table, score="likelihood", abstain=0.8, **QUICK)
    answered = found.apply(new) <= found.threshold
    assert found.accuracy[1] <= new["right"][answered].mean() <= found.accuracy[2]
    assert found.answered[1] <= answered.mean() <= found.answered[2]
    assert new["right"][answered].mean() > new["right"].mean() + 0.1
    stricter = calibrate(table, score="likelihood", abstain=0.85, **QUICK)
    assert stricter.threshold < found.threshold
    assert stricter.answered[0] < found.answered[0]


def test_the_threshold_is_the_largest_that_held_out_labels_allow(table) -> None:
    features, wrong = features_of(table, "likelihood"), ~table["right"].to_numpy()
    held_out = expit(fits.cross_fitted(features, wrong))
    found = calibrate(table, score="likelihood", abstain=0.8, **QUICK)
    accuracy = {p: np.mean(~np.broadcast_to(wrong, held_out.shape)[held_out <= p]) for p in np.unique(held_out)}
    assert found.threshold == pytest.approx(max(p for p, right in accuracy.items() if right >= 0.8))


def test_a_cluster_shares_its_fold_and_is_drawn_whole(table) -> None:
    five = pd.concat([table[:60]] * 5, ignore_index=True).assign(document=[*range(60)] * 5)
    wrong, documents = ~five["right"].to_numpy(), five["document"].astype(str).to_numpy()
    folds = fits.draw_folds(wrong, clusters=np.array([*range(60)] * 5))
    assert all(len({*folds[documents == name]}) == 1 for name in documents)
    options = {"score": "likelihood", "abstain": 0.7, **QUICK}
    found, alone = calibrate(five, clusters="document", **options), calibrate(five, **options)
    for name in ("brier", "answered"):
        (_, low, high), (_, narrow_low, narrow_high) = getattr(found, name), getattr(alone, name)
        assert high - low > 1.3 * (narrow_high - narrow_low), name
    sides = five.assign(document=np.where(wrong, "all that are wrong", documents))
    with pytest.raises(ValueError, match="document: one that holds nearly all right or all wrong answers"):
        calibrate(sides, clusters="document", **options)


def test_no_threshold_is_an_error_and_leaves_no_file(table, tmp_path, capsys) -> None:
    table.assign(right=np.arange(400) % 2 == 0).to_csv(tmp_path / "scores.csv")
    command = ["calibrate", str(tmp_path / "scores.csv"), "--right", "right", "--out", str(tmp_path / "mine.json")]
    assert cli.main([*command, "--abstain", "0.99", "--resamples", "100"]) == 1
    shown = capsys.readouterr().err
    assert "abstain: 0.99 given, but no threshold keeps it among 10 answers or more; the best one has" in shown
    assert not (tmp_path / "mine.json").exists()


# Refused by name


def test_a_calibrator_of_another_run_is_refused_by_what_differs(table) -> None:
    found = calibrate(table, about=ABOUT, **QUICK)
    found.check(ABOUT | {"model": "a folder", "isouq": "9"})
    for name in ("weights", "aggregation", "dtype"):
        with pytest.raises(ValueError, match=rf"calibrator: it is of other scores \({name} .* 'x'"):
            found.check(ABOUT | {name: "x"})


def test_one_that_does_not_say_its_run_is_used_with_a_warning(table) -> None:
    found = calibrate(table, **QUICK)
    with pytest.warns(UserWarning, match="do not say which model they are of"):
        found.check(ABOUT)


@pytest.mark.parametrize("content", ["", "[]", '{"isouq calibrator": {}}', '{"isouq calibrator": {"knots": null}}'])
def test_what_is_no_calibrator_is_refused(tmp_path, content) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json: no calibrator"):
        Calibrator.load(tmp_path / "mine.json")
    with pytest.raises(ValueError, match="calibrator: there is no file"):
        Calibrator.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "change",
    [
        {"coefficients": "abc"},
        {"coefficients": [1.0]},
        {"coefficients": [0.0, 1.0, 2.0]},
        {"coefficients": [0.0, None]},
        {"coefficients": [0.0, float("nan")]},
        {"knots": [[0.0, 1.0], [0.1]]},
        {"knots": [[1.0, 0.0], [0.1, 0.5]]},
        {"knots": [[0.0, 1.0], [0.1, 5.0]]},
        {"knots": []},
        {"about": [1]},
    ],
)
def test_a_calibrator_with_other_numbers_than_a_maps_is_refused(table, tmp_path, change) -> None:
    path = tmp_path / "mine.json"
    calibrate(table, score="likelihood", **QUICK).save(path)
    fields = json.loads(path.read_text())["isouq calibrator"]
    for content in ({"isouq calibrator": fields | change}, {"isouq calibrator": [fields]}, {"isouq calibrator": None}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"mine\.json: no calibrator"):
            Calibrator.load(path)


def test_scores_far_from_0_or_all_alike_are_fitted_and_one_beyond_all_others_is_refused(table) -> None:
    of = {"score": "mine", **QUICK}
    near = calibrate(table.assign(mine=-table["log_prob"]), **of)
    far = calibrate(table.assign(mine=1e6 - table["log_prob"]), **of)
    assert far.coefficients[1] == pytest.approx(near.coefficients[1], rel=1e-6)
    assert far.brier == pytest.approx(near.brier, rel=1e-6)
    alike = calibrate(table.assign(mine=0.1), **of)
    assert alike.apply(table.assign(mine=0.1)).to_numpy() == pytest.approx(1 - table["right"].mean())
    for value, message in ((1e12, "mine: a feature with values far beyond"), (1e200, "mine: values up to 1.0e\\+200")):
        with pytest.raises(ValueError, match=message):
            calibrate(table.assign(mine=np.append(value, -table["log_prob"][1:])), **of)


@pytest.mark.parametrize("abstain", [0.0, 1.0, 1.5, -0.1, np.nan])
def test_an_accuracy_outside_0_and_1_is_refused(table, abstain) -> None:
    with pytest.raises(ValueError, match=r"abstain: .* given, a finite number above 0 and below 1 wanted"):
        calibrate(table, abstain=abstain, **QUICK)


def test_fewer_answers_than_folds_one_class_and_unknown_words_are_refused(table) -> None:
    cases = {
        "right: 396 right and 4 wrong answers given, of each as many as the 5 folds wanted": {"wrong": 4},
        "right: 400 right and 0 wrong answers given": {"wrong": 0},
    }
    for message, case in cases.items():
        with pytest.raises(ValueError, match=message):
            calibrate(table.assign(right=np.arange(400) >= case["wrong"]), **QUICK)
    with pytest.raises(ValueError, match=r"method: 'isotone' given.*did you mean 'isotonic'"):
        calibrate(table, method="isotone", **QUICK)
    with pytest.raises(ValueError, match=r"scores: 'combind' given.*did you mean 'combined'"):
        calibrate(table, score="combind", **QUICK)
    with pytest.raises(ValueError, match=re.escape("log_epistemic: inf given in row 1, a finite number wanted")):
        calibrate(table, **QUICK).apply(table.assign(log_epistemic=np.inf))


def test_the_command_lines_words_are_the_functions() -> None:
    assert commands.METHODS == METHODS
