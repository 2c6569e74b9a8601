"""Time of methods side by side in rounds, and where the time of one pass goes."""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch.profiler import ProfilerActivity, profile

from isouq.studies.cost.cases import Case
from isouq.studies.cost.methods import METHODS, ONE_BY_ONE

MATRIX_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"})
BACKWARD = "autograd::engine::evaluate_function"
ADDED = ("norm rules", "reading the graph")  # what the ghost engine adds to the two passes that any method needs


def interleaved(runs: Mapping[Any, tuple[str, Case]], n_rounds: int) -> pd.DataFrame:
    """Return seconds per example, a row per round and a column per run; `runs`: name → (method, case).

    Every run happens once in each round, in order. The first of n_rounds + 1 rounds warms up and is not kept.
    """
    rows: list[dict[Any, float]] = []
    gc.collect()
    gc.freeze()  # the collections below need not look at what is alive now
    try:
        for _ in range(n_rounds + 1):
            rows.append({})
            for name, (method, case) in runs.items():
                gc.collect()
                with METHODS[method](case) as run:
                    start = time.perf_counter()
                    run()
                    rows[-1][name] = (time.perf_counter() - start) / len(case)
    finally:
        gc.unfreeze()
    return pd.DataFrame(rows[1:])


def relative(times: pd.DataFrame, to: str = "forward") -> pd.DataFrame:
    """Compare each run with the run `to` of the same round: a row per run with medians and the ratio's extremes.

    Columns: method, seconds, value (the ratio), low, high. The extremes of n rounds contain the true median with
    probability 1 − 2^{1−n}: 97 % for six rounds.
    """
    ratios = times.div(times[to], axis=0)
    columns = {"seconds": times.median(), "value": ratios.median(), "low": ratios.min(), "high": ratios.max()}
    return pd.DataFrame(columns).rename_axis("method").reset_index()


def sweep(by_size: Mapping[int, Case], methods: Sequence[str], n_rounds: int) -> pd.DataFrame:
    """Time `methods` on each of the cases, all in the same rounds, relative to the forward pass of the same size.

    Columns: method, size, seconds, value, low, high. Methods of ONE_BY_ONE run on the first example only.
    """
    runs = {
        (size, method): (method, case.first(1) if method in ONE_BY_ONE else case)
        for size, case in by_size.items()
        for method in ("forward", *methods)
    }
    times = interleaved(runs, n_rounds)
    times.columns = pd.MultiIndex.from_tuples(list(runs))
    tables = {size: relative(pd.DataFrame(times[size])) for size in by_size}
    return pd.concat(tables, names=["size"]).reset_index("size").reset_index(drop=True)


def where_time_goes(case: Case, method: str = "ghost", n_rounds: int = 3) -> pd.Series:
    """Return seconds per example by part of the pass, the median over rounds, by torch's profiler.

    Any method needs the forward pass and the gradient of the activations; ADDED names what the engine adds. The
    profiler makes small operations look longer than they are.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's own messages off the page
    rounds = []
    for _ in range(n_rounds + 1):
        with METHODS[method](case) as run, profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        rounds.append(_parts(profiler.events(), seconds * 1e6))
    return pd.DataFrame(rounds[1:]).fillna(0).median() / (1e6 * len(case))


def _parts(events: list, whole: float) -> dict[str, float]:
    """Divide the microseconds of a `whole` pass among its parts; an operation counts without those that it calls."""
    first = min(e.time_range.start for e in events if e.name.startswith(BACKWARD))
    before = [e.time_range for e in events if e.time_range.end <= first]
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name.startswith("aten::"):
            phase = _phase(event, first)
            parts[phase if phase == "norm rules" else f"{phase}: {_kind(event.name)}"] += event.self_cpu_time_total
    forward = sum(time for part, time in parts.items() if part.startswith("forward"))
    between = max(t.end for t in before) - min(t.start for t in before) - forward  # Python of the model's modules
    parts["forward: the rest"] += between
    parts["reading the graph"] = whole - sum(parts.values())
    return dict(parts)


def _phase(event, first: float) -> str:
    if event.time_range.start < first:
        return "forward"
    while event.cpu_parent is not None:
        if event.cpu_parent.name.endswith("Backward0") and not event.cpu_parent.name.startswith(BACKWARD):
            return "activation gradient"
        event = event.cpu_parent
    return "norm rules"


def _kind(name: str) -> str:
    if name in MATRIX_PRODUCTS:
        return "matrix products"
    return "attention" if "attention" in name else "the rest"
