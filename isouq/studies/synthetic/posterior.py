"""NUTS draws of a problem's posterior, the gate that a posterior must pass, and its variance maps.

The gate looks at functions, not weights: a network's weights cannot mix over its symmetries, while p(y|x, θ), all that
the study uses, can and must.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer.hmc import hmc
from scipy.stats import norm, rankdata

from isouq.studies import require
from isouq.studies.synthetic.problems import Model, Problem, float64

# The version of all code that decides a record or its draws: problems, sampler, MAP, estimates, statistics. Raise it by
# hand when a number changes by more than rounding; stored records and draws are then computed again. The golden values
# of tests/synthetic fail where it was forgotten. It is no digest of the sources: records took hours, and most edits
# change no number.
VERSION = 1
MAX_RHAT = 1.01  # Vehtari et al. (2021)
MIN_ESS = 400
MIN_EFMI = 0.3  # Betancourt (2016)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to sample: the algorithm ("nuts" or "hmc", both with dual averaging), its chains and draws."""

    sampler: str = "nuts"
    n_chains: int = 8
    n_warmup: int = 500
    n_draws: int = 1000
    target_accept: float = 0.9
    max_tree_depth: int = 10
    trajectory_length: float = 1.5  # of "hmc" only; the adapted mass matrix makes 1 about a standard deviation
    step_size: float | None = None  # None: adapted; a number fixes it (used to break the sampler on purpose)
    memory_gb: float = 2.0
    seed: int = 0

    def __post_init__(self):
        require.one_of("sampler", self.sampler, ("nuts", "hmc"))
        for name, least in (("n_chains", 4), ("n_warmup", 1), ("n_draws", 4), ("max_tree_depth", 1)):
            require.count(name, getattr(self, name), least)
        require.number("target_accept", self.target_accept, 0.0, 1.0)
        require.number("trajectory_length", self.trajectory_length, 0.0)
        require.number("step_size", 1.0 if self.step_size is None else self.step_size, 0.0)
        require.number("memory_gb", self.memory_gb, 0.0, or_equal=True), require.seed("seed", self.seed)

    def identity(self) -> dict[str, object]:
        """Return the settings that the draws depend on."""
        return {name: value for name, value in asdict(self).items() if name != "memory_gb"}

    def require_memory(self, problem: Problem) -> None:
        """Raise ValueError when the draws and their functions would take more than `memory_gb`."""
        model = problem.model
        per_draw = model.network.n_parameters + 4 * len(problem.grid) * model.network.n_outputs
        need = 8 * self.n_chains * self.n_draws * per_draw / 1e9
        if need > self.memory_gb:
            given = f"{self.n_chains} x {self.n_draws} draws need {need:.2g} GB, over memory_gb = {self.memory_gb:.2g}"
            raise ValueError(f"{given}; wanted fewer draws, a smaller network or a coarser grid")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The worst of each diagnostic over all grid points and classes (rhat, ess) or chains (efmi)."""

    rhat: float
    rhat_folded: float
    ess: float
    n_divergent: int
    efmi: float
    seconds: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What fails the gate, in words; empty when the posterior passes."""
        checks = (
            (self.rhat <= MAX_RHAT, f"split R-hat {self.rhat:.3f} > {MAX_RHAT}"),
            (self.rhat_folded <= MAX_RHAT, f"folded R-hat {self.rhat_folded:.3f} > {MAX_RHAT}"),
            (self.ess >= MIN_ESS, f"ESS {self.ess:.0f} < {MIN_ESS}"),
            (self.n_divergent == 0, f"{self.n_divergent} divergent transitions"),
            (self.efmi >= MIN_EFMI, f"E-FMI {self.efmi:.2f} < {MIN_EFMI}"),
        )
        # `not ok` also catches NaN, which compares false with everything
        return tuple(text for ok, text in checks if not ok)

    @property
    def passed(self) -> bool:
        """Whether the posterior passes the gate."""
        return not self.failures


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """Draws (chain, draw, param) of θ with their energies (chain, draw) and the gate's verdict."""

    problem: Problem
    draws: np.ndarray
    energy: np.ndarray
    diagnostics: Diagnostics


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _run(model: Model, settings: Settings, keys, starts, scales, inputs, targets):
    """Return (z, divergent, energy), each (chain, draw, ...), of one chain per key."""
    init, step = hmc(
        # Sampled in units of the prior's scale: one step size then suits all layers.
        lambda z: model.energy(z, scales, inputs, targets),
        algo=settings.sampler.upper(),
    )

    def chain(one):
        key, start = one
        state = init(
            start,
            settings.n_warmup,
            step_size=1.0 if settings.step_size is None else settings.step_size,
            adapt_step_size=settings.step_size is None,
            target_accept_prob=settings.target_accept,
            trajectory_length=settings.trajectory_length,
            max_tree_depth=settings.max_tree_depth,
            rng_key=key,
        )

        def draw(state, _):
            state = step(state)
            return state, (state.z, state.diverging, state.energy)

        state = jax.lax.fori_loop(0, settings.n_warmup, lambda _, state: step(state), state)
        return jax.lax.scan(draw, state, length=settings.n_draws)[1]

    # Chains run one after another. Under vmap every leapfrog step copies the trees of all chains, and all wait for the
    # longest: a CPU then needs 1.6 to 3 times as long for 99 parameters and more, and no less for 27.
    return jax.lax.map(chain, (keys, starts))


@float64
def sample(problem: Problem, settings: Settings) -> Posterior:
    """Draw from the posterior of θ with chains that each start at a draw of the prior, and judge the draws.

    A posterior that fails the gate is returned too; see `diagnostics.failures`.
    Raises ValueError before sampling when the draws would not fit in memory.
    """
    settings.require_memory(problem)
    begun = time.perf_counter()
    start_key, run_key = jax.random.split(jax.random.key(settings.seed))
    z, divergent, energy = _run(
        problem.model.unscaled(),
        replace(settings, seed=0, memory_gb=0.0),  # one compilation serves all seeds, and all data of one size
        jax.random.split(run_key, settings.n_chains),
        jax.random.normal(start_key, (settings.n_chains, problem.model.network.n_parameters)),
        jnp.asarray(problem.model.scales()),
        jnp.asarray(problem.inputs),
        jnp.asarray(problem.targets),
    )
    draws = np.asarray(z) * problem.model.scales()
    divergent, energy, seconds = np.asarray(divergent), np.asarray(energy), time.perf_counter() - begun
    found = judge(functions(problem, draws), divergent=divergent, energy=energy, seconds=seconds)
    return Posterior(problem=problem, draws=draws, energy=energy, diagnostics=found)


@functools.partial(jax.jit, static_argnames="model")
def _predict_all(model: Model, thetas, inputs):
    return jax.lax.map(lambda theta: model.predict(theta, inputs), thetas, batch_size=64)


@float64
def functions(problem: Problem, draws: np.ndarray) -> np.ndarray:
    """Return p(y|x, θ) (or the mean) of every draw at every grid point: (chain, draw, point, class)."""
    # NaN is let in: a broken sampler makes it, and the gate has to see it
    draws = require.numbers("draws", draws, 3, width=problem.model.network.n_parameters, finite=None)
    flat = _predict_all(problem.model.unscaled(), draws.reshape(-1, draws.shape[-1]), problem.grid)
    return np.asarray(flat).reshape(*draws.shape[:2], *flat.shape[1:])


def of_classes(problem: Problem, thetas: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return p(y_c|x, θ) (theta, point) of a class (or the mean) at every grid point, for each of `thetas`."""
    return np.take_along_axis(functions(problem, thetas[None])[0], problem.classes(classes)[None, :, None], 2)[..., 0]


def judge(values: np.ndarray, *, divergent: np.ndarray, energy: np.ndarray, seconds: float) -> Diagnostics:
    """Diagnose the functions (chain, draw, point, class): rank-normalised split and folded R-hat, bulk ESS.

    Folded: the same R-hat on |value − median|, which catches chains that differ in spread and not in place.
    E-FMI (chain): E[(Eₙ − Eₙ₋₁)²] / Var[E] of the energy.
    """
    values = require.numbers("values", values, 4, finite=None)
    if divergent.shape != values.shape[:2] or energy.shape != values.shape[:2]:
        raise ValueError(f"divergent, energy: {divergent.shape}, {energy.shape} given, {values.shape[:2]} wanted")
    flat, half = values.reshape(*values.shape[:2], -1), values.shape[1] // 2
    found = []
    # in blocks, since the Fourier transforms of all points at once would fill the memory
    for block in np.array_split(flat, max(1, flat.shape[2] // 100), axis=2):
        ranked, folded = _rank_normalised(block), _rank_normalised(np.abs(block - np.median(block, axis=(0, 1))))
        split = np.concatenate([ranked[:, :half], ranked[:, -half:]])
        found.append((split_gelman_rubin(ranked), split_gelman_rubin(folded), effective_sample_size(split)))
    rhat, rhat_folded, ess = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Diagnostics(  # a NaN anywhere makes these NaN, which no gate passes
        rhat=float(rhat.max()),
        rhat_folded=float(rhat_folded.max()),
        ess=float(ess.min()),
        n_divergent=int(divergent.sum()),
        efmi=float(np.min(np.square(np.diff(energy, axis=1)).mean(axis=1) / energy.var(axis=1))),
        seconds=seconds,
    )


def _rank_normalised(values: np.ndarray) -> np.ndarray:
    # Vehtari et al. (2021), eq. 14: ranks over all chains together, then the normal quantile.
    flat = values.reshape(-1, values.shape[-1])
    return norm.ppf((rankdata(flat, axis=0) - 0.375) / (len(flat) + 0.25)).reshape(values.shape)


def reference(posterior: Posterior, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the moments of the draws at each grid point by name; arrays are (point,), variances in units of p².

    `classes` (point,): the class whose probability is meant (zeros unless multiclass; of a regression the mean is).
    mean, variance and mcse, the variance's Monte Carlo standard error. halves (2, point): the variance from the first
    and from the second half of the chains, which are independent, so that their agreement bounds what any estimate can
    reach. Unless it is a regression, aleatoric: E_θ[p(1−p)], and its aleatoric_halves.
    """
    values, classes = functions(posterior.problem, posterior.draws), posterior.problem.classes(classes)
    values = np.take_along_axis(values, classes[None, None, :, None], axis=-1)[..., 0]
    squares = np.square(values - values.mean(axis=(0, 1)))
    found = {
        "mean": values.mean(axis=(0, 1)),
        "variance": values.var(axis=1).mean(axis=0) + values.mean(axis=1).var(axis=0),  # within and between chains
        "mcse": squares.std(axis=(0, 1)) / np.sqrt(effective_sample_size(squares)),
        "halves": _halves(values, np.var),
    }
    if posterior.problem.model.kind != "regression":
        values = values * (1 - values)
        found |= {"aleatoric": values.mean(axis=(0, 1)), "aleatoric_halves": _halves(values, np.mean)}
    return found


def _halves(values: np.ndarray, statistic: Callable) -> np.ndarray:
    middle = len(values) // 2
    return np.stack([statistic(half, axis=(0, 1)) for half in (values[:middle], values[middle:])])


def isotropy(draws: np.ndarray) -> float:
    """Return tr(Σ)² / (P tr(Σ²)) of the posterior's covariance Σ: 1 when Σ ∝ I, 1/P when it has one direction.

    From differences of draws of two chains at the same place, (θ − θ′)/√2, which have covariance Σ and no mean
    to estimate: tr(Σ) is their mean square, tr(Σ²) the mean square of the inner products of one pair of chains with
    another's. These share no chain, so neither the number of draws nor their autocorrelation makes it read low, and P
    may be far larger than the number of draws. `draws`: (chain, draw, param), at least four chains.
    """
    draws = require.numbers("draws", draws, 3, least=4)
    if (draws == draws[0, 0]).all():
        raise ValueError("draws: all the same, ones with a covariance wanted")
    pairs = len(draws) // 2
    step = max(1, pairs * draws.shape[1] // 2000)  # so many differences tell as much as all of them
    differences = (draws[:pairs] - draws[pairs : 2 * pairs])[:, ::step] / np.sqrt(2)
    traces = np.square(differences).sum(axis=2).mean(axis=1)
    cross = [(i, j) for i in range(pairs) for j in range(i)]
    squares = [np.square(differences[i] @ differences[j].T).mean() for i, j in cross]
    return float(np.mean([traces[i] * traces[j] for i, j in cross]) / np.mean(squares) / draws.shape[-1])
