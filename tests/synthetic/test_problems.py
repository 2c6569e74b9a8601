"""Problems: what cannot be sampled is refused by name before anything runs, and data depend on nothing but the seed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isouq.studies.synthetic import problems
from isouq.studies.synthetic.plan import Job
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Model, Network


@pytest.mark.parametrize("name", [*problems.SPECS, *problems.FRESH])
def test_data_follow_from_the_seed_and_lie_on_the_grid(name):
    first, again, other = (problems.make(name, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert not np.array_equal(first.inputs, other.inputs)
    low, high = first.limits
    assert (first.inputs > low).mean() > 0.95
    assert (first.inputs < high).mean() > 0.95
    assert len(first.grid) == np.prod(first.shape)
    assert 0.1 < first.near_data().mean() < 0.9


def test_the_fresh_problems_have_every_class_and_are_none_of_the_papers():
    assert not problems.FRESH.keys() & problems.SPECS.keys()
    for name, spec in problems.FRESH.items():
        share = np.bincount(problems.make(name, seed=900).targets, minlength=max(2, spec.model.network.n_outputs))
        assert share.min() > 10, name
        assert set(spec.model.scales()) == {1.0}, "the prior is N(0, 1), so isotropy is right without data"


def test_two_problems_of_one_seed_share_no_random_numbers():
    rings, spirals = problems.make("multiclass_rings", seed=0), problems.make("multiclass_spirals", seed=0)
    assert abs(np.corrcoef(rings.inputs.ravel(), spirals.inputs.ravel())[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (lambda: Job(problem="binary_ring"), "did you mean 'binary_rings'"),
        (lambda: Job(problem="binary_xor", width=0), "width: 0 given, an integer of at least 1 wanted"),
        (lambda: Job(problem="binary_xor", depth=-1), "depth: -1 given"),
        (lambda: Job(problem="binary_xor", n_starts=0), "n_starts: 0 given"),
        (lambda: Job(problem="binary_xor", activation="rely"), "did you mean 'relu'"),
        (lambda: Job(problem="binary_xor", prior_scale=0.0), "prior_scale: 0.0 given"),
        (lambda: Job(problem="binary_xor", prior_scale=float("nan")), "prior_scale: nan given"),
        (lambda: Job(problem="binary_xor", prior_scaling="fanin"), "did you mean 'fan_in'"),
        (lambda: Job(problem="binary_xor", n_examples=2), "n_examples: 2 given"),
        (lambda: Job(problem="binary_xor", resolution=1), "resolution: 1 given"),
        (
            lambda: Job(problem="binary_xor", settings=Settings(n_chains=1)),
            "n_chains: 1 given, an integer of at least 4 wanted",
        ),
        (lambda: Job(problem="binary_xor", settings=Settings(n_draws=10**9)), "over memory_gb = 2"),
        (lambda: Job(problem="binary_xor", settings=Settings(sampler="nut")), "did you mean 'nuts'"),
        (lambda: Job(problem="binary_xor", settings=Settings(target_accept=1.0)), "target_accept: 1.0 given"),
    ],
)
def test_bad_input_is_refused_by_name(job, message):
    with pytest.raises(ValueError, match=message):
        job().make()


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("binary_xor", lambda p: {"inputs": np.full_like(p.inputs, np.nan)}, "inputs: NaN or infinite at 24 of 24"),
        ("binary_xor", lambda p: {"inputs": np.ma.masked_greater(p.inputs, 0)}, "inputs: masked"),
        ("binary_xor", lambda p: {"inputs": p.inputs[:-1]}, "inputs and targets: 11, 12 rows"),
        ("binary_xor", lambda p: {"inputs": p.inputs[:2], "targets": p.targets[:2]}, "inputs: shape"),
        ("binary_xor", lambda p: {"inputs": p.inputs[:, :1]}, r"inputs: shape \(12, 1\) given, \(row, 2\)"),
        ("binary_xor", lambda p: {"grid": p.grid[:, 0]}, "grid: shape"),
        ("binary_xor", lambda p: {"grid": p.grid[:0]}, "grid: shape"),
        ("binary_xor", lambda p: {"grid": np.where(p.grid > 2, np.inf, p.grid)}, "grid: NaN or infinite"),
        ("binary_xor", lambda p: {"targets": p.targets + 7}, "targets: 7 to 8 given, classes 0 to 1"),
        ("binary_xor", lambda p: {"targets": p.targets - 1}, "targets: -1 to 0 given"),
        ("binary_xor", lambda p: {"targets": p.targets * 1.0}, "targets: .* float64 given, .* integers"),
        ("binary_xor", lambda p: {"targets": p.targets == 1}, "targets: .* bool given, .* integers"),
        ("binary_xor", lambda p: {"targets": p.targets[:, None]}, "targets: shape"),
        ("multiclass_rings", lambda p: {"targets": p.targets + 1}, "targets: 1 to 3 given, classes 0 to 2"),
        ("regression_linear", lambda p: {"targets": p.targets * np.nan}, "targets: NaN"),
        ("regression_linear", lambda p: {"targets": p.targets.astype(str)}, "targets: .* real numbers"),
        ("binary_xor", lambda p: {"limits": (3.0, -3.0)}, "limits: .* low < high"),
        ("binary_xor", lambda p: {"limits": (np.nan, 3.0)}, "limits: NaN"),
        ("binary_xor", lambda p: {"seed": -1}, "seed: -1"),
        ("binary_xor", lambda p: {"model": problems.SPECS["regression_linear"].model}, "inputs: shape"),
        ("multiclass_rings", lambda p: {"model": problems.SPECS["binary_xor"].model}, "targets: 0 to 2 given"),
    ],
)
def test_a_problem_of_nonsense_is_refused_however_it_is_made(name, changed, message):
    problem = problems.make(name, n_examples=12, resolution=4)
    with pytest.raises((ValueError, TypeError), match=message):
        replace(problem, **changed(problem))


@pytest.mark.parametrize("targets", [np.uint8, np.int32])
def test_small_integers_are_taken_for_what_they_are(targets):
    """As uint8, 1 − 2·1 would be 255."""
    problem = problems.make("binary_xor", n_examples=12, resolution=4)
    assert replace(problem, targets=problem.targets.astype(targets)).targets.dtype == np.int64


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"n_draws": 10.5}, "n_draws"),
        ({"n_chains": True}, "n_chains"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": np.nan}, "step_size"),
        ({"trajectory_length": -1.0}, "trajectory_length"),
        ({"target_accept": np.nan}, "target_accept"),
        ({"memory_gb": np.nan}, "memory_gb"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_of_nonsense_are_refused_by_name(settings, name):
    with pytest.raises((ValueError, TypeError), match=name):
        Settings(**settings)


def test_a_model_of_another_kind_is_refused():
    model = problems.SPECS["multiclass_rings"].model
    with pytest.raises(ValueError, match="binary_rings wants"):
        problems.make("binary_rings", model=model)
    with pytest.raises(ValueError, match="network: 3 outputs given"):
        replace(model, kind="binary")
    with pytest.raises(ValueError, match=r"noise: 0\.0 given"):
        replace(model, noise=0.0)


def test_network_is_what_its_layers_say():
    network = Network(n_inputs=2, n_outputs=3, width=4, depth=2, activation="relu")
    rng = np.random.default_rng(0)
    theta, x = rng.normal(size=network.n_parameters), rng.normal(size=(5, 2))
    (A, a), (B, b), (C, c) = network.layers(theta)
    by_hand = np.maximum(np.maximum(x @ A + a, 0) @ B + b, 0) @ C + c
    np.testing.assert_allclose(problems.float64(network)(jnp.asarray(theta), jnp.asarray(x)), by_hand, rtol=1e-5)
    assert network.n_parameters == 2 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3


def test_prior_scales():
    network = Network(n_inputs=4, n_outputs=1, width=9)
    fan_in = Model(kind="binary", network=network, prior_scale=3.0)
    layers = [(np.unique(W).tolist(), np.unique(b).tolist()) for W, b in network.layers(fan_in.scales())]
    assert layers == [([1.5], [3.0]), ([1.0], [3.0])]
    assert set(replace(fan_in, prior_scaling="fixed").scales()) == {3.0}


@pytest.mark.parametrize("kind", problems.KINDS)
def test_the_likelihood_is_that_of_the_prediction(kind):
    name = {"binary": "binary_xor", "multiclass": "multiclass_rings", "regression": "regression_nonlinear"}[kind]
    problem = problems.make(name)
    theta = np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    with jax.enable_x64(True):
        prediction = np.asarray(problem.model.predict(theta, jnp.asarray(problem.inputs)))
        value = float(problem.model.log_likelihood(theta, problem.inputs, problem.targets))
    if kind == "regression":
        wanted = -0.5 * np.square((problem.targets - prediction[:, 0]) / problem.model.noise).sum()
    else:
        p = np.hstack([1 - prediction, prediction]) if kind == "binary" else prediction
        wanted = np.log(p[np.arange(len(p)), problem.targets]).sum()
    np.testing.assert_allclose(value, wanted, rtol=1e-9)


def test_float64_is_local():
    inside = problems.float64(lambda: jnp.ones(1).dtype)()
    assert (inside, jnp.ones(1).dtype) == (jnp.float64, jnp.float32)
