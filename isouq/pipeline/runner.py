"""Run one notebook and record what ran, on what, from what; join the results of all."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from isouq.studies.assets import manifest
from isouq.studies.identity import PACKAGE, module_files
from isouq.studies.results import Result, ResultError, check_key, key_of, plain, write_json

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(RuntimeError):
    """A notebook that did not run to its end, with the traceback of its own code and the cause last."""


def run_notebook(source: Path, build: Path, *, parameters: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Execute a notebook with papermill in this interpreter's own kernel, keep the copy, and record what ran.

    The copy goes to `build/notebooks`, the record to `build/records`, with `models`: name to content or commit. A copy
    that fails goes to `build/failed` instead, its traceback beside it as text.

    Raises:
        NotebookError: a cell raised, the kernel died, or the notebook did not write `results_path`.
    """
    import papermill  # of the pipeline's extra, which who only saves results does not need

    output, kept = (build / folder / source.name for folder in ("notebooks", "failed"))
    for path in (output, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (kept, kept.with_suffix(".txt"), results := Path(parameters["results_path"])):
        stale.unlink(missing_ok=True)
    inputs = [source, *module_files(source), manifest.FILE, PACKAGE.parent / "requirements.lock"]
    run = {"notebook": source.stem, "started": now(), "parameters": _without_places(parameters), **environment()}
    hashes = {"inputs": _hashes(inputs), "models": {key_of(name): content for name, content in models.items()}}
    partial = output.with_suffix(".running.ipynb")
    # The kernel's own warnings are about its transport, not about the notebook.
    kernel = {"kernel_name": "python3", "language": "python", "kernel_manager_class": _own_kernel()}
    kernel["extra_arguments"] = ["--IPKernelApp.log_level=40"]
    try:
        executed = papermill.execute_notebook(str(source), str(partial), dict(parameters), cwd=".", **kernel)
        python = f"{platform.python_implementation()} {executed.metadata['language_info']['version']}"
        run["kernel"] = {"python": python, "ipykernel": importlib.metadata.version("ipykernel")}
        if not results.is_file():
            raise NotebookError("it ran to its end without save_results(..., results_path)")
    except Exception as error:  # whatever it was: keep the copy, pass on the cause
        message = _failure(error, source, kept)
        kept.with_suffix(".txt").write_text(message + "\n", encoding="utf-8")
        if partial.exists():
            os.replace(partial, kept)
        raise NotebookError(message) from None
    os.replace(partial, output)
    write_json({**run, **hashes, "outputs": _hashes([output, results])}, build / "records" / f"{source.stem}.json")


def _own_kernel() -> type:
    """Return a manager of kernels that starts this interpreter's own, whatever `python3` is on JUPYTER_PATH."""
    from jupyter_client import kernelspec, manager

    specs = kernelspec.KernelSpecManager(kernel_dirs=[])
    return type("OwnKernel", (manager.AsyncKernelManager,), {"_kernel_spec_manager_default": lambda self: specs})


def _without_places(parameters: Mapping[str, Any]) -> Any:
    """Return parameters for the record: of a path outside the project only its name."""
    return json.loads(re.sub(r'"[/~][^"]*?([^"/]*)/*"', r'".../\1"', json.dumps(parameters)))


def collect(
    results: Sequence[Path], out: Path, *, profile: str, records: Sequence[Path], timings: Sequence[Path]
) -> None:
    """Join the notebooks' named results into `results.json`, with the record of the run as its `meta`.

    `timings` are Snakemake's benchmark tables, one a job: seconds and peak memory. What a notebook's record
    (`meta.runs`) shares with the whole, such as the commit, is not said twice.

    Raises:
        ResultError: a key that two notebooks write, or an entry that `Result` refuses.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in results:
        for key, entry in _read_json(path)["results"].items():
            check_key(key)
            if key in origin:
                raise ResultError(f"{key} is written by {origin[key]} and by {path.stem}")
            origin[key], merged[key] = path.stem, plain(Result(**entry))
    runs = {run.pop("notebook"): run for run in map(_read_json, records)}
    measured = {path.stem: timing(path) for path in timings}
    meta = {
        "profile": profile,
        "created": now(),
        **environment(),
        "seeds": {name: run["parameters"]["seed"] for name, run in runs.items()},
        "durations": {name: seconds for name, (seconds, _) in measured.items()},
        "peak_memory_mb": {name: peak for name, (_, peak) in measured.items()},
    }
    own = {name: {k: v for k, v in run.items() if k not in meta or meta[k] != v} for name, run in runs.items()}
    write_json({"meta": {**meta, "runs": own}, "results": dict(sorted(merged.items()))}, out)


def environment() -> dict[str, Any]:
    """Return what a run depends on besides its inputs: commit, versions, hardware; no host name, no path."""
    status = _git("status", "--porcelain") if _is_own_repository() else None
    return {
        "commit": None if status is None else _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "system": platform.system(),
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _failure(error: Exception, source: Path, kept: Path) -> str:
    """Return what a reader needs: which notebook, its own traceback without colours, the cause in the end."""
    trace = getattr(error, "traceback", None)  # a cell's own, of papermill's PapermillExecutionError
    cause = ANSI.sub("", "\n".join(trace)) if trace else f"{type(error).__name__}: {error}"
    return f"{source.as_posix()} failed; the executed part is {kept.as_posix()}\n{cause}"


def timing(path: Path) -> tuple[float, float | None]:
    """Return seconds and peak resident megabytes (None: too short to be seen) of a benchmark table."""
    job = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
    return float(job["s"]), None if pd.isna(job["max_rss"]) else float(job["max_rss"])


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file under its name relative to the project."""
    return {
        Path(os.path.relpath(file, PACKAGE.parent)).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def now() -> str:
    """Return the time as a record has it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _is_own_repository() -> bool:
    """Whether git keeps isouq here as its own project, not as a part of a user's: installed, vendored or copied."""
    own = ("isouq/pipeline/runner.py", "CITATION.cff", "profiles/published.yml")  # what a package or a copy of it lacks
    return _git("ls-files", "--error-unmatch", *own) is not None and _git("rev-parse", "--show-prefix") == ""


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder above the package, or None where there is no git or no repository."""
    # Without what a hook or a user has set: GIT_DIR and its like name another repository.
    plain = {name: v for name, v in os.environ.items() if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")}
    options: dict[str, Any] = {"cwd": PACKAGE.parent, "env": plain, "capture_output": True, "text": True, "check": True}
    try:
        return subprocess.run(["git", *arguments], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    """Return the installed versions of isouq and of the packages that it declares."""
    declared = {re.split(r"[^\w.-]", text)[0] for text in importlib.metadata.requires("isouq") or []}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in ["isouq", *sorted(declared)] if name in installed}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()
