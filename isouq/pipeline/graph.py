"""What the Snakefile reads off a profile: its chapters, the jobs before them, and what each job depends on."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import filelock

from isouq.pipeline import profiles
from isouq.pipeline.profiles import ProfileError
from isouq.studies import assets
from isouq.studies.identity import module_files
from isouq.studies.qa.data import key_part
from isouq.studies.results import key_of


class Graph:
    """The jobs of one profile, from `snakemake --config profile=NAME`.

    Raises:
        ProfileError: another word after `--config`, or whatever `profiles.load` refuses.
        ModelError: a model of the profile that cannot be had.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.argument = _profile_argument(config)
        self.profile = profiles.load(self.argument)
        self.build = f"build/{self.profile.name}"
        self.chapters = self.profile.chapters()
        self.sections = {chapter: self.profile.parameters(chapter) for chapter in self.chapters}
        self.models = {chapter: getattr(section, "models", []) for chapter, section in self.sections.items()}
        self.content = {model: assets.content(model) for models in self.models.values() for model in models}
        self.assets = sorted({name for section in self.sections.values() for name in section.assets()})
        # Per machine that a job runs on, with twice the time that was measured, since machines differ.
        self.memory_mb, self.minutes = math.ceil(1000 * self.profile.memory_gb), math.ceil(2 * self.profile.minutes)

    @property
    def gpus(self) -> int:
        """How many GPUs a job of 04_llm_qa asks a cluster for."""
        return int(getattr(self.sections.get("04_llm_qa"), "device_map", None) is not None)

    @functools.cached_property
    def shards(self) -> dict[str, tuple[str, str]]:
        """Job name → (model, data set): what 04_llm_qa has scored before it starts."""
        section: Any = self.sections.get("04_llm_qa")
        pairs = section.pairs() if section else []
        return {f"qa-{key_of(model)}-{key_part(data_set)}": (model, data_set) for model, data_set in pairs}

    @property
    def problems(self) -> list[str]:
        """The problems of the atlas, whose posteriors are sampled before the notebooks that use them start."""
        section: Any = self.sections.get("02_mcmc")
        return list(section.atlas_problems) if section else []

    def before(self, chapter: str) -> list[str]:
        """Return the files of the jobs that have to be done before a notebook starts."""
        if chapter == "04_llm_qa":
            return [f"{self.build}/qa/{shard}.done" for shard in self.shards]
        used = getattr(self.sections[chapter], "atlas_problems", [])
        return [f"{self.build}/mcmc/mcmc-{problem}.done" for problem in self.problems if problem in used]

    def parameters(self) -> dict[str, Callable[[Any], str]]:
        """Return a function of a rule's wildcards per parameter of any notebook, for Snakemake's `params`.

        One entry per parameter makes Snakemake's own reason name what changed: `before: n_folds: 5 now: n_folds: 3`.
        """
        names = dict.fromkeys(name for section in self.sections.values() for name in type(section).model_fields)
        return _line_of_each(names, lambda wildcards: self.sections[wildcards.chapter].model_dump())

    def scoring(self) -> dict[str, Callable[[Any], str]]:
        """Return a function of a rule's wildcards per parameter that a shard of 04_llm_qa depends on, as `parameters`.

        `file` is the SHA-256 of a file of questions.
        """
        section: Any = self.sections.get("04_llm_qa")
        if not section:
            return {}
        names = section.scoring(*section.pairs()[0])
        own = _line_of_each(names, lambda wildcards: section.scoring(*self.shards[wildcards.shard]))
        return own | {"file": lambda wildcards: _digest(self.shards[wildcards.shard][1])}

    def questions(self, chapter: str) -> list[str]:
        """Return a line with the SHA-256 of a notebook's own file of questions, if it has one."""
        file = getattr(self.sections[chapter], "file", None)
        return lines({file: _digest(file)}) if file else []

    def sampling(self) -> list[str]:
        """Return a line per parameter of 02_mcmc."""
        return lines(self.sections["02_mcmc"].model_dump()) if self.problems else []

    def contents(self, models: Iterable[str]) -> list[str]:
        """Return what each model's name stands for now, since other bytes or another commit are another model."""
        return lines({model: self.content[model] for model in models})


def _line_of_each(names: Iterable[str], values: Callable[[Any], dict[str, Any]]) -> dict[str, Callable[[Any], str]]:
    def line(name: str, wildcards: Any) -> str:
        return "".join(lines({name: values(wildcards).get(name)}))

    return {name: functools.partial(line, name) for name in names}


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else ""


def lines(values: Mapping[str, Any]) -> list[str]:
    """Return `name: value` per entry that is not None, the value as JSON."""
    return [f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None]


def pins(names: Iterable[str]) -> list[str]:
    """Return a line per asset with the SHA-256 of its files."""
    pinned = {asset.name: [member.sha256 for member in asset.members] for asset in assets.list_assets()}
    return lines({name: pinned[name] for name in names})


def modules(path: str | Path) -> list[str]:
    """Return the module files that a notebook or a module can reach, relative to the working directory."""
    return [os.path.relpath(file) for file in module_files(path)]


def lock(folder: str | Path) -> filelock.BaseFileLock:
    """Keep other processes off a folder until this one ends; Snakemake's own lock would outlive a kill.

    Raises:
        BlockingIOError: another process is building there.
    """
    held = filelock.FileLock(Path(folder, ".lock"))
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"another process is building {folder}: wait for it, or end it") from None
    return held


def _profile_argument(config: Mapping[str, Any]) -> str:
    for word in config.keys() - {"profile"}:
        raise ProfileError(f"--config {word}: not a known name; wanted profile, as in --config profile=smoke")
    given = config.get("profile", "embedded")
    if not isinstance(given, str):  # Snakemake makes a number of what looks like one
        way_out = "name the file, as in profile=profiles/2024_10.yml"
        raise ProfileError(f"profile: Snakemake reads {given!r}, which is no name; {way_out}")
    return given
