"""Distortion is zero where there is none, finds what was planted and only that, and does not see the scale."""

import numpy as np
import pytest

from isouq.studies.isotropy import covariance, distortion
from isouq.studies.synthetic.findings import mean

N = 200
SHIFTS = distortion.grid_shifts((14, 14))


def shuffles(n_points, n):
    """Random orders of points that are exchangeable, as those of a map are not."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(n_points), (n, 1)), axis=1)


def structure(field, *features, **given):
    return distortion.structures([field], *features, **given)[0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def points(rng):
    return rng.uniform(-3, 3, (N, 2))


def test_equal_covariances_are_not_distorted(rng):
    g, rows = rng.normal(size=(N, 30)), rng.normal(size=(10, 30))
    first = covariance.from_rows(rows).quadratic_form(g, damping=0.1)
    second = covariance.from_products(rows @ rows.T).quadratic_form(
        covariance.Products(np.square(g).sum(1), g @ rows.T), damping=0.1
    )
    field = distortion.distortion(first, second)
    assert np.abs(field).max() < 1e-9
    by_features = structure(field, rng.normal(size=(N, 2)), shuffles(N, 99))
    assert (by_features.explained, by_features.p_value) == (0.0, 1.0)


def test_scale_is_taken_out(rng):
    reference, bend = rng.uniform(1, 2, N), rng.normal(size=N)
    bend -= bend.mean()
    field = distortion.distortion(1e-7 * reference * np.exp(bend), reference)
    np.testing.assert_allclose(field, bend, atol=1e-12)


def test_planted_structure_is_found_and_measured(rng, points):
    near = distortion.nearness(points, rng.normal(size=(20, 2)))
    signal = (near[:, 0] - near[:, 0].mean()) / near[:, 0].std()
    field = signal + rng.normal(size=N)  # half of the variance is structure
    fit = structure(field, near, shuffles(N, 199))
    assert fit.p_value == 1 / 200
    assert 0.4 < fit.explained < 0.6
    assert 0.4 < fit.beyond_chance < fit.explained


def test_no_structure_is_found_where_none_was_planted(rng, points):
    """The p-values of pure noise are uniform, and R² beyond chance is zero on average."""
    near = distortion.nearness(points, rng.normal(size=(20, 2)))
    permutations = shuffles(N, 99)
    found = [structure(rng.normal(size=N), near, permutations) for _ in range(200)]
    rejected = sum(one.p_value <= 0.05 for one in found)
    assert 2 <= rejected <= 20  # 10 expected, the binomial's central 99.5 %
    assert abs(np.mean([one.beyond_chance for one in found])) < 0.005


def smooth_maps(rng, shape, n_maps):
    """Random maps whose neighbours are alike: white noise with its high frequencies cut off."""
    noise = np.fft.fft2(rng.normal(size=(n_maps, *shape)))
    frequency = np.add.outer(np.abs(np.fft.fftfreq(shape[0])), np.abs(np.fft.fftfreq(shape[1])))
    return np.fft.ifft2(noise * np.exp(-20 * frequency)).real.reshape(n_maps, -1)


def test_shifts_do_not_take_smoothness_for_structure_as_shuffles_do(rng):
    shape = (14, 14)
    maps = smooth_maps(rng, shape, 120)
    rates = {}
    for name, permutations in (("shuffles", shuffles(196, 99)), ("shifts", distortion.grid_shifts(shape))):
        pairs = zip(maps[:60], maps[60:], strict=True)
        found = [structure(field, other[:, None], permutations) for field, other in pairs]
        rates[name] = np.mean([one.p_value <= 0.05 for one in found])
    assert rates["shuffles"] > 0.5  # 0.05 would be right
    assert rates["shifts"] < 0.15


@pytest.mark.parametrize(("shape", "images"), [((6, 5), 4), ((5, 5), 8)])
def test_grid_shifts_are_all_there_are_and_keep_neighbours(shape, images):
    rows, size = distortion.grid_shifts(shape), shape[0] * shape[1]
    assert len({tuple(row) for row in rows}) == len(rows) == images * size
    assert (np.sort(rows, axis=1) == np.arange(size)).all()
    for row in rows.reshape(-1, *shape):
        for step in (np.diff(row, axis=axis) for axis in (0, 1)):
            one_along = np.isin(np.abs(step), (1, shape[1] - 1)), np.isin(np.abs(step), (shape[1], size - shape[1]))
            assert any(along.all() for along in one_along)


def noise_map(rng, shape):
    """A random map whose neighbours are alike and whose opposite edges are not, as those of a network's field."""
    y, x = (axis.ravel() / shape[0] for axis in np.indices(shape))
    phase, wave = rng.uniform(0, 2 * np.pi, 8), rng.normal(0, 3, (2, 8))
    return np.cos(np.outer(x, wave[0]) + np.outer(y, wave[1]) + phase) @ rng.normal(size=8)


def found_over_problems(rng, planted, n_problems=12):
    """Whether the rule of claim C2 finds a pull to proxies in simulated maps that follow their training data, too."""
    shape, excess = (14, 14), []
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*[np.linspace(-3, 3, 14)] * 2)], 1)
    for _ in range(n_problems):
        trained, moved = rng.normal(0, 1, (60, 2)), rng.normal([1.5, 0.0], 1, (60, 2))
        own, other = distortion.nearness(grid, trained), distortion.nearness(grid, moved)
        flat = own @ [1.0, -2.0] + 0.5 * noise_map(rng, shape)
        bent = flat + 0.5 * noise_map(rng, shape) + planted * other @ [1.0, -2.0]
        bent, flat = distortion.structures([bent, flat], other, SHIFTS, given=own)
        excess.append(bent.beyond_chance - flat.beyond_chance)
    return mean(excess).low > 0


def test_a_planted_pull_to_proxies_is_found_and_an_absent_one_is_not(rng):
    """Simulation of the rule: a power above 80 % where a pull adds 0.6 on average, false finds in about 2.5 %."""
    assert sum(found_over_problems(rng, planted=2.0) for _ in range(15)) > 12
    assert sum(found_over_problems(rng, planted=0.0) for _ in range(30)) <= 3  # more: one time in 200 at 2.5 %


def test_partial_structure_is_that_of_two_nested_regressions(rng, points):
    given, features, field = points, rng.normal(size=(N, 2)) + points, rng.normal(size=N) + points[:, 0]
    field += 0.5 * features[:, 1]

    def unexplained(*columns):
        design = np.column_stack([np.ones(N), *columns])
        return np.square(field - design @ np.linalg.lstsq(design, field)[0]).sum()

    fit = structure(field, features, shuffles(N, 9), given=given)
    assert fit.explained == pytest.approx(1 - unexplained(given, features) / unexplained(given), rel=1e-9)
    assert fit.variance == pytest.approx(unexplained(given) / N, rel=1e-9)
    plain = structure(field, features, shuffles(N, 9))
    assert plain.explained == pytest.approx(1 - unexplained(features) / unexplained(), rel=1e-9)
    assert structure(given[:, 0], features, shuffles(N, 9), given=given).explained == 0


def test_nearness_falls_with_distance():
    line = np.stack([np.linspace(0, 10, 21), np.zeros(21)], 1)
    nearest, affinity = distortion.nearness(line, np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).T
    assert nearest[0] == 0
    assert nearest[-1] == 9
    assert (np.diff(affinity[4:]) < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distortion.distortion(np.ones(3), np.zeros(3)), "reference: a variance is zero at 3 of 3"),
        (lambda: distortion.distortion(np.array([1.0, -1, 1]), np.ones(3)), "estimate: a variance is negative at 1"),
        (lambda: distortion.nearness(np.ones((3, 2)), np.ones((4, 2))), "coincide"),
        (lambda: distortion.nearness(np.ones((3, 2)), np.ones((4, 3))), r"points: shape \(3, 2\) given, \(row, 3\)"),
        (lambda: structure(np.ones(9), np.ones((8, 2)), np.zeros((1, 9), int)), "field and features: 9, 8 rows"),
        (lambda: structure(np.full(9, np.nan), np.ones((9, 2)), np.zeros((1, 9), int)), "NaN"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
