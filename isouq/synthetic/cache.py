"""Draws on disk, as ArviZ InferenceData (netCDF) with their seed, versions and diagnostics.

A file belongs to one problem, one set of settings and one state of the sampling code. Loading refuses any other,
and refuses draws that failed the gate.
"""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import arviz
import numpy as np

from isouq.synthetic import posterior as sampling
from isouq.synthetic import problems
from isouq.synthetic.posterior import Diagnostics, Posterior, Settings
from isouq.synthetic.problems import Problem

PACKAGES = ("arviz", "jax", "numpy", "numpyro")


class PosteriorError(ValueError):
    """A file of draws that is damaged, of another problem, or failed the gate."""


def versions() -> dict[str, str]:
    """Return the versions of what the draws depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def code_digest(*more: ModuleType) -> str:
    """Return 12 hex digits of the source that decides the draws, and of `more` modules."""
    digest = hashlib.sha256()
    for module in (problems, sampling, *more):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


def identity(problem: Problem, settings: Settings) -> dict[str, str]:
    """Return what a file must agree with to be taken for draws of `problem` under `settings`."""
    return {
        "problem": problem.fingerprint(),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "code": code_digest(),
    }


def path(folder: str | Path, problem: Problem, settings: Settings) -> Path:
    """Return where the draws of `problem` under `settings` are kept in `folder`."""
    key = hashlib.sha256(json.dumps(identity(problem, settings)).encode()).hexdigest()[:12]
    return Path(folder) / f"{problem.name}-{problem.seed}-{key}.nc"


def save(drawn: Posterior, file: str | Path) -> None:
    """Write the draws, also failed ones, which say so; the file appears whole or not at all."""
    file = Path(file)
    attributes = {
        **identity(drawn.problem, drawn.settings),
        "versions": json.dumps(versions()),
        "diagnostics": json.dumps(asdict(drawn.diagnostics)),
        "failures": "; ".join(drawn.diagnostics.failures),
    }
    statistics = {"diverging": drawn.divergent, "energy": drawn.energy, "n_steps": drawn.n_steps}
    data = arviz.from_dict(posterior={"theta": drawn.draws}, sample_stats=statistics)
    data.posterior.attrs.update(attributes)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    data.to_netcdf(str(partial), engine="h5netcdf")
    os.replace(partial, file)


def load(file: str | Path, problem: Problem, settings: Settings, *, allow_failed: bool = False) -> Posterior:
    """Read draws of `problem` under `settings`.

    Raises PosteriorError when the file is damaged, holds other draws than these, or draws that failed the gate
    (unless `allow_failed`).
    """
    file = Path(file)
    try:
        data = arviz.from_netcdf(str(file), engine="h5netcdf").load()
        found = data.posterior.attrs
        diagnostics = Diagnostics(**json.loads(found["diagnostics"]))
        statistics = data.sample_stats
        arrays = {name: statistics[name].to_numpy() for name in ("diverging", "energy", "n_steps")}
        draws = data.posterior["theta"].to_numpy()
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise PosteriorError(f"{file.name} is not a readable file of draws: {error}; delete it") from error
    for name, wanted in identity(problem, settings).items():
        if found.get(name) != wanted:
            raise PosteriorError(
                f"{file.name} holds draws of another {name}: {str(found.get(name))[:60]!r}, wanted "
                f"{wanted[:60]!r}; delete it or ask for what it holds"
            )
    if not diagnostics.passed and not allow_failed:
        raise PosteriorError(f"{file.name} holds draws that failed the gate: {'; '.join(diagnostics.failures)}")
    return Posterior(
        problem=problem,
        settings=settings,
        draws=draws,
        divergent=arrays["diverging"].astype(bool),
        energy=arrays["energy"],
        n_steps=arrays["n_steps"].astype(np.int64),
        diagnostics=diagnostics,
    )


def draw(problem: Problem, settings: Settings, folder: str | Path | None = None) -> Posterior:
    """Return the draws of `problem`: from `folder` if they are there, else sampled and, with a folder, kept.

    A posterior that failed the gate comes back too (`diagnostics.passed` is False): sampling again with the
    same seed would fail again.
    """
    if folder is None:
        return sampling.sample(problem, settings)
    file = path(folder, problem, settings)
    if file.is_file():
        return load(file, problem, settings, allow_failed=True)
    drawn = sampling.sample(problem, settings)
    save(drawn, file)
    return drawn
