"""The paper's claims as claims.yml states them, and the paper's own numbers.

A claim is a list of checks. A check names one result, the region in which the claim wants it, and whether it is *core*,
that is, whether the claim stands or falls with it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from isouq.studies import require
from isouq.studies.results import check_key

Outcome = Literal["holds", "partly", "does not hold", "undecided", "not run"]
INTERVALS = ("bootstrap", "t", "fisher", "exact")
OUTCOMES: tuple[Outcome, ...] = ("holds", "partly", "does not hold", "undecided")  # of a claim that was run
_CHECK_FIELDS = {"label", "key", "rule", "core", "interval", "paper", "once"}
WRITTEN = {
    "before": "Its rules were written before any of these numbers was seen.",
    "look": "Its rules were written after a first look at another model, before any number for a core check was seen.",
    "anew": "Its rules were written anew, on problems of their own, before any number for a core check was seen; the "
    "numbers of an earlier test of the same claim were known.",
    "trials": "Its rules were written before the run that they judge, with some of its correlations seen in trials.",
    "after": "The limits of its rules were set before its chapter was run at this size. Which checks are core, and how "
    "several are corrected for, was decided afterwards, with the numbers known.",
}


@dataclass(frozen=True)
class Printed:
    """A number in the paper with its standard deviation; `sd` is None where the paper prints none."""

    value: float
    sd: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}".replace("-", "−") + ("" if self.sd is None else f" ± {self.sd:.2f}")


@dataclass(frozen=True)
class Region:
    """The open interval in which a claim wants a result, or, with `outside`, all that lies beyond the closed one."""

    least: float = -math.inf
    most: float = math.inf
    outside: bool = False

    @classmethod
    def of(cls, rule: Mapping[str, Any], name: str = "rule", paper: Printed | None = None) -> Region:
        """Return the region of `{above: x}`, `{below: x}`, `{near: {value: x, margin: m}}` or `{paper_less: m}`.

        `near` is an equivalence rule: the whole interval has to lie within the margin. `{differs: x}` is two-sided: the
        whole interval has to lie on one side of x, no matter which; an interval that holds x leaves the check open.
        `paper_less` is above the paper's own number less a margin.

        Raises:
            ValueError: another rule, more than one, a border that is not finite, a margin that is not positive, or
                `paper_less` without a number of the paper.
        """
        if paper is not None and isinstance(rule, Mapping) and set(rule) == {"paper_less"}:
            return cls(least=round(paper.value - require.number(f"{name}: paper_less", rule["paper_less"], 0.0), 9))
        if not isinstance(rule, Mapping) or len(rule) != 1 or not set(rule) <= {"above", "below", "near", "differs"}:
            raise ValueError(f"{name}: {rule} given, exactly one of above, below, near, differs wanted")
        ((kind, operand),) = rule.items()
        if kind != "near":
            border = require.number(f"{name}: {kind}", operand)
            if kind == "differs":
                return cls(border, border, outside=True)
            return cls(least=border) if kind == "above" else cls(most=border)
        if not isinstance(operand, Mapping) or set(operand) != {"value", "margin"}:
            raise ValueError(f"{name}: near {operand} given, a value and a margin wanted")
        value = require.number(f"{name}: near, value", operand["value"])
        margin = require.number(f"{name}: near, margin", operand["margin"], 0.0)
        return cls(value - margin, value + margin)

    def __str__(self) -> str:
        """Return the rule in words, for example ``above 0.4``."""
        if self.outside:
            return f"below or above {self.most:g}"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"between {self.least:g} and {self.most:g}"
        return f"above {self.least:g}" if math.isfinite(self.least) else f"below {self.most:g}"

    def place(self, low: float, high: float) -> Outcome:
        """Return whether an interval lies inside ("holds"), wholly outside ("does not hold"), or across a border."""
        if self.outside:
            return "holds" if high < self.least or low > self.most else "undecided"
        if self.least < low and high < self.most:
            return "holds"
        return "does not hold" if high <= self.least or low >= self.most else "undecided"


@dataclass(frozen=True)
class Check:
    """One result, the region in which the claim wants it, and the paper's number in its place.

    `interval` says how the result's interval was made: by a bootstrap, from Student's t over n units, from the same for
    Fisher's z of correlations (`fisher`), or not at all (`exact`, for a deviation that has no sampling error).
    """

    label: str
    key: str
    region: Region
    core: bool = False
    interval: str = "bootstrap"
    paper: Printed | None = None

    def paper_outcome(self) -> Outcome | None:
        """Return what this rule makes of the paper's own number with its ± (1.96 standard deviations)."""
        if self.paper is None:
            return None
        reach = 1.96 * (self.paper.sd or 0.0)
        return self.region.place(self.paper.value - reach, self.paper.value + reach)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    `short` is the claim as a clause of about ten words. `finding` has a sentence for each of OUTCOMES, written before
    the outcome is known; it may quote results as {key:format}, and problems. `joint` are the keys of max-t critical
    values that cover all its checks, if any.
    """

    id: str
    claim: str
    paper: str
    written: str
    checks: tuple[Check, ...]
    chapter: str = ""
    note: str = ""
    short: str = ""
    finding: Mapping[Outcome, str] = field(default_factory=dict)
    joint: tuple[str, ...] = ()


@functools.cache
def paper() -> dict[str, Any]:
    """Return the numbers that the paper prints: `table_1`, `table_2` and `text` of paper.yml."""
    return yaml.safe_load(resources.files("isouq.studies").joinpath("paper.yml").read_text(encoding="utf-8"))


def printed(path: str) -> Printed:
    """Return one number of the paper, for example `table_1.gn.spearman.binary_xor` or `table_2.triviaqa.p_true`.

    `table_2.triviaqa.p_true - table_2.triviaqa.combined` is the difference of two. Its standard deviation is that of
    independent numbers, since the paper does not print the one of the difference.

    Raises:
        ValueError: a path that leads nowhere, by name.
    """
    if " - " in path:
        first, second = (printed(part) for part in path.split(" - "))
        return Printed(first.value - second.value, math.hypot(first.sd or 0, second.sd or 0) or None)
    entry: Any = paper()
    for part in path.split("."):
        require.one_of(f"paper: {path}", part, entry if isinstance(entry, Mapping) else ())
        entry = entry[part]
    return Printed(*np.atleast_1d(entry).tolist())


def load(path: str | Path) -> list[Claim]:
    """Read claims.yml.

    Raises:
        ValueError: an unknown field, rule, kind of interval or number of the paper, a key of another form, two claims
            of one id, or a claim without a core check; the claim and the check are named.
    """
    claims = [_claim(entry) for entry in yaml.safe_load(Path(path).read_text(encoding="utf-8"))]
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: ids {', '.join(ids)} given, each only once wanted")
    return claims


def _claim(entry: Mapping[str, Any]) -> Claim:
    name = str(entry.get("id", "a claim without id"))
    for key in entry:
        require.one_of(f"{name}: field", key, [*Claim.__dataclass_fields__, "each"])
    require.one_of(f"{name}: written", entry.get("written"), WRITTEN)
    axes = [[(axis, pair) for pair in names.items()] for axis, names in entry.get("each", {}).items()]
    products = [dict(product) for product in itertools.product(*axes)]
    stated = [
        (check, v) for v in products for check in entry.get("checks", []) if v is products[0] or not check.get("once")
    ]
    checks = [_check(name, check, values) for check, values in stated]
    if not any(check.core for check in checks):
        raise ValueError(f"{name}: {len(checks)} checks given, none of them core; at least one core check wanted")
    joint = [entry["joint"].format(**_parts(values, 0)) for values in products] if "joint" in entry else []
    finding = entry.get("finding", dict.fromkeys(OUTCOMES, ""))
    if set(finding) != set(OUTCOMES):
        raise ValueError(f"{name}: finding: {', '.join(finding)} given, a sentence for each of {OUTCOMES} wanted")
    made: dict[str, Any] = {"checks": tuple(checks), "joint": tuple(dict.fromkeys(joint))}
    made["paper"] = re.sub(r"\{([\w.]+)\}", lambda path: str(printed(path[1])), entry["paper"])
    return Claim(**{key: value for key, value in entry.items() if key != "each"} | made)


def _check(name: str, entry: Mapping[str, Any], values: Mapping[str, tuple[str, str]]) -> Check:
    for key in entry:
        require.one_of(f"{name}: field of a check", key, _CHECK_FIELDS)
    label, key = entry["label"].format(**_parts(values, 1)), entry["key"].format(**_parts(values, 0))
    check_key(key)
    require.one_of(f"{name}: {label}: interval", entry.get("interval", "bootstrap"), INTERVALS)
    plain = {key: entry[key] for key in ("core", "interval") if key in entry}
    if not isinstance(plain.get("core", False), bool):
        raise ValueError(f"{name}: {label}: core: {plain['core']!r} given, true or false wanted, without quotes")
    number = printed(entry["paper"].format(**_parts(values, 0))) if "paper" in entry else None
    region = Region.of(entry["rule"], f"{name}: {label}: rule", number)
    return Check(label, key, region, paper=number, **plain)


def _parts(values: Mapping[str, tuple[str, str]], which: int) -> dict[str, str]:
    return {axis: pair[which] for axis, pair in values.items()}
