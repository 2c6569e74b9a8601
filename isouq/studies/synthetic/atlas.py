"""The atlas: in which settings of a small network does ‖g‖² follow the variance of its posterior?

A cell is a problem with an activation, a width, a prior and a design of the data; a posterior is a cell with a data
seed. Each leaves a record: the fields over the grid, every θ*, 16 draws and the diagnostics, so that a later question
needs no new sampling. `table` turns records into correlations.
"""

import concurrent.futures
import hashlib
import io
import json
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from isouq.studies import require
from isouq.studies.evaluation import pearson, spearman
from isouq.studies.identity import digest, versions
from isouq.studies.synthetic import modes, point, posterior
from isouq.studies.synthetic.plan import Job, cell
from isouq.studies.synthetic.posterior import Settings

VERSION = 1  # of what a record holds beyond posterior.VERSION: the three θ* and their fields
COMMITTED = Path(__file__).resolve().parents[3] / "results" / "published" / "atlas"  # the project's own records
PER_PROCESS = 50  # jobs; jax keeps all that it compiles, and a process crashed after 130 jobs
PACKAGES = ("jax", "numpy", "numpyro")  # that the draws depend on
REGIONS = ("whole", "near", "far")
CONSTANT = 1e-6  # of a field's largest value; float32, in which fields are kept, rounds at 6e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One posterior: its job, its facts (diagnostics, θ* and who is admitted) and its `fields`, float32.

    mean, variance, mcse, aleatoric (point,); halves, aleatoric_halves (2, point); classes (point,): whose probability
    is meant, those that the trained network predicts. gn (theta, point): ‖g‖² at every θ*. Of the trained network and
    the MAP: p, la (NaN where the Hessian is not positive definite) and gn_prior, ‖Sg‖² with the prior's scales S,
    each (2, point). gn_draws (point,): the mean over the draws. mode_… (point,): see ``modes.steps``. thetas and draws
    (…, param).
    """

    job: Job
    facts: dict[str, Any]
    fields: dict[str, np.ndarray]


def analyse(job: Job) -> Record:
    """Sample the posterior of a job and compute all that its record holds."""
    problem = job.make()
    drawn = posterior.sample(problem, job.settings)
    thetas = modes.find(problem, drawn.draws, n_starts=job.n_starts, seed=job.seed)
    classes = point.predicted_classes(problem, thetas.points[0])

    def squares(theta: np.ndarray, scales: np.ndarray | float = 1.0) -> np.ndarray:
        return np.square(point.gradients(problem, theta, classes) * scales).sum(axis=1)

    own, n = thetas.points[:2], len(problem.grid)
    of_own = [point.laplace(problem, theta, classes) for theta in own]
    usable = thetas.admitted & (np.array(thetas.kinds) == "mode")
    fields = {
        **posterior.reference(drawn, classes),
        "gn": np.stack([squares(theta) for theta in thetas.points]),
        "p": np.stack([point.probabilities(problem, theta, classes) for theta in own]),
        "la": np.stack([np.full(n, np.nan) if la is None else la for la in of_own]),
        "gn_prior": np.stack([squares(theta, problem.model.scales()) for theta in own]),
        "gn_draws": np.mean([squares(theta) for theta in thetas.draws], axis=0),
        **modes.steps(problem, drawn.draws, thetas.points[usable], classes),
        "thetas": thetas.points,
        "draws": thetas.draws,
    }
    facts = {
        "passed": drawn.diagnostics.passed,
        "failures": list(drawn.diagnostics.failures),
        "diagnostics": asdict(drawn.diagnostics),
        "kinds": list(thetas.kinds),
        "admitted": thetas.admitted.tolist(),
        "loss": thetas.loss.tolist(),
        "gradient_norm": thetas.gradient_norm.tolist(),
        "constant_loss": modes.constant_loss(problem),
        "isotropy": posterior.isotropy(drawn.draws),
    }
    kept = {name: values.astype(np.float32) for name, values in fields.items()}
    return Record(job=job, facts=facts, fields=kept | {"classes": classes.astype(np.uint8)})


def run(job: Job, folder: str | Path) -> Record:
    """Run one job and leave its record in `folder`; the file appears whole or not at all."""
    begun = time.process_time()
    found = analyse(job)
    facts = found.facts | {"cpu_seconds": time.process_time() - begun, "versions": versions(*PACKAGES)}
    facts |= {"job": asdict(job), "version": [posterior.VERSION, VERSION]}
    facts = _rounded(facts)
    facts["content"] = _content(facts, found.fields)
    file = path(job, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts, sort_keys=True)), **found.fields}
    np.savez_compressed(buffer, **arrays)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, file)
    return Record(job=job, facts=facts, fields=found.fields)


def run_all(
    jobs: Sequence[Job],
    folder: str | Path,
    *,
    also: Sequence[str | Path] = (),
    n_workers: int = 2,
    compiled: str | Path | None = None,
) -> list[Record]:
    """Return the records of all jobs, in order, running those that neither `folder` nor `also` has.

    Every job is checked before the first one runs. Jobs start in the order given, so that a stopped study has done the
    first ones, and resumes on any machine. Processes share what they compile through the folder `compiled`.
    """
    records = [find(job, [folder, *also]) for job in jobs]
    missing = [i for i, record in enumerate(records) if record is None]
    n_workers = min(require.count("n_workers", n_workers), max(1, len(missing)))
    context = multiprocessing.get_context("spawn")  # jax has threads: a forked child would hang
    share = n_workers * PER_PROCESS
    with tqdm(total=len(missing), desc="posteriors", mininterval=5, disable=not missing) as bar:
        for start in range(0, len(missing), share):
            with concurrent.futures.ProcessPoolExecutor(n_workers, context, _keep_compiled, (compiled,)) as pool:
                waiting = {pool.submit(run, jobs[i], folder): i for i in missing[start : start + share]}
                for future in concurrent.futures.as_completed(waiting):
                    records[waiting[future]] = future.result()
                    bar.update()
    return [record for record in records if record is not None]


def _keep_compiled(folder: str | Path | None) -> None:
    """Share what jax compiles with other processes through `folder`."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _rounded(value: Any) -> Any:
    """Return facts with floats of six digits, and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def path(job: Job, folder: str | Path) -> Path:
    """Return where the record of a job is kept in `folder`."""
    return Path(folder) / job.file()


def find(job: Job, folders: Iterable[str | Path]) -> Record | None:
    """Return the job's record from the first of `folders` that has one of this version, or None.

    Raises ValueError for a file that cannot be read, that was changed, or that holds another job.
    """
    for file in (path(job, folder) for folder in folders):
        if not file.exists():
            continue
        try:
            with np.load(file, allow_pickle=False) as stored:
                fields = {name: stored[name] for name in stored.files if name != "facts"}
                facts = json.loads(str(stored["facts"]))
            given = Job(**{**facts["job"], "settings": Settings(**facts["job"]["settings"])})
            if facts["content"] != _content(facts, fields) or given.file() != job.file():
                raise ValueError("it holds another job, or was changed")
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
            advice = "delete it, and the job runs again; a committed one comes back with `git checkout`"
            raise ValueError(f"{file} is not the record of this posterior ({error}); {advice}") from error
        if facts["version"] == [posterior.VERSION, VERSION]:
            return Record(job=job, facts=facts, fields=fields)
    return None


def local_mode(record: Record) -> np.ndarray:
    """Return the mode θ* (param,) that the record's fields mode_… belong to: the one whose ‖g‖² is `mode_gn`.

    Raises ValueError for a record that has no draws around a mode, or none of whose modes has that norm.
    """
    name, fields = record.job.file(), record.fields
    if "mode_gn" not in fields:
        raise ValueError(f"{name}: no mode has enough draws around it for a covariance")
    places = np.flatnonzero(np.array(record.facts["kinds"]) == "mode")
    away = np.abs(fields["gn"][places] / fields["mode_gn"] - 1).max(axis=1)
    if away.min() > 1e-3:
        raise ValueError(f"{name}: none of its modes has the ‖g‖² of `mode_gn` (nearest: {away.min():.1e} away)")
    return fields["thetas"][places[away.argmin()]].astype(float)


def _content(facts: dict[str, Any], fields: dict[str, np.ndarray]) -> str:
    plain = {name: value for name, value in facts.items() if name != "content"}
    hashes = {n: [str(v.dtype), v.shape, hashlib.sha256(v.tobytes()).hexdigest()] for n, v in fields.items()}
    return digest([plain, sorted(hashes.items())])


def table(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per posterior, θ*, measure and region, with the correlations with MCMC.

    Columns: FACTORS, seed, passed; point (trained, mode, map, draws or posterior), measure, region, pearson, spearman
    (NaN where the θ* is not admitted or one side is constant) and admitted, the share of the θ* of this kind. `mode`
    is the median over the admitted modes. The measure `reliability` is one half of the chains against the other: a
    perfect estimate reaches its square root.
    """
    rows = [row for one in records for row in _rows(one)]
    return pd.DataFrame(rows).astype({"pearson": float, "spearman": float})


def _rows(one: Record) -> list[dict[str, Any]]:
    problem, fields = one.job.make(), {name: values.astype(float) for name, values in one.fields.items()}
    near, admitted = problem.near_data(), np.array(one.facts["admitted"])
    where = dict(zip(REGIONS, (np.ones(len(near), dtype=bool), near, ~near), strict=True))
    own = {**cell(one.job), "seed": one.job.seed, "passed": one.facts["passed"]}
    rows = []
    for kind, measure, estimates, target, share in _measures(fields, np.array(one.facts["kinds"]), admitted):
        for region, points in where.items():
            values = [correlation(estimate[points], target[points]) for estimate in estimates]
            middle = np.nanmedian(values, axis=0) if np.isfinite(values).any() else (np.nan, np.nan)
            names = {"point": kind, "measure": measure, "region": region, "admitted": share}
            rows.append({**own, **names, "pearson": middle[0], "spearman": middle[1]})
    return rows


def _measures(fields: dict[str, np.ndarray], kinds: np.ndarray, admitted: np.ndarray) -> Iterable[tuple]:
    """Yield (point, measure, [admitted estimates (point,)], target (point,), share admitted)."""
    variance, with_classes = fields["variance"], "aleatoric" in fields
    for kind in ("trained", "mode", "map"):
        of_kind = kinds == kind
        yield kind, "gn", fields["gn"][of_kind & admitted], variance, admitted[of_kind].mean()
    for row, kind in enumerate(("trained", "map")):
        use = slice(row, row + 1 if admitted[row] else row)
        for name in ("gn_prior", "la"):
            yield kind, name, fields[name][use], variance, float(admitted[row])
        if with_classes:
            p = fields["p"][use]
            yield kind, "aleatoric", p * (1 - p), fields["aleatoric"], float(admitted[row])
    yield "draws", "gn", fields["gn_draws"][None], variance, 1.0
    for name in ("mode_gn", "mode_taylor", "mode_isotropic", "mode_variance"):
        if name in fields:
            yield "mode", name, fields[name][None], variance, 1.0
    yield "posterior", "reliability", fields["halves"][:1], fields["halves"][1], 1.0
    if with_classes:
        halves = fields["aleatoric_halves"]
        yield "posterior", "aleatoric_reliability", halves[:1], halves[1], 1.0


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return Pearson's r and Spearman's ρ; NaN where a side varies by less than CONSTANT of its largest value."""
    require.same_rows(a=a, b=b)
    flat = len(a) < 3 or any(not np.ptp(side) > CONSTANT * np.abs(side).max() for side in (a, b))
    return (np.nan, np.nan) if flat else (pearson(a, b), spearman(a, b))
