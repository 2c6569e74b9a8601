"""`isouq verify`: whether a run, or a part of the published one computed again, agrees with what is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isouq.studies.identity import PACKAGE

KEPT = PACKAGE.parent / "results"


def add_parser(commands: Any) -> None:
    """Add the command to those of `isouq`."""
    text = "compare a run with the kept one; exit code 1 where a number differs"
    parser = commands.add_parser("verify", help=text, description=text, epilog=_run.__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="results.json of a run, as make book leaves it in build/")
    parser.add_argument("--against", type=Path, help="a kept run (default: of the same profile, else published)")
    parser.add_argument(
        "--slice", nargs="*", metavar="CHAPTER", help="compute a part of the published run again instead"
    )
    parser.add_argument("--all", action="store_true", help="show the numbers that agree, too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Counts agree exactly, sampled numbers within their intervals, times up to a factor: see KINDS in
    isouq/pipeline/compare.py. Runs of two profiles are compared in what both have. --slice needs a clone and
    `pip install '.[notebooks]'`, and takes up to ten minutes on two cores.
    """
    from isouq.pipeline import compare, kept

    if (args.results is None) == (args.slice is None):
        raise ValueError("verify: wanted a results.json, or --slice; one of them")
    if args.slice is None:
        run = kept.read(args.results)
        own = KEPT / run["meta"]["profile"]
        folder = args.against or (own if (own / "results.json").is_file() else KEPT / "published")
        against = kept.read(folder / "results.json")
        same = run["meta"]["profile"] == against["meta"]["profile"]
        rows = compare.compare(against["results"], run["results"], same_size=same)
    else:
        from isouq.pipeline import slices

        folder = args.against or KEPT / "published"
        rows = slices.recompute(kept.read(folder / "results.json"), args.slice)
    print(compare.table(rows, every=args.all))
    differ = sum(row.agrees is False for row in rows)
    judged = sum(row.agrees is not None for row in rows)
    found = f"; {differ} DIFFER" if differ else ""
    print(f"\n{judged - differ} of {judged} numbers agree with {folder.name}{found}")
    return int(differ > 0)
