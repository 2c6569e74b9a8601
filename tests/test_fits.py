"""Fitted scores: the solver against scikit-learn, and how often their intervals err."""

import numpy as np
import pytest
from scipy import special
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from isouq.studies import evaluation, fits
from isouq.studies.evaluation import Resamples
from isouq.studies.fits import Fit

N = 120


def made_up(seed: int = 0, *, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated features on different scales, of which the first knows about wrong answers."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(N) < 0.5
    noise = rng.normal(size=(N, 2))
    first = noise[:, 0] + effect * wrong
    return np.column_stack([first, 30 * (first + 0.5 * noise[:, 1]) - 7]), wrong


def sklearn_fit() -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000))


def test_many_fits_at_once_equal_scikit_learn() -> None:
    features, wrong = made_up(effect=1.0)
    counts = Resamples.of(wrong, n_resamples=40).counts
    beta = fits.fit_logistic(features, wrong, counts)
    for row, weights in zip(beta[:5], counts[:5], strict=True):
        rows = np.repeat(np.arange(N), weights.astype(int))
        model = sklearn_fit().fit(features[rows], wrong[rows])
        assert row[0] + features @ row[1:] == pytest.approx(model.decision_function(features), abs=1e-5)


@pytest.mark.parametrize("seed", [59, 136, 311])  # Newton's method runs away from the fit to all examples in these
def test_a_fit_far_from_that_of_all_examples_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_t(2, size=(30, 2))
    wrong = features[:, 0] + np.abs(features[:, 0]).mean() * rng.uniform(0, 3) * rng.normal(size=30) > 0
    counts = np.stack([np.bincount(rng.integers(0, 30, 30), minlength=30) for _ in range(200)])
    for beta, count in zip(fits.fit_logistic(features, wrong, counts), counts, strict=True):
        if not np.isnan(beta).any():
            variance = np.average(features**2, axis=0, weights=count) - np.average(features, axis=0, weights=count) ** 2
            left = count * (wrong - special.expit(beta[0] + features @ beta[1:]))
            slope = np.append(left.sum(), (left @ features - variance * beta[1:]) / np.sqrt(variance))
            assert np.abs(slope).max() < 1e-9, "the penalised likelihood is largest where its slope is 0"


@pytest.mark.parametrize("separable", [False, True])
def test_scores_out_of_fold_equal_scikit_learn(separable: bool) -> None:
    features, wrong = made_up(effect=20.0 if separable else 0.5)
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    wanted = cross_val_predict(sklearn_fit(), features, wrong, cv=folds, method="decision_function")
    assert fits.out_of_fold_scores(features, wrong, seed=3) == pytest.approx(wanted, abs=1e-5)


def test_folds_keep_the_clusters_of_the_resamples_whole() -> None:
    features, wrong = made_up()
    clusters = np.arange(N) // 4
    plan = Resamples.of(wrong, clusters=clusters, n_resamples=40, seed=3)
    wanted = [
        cross_val_predict(
            sklearn_fit(),
            features,
            wrong,
            groups=clusters,
            cv=StratifiedGroupKFold(5, shuffle=True, random_state=seed),
            method="decision_function",
        )
        for seed in range(3, 3 + fits.N_REPEATS)
    ]
    assert Fit.of(features, wrong, plan).out_of_fold == pytest.approx(np.stack(wanted), abs=1e-5)
    apart = Resamples.of(wrong, clusters=[f"its own {i}" for i in range(N)], n_resamples=40, seed=3)
    assert (Fit.of(features, wrong, apart).out_of_fold[0] == fits.out_of_fold_scores(features, wrong, seed=3)).all()


def test_a_resample_of_one_class_has_no_fit_and_a_constant_feature_no_slope() -> None:
    features, wrong = made_up()
    beta = fits.fit_logistic(features, wrong, np.stack([wrong * 1.0, np.ones(N)]))
    assert np.isnan(beta[0]).all()
    constant = np.column_stack([features[:, 0], np.ones(N)])
    beta = fits.fit_logistic(constant, wrong, np.ones((1, N)))
    assert beta[0, 2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e5, 1e8])
def test_a_constant_feature_of_any_value_has_no_slope_and_one_far_from_0_its_own(value: float) -> None:
    features, wrong = made_up(effect=1.0)
    once = np.ones((1, N))
    alone = fits.fit_logistic(features[:, :1], wrong, once)[0]
    beside = fits.fit_logistic(np.column_stack([features[:, 0], np.full(N, value)]), wrong, once)[0]
    assert beside == pytest.approx([*alone, 0.0], abs=1e-9)
    assert fits.fit_logistic(np.full((N, 1), value), wrong, once)[0] == pytest.approx(
        [special.logit(wrong.mean()), 0.0], abs=1e-9
    )
    moved = fits.fit_logistic(features[:, :1] + 1e6, wrong, once)[0]
    assert moved == pytest.approx([alone[0] - 1e6 * alone[1], alone[1]], rel=1e-6)


def test_scores_out_of_fold_find_signal_and_do_not_leak() -> None:
    rng = np.random.default_rng(2)
    wrong = rng.random(300) < 0.5
    signal = np.column_stack([wrong + rng.normal(size=300), rng.normal(size=300)])
    assert evaluation.auroc(fits.out_of_fold_scores(signal, wrong), wrong) > 0.7
    # As many noise features as a fit could use to memorise its own labels; out of sample it must not.
    noise = rng.normal(size=(300, 100))
    assert evaluation.auroc(fits.out_of_fold_scores(noise, wrong), wrong) < 0.6


def test_scores_out_of_fold_refuse_what_they_cannot_fit() -> None:
    with pytest.raises(ValueError, match="3 right and 17 wrong answers given, of each as many as the 5 folds"):
        fits.out_of_fold_scores(np.arange(20.0)[:, None], [True] * 17 + [False] * 3)


def test_a_fitted_score_without_signal_seldom_excludes_chance() -> None:
    fixed, refit = [], []
    for seed in range(150):
        features, wrong = made_up(seed)
        scores = fits.out_of_fold_scores(features, wrong, seed=seed)
        plan = Resamples.of(wrong, n_resamples=200, seed=seed)
        fixed.append(evaluation.ranking(scores, wrong, plan).interval())
        draws = fits.fit_logistic(features, wrong, plan.counts)
        left_out = draws[:, :1] + draws[:, 1:] @ features.T
        values = evaluation.weighted_auroc(left_out, wrong, (plan.counts == 0) * 1.0)
        refit.append(evaluation.Interval(0.5, *np.nanquantile(values, [0.025, 0.975]), N))
    sizes = [np.mean([not one.low <= 0.5 <= one.high for one in found]) for found in (fixed, refit)]
    assert sizes[0] > 0.1, "fits held fixed are too sure"
    assert sizes[1] <= 0.06


def test_a_fitted_score_with_signal_excludes_chance() -> None:
    found = []
    for seed in range(10):
        features, wrong = made_up(seed, effect=1.0)
        found.append(Fit.of(features, wrong, Resamples.of(wrong, n_resamples=200, seed=seed)).ranking().interval())
    assert sum(one.low > 0.5 for one in found) >= 9


def test_a_coefficient_has_its_sign_and_seldom_excludes_zero_without_signal() -> None:
    excluded = []
    for seed in range(200):
        features, wrong = made_up(seed, effect=1.0)
        features = np.column_stack([features[:, 0], np.random.default_rng([seed, 1]).normal(size=N)])
        beta = fits.fit_logistic(features, wrong, Resamples.of(wrong, n_resamples=200, seed=seed).counts)
        low, high = np.quantile(beta[:, 2], [0.025, 0.975])
        excluded.append(not low <= 0 <= high)
        assert np.quantile(beta[:, 1], 0.025) > 0 or seed % 10, "the first feature warns of wrong answers"
    assert np.mean(excluded) <= 0.08


def test_a_feature_of_noise_adds_nothing_to_the_log_score_and_signal_does() -> None:
    rng = np.random.default_rng(0)
    features, wrong = made_up(effect=1.0)
    plan = Resamples.of(wrong, n_resamples=400)
    noise, signal = (np.column_stack([features[:, 0], x]) for x in (rng.normal(size=N), rng.normal(size=N) + wrong))
    small, useless, large = (Fit.of(x, wrong, plan) for x in (features[:, :1], noise, signal))
    assert useless.ranking(fits.weighted_log_score).minus(small.ranking(fits.weighted_log_score)).interval().low < 0
    gain = large.ranking(fits.weighted_log_score).minus(small.ranking(fits.weighted_log_score)).interval()
    assert gain.value > 0.05


def test_residual_ranks_hold_p_fixed_where_its_quartiles_do_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=4000)
    wrong = rng.random(4000) < 1 / (1 + np.exp(2 * p))
    score = np.exp(-p) + 0.05 * rng.normal(size=4000)  # p and noise
    quartile = np.searchsorted(np.quantile(p, [0.25, 0.5, 0.75]), p)
    assert evaluation.weighted_auroc(score, wrong, np.ones((1, len(p))), quartile)[0] > 0.6
    assert evaluation.auroc(fits.residual_ranks(score, p[:, None]), wrong) == pytest.approx(0.5, abs=0.04)
    knows_more = score + 0.3 * wrong
    assert evaluation.auroc(fits.residual_ranks(knows_more, p[:, None]), wrong) > 0.55
    with pytest.raises(evaluation.UndefinedStatisticError, match="a function of what is given"):
        fits.residual_ranks(-p, p[:, None])


def test_questions_needed_grow_with_the_square_of_the_spread() -> None:
    # (1.96 + 0.84)² · spread² / gap²; Hanley and McNeil at 0.575 and as many right as wrong answers
    assert fits.questions_needed(0.5, 1.0) == 32
    assert fits.questions_needed(0.05, fits.auroc_spread(0.575, 0.5)) == pytest.approx(1030, rel=0.05)


def test_brier_and_calibration_error_by_hand() -> None:
    assert fits.brier([0.2, 0.8, 0.6], [0, 1, 0]) == pytest.approx((0.04 + 0.04 + 0.36) / 3)
    # ten answers in five bins of two, each pair with a gap of its own
    probability = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 1.0]
    wrong = [0, 0, 1, 0, 0, 1, 1, 1, 1, 0]
    gaps = [0.05 - 0, 0.25 - 0.5, 0.45 - 0.5, 0.65 - 1, 0.95 - 0.5]
    assert fits.ece(probability, wrong) == pytest.approx(np.abs(gaps).mean())
    assert fits.ece([0.3] * 10, wrong) == pytest.approx(0.2), "equal probabilities share a bin"


def test_brier_and_calibration_error_equal_the_plainest_loop() -> None:
    rng = np.random.default_rng(1)
    probability, wrong = rng.random(N), rng.random(N) < 0.3
    order = sorted(range(N), key=lambda i: probability[i])
    size = N // fits.N_BINS
    bins = [order[i : i + size] for i in range(0, N, size)]
    error = sum(abs(sum(probability[i] - wrong[i] for i in of_bin)) for of_bin in bins) / N
    assert fits.ece(probability, wrong) == pytest.approx(error)
    assert fits.brier(probability, wrong) == pytest.approx(brier_score_loss(wrong, probability))
    shuffled = rng.permutation(N)
    assert fits.ece(probability[shuffled], wrong[shuffled]) == pytest.approx(error)


@pytest.mark.parametrize("statistic", [fits.brier, fits.ece])
def test_calibration_refuses_what_is_no_probability_and_one_class(statistic) -> None:
    with pytest.raises(ValueError, match=r"probability: values 0\.5 to 2 given, 0 to 1 wanted"):
        statistic([2.0, 0.5], [0, 1])
    with pytest.raises(evaluation.UndefinedStatisticError, match="all 2 are right"):
        statistic([0.1, 0.5], [0, 0])


@pytest.mark.parametrize("name", ["brier", "ece"])
def test_calibration_of_a_fit_is_out_of_sample_with_an_interval(name) -> None:
    features, wrong = made_up(effect=1.0)
    plan = Resamples.of(wrong, n_resamples=200)
    fit = Fit.of(features, wrong, plan)
    found = fit.ranking(fits.of_probability(getattr(fits, f"weighted_{name}")))
    plain = getattr(fits, name)
    assert found.value == pytest.approx(np.mean([plain(expit(scores), wrong) for scores in fit.out_of_fold]))
    unseen = plan.counts[0] == 0
    assert found.draws[0] == pytest.approx(plain(expit(fit.out_of_bag[0][unseen]), wrong[unseen]))
    interval = found.interval()
    assert 0 <= interval.low < interval.high < 0.5
