"""Small networks, where the true variance is known: how gᵀΣg changes with the data that Σ is made from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from isouq.studies import require
from isouq.studies.evaluation import spearman
from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.distortion import distortion, grid_shifts, nearness, structure
from isouq.studies.synthetic import cache, point, posterior, problems
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Problem

Array = NDArray[np.float64]

# Where proxy data come from: the training data, and then sources that are farther and farther from them.
SOURCES = ("training", "unseen", "shifted", "other problem", "noise")
# An empirical Fisher has the true labels of its inputs, or labels that are drawn from the network.
MATRICES = ("isotropic", "fisher", "empirical_fisher", "empirical_fisher_model")
# Matrix and source; only the first three sources have true labels.
RECIPES = tuple((m, source) for m in MATRICES for source in (SOURCES[:3] if m == "empirical_fisher" else SOURCES))
PARTNER = {
    "binary_rings": "multiclass_spirals",
    "binary_xor": "multiclass_clusters",
    "multiclass_spirals": "binary_xor",
    "multiclass_clusters": "binary_rings",
}
SHIFT = np.array([1.5, 0.0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A problem with its MAP θ*, the gradients g (point, param) of p(y_c) there, and MCMC's variance of p (point,)."""

    problem: Problem
    theta: Array
    g: Array
    variance: Array
    passed: bool


def solve(problem: Problem, settings: Settings, folder: str | Path | None = None) -> Case:
    """Find the MAP and sample the posterior (or read its draws from `folder`)."""
    best = point.find_map(problem, seed=problem.seed)
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


def form(case: Case, matrix: str, source: str = "training", *, n: int | None = None, damping: float = 1.0) -> Array:
    """Return gᵀΣg (point,) with a `matrix` made from n proxies (default: as many as training examples).

    damping: λ in units of α/n, the prior's mean precision over the number of training examples, for which Σ(λ) has the
    shape of Laplace's covariance.
    """
    require.one_of("matrix", matrix, MATRICES)
    problem, g = case.problem, case.g
    if matrix == "isotropic":
        return np.square(g).sum(1)
    require.one_of("problem", problem.model.kind, ("binary", "multiclass"))
    inputs, labels = proxies(problem, source, len(problem.inputs) if n is None else n)
    J, logits = point.jacobian(problem, case.theta, inputs)
    if matrix == "fisher":
        rows = covariance.fisher_rows(J, logits)
    else:
        labels = _drawn_labels(logits, seed=problem.seed) if matrix == "empirical_fisher_model" else labels
        if labels is None:
            raise ValueError(f"source: inputs of {source!r} have no true label; 'empirical_fisher_model' needs none")
        rows = covariance.scores(J, logits, labels)
    unit = float(np.mean(problem.model.scales() ** -2.0) / len(problem.inputs))
    return covariance.from_rows(rows, n_examples=len(inputs)).quadratic_form(g, damping=damping * unit)


def _drawn_labels(logits: Array, *, seed: int) -> NDArray[np.int64]:
    z = np.concatenate([0 * logits, logits], 1) if logits.shape[1] == 1 else logits
    # Gumbel's trick: a draw from the softmax
    return (z + np.random.default_rng([seed, 2]).gumbel(size=z.shape)).argmax(1)


def compare(
    case: Case, matrix: str, source: str, *, n: int | None = None, damping: float = 1.0, n_permutations: int = 199
) -> dict[str, object]:
    """Compare `form` with MCMC's variance: a row of the study's table.

    spearman: rank correlation over the grid. spread: of the distortion field, in nats. explained, by_chance,
    beyond_chance, p_value: the field's structure, by nearness to the proxies, against shifts of the map.
    """
    problem, n = case.problem, len(case.problem.inputs) if n is None else n
    estimate = form(case, matrix, source, n=n, damping=damping)
    field = distortion(estimate, case.variance)
    shifts = grid_shifts(problem.shape, n_permutations, seed=problem.seed)
    by_nearness = structure(field, nearness(problem.grid, proxies(problem, source, n)[0]), shifts)
    return {
        **{"problem": problem.name, "seed": problem.seed, "matrix": matrix, "source": source, "n": n},
        **{"damping": damping, "spearman": spearman(estimate, case.variance), "spread": float(field.std())},
        **{"beyond_chance": by_nearness.beyond_chance, **vars(by_nearness)},
    }


def table(
    cases: Sequence[Case],
    recipes: Sequence[tuple[str, str]] = RECIPES,
    *,
    counts: Sequence[int | None] = (None,),
    dampings: Sequence[float] = (1.0,),
    n_permutations: int = 199,
) -> pd.DataFrame:
    """One row of `compare` for every case, (matrix, source), number of proxies and damping."""
    every = itertools.product(counts, dampings, cases, recipes)
    return pd.DataFrame(
        [compare(case, *recipe, n=n, damping=d, n_permutations=n_permutations) for n, d, case, recipe in every]
    )


def against_isotropic(
    table: pd.DataFrame, columns: Sequence[str], by: Sequence[str] = ("matrix", "source")
) -> pd.DataFrame:
    """Return each matrix minus isotropy on the same case and proxies: the mean over cases with its 95 % t-interval.

    One row per combination of `by`, with n_cases and for every column c its c, c_low, c_high (NaN for one case).
    """
    same = ["problem", "seed", "source", "n", "damping"]
    flat = table[table["matrix"] == "isotropic"].drop_duplicates(same).set_index(same)[list(columns)]
    rows = []
    for key, group in table[table["matrix"] != "isotropic"].groupby(list(by), sort=False):
        gained = (group.set_index(same)[list(columns)] - flat).dropna()  # a case without isotropy does not count
        rows.append(dict(zip(by, key, strict=True)) | {"n_cases": len(gained)} | interval(gained))
    return pd.DataFrame(rows)


def interval(values: pd.DataFrame) -> dict[str, float]:
    """Return for every column c its mean c and the 95 % t-interval c_low, c_high; rows with NaN are left out."""
    values = values.dropna()
    reach = stats.t.ppf(0.975, max(1, len(values) - 1)) * values.sem()
    parts = {"": values.mean(), "_low": values.mean() - reach, "_high": values.mean() + reach}
    return {f"{column}{end}": float(part[column]) for column in values for end, part in parts.items()}
