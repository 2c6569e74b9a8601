"""Simulate how often the rules behind the verdicts err, before and after, and draw the figure of the page.

    python book/simulate_verdicts.py

writes book/verdicts.json and book/_static/verdicts.svg. Every number is the share of made-up studies, whose truth is
known, in which a rule errs (its size, at most 5 % wanted) or finds what is there (its power).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # a book is built where no screen is

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from isouq.studies import evaluation, fits, plotting, verdicts  # noqa: E402
from isouq.studies.claims import Check, Claim, Region  # noqa: E402
from isouq.studies.evaluation import Resamples  # noqa: E402
from isouq.studies.results import Result  # noqa: E402

N = 120  # questions of a study
N_RESAMPLES = 300  # of each interval; fewer than in the book, which changes an end by little


def made_up(value: float, error: float = 1.0) -> Result:
    """Return a result with its 95 % interval."""
    return Result(value=value, low=value - 1.96 * error, high=value + 1.96 * error, n=N)


def excludes(low: float, high: float, value: float) -> bool:
    """Return whether an interval does not contain a value."""
    return not low <= value <= high


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """Return the ends of the percentile interval."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


# One made-up study each: (the old rule errs or finds, the new rule errs or finds).


def eight_checks(rng: np.random.Generator, effect: float, outcome: str) -> tuple[bool, bool]:
    """A claim of eight checks, each with this effect in standard errors: does it get this outcome?"""
    values = rng.normal(effect, 1, 8)
    places = [Region(least=0.0).place(value - 1.96, value + 1.96) for value in values]
    old = next((place for place in ("does not hold", "undecided") if place in places), "holds")
    checks = tuple(Check(f"{i}", f"c.k{i}", Region(least=0.0), core=i == 0) for i in range(8))
    claim = Claim("C1", "", "", "before", checks)
    found = {f"c.k{i}": made_up(v) for i, v in enumerate(values)}
    return old == outcome, verdicts.judge([claim], found)["C1"].outcome == outcome


def better_than(rng: np.random.Generator, gap: float) -> tuple[bool, bool]:
    """Two scores of the same questions: overlapping intervals against the paired difference."""
    wrong = rng.random(2 * N) < 0.5
    shared = rng.normal(size=2 * N)
    scores = [shared + rng.normal(size=2 * N) + (0.5 + extra) * wrong for extra in (gap, 0.0)]
    plan = Resamples.of(wrong, n_resamples=N_RESAMPLES, seed=int(rng.integers(2**31)))
    first, second = (evaluation.ranking(score, wrong, plan) for score in scores)
    one, other = percentiles(first.draws), percentiles(second.draws)
    difference = first.minus(second).interval()
    return one[0] > other[1] or one[1] < other[0], excludes(difference.low, difference.high, 0)


def fitted(rng: np.random.Generator, effect: float) -> tuple[bool, bool]:
    """A fitted pair: fits held fixed against one fit for each resample. Does the interval exclude one half?"""
    wrong = rng.random(N) < 0.5
    pair = rng.normal(size=(N, 2)) @ np.array([[1, 0.9], [0, 0.4]]) + effect * wrong[:, None]
    seed = int(rng.integers(2**31))
    plan = Resamples.of(wrong, n_resamples=N_RESAMPLES, seed=seed)
    fixed = percentiles(evaluation.ranking(fits.out_of_fold_scores(pair, wrong, seed=seed), wrong, plan).draws)
    beta = fits.fit_logistic(pair, wrong, plan.counts)
    scores = beta[:, :1] + beta[:, 1:] @ pair.T
    refit = percentiles(evaluation.weighted_auroc(scores, wrong, (plan.counts == 0).astype(float)))
    return excludes(*fixed, 0.5), excludes(*refit, 0.5)


def few_right(rng: np.random.Generator) -> tuple[bool, bool]:
    """Eleven right answers of 120: does the interval miss the true AUROC of 0.80?"""
    wrong = np.arange(N) >= 11
    score = rng.normal(size=N) + 1.2 * wrong
    plan = Resamples.of(wrong, n_resamples=N_RESAMPLES, seed=int(rng.integers(2**31)))
    found = evaluation.ranking(score, wrong, plan)
    after, truth = found.interval(), 0.80193
    return excludes(*percentiles(found.draws), truth), excludes(after.low, after.high, truth)


def clusters(rng: np.random.Generator) -> tuple[bool, bool]:
    """Questions that come in 30 kinds of four, with errors in common and a score that knows nothing."""
    kind = np.repeat(np.arange(30), 4)
    wrong = rng.random(30)[kind] < rng.random(N)
    score = rng.normal(size=30)[kind] + 0.5 * rng.normal(size=N)
    seed = int(rng.integers(2**31))
    plans = [Resamples.of(wrong, clusters=c, n_resamples=N_RESAMPLES, seed=seed) for c in (None, kind)]
    before, after = (evaluation.ranking(score, wrong, plan) for plan in plans)
    found = after.interval()
    return excludes(*percentiles(before.draws), 0.5), excludes(found.low, found.high, 0.5)


def holding_p(rng: np.random.Generator, extra: float) -> tuple[bool, bool]:
    """A score made of p and noise: quartiles of p against residual ranks. Does it seem to add something?"""
    p = rng.normal(size=N)
    wrong = rng.random(N) < 1 / (1 + np.exp(2 * p))
    score = -p + 0.3 * rng.normal(size=N) + extra * wrong
    plan = Resamples.of(wrong, n_resamples=N_RESAMPLES, seed=int(rng.integers(2**31)))
    quartile = np.searchsorted(np.quantile(p, [0.25, 0.5, 0.75]), p)
    before = percentiles(evaluation.stratified_ranking(score, wrong, quartile, plan).draws)
    after = evaluation.ranking(fits.residual_ranks(score, p[:, None]), wrong, plan).interval()
    return excludes(*before, 0.5), excludes(after.low, after.high, 0.5)


def near_chance(rng: np.random.Generator, truth: float, error: float) -> tuple[bool, bool]:
    """An AUROC whose standard error is known: is it called near chance, within 0.1 of one half?"""
    value = rng.normal(truth, error)
    region = Region.of({"near": {"value": 0.5, "margin": 0.1}})
    claim = Claim("C1", "", "", "before", (Check("x", "c.k0", region, core=True),))
    entry = made_up(value, error)
    old = region.place(entry.low, entry.high) == "holds"
    return old, verdicts.judge([claim], {"c.k0": entry})["C1"].outcome == "holds"


CASES: dict[str, tuple[str, Callable[[np.random.Generator], tuple[bool, bool]]]] = {
    "eight checks at the border: refuted": ("size", lambda rng: eight_checks(rng, 0.0, "does not hold")),
    "better than, equal scores": ("size", lambda rng: better_than(rng, 0.0)),
    "fitted score, no signal": ("size", lambda rng: fitted(rng, 0.0)),
    "11 right of 120: true AUROC missed": ("size", few_right),
    "questions of a kind, no signal": ("size", clusters),
    "p held fixed, nothing but p": ("size", lambda rng: holding_p(rng, 0.0)),
    "near chance, at the margin": ("size", lambda rng: near_chance(rng, 0.6, 0.03)),
    "eight checks of 80 % power: holds": ("power", lambda rng: eight_checks(rng, 2.8, "holds")),
    "better than, 0.08 apart": ("power", lambda rng: better_than(rng, 0.42)),
    "fitted score, AUROC 0.70": ("power", lambda rng: fitted(rng, 0.8)),
    "p held fixed, more than p": ("power", lambda rng: holding_p(rng, 0.3)),
    "near chance, at one half": ("power", lambda rng: near_chance(rng, 0.5, 0.03)),
}


def simulate(n_runs: int) -> list[dict[str, object]]:
    """Return one row per case: its name, whether it is size or power, and the rates before and after."""
    rows = []
    for number, (name, (quantity, study)) in enumerate(CASES.items()):
        pairs = np.array([study(np.random.default_rng([number, run])) for run in range(n_runs)])
        before, after = pairs.mean(axis=0).round(4).tolist()
        rows.append({"case": name, "quantity": quantity, "before": before, "after": after, "n_runs": n_runs})
        print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict[str, object]], file: Path) -> None:
    """Draw the rates before (hollow) and after (filled): size above, power below."""
    plotting.use_style()
    figure, axes = plotting.panels(1, 2, aspect=0.32)
    titles = {"size": "errors (at most 5 % wanted)", "power": "found, where it is there"}
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        part = [row for row in rows if row["quantity"] == quantity][::-1]
        for y, row in enumerate(part):
            before, after = 100 * float(row["before"]), 100 * float(row["after"])  # type: ignore[arg-type]
            ax.plot([before, after], [y, y], color="#777777", linewidth=1, zorder=1)
            ax.scatter(before, y, facecolor="white", edgecolor="#333333", marker="o", clip_on=False, zorder=2)
            ax.scatter(after, y, color="#0b6e99", marker="D", clip_on=False, zorder=3)
        ax.set(yticks=range(len(part)), yticklabels=[row["case"] for row in part], xlabel="% of studies", title=title)
        ax.set_xlim(0, 30 if quantity == "size" else 100)
        if quantity == "size":
            ax.axvline(5, color="#777777", linestyle="--", linewidth=1, zorder=0)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=ROOT / "book")
    arguments = parser.parse_args()
    found = simulate(arguments.runs)
    target = arguments.folder / "verdicts.json"
    target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (arguments.folder / "_static").mkdir(exist_ok=True)
    draw(found, arguments.folder / "_static" / "verdicts.svg")
