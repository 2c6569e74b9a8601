"""Draws on disk, as ArviZ InferenceData (netCDF) with their seed, versions and diagnostics.

A file belongs to one problem, one set of settings and one version of the sampler. Loading refuses files of others and
draws that changed on the disk.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import arviz
import numpy as np

from isouq.studies.identity import digest, versions
from isouq.studies.synthetic import posterior as sampling
from isouq.studies.synthetic.posterior import Diagnostics, Posterior, Settings
from isouq.studies.synthetic.problems import Problem

PACKAGES = ("arviz", "jax", "numpy", "numpyro")  # that the draws depend on


class PosteriorError(ValueError):
    """A file of draws that is damaged or of another problem."""


def identity(problem: Problem, settings: Settings) -> dict[str, str]:
    """Return the attributes that a file of draws of `problem` under `settings` must have."""
    return {
        "problem": problem.fingerprint(),
        "settings": json.dumps(settings.identity(), sort_keys=True),
        "version": str(sampling.VERSION),
    }


def path(folder: str | Path, problem: Problem, settings: Settings) -> Path:
    """Return where the draws of `problem` under `settings` are kept in `folder`."""
    return Path(folder) / f"{problem.name}-{problem.seed}-{digest(identity(problem, settings))}.nc"


def save(drawn: Posterior, file: Path) -> None:
    """Write the draws with their diagnostics; the file appears whole or not at all."""
    attributes = {
        **identity(drawn.problem, drawn.settings),
        "content": _content(drawn),
        "versions": json.dumps(versions(*PACKAGES)),
        "diagnostics": json.dumps(asdict(drawn.diagnostics)),
    }
    statistics = {"diverging": drawn.divergent, "energy": drawn.energy, "n_steps": drawn.n_steps}
    data = arviz.from_dict(posterior={"theta": drawn.draws}, sample_stats=statistics)
    data.posterior.attrs.update(attributes)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    data.to_netcdf(str(partial), engine="h5netcdf")
    os.replace(partial, file)


def load(file: Path, problem: Problem, settings: Settings) -> Posterior:
    """Read draws of `problem` under `settings`. Raises PosteriorError when the file is damaged or holds other draws."""
    try:
        data = arviz.from_netcdf(str(file), engine="h5netcdf").load()
        attributes, statistics = data.posterior.attrs, data.sample_stats
        drawn = Posterior(
            problem=problem,
            settings=settings,
            draws=data.posterior["theta"].to_numpy(),
            divergent=statistics["diverging"].to_numpy().astype(bool),
            energy=statistics["energy"].to_numpy(),
            n_steps=statistics["n_steps"].to_numpy().astype(np.int64),
            diagnostics=Diagnostics(**json.loads(attributes["diagnostics"])),
        )
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise PosteriorError(f"{file} is not a readable file of draws: {error}; delete it") from error
    for name, wanted in identity(problem, settings).items():
        if (given := attributes.get(name)) != wanted:
            which = f"{str(given)[:60]!r}, wanted {wanted[:60]!r}"
            raise PosteriorError(f"{file} holds draws of another {name}: {which}; delete it or ask for what it holds")
    if attributes.get("content") != _content(drawn):
        raise PosteriorError(f"{file} does not hold the draws that were written to it; delete it")
    return drawn


def _content(drawn: Posterior) -> str:
    """Return 12 hex digits of all arrays, with their shapes, and of the diagnostics."""
    arrays = (drawn.draws, drawn.divergent, drawn.energy, drawn.n_steps.astype(np.int64))
    hashes = [[array.shape, hashlib.sha256(array.tobytes()).hexdigest()] for array in arrays]
    return digest([hashes, json.dumps(asdict(drawn.diagnostics))])


def draw(problem: Problem, settings: Settings, folder: str | Path | None = None) -> Posterior:
    """Return the draws of `problem`: from `folder` if they are there, else sampled and, with a folder, kept.

    A posterior that failed the gate is returned too (`diagnostics.passed` is False), since sampling again with the
    same seed would fail again.
    """
    if folder is None:
        return sampling.sample(problem, settings)
    file = path(folder, problem, settings)
    if file.exists():
        return load(file, problem, settings)
    drawn = sampling.sample(problem, settings)
    save(drawn, file)
    return drawn
