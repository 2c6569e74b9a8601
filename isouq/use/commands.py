"""`isouq evaluate` and `isouq calibrate`: from a file of scores and labels to tables, figures and a calibrator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Repeated here so that --help imports neither scipy nor pandas; a test compares them with what they are copies of.
JUDGES = ("exact", "f1", "contains")
METHODS = ("logistic", "isotonic")


def add_parsers(commands: Any) -> None:
    """Add the two commands to those of argparse."""
    text = "how well scores tell wrong answers from right ones, with intervals"
    evaluate = commands.add_parser("evaluate", help=text, description=text, epilog=_evaluate.__doc__)
    evaluate.set_defaults(run=_evaluate)
    _add_labels(evaluate)
    evaluate.add_argument("--scores", nargs="+", metavar="NAME", help="names or columns, high = wrong; all without")
    evaluate.add_argument("--out", type=Path, help="the table as .csv, or with its warnings as .json")
    evaluate.add_argument("--figure", type=Path, help="accuracy against share answered, .svg or .png")

    text = "the probability that an answer is wrong, fitted to labelled scores"
    calibrate = commands.add_parser("calibrate", help=text, description=text, epilog=_calibrate.__doc__)
    calibrate.set_defaults(run=_calibrate)
    _add_labels(calibrate)
    calibrate.add_argument("--score", default="combined", metavar="NAME", help="combined, or another name or column")
    calibrate.add_argument("--method", default="logistic", choices=METHODS, help="isotonic takes more labels")
    calibrate.add_argument("--abstain", type=float, metavar="ACCURACY", help="to keep among the answered, such as 0.9")
    calibrate.add_argument("--out", required=True, type=Path, help="the calibrator, .json")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="scores of `isouq score` with a column of labels or references")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--right", metavar="COLUMN", help="true or false, 1 or 0, yes or no")
    labels.add_argument("--reference", metavar="COLUMN", help="accepted answers, a text or a list (JSON); see --judge")
    parser.add_argument("--judge", choices=JUDGES, help="how an answer has to agree with a reference; default exact")
    parser.add_argument("--clusters", metavar="COLUMN", help="equal cells: questions that err alike, drawn together")
    parser.add_argument("--resamples", default=2000, type=int, metavar="N", help="of the bootstrap behind intervals")


def _evaluate(args: argparse.Namespace) -> int:
    """Metrics: auroc; aurc (area under the risk-coverage curve, low is good); prr, the prediction rejection ratio; of
    the fitted pair also brier and ece. Gains are over the plain negative log-likelihood on the same resamples, above 0
    where a score is better. Rows with an error are left out.
    """
    from isouq.use.evaluate import evaluate

    _check_out("--out", args.out, (".csv", ".json"), args.file)
    _check_out("--figure", args.figure, (".svg", ".png"), args.file)
    table, right = _labelled(args)
    found = evaluate(table, right, scores=args.scores, clusters=args.clusters, n_resamples=args.resamples)
    print(found)
    if args.out and args.out.suffix == ".csv":
        found.table.to_csv(args.out, index=False)
    elif args.out:
        args.out.write_text(found.to_json() + "\n", encoding="utf-8")
    if args.figure:
        found.figure().savefig(args.figure)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    """Writes a calibrator for `isouq score --calibrator FILE`, which adds a column p_wrong. With --abstain also the
    threshold on p_wrong that keeps this accuracy among the answered; exit code 1 if there is none. Rows with an error
    are left out.
    """
    from isouq.use import tables
    from isouq.use.calibrate import calibrate

    _check_out("--out", args.out, (".json",), args.file)
    table, right = _labelled(args)
    options = {"score": args.score, "method": args.method, "abstain": args.abstain, "n_resamples": args.resamples}
    found = calibrate(table, right, clusters=args.clusters, about=tables.about_of(args.file), **options)
    found.save(args.out)
    print(found)
    if found.about is None:
        print(f"isouq: {args.file}: does not say which model its scores are of (only .parquet can)", file=sys.stderr)
    return 0


def _check_out(option: str, path: Path | None, allowed: tuple[str, ...], source: Path) -> None:
    if path and path.suffix not in allowed:
        raise ValueError(f"{option}: {path} given, a file ending in {' or '.join(allowed)} wanted")
    if path and (path.is_dir() or not path.parent.is_dir() or (path.exists() and path.samefile(source))):
        raise ValueError(f"{option}: {path} is a folder, in none, or the scores themselves; name another file")


def _labelled(args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The file's table, and the name of its column of labels, which a judge makes where there are references."""
    from isouq.use import judges, tables

    if args.judge and not args.reference:
        raise ValueError("--judge: given without --reference, the column of accepted answers; name it")
    table = tables.read(args.file)
    if not args.reference:
        return table, args.right
    verdicts = judges.judged(table, args.judge or "exact", args.reference)
    return table.assign(**{"judged right": verdicts}), "judged right"
