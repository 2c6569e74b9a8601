"""What `isouq verify --slice` computes again: a small part of every chapter, compared with the published run.

- 01_derivation: the whole chapter, as its notebook runs: 15 numbers.
- 02_mcmc: every number of the chapter again from the kept posteriors, as its notebook runs; one posterior of the
  declared setting sampled anew, and its correlations.
- 03_isotropy: where the error enters (`isotropy.chain.…`), from the kept posteriors.
- 04_llm_qa: N_QUESTIONS questions of Wikidata asked again of SmolLM2, with every score beside the kept record's.
- 05_cost: exactness of the norms and their time beside a forward pass, for SmolLM2.
- 06_your_model: the whole chapter, as its notebook runs.

The notebooks' own numbers have the tolerances of `compare`; what is compared beside them has one here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isouq.pipeline import compare, profiles, runner
from isouq.pipeline.compare import Row
from isouq.pipeline.kept import of_chapter
from isouq.studies.results import ResultError, plain
from isouq.studies.store import Store, identity_of

MODEL, DATA_SET, N_QUESTIONS = "smollm2-135m-instruct", "wikidata", 6
SAME_SCORE = 1e-3  # relative: float32 sums in another order, on another processor
SAME_POSTERIOR = 0.1  # of a correlation with another draw of the same posterior

Numbers = Mapping[str, Mapping[str, Any]]


def recompute(kept: Mapping[str, Any], chapters: Sequence[str] = ()) -> list[Row]:
    """Return the rows of the chapters named, or of all.

    Raises:
        ResultError: a chapter that has no slice.
    """
    if unknown := set(chapters) - SLICES.keys():
        raise ResultError(f"--slice: {min(unknown)!r} given; wanted some of {', '.join(SLICES)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(profiles.CLONE):
        for chapter in chapters or SLICES:
            sys.stderr.write(f"Computing a slice of {chapter} again\n")
            rows += SLICES[chapter](kept["results"], Path(scratch))
    return rows


def mcmc(kept: Numbers, scratch: Path) -> list[Row]:
    """Run the notebook on the kept posteriors, and sample the first posterior of the declared setting again."""
    from isouq.studies.synthetic import atlas, plan

    section = profiles.load("published").parameters("02_mcmc")
    job = plan.headline(section)[0]
    old, new = (atlas.table([record]) for record in (_kept_record(job), atlas.run(job, scratch)))
    rows = []
    for (_, before), (_, after) in zip(old.iterrows(), new.iterrows(), strict=True):
        if before["region"] == "whole" and before["spearman"] == before["spearman"]:
            name = f"mcmc: {job.problem}, seed {job.seed}, {before['point']}, {before['measure']}, ρ"
            rows.append(_row(name, before["spearman"], after["spearman"], absolute=SAME_POSTERIOR))
    return rows + notebook("02_mcmc", kept, scratch)


def isotropy(kept: Numbers, scratch: Path) -> list[Row]:
    """Take the steps from variance to estimate again, on every kept posterior of the declared setting."""
    from isouq.studies.isotropy import chain
    from isouq.studies.synthetic import plan

    section = profiles.load("published").parameters("03_isotropy")
    steps = chain.table([_kept_record(job) for job in plan.headline(section)])
    run = {key: plain(result) for key, result in chain.named_results(steps).items()}
    return compare.compare({key: kept[key] for key in kept if key.startswith("isotropy.chain.")}, run)


def llm_qa(kept: Numbers, scratch: Path) -> list[Row]:
    """Ask the first questions again, and compare every score of every answer with the record that is kept."""
    from isouq.studies.qa import data, study

    section: Any = profiles.load("published").parameters("04_llm_qa")
    how = section.scoring(MODEL, DATA_SET) | {"n_questions": N_QUESTIONS, "n_token_mean": 1, "records_dir": None}
    new = study.run(MODEL, DATA_SET, study.Settings(**how | {"store_dir": str(scratch)}), progress=False)
    file, identity = kept_answers(how["n_shots"])
    with Store(scratch / "kept.sqlite", identity) as store:
        store.restore(file)
        asked = store.get("question")
        old = study.tabulate(store, [data.Question(**asked[item_id]) for item_id in new["item_id"]])
    same = int((old["answer"] == new["answer"]).sum())
    rows = [_row(f"qa: {MODEL}, {DATA_SET}, answers that are the same", len(old), same)]
    for name in map(str, old.select_dtypes("number")):
        if name.startswith("seconds_") or name not in new:
            continue
        pairs = zip(old["item_id"], old[name], new[name], strict=True)
        worst = max(pairs, key=lambda pair: abs(pair[1] - pair[2]) if pair[1] == pair[1] else -1.0)
        if worst[1] == worst[1]:
            rows.append(_row(f"qa: {name}, question {worst[0]}", worst[1], worst[2], relative=SAME_SCORE))
    return rows


def kept_answers(n_shots: int) -> tuple[Path, dict[str, Any]]:
    """Return the kept records of the questions asked with so many examples, and their identity."""
    files = (profiles.CLONE / "results" / "published" / "qa").glob(f"{MODEL}--{DATA_SET}-*.parquet")
    pairs = [(path, identity_of(path)) for path in files]
    [pair] = [pair for pair in pairs if pair[1]["settings"]["n_shots"] == n_shots]
    return pair


def cost(kept: Numbers, scratch: Path) -> list[Row]:
    """Measure the ghost engine's error against autograd, and its time beside a forward pass, on the chapter's texts."""
    from isouq.studies import assets
    from isouq.studies.cost import cases, timing

    section: Any = profiles.load("published").parameters("05_cost")
    model, tokenizer = assets.load_causal_lm(MODEL)
    sizes = {name: getattr(section, name) for name in ("n_examples", "n_tokens", "n_answer", "seed")}
    texts = cases.texts(model, tokenizer, **sizes)
    few = texts.first(2)
    exact, fast = (few.scores(engine=engine).log_epistemic for engine in ("autograd", "ghost"))
    error = (fast - exact).expm1().abs().max().item()
    times = timing.relative(timing.interleaved({name: (name, texts) for name in ("forward", "ghost")}, n_rounds=3))
    run: dict[str, Any] = {
        f"cost.{MODEL}.ghost.relative_error": {"value": error},
        f"cost.{MODEL}.ghost.relative_to_forward": {"value": times.set_index("method")["value"]["ghost"]},
    }
    return compare.compare({key: kept[key] for key in run}, run)


def notebook(chapter: str, kept: Numbers, scratch: Path) -> list[Row]:
    """Run a notebook of the published profile in `scratch`, and compare all that it saves."""
    results = scratch / f"{chapter}.json"
    section = profiles.load("published").parameters(chapter, results_path=str(results))
    source = profiles.CLONE / "notebooks" / f"{chapter}.ipynb"
    runner.run_notebook(source, scratch, parameters=section.model_dump(), models={})
    run = json.loads(results.read_text(encoding="utf-8"))["results"]
    return compare.compare(of_chapter(kept, chapter), run)


SLICES: dict[str, Callable[[Numbers, Path], list[Row]]] = {
    "01_derivation": functools.partial(notebook, "01_derivation"),
    "02_mcmc": mcmc,
    "03_isotropy": isotropy,
    "04_llm_qa": llm_qa,
    "05_cost": cost,
    "06_your_model": functools.partial(notebook, "06_your_model"),
}


def _kept_record(job: Any) -> Any:
    """Return the posterior that is kept of a job. Raises ResultError where none is."""
    from isouq.studies.synthetic import atlas

    if (record := atlas.find(job, [atlas.COMMITTED])) is None:
        raise ResultError(f"{atlas.path(job, atlas.COMMITTED).name} is not kept: get it back with `git checkout`")
    return record


def _row(name: str, old: float, new: float, *, absolute: float = 0.0, relative: float = 0.0) -> Row:
    most = absolute + relative * max(1.0, abs(old))
    kind, agrees = "sampled" if absolute else "exact", abs(old - new) <= most
    return Row(name, kind, float(old), float(new), f"± {most:.2g}", bool(agrees))
