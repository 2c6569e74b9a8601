"""Turn declared rules and measured intervals into verdicts on the paper's claims.

A rule is written down in claims.yml before the numbers are known. Four rules exist, each about where the 95 %
interval of one result lies:

- `above: x`         all of it above x
- `below: x`         all of it below x
- `within: [x, y]`   all of it between x and y
- `greater_than: k`  all of it above the whole interval of the result k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Outcome = Literal["holds here", "does not hold here", "undecided", "not yet run", "not reproduced"]
RULES = ("above", "below", "within", "greater_than")


class Measured(Protocol):
    """Anything with a value and an interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """An outcome from the fixed set, and the reason in brackets behind it."""

    outcome: Outcome
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome} ({self.reason})" if self.reason else self.outcome


def judge(rule: Mapping[str, Any], key: str, results: Mapping[str, Measured], *, exact: bool = False) -> Verdict:
    """Apply one rule to the result `key`.

    `exact` marks a result that may come without interval (a count, a deviation): then its value stands for it.
    Raises ValueError for a rule that does not exist.
    """
    if len(rule) != 1 or next(iter(rule)) not in RULES:
        raise ValueError(f"rule: {dict(rule)} given; wanted exactly one of {', '.join(RULES)}")
    ((name, operand),) = rule.items()
    needed = [key, operand] if name == "greater_than" else [key]
    if any(one not in results for one in needed):
        return Verdict("not yet run")
    bounds = [_bounds(results[one], exact) for one in needed]
    if None in bounds:
        return Verdict("undecided", "no interval at this size")
    low, high = bounds[0]
    if name == "greater_than":
        return _compare(low, high, *bounds[1])
    least, most = {"above": (operand, None), "below": (None, operand)}.get(name, operand)
    return _place(low, high, least, most)


def combine(verdicts: Sequence[Verdict], not_reproduced: str = "") -> Verdict:
    """The verdict on a claim from those on its checks: it holds only if every check does.

    One failed check is enough against a claim, so it comes first; then doubt; then what is missing.
    """
    if not_reproduced:
        return Verdict("not reproduced", not_reproduced)
    if not verdicts:
        return Verdict("not yet run")
    total = len(verdicts)
    for outcome in ("does not hold here", "undecided", "not yet run"):
        hits = [verdict for verdict in verdicts if verdict.outcome == outcome]
        if not hits:
            continue
        if outcome == "undecided":
            return Verdict(outcome, _shared_reason(hits))
        whole = outcome == "not yet run" and len(hits) == total
        return Verdict(outcome, "" if whole else f"{len(hits)} of {total} checks")
    return Verdict("holds here", f"{total} of {total} checks" if total > 1 else "")


def satisfied(rule: Mapping[str, Any], value: float, other: float | None = None) -> bool:
    """Whether a bare value, such as one printed in the paper, would pass the rule."""

    @dataclass(frozen=True)
    class Point:
        value: float
        low: float
        high: float

    results: dict[str, Measured] = {"value": Point(value, value, value)}
    if "greater_than" in rule:
        if other is None:
            raise ValueError("rule: greater_than needs the paper's value of the other method as well")
        results["other"] = Point(other, other, other)
        rule = {"greater_than": "other"}
    return judge(rule, "value", results).outcome == "holds here"


def _place(low: float, high: float, least: float | None, most: float | None) -> Verdict:
    if (least is None or low > least) and (most is None or high < most):
        return Verdict("holds here")
    if (least is not None and high <= least) or (most is not None and low >= most):
        return Verdict("does not hold here")
    crossed = [f"{edge:g}" for edge in (least, most) if edge is not None and low <= edge <= high]
    return Verdict("undecided", f"interval includes {' and '.join(crossed)}")


def _compare(low: float, high: float, other_low: float, other_high: float) -> Verdict:
    if low > other_high:
        return Verdict("holds here")
    if high < other_low:
        return Verdict("does not hold here")
    return Verdict("undecided", "interval includes values of the other's interval")


def _bounds(result: Measured, exact: bool) -> tuple[float, float] | None:
    if result.low is not None and result.high is not None:
        return result.low, result.high
    return (result.value, result.value) if exact else None


def _shared_reason(verdicts: Sequence[Verdict]) -> str:
    reasons = list(dict.fromkeys(verdict.reason for verdict in verdicts))
    return reasons[0] if len(reasons) == 1 else f"{len(verdicts)} checks: {'; '.join(reasons)}"
