"""Do ranks survive as networks grow? hᵀΣh beside ‖h‖² by width, at a trained network (claim C3).

The gradient of a probability is g = p(1−p) h, with h the gradient of its log odds. The factor p(1−p) stands in gᵀΣg and
in ‖g‖² alike, whatever Σ is, and between confident and doubtful inputs it differs by many orders of magnitude, so that
the ranks of the two agree under any covariance. What isotropy decides is the rest, hᵀΣh against ‖h‖².

Σ = (GGN + S⁻²)⁻¹ is Laplace's covariance with the GGN of all training data and the prior's standard deviations S, one
for each parameter. In units of the prior it is (I + F)⁻¹ with F = XᵀX, and is inverted in the space of X's rows
(`covariance`), so that no network is too wide. The *retained* share hᵀΣh/‖Sh‖² is what the data leave of the prior's
variance (g's is the same): where it is the same at all inputs, the prior's ranks stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from isouq.studies import require
from isouq.studies.evaluation import spearman
from isouq.studies.isotropy import covariance
from isouq.studies.results import Result
from isouq.studies.synthetic import findings, modes, point, problems
from isouq.studies.synthetic.atlas import REGIONS
from isouq.studies.synthetic.plan import headline_job
from isouq.studies.synthetic.problems import Problem
from isouq.studies.verdicts import fisher_z

Array = NDArray[np.float64]
PRIORS = ("fixed", "fan_in")
CONTROL = 100.0  # times the weight of the data in the positive control: ranks must not survive there
CORRELATIONS = ("rho", "rho_scaled", "rho_g", "rho_p")
SHARES = ("bulk", "outliers", "bound")
STATISTICS = (*CORRELATIONS, "sd", *SHARES)
# What is reported: key → label, and how it differs from USUAL.
USUAL: dict[str, Any] = {"prior": "fixed", "weight": 1.0, "region": "whole", "statistic": "rho"}
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "rho": ("ρ of hᵀΣh with ‖h‖²", {}),
    "rho_near": ("the same near the data", {"region": "near"}),
    "rho_far": ("the same far from the data", {"region": "far"}),
    "rho_fan_in": ("the same, prior scaled by fan-in", {"prior": "fan_in"}),
    "rho_fan_in_scaled": ("the same, with ‖Sh‖²", {"prior": "fan_in", "statistic": "rho_scaled"}),
    "control": ("control: ρ with 100 times the data", {"weight": CONTROL}),
    "rho_g": ("ρ of gᵀΣg with ‖g‖²", {"statistic": "rho_g"}),
    "rho_p": ("ρ of gᵀΣg with p(1−p) alone", {"statistic": "rho_p"}),
    "control_g": ("control: ρ of gᵀΣg with ‖g‖²", {"weight": CONTROL, "statistic": "rho_g"}),
    "sd": ("sd of log retained share (nats)", {"statistic": "sd"}),
    "sd_fan_in": ("the same, prior scaled by fan-in", {"prior": "fan_in", "statistic": "sd"}),
    "bulk": ("share of ‖h‖² in the bulk", {"statistic": "bulk"}),
    "outliers": ("share of eigenvalues above the prior's", {"statistic": "outliers"}),
    "bound": ("the most that this share can be", {"statistic": "bound"}),
}


def network(name: str, *, seed: int, width: int, prior: str = "fixed") -> Problem:
    """Make a problem with the network of chapter 02's headline setting, but for its width and its prior.

    ReLU for several classes and tanh for two; prior N(0, 1), or "fan_in" with the problem's own scale.

    Raises ValueError for a problem that is no classification with a hidden layer, and for an unknown prior.
    """
    require.one_of("prior", prior, PRIORS)
    model = problems.spec(name).model
    if model.kind == "regression" or model.network.depth == 0:
        raise ValueError(f"name: {name!r} given, a classification with a hidden layer wanted")
    return headline_job(seed, name, require.count("width", width), prior).make()


def factored(problem: Problem, theta: Array, classes: NDArray) -> tuple[Array, Array]:
    """Return h (point, param) and log f (point,), with g = f h the gradient of p(y_c) on the grid.

    h = ∇ log(p/(1−p)) and f = p(1−p), from the logits z, since p of a confident network rounds to 1: with w the softmax
    of all but c's, h = ∇z_c − Σ_j w_j ∇z_j. Of a regression h is the gradient of the mean, and f is 1.
    """
    (J, outputs), classes = point.jacobian(problem, theta, problem.grid), problem.classes(classes)
    if problem.model.kind == "regression":
        return J[:, 0], np.zeros(len(J))
    odds, h = outputs[:, 0], J[:, 0]
    if problem.model.kind == "multiclass":
        at, others = (np.arange(len(outputs)), classes), outputs.copy()
        others[at] = -np.inf
        odds = outputs[at] - logsumexp(others, axis=1)
        h = J[at] - np.einsum("pc,pcq->pq", softmax(others, axis=1), J)
    return h, -np.logaddexp(0, odds) - np.logaddexp(0, -odds)


def measure(problem: Problem, theta: Array, *, weight: float = 1.0) -> list[dict[str, Any]]:
    """Return a row for each of REGIONS of the map, for a network θ (param,) and `weight` times its data.

    rho, rho_scaled: Spearman's ρ of hᵀΣh with ‖h‖² and with ‖Sh‖². rho_g: of gᵀΣg with ‖g‖²; rho_p: of gᵀΣg with
    (p(1−p))² alone. sd: standard deviation of the logarithm of the retained share (nats). bulk: mean share of ‖Sh‖² in
    directions where the data say less than the prior, F < 1. outliers: the share of F's eigenvalues above 1. bound: the
    rank of F over its size, which outliers cannot exceed.
    """
    classes, scales = point.predicted_classes(problem, theta), problem.model.scales()
    h, log_factor = factored(problem, theta, classes)
    J, logits = point.jacobian(problem, theta, problem.inputs)
    rows = covariance.fisher_rows(J * scales, logits)  # for a softmax the Fisher is the GGN
    ggn = covariance.from_rows(np.sqrt(require.number("weight", weight, 0.0)) * rows, n_examples=1)
    after, bulk = ggn.quadratic_form(h * scales, damping=1.0), ggn.share_below(h * scales, 1.0)
    norm, before = np.square(h).sum(1), np.square(h * scales).sum(1)
    # logarithms, since the square of p(1−p) may be smaller than any float64
    with_factor = [np.log(after) + 2 * log_factor, np.log(norm) + 2 * log_factor]
    pairs = (after, norm), (after, before), with_factor, (with_factor[0], log_factor)
    rank = min(len(theta), len(problem.inputs) * max(1, logits.shape[1] - 1))
    own = {"outliers": float((ggn.eigenvalues > 1).sum() / len(theta)), "bound": rank / len(theta)}
    near, found = problem.near_data(), []
    for region, where in zip(REGIONS, (np.ones_like(near), near, ~near), strict=True):
        rho = {name: spearman(a[where], b[where]) for name, (a, b) in zip(CORRELATIONS, pairs, strict=True)}
        sd = float(np.log(after / before)[where].std())
        found.append({"region": region, **rho, "sd": sd, "bulk": float(bulk[where].mean()), **own})
    return found


def table(names: Sequence[str], seeds: Sequence[int], widths: Sequence[int]) -> pd.DataFrame:
    """Train a network for each problem, data seed and width, and `measure` it under each of PRIORS.

    Columns: problem, seed, prior, width, weight and those of `measure`; loss (nats an example) and fits, whether
    training reached its declared loss. A network that does not is kept. Training knows no prior, so θ* is the same
    under both. The positive control is the narrowest network under the fixed prior with CONTROL times its data.
    """
    require.numbers("widths", widths)
    rows: list[dict[str, Any]] = []
    for name in names:
        for seed in seeds:
            for width in widths:
                rows += _of_one(name, seed, width, control=width == min(widths))
    return pd.DataFrame(rows)


def _of_one(name: str, seed: int, width: int, *, control: bool) -> Iterator[dict[str, Any]]:
    own = [network(name, seed=seed, width=width, prior=prior) for prior in PRIORS]
    theta = modes.train(own[0], seed=seed)
    loss = float(modes.losses(own[0], theta[None])[0])
    trained = {"loss": loss, "fits": loss <= modes.TARGET_LOSS[own[0].model.kind]}
    for problem, weight in [*((one, 1.0) for one in own), *([(own[0], CONTROL)] if control else [])]:
        names = {"problem": name, "seed": seed, "prior": problem.model.prior_scaling, "width": width, "weight": weight}
        yield from (names | row | trained for row in measure(problem, theta, weight=weight))


def by_width(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over problems of each of STATISTICS, by prior, weight, region and width, with its t-interval.

    Columns: statistic, value, low, high (NaN for one problem) and n, the problems; seeds are averaged within a problem
    first. Correlations are averaged by Fisher's z, and the ends of shares are cut at 0 and 1.
    """
    rows, keys = [], ["prior", "weight", "region", "width"]
    for names, group in table.groupby(keys, sort=False):
        own = dict(zip(keys, names, strict=True))
        for statistic in STATISTICS:
            is_rho = statistic in CORRELATIONS
            scaled = group.assign(value=fisher_z(group[statistic]) if is_rho else group[statistic])
            values = scaled.groupby("problem")["value"].mean()
            mean = findings.mean(np.tanh(values) if is_rho else values, is_rho=is_rho)
            rows.append(own | {"statistic": statistic, **mean._asdict()})
    means = pd.DataFrame(rows)
    of_share = means["statistic"].isin(SHARES)
    means.loc[of_share, ["low", "high"]] = means.loc[of_share, ["low", "high"]].clip(0, 1)
    return means


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the change of Fisher's z of rho, and of sd, with each doubling of the width, by prior and region.

    Columns: statistic (z or sd), value, low, high, n. The slope is that of least squares within a problem and a data
    seed; seeds are averaged within a problem, and the t-interval is over problems.

    Raises ValueError for one width.
    """
    if len(widths := table["width"].unique()) < 2:
        raise ValueError(f"table: width {', '.join(map(str, widths))} given, at least 2 widths wanted")
    plain = table[table["weight"] == 1].assign(z=lambda t: fisher_z(t["rho"]))
    by, statistics = ["prior", "region", "problem"], ["z", "sd"]
    each = [
        [*names, *np.polyfit(np.log2(group["width"]), group[statistics], 1)[0]]
        for names, group in plain.groupby([*by, "seed"])
    ]
    of_problem = pd.DataFrame(each, columns=[*by, "seed", *statistics]).groupby(by)[statistics].mean().reset_index()
    found = {name: findings.means(of_problem, by[:2], name) for name in statistics}
    return pd.concat([rows.assign(statistic=name) for name, rows in found.items()])


def text(means: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `by_width` as a reader sees it: LINES over widths, each value with its interval."""
    rows = []
    for label, other in LINES.values():
        row = {"": label}
        for entry in _where(means, USUAL | other):
            ends = "" if np.isnan(entry["low"]) else f" [{entry['low']:.2f}, {entry['high']:.2f}]"
            row[entry["width"]] = f"{entry['value']:.3f}{ends}"
        rows.append(row)
    return pd.DataFrame(rows).set_index("").fillna("")


def named_results(table: pd.DataFrame) -> dict[str, Result]:
    """Return the results of the chapter by key: LINES at the largest width, the two controls at the smallest.

    rho_narrow: rho at the smallest width; slope, sd_slope and sd_slope_fan_in: `slopes` of z and of sd over the whole
    map; n_networks, and n_missed of them that did not reach the declared loss.
    """
    means, trends = by_width(table), slopes(table)
    wide, narrow = {"width": table["width"].max()}, {"width": table["width"].min()}
    results = {
        key: _result(means, USUAL | wide | (narrow if "control" in key else {}) | LINES[key][1]) for key in LINES
    }
    results["rho_narrow"] = _result(means, USUAL | narrow)
    of_trend = {"prior": "fixed", "region": "whole", "statistic": "sd"}
    results["slope"] = _result(trends, of_trend | {"statistic": "z"}, "z per doubling")
    results["sd_slope"] = _result(trends, of_trend, "nats per doubling")
    results["sd_slope_fan_in"] = _result(trends, of_trend | {"prior": "fan_in"}, "nats per doubling")
    trained = table.drop_duplicates(["problem", "seed", "width"])
    results["n_networks"] = Result(value=len(trained))
    results["n_missed"] = Result(value=int((~trained["fits"]).sum()))
    return {f"isotropy.ranks.{key}": result for key, result in results.items()}


def _where(rows: pd.DataFrame, values: dict[str, Any]) -> list[dict[Any, Any]]:
    return rows[np.logical_and.reduce([rows[name] == value for name, value in values.items()])].to_dict("records")


def _result(rows: pd.DataFrame, values: dict[str, Any], unit: str = "") -> Result:
    (row,) = _where(rows, values)
    return findings.Mean(*(row[name] for name in findings.Mean._fields)).result(unit=unit, claim="C3")
