"""Say in words where the numbers of the book come from."""

from __future__ import annotations

import textwrap
from typing import Any


def rows(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each entry of the record, in a fixed order; what a record lacks is left out."""
    if not meta:
        return [("results", "none were given to this build")]
    found = [
        ("profile", str(meta.get("profile", ""))),
        *(chapters(meta) or {"commit": _commit(meta), "made on": str(meta.get("created", ""))}).items(),
        ("machine", _flat(meta.get("hardware"))),
        ("minutes", _minutes(meta.get("durations"))),
        ("seeds", _flat(meta.get("seeds"))),
        ("versions", _flat(meta.get("versions"))),
    ]
    return [(name, text) for name, text in found if text]


def chapters(meta: dict[str, Any]) -> dict[str, str]:
    """Chapters of one commit → that and the day, where the chapters are of several, else nothing."""
    runs: dict[str, list[str]] = {}
    for chapter, run in meta.get("runs", {}).items():
        runs.setdefault(_commit({**meta, **run}), []).append(chapter)
    return {", ".join(names): _ran(meta, names[0]) for names in runs.values()} if len(runs) > 1 else {}


def footer(meta: dict[str, Any], page: str = "") -> str:
    """One line of plain text for the foot of a page; a chapter's own run where it has one."""
    if not meta:
        return "This build shows no results."
    chapter, several = page.rpartition("/")[2], chapters(meta)
    if several and chapter in meta["runs"]:
        return f"Numbers: profile {meta['profile']}, {_ran(meta, chapter)}."
    if several:
        runs = "; ".join(f"{names}: {ran}" for names, ran in several.items())
        return f"Numbers: profile {meta['profile']}; {runs}."
    profile, created = meta.get("profile", "?"), meta.get("created", "?")
    return f"Numbers: profile {profile}, commit {_commit(meta)}, made on {created}."


def bibtex(cff: dict[str, Any], meta: dict[str, Any]) -> str:
    """The paper and this software as BibTeX, the second with its version and the run that a book shows."""
    (paper,) = cff["references"]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    identifier = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    entries = {
        "inproceedings{grunefeld2026isotropic": {
            "title": paper["title"],
            "author": authors,
            "booktitle": paper["conference"]["name"],
            "year": str(paper["year"]),
            "eprint": identifier,
            "archiveprefix": "arXiv",
        },
        "software{isouq": {
            "title": cff["title"],
            "author": "{" + cff["authors"][0]["name"] + "}",
            "version": cff["version"],
            "year": str(meta.get("created", ""))[:4],
            "url": cff.get("repository-code", ""),
            "note": footer(meta).rstrip("."),
        },
    }
    shown = []
    for head, fields in entries.items():
        lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value]
        wrapped = [textwrap.fill(line, 76, subsequent_indent=" " * 19, break_long_words=False) for line in lines]
        shown.append("\n".join([f"@{head},", *wrapped, "}"]))
    return "\n\n".join(shown)


def _ran(meta: dict[str, Any], chapter: str) -> str:
    """The commit and the day of a chapter's own run."""
    own = {**meta, **meta["runs"][chapter]}
    return f"commit {_commit(own)}, made on {own.get('started', own.get('created', '?'))[:10]}"


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
