"""Whether two runs agree, number by number, within tolerances that are stated here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isouq.studies.results import ResultError

# What may differ between two runs, by key; the first pattern that matches the whole key counts.
#   exact    the same, but for the rounding of a last digit
#   error    a rounding error: of whatever size below the tolerance
#   ratio    a time beside a forward pass, or a size in memory: up to so many times larger or smaller
#   sampled  by the intervals of both, where both have one, as two samples differ: at most √(h² + k²), h and k half of
#            each interval; else at most the tolerance, times the value where that is above 1
#   shown    is of the machine, as seconds are, and is not judged
KINDS: tuple[tuple[str, str, float], ...] = (
    (r"cost\.machine\.(load|threads)", "shown", 0.0),
    (r"cost\.[^.]+\.\w+\.seconds_per_question|qa\.[^.]+\.\w+\.\w+\.seconds", "shown", 0.0),
    (r"mcmc\.(gate|atlas|headline)\.(n|n_passed|seeds)", "exact", 0.0),
    (r"isotropy\.(dose|chain|ranks)\.n(_\w+)?", "exact", 0.0),
    (r"isotropy\.[^.]+\.(n_parameters|gram\.n)", "exact", 0.0),
    (r"cost\.targets\.number|qa\.mean\.\w+\.models\.count", "exact", 0.0),
    (r"derivation\.(engine\.max_relative_difference|total_variance\.max_error)", "error", 1e-12),
    (r"(cost|isotropy)\.[^.]+\.\w+\.relative_error", "error", 1e-3),
    (r"cost\.[^.]+\.\w+\.peak_bytes", "ratio", 3.0),
    (r"cost\.[^.]+(\.single)?\.\w+\.(relative_to_forward|speedup_over_autograd)", "ratio", 3.0),
    (r"cost\.[^.]+\.token_mean\.passes_(at_start|per_token)", "ratio", 3.0),
    (r"cost\.[^.]+\.\w+\.(memory_above_activations|share_needed)", "sampled", 0.2),
    (r"cost\.targets\.met", "sampled", 0.2),
    (r"derivation\.(steps|taylor)\.\w+(\.spearman)?", "sampled", 0.05),
    (r"derivation\.(scale|network)\.\w+", "sampled", 0.05),
    (r"mcmc\.(atlas|headline|size)\..+|mcmc\.\w+\.(gn|la|aleatoric)\.(pearson|spearman)", "sampled", 0.1),
    (r"isotropy\.(dose|chain|ranks)\..+", "sampled", 0.1),
    (r"isotropy\.[^.]+\.(control|pull_detectable|spread_of_\w+|gram\.\w+)", "sampled", 0.1),
    (r"isotropy\.[^.]+(\.\w+){1,2}\.(pull|rank_g|rank_u_e|spread|auroc|auroc_gain|auroc_gain_u_e)", "sampled", 0.1),
    (r"your_model\.accuracy|your_model\.\w+\.\w+", "sampled", 0.1),
    (r"qa\.[^.]+\.\w+\.power\.\w+|qa\.[^.]+\.\w+\.\w+\.(count|pairs|max_t)", "sampled", 0.2),
    (r"qa\.(transfer\.)?[^.]+\.\w+(\.\w+){0,3}", "sampled", 0.1),
)


@dataclass(frozen=True)
class Row:
    """One number in both runs. `agrees` is None where it is not judged: of the machine, or of a run of another size."""

    key: str
    kind: str
    kept: float | None
    run: float | None
    allowed: str
    agrees: bool | None


def kind_of(key: str) -> tuple[str, float]:
    """Return how a key is compared: its kind and tolerance.

    >>> kind_of("cost.smollm2-135m-instruct.ghost.relative_to_forward")
    ('ratio', 3.0)

    Raises ResultError for a key that no pattern of KINDS matches.
    """
    for pattern, kind, tolerance in KINDS:
        if re.fullmatch(pattern, key):
            return kind, tolerance
    way_out = "the file is of another version of isouq, or a new result needs its line in KINDS of compare.py"
    raise ResultError(f"{key} is no key that isouq knows: {way_out}")


def compare(
    kept: Mapping[str, Mapping[str, Any]], run: Mapping[str, Mapping[str, Any]], *, same_size: bool = True
) -> list[Row]:
    """Return a row for each key of either, in order.

    With `same_size` a number that only one of them has is a mismatch. Without, they are runs of different profiles:
    such a number is not judged, nor is a count, nor what was sampled and has no interval.
    """
    rows = []
    for key in sorted({*kept, *run}):
        kind, tolerance = kind_of(key)
        old, new = kept.get(key), run.get(key)
        if old is None or new is None:
            where = "only kept" if new is None else "only in the run"
            rows.append(Row(key, kind, _value(old), _value(new), where, False if same_size else None))
        else:
            allowed, agrees = _judge(kind, tolerance, old, new)
            of_size = kind == "exact" or (kind == "sampled" and None in (old.get("low"), new.get("low")))
            judged = kind != "shown" and (same_size or not of_size)
            rows.append(Row(key, kind, _value(old), _value(new), allowed, agrees if judged else None))
    return rows


def _value(entry: Mapping[str, Any] | None) -> float | None:
    return None if entry is None else float(entry["value"])


def _judge(kind: str, tolerance: float, old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what is allowed, in words, and whether it holds."""
    a, b = float(old["value"]), float(new["value"])
    if kind == "ratio":
        return f"{tolerance:g} times", min(a, b) > 0 and max(a / b, b / a) <= tolerance
    if kind == "error":
        return f"below {tolerance:g}", abs(b) <= tolerance
    if kind == "exact":
        return "the same", math.isclose(a, b, rel_tol=1e-9)
    half = [(one["high"] - one["low"]) / 2 for one in (old, new) if one.get("low") is not None]
    most = math.hypot(*half) if len(half) == 2 and any(half) else tolerance * max(1.0, abs(a))
    return f"± {most:.2g}", abs(a - b) <= most + 1e-9


def table(rows: list[Row], *, every: bool = False) -> str:
    """Return a line for each chapter, then the numbers that do not agree, or `every` one."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(re.split(r"\W", row.key)[0], []).append(row)
    lines = [f"{'':12}{'agree':>8}{'differ':>8}{'not judged':>12}"]
    for part, of in parts.items():
        counts = [sum(row.agrees is outcome for row in of) for outcome in (True, False, None)]
        lines.append(f"{part:12}{counts[0]:8}{counts[1]:8}{counts[2]:12}")
    shown = [row for row in rows if every or row.agrees is False]
    width = max([len(row.key) for row in shown], default=0)
    words = {True: "agrees", False: "DIFFERS", None: "not judged"}
    lines += [f"\n{'':{width}}  {'kind':8}{'kept':>12}{'run':>12}  allowed"] if shown else []
    for row in shown:
        numbers = "".join(f"{'—' if value is None else f'{value:.5g}':>12}" for value in (row.kept, row.run))
        lines.append(f"{row.key:{width}}  {row.kind:8}{numbers}  {row.allowed}: {words[row.agrees]}")
    return "\n".join(lines)
