"""The chain from MCMC to the norm: closed forms of a linear model, and fields whose parts are known."""

from dataclasses import replace

import numpy as np
import pytest

from isouq.studies.isotropy import chain
from isouq.studies.synthetic import atlas, plan, point


def committed(problem: str, seed: int = 0, *, prior: str = "fixed") -> atlas.Record:
    activation = "relu" if problem.startswith("multiclass") else "tanh"
    design = "no_gap" if problem.startswith("regression") else "few"
    record = atlas.find(plan.atlas_job(seed, problem, activation, 8, prior, design), [atlas.COMMITTED])
    assert record is not None
    return record


def rows_of(record: atlas.Record) -> dict[str, dict]:
    return {row["step"]: row for row in chain.steps(record)}


def test_of_a_linear_model_only_isotropy_errs():
    """Its posterior is a Gaussian and its mean a straight line, so that three of the four steps cost nothing."""
    record = committed("regression_linear")
    rows, problem = rows_of(record), record.job.make()
    design = np.column_stack([problem.inputs[:, 0], np.ones(len(problem.inputs))])
    precision = design.T @ design / problem.model.noise**2 + np.diag(problem.model.scales() ** -2.0)
    g = np.column_stack([problem.grid[:, 0], np.ones(len(problem.grid))])
    closed = np.log(np.square(g).sum(1) / np.einsum("ip,pq,iq->i", g, np.linalg.inv(precision), g))
    assert rows["isotropy"]["variance"] == pytest.approx(closed.var(), rel=1e-4)
    assert all(rows[step]["variance"] < 0.005 for step in chain.STEPS[:3])
    assert rows["isotropy"]["share"] == pytest.approx(1, abs=0.1)
    assert rows["straight line"]["rho"] > 0.99
    assert rows["error"]["variance"] == pytest.approx(rows["error, trained"]["variance"], rel=1e-3)


@pytest.mark.parametrize("problem", ["binary_xor", "multiclass_spirals"])
def test_the_chain_is_that_of_the_mode_around_which_the_draws_lie(problem, monkeypatch):
    monkeypatch.setattr(chain, "N_DRAWS", 20)
    record = committed(problem)
    logs, _, matrix = chain.log_variances(record)
    np.testing.assert_allclose(logs["isotropy"], np.log(record.fields["mode_gn"].astype(float)), rtol=1e-4, atol=1e-4)
    posed, classes = record.job.make(), record.fields["classes"]
    theta = record.fields["thetas"][np.abs(record.fields["gn"] - record.fields["mode_gn"]).max(axis=1).argmin()]
    precision = point.hessian(posed, theta) if matrix == "Hessian" else point.ggn(posed, theta)
    line = point.quadratic_form(point.gradients(posed, theta, classes), precision)
    clear = line > 1e-20  # below, a softmax's own gradient is rounding
    np.testing.assert_allclose(logs["straight line"][clear], np.log(line[clear]), rtol=1e-4, atol=1e-4)


def test_the_shares_add_up_and_are_those_of_known_fields(monkeypatch):
    """Steps a, b, −b, 2c of unit fields without correlation: b is undone and costs nothing; 2c is 4 of 5 parts."""
    rng = np.random.default_rng(0)
    a, b, c = 20 * np.linalg.qr(np.column_stack([np.ones(400), rng.normal(size=(400, 3))]))[0].T[1:]
    start, record = rng.normal(size=400), committed("binary_xor")
    path = np.cumsum([start, a, b, -b, 2 * c], axis=0)
    logs = dict(zip(("MCMC", *chain.STEPS, "trained"), [*path, path[0] + a + 3], strict=True))
    monkeypatch.setattr(chain, "log_variances", lambda *_, **__: (logs, np.ones((2, 400)), "GGN"))
    rows = rows_of(record)
    assert [rows[step]["variance"] for step in chain.STEPS] == pytest.approx([1, 1, 1, 4])
    assert [rows[step]["share"] for step in chain.STEPS] == pytest.approx([0.2, 0, 0, 0.8], abs=1e-9)
    assert rows["error"]["variance"] == pytest.approx(5)
    assert rows["error, trained"]["variance"] == pytest.approx(1), "a common factor costs nothing"
    assert rows["noise of the Gaussian"]["variance"] == 0


def test_the_gaussian_has_the_variance_of_the_straight_line_where_the_network_is_one(monkeypatch):
    monkeypatch.setattr(chain, "N_DRAWS", 20_000)
    problem = plan.Job(problem="regression_linear", resolution=9).make()
    theta, zeros = np.array([0.3, -0.2]), np.zeros(9, dtype=int)
    precision = point.hessian(problem, theta)
    halves = chain.gaussian(problem, theta, precision, zeros)
    exact = point.quadratic_form(point.gradients(problem, theta, zeros), precision)
    np.testing.assert_allclose(halves, np.stack([exact] * 2), rtol=0.05)
    assert chain.noise(halves) < chain.ENOUGH


def test_draws_are_added_until_the_noise_is_small(monkeypatch):
    problem = plan.Job(problem="regression_linear", resolution=9).make()
    at = np.zeros(2), np.eye(2), np.zeros(9, dtype=int)
    monkeypatch.setattr(chain, "N_DRAWS", 200)
    monkeypatch.setattr(chain, "ENOUGH", 0.0)
    most = chain.noise(chain.gaussian(problem, *at))
    monkeypatch.setattr(chain, "MOST_BLOCKS", 1)
    assert most < chain.noise(chain.gaussian(problem, *at))


def test_the_noise_is_that_of_the_mean_of_two_halves():
    rng = np.random.default_rng(0)
    halves = np.exp(0.1 * rng.normal(size=(2, 20_000)))
    assert chain.noise(halves) == pytest.approx(np.log(halves.mean(0)).var(), rel=0.03)


def test_laplace_takes_the_ggn_where_the_hessian_is_not_positive_definite():
    posed = plan.Job(problem="binary_xor", width=3, resolution=4, n_examples=12).make()
    best = point.find_map(posed, n_starts=2).theta
    assert chain.laplace(posed, best)[1] == "Hessian"
    elsewhere = 6 * np.random.default_rng(0).normal(size=len(best))
    assert np.linalg.eigvalsh(point.hessian(posed, elsewhere))[0] < 0
    precision, matrix = chain.laplace(posed, elsewhere)
    assert matrix == "GGN"
    np.testing.assert_array_equal(precision, point.ggn(posed, elsewhere))


def test_a_record_without_a_mode_or_through_no_gate_is_counted_and_not_dropped():
    whole = committed("regression_linear")
    fields = {name: values for name, values in whole.fields.items() if not name.startswith("mode_")}
    lacking, failed = replace(whole, fields=fields), replace(whole, facts=whole.facts | {"passed": False})
    table = chain.table([whole, lacking, failed])
    means = chain.by_problem(table).set_index("step")
    assert (means["n"] == 1).all()
    assert (means["n_missing"] == 2).all()
    shown = chain.text(chain.by_problem(table), {"regression_linear": "a line"}).loc["a line"]
    assert (shown["n"], shown["missing"]) == (1, 2)
    assert shown["error (nats²)"] == f"{means.loc['error', 'variance']:.3f}"
    assert shown["isotropy, share"] == f"{means.loc['isotropy', 'share']:.0%}", "one seed has no interval"
    both = chain.text(chain.by_problem(chain.table([whole, replace(whole)])), {"regression_linear": "a line"})
    assert both.loc["a line", "isotropy, share"].endswith("]")
    results = chain.named_results(table)
    assert results["isotropy.chain.n"].value == 3
    assert results["isotropy.chain.n_missing"].value == 2
    only = chain.named_results(chain.table([lacking]))
    assert set(only) == {f"isotropy.chain.{key}" for key in ("n", "n_missing", "n_ggn")}


def test_the_results_have_intervals_over_seeds_and_over_problems(monkeypatch):
    monkeypatch.setattr(chain, "N_DRAWS", 200)
    records = [committed(name, seed) for name in ("regression_linear", "binary_linear") for seed in (0, 1)]
    table = chain.table(records)
    results = chain.named_results(table)
    rows = table[(table["problem"] == "binary_linear") & (table["step"] == "isotropy")]
    one = results["isotropy.chain.binary_linear.isotropy"]
    assert (one.value, one.n, one.unit) == (pytest.approx(rows["variance"].mean()), 2, "nats²")
    assert one.high - one.value == pytest.approx(12.7062 * rows["variance"].sem(), rel=1e-4)
    shares = table[table["step"] == "isotropy"].groupby("problem")["share"].mean()
    assert results["isotropy.chain.mean.isotropy_share"].value == pytest.approx(shares.mean())
    assert results["isotropy.chain.mean.isotropy_share"].n == 2


def test_a_variance_of_zero_is_refused_by_name():
    record = committed("regression_linear")
    fields = record.fields | {"variance": record.fields["variance"] * (record.fields["variance"] > 0.01)}
    with pytest.raises(ValueError, match=r"MCMC: a variance is zero at \d+ of 100 points"):
        chain.steps(replace(record, fields=fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": np.ones((2, 3))}, r"precision: \(2, 3\) given, a symmetric matrix wanted"),
        ({"precision": np.diag([1.0, -1.0])}, "precision: one that is not positive definite given; take that of"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    problem = plan.Job(problem="regression_linear", resolution=4).make()
    given = {"problem": problem, "theta": np.zeros(2), "precision": np.eye(2), "classes": np.zeros(4, dtype=int)}
    with pytest.raises(ValueError, match=message):
        chain.gaussian(**(given | change))
