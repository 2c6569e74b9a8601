"""Statistics against closed forms, scipy and scikit-learn, and what they must refuse."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from isouq.studies import evaluation, resamples


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


def test_auroc_ranks_infinite_scores() -> None:
    assert evaluation.auroc([-np.inf, 0.0, 1.0], [False, True, True]) == 1.0


@pytest.mark.parametrize("label", [True, False])
def test_auroc_of_one_class_is_an_error(label: bool) -> None:
    with pytest.raises(ValueError, match="needs right and wrong"):
        evaluation.auroc([1.0, 2.0], [label, label])


def test_wrong_must_be_labels_of_the_same_length() -> None:
    with pytest.raises(ValueError, match="only true/false"):
        evaluation.auroc([1.0, 2.0], [0, 2])
    with pytest.raises(ValueError, match="score and wrong: 3, 2 rows given, one length"):
        evaluation.auroc([1.0, 2.0, 3.0], [0, 1])


def stratified_auroc(score, wrong, stratum) -> float:
    weights = np.ones((1, len(wrong)))
    return evaluation.weighted_auroc(np.array(score, float), np.array(wrong, bool), weights, np.array(stratum))[0]


def test_stratified_auroc_ignores_what_the_stratum_explains() -> None:
    rng = np.random.default_rng(0)
    stratum = rng.integers(0, 4, 2000)
    wrong = rng.random(2000) < 0.2 + 0.2 * stratum
    score = stratum + 0.01 * rng.normal(size=2000)  # knows the stratum and nothing else
    assert evaluation.auroc(score, wrong) > 0.65
    assert stratified_auroc(score, wrong, stratum) == pytest.approx(0.5, abs=0.04)


def test_stratified_auroc_weighs_pairs_by_hand() -> None:
    # stratum 0: one pair, won; stratum 1: two pairs, one won; stratum 2: one class, no pair
    score, wrong, stratum = [2, 1, 2, 1, 3, 9], [1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 2]
    assert stratified_auroc(score, wrong, stratum) == 2 / 3
    assert evaluation.n_pairs(wrong, stratum) == 3
    plan = evaluation.Resamples.of(wrong, n_resamples=40)
    assert evaluation.stratified_ranking(score, wrong, stratum, plan).value == 2 / 3
    with pytest.raises(ValueError, match="no stratum"):
        evaluation.stratified_ranking(score, wrong, range(6), plan)
    with pytest.raises(evaluation.UndefinedStatisticError, match="one stratum given, at least two wanted"):
        evaluation.stratified_ranking(score, wrong, [1] * 6, plan)


def test_correlations_equal_scipy(scored: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scored[0], np.exp(scored[0]) + np.arange(200)
    assert evaluation.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert evaluation.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


def auroc_interval(score, wrong, **options):
    return evaluation.ranking(score, wrong, evaluation.Resamples.of(wrong, **options)).interval()


def auroc_difference(score, control, wrong, **options):
    plan = evaluation.Resamples.of(wrong, **options)
    return evaluation.ranking(score, wrong, plan).minus(evaluation.ranking(control, wrong, plan)).interval()


def test_bootstrap_covers_the_true_mean_at_its_level() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        interval = evaluation.bootstrap_interval(np.mean, rng.normal(size=80), n_resamples=100, seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert 180 <= hits <= 199  # binomial(200, 0.95) leaves this range with chance about 0.001


def test_bootstrap_resamples_rows_jointly_and_repeats_with_its_seed(scored) -> None:
    score, wrong = scored
    zero = auroc_difference(score, 2 * score, wrong)
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)
    first, again = (auroc_interval(score, wrong, seed=5) for _ in range(2))
    assert first == again
    assert first != auroc_interval(score, wrong, seed=6)
    assert first.low < first.value < first.high
    assert first.n == 200


def test_bootstrap_redraws_resamples_of_one_class_and_says_when_it_cannot() -> None:
    interval = auroc_interval([0.0, 1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1, 1])
    assert (interval.low, interval.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="undefined on more than half"):
        evaluation.bootstrap_interval(_defined_only_without_repeats, np.arange(20), n_resamples=40)


def _defined_only_without_repeats(column: np.ndarray) -> float:
    if len(set(column)) < len(column):
        raise evaluation.UndefinedStatisticError
    return 0.0


def test_wilson_interval_has_the_published_value() -> None:
    interval = evaluation.wilson_interval(0, 10)  # upper end z²/(n + z²)
    assert interval.low == 0.0
    assert interval.high == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)


def test_enough_of_both_is_the_declared_rule() -> None:
    assert evaluation.enough_of_both([True] * 10 + [False] * 10)
    assert not evaluation.enough_of_both([True] * 50 + [False] * 9)


@pytest.mark.parametrize("scale", [1.0, 1e8])
def test_a_column_that_varies_by_rounding_only_is_constant(scale: float) -> None:
    noise = 1 + 1e-12 * np.arange(20)
    assert evaluation.is_constant(scale * noise)
    assert not evaluation.is_constant(scale * (1 + 1e-6 * np.arange(20)))
    for correlation in (evaluation.pearson, evaluation.spearman):
        with pytest.raises(evaluation.UndefinedStatisticError, match="a is constant"):
            correlation(scale * noise, np.arange(20.0))


# All resamples at once, and what the intervals are worth


def test_auroc_of_all_resamples_at_once_equals_one_at_a_time(scored) -> None:
    score, wrong = scored
    weights = evaluation.Resamples.of(wrong, n_resamples=40).counts
    values = evaluation.weighted_auroc(score, wrong, weights)
    assert values == pytest.approx([roc_auc_score(wrong, score, sample_weight=row) for row in weights], abs=1e-12)
    several = np.random.default_rng(0).normal(size=weights.shape)
    values = evaluation.weighted_auroc(several, wrong, weights)
    wanted = [roc_auc_score(wrong, s, sample_weight=row) for s, row in zip(several, weights, strict=True)]
    assert values == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(evaluation.weighted_auroc(score, wrong, wrong[None, :] * 1.0)).all()


def test_stratified_auroc_of_all_resamples_at_once_counts_the_same_pairs(scored) -> None:
    score, wrong = scored
    stratum = np.arange(200) % 3
    weights = evaluation.Resamples.of(wrong, n_resamples=40).counts
    values = evaluation.weighted_auroc(score, wrong, weights, stratum)
    for row, value in zip(weights, values, strict=True):
        rows = np.repeat(np.arange(200), row.astype(int))
        assert value == pytest.approx(stratified_auroc(score[rows], wrong[rows], stratum[rows]), abs=1e-12)


def test_bca_equals_scipy() -> None:
    column = np.random.default_rng(0).gamma(2.0, size=40)
    ours = evaluation.bootstrap_interval(np.mean, column, n_resamples=5000)
    options = {"method": "BCa", "n_resamples": 5000, "random_state": 1}
    theirs = stats.bootstrap((column,), np.mean, **options).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.05)  # ours uses Student's t with 39 degrees of freedom


def miss_rate(interval_of, truth: float, make, n_runs: int) -> float:
    """Return how often an interval misses the truth, over made-up samples (score, wrong)."""
    intervals = [interval_of(*make(np.random.default_rng(run)), run) for run in range(n_runs)]
    return float(np.mean([not one.low <= truth <= one.high for one in intervals]))


def test_few_right_answers_do_not_narrow_the_interval() -> None:
    def make(rng):
        wrong = np.arange(120) >= 11
        return rng.normal(size=120) + 1.2 * wrong, wrong

    def percentile(score, wrong, seed):
        plan = evaluation.Resamples.of(wrong, n_resamples=200, seed=seed)
        low, high = np.nanquantile(evaluation.ranking(score, wrong, plan).draws, [0.025, 0.975])
        return evaluation.Interval(0.5, low, high, 120)

    truth = stats.norm.cdf(1.2 / np.sqrt(2))
    after = miss_rate(lambda s, w, seed: auroc_interval(s, w, n_resamples=200, seed=seed), truth, make, 200)
    assert after <= 0.08
    assert after < miss_rate(percentile, truth, make, 200)


def test_questions_that_share_a_cluster_are_resampled_together() -> None:
    def make(rng):
        cluster = np.repeat(np.arange(24), 5)
        wrong = rng.random(24)[cluster] < 0.5
        return rng.normal(size=24)[cluster] + 0.1 * rng.normal(size=120), wrong

    def by_cluster(score, wrong, seed):
        plan = evaluation.Resamples.of(wrong, clusters=np.arange(120) // 5, n_resamples=200, seed=seed)
        return evaluation.ranking(score, wrong, plan).interval()

    alone = miss_rate(lambda s, w, seed: auroc_interval(s, w, n_resamples=200, seed=seed), 0.5, make, 100)
    assert alone > 0.2
    assert miss_rate(by_cluster, 0.5, make, 100) <= 0.1


def test_equal_scores_are_seldom_told_apart_and_unequal_ones_are() -> None:
    def make(rng, gap: float = 0.0):
        wrong = rng.random(120) < 0.5
        shared = rng.normal(size=120)
        first, second = (shared + rng.normal(size=120) + (0.5 + extra) * wrong for extra in (gap, 0.0))
        return (first, second), wrong

    def difference(pair, wrong, seed):
        return auroc_difference(*pair, wrong, n_resamples=200, seed=seed)

    assert miss_rate(difference, 0.0, make, 150) <= 0.08
    assert miss_rate(difference, 0.0, lambda rng: make(rng, 1.0), 30) > 0.8


def test_leaving_out_sets_of_answers_tells_the_same_interval_as_leaving_out_each(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(400) < 0.1
    score = rng.gamma(1.0, size=400) + wrong
    each = auroc_interval(score, wrong)
    monkeypatch.setattr(resamples, "MOST_LEFT_OUT", 100)
    plan = evaluation.Resamples.of(wrong)
    assert plan.left_out.shape == (100, 400)
    assert (plan.left_out.sum(axis=0) == 99).all()
    sets = evaluation.ranking(score, wrong, plan).interval()
    assert (sets.low, sets.high) == pytest.approx((each.low, each.high), abs=0.1 * (each.high - each.low))


def test_max_t_is_a_single_comparison_for_copies_and_grows_for_others() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(150) < 0.5
    plan = evaluation.Resamples.of(wrong)
    scores = [evaluation.ranking(rng.normal(size=150) + wrong, wrong, plan) for _ in range(4)]
    assert evaluation.max_t(scores[:1] * 3) == pytest.approx(1.96, abs=0.08)
    assert evaluation.max_t(scores) == pytest.approx(2.49, abs=0.12)  # four independent ones
    with pytest.raises(ValueError, match="rankings: 0 given"):
        evaluation.max_t([])


# Refused by name


def test_two_sides_of_different_questions_are_refused(scored) -> None:
    score, wrong = scored
    one = evaluation.ranking(score, wrong, evaluation.Resamples.of(wrong, n_resamples=40))
    other = evaluation.ranking(score[:-1], wrong[:-1], evaluation.Resamples.of(wrong[:-1], n_resamples=40))
    with pytest.raises(ValueError, match="the same questions on both sides wanted"):
        one.minus(other)
    with pytest.raises(ValueError, match="plan: resamples of 199 questions given, of 200 wanted"):
        evaluation.ranking(score, wrong, evaluation.Resamples.of(wrong[:-1], n_resamples=40))
    missing = np.where(np.arange(200) == 3, np.nan, score)
    with pytest.raises(ValueError, match="NaN at 1 of 200"):
        auroc_difference(score, missing, wrong)


def test_fewer_than_two_clusters_are_refused(scored) -> None:
    with pytest.raises(evaluation.UndefinedStatisticError, match="clusters: 1 given, at least 2 wanted"):
        evaluation.Resamples.of(scored[1], clusters=["a"] * 200)
    with pytest.raises(ValueError, match="clusters: 1 of 200 rows have no group"):
        evaluation.Resamples.of(scored[1], clusters=[None] + ["a"] * 199)
