"""The long jobs that run before a notebook: score a model's answers, sample a problem's posteriors."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from isouq.pipeline import profiles


def score(profile: str, model: str, data_set: str) -> str:
    """Answer, judge and score one data set with one model, as 04_llm_qa asks; return counts as JSON."""
    from isouq.studies.qa import study

    settings = study.Settings(**profiles.load(profile).parameters("04_llm_qa").scoring())  # type: ignore[attr-defined]
    table = study.run(model, data_set, settings, progress=True)
    counts = {"questions": len(table), "right": int(table["right"].sum()), "empty": int(table["empty"].sum())}
    return json.dumps({"model": model, "data_set": data_set, **counts})


def sample(profile: str, problem: str | None, seed: int | None, workers: int | None) -> str:
    """Sample the posteriors that 03_mcmc asks for, those of one problem or data seed only; return a summary."""
    from isouq.studies.synthetic import jobs, plan

    section: Any = profiles.load(profile).parameters("03_mcmc")
    store = Path(section.store_dir)
    options: dict[str, Any] = {"n_workers": workers or section.n_workers, "compiled": store / "jax"}
    records: dict[jobs.Job, dict[str, Any]] = {}  # Table 1 and the data sizes share jobs
    # What a stopped study cannot do without comes first: Table 1, then sizes, each seed by seed. Only the draws of
    # Table 1 are kept, for its figures.
    others = [*plan.data_sizes(section), *plan.sizes(section)]
    for part, draws in ((plan.table(section), store / "mcmc"), (others, None)):
        chosen = [job for job in part if problem in (None, job.problem) and seed in (None, job.seed)]
        chosen.sort(key=lambda job: job.seed)
        new = jobs.run_all(chosen, section.records_dir, draws=draws, also=[jobs.COMMITTED], **options)
        records.update(zip(chosen, new, strict=True))
    failed = sum(not record["passed"] for record in records.values())
    hours = sum(record["cpu_seconds"] for record in records.values()) / 3600
    return f"{len(records)} records, {failed} of them failed the gate; {hours:.2f} hours of one core"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job of a profile, print what it did, and leave that in a file for the pipeline."""
    parser = argparse.ArgumentParser(prog="python -m isouq.pipeline.jobs", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    for job in (score, sample):
        command = commands.add_parser(job.__name__, help=job.__doc__, description=job.__doc__)
        command.set_defaults(job=job)
        command.add_argument("--profile", default="embedded", help="name or path of a profile")
        command.add_argument("--done", type=Path, help="a file to write at the end")
    commands.choices["score"].add_argument("--model", required=True, help="asset name, Hub id or folder")
    commands.choices["score"].add_argument("--data-set", required=True, choices=get_args(profiles.DataSet))
    commands.choices["sample"].add_argument(
        "--problem", choices=get_args(profiles.SyntheticProblem), help="only this problem"
    )
    commands.choices["sample"].add_argument("--seed", type=int, help="only this data seed")
    commands.choices["sample"].add_argument("--workers", type=int, help="processes (default: as the profile says)")
    options = vars(parser.parse_args(arguments))
    done, job = options.pop("done"), options.pop("job")
    summary = job(**options)
    print(summary)
    if done:
        partial = done.with_name(f"{done.name}.{os.getpid()}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(summary + "\n", encoding="utf-8")
        partial.replace(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
