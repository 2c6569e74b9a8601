"""The paper's eight synthetic problems and twelve of our own: data, network, prior, likelihood and evaluation grid.

The paper does not state its sample sizes, widths and priors. Those in ``SPECS`` are our own, chosen so that NUTS
converges in function space. The problems of ``FRESH`` are none of the paper's: claim C2 is judged on them.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from isouq.studies import require
from isouq.studies.require import one_of
from isouq.studies.synthetic import planes

KINDS = ("binary", "multiclass", "regression")
ACTIVATIONS: dict[str, Callable] = {"tanh": jnp.tanh, "relu": jax.nn.relu}
SCALINGS = ("fixed", "fan_in")


def float64(function: Callable) -> Callable:
    """Run `function` with jax in float64 and leave jax's global setting as it was."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapped


@dataclass(frozen=True, kw_only=True)
class Network:
    """A fully connected network whose parameters are one flat vector; depth counts the hidden layers."""

    n_inputs: int
    n_outputs: int
    width: int = 8
    depth: int = 1
    activation: str = "tanh"

    def __post_init__(self):
        for name, least in (("n_inputs", 1), ("n_outputs", 1), ("width", 1), ("depth", 0)):
            require.count(name, getattr(self, name), least)
        one_of("activation", self.activation, ACTIVATIONS)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(fan_in, fan_out) of each layer, from the inputs on."""
        sizes = (self.n_inputs, *([self.width] * self.depth), self.n_outputs)
        return tuple(itertools.pairwise(sizes))

    @property
    def n_parameters(self) -> int:
        """Weights and biases of all layers."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in self.shapes)

    def layers(self, theta):
        """Cut the flat vector into [(weight (fan_in, fan_out), bias (fan_out,)), ...], in order."""
        layers, start = [], 0
        for fan_in, fan_out in self.shapes:
            stop = start + fan_in * fan_out
            weight = theta[start:stop].reshape(fan_in, fan_out)
            layers.append((weight, theta[stop : stop + fan_out]))
            start = stop + fan_out
        return layers

    def __call__(self, theta, inputs):
        """Outputs (example, output) at the flat parameters `theta` (param,)."""
        *hidden, (weight, bias) = self.layers(theta)
        for hidden_weight, hidden_bias in hidden:
            inputs = ACTIVATIONS[self.activation](inputs @ hidden_weight + hidden_bias)
        return inputs @ weight + bias


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with its Gaussian prior and its likelihood; hashable, so that jax compiles it once.

    Prior: independent N(0, s²) with s = `prior_scale` everywhere ("fixed"), or prior_scale/√fan_in for the
    weights and prior_scale for the biases ("fan_in"). A binary problem has one output, the logit of class 1.
    `noise` is the known standard deviation of a regression's targets.
    """

    kind: str
    network: Network
    prior_scale: float = 1.0
    prior_scaling: str = "fan_in"
    noise: float = 0.1

    def __post_init__(self):
        one_of("kind", self.kind, KINDS)
        one_of("prior_scaling", self.prior_scaling, SCALINGS)
        if (self.kind == "multiclass") != (self.network.n_outputs > 1):
            raise ValueError(f"network: {self.network.n_outputs} outputs given; one wanted, several if multiclass")
        for name in ("prior_scale", "noise"):
            require.number(name, getattr(self, name), 1e-100, 1e100)  # their squares divide

    def parameters(self, theta: ArrayLike) -> np.ndarray:
        """Return θ (param,) as float64. Raises ValueError for another length and for what is not finite."""
        return require.numbers("theta", theta, width=self.network.n_parameters)

    def scales(self) -> np.ndarray:
        """The prior's standard deviation of every parameter (param,)."""
        parts = []
        for fan_in, fan_out in self.network.shapes:
            shrink = np.sqrt(fan_in) if self.prior_scaling == "fan_in" else 1.0
            parts += [np.full(fan_in * fan_out, 1 / shrink), np.ones(fan_out)]
        return self.prior_scale * np.concatenate(parts)

    def unscaled(self) -> "Model":
        """Return the same likelihood under the prior N(0, 1), for functions that do not use the prior.

        jax then compiles them once for all priors and all problems of one shape.
        """
        return replace(self, prior_scale=1.0, prior_scaling="fixed")

    def predict(self, theta, inputs):
        """Return p(class 1), p of every class, or the mean, by the kind of problem: (example, class)."""
        outputs = self.network(theta, inputs)
        if self.kind == "binary":
            return jax.nn.sigmoid(outputs)
        return jax.nn.softmax(outputs) if self.kind == "multiclass" else outputs

    def quantity(self, theta, inputs, classes):
        """Return the quantity that is estimated, p(y_c|x, θ) of the given class, or the mean: (example,)."""
        return jnp.take_along_axis(self.predict(theta, inputs), classes[:, None], axis=1)[:, 0]

    def log_likelihood(self, theta, inputs, targets):
        """Sum over the examples of log p(target | input, θ), in nats, up to a constant for a regression."""
        outputs = self.network(theta, inputs)
        if self.kind == "binary":
            return -jax.nn.softplus((1 - 2 * targets) * outputs[:, 0]).sum()
        if self.kind == "multiclass":
            return jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1).sum()
        return -0.5 * jnp.square((targets - outputs[:, 0]) / self.noise).sum()

    def energy(self, z, scales, inputs, targets):
        """Return the negative log posterior in nats, up to a constant, of z = θ/scales, whose prior is N(0, 1)."""
        return 0.5 * jnp.square(z).sum() - self.log_likelihood(scales * z, inputs, targets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One problem with its data (numpy, float64; integer targets for classes) and its evaluation grid.

    Raises ValueError for data that are not finite, fewer than 3 examples, targets other than the model's classes.
    """

    name: str
    seed: int
    model: Model
    inputs: np.ndarray
    targets: np.ndarray
    grid: np.ndarray
    limits: tuple[float, float]

    def __post_init__(self):
        network, arrays = self.model.network, dict[str, np.ndarray]()
        for name, least in (("inputs", 3), ("grid", 1)):
            arrays[name] = require.numbers(name, getattr(self, name), 2, least=least, width=network.n_inputs)
        arrays["targets"] = require.numbers("targets", self.targets)
        require.same_rows(inputs=self.inputs, targets=self.targets)
        if self.model.kind != "regression":
            arrays["targets"] = require.integers("targets", self.targets, below=max(2, network.n_outputs))
        require.seed("seed", self.seed)
        low, high = require.numbers("limits", self.limits, width=2)
        if not low < high:
            raise ValueError(f"limits: {self.limits} given, low < high wanted")
        vars(self).update(arrays)  # as float64 and int64, whatever type was given

    def classes(self, classes: ArrayLike) -> np.ndarray:
        """Return a class (point,) per grid point. Raises ValueError for one that the model does not have."""
        return require.integers("classes", classes, below=self.model.network.n_outputs, length=len(self.grid))

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid's shape: (y, x) for two inputs, (x,) for one."""
        resolution = round(len(self.grid) ** (1 / self.inputs.shape[1]))
        return (resolution,) * self.inputs.shape[1]

    def near_data(self) -> np.ndarray:
        """Grid points (point,) bool where data lie.

        A point counts when its nearest example is no farther than the 95 % quantile of the distances between
        examples and their nearest neighbours.
        """
        between = np.linalg.norm(self.inputs[:, None] - self.inputs[None], axis=-1)
        np.fill_diagonal(between, np.inf)
        reach = np.quantile(between.min(axis=1), 0.95)
        return np.linalg.norm(self.grid[:, None] - self.inputs[None], axis=-1).min(axis=1) <= reach

    def fingerprint(self) -> str:
        """SHA-256 of all that the posterior depends on: model, data and grid, to nine decimals.

        The last digits of a sine differ from one processor to another, and records are carried between them.
        """
        digest = hashlib.sha256(repr((self.name, self.seed, self.model)).encode())
        for array in (self.inputs, self.targets, self.grid):
            digest.update(np.round(1e9 * array).astype(np.int64).tobytes())
        return digest.hexdigest()


def _linear(rng, n):
    inputs = rng.uniform(-2, 2, (n, 2))
    logits = 1.5 * inputs[:, 0] - 1.0 * inputs[:, 1] + 0.5
    return inputs, (rng.uniform(size=n) < 1 / (1 + np.exp(-logits))).astype(np.int64)


def _xor(rng, n):
    corners = rng.integers(0, 2, (n, 2))
    return 2.0 * corners - 1 + rng.normal(0, 0.45, (n, 2)), corners.sum(axis=1) % 2


def _rings(rng, n, *, radii, noise):
    classes, angle = np.arange(n) % len(radii), rng.uniform(0, 2 * np.pi, n)
    radius = np.asarray(radii)[classes] + rng.normal(0, noise, n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), classes


def _clusters(rng, n):
    classes = np.arange(n) % 3
    angle = np.pi / 2 + 2 * np.pi * classes / 3
    centres = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centres + rng.normal(0, 0.6, (n, 2)), classes


def _line(rng, n, *, noise, gap=False):
    inputs = _stretches(rng, n, (-1, -0.4), (0.4, 1)) if gap else rng.uniform(-1, 1, n)
    return inputs[:, None], 0.8 * inputs - 0.2 + rng.normal(0, noise, n)


def _wave(rng, n, *, noise, gap=True):
    # two stretches of data with a gap between: uncertainty has somewhere to grow inside the data's range
    inputs = _stretches(rng, n, (-2, -0.5), (0.7, 2)) if gap else rng.uniform(-2, 2, n)
    return inputs[:, None], np.sin(2 * inputs) + 0.3 * inputs + rng.normal(0, noise, n)


def _stretches(rng, n, first, second):
    return np.where(rng.uniform(size=n) < 0.5, rng.uniform(*first, n), rng.uniform(*second, n))


@dataclass(frozen=True)
class Spec:
    """A named problem: generator (rng, n) -> (inputs, targets), sample size, model, limits of the grid."""

    title: str
    generate: Callable
    n_examples: int
    model: Model
    limits: tuple[float, float] = (-3.0, 3.0)


def _model(kind: str, n_inputs: int, n_outputs: int, depth: int = 1, **prior: float | str) -> Model:
    network = Network(n_inputs=n_inputs, n_outputs=n_outputs, depth=depth)
    return Model(kind=kind, network=network, **prior)  # type: ignore[arg-type]


_BINARY, _MULTICLASS = _model("binary", 2, 1, prior_scale=1.5), _model("multiclass", 2, 3, prior_scale=1.5)
_STRAIGHT = _model("regression", 1, 1, depth=0, noise=0.3)
_CURVED = _model("regression", 1, 1, prior_scale=1.5, noise=0.25)
_TWO_RINGS = functools.partial(_rings, radii=(0.6, 1.7), noise=0.25)
_THREE_RINGS = functools.partial(_rings, radii=(0.4, 1.2, 2.0), noise=0.2)
_THREE_SPIRALS = functools.partial(planes.spirals, n_arms=3, turn=3.0, reach=2.0, noise=0.15)
SPECS: dict[str, Spec] = {
    "binary_linear": Spec("binary: linear", _linear, 80, _model("binary", 2, 1, depth=0)),
    "binary_xor": Spec("binary: XOR", _xor, 80, _BINARY),
    "binary_rings": Spec("binary: rings", _TWO_RINGS, 80, _BINARY),
    "multiclass_clusters": Spec("multiclass: clusters", _clusters, 90, _model("multiclass", 2, 3)),
    "multiclass_spirals": Spec("multiclass: spirals", _THREE_SPIRALS, 120, _MULTICLASS),
    "multiclass_rings": Spec("multiclass: rings", _THREE_RINGS, 120, _MULTICLASS),
    "regression_linear": Spec("regression: linear", functools.partial(_line, noise=0.3), 30, _STRAIGHT, (-2.0, 2.0)),
    "regression_nonlinear": Spec("regression: nonlinear", functools.partial(_wave, noise=0.25), 40, _CURVED),
}
_UNIT, _UNITS = _model("binary", 2, 1, prior_scaling="fixed"), _model("multiclass", 2, 3, prior_scaling="fixed")
# In this order: the "other problem" of each is the next one.
FRESH: dict[str, Spec] = {
    "binary_moons": Spec("binary: moons", planes.moons, 80, _UNIT),
    "multiclass_stripes": Spec("multiclass: stripes", planes.stripes, 90, _UNITS),
    "binary_spirals": Spec("binary: spirals", planes.spirals, 80, _UNIT),
    "multiclass_blobs": Spec("multiclass: blobs", planes.blobs, 90, _UNITS),
    "binary_checkerboard": Spec("binary: checkerboard", planes.checkerboard, 80, _UNIT),
    "multiclass_pinwheel": Spec("multiclass: pinwheel", planes.pinwheel, 90, _UNITS),
    "binary_square": Spec("binary: square in square", planes.square, 80, _UNIT),
    "multiclass_shells": Spec("multiclass: shells", planes.shells, 90, _UNITS),
    "binary_sine": Spec("binary: sine", planes.sine, 80, _UNIT),
    "binary_ellipse": Spec("binary: ellipse", planes.ellipse, 80, _UNIT),
    "multiclass_sectors": Spec("multiclass: sectors", planes.sectors, 90, _UNITS),
    "binary_corner": Spec("binary: corner", planes.corner, 80, _UNIT),
}


def spec(name: str) -> Spec:
    """Return the entry of ``SPECS`` or ``FRESH``. Raises ValueError for a name that neither has."""
    one_of("name", name, (*SPECS, *FRESH))
    return SPECS.get(name) or FRESH[name]


def titles() -> dict[str, str]:
    """Return the name of every problem of ``SPECS`` and ``FRESH`` as readers see it."""
    return {name: spec.title for name, spec in (SPECS | FRESH).items()}


def make(
    name: str,
    *,
    seed: int = 0,
    n_examples: int | None = None,
    model: Model | None = None,
    resolution: int | None = None,
    gap: bool | None = None,
) -> Problem:
    """Make the problem `name` with the data of `seed`; arguments left None take the values of its ``spec``.

    The grid has `resolution` points a side: 20 for two inputs, 100 for one. `gap`: whether a regression's inputs leave
    the middle of their range empty; by default those of the nonlinear one do.
    Raises ValueError for an unknown name, fewer than 3 examples, a model of another kind or size, a bad grid, and a
    gap in a classification.
    """
    own = spec(name)
    model = model or own.model
    n = own.n_examples if n_examples is None else require.count("n_examples", n_examples, 3)
    expected = (own.model.kind, own.model.network.n_inputs, own.model.network.n_outputs)
    given = (model.kind, model.network.n_inputs, model.network.n_outputs)
    if given != expected:
        raise ValueError(f"model has (kind, n_inputs, n_outputs) {given}; {name} wants {expected}")
    # a fixed number per problem, so that two problems of one seed do not share their random numbers
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    if gap is not None and own.model.kind != "regression":
        raise ValueError(f"gap: {gap} given for {name}; None wanted: only a regression has inputs with a gap")
    design = {} if gap is None else {"gap": gap}
    inputs, targets = own.generate(np.random.default_rng([require.seed("seed", seed), stream]), n, **design)
    n_inputs = inputs.shape[1]
    resolution = {1: 100, 2: 20}[n_inputs] if resolution is None else require.count("resolution", resolution, 2)
    axes = np.meshgrid(*[np.linspace(*own.limits, resolution)] * n_inputs)
    grid = np.stack([axis.ravel() for axis in axes], axis=1)
    return Problem(name=name, seed=seed, model=model, inputs=inputs, targets=targets, grid=grid, limits=own.limits)
