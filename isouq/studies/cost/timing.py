"""Time of methods side by side in rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from isouq.studies.cost.cases import Texts
from isouq.studies.cost.methods import METHODS, ONE_BY_ONE


def interleaved(runs: Mapping[Any, tuple[str, Texts]], n_rounds: int) -> pd.DataFrame:
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


def relative(times: pd.DataFrame) -> pd.DataFrame:
    """Compare each run with the forward pass of the same round: a row per run with medians and the ratio's extremes.

    Columns: method, seconds, value (the ratio), low, high. The extremes of n rounds contain the true median with
    probability 1 − 2^{1−n}: 97 % for six rounds.
    """
    ratios = times.div(times["forward"], axis=0)
    columns = {"seconds": times.median(), "value": ratios.median(), "low": ratios.min(), "high": ratios.max()}
    return pd.DataFrame(columns).rename_axis("method").reset_index()


def sweep(by_size: Mapping[int, Texts], methods: Sequence[str], n_rounds: int) -> pd.DataFrame:
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
