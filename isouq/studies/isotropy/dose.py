"""Claim C2 on small networks, as dose and response: does gᵀΣg bend towards the data that Σ was made from?

Proxies are the training distribution moved by a growing shift, another problem's inputs, and noise. For a matrix made
from them the field f is the centred log(gᵀΣg / reference) over the grid. T(f) is the share of f that nearness to the
proxies explains once nearness to the training inputs is known, beyond shifts of the grid. The *excess* is T of the
matrix minus T of isotropy with the same features: 0 where a matrix bends no more towards its proxies than ‖g‖² does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from isouq.studies import require
from isouq.studies.isotropy import covariance, kronecker
from isouq.studies.isotropy.distortion import distortion, grid_shifts, nearness, structures
from isouq.studies.results import Result
from isouq.studies.synthetic import atlas, point, problems
from isouq.studies.synthetic.atlas import Record, local_mode
from isouq.studies.synthetic.findings import mean, means
from isouq.studies.synthetic.problems import Problem

Array = NDArray[np.float64]
COMMITTED = atlas.COMMITTED.parent / "isotropy"

SHIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # along +x, in units of the map, whose side is 6
FAR = 1.0  # the least shift that counts as data from elsewhere
SOURCES = (*(f"shift {shift:g}" for shift in SHIFTS), "other problem", "noise")
# For a softmax the Fisher is the GGN. The empirical one has labels drawn from the model.
MATRICES = {"fisher": "Fisher", "empirical Fisher": "empirical Fisher", "kfac": "KFAC", "ekfac": "EK-FAC"}
REFERENCES = ("local", "mcmc", "laplace")
DAMPINGS = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)  # in units of the posterior's own; the last is isotropy
SWEPT = "shift 2"
CONTROL = "control"
WIDTH, CORE = 32, ("fisher", "local")  # of the core checks: width, matrix and reference
SERIES = ("width", "matrix", "reference")


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One posterior at one mode θ* (param,): g = ∇θ p(y_c|x, θ*) on the grid (point, param) and the references.

    `references` (point,), each a variance of p: `local`, gᵀCg with the covariance C of the draws around θ*; `mcmc`,
    Var[p] over the whole posterior; `laplace`, gᵀ(GGN + prior)⁻¹g. The first drops isotropy alone, the second also the
    straight line and the one mode.
    """

    problem: Problem
    theta: Array
    g: Array
    references: Mapping[str, Array]

    @property
    def width(self) -> int:
        """The number of hidden units."""
        return self.problem.model.network.width


def case(record: Record) -> Case:
    """Read a case off a record of ``atlas``, at the mode around which the record's local covariance was taken.

    Another θ* would meet a covariance that is not its own, and the distortion would be one of the choice of θ*.
    Raises ValueError for a record that failed the gate or that has no covariance around one mode.
    """
    name, fields = record.job.file(), record.fields
    if not record.facts["passed"]:
        raise ValueError(f"{name}: failed the gate ({', '.join(record.facts['failures'])})")
    problem, theta = record.job.make(), local_mode(record)
    g = point.gradients(problem, theta, fields["classes"])
    laplace = point.quadratic_form(g, point.ggn(problem, theta))
    assert laplace is not None  # the prior's precision alone is positive definite
    references = {"local": fields["mode_taylor"].astype(float), "mcmc": fields["variance"].astype(float)}
    return Case(problem=problem, theta=theta, g=g, references=references | {"laplace": laplace})


def cases(records: Sequence[Record]) -> tuple[list[Case], list[str]]:
    """Return the cases of all records that have one, and for each other record why it has none.

    Raises ValueError when fewer than two problems have one, too few for an interval over problems.
    """
    found, left_out = [], []
    for record in records:
        try:
            found.append(case(record))
        except ValueError as error:
            left_out.append(str(error))
    if len(names := {one.problem.name for one in found}) < 2:
        why = "; ".join(left_out) or "no others given"
        raise ValueError(f"records: {len(names)} problems with a posterior to compare with, at least 2 wanted: {why}")
    return found, left_out


def proxies(problem: Problem, source: str) -> Array:
    """Return as many inputs (example, 2) as the problem has training examples, from one of SOURCES or CONTROL.

    "shift s": new data of the problem, moved by s along +x; CONTROL: the same, not moved. "other problem": new data of
    the next problem of FRESH. "noise": uniform over the map. All of them follow from the problem's seed.
    """
    require.one_of("source", source, (*SOURCES, CONTROL))
    n, seed = len(problem.inputs), problem.seed
    if source == "noise":
        return np.random.default_rng([seed, 1]).uniform(*problem.limits, (n, 2))
    if source == "other problem":
        return problems.make(_next(problem.name), seed=10_000 + seed, n_examples=n).inputs
    fresh = problems.make(problem.name, seed=10_000 + seed, n_examples=n).inputs
    return fresh if source == CONTROL else fresh + np.array([float(source.removeprefix("shift ")), 0.0])


def _next(name: str) -> str:
    names = list(problems.FRESH)
    require.one_of("problem", name, names)
    return names[(names.index(name) + 1) % len(names)]


def form(case: Case, matrix: str, inputs: Array, dampings: Sequence[float] = (1.0,)) -> list[Array]:
    """Return gᵀΣg (point,) at every damping, with Σ = (F + λS⁻²/n)⁻¹, S the prior's scales, n training examples.

    F is the `matrix` (of MATRICES) made from `inputs`. At λ = 1 Σ has the shape of Laplace's covariance. Computed in
    units of the prior, in which the damping is λ/n for every parameter.
    Raises ValueError for a KFAC under a prior of several scales, whose damping is no single number.
    """
    require.one_of("matrix", matrix, MATRICES)
    problem, scales, n = case.problem, case.problem.model.scales(), len(case.problem.inputs)
    sigma: covariance.Covariance | kronecker.Kronecker
    if matrix in kronecker.KINDS:
        if np.ptp(scales) > 0:
            raise ValueError(f"matrix: {matrix!r} has one damping; the prior has several scales, use 'fisher'")
        sigma = kronecker.fit(problem, case.theta, inputs, matrix)
        return [sigma.quadratic_form(case.g, damping=d / n / scales[0] ** 2) for d in dampings]
    J, logits = point.jacobian(problem, case.theta, inputs)
    if matrix == "fisher":
        rows = covariance.fisher_rows(J * scales, logits)
    else:
        rows = covariance.scores(J * scales, logits, _drawn_labels(logits, seed=problem.seed))
    sigma = covariance.from_rows(rows, n_examples=len(inputs))
    return [sigma.quadratic_form(case.g * scales, damping=d / n) for d in dampings]


def _drawn_labels(logits: Array, *, seed: int) -> NDArray[np.int64]:
    """Draw the model's own label (example,) for every row of logits."""
    z = np.concatenate([0 * logits, logits], 1) if logits.shape[1] == 1 else logits
    p = softmax(z, axis=1)
    return (np.random.default_rng([seed, 2]).uniform(size=(len(z), 1)) > p.cumsum(1)[:, :-1]).sum(1)


def excesses(case: Case) -> Iterator[dict[str, Any]]:
    """Yield a row for every source, matrix, damping and reference that `recipes` names, and for the "isotropic" matrix.

    Columns: problem, seed, width, source, matrix, damping, reference; structure, T of the matrix;
    excess, T less that of isotropy, and nats2, the same in nats²; added, the field's standard deviation less that of
    isotropy's field, in nats. For CONTROL T is the plain structure: nearness to the training inputs,
    nothing else given.
    """
    grid, permutations = case.problem.grid, grid_shifts(case.problem.shape)
    trained, norm = nearness(grid, case.problem.inputs), np.square(case.g).sum(1)
    own = {"problem": case.problem.name, "seed": case.problem.seed, "width": case.width}
    for source, matrices in recipes(case.width).items():
        inputs = proxies(case.problem, source)
        near, given = (trained, None) if source == CONTROL else (nearness(grid, inputs), trained)
        series = [("isotropic", 1.0, name, norm) for name in case.references]
        for matrix, (dampings, references) in matrices.items():
            estimates = zip(dampings, form(case, matrix, inputs, dampings), strict=True)
            series += [(matrix, d, name, estimate) for d, estimate in estimates for name in references]
        fields = [distortion(estimate, case.references[name]) for *_, name, estimate in series]
        fits = structures(fields, near, permutations, given=given)
        flat = {name: fit for (matrix, _, name, _), fit in zip(series, fits, strict=True) if matrix == "isotropic"}
        for (matrix, damping, name, _), field, fit in zip(series, fields, fits, strict=True):
            yield own | {
                **{"source": source, "matrix": matrix, "damping": damping, "reference": name},
                "structure": fit.beyond_chance,
                "excess": fit.beyond_chance - flat[name].beyond_chance,
                "nats2": fit.beyond_chance * fit.variance - flat[name].beyond_chance * flat[name].variance,
                "added": float(field.std() - distortion(norm, case.references[name]).std()),
            }


def recipes(width: int) -> dict[str, dict[str, tuple[Sequence[float], Sequence[str]]]]:
    """Return for every source and matrix the dampings and references to compute at a width.

    The Fisher against all references everywhere; the other matrices and dampings at WIDTH against the local one.
    """
    chosen: dict[str, Any] = {source: {"fisher": ((1.0,), REFERENCES)} for source in (*SOURCES, CONTROL)}
    if width == WIDTH:
        for source in SOURCES:
            dampings = DAMPINGS if source == SWEPT else (1.0,)
            chosen[source] |= dict.fromkeys(list(MATRICES)[1:], (dampings, ("local",)))
        chosen[SWEPT]["fisher"] = (DAMPINGS, REFERENCES)
    return chosen


def table(cases: Sequence[Case]) -> pd.DataFrame:
    """Return the rows of `excesses` for all cases."""
    return pd.DataFrame(list(itertools.chain.from_iterable(excesses(one) for one in cases)))


def responses(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per width, matrix, reference, problem and seed, at a damping of 1.

    Columns: shifted, the mean excess over shifts of FAR and more, and nats2, the same in nats²; slope, of the excess
    per unit of shift, over all SHIFTS; near, the excess at shift 0; other problem; noise; control, of plain structure;
    added, nats of the field's size over far shifts, and added near, at shift 0.
    """
    rows = table[(table["damping"] == 1.0) & (table["matrix"] != "isotropic")]
    index = [*SERIES, "problem", "seed"]
    excess, nats2, added = (
        rows.pivot_table(values=name, index=index, columns="source", sort=False)
        for name in ("excess", "nats2", "added")
    )
    shifts = np.array(SHIFTS)
    names = [f"shift {shift:g}" for shift in SHIFTS]
    far = [name for name, shift in zip(names, SHIFTS, strict=True) if shift >= FAR]
    weights = (shifts - shifts.mean()) / np.square(shifts - shifts.mean()).sum()
    means = {"shifted": excess[far].mean(axis=1), "slope": excess[names] @ weights, "near": excess[names[0]]}
    plain = {name: excess[name] for name in ("other problem", "noise", CONTROL)}
    sizes = {"nats2": nats2[far].mean(axis=1), "added": added[far].mean(axis=1), "added near": added[names[0]]}
    return pd.DataFrame(means | plain | sizes)


def over_seeds(responses: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over data seeds, a row per width, matrix, reference and problem."""
    return responses.groupby([*SERIES, "problem"], sort=False).mean()


def bands(responses: pd.DataFrame) -> pd.DataFrame:
    """Return every response as a reader sees it, with its 95 % t-interval over problems: a row per SERIES."""
    return over_seeds(responses).groupby(list(SERIES), sort=False).agg(_band)


def _band(values: pd.Series) -> str:
    return str(band) if (band := mean(values)).n > 1 else ""


def verdicts(responses: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return the core setting by problem: every excess, that of shifted proxies with its t-interval over data seeds.

    verdict: "bends" towards the proxies if this interval lies above 0, "does not" if below, else "undecided".
    Raises ValueError where the core setting's WIDTH was not measured.
    """
    if WIDTH not in (widths := sorted(set(responses.index.get_level_values("width")))):
        raise ValueError(f"responses: widths {widths} given, {WIDTH} wanted among them, on which the core checks rest")
    core, rows = responses.xs((WIDTH, *CORE), level=list(SERIES)), dict[str, Any]()
    for problem, of_problem in core.groupby("problem", sort=False):
        _, low, high, _ = mean(of_problem["shifted"])
        verdict = "bends" if low > 0 else "does not" if high < 0 else "undecided"
        means = {name: of_problem[name].mean() for name in ("shifted", "slope", "other problem", "noise")}
        rows[titles[str(problem)]] = means | {"seeds": len(of_problem), "low": low, "high": high, "verdict": verdict}
    return pd.DataFrame.from_dict(rows, orient="index")


def maps(case: Case) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return fields (point,) by title, those of isotropy and of three Fishers against "local", and their proxies."""
    sources = ("shift 0", SWEPT, "other problem")
    inputs = {f"Fisher, {source}": proxies(case.problem, source) for source in sources}
    estimates = {title: form(case, "fisher", x)[0] for title, x in inputs.items()}
    estimates = {"isotropy": np.square(case.g).sum(1)} | estimates
    return {title: distortion(e, case.references["local"]) for title, e in estimates.items()}, inputs


def curves(table: pd.DataFrame, width: int = WIDTH) -> pd.DataFrame:
    """Return the excess of the Fisher by reference, problem, source and shift: the mean over data seeds."""
    rows = table[(table["width"] == width) & (table["matrix"] == "fisher") & (table["damping"] == 1.0)]
    rows = rows[rows["source"].str.startswith("shift")]
    rows = rows.assign(shift=rows["source"].str.removeprefix("shift ").astype(float))
    return rows.groupby(["reference", "problem", "source", "shift"], sort=False)["excess"].mean().reset_index()


def swept(table: pd.DataFrame) -> pd.DataFrame:
    """Return the excess at SWEPT over the damping, local reference: series (a matrix), damping, value, low, high."""
    of_problem = _of_sweep(table).groupby(["matrix", "damping", "problem"], sort=False)["excess"].mean().reset_index()
    bands = means(of_problem, ["matrix", "damping"], "excess")
    return bands.assign(series=bands["matrix"].map(MATRICES))[bands["n"] > 1]


def _of_sweep(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[(table["source"] == SWEPT) & (table["width"] == WIDTH) & (table["reference"] == CORE[1])]
    return rows[rows["matrix"] != "isotropic"]


def named_results(table: pd.DataFrame, n_records: int) -> dict[str, Result]:
    """Return the chapter's results by key, isotropy.dose.w32.fisher.local.shifted and so on; see `responses`."""
    by_problem, results = over_seeds(responses(table)), dict[str, Result]()

    def add(key: str, values: pd.Series, **more: str) -> None:
        if (band := mean(values)).n > 1:
            results[f"isotropy.dose.{key}"] = band.result(claim="C2", **more)

    for (width, matrix, reference), rows in by_problem.groupby(list(SERIES), sort=False):
        for column, values in rows.items():
            unit = {"slope": "per unit of shift", "nats2": "nats²", "added": "nats", "added near": "nats"}.get(
                str(column), ""
            )
            add(_key(f"w{width}.{matrix}.{reference}.{column}"), values, unit=unit)
    for (reference, source), rows in curves(table).groupby(["reference", "source"], sort=False):
        add(_key(f"w{WIDTH}.fisher.{reference!s}.{source!s}"), rows["excess"])
    flat = table[(table["matrix"] == "isotropic") & (table["source"] == CONTROL)]
    for (width, reference), rows in flat.groupby(["width", "reference"], sort=False):
        add(_key(f"w{width!s}.isotropic.{reference!s}.plain"), rows.groupby("problem")["structure"].mean())
    sweep = _of_sweep(table)
    for matrix, rows in sweep[sweep["damping"] == DAMPINGS[-1]].groupby("matrix", sort=False):
        add(_key(f"w{WIDTH}.{matrix!s}.damped"), rows.groupby("problem")["excess"].mean())
    posteriors = table.drop_duplicates(["problem", "seed", "width"])
    results["isotropy.dose.n"] = Result(value=n_records)
    results["isotropy.dose.n_used"] = Result(value=len(posteriors))
    results["isotropy.dose.n_problems"] = Result(value=posteriors["problem"].nunique())
    return results


def _key(words: str) -> str:
    return re.sub(r"(\d)\.(?=\d)", r"\1_", words).replace(" ", "_").lower()
