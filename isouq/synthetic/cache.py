"""Draws on disk, as ArviZ InferenceData (netCDF) with their seed, versions and diagnostics.

A file belongs to one problem, one set of settings and one state of the sampling code. Loading refuses any other,
and refuses draws that failed the gate.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path

import arviz
import numpy as np

from isouq.synthetic import posterior as sampling
from isouq.synthetic.posterior import Diagnostics, Posterior, Settings
from isouq.synthetic.problems import Problem

PACKAGES = ("arviz", "jax", "numpy", "numpyro")
HERE = Path(__file__).parent
SOURCES = [HERE / f"{name}.py" for name in ("problems", "posterior", "point", "jobs")] + [HERE.parent / "evaluation.py"]
IN_FINGERPRINT = {"SPECS"}  # what it makes is known to the last number, so a problem more changes nothing


class PosteriorError(ValueError):
    """A file of draws that is damaged, of another problem, or failed the gate."""


def versions() -> dict[str, str]:
    """Return the versions of what the draws depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def code_digest(*roots: str) -> str:
    """Return 12 hex digits of the source that decides what the functions `roots` return.

    It covers every definition of SOURCES that the roots name, directly or through others, without docstrings,
    comments and blank lines. What they do not reach (figures, other estimates, the rest of isouq) does not count;
    nor do versions of libraries, whose draws differ by Monte Carlo error only and which are recorded beside.
    """
    text = "\n".join(definitions()[name][0] for name in sorted(reached(*roots)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def reached(*roots: str) -> set[str]:
    """Return the names of the definitions that `roots` mention, directly or through others, and their own."""
    source, waiting = definitions(), list(roots)
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in source and name not in found | IN_FINGERPRINT:
            found.add(name)
            waiting += source[name][1]
    return found


@functools.cache
def definitions() -> dict[str, tuple[str, set[str]]]:
    """Return, for each top-level definition of SOURCES, its lines of code and the names it mentions."""
    found: dict[str, tuple[str, set[str]]] = {}
    for file in SOURCES:
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            mentioned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            mentioned |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            for name in names:
                text, more = found.get(name, ("", set()))  # two modules may use one name
                found[name] = (text + _code(node, lines), more | mentioned)
    return found


def _code(node: ast.stmt, lines: list[str]) -> str:
    # The file's own text and not ast.unparse, whose output differs from one Python to another.
    docstrings: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            docstrings.update(range(part.body[0].lineno, (part.body[0].end_lineno or 0) + 1))
    first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
    numbered = enumerate(lines[first - 1 : node.end_lineno], first)
    kept = [line.rstrip() for number, line in numbered if number not in docstrings]
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))


def identity(problem: Problem, settings: Settings) -> dict[str, str]:
    """Return what a file must agree with to be taken for draws of `problem` under `settings`."""
    return {
        "problem": problem.fingerprint(),
        "settings": json.dumps(settings.identity(), sort_keys=True),
        "code": code_digest("sample"),
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
