"""What the atlas says: its rules, which were committed before it was run, and the tables that they make.

Every mean of correlations is one of Fisher's z, and its interval Student's t over what was repeated: data seeds within
a setting, and problems where settings are compared, since seeds of one problem are not independent problems.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from isouq.studies import claims
from isouq.studies.results import Result
from isouq.studies.synthetic.plan import FACTORS, cell, headline_job
from isouq.studies.synthetic.problems import SPECS
from isouq.studies.verdicts import fisher_z

MARGIN = 0.1  # "agrees" needs the whole interval within this distance of the paper's number
NEAR_CEILING = 0.95  # of what a perfect estimate reaches: a correlation above it has no room to grow
# The paper's three columns and the θ* of each: the trained network, but for Laplace, which needs a mode, the MAP.
METHODS = {"gn": "trained", "la": "map", "aleatoric": "trained"}
RELIABILITY = {"gn": "reliability", "la": "reliability", "aleatoric": "aleatoric_reliability"}
COLUMNS = ["method", "statistic", "problem", "value", "low", "high", "n", "paper"]
POINTS = ("trained", "mode", "map")
# Each factor's second level.
OTHER: dict[str, list] = {"activation": ["relu"], "width": [32], "prior": ["fixed"], "design": ["many", "no_gap"]}


def is_headline(table: pd.DataFrame) -> pd.Series:
    """Return which rows belong to the headline setting, declared before the atlas was run.

    A fixed prior N(0, 1), 32 hidden units, ReLU for several classes and tanh for two and for a regression, no gap in a
    regression's inputs, and as many examples as the problem has. The first author's public notebooks use 32 units,
    ReLU for several classes, a saturating unit for two, and one fixed prior; they are not the paper's code. Some
    correlations had been seen when this was chosen.
    """
    declared = [tuple(cell(headline_job(0, name)).values()) for name in SPECS]
    return pd.Series(pd.MultiIndex.from_frame(table[FACTORS]).isin(declared), table.index)


def beside_paper(low: float, high: float, paper: float) -> str:
    """Return how an interval stands to the paper's number.

    agrees: all of it lies within MARGIN. compatible: some of it does. higher, lower: none of it does.
    """
    if np.isnan(paper):
        return "not in the paper"
    if np.isnan(low):
        return "no interval"
    if paper - MARGIN <= low and high <= paper + MARGIN:
        return "agrees"
    return "higher" if low > paper + MARGIN else "lower" if high < paper - MARGIN else "compatible"


def paper_value(method: str, statistic: str, problem: str) -> float:
    """Return the paper's number in Table 1, NaN where it has none."""
    return float(claims.paper()["table_1"][method][statistic].get(problem, np.nan))


class Mean(NamedTuple):
    """A mean of n values with its 95 % t-interval; `low` and `high` are NaN for fewer than two values."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Return for example ``0.63 [0.55, 0.71]``, ``0.63`` without an interval, nothing without a value."""
        ends = "" if np.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return "" if np.isnan(self.value) else f"{self.value:.2f}{ends}"

    def result(self, **more: Any) -> Result:
        """Return it as a named result, which `more` says more about."""
        low, high = (None, None) if np.isnan(self.low) else (self.low, self.high)
        return Result(value=self.value, low=low, high=high, n=int(self.n), **more)


def mean(values: ArrayLike, *, is_rho: bool = False) -> Mean:
    """Return the mean of the values that are not NaN with its t-interval; of correlations that of Fisher's z.

    Raises ValueError for values said to be correlations that are none.
    """
    given = np.asarray(values, dtype=float)
    given = given[~np.isnan(given)]
    if len(given) < 2:
        return Mean(float(given[0]) if len(given) else np.nan, np.nan, np.nan, len(given))
    z = fisher_z(given) if is_rho else given
    reach = float(stats.t.ppf(0.975, len(z) - 1) * stats.sem(z))
    value, low, high = z.mean() + np.array([0.0, -reach, reach])
    if is_rho:
        value, low, high = np.tanh([value, low, high])
    return Mean(float(value), float(low), float(high), len(z))


def means(table: pd.DataFrame, by: list[str], column: str = "value", *, is_rho: bool = False) -> pd.DataFrame:
    """Return the `mean` of a column for every group of rows that agree in `by`, in the order in which groups appear.

    Columns: those of `by`, value, low, high, n.
    """
    rows = [[*names, *mean(values, is_rho=is_rho)] for names, values in table.groupby(by, sort=False)[column]]
    return pd.DataFrame(rows, columns=[*by, *Mean._fields])


def of(table: pd.DataFrame, point: str, measure: str, region: str = "whole") -> pd.DataFrame:
    """Return the rows of one θ*, measure and region; posteriors that failed the gate have NaN for a correlation."""
    rows = table[(table["point"] == point) & (table["measure"] == measure) & (table["region"] == region)].copy()
    rows.loc[~rows["passed"].astype(bool), ["pearson", "spearman"]] = np.nan
    return rows


def settings(table: pd.DataFrame, statistic: str = "spearman") -> pd.DataFrame:
    """Return a row per setting and method: FACTORS, method, value, low, high, n, n_failed, paper, reaches.

    `n` posteriors count; `n_failed` failed the gate. `reaches`: the value is at least the paper's less MARGIN.
    """
    rows = pd.concat([of(table, point, method) for method, point in METHODS.items()])
    rows = rows.assign(method=rows["measure"], failed=~rows["passed"].astype(bool))
    by = [*FACTORS, "method"]
    result = means(rows, by, statistic, is_rho=True)
    result["n_failed"] = rows.groupby(by, sort=False)["failed"].sum().to_numpy()
    result["paper"] = [paper_value(m, statistic, p) for m, p in zip(result["method"], result["problem"], strict=True)]
    return result.assign(reaches=result["value"] >= result["paper"] - MARGIN, headline=is_headline(result))


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """Return the headline setting beside the paper's Table 1, a row per method, statistic and problem.

    Columns: value, low, high, n, ceiling (what a perfect estimate reaches: √r of one half of the chains with the
    other), near and far (the same correlation close to the data and far from them), paper and verdict.
    """
    chosen, rows = table[is_headline(table)], []
    for statistic in ("spearman", "pearson"):
        for row in settings(chosen, statistic).to_dict("records"):
            own, method = chosen[chosen["problem"] == row["problem"]], row["method"]
            half = _mean_rho(of(own, "posterior", RELIABILITY[method])[statistic])
            of_regions = {region: of(own, METHODS[method], method, region)[statistic] for region in ("near", "far")}
            row |= {"statistic": statistic, "ceiling": np.sqrt(max(half, 0.0))}
            row |= {region: _mean_rho(rho) for region, rho in of_regions.items()}
            rows.append(row | {"verdict": beside_paper(row["low"], row["high"], row["paper"])})
    return pd.DataFrame(rows, columns=[*COLUMNS, "ceiling", "near", "far", "verdict"])


def headline_text(table: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return `headline`'s table as a reader sees it, each value with its interval; `titles` name the problems."""
    methods, statistics = {"gn": "‖g‖²", "la": "Laplace", "aleatoric": "aleatoric"}, {"spearman": "ρ", "pearson": "r"}
    measure = (table["method"].map(methods) + ", " + table["statistic"].map(statistics)).rename("measure")
    means = table[["value", "low", "high", "n"]].itertuples(index=False)
    here = [str(Mean(*row)).replace(" ", "\u00a0") for row in means]
    shown = table[["paper", "verdict", "ceiling", "near", "far"]].round(2).astype(object)
    shown = shown.where(shown.notna(), "")
    shown.insert(0, "here", here)
    return shown.set_index([measure, table["problem"].map(titles)])


def share(table: pd.DataFrame) -> Mean:
    """Return in which share of settings ‖g‖² reaches the paper's ρ less MARGIN: mean over problems, t-interval."""
    rows = settings(table)
    rows = rows[(rows["method"] == "gn") & rows["value"].notna()]
    band = mean(rows.groupby("problem")["reaches"].mean())
    return band._replace(low=max(band.low, 0.0), high=min(band.high, 1.0))


def difference(table: pd.DataFrame) -> Mean:
    """Return the mean over problems of ρ in the headline setting less the paper's, with its t-interval."""
    rows = headline(table)
    rows = rows[(rows["method"] == "gn") & (rows["statistic"] == "spearman")].set_index("problem")
    return mean(rows["value"] - rows["paper"])


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """Return what decides: an analysis of variance of Fisher's z of ρ over the factors, hidden-layer problems only.

    A row per factor: `change` in z from its first level to its second (ReLU, 32 units, fixed prior, no gap or 200
    examples; a mode or the MAP for the trained network), the mean over problems of paired changes with its t-interval
    `low`, `high` over the `n` problems; and `share` of the variance of z that lies between its levels within problems.
    """
    rows = pd.concat([of(table, point, "gn") for point in POINTS])
    rows = rows[rows["activation"] != "linear"].assign(z=lambda r: fisher_z(r["spearman"]))
    trained = rows[rows["point"] == "trained"].dropna(subset=["z"])
    total = np.square(trained["z"] - trained["z"].mean()).sum() or np.nan
    between = trained.groupby("problem")["z"].transform("mean")
    found = [{"factor": "problem", "share": np.square(between - trained["z"].mean()).sum() / total}]
    for factor, second in OTHER.items():
        level = trained[factor].isin(second)
        keys = [name for name in [*FACTORS, "seed"] if name != factor]
        inner = trained.assign(level=level).groupby(["problem", "level"])["z"].transform("mean")
        share = np.square(inner - between).sum() / total
        found.append({"factor": factor, "share": share, **_contrast(trained[~level], trained[level], keys)})
    of_points = {point: rows[rows["point"] == point] for point in POINTS[1:]}
    found += [{"factor": p, **_contrast(trained, part, [*FACTORS, "seed"])} for p, part in of_points.items()]
    return pd.DataFrame(found).set_index("factor").rename(columns={"value": "change"})


def _contrast(first: pd.DataFrame, second: pd.DataFrame, keys: list[str]) -> dict[str, Any]:
    """Return the mean over problems of paired changes in z between rows that agree in `keys`."""
    pairs = first.merge(second, on=keys, suffixes=("", "_second"))
    return mean((pairs["z_second"] - pairs["z"]).groupby(pairs["problem"]).mean())._asdict()


def widths(table: pd.DataFrame) -> pd.DataFrame:
    """Return C5: how Fisher's z of ρ changes with each doubling of the width, from the narrowest to the widest.

    A row per problem, activation, prior and θ*: `change`, its t-interval `low`, `high` over the `n` pairs (data seed
    and design) of posteriors that passed and have a correlation at both widths, mean ρ at the narrowest and the widest,
    the verdict, and `below_ceiling`: the change without pairs in which either ρ is above NEAR_CEILING of its ceiling.
    """
    by, posterior = ["problem", "activation", "prior", "point"], [*FACTORS, "seed"]
    hidden = table[table["activation"] != "linear"]
    widest, narrowest = hidden["width"].max(), hidden["width"].min()
    half = of(hidden, "posterior", "reliability")[[*posterior, "spearman"]]
    rows = pd.concat([of(hidden, point, "gn") for point in POINTS]).merge(half, on=posterior, suffixes=("", "_half"))
    rows["below"] = rows["spearman"] < NEAR_CEILING * np.sqrt(rows["spearman_half"].clip(lower=0))
    narrow, wide = rows[rows["width"] == narrowest], rows[(rows["width"] == widest) & (rows["width"] > narrowest)]
    keys = [name for name in [*posterior, "point"] if name != "width"]
    pairs = narrow.merge(wide, on=keys, suffixes=("", "_wide")).dropna(subset=["spearman", "spearman_wide"])
    z = fisher_z(pairs[["spearman", "spearman_wide"]]) / np.log2(widest / narrowest)
    pairs["change"] = z[:, 1] - z[:, 0]
    result = means(pairs, by, "change").rename(columns={"value": "change"})
    for name, column in {"narrow": "spearman", "wide": "spearman_wide"}.items():
        result[name] = means(pairs, by, column, is_rho=True)["value"]
    below = means(pairs[pairs["below"] & pairs["below_wide"]], by, "change").rename(columns={"value": "below_ceiling"})
    result = result.merge(below[[*by, "below_ceiling"]], on=by, how="left")
    verdict = np.select([result["low"] > 0, result["high"] < 0], ["grows", "falls"], "undecided")
    return result.assign(verdict=verdict)


def gate(table: pd.DataFrame) -> pd.DataFrame:
    """Return by problem and width how many posteriors there are, passed the gate, and had each θ* admitted."""
    rows = table[(table["measure"] == "gn") & (table["region"] == "whole")]
    shares = rows.pivot_table(index=["problem", "width"], columns="point", values="admitted", sort=False)
    of_one = rows[rows["point"] == "trained"].groupby(["problem", "width"], sort=False)["passed"]
    counts = pd.DataFrame({"posteriors": of_one.size(), "passed": of_one.sum()})
    return counts.join(shares[[name for name in POINTS if name in shares]])


AROUND_A_MODE = {"mode_taylor": "gᵀΣg", "mode_isotropic": "isotropic, no line", "mode_variance": "one mode, exact"}
MEASURES = {"gn": "‖g‖²", "gn_prior": "prior units", "la": "Laplace", "mode_gn": "‖g‖², that mode"} | AROUND_A_MODE


def by_region(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean ρ of every measure with the MCMC variance by point, a column each: near, far and whole grid."""
    rows = table[table["measure"].isin(MEASURES)].assign(measure=table["measure"].map(MEASURES))
    mean_by = rows.pivot_table(index=["point", "measure"], columns="region", values="spearman", sort=False)
    return mean_by[["near", "far", "whole"]].rename_axis(columns=None)


def approximations(table: pd.DataFrame) -> pd.DataFrame:
    """Return by problem the mean ρ with MCMC of ‖g‖² and of what drops one approximation after the other.

    trained, mode, map, draws: ‖g‖² there, `draws` averaged over 16; prior units: ‖Sg‖² trained; then around
    one mode: gᵀΣg (isotropy dropped), the isotropic variance through the network (the line dropped), both dropped.
    """
    columns = {point: of(table, point, "gn") for point in (*POINTS, "draws")}
    columns["prior units"] = of(table, "trained", "gn_prior")
    columns |= {label: of(table, "mode", name) for name, label in AROUND_A_MODE.items()}
    by = {label: part.groupby("problem", sort=False)["spearman"] for label, part in columns.items()}
    return pd.DataFrame({label: groups.agg(_mean_rho) for label, groups in by.items()})


def _mean_rho(values: ArrayLike) -> float:
    return mean(values, is_rho=True).value


def named_results(table: pd.DataFrame, chosen: pd.DataFrame) -> dict[str, Result]:
    """Return the results of the chapter by key: atlas, what decides, the width (C5); headline, of `chosen` (C4)."""
    results: dict[str, Result] = {}

    def add(key: str, row: Mapping[Any, Any], value: str = "value", **more: Any) -> None:
        if np.isfinite(row[value]):
            results[f"mcmc.{key}"] = Mean(row[value], row["low"], row["high"], row["n"]).result(**more)

    for row in headline(chosen).to_dict("records"):
        add("{problem}.{method}.{statistic}".format_map(row), row, claim="C4" if row["method"] == "gn" else None)
    for row in settings(table).to_dict("records"):
        add("atlas.{problem}.{activation}.w{width}.{prior}.{design}.{method}.spearman".format_map(row), row)
    of_width = {"unit": "z per doubling", "claim": "C5"}
    for row in widths(table).to_dict("records"):
        add("size.{problem}.{activation}_{prior}.{point}.slope".format_map(row), row, "change", **of_width)
    for row in effects(table).reset_index().dropna(subset=["change"]).to_dict("records"):
        add("atlas.effect.{factor}".format_map(row), row, "change", unit="z")
    for key, band in {"atlas.share": share(table), "headline.difference": difference(chosen)}.items():
        if band.n > 1:
            results[f"mcmc.{key}"] = band.result(claim="C4")
    posteriors = of(table, "trained", "gn")
    counts = {"atlas.seeds": table["seed"].nunique(), "headline.seeds": chosen["seed"].nunique()}
    counts |= {"gate.n": len(posteriors), "gate.n_passed": int(posteriors["passed"].sum())}
    return results | {f"mcmc.{key}": Result(value=count) for key, count in counts.items()}
