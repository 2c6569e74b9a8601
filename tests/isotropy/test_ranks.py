"""Ranks by width: whole matrices as the reference, limits that are known, and tables in which the answer was put."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from isouq.studies import claims
from isouq.studies.isotropy import ranks
from isouq.studies.synthetic import modes, point

CLAIMS = Path(__file__).resolve().parents[2] / "book" / "claims.yml"
PROBLEMS = ["binary_rings", "multiclass_spirals"]


@pytest.fixture(scope="module", params=[(name, prior) for name in PROBLEMS for prior in ranks.PRIORS], ids="-".join)
def trained(request):
    name, prior = request.param
    problem = ranks.network(name, seed=900, width=6, prior=prior)
    return problem, modes.train(problem, seed=900)


def of(problem, theta, region="whole", weight=1.0):
    return next(row for row in ranks.measure(problem, theta, weight=weight) if row["region"] == region)


def test_the_gradient_of_a_probability_is_that_of_its_log_odds_times_the_factor():
    for name in PROBLEMS:
        problem = ranks.network(name, seed=900, width=4)
        theta = 0.5 * np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
        classes = point.predicted_classes(problem, theta)
        h, log_factor = ranks.factored(problem, theta, classes)
        p = point.probabilities(problem, theta, classes)
        np.testing.assert_allclose(log_factor, np.log(p * (1 - p)), rtol=1e-9)
        np.testing.assert_allclose(
            h * np.exp(log_factor)[:, None], point.gradients(problem, theta, classes), atol=1e-12
        )


def test_a_confident_network_keeps_its_log_odds():
    problem = ranks.network("multiclass_spirals", seed=900, width=4)
    theta = 20 * np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    h, log_factor = ranks.factored(problem, theta, point.predicted_classes(problem, theta))
    assert log_factor.min() < -100, "p rounds to 1 here"
    assert np.isfinite(h).all()
    assert np.isfinite([value for row in ranks.measure(problem, theta) for value in list(row.values())[1:]]).all()


def test_every_number_is_that_of_the_whole_matrices(trained):
    problem, theta = trained
    classes, scales = point.predicted_classes(problem, theta), problem.model.scales()
    g, (h, _) = point.gradients(problem, theta, classes), ranks.factored(problem, theta, classes)
    precision = point.ggn(problem, theta)
    of_g, of_h = point.quadratic_form(g, precision), point.quadratic_form(h, precision)
    values, vectors = np.linalg.eigh(precision * np.outer(scales, scales) - np.eye(len(theta)))
    p = point.probabilities(problem, theta, classes)
    bulk = np.square(h * scales @ vectors[:, values < 1]).sum(1) / np.square(h * scales).sum(1)
    near = problem.near_data()
    for region, where in {"whole": near | True, "near": near, "far": ~near}.items():
        row = of(problem, theta, region)
        expected = {
            "rho": spearmanr(of_h[where], np.square(h).sum(1)[where])[0],
            "rho_scaled": spearmanr(of_h[where], np.square(h * scales).sum(1)[where])[0],
            "rho_g": spearmanr(of_g[where], np.square(g).sum(1)[where])[0],
            "rho_p": spearmanr(of_g[where], (p * (1 - p))[where])[0],
            "sd": np.log(of_h / np.square(h * scales).sum(1))[where].std(),
            "bulk": bulk[where].mean(),
            "outliers": (values > 1).mean(),
        }
        np.testing.assert_allclose([row[name] for name in expected], list(expected.values()), atol=2e-4)


def test_without_data_the_prior_stays_and_with_more_the_ranks_go(trained):
    problem, theta = trained
    none, own, more = (of(problem, theta, weight=weight) for weight in (1e-12, 1.0, ranks.CONTROL))
    assert none["rho_scaled"] > 0.9999
    assert none["sd"] < 1e-6
    assert (none["bulk"], none["outliers"]) == (pytest.approx(1), 0)
    assert more["rho"] < own["rho"] < none["rho"]
    assert more["rho"] < 0.9, "the positive control"
    assert own["outliers"] <= own["bound"] <= 1


def test_the_control_shows_why_the_factor_is_taken_out():
    """With p(1−p) in both, ρ stays at 0.99 with a hundred times the data; without it, it does not."""
    problem = ranks.network("multiclass_rings", seed=900, width=8)
    control = of(problem, modes.train(problem, seed=900), weight=ranks.CONTROL)
    assert control["rho_g"] > 0.98
    assert control["rho_p"] > 0.98
    assert control["rho"] < 0.9


@pytest.fixture(scope="module")
def small():
    return ranks.table(PROBLEMS, [900, 901], [3, 6])


def test_the_table_has_every_network_under_both_priors_and_the_control(small):
    plain, control = small[small["weight"] == 1], small[small["weight"] == ranks.CONTROL]
    assert len(plain) == 2 * 2 * 2 * len(ranks.PRIORS) * 3
    assert set(control["width"]) == {3}
    assert set(control["prior"]) == {"fixed"}
    of_network = small.groupby(["problem", "seed", "width"])["loss"]
    assert (of_network.max() == of_network.min()).all(), "one θ* under both priors"


def test_a_network_that_misses_the_declared_loss_is_kept_and_counted(monkeypatch):
    monkeypatch.setattr(modes, "MAX_STEPS", 3)
    table = ranks.table(PROBLEMS, [900], [3, 6])
    assert not table["fits"].any()
    results = ranks.named_results(table)
    assert results["isotropy.ranks.n_missed"].value == results["isotropy.ranks.n_networks"].value == 4


def planted(slope: float, sd_slope: float) -> pd.DataFrame:
    """Two problems, two seeds: z of rho = its own intercept + slope · log₂ width; sd likewise; the rest is constant."""
    rows = []
    for problem, seed, width in [(p, s, w) for p in "ab" for s in (0, 1) for w in (2, 4, 16)]:
        own = dict.fromkeys(ranks.STATISTICS, 0.5) | {"problem": problem, "seed": seed, "width": width, "fits": True}
        level = {"a": 0.5, "b": 0.9}[problem] + 0.1 * seed
        own |= {"rho": np.tanh(level + slope * np.log2(width)), "sd": level + sd_slope * np.log2(width)}
        weights = [1.0, ranks.CONTROL] if width == 2 else [1.0]
        rows += [
            own | {"prior": prior, "weight": weight, "region": region}
            for prior in ranks.PRIORS
            for weight in weights
            for region in ("whole", "near", "far")
        ]
    return pd.DataFrame(rows)


def test_slopes_that_were_put_in_are_found():
    found = ranks.slopes(planted(0.15, -0.05)).set_index(["prior", "region", "statistic"])
    for key, slope in {"z": 0.15, "sd": -0.05}.items():
        row = found.loc["fixed", "near", key]
        np.testing.assert_allclose(row[["value", "low", "high"]].astype(float), slope, atol=1e-9)
        assert row["n"] == 2


def test_means_are_over_problems_and_by_fishers_z():
    row = ranks.by_width(planted(0.0, 0.0)).set_index(["prior", "weight", "region", "width", "statistic"])
    rho, sd = row.loc["fixed", 1.0, "whole", 16, "rho"], row.loc["fixed", 1.0, "whole", 16, "sd"]
    assert rho["value"] == pytest.approx(np.tanh(0.75))
    assert (sd["value"], sd["n"]) == (pytest.approx(0.75), 2)
    assert sd["high"] - sd["value"] == pytest.approx(12.7062 * 0.2, rel=1e-4)


def test_the_text_has_every_line_and_the_control_only_where_it_is():
    shown = ranks.text(ranks.by_width(planted(0.0, 0.0)))
    assert list(shown.index) == [label for label, _ in ranks.LINES.values()]
    assert shown.loc["ρ of hᵀΣh with ‖h‖²", 16].startswith(f"{np.tanh(0.75):.3f} [")
    assert list(shown.loc[ranks.LINES["control"][0]])[1:] == ["", ""]
    assert shown.loc[ranks.LINES["bulk"][0], 2] == "0.500 [0.50, 0.50]"


def test_the_results_are_those_that_the_claim_asks_for(small):
    results = ranks.named_results(small)
    claim = next(one for one in claims.load(CLAIMS) if one.id == "C3")
    assert {check.key for check in claim.checks} <= set(results)
    rows = small[(small["region"] == "whole") & (small["prior"] == "fixed") & (small["width"] == 3)]
    control = rows[rows["weight"] == ranks.CONTROL].assign(z=lambda t: np.arctanh(t["rho"]))
    expected = np.tanh(control.groupby("problem")["z"].mean().mean())
    assert results["isotropy.ranks.control"].value == pytest.approx(expected)
    one = ranks.named_results(small[small["problem"] == "binary_rings"])
    assert one["isotropy.ranks.rho"].low is None
    wide = ranks.by_width(small).query(
        "prior == 'fixed' and region == 'whole' and width == 6 and statistic == 'outliers'"
    )
    assert results["isotropy.ranks.outliers"].value == wide["value"].item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks.network("regression_linear", seed=0, width=4), "name: 'regression_linear' given"),
        (lambda: ranks.network("binary_linear", seed=0, width=4), "name: 'binary_linear' given, .*hidden layer wanted"),
        (lambda: ranks.network("binary_xor", seed=0, width=4, prior="fan-in"), "prior: .*did you mean 'fan_in'"),
        (lambda: ranks.slopes(planted(0, 0).query("width == 2")), "table: width 2 given, at least 2 widths wanted"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
