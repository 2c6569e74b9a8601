"""One job: a problem, a data seed and a network, and how its posterior is sampled.

Each leaves a record, so that a study of hundreds of jobs resumes on any machine. `run_all` runs the jobs that have no
record yet, several at a time.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from tqdm import tqdm

from isouq.studies import require
from isouq.studies.identity import digest
from isouq.studies.synthetic import problems
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Problem

PER_PROCESS = 50  # jobs; jax keeps all that it compiles, and a process crashed after 130 jobs
COMMITTED = (
    Path(__file__).resolve().parents[3] / "results" / "published" / "atlas"
)  # where the project's own records are


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to sample and how; fields left None take the values of the problem's ``spec``."""

    problem: str
    seed: int = 0
    width: int | None = None
    depth: int | None = None
    activation: str | None = None
    prior_scale: float | None = None
    prior_scaling: str | None = None
    n_examples: int | None = None
    gap: bool | None = None
    resolution: int | None = None
    n_starts: int = 16
    settings: Settings = field(default_factory=Settings)

    def make(self) -> Problem:
        """Make the problem. Raises ValueError for unknown or impossible settings, before anything is sampled."""
        require.count("n_starts", self.n_starts)
        model = problems.spec(self.problem).model
        network = replace(model.network, **self._given("width", "depth", "activation"))
        model = replace(model, network=network, **self._given("prior_scale", "prior_scaling"))
        data = {name: getattr(self, name) for name in ("seed", "n_examples", "resolution", "gap")}
        problem = problems.make(self.problem, model=model, **data)
        self.settings.require_memory(problem)
        return problem

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def file(self) -> str:
        """Return the name of the job's record: readable, and unique to the data, the model and the settings."""
        problem = self.make()
        network = problem.model.network
        key = digest([problem.fingerprint(), self.settings.identity(), self.n_starts])[:8]
        size = f"w{network.width}-d{network.depth}-{network.activation}-{problem.model.prior_scaling}"
        return f"{self.problem}-{size}-n{len(problem.inputs)}-s{self.seed}-{key}.json"


def run_all(
    jobs: Sequence[Job],
    folder: str | Path,
    *,
    study: ModuleType,
    also: Sequence[str | Path] = (),
    n_workers: int = 2,
    compiled: str | Path | None = None,
) -> list[Any]:
    """Return the records of all jobs, in order, running those that neither `folder` nor `also` has.

    `study` is the module whose `find` and `run` make the records: ``atlas``, which imports this one. Every job is
    checked before the first one runs. Jobs start in the order given, so that a stopped study has done the first ones.
    Processes share what they compile through the folder `compiled`.
    """
    records = [study.find(job, [folder, *also]) for job in jobs]
    missing = [i for i, record in enumerate(records) if record is None]
    n_workers = min(require.count("n_workers", n_workers), max(1, len(missing)))
    context = multiprocessing.get_context("spawn")  # jax has threads: a forked child would hang
    share = n_workers * PER_PROCESS
    with tqdm(total=len(missing), desc="posteriors", mininterval=5, disable=not missing) as bar:
        for start in range(0, len(missing), share):
            with concurrent.futures.ProcessPoolExecutor(n_workers, context, _keep_compiled, (compiled,)) as pool:
                waiting = {pool.submit(study.run, jobs[i], folder): i for i in missing[start : start + share]}
                for future in concurrent.futures.as_completed(waiting):
                    records[waiting[future]] = future.result()
                    bar.update()
    return [record for record in records if record is not None]


def _keep_compiled(folder: str | Path | None) -> None:
    """Share what jax compiles with other processes through `folder`."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
