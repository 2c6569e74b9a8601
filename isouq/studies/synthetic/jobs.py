"""One job: a problem, a data seed and a network; its reference, its estimates and how they correlate.

`analyse` returns the arrays for figures. `record` is the small JSON that a job leaves behind, so that a study of
hundreds of jobs resumes on any machine. `run_all` runs the jobs that have no record yet, several at a time.
"""

import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from tqdm import tqdm

from isouq.studies import require
from isouq.studies.evaluation import Interval, UndefinedStatisticError, pearson, spearman
from isouq.studies.identity import digest, versions
from isouq.studies.synthetic import cache, point, posterior, problems
from isouq.studies.synthetic.posterior import Posterior, Reference, Settings
from isouq.studies.synthetic.problems import Problem
from isouq.studies.verdicts import fisher_z

PER_PROCESS = 50  # jobs; jax keeps all that it compiles, and a process crashed after 130 jobs
LARGEST_HESSIAN = 600  # parameters; larger networks have no estimate of the Laplace family
COMMITTED = Path(__file__).resolve().parents[3] / "results" / "published" / "mcmc"


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The arrays behind a job's record; those of `estimates` are (point,)."""

    job: Job
    problem: Problem
    best: point.Point
    classes: np.ndarray
    posterior: Posterior
    reference: Reference
    estimates: dict[str, np.ndarray]


def analyse(job: Job, folder: str | Path | None = None) -> Case:
    """Sample (or load from `folder`) the posterior of a job and compute every estimate at its grid."""
    problem = job.make()
    best = point.find_map(problem, n_starts=job.n_starts, seed=job.seed)
    classes = point.predicted_classes(problem, best.theta)
    drawn = cache.draw(problem, job.settings, folder)
    large = problem.model.network.n_parameters > LARGEST_HESSIAN
    estimates = point.estimates(problem, best.theta, classes, laplace=not large)
    # These two need the posterior's draws; they tell the approximations apart.
    g = point.gradients(problem, best.theta, classes)
    estimates["delta"] = (drawn.draws.reshape(-1, g.shape[1]) @ g.T).var(axis=0)
    thetas = drawn.draws[:, :: max(1, drawn.draws.shape[1] // 4)].reshape(-1, g.shape[1])[:16]
    at_draws = [np.square(point.gradients(problem, theta, classes)).sum(axis=1) for theta in thetas]
    estimates["gn_draws"] = np.mean(at_draws, axis=0)
    return Case(
        job=job,
        problem=problem,
        best=best,
        classes=classes,
        posterior=drawn,
        reference=posterior.reference(drawn, classes),
        estimates=estimates,
    )


def correlations(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> dict[str, float | None]:
    """Return Pearson's r and Spearman's ρ over the points `where`; None where one side is constant."""
    where = np.ones(np.shape(a), dtype=bool) if where is None else require.labels("where", where)
    require.same_rows(a=a, b=b, where=where)
    values: dict[str, float | None] = {}
    for name, statistic in (("pearson", pearson), ("spearman", spearman)):
        try:
            values[name] = statistic(a[where], b[where])
        except UndefinedStatisticError:
            values[name] = None
    return values


def record(case: Case) -> dict[str, Any]:
    """Return the result of a job without arrays: correlations, noise ceiling, scale and diagnostics.

    `at_best`: the share of searches that ended within 0.1 nats of the best.
    `scale`: the geometric mean of Var[p]/‖g‖², the σ² that suits the grid best, and the ratio of the 95 % quantile of
    Var[p]/‖g‖² to its 5 % quantile: 1 would mean that one σ² serves all inputs.
    """
    reference, near = case.reference, case.problem.near_data()
    diagnostics = case.posterior.diagnostics
    targets, ceiling = dict.fromkeys(case.estimates, reference.variance), {"epistemic": correlations(*reference.halves)}
    if reference.aleatoric is not None and reference.aleatoric_halves is not None:
        targets["aleatoric"] = reference.aleatoric
        ceiling["aleatoric"] = correlations(*reference.aleatoric_halves)
    pairs = {name: (value, targets[name]) for name, value in case.estimates.items()}
    best, lowest = case.best, case.best.energies < case.best.energy + 0.1
    return {
        "job": asdict(case.job),
        "n_parameters": case.problem.model.network.n_parameters,
        "n_examples": len(case.problem.inputs),
        "passed": diagnostics.passed,
        "failures": list(diagnostics.failures),
        "diagnostics": asdict(diagnostics),
        "map": {"energy": best.energy, "gradient_norm": best.gradient_norm, "at_best": float(lowest.mean())},
        "correlation": {name: correlations(*pair) for name, pair in pairs.items()},
        "correlation_near_data": {name: correlations(*pair, where=near) for name, pair in pairs.items()},
        "ceiling": ceiling,
        "scale": _scale(reference.variance, case.estimates["gn"]),
        "between_share": float((reference.between / reference.variance).max()),
        "relative_mcse": float(np.median(reference.mcse / reference.variance)),
        "isotropy": posterior.isotropy(case.posterior.draws),
        "version": posterior.VERSION,
        "versions": versions(*cache.PACKAGES),
    }


def _scale(variance: np.ndarray, squared_norm: np.ndarray) -> dict[str, float] | None:
    if not (squared_norm > 0).all():
        return None  # a constant network: no σ² gives its variance
    ratio = variance / squared_norm
    low, high = np.quantile(ratio, [0.05, 0.95])
    return {"sigma2": float(np.exp(np.log(ratio).mean())), "spread": float(high / low)}


def find(job: Job, folders: Iterable[str | Path]) -> dict[str, Any] | None:
    """Return the job's record from the first of `folders` that has it, or None.

    A record of another `posterior.VERSION` does not count. Raises ValueError for a file that cannot be read, that was
    changed after it was written, or that holds another job.
    """
    name = job.file()
    for file in (Path(folder) / name for folder in folders):
        if file.exists() and (stored := _read(file)).get("version") == posterior.VERSION:
            return stored
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("content") != digest({name: value for name, value in stored.items() if name != "content"}):
            raise ValueError("its content is not what was written")
        own = Job(**{**stored["job"], "settings": Settings(**stored["job"]["settings"])}).file()
        if own != file.name:
            raise ValueError(f"it belongs to {own}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "delete it, and the job runs again; a committed one comes back with `git checkout`"
        raise ValueError(f"{file} is not a record of a job, or not of this one ({error}); {advice}") from error
    return stored


def run(job: Job, folder: str | Path, draws: str | Path | None = None) -> dict[str, Any]:
    """Run one job and leave its record in `folder`; the file appears whole or not at all.

    `cpu_seconds` is the processor time of the job, compilation included.
    """
    begun = time.process_time()
    content = record(analyse(job, draws))
    content = rounded({**content, "cpu_seconds": time.process_time() - begun})
    content["content"] = digest(content)
    file = Path(folder) / job.file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return content


def rounded(value: Any) -> Any:
    """Return a record's content with floats of six digits, and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def run_all(
    jobs: Sequence[Job],
    folder: str | Path,
    *,
    draws: str | Path | None = None,
    also: Sequence[str | Path] = (),
    n_workers: int = 2,
    compiled: str | Path | None = None,
    study: ModuleType | None = None,
) -> list[Any]:
    """Return the records of all jobs, in order, running those that neither `folder` nor `also` has.

    `study` is the module whose `find` and `run` make the records: this one, or ``atlas``. Every job is checked before
    the first one runs. Jobs start in the order given, so that a stopped study has done the first ones. Processes share
    what they compile through the folder `compiled`.
    """
    study = study or sys.modules[__name__]
    records = [study.find(job, [folder, *also]) for job in jobs]
    missing = [i for i, record in enumerate(records) if record is None]
    n_workers = min(require.count("n_workers", n_workers), max(1, len(missing)))
    context = multiprocessing.get_context("spawn")  # jax has threads: a forked child would hang
    share = n_workers * PER_PROCESS
    with tqdm(total=len(missing), desc="posteriors", mininterval=5, disable=not missing) as bar:
        for start in range(0, len(missing), share):
            with concurrent.futures.ProcessPoolExecutor(n_workers, context, _keep_compiled, (compiled,)) as pool:
                waiting = {pool.submit(study.run, jobs[i], folder, draws): i for i in missing[start : start + share]}
                for future in concurrent.futures.as_completed(waiting):
                    records[waiting[future]] = future.result()
                    bar.update()
    return [record for record in records if record is not None]


def _keep_compiled(folder: str | Path | None) -> None:
    """Share what jax compiles with other processes through `folder`."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def mean_interval(values: ArrayLike) -> Interval | None:
    """Return the mean of correlations by Fisher's z with its 95 % t-interval; None for fewer than two.

    Raises ValueError for values that are no correlations.
    """
    z = fisher_z(require.numbers("values", values, least=0))
    if len(z) < 2:
        return None
    reach = float(stats.t.ppf(0.975, len(z) - 1) * stats.sem(z))
    value, low, high = np.tanh(z.mean() + np.array([0.0, -reach, reach]))
    return Interval(float(value), float(low), float(high), len(z))


def trend(doublings: ArrayLike, values: ArrayLike, group: ArrayLike, *, seed: int = 0) -> Interval:
    """Return the slope of `values` per doubling of the width, with its 95 % bootstrap interval over groups.

    A group is one problem with one data seed. It is resampled as a whole and has its own intercept, so that only
    changes with size within a group count. Raises ValueError for fewer than two groups of two sizes.
    """
    require.same_rows(doublings=doublings, values=values, group=group)
    doublings, values = require.numbers("doublings", doublings), require.numbers("values", values)
    codes, parts = require.groups("group", group), []
    for code in np.unique(codes):
        x, y = doublings[codes == code], values[codes == code]
        if np.ptp(x) > 0:  # one size alone says nothing of a trend
            parts.append((np.sum((x - x.mean()) * (y - y.mean())), np.sum(np.square(x - x.mean()))))
    if len(parts) < 2:
        raise ValueError(f"group: {len(parts)} with more than one size given, at least 2 wanted")
    sums = np.array(parts)
    rows = np.random.default_rng(require.seed("seed", seed)).integers(0, len(sums), (2000, len(sums)))
    again = sums[rows].sum(axis=1)
    low, high = np.quantile(again[:, 0] / again[:, 1], [0.025, 0.975])
    slope = sums[:, 0].sum() / sums[:, 1].sum()
    return Interval(float(slope), float(low), float(high), len(values))
