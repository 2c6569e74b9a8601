"""Statistics against closed forms, scipy and scikit-learn, and what they must refuse."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from isouq.studies import evaluation


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    wrong = rng.random(200) < 0.6
    return np.round(rng.normal(size=200) + wrong, 1), wrong  # rounding makes ties


def test_auroc_counts_pairs_by_hand() -> None:
    # pairs (wrong, right): (3, 1) won, (3, 3) tied, (0, 1) lost, (0, 3) lost
    assert evaluation.auroc([3, 0, 1, 3], [True, True, False, False]) == (1 + 0.5) / 4


def test_auroc_equals_scikit_learn_with_ties(scored: tuple[np.ndarray, np.ndarray]) -> None:
    score, wrong = scored
    assert evaluation.auroc(score, wrong) == pytest.approx(roc_auc_score(wrong, score), abs=1e-12)
    assert evaluation.auroc(-score, wrong) == pytest.approx(1 - evaluation.auroc(score, wrong), abs=1e-12)


def test_auroc_ranks_infinite_scores_but_refuses_nan() -> None:
    assert evaluation.auroc([-np.inf, 0.0, 1.0], [False, True, True]) == 1.0
    with pytest.raises(ValueError, match="score: NaN at 1 of 3"):
        evaluation.auroc([np.nan, 0.0, 1.0], [False, True, True])


@pytest.mark.parametrize("label", [True, False])
def test_auroc_of_one_class_is_an_error(label: bool) -> None:
    with pytest.raises(ValueError, match="needs right and wrong"):
        evaluation.auroc([1.0, 2.0], [label, label])


def test_wrong_must_be_labels_of_the_same_length() -> None:
    with pytest.raises(ValueError, match="only true/false"):
        evaluation.auroc([1.0, 2.0], [0, 2])
    with pytest.raises(ValueError, match="score and wrong: 3, 2 rows given, one length"):
        evaluation.auroc([1.0, 2.0, 3.0], [0, 1])


def test_stratified_auroc_ignores_what_the_stratum_explains() -> None:
    rng = np.random.default_rng(0)
    stratum = rng.integers(0, 4, 2000)
    wrong = rng.random(2000) < 0.2 + 0.2 * stratum
    score = stratum + 0.01 * rng.normal(size=2000)  # knows the stratum and nothing else
    assert evaluation.auroc(score, wrong) > 0.65
    assert evaluation.stratified_auroc(score, wrong, stratum) == pytest.approx(0.5, abs=0.04)


def test_stratified_auroc_weighs_pairs_by_hand() -> None:
    # stratum 0: one pair, won; stratum 1: two pairs, one won; stratum 2: one class, no pair
    score, wrong, stratum = [2, 1, 2, 1, 3, 9], [1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 2]
    assert evaluation.stratified_auroc(score, wrong, stratum) == 2 / 3
    with pytest.raises(ValueError, match="no stratum"):
        evaluation.stratified_auroc(score, wrong, range(6))


def test_correlations_equal_scipy(scored: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scored[0], np.exp(scored[0]) + np.arange(200)
    assert evaluation.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert evaluation.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


@pytest.mark.parametrize("correlation", [evaluation.pearson, evaluation.spearman])
def test_correlations_refuse_nan_and_constants(correlation) -> None:
    with pytest.raises(ValueError, match="b: NaN or infinite at 1 of 2"):
        correlation([0.0, 1.0], [0.0, np.nan])
    with pytest.raises(ValueError, match="a is constant"):
        correlation([1.0, 1.0], [0.0, 2.0])


def test_bootstrap_covers_the_true_mean_at_its_level() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        interval = evaluation.bootstrap_interval(np.mean, rng.normal(size=80), seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert 180 <= hits <= 199  # binomial(200, 0.95) leaves this range with chance about 0.001


def test_bootstrap_resamples_rows_jointly_and_repeats_with_its_seed(scored) -> None:
    score, wrong = scored
    zero = evaluation.auroc_difference(score, 2 * score, wrong)
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)
    first, again = (evaluation.auroc_interval(score, wrong, seed=5) for _ in range(2))
    assert first == again
    assert first != evaluation.auroc_interval(score, wrong, seed=6)
    assert first.low < first.value < first.high
    assert first.n == 200


def test_bootstrap_redraws_resamples_of_one_class_and_says_when_it_cannot() -> None:
    interval = evaluation.auroc_interval([0.0, 1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1, 1])
    assert (interval.low, interval.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="undefined on more than half"):
        evaluation.bootstrap_interval(_defined_only_in_order, np.arange(20))


def _defined_only_in_order(column: np.ndarray) -> float:
    if (np.diff(column) < 0).any():
        raise evaluation.UndefinedStatisticError
    return 0.0


def test_wilson_interval_has_the_published_value() -> None:
    interval = evaluation.wilson_interval(0, 10)  # upper end z²/(n + z²)
    assert interval.low == 0.0
    assert interval.high == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)
    with pytest.raises(ValueError, match="successes: 5 given"):
        evaluation.wilson_interval(5, 3)


def test_out_of_fold_scores_find_signal_and_do_not_leak() -> None:
    rng = np.random.default_rng(2)
    wrong = rng.random(300) < 0.5
    signal = np.column_stack([wrong + rng.normal(size=300), rng.normal(size=300)])
    assert evaluation.auroc(evaluation.out_of_fold_scores(signal, wrong), wrong) > 0.7
    # As many noise features as a fit could use to memorise its own labels; out of sample it must not.
    noise = rng.normal(size=(300, 100))
    assert evaluation.auroc(evaluation.out_of_fold_scores(noise, wrong), wrong) < 0.6


def test_out_of_fold_scores_refuse_what_they_cannot_fit() -> None:
    with pytest.raises(ValueError, match="3 right and 17 wrong answers given, of each as many as the 5 folds"):
        evaluation.out_of_fold_scores(np.arange(20.0)[:, None], [True] * 17 + [False] * 3)
    with pytest.raises(ValueError, match="features: NaN or infinite"):
        evaluation.out_of_fold_scores(np.full((20, 1), np.inf), [True, False] * 10)


def test_likelihood_ratio_is_chi_squared_when_nothing_is_added() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=(300, 200, 1))
    wrong = rng.random((300, 200)) < 1 / (1 + np.exp(-base[..., 0]))
    p_values = [evaluation.likelihood_ratio_test(base[i], rng.normal(size=(200, 1)), wrong[i])[1] for i in range(300)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_likelihood_ratio_finds_what_is_added_and_only_that() -> None:
    rng = np.random.default_rng(5)
    base, extra = rng.normal(size=(2, 400, 1))
    wrong = rng.random(400) < 1 / (1 + np.exp(-(base + extra)[:, 0]))
    statistic, p_value = evaluation.likelihood_ratio_test(base, extra, wrong)
    assert p_value < 1e-6
    assert p_value == pytest.approx(stats.chi2.sf(statistic, 1))
    twice = evaluation.likelihood_ratio_test(base, np.hstack([extra, 3 * extra - base]), wrong)
    assert twice == pytest.approx((statistic, p_value)), "a combination adds no degree of freedom"
    with pytest.raises(evaluation.UndefinedStatisticError, match="extra: constant, or the same as base"):
        evaluation.likelihood_ratio_test(np.hstack([base, extra]), base + 2 * extra, wrong)
    with pytest.raises(ValueError, match="right and wrong"):
        evaluation.likelihood_ratio_test(base, extra, np.ones(400))


def test_enough_of_both_is_the_declared_rule() -> None:
    assert evaluation.enough_of_both([True] * 10 + [False] * 10)
    assert not evaluation.enough_of_both([True] * 50 + [False] * 9)
