"""Named results: what a notebook hands to the pages that quote it.

A notebook ends with `save_results({KEY: Result(...)}, results_path)`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Number = int | float | np.integer | np.floating
KEY = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)+")
WITH_MODEL = re.compile(r"((?:cost|isotropy|qa)\.)(.*?[^a-z0-9_.-].*?)((?:\.[a-z][a-z0-9_-]*)+)")


class ResultError(ValueError):
    """A result without a proper name or a finite value, or a name used twice."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number that a page may quote, with its 95 % interval (`low`, `high`) and the `n` it rests on.

    `claim` is the paper's claim it answers (C1 to C10, see the claims page), `unit` is "" for a pure number.

    Raises:
        ResultError: a value that is not a finite number, half an interval, or an unknown claim.
    """

    value: Number
    low: Number | None = None
    high: Number | None = None
    n: int | np.integer | None = None
    unit: str = ""
    claim: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if isinstance(number, bool) or not isinstance(number, Number) or not math.isfinite(number):
                raise ResultError(f"{name}: {number!r} given; wanted a finite number")
        if (self.low is None) != (self.high is None):
            raise ResultError(f"low={self.low}, high={self.high} given; wanted both or neither")
        if self.low is not None and self.high is not None and float(self.low) > float(self.high):
            raise ResultError(f"low={self.low} is above high={self.high}")
        if self.n is not None and (isinstance(self.n, bool) or self.n < 1):
            raise ResultError(f"n: {self.n!r} given; wanted a positive whole number")
        if self.claim is not None and not re.fullmatch(r"C([1-9]|10)", self.claim):
            raise ResultError(f"claim: {self.claim!r} given; wanted C1 to C10, or None")


def key_of(model: str) -> str:
    """Return a model's name as a part of a result's key: `owner/Name_1.5@v2` is `owner-name-1-5-v2`.

    Of a folder outside this one (`/data/My model`, `~/m`, `../m`) only the last part counts: no result names a place.
    """
    name = Path(model).name if model[:1] in tuple("/~.") else model
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def save_results(results: Mapping[str, Result], path: str | Path) -> None:
    """Write a notebook's named results as JSON; an empty path writes nothing.

    Keys are dotted and lower case, chapter.subject.method.metric: `qa.gemma-3-270m.triviaqa.accuracy`. A model's name
    stands in one as its `key_of`; where it is left as its owner wrote it, it is made so, up to a dot before a letter.

    Raises:
        ResultError: a key of another form, or two that are saved as one.
    """
    content: dict[str, Any] = {}
    for given, result in sorted(results.items()):
        raw = None if KEY.fullmatch(given) else WITH_MODEL.fullmatch(given)
        key = f"{raw[1]}{key_of(raw[2])}{raw[3]}" if raw else given
        check_key(key)
        if key in content:
            raise ResultError(f"{given!r} would be saved as {key}, which is there already")
        content[key] = plain(result)
    if str(path):
        write_json({"results": content}, Path(path))


def as_json(content: Any) -> str:
    """Return JSON as this project writes it; NaN and infinity, which JSON does not know, are refused."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all, as `as_json` has it."""
    text = as_json(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_key(key: str) -> None:
    """Raise ResultError unless the key has the form of `save_results`."""
    if not KEY.fullmatch(key):
        wanted = "dotted lower-case parts, as qa.gemma-3-270m.triviaqa.accuracy"
        raise ResultError(f"key {key!r} given; wanted {wanted}")


def plain(result: Result) -> dict[str, Any]:
    """Return a result's fields as JSON's own types, which numpy's numbers are not."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in asdict(result).items()}
