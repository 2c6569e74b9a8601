"""Read results.json and write its numbers the way the book prints them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isouq.studies.results import Number, Result

# What a role asks for: `key`, `key:format` or `key:format|text when absent`.
REQUEST = re.compile(r"([a-z0-9][a-z0-9_.\-]*)(?::([^|]+))?(?:\|(.*))?", re.DOTALL)
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Results:
    """The results of one run and the record of that run."""

    entries: dict[str, Result] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def load(path: str | Path) -> Results:
    """Read results.json. Raises ValueError, naming the file, when it is not in the agreed form."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {key: Result(**fields) for key, fields in stored["results"].items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{Path(path).name}: not a file of results ({error})") from error
    return Results(entries, stored.get("meta", {}))


def format_number(value: Number, spec: str = "") -> str:
    """Write a number with two decimals, or in whole numbers or powers of ten where those read better."""
    if spec:
        text = format(value, spec)
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"
    if match := re.fullmatch(r"(.*)e([+-]\d+)", text):
        text = f"{match[1]} × 10{str(int(match[2])).translate(_SUPERSCRIPT)}"
    return re.sub(r"^-(0\.0*)$", r"\1", text).replace("-", "−")


def format_interval(entry: Result, spec: str = "") -> str:
    """Write `0.63 [0.55, 0.71], n = 120`, leaving out what the result does not have."""
    text = format_number(entry.value, spec)
    if entry.low is not None and entry.high is not None:
        # A whole number beside its interval is still a measured one: 1.00 [0.98, 1.00], not 1 [0.98, 1].
        width = abs(entry.high - entry.low) or 1
        decimals = max(2, min(6, math.ceil(-math.log10(width))))  # 0.9995 [0.9991, 0.9998], not 1.00 [1.00, 1.00]
        shared = spec or (f".{decimals}f" if 0.01 <= max(abs(entry.low), abs(entry.high)) < 1000 else "")
        low, high = format_number(entry.low, shared), format_number(entry.high, shared)
        text = f"{format_number(entry.value, shared)} [{low}, {high}]"
    if entry.unit:
        text += f" {entry.unit}"
    return text if entry.n is None else f"{text}, n = {entry.n:,}"
