"""Say in words where the numbers of the book come from."""

from __future__ import annotations

from typing import Any


def rows(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each entry of the record, in a fixed order; what a record lacks is left out."""
    if not meta:
        return [("results", "none were given to this build")]
    found = [
        ("profile", str(meta.get("profile", ""))),
        ("commit", _commit(meta)),
        ("made on", str(meta.get("created", ""))),
        ("machine", _flat(meta.get("hardware"))),
        ("minutes", _minutes(meta.get("durations"))),
        ("seeds", _flat(meta.get("seeds"))),
        ("versions", _flat(meta.get("versions"))),
    ]
    return [(name, text) for name, text in found if text]


def footer(meta: dict[str, Any]) -> str:
    """One line of plain text for the foot of every page."""
    if not meta:
        return "This build shows no results."
    profile, created = meta.get("profile", "?"), meta.get("created", "?")
    return f"Numbers: profile {profile}, commit {_commit(meta)}, made on {created}."


def _commit(meta: dict[str, Any]) -> str:
    commit = str(meta.get("commit") or "unknown")[:10]
    return f"{commit} with uncommitted changes" if meta.get("dirty") else commit


def _minutes(durations: Any) -> str:
    if not isinstance(durations, dict) or not durations:
        return ""
    parts = [f"{name} {float(seconds) / 60:.1f}" for name, seconds in sorted(durations.items())]
    return ", ".join(parts)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return "" if value is None else str(value)
