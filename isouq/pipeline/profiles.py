"""A profile (`profiles/*.yml`) sets the size of a run: it says what differs from the notebooks' own parameters.

Its errors name what was given, what is wanted and the nearest valid word.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import pydantic
import yaml
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from isouq.pipeline.schemas import CLONE, SCHEMAS, SET_BY_PIPELINE, Gigabytes, Parameters, Seed, Strict, nearest

Model = TypeVar("Model", bound=BaseModel)


class ProfileError(ValueError):
    """A profile or a notebook's parameters say something that the schema does not allow."""


# A notebook without a section does not run.
_SECTIONS = {chapter: (schema, None) for chapter, schema in SCHEMAS.items()}
Notebooks = create_model("Notebooks", __base__=Strict, **cast(Any, _SECTIONS))


class Gpu(Strict):
    """A GPU by its data sheet, the share of that which a run reaches, and each model's config, to estimate a run."""

    name: str
    teraflops: Annotated[float, Field(gt=0)]  # dense, in the profile's dtype
    terabytes_per_second: Annotated[float, Field(gt=0)]
    efficiency: Annotated[float, Field(gt=0, le=1)]
    architectures: dict[str, dict[str, Any]]


class Profile(Strict):
    """The size of a run: what each notebook gets, and what the whole costs on 2 cores, as measured, or on a GPU."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: Annotated[str, Field(pattern=r"\S")]  # may have several lines
    minutes: Annotated[float, Field(gt=0)]
    memory_gb: Gigabytes
    seed: Seed = 0
    gpu: Gpu | None = None
    notebooks: Notebooks  # type: ignore[valid-type]

    @pydantic.field_validator("notebooks", mode="before")
    @classmethod
    def _over_own(cls, sections: Any, info: Any) -> Any:
        """Lay each section over the profile's name and seed."""
        if not isinstance(sections, dict):
            return sections
        own = {"profile": info.data.get("name", "unnamed"), "seed": info.data.get("seed", 0)}
        complete = dict(sections)
        for chapter in SCHEMAS.keys() & sections.keys():
            if isinstance(section := sections[chapter], dict):
                if taken := SET_BY_PIPELINE & section.keys():
                    raise ValueError(f"{chapter}.{min(taken)} is set by the pipeline; remove it")
                complete[chapter] = own | section
        return complete

    def chapters(self) -> list[str]:
        """Return the names of the notebooks that this profile runs, in order."""
        return sorted(self.notebooks.model_fields_set)  # type: ignore[attr-defined]

    def parameters(self, chapter: str, *, results_path: str = "") -> Parameters:
        """Return one notebook's parameters. Raises ProfileError for a notebook that the profile does not run."""
        if chapter not in self.chapters():
            advice = nearest(chapter, self.chapters())
            raise ProfileError(f"profile {self.name!r} does not run {chapter!r}{advice}")
        section: Parameters = getattr(self.notebooks, chapter)
        return section.model_copy(update={"results_path": results_path})


def load(path_or_name: str | Path) -> Profile:
    """Read a profile: a name ("smoke", from `profiles/`) or the path of a YAML file named after its profile.

    Raises:
        ProfileError: no such profile, not YAML, a key twice, or anything that the schema does not allow; one
            line a problem, each with the nearest valid name.
    """
    path = _find(path_or_name)
    try:
        with path.open("rb") as stream:  # bytes: YAML tells UTF-8 from UTF-16 itself
            content = yaml.load(stream, Loader=_UniqueKeys)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ProfileError(f"{path.name} cannot be read: {problem}; wanted YAML, as UTF-8") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path.name}: {content!r:.80} given; wanted a mapping with name, notebooks, ...")
    profile = _checked(Profile, content, where=path.name)
    if profile.name != path.stem:
        raise ProfileError(f"{path.name}: name: {profile.name!r} given; wanted the file's own name, {path.stem!r}")
    for chapter in profile.chapters():
        _check_places(f"{path.name}: notebooks.{chapter}", profile.parameters(chapter))
    return profile


def validate(chapter: str, namespace: Mapping[str, Any]) -> Parameters:
    """Check a notebook's parameters, called as `validate("04_llm_qa", globals())` right after their cell.

    A plain value that the schema does not know is refused too: that is how a name misspelt after papermill's
    `-p`, of which papermill only warns, is caught before anything runs.

    Raises:
        ProfileError: a name, type or value that the notebook's schema does not allow, or a parameter not set.
    """
    if chapter not in SCHEMAS:
        raise ProfileError(f"no schema for notebook {chapter!r}{nearest(chapter, SCHEMAS)}")
    plain = (bool, int, float, str, list, dict, tuple, set, type(None))
    given = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in {"In", "Out"}
    }
    if unset := sorted(SCHEMAS[chapter].model_fields.keys() - given.keys()):
        raise ProfileError(f"{chapter}: not set in the parameters cell, or not a plain value: {', '.join(unset)}")
    section = _checked(SCHEMAS[chapter], given, where=chapter)
    _check_places(chapter, section, written=True)
    return section


def _check_places(where: str, section: Parameters, *, written: bool = False) -> None:
    """Refuse a place for files that is none, which some are found to be when all is computed.

    `written`: this process is the one that writes there, so that the place has to allow it.
    """
    for name, value in section:
        if not (name.endswith(("_dir", "_path")) and value):
            continue
        place, kind = Path(value), "folder" if name.endswith("_dir") else "file"
        there = next(one for one in (place, *place.absolute().parents) if one.exists())
        if value.startswith("~"):
            raise ProfileError(f"{where}: {name}: {value!r} given, which is taken as written; wanted its whole path")
        if there.is_dir() == (there == place and kind == "file"):
            raise ProfileError(f"{where}: {name}: {value!r} given; {there} stands in its place, a {kind} wanted")
        if written and name != "records_dir" and not os.access(there, os.W_OK):
            raise ProfileError(f"{where}: {name}: {value!r} given; {there} may not be written, another {kind} wanted")


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.suffix not in {".yml", ".yaml"}:
        path = CLONE / "profiles" / f"{path_or_name}.yml"
    if not path.is_file():
        names = sorted(p.stem for p in (CLONE / "profiles").glob("*.yml"))
        advice = (
            nearest(path.stem, names) or f"; profiles: {', '.join(names) or 'none, they come with a clone of isouq'}"
        )
        raise ProfileError(f"no profile {str(path_or_name)!r}{advice}")
    return path


def _checked(schema: type[Model], content: dict[str, Any], *, where: str) -> Model:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [f"{where}: {_readable(schema, e)}" for e in error.errors(include_url=False)]
        raise ProfileError("\n".join(problems)) from None


def _readable(schema: type[BaseModel], error: ErrorDetails) -> str:
    """Return one line: where, what was given, what is wanted, and the nearest valid word."""
    loc, kind, given = error["loc"], error["type"], error["input"]
    where = ".".join(map(str, loc))
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(schema, loc[:-1])
        return f"{where} is not a known name{nearest(str(loc[-1]), known) or '; known: ' + ', '.join(known)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {context['error']}" if where else str(context["error"])
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: {given!r} given; wanted one of {', '.join(choices)}{nearest(str(given), choices)}"
    if given is None:
        advice = " ({} takes the defaults)" if "model" in kind else ""
        return f"{where}: nothing given; wanted a value{advice}"
    if kind == "too_short":
        return f"{where}: {given!r} given; wanted at least {context['min_length']} of them"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if kind == "string_type":
        wanted += "; put it in quotes"
    if kind == "float_type" and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", str(given)):
        wanted += "; YAML reads this as text: write a point, as in 1.0e-3"
    return f"{where}: {given!r} given; wanted {wanted}"


def _fields_at(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        schema = cast(type[BaseModel], schema.model_fields[str(part)].annotation)
    return list(schema.model_fields)


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which YAML itself would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, each key once."""
        merge = "tag:yaml.org,2002:merge"
        keys = ["<<" if key.tag == merge else self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            problem = f"given twice: {', '.join(twice)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _as_written(loader: _UniqueKeys, node: yaml.ScalarNode) -> Any:
    """Return a number, or the text of one that YAML alone would read as another: 010 as 8, 1:30 as 90."""
    differs = re.match(r"[-+]?0[\d_]|.*:", node.value)
    return node.value if differs else yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


for _kind in ("int", "float"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)
