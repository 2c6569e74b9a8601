"""The commands behind the Snakefile's rules: score, sample, run a notebook, join results; keep a run, estimate one."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from isouq.models import ModelError
from isouq.pipeline import kept, profiles, runner, schemas
from isouq.studies import assets
from isouq.studies.results import ResultError, write_json
from isouq.studies.store import StoreError


def score(profile: str, model: str, data_set: str) -> str:
    """Answer, judge and score one data set with one model, as 04_llm_qa asks; return counts as JSON."""
    from isouq.studies.qa import study

    _say(f"Scoring {data_set} with {model}")
    section: Any = profiles.load(profile).parameters("04_llm_qa")
    table = study.run(model, data_set, study.Settings(**section.scoring(model, data_set)), progress=True)
    counts = {"questions": len(table), "right": int(table["right"].sum()), "empty": int(table["empty"].sum())}
    return json.dumps({"model": model, "data_set": data_set, **counts})


def sample(profile: str, problem: str | None, seed: int | None, workers: int | None) -> str:
    """Sample the posteriors that 02_mcmc and 03_isotropy ask for, or of one problem or data seed; return a summary."""
    from isouq.studies.isotropy import dose
    from isouq.studies.synthetic import atlas, plan

    _say(f"Sampling posteriors of {problem or 'all problems'}")
    loaded = profiles.load(profile)
    section: Any = loaded.parameters("02_mcmc")
    isotropy: Any = loaded.parameters("03_isotropy") if "03_isotropy" in loaded.chapters() else None
    options: dict[str, Any] = {"n_workers": workers or section.n_workers, "compiled": Path(section.store_dir, "jax")}

    def run(part: list[plan.Job], folder: str, committed: Path) -> list[atlas.Record]:
        chosen = [job for job in part if problem in (None, job.problem) and seed in (None, job.seed)]
        return atlas.run_all(chosen, folder, also=[committed], **options)

    settings = list(dict.fromkeys([*plan.headline(section), *plan.atlas(section)]))
    doses = plan.dose(isotropy) if isotropy else []
    try:
        for job in (*settings, *doses):
            job.make()  # refuses what is impossible before anything is sampled
    except ValueError as error:
        raise profiles.ProfileError(f"profile {loaded.name!r}: {error}") from error
    of_atlas = run(settings, section.atlas_dir, atlas.COMMITTED)
    of_doses = run(doses, isotropy.dose_dir, dose.COMMITTED) if doses else []
    records = [record.facts for record in (*of_atlas, *of_doses)]
    failed = sum(not record["passed"] for record in records)
    hours = sum(record["cpu_seconds"] for record in records) / 3600
    return f"{len(records)} records, {failed} of them failed the gate; {hours:.2f} hours of one core"


def notebook(profile: str, chapter: str) -> None:
    """Run one chapter's notebook, and record what ran, on what, from what."""
    source = Path("notebooks", f"{chapter}.ipynb")
    _say(f"Running {source}")
    loaded = profiles.load(profile)
    build = Path("build", loaded.name)
    section = loaded.parameters(chapter, results_path=str(build / "results" / f"{chapter}.json"))
    models = {name: assets.content(name) for name in getattr(section, "models", [])}
    runner.run_notebook(source, build, parameters=section.model_dump(), models=models)


def budget(profile: str, out: Path | None) -> str:
    """Estimate a profile's GPU hours and memory, and return them as a table; keep it in `out` for a page."""
    from isouq.pipeline.budget import shown

    found = shown(profiles.load(profile))
    if out:
        write_json(found, out)
    return f"{pd.DataFrame(found['rows'], columns=found['header']).to_string(index=False)}\n{found['basis']}"


def describe(profile: str) -> str:
    """Write the RO-Crate metadata of a kept run, for archives; return a line."""
    from isouq.pipeline import crate

    return crate.describe(profile)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in one piece, since other processes write here, too
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job of a profile, and print its summary where it has one."""
    parser = argparse.ArgumentParser(prog="python -m isouq.pipeline.jobs", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    add = {}
    for job in (score, sample, notebook, budget, describe, runner.collect, kept.keep):
        command = commands.add_parser(job.__name__, help=(job.__doc__ or "").partition("\n")[0])
        command.set_defaults(job=job)
        command.add_argument("--profile", default="embedded", help="name or path of a profile")
        add[job] = command.add_argument
    add[score]("--model", required=True, help="asset name, Hub id or folder")
    add[score]("--data-set", required=True, help=f"{', '.join(schemas.DATA_SETS)}, or a file of questions")
    add[sample](
        "--problem",
        choices=(*get_args(schemas.SyntheticProblem), *get_args(schemas.DoseProblem)),
        help="only this problem",
    )
    add[sample]("--seed", type=int, help="only this data seed")
    add[sample]("--workers", type=int, help="processes (default: as the profile says)")
    add[budget]("--out", type=Path, help="a file for the book's {budget}")
    add[notebook]("chapter", choices=schemas.SCHEMAS)
    for name in ("results", "records", "timings"):
        add[runner.collect](f"--{name}", type=Path, nargs="+", required=True)
    add[runner.collect]("--out", type=Path, required=True)
    add[kept.keep]("chapters", nargs="*", metavar="CHAPTER", help="only these (default: all that have run)")
    options = vars(parser.parse_args(arguments))
    # There are no widgets on a page: tqdm need not say in a notebook's output that it writes text instead.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    try:
        if summary := options.pop("job")(**options):
            print(summary)
    except (runner.NotebookError, ResultError, profiles.ProfileError, ModelError, StoreError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
