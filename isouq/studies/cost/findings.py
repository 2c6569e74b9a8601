"""What the chapter says of costs: which methods run together, its tables, its targets and its named results.

Costs are keyed by model name. Ratios are to the forward pass of the same texts in the same round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from isouq.studies.cost import memory, timing
from isouq.studies.cost.cases import Texts
from isouq.studies.cost.memory import Memory
from isouq.studies.plotting import METHODS
from isouq.studies.qa.tables import model_name
from isouq.studies.results import Result, key_of

OURS = ("forward", "forward_answer", "activation_gradient", "ghost", "autograd")
PEERS = ("backward", "vmap", "opacus", "opacus_ghost")
RIVALS = ("token_mean", "naive_entropy", "semantic_entropy", "p_true")
EVERY = (*OURS, "activations", *PEERS, *RIVALS)
ROUNDS_OF_AN_INTERVAL = 6  # the extremes of six rounds contain the true median with a probability of 97 %
TOKEN_MEAN_BOUND = 1.3  # activation gradients per answer token

# The targets, set before measuring: forward passes, share of the weights, relative error; times faster than autograd.
BATCH, SINGLE, ABOVE_ACTIVATIONS, ERROR = 2.2, 2.3, 0.1, 1e-5
SPEEDUP, SPEEDUP_OF_GEMMA = 2.5, 5  # of which the vocabulary is five times as large


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the methods cost on one model; tables with a row per method.

    memory: as `memory.measure` returns it. times: seconds per text; value, low and high in forward passes; n_rounds.
    single: the same for a text by itself, of the forward pass and the ghost engine.
    """

    memory: Memory
    times: pd.DataFrame
    single: pd.DataFrame

    def time_ratio(self, a: str, b: str) -> float:
        """The time per text of method a over that of b, each in forward passes of its own rounds."""
        return float(self.times["value"][a] / self.times["value"][b])

    def above_activations(self) -> float:
        """What the ghost engine takes above the activations, as a share of the weights."""
        peaks = self.memory.table["peak_bytes"]
        return float((peaks["ghost"] - peaks["activations"]) / self.memory.weights)


def measure(case: Texts, ground: Memory, *, n_rounds: int, n_rival_rounds: int) -> Costs:
    """Time all methods that `ground` says can run, each on as many texts at once as fitted there.

    The methods of OURS share `n_rounds` rounds, peers and rivals `n_rival_rounds` with a forward pass of their own.
    """

    def timed(methods: tuple[str, ...], rounds: int, most: int) -> pd.DataFrame:
        table = ground.table
        runs = {m: (m, case.first(min(most, int(table["n_examples"][m])))) for m in methods if not table["refusal"][m]}
        return timing.relative(timing.interleaved(runs, rounds)).set_index("method").assign(n_rounds=rounds)

    own = timed(OURS, n_rounds, len(case))
    single = timed(("forward", "ghost"), n_rounds, 1)
    others = timed(("forward", *PEERS, *RIVALS), n_rival_rounds, len(case))
    return Costs(memory=ground, times=pd.concat([own, others.drop(index="forward")]), single=single)


def refusals(grounds: Mapping[str, Memory]) -> pd.DataFrame:
    """Return the methods that gave no result, in their own words."""
    table = pd.concat({name: ground.table for name, ground in grounds.items()}, names=["model"])
    return table.loc[table["refusal"] != "", ["refusal"]]


def gradients_at_once(grounds: Mapping[str, Memory]) -> pd.DataFrame:
    """Return with how many texts at once the methods that hold a gradient per text fitted, and what they took."""
    table = pd.concat({name: g.table.loc[list(memory.GRADIENT_EACH)] for name, g in grounds.items()}, names=["model"])
    table = table[table["refusal"] == ""]
    peaks = (table["peak_bytes"] / 1e9).astype(float).round(2)
    return table[["n_examples"]].assign(**{"gigabytes above the model": peaks})


def times_text(costs: Mapping[str, Costs]) -> pd.DataFrame:
    """Return seconds per text and forward passes as text, a row per method, two columns per model."""
    names = {"seconds": "seconds per text", "value": "forward passes"}
    return _text({name: of.times[list(names)].rename(columns=names) for name, of in costs.items()}, "{:.3f}")


def errors_text(costs: Mapping[str, Costs]) -> pd.DataFrame:
    """Return the largest relative errors of ‖∇S‖² as text, a row per method that gives it, a column per model."""
    return _text({name: of.memory.table["relative_error"].dropna() for name, of in costs.items()}, "{:.1e}")


def _text(columns: Mapping[str, Any], form: str) -> pd.DataFrame:
    table = pd.concat({model_name(name): column for name, column in columns.items()}, axis=1)
    table = table.reindex([method for method in EVERY if method in table.index])
    return table.rename(index=lambda m: METHODS[m].label).map(form.format, na_action="ignore").fillna("—")


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """The token mean's time as a line in the answer's length, and the worst of its bound.

    per_token: its slope, in activation gradients. at_start: its value at length 0, in forward passes. bound: the
    largest share over lengths L of a forward pass and TOKEN_MEAN_BOUND · L activation gradients.
    """

    per_token: float
    at_start: float
    bound: float


def per_token(by_answer: pd.DataFrame) -> PerToken:
    """Fit time = a + b L to a `timing.sweep` over the length L of the answer."""
    seconds = by_answer.pivot_table("seconds", "size", "method")
    length = seconds.index.to_numpy()
    slope, start = np.polyfit(length, seconds["token_mean"], 1)
    allowed = seconds["forward"] + TOKEN_MEAN_BOUND * length * seconds["activation_gradient"]
    return PerToken(
        per_token=slope / seconds["activation_gradient"].median(),
        at_start=start / seconds["forward"].median(),
        bound=(seconds["token_mean"] / allowed).max(),
    )


def targets(costs: Mapping[str, Costs], tokens: PerToken) -> pd.DataFrame:
    """Return every target: model, target, at most, measured, and met ("yes" or "NO"). `tokens`: of the first model."""
    rows: list[tuple[str, str, float, float]] = []
    for name, of in costs.items():
        peaks, speedup = of.memory.table["peak_bytes"], SPEEDUP_OF_GEMMA if "gemma" in name else SPEEDUP
        rows += [
            (name, "ghost, forward passes, batch", BATCH, of.times["value"]["ghost"]),
            (name, "ghost, forward passes, single text", SINGLE, of.single["value"]["ghost"]),
            (name, "ghost / autograd, time per text", 1 / speedup, of.time_ratio("ghost", "autograd")),
            (name, "ghost above activations / weights", ABOVE_ACTIVATIONS, of.above_activations()),
            (name, "ghost, relative error", ERROR, of.memory.table["relative_error"]["ghost"]),
        ]
        for peer in (peer for peer in memory.GRADIENT_EACH if peer in of.times.index):
            rows.append((name, f"ghost / {peer}, time per text", 1, of.time_ratio("ghost", peer)))
            rows.append((name, f"ghost / {peer}, peak above the model", 1, peaks["ghost"] / peaks[peer]))
    bound = f"token mean / (forward + {TOKEN_MEAN_BOUND} L activation gradients)"
    rows.append((next(iter(costs)), bound, 1, tokens.bound))
    table = pd.DataFrame(rows, columns=["model", "target", "at most", "measured"])
    return table.assign(met=np.where(table["measured"] <= table["at most"], "yes", "NO"))


def named_results(costs: Mapping[str, Costs], tokens: PerToken, n_sweep_rounds: int) -> dict[str, Result]:
    """Return what pages quote, under `cost.MODEL.METHOD`; the extremes over rounds only where they are an interval."""
    results = {}
    for name, of in costs.items():
        key, n_rounds = f"cost.{key_of(name)}", int(of.times["n_rounds"]["ghost"])
        for method, row in of.times.iterrows():
            seconds = Result(value=row["seconds"], n=int(row["n_rounds"]), unit="s")
            results[f"{key}.{method}.seconds_per_question"] = seconds
            results[f"{key}.{method}.relative_to_forward"] = _passes(row, claim="C1" if method == "ghost" else None)
        for method, row in of.single.iterrows():
            results[f"{key}.single.{method}.relative_to_forward"] = _passes(row)
        for method, row in of.memory.table[of.memory.table["refusal"] == ""].iterrows():
            note, n = "above the model", int(row["n_examples"])
            results[f"{key}.{method}.peak_bytes"] = Result(value=row["peak_bytes"], n=n, unit="bytes", note=note)
            if pd.notna(row["relative_error"]):
                results[f"{key}.{method}.relative_error"] = Result(value=row["relative_error"], n=memory.FEW)
        speedup = Result(value=of.time_ratio("autograd", "ghost"), n=n_rounds)
        above = Result(value=of.above_activations(), note="fraction of the weights")
        results |= {f"{key}.ghost.speedup_over_autograd": speedup, f"{key}.ghost.memory_above_activations": above}
    key, n = f"cost.{key_of(next(iter(costs)))}.token_mean", n_sweep_rounds
    results[f"{key}.passes_per_token"] = Result(value=tokens.per_token, n=n, unit="activation gradients")
    results[f"{key}.passes_at_start"] = Result(value=tokens.at_start, n=n, unit="forward passes")
    met = targets(costs, tokens)["met"] == "yes"
    return results | {
        "cost.targets.met": Result(value=int(met.sum()), n=len(met)),
        "cost.targets.number": Result(value=len(met)),
    }


def _passes(row: pd.Series, claim: str | None = None) -> Result:
    n = int(row["n_rounds"])
    ends = {"low": row["low"], "high": row["high"]} if n >= ROUNDS_OF_AN_INTERVAL else {}
    return Result(value=row["value"], **ends, n=n, unit="forward passes", claim=claim)
