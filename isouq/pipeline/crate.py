"""A kept run described for archives and catalogues: `results/PROFILE/ro-crate-metadata.json`.

An RO-Crate in the terms of Process Run Crate (https://w3id.org/ro/wfrun/process/0.5): every chapter's run is an action
that an instrument, the commit of isouq, did on the chapter's source and models, and whose results are files with their
SHA-256.
"""

from __future__ import annotations

import hashlib
import mimetypes
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from rocrate.model import ContextEntity, Person
from rocrate.rocrate import ROCrate

from isouq.pipeline import kept

PROCESS = "https://w3id.org/ro/wfrun/process/0.5"
PAPER = "https://arxiv.org/abs/2603.29466"
FILES = {
    "results.json": "Every number of the book: value, 95 % interval, sample size, and the record of the run it is from",
    "overview.svg": "How well each score tells wrong answers from right ones",
    "atlas.svg": "Rank correlation of the squared gradient norm with the variance that MCMC finds, in every setting",
}
FOLDERS = {
    "atlas": "Posteriors by MCMC with their settings and diagnostics, one file a setting and data seed",
    "isotropy": "Posteriors under priors of other widths, one file a setting and data seed",
    "qa": "Questions, answers, samples and scores, one Parquet file for each model and data set",
}


def describe(profile: str, *, folder: Path = kept.KEPT, citation: Path = Path("CITATION.cff")) -> str:
    """Write the RO-Crate metadata of the kept run `results/PROFILE`, and return a line that says so.

    Raises:
        ResultError: as `kept.read`.
    """
    place = folder / Path(profile).stem
    meta = kept.read(place / "results.json")["meta"]
    cited = yaml.safe_load(citation.read_text(encoding="utf-8"))
    crate = ROCrate(version="1.1")  # which Process Run Crate rests on
    crate.name = f"{cited['title']}: the kept run `{meta['profile']}`"
    crate.description = " ".join(cited["abstract"].split())
    terms = f"https://spdx.org/licenses/{cited['license']}"
    crate.license = _entity(crate, terms, "CreativeWork", name=cited["license"], description="Terms of use")
    crate.datePublished = max(run["started"] for run in meta["runs"].values())
    crate.root_dataset["author"] = crate.add(Person(crate, "#authors", {"name": cited["authors"][0]["name"]}))
    crate.root_dataset["citation"] = _entity(crate, PAPER, "ScholarlyArticle", name=cited["references"][0]["title"])
    crate.root_dataset["conformsTo"] = _entity(crate, PROCESS, "CreativeWork", name="Process Run Crate", version="0.5")
    for name, text in FILES.items():
        if (place / name).is_file():
            _file(crate, place, name, description=text)
    for name, text in FOLDERS.items():
        if (place / name).is_dir():
            crate.add_directory(place / name, name, properties={"name": name, "description": text})
    for chapter, run in meta["runs"].items():
        _run(crate, place, chapter, meta | run, meta["durations"].get(chapter))
    crate.metadata.write(place)
    return f"{place / crate.metadata.id}: {len(meta['runs'])} runs, {len(crate.data_entities)} files and folders"


def _run(crate: ROCrate, place: Path, chapter: str, run: dict[str, Any], seconds: float | None) -> None:
    """Add a chapter's run, what it used and what it made; its executed notebook where that is kept."""
    source, commit = f"notebooks/{chapter}.ipynb", run["commit"]
    made = [crate.get("results.json")]
    if (place / source).is_file():
        made.append(_file(crate, place, source, description=f"Chapter {chapter} as it ran"))
    code = _entity(
        crate,
        f"#isouq-{commit}",
        "SoftwareApplication",
        name=f"isouq at commit {commit}",
        version=run["versions"]["isouq"],
    )
    code["softwareRequirements"] = [f"{name} {version}" for name, version in run["versions"].items() if name != "isouq"]
    objects = [
        _entity(crate, f"#{source}", "SoftwareSourceCode", name=source, version=commit, sha256=run["inputs"][source])
    ]
    for model, content in run.get("models", {}).items():
        objects.append(_entity(crate, f"#{model}", "CreativeWork", name=model, version=content))
    for name, value in run["parameters"].items():
        text = {"name": name, "value": value if isinstance(value, str | int | float) else repr(value)}
        objects.append(_entity(crate, f"#{chapter}-{name}", "PropertyValue", **text))
    action = _entity(crate, f"#{chapter}", "CreateAction", name=f"Run of {source}", startTime=run["started"])
    action["description"] = f"papermill executed {source} with the parameters of profile {run['profile']}"
    if seconds is not None:
        action["endTime"] = (datetime.fromisoformat(run["started"]) + timedelta(seconds=round(seconds))).isoformat()
    action["instrument"], action["object"] = code, objects
    action["result"], action["agent"] = made if len(made) > 1 else made[0], crate.get("#authors")
    crate.root_dataset.append_to("mentions", action)


def _entity(crate: ROCrate, id: str, kind: str, **properties: Any) -> Any:
    return crate.get(id) or crate.add(ContextEntity(crate, id, {"@type": kind, **properties}))


def _file(crate: ROCrate, place: Path, name: str, **properties: Any) -> Any:
    path = place / name
    content = path.read_bytes()
    about = {
        "name": path.name,
        "contentSize": str(len(content)),
        "encodingFormat": mimetypes.guess_type(name)[0] or "application/x-ipynb+json",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return crate.add_file(path, name, properties=about | properties)
