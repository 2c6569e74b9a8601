"""Small networks, where the true variance is known: what covariances from which data do to gᵀΣg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from isouq.studies import require
from isouq.studies.evaluation import spearman
from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.covariance import Covariance, SingularCovarianceError
from isouq.studies.isotropy.distortion import distortion, grid_shifts, nearness, overlap, structure
from isouq.studies.synthetic import cache, point, posterior, problems
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Network, Problem

Array = NDArray[np.float64]

# Where proxy data come from. Only the first was seen in training; each next one is farther from it.
SOURCES = ("training", "unseen", "shifted", "other problem", "noise")
MATRICES = ("isotropic", "empirical_fisher", "empirical_fisher_diagonal", "fisher", "hessian")
LABELS = ("true", "shuffled", "model")
UNLABELLED = ("other problem", "noise")  # inputs for which this problem has no true label
PARTNER = {
    "binary_rings": "multiclass_spirals",
    "binary_xor": "multiclass_clusters",
    "multiclass_spirals": "binary_xor",
    "multiclass_clusters": "binary_rings",
}
SHIFT = np.array([1.5, 0.0])
RECIPE = ("matrix", "source", "labels")
N_LEADING = 5  # directions of an eigenspace that are compared


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make a covariance: the matrix, where its inputs come from, and whose labels it takes.

    matrix: "isotropic", "empirical_fisher", "empirical_fisher_diagonal", "fisher" or "hessian" (of training data, with
    the prior's curvature: Laplace). labels: "true", "shuffled" (the true ones, permuted), "model" (sampled) or "none".
    """

    matrix: str
    source: str = "training"
    labels: str = "none"

    def __post_init__(self) -> None:
        require.one_of("matrix", self.matrix, MATRICES)
        require.one_of("source", self.source, SOURCES)
        require.one_of("labels", self.labels, LABELS if self.matrix.startswith("empirical") else ("none",))


RECIPES = (
    *(Recipe(matrix="isotropic", source=source) for source in SOURCES),
    Recipe(matrix="hessian"),
    *(Recipe(matrix="fisher", source=source) for source in SOURCES),
    *(Recipe(matrix="empirical_fisher", source=source, labels="true") for source in SOURCES[:3]),
    *(Recipe(matrix="empirical_fisher", source=source, labels="model") for source in SOURCES),
    Recipe(matrix="empirical_fisher", source="unseen", labels="shuffled"),
    Recipe(matrix="empirical_fisher_diagonal", source="training", labels="true"),
    Recipe(matrix="empirical_fisher_diagonal", source="unseen", labels="true"),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A problem with its MAP θ*, the gradients g (point, param) of p(y_c) there, and MCMC's variance of p (point,)."""

    problem: Problem
    theta: Array
    g: Array
    variance: Array
    passed: bool

    @property
    def damping(self) -> float:
        """α/n, the prior's mean precision over the number of training examples: λ for which Σ(λ) is Laplace's shape."""
        return float(np.mean(self.problem.model.scales() ** -2.0) / len(self.problem.inputs))


def solve(problem: Problem, settings: Settings, folder: str | Path | None = None, *, n_starts: int = 8) -> Case:
    """Find the MAP and sample the posterior (or read its draws from `folder`)."""
    best = point.find_map(problem, n_starts=n_starts, seed=problem.seed)
    classes = point.predicted_classes(problem, best.theta)
    drawn = cache.draw(problem, settings, folder)
    return Case(
        problem=problem,
        theta=best.theta,
        g=point.gradients(problem, best.theta, classes),
        variance=posterior.reference(drawn, classes).variance,
        passed=drawn.diagnostics.passed,
    )


def proxies(problem: Problem, source: str, n: int) -> tuple[Array, NDArray[np.int64] | None]:
    """Inputs (example, 2) from `source` with their true labels (example,), None where the problem has none for them.

    Raises ValueError for an unknown source, for more training examples than there are, and for a problem without a
    PARTNER.
    """
    require.one_of("source", source, SOURCES)
    require.count("n", n, 1, len(problem.inputs) if source == "training" else 10**6)
    if source == "training":
        return problem.inputs[:n], problem.targets[:n]
    if source == "noise":
        return np.random.default_rng([problem.seed, 1]).uniform(*problem.limits, (n, 2)), None
    name = problem.name
    if source == "other problem":
        require.one_of("problem", name, PARTNER)
        name = PARTNER[name]
    fresh = problems.make(name, seed=10_000 + problem.seed, n_examples=max(n, 3))
    inputs, targets = fresh.inputs[:n], fresh.targets[:n]
    if source == "other problem":
        return inputs, None
    return (inputs + SHIFT if source == "shifted" else inputs), targets


def outputs(network: Network, theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The network's logits (…, class) in torch, from the same flat θ that jax uses."""
    activation = {"tanh": torch.tanh, "relu": torch.relu}[network.activation]
    *hidden, (weight, bias) = network.layers(theta)
    for hidden_weight, hidden_bias in hidden:
        inputs = activation(inputs @ hidden_weight + hidden_bias)
    return inputs @ weight + bias


def jacobian(problem: Problem, theta: Array, inputs: Array) -> tuple[Array, Array]:
    """∂logits/∂θ (example, class, param) and the logits (example, class) of the problem's network; no regression's."""
    require.one_of("problem", problem.model.kind, ("binary", "multiclass"))
    x = torch.tensor(require.numbers("inputs", inputs, 2, width=problem.model.network.n_inputs))
    at = torch.tensor(problem.model.parameters(theta))

    def one(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return outputs(problem.model.network, theta, x)

    return torch.func.vmap(torch.func.jacrev(one), (None, 0))(at, x).numpy(), one(at, x).numpy()


def build(case: Case, recipe: Recipe, n: int) -> Covariance:
    """The covariance of `recipe` from n proxies, at the case's θ*."""
    if recipe.matrix == "isotropic":
        return covariance.isotropic()
    if recipe.matrix == "hessian":
        n_training = len(case.problem.inputs)
        return covariance.hessian(point.hessian(case.problem, case.theta) / n_training)
    inputs, targets = proxies(case.problem, recipe.source, n)
    jac, logits = jacobian(case.problem, case.theta, inputs)
    if recipe.matrix == "fisher":
        return covariance.fisher(jac, logits)
    labels = _labels(recipe.labels, targets, logits, np.random.default_rng([case.problem.seed, 2]))
    return covariance.empirical_fisher(jac, logits, labels, diagonal=recipe.matrix.endswith("diagonal"))


def _labels(whose: str, true: NDArray | None, logits: Array, rng: np.random.Generator) -> NDArray:
    if whose == "model":
        z = np.concatenate([0 * logits, logits], 1) if logits.shape[1] == 1 else logits
        return (z + rng.gumbel(size=z.shape)).argmax(1)  # Gumbel's trick: a draw from the softmax
    if true is None:
        raise ValueError(f"labels: {whose!r} asked for inputs that have no true label; 'model' wanted")
    return rng.permutation(true) if whose == "shuffled" else true


def compare(
    case: Case, recipe: Recipe, *, n: int | None = None, damping: float = 1.0, n_permutations: int = 199
) -> dict[str, object] | None:
    """How Σ from one recipe does against MCMC: a row of the study's table, or None where it is no covariance.

    n: proxies, as many as training examples unless given. damping: in units of the case's own, α/n.
    spearman: rank correlation of gᵀΣg with MCMC's variance over the grid. spread: of the distortion field, in nats.
    explained, by_chance, p_value: the field's structure, by nearness to the proxies, against shifts of the map.
    """
    n = len(case.problem.inputs) if n is None else n
    strength = 0.0 if recipe.matrix == "hessian" else damping * case.damping  # the Hessian carries the prior already
    try:
        form = build(case, recipe, n).quadratic_form(case.g, damping=strength)
    except SingularCovarianceError:
        return None  # the Hessian at a saddle: no covariance, so no row
    bent = distortion(form, case.variance)
    near = nearness(case.problem.grid, proxies(case.problem, recipe.source, n)[0])
    shifts = grid_shifts(case.problem.shape, n_permutations, seed=case.problem.seed)
    found = structure(bent.field, near, shifts)
    return {
        **{"problem": case.problem.name, "seed": case.problem.seed, **vars(recipe), "n": n, "damping": damping},
        **{"spearman": spearman(form, case.variance), "spread": bent.spread},
        **{name: getattr(found, name) for name in ("explained", "by_chance", "beyond_chance", "p_value")},
    }


def overlap_with_training(case: Case, source: str) -> float:
    """Of the leading directions of the Fisher of as many proxies with those of the training data's; see `overlap`."""
    both = (proxies(case.problem, source, len(case.problem.inputs))[0], case.problem.inputs)
    a, b = (covariance.fisher_rows(*jacobian(case.problem, case.theta, inputs)) for inputs in both)
    return overlap(a @ a.T, b @ b.T, a @ b.T, N_LEADING)


def table(cases: Sequence[Case], recipes: Sequence[Recipe] = RECIPES, **options: object) -> pd.DataFrame:
    """One row per case and recipe; `options` are those of `compare`."""
    rows = [compare(case, recipe, **options) for case in cases for recipe in recipes]  # type: ignore[arg-type]
    return pd.DataFrame([row for row in rows if row is not None])


def against_isotropic(table: pd.DataFrame, columns: Sequence[str], by: Sequence[str] = RECIPE) -> pd.DataFrame:
    """Each recipe minus isotropy on the same case and proxies: the mean over cases with its 95 % t-interval.

    One row per combination of `by`, with n cases and for every column c its c, c_low, c_high (NaN for one case). Cases
    are problems with data seeds: an interval over them is about such problems, and few of them.
    """
    same = ["problem", "seed", "source", "n", "damping"]
    flat = table[table["matrix"] == "isotropic"].drop_duplicates(same).set_index(same)[list(columns)]
    rows = []
    for key, some in table[table["matrix"] != "isotropic"].groupby(list(by), sort=False):
        gained = (some.set_index(same)[list(columns)] - flat).dropna()  # not one without isotropy beside it
        rows.append(dict(zip(by, key, strict=True)) | {"n_cases": len(gained)} | interval(gained))
    return pd.DataFrame(rows)


def interval(values: pd.DataFrame) -> dict[str, float]:
    """For every column c its mean c and the 95 % t-interval c_low, c_high; rows with NaN are left out."""
    values = values.dropna()
    reach = stats.t.ppf(0.975, max(1, len(values) - 1)) * values.sem()
    parts = {"": values.mean(), "_low": values.mean() - reach, "_high": values.mean() + reach}
    return {f"{column}{end}": float(part[column]) for column in values for end, part in parts.items()}


def sweep(
    cases: Sequence[Case], recipes: Sequence[Recipe], *, counts: Sequence[int], dampings: Sequence[float]
) -> pd.DataFrame:
    """Rows over n (at damping 1) and over λ (at n of the training data): axis "n" or "damping" says which."""
    over_n = [table(cases, recipes, n=n, n_permutations=1).assign(axis="n") for n in counts]
    over_damping = [table(cases, recipes, damping=d, n_permutations=1).assign(axis="damping") for d in dampings]
    return pd.concat([*over_n, *over_damping], ignore_index=True)
