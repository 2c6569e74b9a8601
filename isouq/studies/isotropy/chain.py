"""Where the error enters: from MCMC's variance of p to ‖g‖² in four steps, and what each adds to the log error.

    MCMC → one mode → Gaussian → straight line → isotropy

*One mode*: the variance of p over the draws that lie around one mode, with neither approximation. *Gaussian*: the same
over draws of Laplace's N(θ*, Σ) at that mode, through the network. *Straight line*: gᵀΣg. *Isotropy*: ‖g‖². A step is
the field log(next/previous) over the grid less its mean (the best common factor), so that the steps of a point add up
to its error log(‖g‖²/Var[p]). A step's *variance* (nats²) is its own size. The steps are not independent: one may undo
what another did. So its *share* of the squared error is Cov(step, error)/Var(error), which adds up to one and is
negative where the step undoes more than it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.linalg
from numpy.typing import NDArray

from isouq.studies import require
from isouq.studies.isotropy.distortion import log_variance
from isouq.studies.isotropy.ranks import factored
from isouq.studies.results import Result
from isouq.studies.synthetic import findings, point, posterior
from isouq.studies.synthetic.atlas import Record, correlation, local_mode
from isouq.studies.synthetic.problems import Problem

Array = NDArray[np.float64]
STEPS = ("one mode", "Gaussian", "straight line", "isotropy")
# Beside the steps: the error of ‖g‖² at this mode and at the trained network (which claim C4 is about), and what of
# MCMC's variance and of the Gaussian's is Monte Carlo.
OTHERS = ("error", "error, trained", "noise of MCMC", "noise of the Gaussian")
# Draws of the Gaussian in a block, the noise (nats²) at which there are enough, and the most blocks.
N_DRAWS, ENOUGH, MOST_BLOCKS = 2000, 0.02, 8


def laplace(problem: Problem, theta: Array) -> tuple[Array, str]:
    """Return Laplace's precision at θ (param, param) and which matrix it is made of.

    The Hessian where it is positive definite, else the GGN: with ReLU units the Hessian seldom is.
    """
    H = point.hessian(problem, theta)
    if np.linalg.eigvalsh(H)[0] > 0:
        return H, "Hessian"
    return point.ggn(problem, theta), "GGN"


def gaussian(problem: Problem, theta: Array, precision: Array, classes: NDArray) -> Array:
    """Return the variance of p(y_c) over N(θ, precision⁻¹) from each half of its draws: (2, point).

    Blocks of N_DRAWS are added until the noise is at most ENOUGH, or there are MOST_BLOCKS: where a network is
    confident, the variance rests on few draws.

    Raises ValueError for a precision that is not symmetric and positive definite.
    """
    try:
        factor = np.linalg.cholesky(require.symmetric("precision", precision))
    except np.linalg.LinAlgError:
        raise ValueError("precision: one that is not positive definite given; take that of `laplace`") from None
    rng, theta = np.random.default_rng(problem.seed), problem.model.parameters(theta)
    values = np.empty((0, len(problem.grid)))
    for _ in range(MOST_BLOCKS):
        z = scipy.linalg.solve_triangular(factor, rng.normal(size=(len(factor), N_DRAWS)), trans="T", lower=True)
        values = np.concatenate([values, posterior.of_classes(problem, theta + z.T, classes)])
        halves = np.stack([values[0::2].var(axis=0), values[1::2].var(axis=0)])
        if noise(halves) <= ENOUGH:
            break
    return halves


def noise(halves: Array) -> float:
    """Return the Monte Carlo variance (nats²) of the logarithm of the mean of two independent halves (2, point)."""
    first, second = require.numbers("halves", halves, 2)
    return float(np.log(first / second).var() / 4)


def log_variances(record: Record) -> tuple[dict[str, Array], Array, str] | None:
    """Return the logarithm of the chain's variances (point,) by name, MCMC's first, then that of ‖g‖² when trained.

    With them: the Gaussian's halves (2, point), and the matrix of `laplace`. None for a record without draws around a
    mode.

    Raises ValueError for a variance that is zero at some point.
    """
    problem, fields = record.job.make(), {name: values.astype(float) for name, values in record.fields.items()}
    if "mode_variance" not in fields:
        return None
    trained, classes = fields["thetas"][0], record.fields["classes"]
    theta = local_mode(record)
    precision, matrix = laplace(problem, theta)
    halves = gaussian(problem, theta, precision, classes)
    h, log_factor = factored(problem, theta, classes)
    plain = {"MCMC": fields["variance"], "one mode": fields["mode_variance"], "Gaussian": halves.mean(axis=0)}
    logs = {name: log_variance(name, values) for name, values in plain.items()}
    line = point.quadratic_form(h, precision)
    assert line is not None  # `gaussian` has factored this precision
    logs["straight line"] = log_variance("straight line", line) + 2 * log_factor
    for name, at in {"isotropy": theta, "trained": trained}.items():
        h, log_factor = factored(problem, at, classes)
        logs[name] = log_variance(name, np.square(h).sum(axis=1)) + 2 * log_factor
    return logs, halves, matrix


def steps(record: Record) -> list[dict[str, Any]]:
    """Return a row per step and for each of OTHERS: problem, seed, matrix, step, variance (nats²), share and rho.

    rho: Spearman's ρ of what the step arrives at with MCMC's variance. NaN where the record has no draws around a mode,
    or its posterior failed the gate.
    """
    own = {"problem": record.job.problem, "seed": record.job.seed, "matrix": "", "share": np.nan, "rho": np.nan}
    found = log_variances(record) if record.facts["passed"] else None
    if found is None:
        return [own | {"step": step, "variance": np.nan} for step in (*STEPS, *OTHERS)]
    logs, of_gaussian, own["matrix"] = found
    mcmc, path, rows = logs["MCMC"], [logs[name] for name in ("MCMC", *STEPS)], []
    error, trained = logs["isotropy"] - mcmc, logs["trained"]
    for step, before, after in zip(STEPS, path, path[1:], strict=False):
        share = float(np.cov(after - before, error)[0, 1] / error.var(ddof=1))
        of_step = {"step": step, "variance": (after - before).var(), "share": share}
        rows.append(of_step | {"rho": correlation(after, mcmc)[1]})
    rows += [
        {"step": "error", "variance": error.var()},
        {"step": "error, trained", "variance": (trained - mcmc).var(), "rho": correlation(trained, mcmc)[1]},
        {"step": "noise of MCMC", "variance": noise(record.fields["halves"].astype(float))},
        {"step": "noise of the Gaussian", "variance": noise(of_gaussian)},
    ]
    return [own | row for row in rows]


def table(records: Sequence[Record]) -> pd.DataFrame:
    """Return the rows of `steps` for all records."""
    return pd.DataFrame([row for record in records for row in steps(record)])


def by_problem(table: pd.DataFrame) -> pd.DataFrame:
    """Return the means over data seeds, a row per problem and step, with their t-intervals.

    Columns: variance, share and rho (by Fisher's z), each with _low and _high (NaN for one seed); n seeds, and
    n_missing, those without a chain.
    """
    by = ["problem", "step"]
    n = table.groupby(by, sort=False)["variance"].agg(["count", "size"]).reset_index()
    rows = n[by].assign(n=n["count"], n_missing=n["size"] - n["count"])
    for column in ("variance", "share", "rho"):
        means = findings.means(table, by, column, is_rho=column == "rho")
        rows[[column, f"{column}_low", f"{column}_high"]] = means[["value", "low", "high"]]
    return rows


def text(means: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return the table of `by_problem` as a reader sees it: each step's share of the squared error, then OTHERS.

    titles: problem → its label. n and missing: data seeds with and without a chain.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in means.to_dict("records"):
        own = rows.setdefault(titles[row["problem"]], {})
        if row["step"] in STEPS:
            band = "" if np.isnan(row["share_low"]) else f" [{row['share_low']:.0%}, {row['share_high']:.0%}]"
            own[f"{row['step']}, share"] = f"{row['share']:.0%}{band}"
        else:
            own[f"{row['step']} (nats²)"] = f"{row['variance']:.{0 if row['variance'] >= 10 else 3}f}"
        own |= {"n": row["n"], "missing": row["n_missing"]}
    table = pd.DataFrame(rows).T.rename_axis("")
    return table[[name for name in table if name not in ("n", "missing")] + ["n", "missing"]]


def named_results(table: pd.DataFrame) -> dict[str, Result]:
    """Return the chapter's results by key: PROBLEM.STEP (nats²) and PROBLEM.STEP_share, with intervals over data seeds.

    mean.STEP_share: the mean over problems with its interval over these. noise: the largest of a problem, in nats². n,
    n_missing, n_ggn: records, those without a chain, and those in which Laplace had to take the GGN.
    """
    results: dict[str, Result] = {}

    def add(key: str, values: pd.Series, unit: str = "") -> None:
        if (mean := findings.mean(values)).n:
            results[f"isotropy.chain.{key}"] = mean.result(unit=unit)

    means, noise = by_problem(table), table[table["step"].isin(OTHERS[2:])]
    for (problem, step), group in table.drop(index=noise.index).groupby(["problem", "step"], sort=False):
        key = f"{problem}.{_key(str(step))}"
        add(key, group["variance"], "nats²")
        add(f"{key}_share", group["share"])
    for step in STEPS:
        add(f"mean.{_key(step)}_share", means.loc[means["step"] == step, "share"])
    largest = float(noise.groupby(["problem", "step"])["variance"].mean().max())
    if np.isfinite(largest):
        results["isotropy.chain.noise"] = Result(value=largest, n=len(noise), unit="nats²")
    first = table[table["step"] == STEPS[0]]
    counts = {"n": len(first), "n_missing": first["variance"].isna().sum(), "n_ggn": (first["matrix"] == "GGN").sum()}
    return results | {f"isotropy.chain.{key}": Result(value=int(count)) for key, count in counts.items()}


def _key(step: str) -> str:
    return step.lower().replace(",", "").replace(" ", "_")
