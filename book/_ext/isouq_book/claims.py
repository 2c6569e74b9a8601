"""Read claims.yml: the paper's claims, the results that answer them and the rules declared in advance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .verdicts import RULES, Measured, Verdict, combine, judge

_CLAIM_FIELDS = {"id", "claim", "chapter", "paper", "note", "not_reproduced", "each", "checks"}
_CHECK_FIELDS = {"label", "key", "rule", "paper", "exact"}


@dataclass(frozen=True)
class Check:
    """One result, the rule it has to pass, and what the paper has in its place."""

    label: str
    key: str
    rule: dict[str, Any]
    paper: tuple[float, ...] = ()
    exact: bool = False

    def judge(self, results: Mapping[str, Measured]) -> Verdict:
        """The verdict on this check alone."""
        return judge(self.rule, self.key, results, exact=self.exact)

    def others(self) -> list[str]:
        """The key that this result is compared with, if it is compared with one."""
        return [self.rule["greater_than"]] if "greater_than" in self.rule else []


@dataclass(frozen=True)
class Claim:
    """One claim of the paper."""

    id: str
    claim: str
    paper: str
    chapter: str = ""
    note: str = ""
    not_reproduced: str = ""
    checks: tuple[Check, ...] = ()

    def judge(self, results: Mapping[str, Measured]) -> Verdict:
        """The verdict on the whole claim."""
        return combine([check.judge(results) for check in self.checks], self.not_reproduced)


def load(path: str | Path) -> list[Claim]:
    """Read and check claims.yml. Raises ValueError that names the claim and what is wrong with it."""
    return [_claim(entry) for entry in yaml.safe_load(Path(path).read_text(encoding="utf-8"))]


def _claim(entry: dict[str, Any]) -> Claim:
    name = entry.get("id", "a claim without id")
    _refuse_unknown(name, entry, _CLAIM_FIELDS)
    fields = {key: value for key, value in entry.items() if key not in ("each", "checks")}
    names = _products(entry.get("each", {}))
    checks = [_check(name, check, values) for values in names for check in entry.get("checks", [])]
    return Claim(**fields, checks=tuple(checks))


def _products(each: dict[str, dict[str, str]]) -> list[dict[str, tuple[str, str]]]:
    """Every combination of the names under `each`: {model: {asset name: name to show}}."""
    axes = [[(axis, pair) for pair in names.items()] for axis, names in each.items()]
    return [dict(combination) for combination in itertools.product(*axes)]


def _check(name: str, entry: dict[str, Any], values: dict[str, tuple[str, str]]) -> Check:
    _refuse_unknown(name, entry, _CHECK_FIELDS)
    if len(entry["rule"]) != 1 or next(iter(entry["rule"])) not in RULES:
        raise ValueError(f"{name}: rule {entry['rule']} given; wanted exactly one of {', '.join(RULES)}")
    keys = {axis: key for axis, (key, _) in values.items()}
    names = {axis: shown for axis, (_, shown) in values.items()}
    rule = {
        rule: operand.format(**keys) if isinstance(operand, str) else operand for rule, operand in entry["rule"].items()
    }
    paper = entry.get("paper", [])
    return Check(
        label=entry["label"].format(**names),
        key=entry["key"].format(**keys),
        rule=rule,
        paper=tuple(paper) if isinstance(paper, list) else (paper,),
        exact=entry.get("exact", False),
    )


def _refuse_unknown(name: str, entry: dict[str, Any], known: set[str]) -> None:
    if unknown := set(entry) - known:
        raise ValueError(f"{name}: unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}")
