"""The `isouq` command: `isouq score`, `isouq assets list | fetch | verify`, `isouq verify`."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from isouq.pipeline import verify
from isouq.studies import assets

# Repeated here so that --help does not import torch; a test compares them with isouq.estimate and isouq.gradients.
AGGREGATIONS = ("sequence", "geometric", "token_mean")
ENGINES = ("auto", "ghost", "autograd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after printing the cause of a failure."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"isouq: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("isouq: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isouq", description="Exact squared gradient norms as epistemic uncertainty.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    text = "uncertainty of a model's answers, file to file"
    score = commands.add_parser("score", help=text, description=text, epilog=_score.__doc__)
    score.set_defaults(run=_score)
    score.add_argument("--model", required=True, help="an asset, a Hub id (id@revision), or a folder")
    score.add_argument("--input", required=True, type=Path, help="table with a column prompt and, optionally, answer")
    score.add_argument("--output", required=True, type=Path, help="table to write; both .csv, .jsonl or .parquet")
    score.add_argument("--aggregation", default="sequence", choices=AGGREGATIONS, help="what p of an answer means")
    score.add_argument("--engine", default="auto", choices=ENGINES, help="how gradients are computed")
    score.add_argument("--batch-size", default=8, type=_positive, help="rows a pass; changes speed, not scores")
    score.add_argument("--max-new-tokens", default=32, type=_positive, help="of an answer that is missing")

    text = "pinned models and data: list, fetch, verify"
    actions = commands.add_parser("assets", help=text, description=text).add_subparsers(metavar="ACTION", required=True)
    actions.add_parser("list", help="show names, sizes, licences and sources").set_defaults(run=_list)
    for name, run, text in (
        ("fetch", _fetch, "download, verify and convert what the cache lacks"),
        ("verify", _verify, "hash what the cache holds"),
    ):
        sub = actions.add_parser(name, help=text, description=f"{text}; all assets without NAME")
        sub.add_argument("names", nargs="*", metavar="NAME", help="an asset, as `isouq assets list` shows it")
        sub.set_defaults(run=run)

    verify.add_parser(commands)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, a positive integer wanted")
    return int(text)


def _list(_: argparse.Namespace) -> int:
    for asset in assets.list_assets():
        state = "in the cache" if assets.is_cached(asset.name) else "not in the cache"
        size = f"{tqdm.format_sizeof(asset.size)}B"
        print(f"{asset.name:25}{asset.kind:11}{size:>7}  {asset.licence:19} {state}")
        print(f"    {asset.title}")
        print(f"    for {asset.used_for}")
        print(f"    from {asset.version}" + (f"; on the Hub: {asset.hub}" if asset.hub else ""))
        if asset.notice:
            print(f"    {asset.notice}")
    print(f"cache: {assets.cache_folder()} (ISOUQ_CACHE moves it)")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    assets.fetch(args.names or None)
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Print a line for each asset; a corrupt one fails, and so does an absent one that was asked for by name."""
    failed = False
    for name in args.names or [asset.name for asset in assets.list_assets()]:
        try:
            state = assets.verify(name)[name]
        except assets.AssetError as error:
            print(f"isouq: {error}", file=sys.stderr)
            state = "FAILED"
        print(f"{name:25}{state}")
        failed |= state == "FAILED" or (state == "absent" and bool(args.names))
    return int(failed)


def _score(args: argparse.Namespace) -> int:
    """Columns appended: n_tokens; log_prob (nats); probability, aleatoric, epistemic, log_epistemic of the answer under
    --aggregation; straddles, true where a token has characters of both prompt and answer, which are then tokenised
    apart; error, why a row has no scores. Column answer holds the text that was scored: the cell as written, with its
    spaces, or what the model generates where the cell is empty or missing. The same command resumes a run that was
    stopped, from OUTPUT.partial; only --batch-size may differ. Exit code 1 if a row has no scores.
    """
    from isouq.language.scoring import Scoring
    from isouq.use.files import score_file

    how = Scoring(aggregations=(args.aggregation,), engine=args.engine, batch_size=args.batch_size)
    load = functools.partial(assets.load_causal_lm, args.model)
    done = score_file(args.input, args.output, load=load, how=how, max_new_tokens=args.max_new_tokens)
    for record in done:
        if record["error"]:
            print(f"isouq: row {record['row'] + 1}: {record['error']}", file=sys.stderr)
    answers, straddles, errors = (
        sum(record[name] not in (None, False) for record in done) for name in ("answer", "straddles", "error")
    )
    print(f"{args.output}: {len(done)} rows written, {errors} without scores; ", end="")
    print(f"answers generated for {answers} rows; {straddles} rows straddle")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
