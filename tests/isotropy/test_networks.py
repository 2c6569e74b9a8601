"""The study on small networks: its matrices are what they are called, and it finds what was put in."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from isouq.studies.isotropy import covariance, networks
from isouq.studies.isotropy.networks import Case
from isouq.studies.synthetic import point, problems


def small(name: str, seed: int = 0):
    problem = problems.make(name, seed=seed, n_examples=30, resolution=8)
    return problem, np.random.default_rng(seed).normal(size=problem.model.network.n_parameters)


@pytest.fixture
def case():
    """A case whose variance is not MCMC's but that of a known covariance: the training data's own Fisher."""
    problem, theta = small("multiclass_clusters")
    g = point.gradients(problem, theta, point.predicted_classes(problem, theta))
    blank = Case(problem=problem, theta=theta, g=g, variance=np.ones(len(g)), passed=True)
    return replace(blank, variance=3 * networks.form(blank, "fisher"))


@pytest.mark.parametrize("name", ["binary_rings", "multiclass_spirals"])
def test_the_fisher_is_the_ggn(name):
    problem, theta = small(name)
    prior = np.diag(problem.model.scales() ** -2.0)
    rows = covariance.fisher_rows(*point.jacobian(problem, theta, problem.inputs))
    np.testing.assert_allclose(rows.T @ rows + prior, point.ggn(problem, theta), rtol=1e-9, atol=1e-12)


def test_the_covariance_that_made_the_variance_is_found_undistorted(case):
    found = networks.compare(case, "fisher", "training")
    assert found["spearman"] == pytest.approx(1)
    assert found["spread"] < 1e-9
    assert (found["explained"], found["p_value"]) == (0, 1)


def test_other_data_distort_more_the_farther_they_are(case):
    spread = {source: networks.compare(case, "fisher", source)["spread"] for source in networks.SOURCES}
    assert pytest.approx(spread["training"], abs=1e-9) == 0
    assert 0 < spread["unseen"] < spread["shifted"]


def test_large_damping_leaves_isotropy(case):
    flat = networks.compare(case, "isotropic", "noise")
    damped = networks.compare(case, "fisher", "noise", damping=1e9)
    assert damped["spearman"] == pytest.approx(flat["spearman"], abs=1e-6)
    assert damped["spread"] == pytest.approx(flat["spread"], rel=1e-5)


def test_sources_are_what_their_names_say():
    problem, _ = small("binary_rings")
    drawn = {source: networks.proxies(problem, source, 20) for source in networks.SOURCES}
    assert (drawn["training"][0] == problem.inputs[:20]).all()
    assert not np.isin(drawn["unseen"][0], problem.inputs).any()
    np.testing.assert_allclose(drawn["shifted"][0], drawn["unseen"][0] + networks.SHIFT)
    assert all(drawn[source][1] is None for source in ("other problem", "noise"))
    assert all(len(inputs) == 20 for inputs, _ in drawn.values())
    again = networks.proxies(problem, "noise", 20)[0]
    assert (again == drawn["noise"][0]).all()


def test_model_labels_follow_the_model():
    logits = np.tile([[4.0, 0.0, -4.0]], (3000, 1))
    drawn = networks._drawn_labels(logits, seed=0)
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 3000, p, atol=0.02)


def test_a_table_has_every_n_and_every_damping(case):
    found = networks.table([case], [("fisher", "unseen")], counts=[10, 40], dampings=[0.1, 10.0], n_permutations=1)
    assert found[["n", "damping"]].to_numpy().tolist() == [[10, 0.1], [10, 10], [40, 0.1], [40, 10]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: networks.proxies(p, "trainig", 5), "did you mean 'training'"),
        (lambda p: networks.proxies(p, "training", 31), "n: 31 given, .* at most 30"),
        (lambda p: networks.proxies(p, "unseen", 0), "n: 0 given"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small("binary_rings")[0])


def test_an_empirical_fisher_needs_true_labels(case):
    with pytest.raises(ValueError, match="source: inputs of 'noise' have no true label"):
        networks.form(case, "empirical_fisher", "noise")


def test_differences_from_isotropy_are_paired_by_case_and_proxies():
    """Closed form: two cases whose levels differ by far, the second matrix 0.1 and 0.3 above isotropy in each."""
    rows = [
        {"problem": "p", "seed": seed, "source": source, "n": 9, "damping": 1.0, "matrix": matrix,
         "spread": 10 * seed + (100 if source == "noise" else 0) + gain}
        for seed in (0, 1)
        for source in ("unseen", "noise")
        for matrix, gain in (("isotropic", 0.0), ("fisher", (0.1, 0.3)[seed]))
    ]  # fmt: skip
    found = networks.against_isotropic(pd.DataFrame(rows), ["spread"])
    assert found["source"].tolist() == ["unseen", "noise"]
    assert found["n_cases"].tolist() == [2, 2]
    reach = 12.7062 * 0.1  # t of one degree of freedom, times the standard error
    np.testing.assert_allclose(found["spread"], 0.2, atol=1e-9)
    np.testing.assert_allclose(found["spread_high"] - 0.2, reach, rtol=1e-4)
    unpaired = networks.against_isotropic(pd.DataFrame(rows[1:]), ["spread"])
    assert unpaired["n_cases"].tolist() == [1, 2], "a case without isotropy beside it does not count"
    one = networks.against_isotropic(pd.DataFrame(rows[:4]), ["spread"])
    assert one["spread"].tolist() == pytest.approx([0.1, 0.1])
    assert one["spread_low"].isna().all(), "one case has no interval"
