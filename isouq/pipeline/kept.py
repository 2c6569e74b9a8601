"""The kept run of a profile, `results/PROFILE`: put together chapter by chapter, and held to its own record.

A chapter's record (`meta.runs`) has the SHA-256 of what it wrote: its executed notebook and its file of results. The
joined file has the same numbers in the same form, so that both can be checked at any time: what was changed by hand, or
kept by halves, is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isouq.pipeline import runner
from isouq.studies.results import Result, ResultError, as_json, check_key, write_json

KEPT = Path("results")
MOST_BYTES = 25_000_000  # of a kept run's executed notebooks together
SHARED = ("commit", "dirty", "versions", "hardware")  # what a record says of its surroundings


def prefix(chapter: str) -> str:
    """Return the first part of a chapter's keys: `qa.` of 04_llm_qa."""
    name = chapter.partition("_")[2]
    return f"{name.removeprefix('llm_')}."


def read(path: str | Path) -> dict[str, Any]:
    """Read joined results and check every chapter's numbers against its record.

    Raises:
        ResultError: a file that is no joined results, is cut off, has an entry that `Result` refuses, was made before
            records had hashes, lacks a chapter's numbers or has other numbers than the chapter wrote.
    """
    name = Path(path).as_posix()
    wanted = 'wanted joined results, {"meta": {"profile", "runs", …}, "results": {KEY: {"value", …}}}'
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        results, runs = content["results"], content["meta"]["runs"]
        content["meta"]["profile"].encode()
        for key, entry in results.items():
            check_key(key)
            Result(**entry)
    except OSError as error:
        advice = "make book makes one; kept runs come with a clone of isouq"
        raise ResultError(f"{name} cannot be read ({error.strerror}): {advice}") from None
    except json.JSONDecodeError as error:
        raise ResultError(f"{name} is no JSON, or was cut off ({error}); {wanted}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ResultError) as error:
        raise ResultError(f"{name} is not a file of joined results ({error!r:.200}); {wanted}") from None
    prefixes = {prefix(chapter): chapter for chapter in runs}
    if stray := [key for key in results if key.partition(".")[0] + "." not in prefixes]:
        raise ResultError(f"{name}: {stray[0]} belongs to no chapter of its record ({', '.join(runs)})")
    for chapter, run in runs.items():
        recorded = _recorded(run, f"results/{chapter}.json", f"{name}: {chapter}")
        own = {"results": of_chapter(results, chapter)}
        if _sha256(as_json(own).encode()) != recorded:
            n = len(own["results"])
            advice = "a number was changed, added or lost; run the chapter again, or `git checkout` the file"
            raise ResultError(f"{name}: the {n} numbers of {chapter} are not those that its run wrote: {advice}")
    return content


def of_chapter(results: Mapping[str, Any], chapter: str) -> dict[str, Any]:
    """Return the entries that a chapter wrote, in the order of its file."""
    return {key: entry for key, entry in sorted(results.items()) if key.startswith(prefix(chapter))}


def notebooks(folder: str | Path) -> list[Path]:
    """Return the executed notebooks of a kept run, one a chapter, each as its run left it.

    Raises:
        ResultError: as `read`, or a chapter whose executed notebook is not kept or is of another run.
    """
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        kept = sorted(path.parent.name for path in folder.parent.glob("*/results.json"))
        raise ResultError(f"{folder.as_posix()} keeps no results.json; runs that are kept: {', '.join(kept) or 'none'}")
    meta = read(folder / "results.json")["meta"]
    paths = [folder / "notebooks" / f"{chapter}.ipynb" for chapter in meta["runs"]]
    problems = {}
    for chapter, path in zip(meta["runs"], paths, strict=True):
        recorded = _recorded(meta["runs"][chapter], f"notebooks/{chapter}.ipynb", chapter)
        if not path.is_file():
            problems[chapter] = f"{path.as_posix()} is not kept"
        elif _sha256(path.read_bytes()) != recorded:
            problems[chapter] = f"{path.as_posix()} is not the notebook that the numbers of {chapter} come from"
    if problems:
        name, chapters = meta["profile"], " ".join(problems)
        way_out = f'run and keep: make book PROFILE={name} && make keep PROFILE={name} CHAPTERS="{chapters}"'
        raise ResultError("\n".join([*problems.values(), way_out]))
    return paths


def keep(profile: str, chapters: Sequence[str] = (), *, build: Path = Path("build"), kept: Path = KEPT) -> str:
    """Join chapters of `build/PROFILE` into `results/PROFILE`: numbers, record and executed notebook; return a line.

    `profile` is a profile's name or file. `chapters` are all that have run there, if none is named. The other chapters
    of the kept run stay as they are.

    Raises:
        ResultError: a chapter that has not run, that ran with uncommitted changes or whose files are not those of its
            record; more than MOST_BYTES of notebooks.
    """
    profile = Path(profile).stem
    source, folder = build / profile, kept / profile
    chapters = chapters or sorted(path.stem for path in (source / "records").glob("*.json"))
    if not chapters:
        raise ResultError(f"no chapter has run in {source.as_posix()}: make book PROFILE={profile}")
    runs = {chapter: _chapter(source, chapter) for chapter in chapters}
    file = folder / "results.json"
    content = read(file) if file.is_file() else {"meta": {"runs": {}}, "results": {}}
    if set(content["meta"]["runs"]) <= set(chapters):  # nothing of an earlier run stays
        shared = {name: runs[chapters[0]][0][name] for name in SHARED}
        content["meta"] = {"profile": profile, "created": runner.now(), **shared}
        content["meta"] |= {name: {} for name in ("seeds", "durations", "peak_memory_mb", "runs")}
    for chapter, (record, results) in runs.items():
        _join(content, chapter, record, results, source / "timings")
    executed = {chapter: source / "notebooks" / f"{chapter}.ipynb" for chapter in chapters}
    others = [path for path in (folder / "notebooks").glob("*.ipynb") if path.stem not in executed]
    size = sum(path.stat().st_size for path in [*executed.values(), *others])
    if size > MOST_BYTES:
        raise ResultError(f"{size / 1e6:.0f} MB of executed notebooks; wanted at most {MOST_BYTES / 1e6:.0f} together")
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for path in executed.values():
        shutil.copyfile(path, folder / "notebooks" / path.name)
    write_json({"meta": content["meta"], "results": dict(sorted(content["results"].items()))}, file)
    return f"{folder.as_posix()}: kept {', '.join(chapters)}; {size / 1e6:.1f} MB of executed notebooks"


def _chapter(source: Path, chapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a chapter's record and its results, checked against each other."""
    places = {name: source / name / f"{chapter}.json" for name in ("records", "results")}
    places["notebooks"] = source / "notebooks" / f"{chapter}.ipynb"
    if missing := [path.as_posix() for path in places.values() if not path.is_file()]:
        raise ResultError(f"{chapter} has not run: no {missing[0]}; make book PROFILE={source.name}")
    record = json.loads(places["records"].read_text(encoding="utf-8"))
    if record["dirty"] is not False:
        raise ResultError(f"{chapter} ran with uncommitted changes or outside a repository; commit, and run it again")
    for name in ("notebooks", "results"):
        path = places[name]
        if _sha256(path.read_bytes()) != _recorded(record, f"{name}/{path.name}", chapter):
            raise ResultError(f"{path.as_posix()} is not what the run recorded: run {chapter} again")
    results = json.loads(places["results"].read_text(encoding="utf-8"))["results"]
    if stray := [key for key in results if not key.startswith(prefix(chapter))]:
        raise ResultError(f"{chapter} wrote {stray[0]}; wanted keys that begin with {prefix(chapter)}")
    return record, results


def _join(
    content: dict[str, Any], chapter: str, record: Mapping[str, Any], results: Mapping[str, Any], timings: Path
) -> None:
    """Put a chapter into joined results in place of what they have of it."""
    meta, first = content["meta"], prefix(chapter).rstrip(".")
    others = {key: entry for key, entry in content["results"].items() if not key.startswith(f"{first}.")}
    content["results"] = {**others, **results}
    for name, number in (("durations", 0), ("peak_memory_mb", 1)):
        rest = {job: value for job, value in meta[name].items() if job != chapter and not job.startswith(f"{first}-")}
        jobs = [path for pattern in (chapter, f"{first}-*") for path in sorted(timings.glob(f"{pattern}.tsv"))]
        meta[name] = rest | {path.stem: runner.timing(path)[number] for path in jobs}
    meta["seeds"][chapter] = record["parameters"]["seed"]
    own = {name: value for name, value in record.items() if name != "notebook"}
    meta["runs"][chapter] = {name: value for name, value in own.items() if name not in meta or meta[name] != value}
    meta["runs"] = dict(sorted(meta["runs"].items()))


def _recorded(run: Mapping[str, Any], file: str, who: str) -> str:
    """Return the hash that a record has of one of its outputs, whatever folder it was built in."""
    for name, value in run.get("outputs", {}).items():
        if name.endswith(file):
            return value
    raise ResultError(f"{who}: its record has no hash of {file}: it is older than such records; run it again")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
