"""Where a posterior's θ* may come from (training, a draw, the highest mode), and what its draws do around one mode.

Three kinds of θ*, in this order of weight: the *trained* network, as a practitioner has it; a local *mode* below each
of 16 draws of the posterior; and the *MAP*, the lowest energy that any search found.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from isouq.studies import require
from isouq.studies.synthetic import point, posterior
from isouq.studies.synthetic.problems import ACTIVATIONS, Network, Problem, float64

# How a network is trained: Adam without weight decay over all examples at once, until the mean loss of an example is
# low enough: 0.1 nats, or for a regression a residual of the size of the noise. None of it uses the posterior.
LEARNING_RATE, BETAS, MAX_STEPS = 0.01, (0.9, 0.999), 5000
TARGET_LOSS = {"binary": 0.1, "multiclass": 0.1, "regression": 0.5}
# A θ* is admitted when it has at least this share of what a draw of the posterior gains on the best constant predictor
# (a collapsed network has none), and, if it is called a mode, when no more than about half a nat of energy is left
# below it: a gradient g per prior scale promises g²/2 where the curvature is the prior's.
LEAST_GAIN, LARGEST_GRADIENT = 0.5, 1.0
N_DRAWS = 16
N_MATCHED = 2000  # draws that are matched to a mode, at most
LEAST_DRAWS = 50  # around one mode, for a covariance


@dataclass(frozen=True, kw_only=True, eq=False)
class Thetas:
    """All θ* of a posterior, `points` (theta, param): the trained network, the MAP, then a mode for each of `draws`.

    `draws` are (draw, param). `kinds` names the kind of each. `loss`: mean negative log likelihood of an example
    (nats). `gradient_norm`: of the energy, per unit of the prior's scale. `admitted`: who is used, by the rule above.
    """

    points: np.ndarray
    kinds: tuple[str, ...]
    loss: np.ndarray
    gradient_norm: np.ndarray
    admitted: np.ndarray
    draws: np.ndarray


def train(problem: Problem, *, seed: int = 0) -> np.ndarray:
    """Return the θ (param,) that Adam ends at, from weights uniform within 1/√fan_in, as PyTorch starts them.

    It stops at TARGET_LOSS, or after MAX_STEPS steps.
    """
    network, rng = problem.model.network, np.random.default_rng(require.seed("seed", seed))
    parts = [np.full((fan_in + 1) * fan_out, fan_in**-0.5) for fan_in, fan_out in network.shapes]
    reach = np.concatenate(parts)
    theta = rng.uniform(-reach, reach)
    first, second, energy = np.zeros_like(theta), np.zeros_like(theta), point.objective(problem, scales=1.0)
    for step in range(1, MAX_STEPS + 1):
        value, gradient = energy(theta)  # under a prior of scale one, whose share is taken off again
        gradient = (gradient - theta) / len(problem.inputs)
        if (value - 0.5 * theta @ theta) / len(problem.inputs) <= TARGET_LOSS[problem.model.kind]:
            break
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        rate = LEARNING_RATE / (1 - BETAS[0] ** step)
        theta = theta - rate * first / (np.sqrt(second / (1 - BETAS[1] ** step)) + 1e-8)
    return theta


@float64
def losses(problem: Problem, thetas: np.ndarray) -> np.ndarray:
    """Return the mean negative log likelihood of an example at each θ (theta, param): (theta,) in nats."""
    data = problem.inputs, problem.targets
    return np.array([-float(problem.model.log_likelihood(theta, *data)) for theta in thetas]) / len(problem.inputs)


def constant_loss(problem: Problem) -> float:
    """Return the mean loss of the best predictor that ignores its input: the shares of the classes, or the mean."""
    if problem.model.kind == "regression":
        return float(0.5 * problem.targets.var() / problem.model.noise**2)
    share = np.bincount(problem.targets) / len(problem.targets)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def find(problem: Problem, draws: np.ndarray, *, n_starts: int, seed: int = 0) -> Thetas:
    """Return every θ* of a problem, given the draws (chain, draw, param) of its posterior."""
    flat, scales = draws.reshape(-1, draws.shape[-1]), problem.model.scales()
    kept = flat[np.linspace(0, len(flat) - 1, N_DRAWS).astype(int)]
    below = point.descend(problem, kept / scales, max_steps=1000)
    best = point.find_map(problem, n_starts=n_starts, seed=seed, max_steps=1000)
    highest = min(best, below, key=lambda found: found.energy)
    points = np.stack([train(problem, seed=seed), highest.theta, *below.thetas])
    kinds = ("trained", "map", *["mode"] * N_DRAWS)
    energy = point.objective(problem)
    gradient_norm = np.array([np.linalg.norm(energy(theta / scales)[1]) for theta in points])
    loss, constant = losses(problem, points), constant_loss(problem)
    gains = loss <= constant - LEAST_GAIN * (constant - losses(problem, kept).mean())
    still = (gradient_norm <= LARGEST_GRADIENT) | (np.array(kinds) == "trained")
    return Thetas(
        points=points, kinds=kinds, loss=loss, gradient_norm=gradient_norm, admitted=gains & still, draws=kept
    )


def parts(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the share of ‖g‖² that each layer's weights and biases have at the grid: name → (point,)."""
    squares, layers = np.square(point.gradients(problem, theta, classes)), problem.model.network.layers
    names = [f"hidden layer {i + 1}" for i in range(problem.model.network.depth)] + ["output layer"]
    shares: dict[str, np.ndarray] = {}
    for name, (weight, bias) in zip(names, layers(np.arange(squares.shape[1])), strict=True):
        shares |= {
            f"{name}, weights": squares[:, weight.ravel()].sum(axis=1),
            f"{name}, biases": squares[:, bias].sum(axis=1),
        }
    return shares


@float64
def hidden_units(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Return what the units of the first hidden layer give at the grid: (point, unit), no unit without such a layer."""
    network = problem.model.network
    (weight, bias), *later = network.layers(theta)
    values = np.asarray(ACTIVATIONS[network.activation](problem.grid @ weight + bias))
    return values if later else values[:, :0]


def match(network: Network, scales: np.ndarray, reference: np.ndarray, thetas: np.ndarray) -> np.ndarray:
    """Return the same functions as `thetas` (theta, param), each with its hidden units in the order of `reference`'s.

    Exchanging two hidden units leaves a network's function alone, and so does turning the sign of a tanh unit on both
    sides. Of all such copies this is the nearest to `reference` (param,), in units of the prior's `scales`.

    Raises:
        ValueError: more than one hidden layer, whose copies cannot be searched one unit at a time.
    """
    require.count("network: depth", network.depth, 0, 1)
    if network.depth == 0:
        return thetas
    (weight, bias), (following, _) = network.layers(np.arange(network.n_parameters))
    places = np.hstack([weight.T, bias[:, None], following])  # of each unit's parameters: (unit, entry)
    inner = np.einsum("ue,tve->tuv", (reference / scales)[places], (thetas / scales)[:, places])
    matched = thetas.copy()
    for theta, new, products in zip(thetas, matched, inner, strict=True):
        own, theirs = linear_sum_assignment(np.abs(products) if network.activation == "tanh" else products, True)
        sign = np.where(products[own, theirs] < 0, -1.0, 1.0) if network.activation == "tanh" else np.ones(len(own))
        new[places] = theta[places[theirs]] * sign[:, None]
    return matched


def around(problem: Problem, draws: np.ndarray, modes: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the mode (param,) that most draws lie nearest to, those draws (draw, param) matched to it, their share.

    A draw belongs to every mode whose distance is within 0.1 prior scales of the least: two searches that ended at one
    mode do not share its draws out between them. draws: (chain, draw, param); modes: (mode, param).
    """
    scales, flat = problem.model.scales(), draws.reshape(-1, draws.shape[-1])
    flat = flat[:: -(-len(flat) // N_MATCHED)]
    matched = [match(problem.model.network, scales, mode, flat) for mode in modes]
    away = np.stack([np.linalg.norm((m - mode) / scales, axis=1) for m, mode in zip(matched, modes, strict=True)])
    near = away <= away.min(axis=0) + 0.1
    largest = int(near.sum(axis=1).argmax())
    return modes[largest], matched[largest][near[largest]], float(near[largest].mean())


def steps(problem: Problem, draws: np.ndarray, modes: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return what lies between ‖g‖² at one mode and the variance over the whole posterior; arrays are (point,).

    `mode_gn`: ‖g‖² at the mode. `mode_taylor`: gᵀΣg with the covariance Σ of the draws around this mode: the line is
    kept, isotropy dropped. `mode_isotropic`: the variance of p(θ* + σε) through the network itself, σ² = tr(Σ)/P:
    isotropy is kept, the line dropped. `mode_variance`: the variance of p over the draws around the mode: both dropped.
    `mode_share` (1,): the share of the draws that lie there. Empty where these are fewer than LEAST_DRAWS.
    """
    if not len(modes):
        return {}
    theta, local, share = around(problem, draws, modes)
    if len(local) < LEAST_DRAWS:
        return {}
    g, away = point.gradients(problem, theta, classes), local - local.mean(axis=0)
    sigma = np.sqrt(np.square(away).mean())
    noise = sigma * np.random.default_rng(0).normal(size=(512, len(theta)))

    return {
        "mode_gn": np.square(g).sum(axis=1),
        "mode_taylor": np.square(away @ g.T).mean(axis=0),
        "mode_isotropic": posterior.of_classes(problem, theta + noise, classes).var(axis=0),
        "mode_variance": posterior.of_classes(problem, local, classes).var(axis=0),
        "mode_share": np.array([share]),
    }
