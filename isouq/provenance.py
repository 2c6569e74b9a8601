"""What ran, on what, from what: named results, the record of each notebook's run, and their collection.

A notebook ends with `save_results({KEY: Result(...)}, results_path)`. The pipeline runs it with
`python -m isouq.provenance run`, which keeps a record, and joins all of them with `... collect`.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isouq.identity import module_files

PACKAGE = Path(__file__).resolve().parent
Number = int | float | np.integer | np.floating
KEY = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)+")
WITH_MODEL = re.compile(r"((?:cost|isotropy|qa)\.)(.*?[^a-z0-9_.-].*?)((?:\.[a-z][a-z0-9_-]*)+)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ResultError(ValueError):
    """A result without a proper name or a finite value, or a name used twice."""


class NotebookError(RuntimeError):
    """A notebook that did not run to its end, with the traceback of its own code and the cause last."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number that a page may quote, with its 95 % interval (`low`, `high`) and the `n` it rests on.

    `claim` is the paper's claim it answers (C1 to C10, see the claims page), `unit` is "" for a pure number.

    Raises:
        ResultError: a value that is not a finite number, half an interval, or an unknown claim.
    """

    value: Number
    low: Number | None = None
    high: Number | None = None
    n: int | np.integer | None = None
    unit: str = ""
    claim: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if isinstance(number, bool) or not isinstance(number, Number) or not math.isfinite(number):
                raise ResultError(f"{name}: {number!r} given; wanted a finite number")
        if (self.low is None) != (self.high is None):
            raise ResultError(f"low={self.low}, high={self.high} given; wanted both or neither")
        if self.low is not None and self.high is not None and float(self.low) > float(self.high):
            raise ResultError(f"low={self.low} is above high={self.high}")
        if self.n is not None and (isinstance(self.n, bool) or self.n < 1):
            raise ResultError(f"n: {self.n!r} given; wanted a positive whole number")
        if self.claim is not None and not re.fullmatch(r"C([1-9]|10)", self.claim):
            raise ResultError(f"claim: {self.claim!r} given; wanted C1 to C10, or None")


def key_of(model: str) -> str:
    """Return a model's name as a part of a result's key: `owner/Name_1.5@v2` is `owner-name-1-5-v2`.

    Of a folder outside this one (`/data/My model`, `~/m`, `../m`) only the last part counts: no result names a place.
    """
    name = Path(model).name if model[:1] in tuple("/~.") else model
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def save_results(results: Mapping[str, Result], path: str | Path) -> None:
    """Write a notebook's named results as JSON; an empty path writes nothing.

    Keys are dotted and lower case, chapter.subject.method.metric: `qa.gemma-3-270m.triviaqa.accuracy`. A model's name
    stands in one as its `key_of`; where it is left as its owner wrote it, it is made so, up to a dot before a letter.

    Raises:
        ResultError: a key of another form, or two that are saved as one.
    """
    content: dict[str, Any] = {}
    for given, result in sorted(results.items()):
        raw = None if KEY.fullmatch(given) else WITH_MODEL.fullmatch(given)
        key = f"{raw[1]}{key_of(raw[2])}{raw[3]}" if raw else given
        _check_key(key)
        if key in content:
            raise ResultError(f"{given!r} would be saved as {key}, which is there already")
        content[key] = _plain(result)
    if str(path):
        write_json({"results": content}, Path(path))


def run_notebook(
    source: Path, output: Path, *, parameters: Mapping[str, Any], record: Path, failed: Path, models: Any = None
) -> None:
    """Execute a notebook with papermill in this interpreter's own kernel, keep the copy, and record what ran.

    `models`, name to content or commit, goes to the record. A copy that fails never becomes `output`: it goes to the
    folder `failed`, its traceback beside it as text.

    Raises:
        NotebookError: a cell raised, the kernel died, or the notebook did not write `results_path`.
    """
    import papermill  # of the pipeline's extra, which who only saves results does not need

    for folder in (output.parent, failed):
        folder.mkdir(parents=True, exist_ok=True)
    kept = failed / source.name
    for stale in (kept, kept.with_suffix(".txt"), results := Path(parameters["results_path"])):
        stale.unlink(missing_ok=True)
    inputs = [source, *module_files(source), PACKAGE / "assets.toml", PACKAGE.parent / "requirements.lock"]
    run = {"notebook": source.stem, "started": _now(), "parameters": _without_places(parameters), **environment()}
    hashes = {"inputs": _hashes(inputs), "models": {key_of(name): content for name, content in (models or {}).items()}}
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
    write_json({**run, **hashes, "outputs": _hashes([output, results])}, record)


def _own_kernel() -> type:
    """Return a manager of kernels that starts this interpreter's own, whatever `python3` is on JUPYTER_PATH."""
    from jupyter_client import kernelspec, manager

    specs = kernelspec.KernelSpecManager(kernel_dirs=[])
    return type("OwnKernel", (manager.AsyncKernelManager,), {"_kernel_spec_manager_default": lambda self: specs})


def _without_places(parameters: Mapping[str, Any]) -> Any:
    """Return parameters for the record: of a path outside the project only its name."""
    return json.loads(re.sub(r'"[/~][^"]*?([^"/]*)/*"', r'".../\1"', json.dumps(parameters)))


def collect(
    results: Sequence[Path],
    out: Path,
    *,
    profile: str,
    records: Sequence[Path] = (),
    timings: Sequence[Path] = (),
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
            _check_key(key)
            if key in origin:
                raise ResultError(f"{key} is written by {origin[key]} and by {path.stem}")
            origin[key], merged[key] = path.stem, _plain(Result(**entry))
    runs = {run.pop("notebook"): run for run in map(_read_json, records)}
    measured = {path.stem: _timing(path) for path in timings}
    meta = {
        "profile": profile,
        "created": _now(),
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


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all; NaN and infinity, which JSON does not know, are refused."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ResultError(f"given twice: {', '.join(sorted(twice))}")
    return dict(pairs)


def _check_key(key: str) -> None:
    if not KEY.fullmatch(key):
        wanted = "dotted lower-case parts, as qa.gemma-3-270m.triviaqa.accuracy"
        raise ResultError(f"key {key!r} given; wanted {wanted}")


def _plain(result: Result) -> dict[str, Any]:
    """Return a result's fields as JSON's own types, which numpy's numbers are not."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in asdict(result).items()}


def _failure(error: Exception, source: Path, kept: Path) -> str:
    """Return what a reader needs: which notebook, its own traceback without colours, the cause in the end."""
    trace = getattr(error, "traceback", None)  # a cell's own, of papermill's PapermillExecutionError
    cause = ANSI.sub("", "\n".join(trace)) if trace else f"{type(error).__name__}: {error}"
    return f"{source.as_posix()} failed; the executed part is {kept.as_posix()}\n{cause}"


def _timing(path: Path) -> tuple[float, float | None]:
    """Return seconds and peak resident megabytes (None: too short to be seen) of a benchmark table."""
    header, row = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[:2])
    fields = dict(zip(header, row, strict=True))
    peak = fields["max_rss"]
    return float(fields["s"]), None if peak in {"-", "NA"} else float(peak)


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file under its name relative to the project."""
    return {
        Path(os.path.relpath(file, PACKAGE.parent)).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _is_own_repository() -> bool:
    """Whether git keeps isouq here as its own project, not as a part of a user's: installed, vendored or copied."""
    own = ("isouq/provenance.py", "CITATION.cff", "profiles/published.yml")  # what a package or a copy of it lacks
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
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one notebook, or collect the results of all: the pipeline's two commands."""
    parser = argparse.ArgumentParser(prog="python -m isouq.provenance", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="execute a notebook and record what ran")
    run.add_argument("source", type=Path)
    run.add_argument("output", type=Path)
    run.add_argument("--parameters", type=json.loads, required=True, help="a JSON object")
    run.add_argument("--models", type=json.loads, help="a JSON object: each model's content or commit")
    run.add_argument("--record", type=Path, required=True)
    run.add_argument("--failed", type=Path, required=True, help="the folder for a copy that fails")
    run.set_defaults(command=run_notebook)
    join = commands.add_parser("collect", help="join named results into results.json")
    join.add_argument("results", type=Path, nargs="+")
    join.add_argument("--out", type=Path, required=True)
    join.add_argument("--profile", required=True)
    join.add_argument("--records", type=Path, nargs="*", default=[])
    join.add_argument("--timings", type=Path, nargs="*", default=[])
    join.set_defaults(command=collect)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    # There are no widgets on a page: tqdm need not say in a notebook's output that it writes text instead.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    try:
        command(**options)
    except (NotebookError, ResultError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
