"""The verdicts in words: a sentence for each claim that has one, and a row for each claim."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from isouq.studies.claims import Claim
from isouq.studies.results import Result
from isouq.studies.verdicts import Verdict

from .results import format_interval, format_number

_QUOTED = re.compile(r"\{([a-z0-9_.\-]+)(?::([^}]+))?\}")


def sentences(
    stated: Sequence[Claim],
    judged: Mapping[str, Verdict],
    entries: Mapping[str, Result],
    *,
    only: Sequence[str] = (),
) -> Iterator[tuple[Claim, str]]:
    """Yield each claim that has a finding, with what its verdict chose, results filled in.

    `only` names claims by id; of their findings it yields the first sentences, which stand alone. {holding}, {failing}
    and {open} stand for the problems of which the claim's core checks say so.
    """
    for claim in stated:
        if claim.finding and (claim.id in only or not only):
            outcome = judged[claim.id].outcome
            text = f"No answer yet to whether {claim.short}." if outcome == "not run" else claim.finding[outcome]
            if only:
                text = text.partition(". ")[0].removesuffix(".") + "."
            for name, words in _problems(judged[claim.id]).items():
                text = text.replace(f"{{{name}}}", words)
            yield claim, _QUOTED.sub(lambda found: _quote(entries.get(found[1]), found[2] or ""), text)


def _quote(entry: Result | None, spec: str) -> str:
    """Return the value in a format, or with its interval where the format begins with `interval`."""
    kind, _, rest = spec.partition(" ")
    if entry is None:
        return "(not measured)"
    return format_interval(replace(entry, n=None), rest) if kind == "interval" else format_number(entry.value, spec)


def _problems(verdict: Verdict) -> dict[str, str]:
    """Return which problems hold, fail and are open, of the core checks with a number of the paper, as text."""
    names: dict[str, list[str]] = {"holding": [], "failing": [], "open": []}
    places = {"holds": "holding", "does not hold": "failing"}
    for one in verdict.checks:
        if one.check.core and one.check.paper is not None:
            names[places.get(one.outcome, "open")].append(one.check.label.split(",")[0])
    return {name: ", ".join(of) or "none" for name, of in names.items()}


def count(judged: Mapping[str, Verdict]) -> str:
    """Return in a sentence how many claims hold, hold in part and so on."""
    outcomes = [verdict.outcome for verdict in judged.values()]
    words = {
        "holds": ("holds here", "hold here"),
        "partly": ("holds in part", "hold in part"),
        "does not hold": ("does not hold", "do not hold"),
        "undecided": ("is undecided", "are undecided"),
        "not run": ("has no answer yet", "have no answer yet"),
    }
    numbers = {outcome: outcomes.count(outcome) for outcome in words if outcome in outcomes}
    parts = [f"{number} {words[outcome][number > 1]}" for outcome, number in numbers.items()]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return f"Of the {len(outcomes)} claims that we took from the paper, {listed}."


def share(verdict: Verdict) -> str:
    """Return how many of a claim's checks hold, such as `4 of 10 checks`, where its verdict counts them."""
    return f"{verdict.reason} checks" if re.fullmatch(r"\d+ of \d+", verdict.reason) else ""


def rows(claim: Claim, verdict: Verdict, entries: Mapping[str, Result]) -> list[tuple[str, str, str]]:
    """Return what a claim's first core check asks, its value here, and the paper's number.

    Of a claim that holds partly, the first core check that holds and the first that does not, each with its outcome.
    """
    core = [check for check in claim.checks if check.core]
    shown, outcomes = core[:1], {one.check: one.outcome for one in verdict.checks}
    if verdict.outcome == "partly":
        shown = [next(c for c in core if outcomes[c] == "holds"), *[c for c in core if outcomes[c] != "holds"][:1]]
    found = []
    for check in shown:
        here = format_interval(replace(entries[check.key], n=None)) if check.key in entries else "—"
        label = f"{check.label}: {outcomes[check]}" if verdict.outcome == "partly" else check.label
        found.append((label, here, str(check.paper or "—")))
    return found
