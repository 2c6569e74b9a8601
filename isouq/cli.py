"""The `isouq` command: `isouq score`, `evaluate`, `calibrate`, `assets list | fetch | verify`, `verify`."""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from isouq import models
from isouq.pipeline import verify
from isouq.studies import assets
from isouq.use import commands as use

# Repeated here so that --help does not import torch; a test compares them with the library's.
AGGREGATIONS = ("sequence", "geometric", "token_mean")
ENGINES = ("auto", "ghost", "autograd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after printing the cause of a failure."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:  # also a package of an extra that is not installed
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
    score.add_argument("--revision", help="branch, tag or commit of a Hub id")
    given = score.add_mutually_exclusive_group(required=True)
    given.add_argument("--input", type=Path, help="table with a column prompt and, optionally, answer")
    text = "per-sample logs that lm_eval --log_samples wrote: lm-eval samples_*.jsonl"
    given.add_argument("--from", dest="log", nargs="+", metavar=("lm-eval", "FILE"), help=text)
    score.add_argument("--output", required=True, type=Path, help="table to write; both .csv, .jsonl or .parquet")
    text = "auto (default) is a card where there is one, all of them where the model is larger than one, else the CPU"
    score.add_argument("--device", default="auto", choices=models.DEVICES, help=text)
    text = "auto (default) is the checkpoint's own on a card, float32 on the CPU"
    score.add_argument("--dtype", default="auto", choices=models.DTYPES, help=text)
    text = "ask by the model's chat template, a prompt being a user's turn"
    score.add_argument("--chat", action="store_true", help=text)
    score.add_argument("--system", metavar="TEXT", help="a system message before every prompt, with --chat")
    choices = (*AGGREGATIONS, "all")
    score.add_argument("--aggregation", default="sequence", choices=choices, help="what p of an answer means")
    score.add_argument("--engine", default="auto", choices=ENGINES, help="how gradients are computed")
    passes = score.add_mutually_exclusive_group()
    passes.add_argument("--batch-size", default=8, type=_positive, help="rows a pass (8); changes speed, not scores")
    text = "bytes above the weights, such as 8e9, that a pass may take; decides how many rows it has"
    passes.add_argument("--memory", type=_bytes, metavar="BYTES", help=text)
    text = "of `isouq calibrate`, for this model and aggregation: adds a column p_wrong"
    score.add_argument("--calibrator", type=Path, metavar="FILE", help=text)
    score.add_argument("--max-new-tokens", default=32, type=_positive, help="of an answer that is missing")

    use.add_parsers(commands)

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


def _bytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, a number of bytes such as 8e9 wanted")
    return size


def _list(_: argparse.Namespace) -> int:
    for asset in assets.list_assets():
        state = "in" if assets.is_cached(asset.name) else "not in"
        size = f"{tqdm.format_sizeof(asset.size)}B"
        print(f"{asset.name:25}{asset.kind:11}{size:>7}  {asset.licence:19} {state} the cache")
        print(f"    {asset.title}\n    for {asset.used_for}")
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
    --aggregation, and with "all" also those of the two others, whose names they end with; straddles, true where a token
    has characters of both prompt and answer, which are then tokenised apart; error, why a row has no scores. Column
    answer holds the text that was scored: the cell as written, with its spaces, or what the model generates where the
    cell is empty or missing. The same command resumes a run that was stopped, from OUTPUT.partial; only --batch-size
    and --memory may differ. Exit code 1 if a row has no scores.
    """
    from isouq.language.scoring import Scoring, aggregations_of
    from isouq.use import files, lm_eval, tables

    calibrator = None
    if args.calibrator:
        from isouq.use.calibrate import Calibrator

        calibrator = Calibrator.load(args.calibrator)
    if args.log and args.chat:
        raise ValueError("--chat: the prompts of a log are as the model has read them; leave it out")
    source = lm_eval.Log(args.log[0], args.log[1:]) if args.log else tables.Source(args.input)
    how = Scoring(
        aggregations=aggregations_of(args.aggregation),
        engine=args.engine,
        batch_size="auto" if args.memory is not None else args.batch_size,
        memory=args.memory,
    )
    placed = {"device": args.device, "dtype": args.dtype, "revision": args.revision}
    run = files.Run(
        model=args.model,
        load=functools.partial(assets.load_causal_lm, args.model, **placed),
        how=how,
        chat=args.chat,
        system=args.system,
        max_new_tokens=None if args.log else args.max_new_tokens,
        calibrator=calibrator,
    )
    done = files.score_file(source, args.output, run)
    print(f"{args.output}: {done.rows} rows written, {done.errors} without scores; ", end="")
    print(f"answers generated for {done.generated} rows; {done.straddles} rows straddle")
    return int(done.errors > 0)


if __name__ == "__main__":
    sys.exit(main())
