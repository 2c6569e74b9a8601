"""Read results.json and write its numbers the way the book prints them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REQUEST = re.compile(r"(?P<key>[a-z0-9][a-z0-9_.\-]*)(?::(?P<spec>[^|]+))?(?:\|(?P<absent>.*))?", re.DOTALL)
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Entry:
    """One named result: a value and, where one is meant, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Results:
    """The results of one run and the record of that run."""

    entries: dict[str, Entry] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a role asks for: `key`, `key:format` or `key:format|text when absent`."""

    key: str
    spec: str = ""
    absent: str | None = None


def load(path: str | Path) -> Results:
    """Read results.json. Raises ValueError, naming the file, when it is not in the agreed form."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        known = Entry.__dataclass_fields__
        entries = {
            key: Entry(**{name: item for name, item in fields.items() if name in known})
            for key, fields in stored["results"].items()
        }
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{Path(path).name}: not a file of results ({error})") from error
    return Results(entries, stored.get("meta", {}))


def parse_request(text: str) -> Request:
    """Split a role's text into key, format and the words to use when the key is absent."""
    match = _REQUEST.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not of the form key, key:format or key|text when absent")
    return Request(match["key"], match["spec"] or "", match["absent"])


def format_number(value: float, spec: str = "") -> str:
    """Write a number with two decimals, or in whole numbers or powers of ten where those read better."""
    if spec:
        text = format(value, spec)
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1e}"
    if match := re.fullmatch(r"(.*)e([+-]\d+)", text):
        text = f"{match[1]} × 10{str(int(match[2])).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def format_interval(entry: Entry, spec: str = "") -> str:
    """Write `0.63 [0.55, 0.71], n = 120`, leaving out what the result does not have."""
    text = format_number(entry.value, spec)
    if entry.low is not None and entry.high is not None:
        # A whole number beside its interval is still a measured one: 1.00 [0.98, 1.00], not 1 [0.98, 1].
        shared = spec or (".2f" if 0.01 <= max(abs(entry.low), abs(entry.high)) < 1000 else "")
        low, high = format_number(entry.low, shared), format_number(entry.high, shared)
        text = f"{format_number(entry.value, shared)} [{low}, {high}]"
    if entry.unit:
        text += f" {entry.unit}"
    return text if entry.n is None else f"{text}, n = {entry.n:,}"
