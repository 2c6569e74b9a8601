"""Accuracy by share answered, AURC and PRR against a count by hand, the plainest loop, and all orders of ties."""

import itertools

import numpy as np
import pytest

from isouq.studies import evaluation, rejection
from isouq.studies.evaluation import Resamples


def made_up(n: int = 60, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + wrong, 1), wrong  # rounding makes ties


def plain_area(order, wrong, max_rejection: float) -> float:
    """lm-polygraph's area under the rejection curve: reject the last of `order` one by one, before the limit."""
    n = len(order)
    kept = [order[: n - rejected] for rejected in range(int(max_rejection * n))]
    return float(np.mean([np.mean([not wrong[i] for i in some]) for some in kept]))


def plain_prr(score, wrong, max_rejection: float) -> float:
    """The ratio by loops, over all orders that sort the score."""
    rows = range(len(score))
    orders = [o for o in itertools.permutations(rows) if all(score[a] <= score[b] for a, b in itertools.pairwise(o))]
    area = np.mean([plain_area(order, wrong, max_rejection) for order in orders])
    oracle = plain_area(sorted(rows, key=lambda i: wrong[i]), wrong, max_rejection)
    random = np.mean([plain_area(order, wrong, max_rejection) for order in itertools.permutations(rows)])
    return float((area - random) / (oracle - random))


def test_four_answers_by_hand() -> None:
    score, wrong = [1, 2, 3, 4], [False, False, True, False]
    assert rejection.accuracies(score, wrong) == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert rejection.aurc(score, wrong) == pytest.approx(1 - (1 + 1 + 2 / 3 + 3 / 4) / 4)
    # kept are 4 or 3 answers: (3/4 + 2/3)/2 against 3/4 at random and (3/4 + 1)/2 of the oracle
    assert rejection.prr(score, wrong) == pytest.approx(((3 / 4 + 2 / 3) / 2 - 3 / 4) / ((3 / 4 + 1) / 2 - 3 / 4))


@pytest.mark.parametrize("max_rejection", [0.5, 1.0])
@pytest.mark.parametrize("score", [[3, 1, 2, 5, 4, 6], [1, 1, 2, 2, 2, 0], [7, 7, 7, 7, 7, 7]])
def test_the_ratio_equals_loops_over_all_orders_of_ties(score, max_rejection) -> None:
    wrong = [True, False, False, True, False, True]
    wanted = plain_prr(score, wrong, max_rejection)
    assert rejection.prr(score, wrong, max_rejection=max_rejection) == pytest.approx(wanted, abs=1e-12)


def test_the_ends_of_the_scale() -> None:
    _, wrong = made_up()
    assert rejection.prr(wrong, wrong) == pytest.approx(1, abs=1e-12)
    assert rejection.prr(np.zeros(60), wrong) == pytest.approx(0, abs=1e-12)
    assert rejection.aurc(np.zeros(60), wrong) == pytest.approx(wrong.mean())
    assert rejection.prr(~wrong, wrong) < -0.5


def test_at_full_rejection_the_ratio_is_aurc_on_another_scale() -> None:
    score, wrong = made_up()
    areas = [rejection.aurc(s, wrong) for s in (score, wrong, np.zeros(60))]
    ratio = (areas[2] - areas[0]) / (areas[2] - areas[1])
    assert rejection.prr(score, wrong, max_rejection=1.0) == pytest.approx(ratio)


@pytest.mark.parametrize("name", ["aurc", "prr"])
def test_a_resample_is_the_answers_that_it_drew(name) -> None:
    score, wrong = made_up()
    plan = Resamples.of(wrong, n_resamples=40)
    statistic = getattr(rejection, f"weighted_{name}")
    found = evaluation.ranking(score, wrong, plan, statistic)
    assert found.value == getattr(rejection, name)(score, wrong)
    for draw, counts in zip(found.draws, plan.counts.astype(int), strict=True):
        rows = np.repeat(np.arange(60), counts)
        assert draw == pytest.approx(getattr(rejection, name)(score[rows], wrong[rows]))
    several = np.random.default_rng(1).normal(size=plan.counts.shape)
    one_by_one = [statistic(s, wrong, w[None])[0] for s, w in zip(several, plan.counts, strict=True)]
    assert statistic(several, wrong, plan.counts) == pytest.approx(one_by_one)
    interval = found.interval()
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("statistic", [rejection.aurc, rejection.prr])
def test_one_class_is_refused_as_by_the_auroc(statistic) -> None:
    with pytest.raises(evaluation.UndefinedStatisticError, match="needs right and wrong answers; all 3 are wrong"):
        statistic([0.5, 0.0, 1.0], [True, True, True])


def test_two_answers_have_no_ratio_and_a_resample_of_two_no_draw() -> None:
    with pytest.raises(evaluation.UndefinedStatisticError, match="no value on 2 answers"):
        rejection.prr([1, 2], [False, True])
    score, wrong = np.array([1.0, 2.0, 3.0]), np.array([False, True, True])
    assert np.isnan(rejection.weighted_prr(score, wrong, np.array([[1.0, 1.0, 0.0]])))


def test_mean_and_deviation_are_of_the_first_300_resamples() -> None:
    score, wrong = made_up()
    found = evaluation.ranking(score, wrong, Resamples.of(wrong, n_resamples=400))
    assert found.as_in_paper() == (found.draws[:300].mean(), found.draws[:300].std())
