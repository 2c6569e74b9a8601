"""Verdicts on the paper's claims, made from declared rules and measured intervals.

`judge` compares every result that a claim names with the region in which the claim wants it: by an interval that holds
for all checks of the claim at once, and by Benjamini and Hochberg's procedure over all checks of the book. Then it
counts. The page "How verdicts are made" explains the steps; book/simulate_verdicts.py shows how often they err.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from isouq.studies import require
from isouq.studies.claims import Check, Claim, Outcome
from isouq.studies.results import Result

LARGEST_RHO = 0.9999  # a correlation of one would be infinitely far from all others
LEVEL = 0.05  # of the intervals within a claim (familywise) and of the false discovery rate over the book


@dataclass(frozen=True)
class CheckVerdict:
    """The outcome of one check, its simultaneous interval, and its p-value adjusted within the claim."""

    check: Check
    outcome: Outcome
    reason: str = ""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim, the reason behind it, and the outcomes of its checks."""

    outcome: Outcome
    reason: str = ""
    checks: tuple[CheckVerdict, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.outcome} ({self.reason})" if self.reason else self.outcome


def judge(claims: Sequence[Claim], results: Mapping[str, Result]) -> dict[str, Verdict]:
    """Return the verdict on every claim by its id.

    A claim of which a core check has no result is not run, whatever its other checks say. The others are corrected
    within the claim, by the max-t bootstrap where the claim names its critical values and these are among the results,
    else by Holm; then over all checks of all claims by Benjamini and Hochberg. Both at `LEVEL`.

    Raises:
        ValueError: a result whose interval does not contain its value, named, before any claim is judged.
    """
    for key in sorted({check.key for claim in claims for check in claim.checks} & set(results)):
        value, low, high = results[key].value, results[key].low, results[key].high
        if low is not None and high is not None and not low <= value <= high:
            raise ValueError(f"{key}: {value} [{low}, {high}] given, a value inside its interval wanted")
    judged = {claim.id: _judge_checks(claim, results) for claim in claims}
    flat = [verdict for verdicts in judged.values() for verdict in verdicts if verdict.p_value is not None]
    q_values = stats.false_discovery_control([verdict.p_value for verdict in flat]) if flat else []
    rate = {id(verdict): q for verdict, q in zip(flat, q_values, strict=True)}
    verdicts = {}
    for claim in claims:
        checks = tuple(_after_discovery(one, rate.get(id(one))) for one in judged[claim.id])
        missing = [check for check in claim.checks if check.core and check.key not in results]
        reason = f"no result for {len(missing)} core check{'s' * (len(missing) > 1)}"
        verdicts[claim.id] = Verdict("not run", reason, checks) if missing else combine(checks)
    return verdicts


def combine(checks: Sequence[CheckVerdict]) -> Verdict:
    """Return the verdict on a claim from those on its checks, every core check having a result.

    holds: every core check holds, and no check fails. partly (k of n): some core check holds, but not so for the whole
    claim; k of the n checks with a result hold. does not hold: no core check holds, and more than half of them fail.
    undecided: all else.

    Raises:
        ValueError: no core check, or a core check that was not run.
    """
    core = [one.outcome for one in checks if one.check.core]
    if not core or "not run" in core:
        raise ValueError(f"checks: {len(core)} core checks given, some not run; at least one wanted, all of them run")
    outcomes = [one.outcome for one in checks if one.outcome != "not run"]
    n_hold, n_fail = outcomes.count("holds"), outcomes.count("does not hold")
    counts = f"{n_hold} of {len(outcomes)}"
    if core.count("holds") == len(core) and not n_fail:
        return Verdict("holds", counts if len(outcomes) > 1 else "", tuple(checks))
    if "holds" in core:
        return Verdict("partly", counts, tuple(checks))
    if core.count("does not hold") > len(core) / 2:
        reason = f"{core.count('does not hold')} of {len(core)} core checks fail" if len(core) > 1 else ""
        return Verdict("does not hold", reason, tuple(checks))
    if len(core) > 1:
        reason = f"of {len(core)} core checks {core.count('undecided')} open, {core.count('does not hold')} failed"
    else:
        reason = next(one.reason for one in checks if one.check.core)
    return Verdict("undecided", reason, tuple(checks))


def holm_factors(p_values: ArrayLike, level: float = LEVEL) -> NDArray[np.float64]:
    """Return the factor by which Holm's procedure multiplies each p-value, in the order given.

    The smallest p-value is multiplied by their number m, the next by m − 1, and so on; after the first that stays above
    `level` the factor no longer falls. An interval of level 1 − `level`/factor then excludes a border if and only if
    Holm rejects it.

    Raises:
        ValueError: p-values outside [0, 1].
    """
    p = require.numbers("p_values", p_values, least=0)
    if len(p) and not (p.min() >= 0 and p.max() <= 1):
        raise ValueError(f"p_values: {p.min():g} to {p.max():g} given, values from 0 to 1 wanted")
    factors, factor, failed = np.ones(len(p)), len(p) + 1, False
    for i in np.argsort(p, kind="stable"):
        factor -= not failed
        factors[i] = factor
        failed |= bool(p[i] * factor > level)
    return factors


def effective_number(critical_value: float, level: float = LEVEL) -> float:
    """Return how many independent comparisons have this max-t critical value: log(1 − α) / log(1 − p), two-sided p.

    Raises:
        ValueError: a critical value below that of a single comparison (1.96 at 5 %).
    """
    single = -float(special.ndtri(level / 2))
    value = require.number("critical_value", critical_value, single - 1e-6, or_equal=True)
    return max(1.0, math.log1p(-level) / math.log1p(-2 * float(special.ndtr(-value))))


def fisher_z(correlations: ArrayLike) -> NDArray[np.float64]:
    """Return Fisher's z = artanh(ρ), whose spread does not depend on ρ; |ρ| counts as LARGEST_RHO at most, NaN stays.

    Raises:
        ValueError: values outside [−1, 1].
    """
    rho = require.array_of("correlations", correlations).astype(np.float64)
    if (np.abs(rho) > 1 + 1e-9).any():
        raise ValueError(f"correlations: {rho.min():g} to {rho.max():g} given, values from -1 to 1 wanted")
    return np.asarray(np.arctanh(np.clip(rho, -LARGEST_RHO, LARGEST_RHO)))


def _judge_checks(claim: Claim, results: Mapping[str, Result]) -> list[CheckVerdict]:
    """Return the checks' outcomes after the correction within the claim."""
    estimates = [_Estimate.of(check, results[check.key]) for check in claim.checks if check.key in results]
    sampled = [one for one in estimates if one.p_value is not None]
    p = np.array([one.p_value for one in sampled])
    if claim.joint and set(claim.joint) <= set(results):
        count = sum(effective_number(float(results[key].value)) for key in claim.joint)
        factors = np.full(len(p), LEVEL / -math.expm1(math.log1p(-LEVEL) / count))
        adjusted = -np.expm1(count * np.log1p(-np.minimum(p, 1 - 1e-16)))
    else:
        factors = holm_factors(p)
        order = np.argsort(p, kind="stable")
        adjusted = np.empty(len(p))
        adjusted[order] = np.minimum(1, np.maximum.accumulate((p * factors)[order]))
    corrected = {
        one.check: one.verdict(factor, float(q)) for one, factor, q in zip(sampled, factors, adjusted, strict=True)
    }
    known = corrected | {one.check: one.verdict() for one in estimates if one.p_value is None}
    return [known.get(check, CheckVerdict(check, "not run")) for check in claim.checks]


def _after_discovery(verdict: CheckVerdict, q_value: float | None) -> CheckVerdict:
    """Return the outcome after Benjamini and Hochberg over the book, which can only leave it or open it again."""
    if q_value is None or q_value <= LEVEL or verdict.outcome == "undecided":
        return verdict
    reason = f"not after the correction over all checks, q = {q_value:.2f}"
    return CheckVerdict(verdict.check, "undecided", reason, verdict.low, verdict.high, verdict.p_value)


@dataclass(frozen=True)
class _Estimate:
    """A check's value with standard errors to both sides, and its largest p-value, that of the nearest border.

    All on the scale on which the interval is symmetric: Fisher's z for "fisher", else the result's own.
    """

    check: Check
    value: float
    errors: tuple[float, float]
    df: float
    p_value: float | None

    @classmethod
    def of(cls, check: Check, result: Result) -> _Estimate:
        """Read the standard errors off the 95 % interval; a bootstrap's two sides may differ, a t-interval's do not."""
        by_t, n = check.interval in ("t", "fisher"), result.n or 0
        if result.low is None or (by_t and n < 2):
            return cls(check, float(result.value), (0.0, 0.0), math.inf, None)
        value, low, high, least, most = (
            _scaled(check, edge)
            for edge in (result.value, result.low, result.high, check.region.least, check.region.most)
        )
        df = float(n - 1) if by_t else math.inf
        below, above = value - low, high - value
        if by_t:
            below = above = max(below, above)
        quantile = -float(special.stdtrit(df, 0.025))
        errors = below / quantile, above / quantile
        p_values = [_p_value(value - border, errors, df) for border in (least, most) if math.isfinite(border)]
        return cls(check, value, errors, df, max(p_values))

    def verdict(self, factor: float = 1.0, adjusted: float | None = None) -> CheckVerdict:
        """Return the outcome by the interval of level 1 − LEVEL / factor."""
        check = self.check
        if self.p_value is None:
            if check.interval != "exact":
                return CheckVerdict(check, "undecided", "no interval at this size")
            return CheckVerdict(check, check.region.place(self.value, self.value))
        quantile = -float(special.stdtrit(self.df, LEVEL / (2 * factor)))
        low, high = self.value - quantile * self.errors[0], self.value + quantile * self.errors[1]
        if check.interval == "fisher":
            low, high = math.tanh(low), math.tanh(high)
        outcome = check.region.place(low, high)
        edges = [f"{edge:g}" for edge in sorted({check.region.least, check.region.most}) if low <= edge <= high]
        reason = f"interval includes {' and '.join(edges)}" if outcome == "undecided" else ""
        return CheckVerdict(check, outcome, reason, low, high, adjusted)


def _scaled(check: Check, value: Any) -> float:
    return float(fisher_z([float(value)])[0]) if check.interval == "fisher" and math.isfinite(value) else float(value)


def _p_value(distance: float, errors: tuple[float, float], df: float) -> float:
    """Return the two-sided p-value of a distance to a border, by the standard error on the border's side."""
    error = errors[0] if distance > 0 else errors[1]
    if error == 0:
        return float(distance == 0)
    return float(2 * special.stdtr(df, -abs(distance) / error))
