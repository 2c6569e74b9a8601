"""What a profile may say: one schema per notebook, and errors that name the nearest valid word.

A profile (`profiles/*.yml`) sets the size of a run. Each notebook has a class below with the types and limits of its
parameters. Their defaults stand in the notebook's `parameters` cell and nowhere else; a profile says what differs.
"""

import ast
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from isouq.models import HUB_ID
from isouq.studies import assets
from isouq.studies.results import key_of

CLONE = Path(__file__).resolve().parents[2]  # it has the profiles and the notebooks; a wheel has neither
SET_BY_PIPELINE = {"profile", "results_path"}
_TAKEN = {"machine", "mlp", "networks", "spectra", "targets"}  # parts of other keys, where a model's name stands

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # numpy and jax take 32 bits, and chapters count on from it
Engine = Literal["auto", "ghost", "autograd"]
DataSet = Literal["triviaqa", "wikidata", "truthfulqa_choose"]
MulticlassProblem = Literal["multiclass_clusters", "multiclass_spirals", "multiclass_rings"]
IsotropyProblem = Literal["binary_rings", "binary_xor", "multiclass_spirals", "multiclass_clusters"]
SyntheticProblem = Literal[
    MulticlassProblem, "binary_linear", "binary_xor", "binary_rings", "regression_linear", "regression_nonlinear"
]
Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
NotEmpty = Annotated[list[Item], Field(min_length=1)]
Several = Annotated[list[Item], Field(min_length=2)]
Chains = Annotated[int, Field(ge=4)]
Draws = Annotated[int, Field(ge=100)]
Resamples = Annotated[int, Field(ge=40)]  # fewer leave an end of a 95 % interval empty
Gigabytes = Annotated[float, Field(gt=0)]


def _known_models(models: list[str]) -> list[str]:
    known = [asset.name for asset in assets.list_assets() if asset.kind == "causal-lm"]
    keys = dict.fromkeys(_TAKEN, "a chapter")
    for model in models:
        on_hub = "/" in model and HUB_ID.fullmatch(model)
        if not (model in known or on_hub or Path(model).expanduser().is_dir()):
            advice = _nearest(model, known) or f"; models: {', '.join(known)}"
            raise ValueError(f"{model!r} is no model of the manifest, Hub id or folder{advice}")
        key = key_of(model.removesuffix("@main"))
        if key in keys:
            raise ValueError(f"{model!r} would name its results {key!r}, as {keys[key]} does; keep or rename one")
        keys[key] = repr(model)
    return models


Models = Annotated[list[str], Field(min_length=1), AfterValidator(_known_models)]


class ProfileError(ValueError):
    """A profile or a notebook's parameters say something that the schema does not allow."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @pydantic.field_validator("*")
    @classmethod
    def _means_something(cls, value: Any, field: Any) -> Any:
        """Refuse, in every field, what a later step would refuse after hours, or would take for something else."""
        for item in value if isinstance(value, list) else [value]:
            allowed = {"description": item, "results_path": ""}.get(field.field_name)
            if isinstance(item, str) and item != allowed and not (item.isprintable() and item == item.strip() != ""):
                raise ValueError(f"{item!r} given; wanted text in one line, not empty, without spaces around it")
            if isinstance(item, int) and item >= 2**63:
                raise ValueError(f"{item} given; wanted less than 2**63")
            if isinstance(value, list) and value.count(item) > 1:
                raise ValueError(f"{value!r} given, {item!r} twice; wanted each once")
        return value


class Parameters(_Strict):
    """What every notebook takes: the profile's name, a seed, and where its named results go ("": nowhere)."""

    profile: str
    seed: Seed
    results_path: str
    data: ClassVar[tuple[str, ...]] = ()

    def assets(self) -> list[str]:
        """Return the names of the models and data sets of the manifest that the notebook needs."""
        known = {asset.name for asset in assets.list_assets()}
        return sorted(known & {*getattr(self, "models", []), *self.data})


class Derivation(Parameters):
    """01_derivation: both approximations, one after the other, on a small classifier."""

    problem_name: MulticlassProblem
    width: Count
    n_samples: Draws
    n_sigmas: Annotated[int, Field(ge=5)]
    n_chains: Chains
    n_warmup: Count
    n_draws: Count


class Isotropy(Parameters):
    """02_isotropy: an isotropic covariance against those made from data, on small networks and real models."""

    data = ("triviaqa", "truthfulqa", "wikidata", "all-minilm-l6-v2")
    store_dir: str
    problem_names: NotEmpty[IsotropyProblem]
    n_seeds: Count
    n_chains: Chains
    n_warmup: Count
    n_draws: Draws
    widths: Several[Count]
    width_seeds: Count
    models: Models
    n_proxies: Annotated[int, Field(ge=3)]  # of each of five kinds
    n_queries: Annotated[int, Field(ge=8, multiple_of=2)]
    n_checked: Count  # proxies and queries whose inner products autograd computes again
    memory_gb: Gigabytes
    n_resamples: Resamples


class Mcmc(Parameters):
    """03_mcmc: eight problems against reference posteriors, and the network's size."""

    store_dir: str
    records_dir: str
    n_workers: Count
    n_seeds: Count
    n_chains: Chains
    n_warmup: Count
    n_draws: Draws
    data_sizes: Several[Count]
    size_problems: NotEmpty[SyntheticProblem]
    size_widths: Several[Count]
    size_depths: NotEmpty[Count]
    size_seeds: Count

    @staticmethod
    def problems() -> list[str]:
        """Return the problems whose posteriors can be sampled before the notebook starts, a job each."""
        return list(get_args(SyntheticProblem))


class LlmQa(Parameters):
    """04_llm_qa: real language models on real questions."""

    store_dir: str
    models: Models
    data_sets: NotEmpty[DataSet]
    n_questions: Annotated[int, Field(ge=4)]  # fewer have no correlation to report
    n_shots: Annotated[int, Field(ge=0, le=32)]
    n_token_mean: Annotated[int, Field(ge=0)]
    engine: Engine
    batch_size: Count
    max_new_tokens: Count
    n_resamples: Resamples
    n_folds: Annotated[int, Field(ge=2, le=10)]  # each needs right and wrong answers, of which 10 are enough

    def assets(self) -> list[str]:
        """Return the manifest's names among the models, and the data sets'."""
        return sorted({*super().assets(), *(name.removesuffix("_choose") for name in self.data_sets)})

    def scoring(self) -> dict[str, Any]:
        """Return what the scores of one model on one data set depend on; the rest only shapes their analysis."""
        return self.model_dump(exclude=SET_BY_PIPELINE | {"models", "data_sets", "n_resamples", "n_folds"})


class Cost(Parameters):
    """05_cost: time, memory and exactness of every method, measured on the machine."""

    data = ("triviaqa", "all-minilm-l6-v2")
    models: Models
    n_examples: Count
    n_tokens: Annotated[int, Field(ge=2)]
    n_answer: Count
    n_points: Count
    n_rounds: Count
    n_rival_rounds: Count
    n_sweep_rounds: Count
    memory_gb: Gigabytes
    sweep_tokens: Several[Annotated[int, Field(ge=2)]]
    sweep_answers: Several[Count]
    sweep_examples: Several[Count]
    sweep_widths: Several[Annotated[int, Field(ge=64, multiple_of=64)]]

    @pydantic.model_validator(mode="after")
    def _answer_in_text(self) -> "Cost":
        longest = max(self.n_answer, *self.sweep_answers)
        if longest >= self.n_tokens or self.n_answer >= min(self.sweep_tokens):
            raise ValueError(f"an answer of {longest} tokens does not leave the question one; make n_tokens larger")
        return self


# The notebooks that a profile can name; they run in the order of their numbers.
SCHEMAS: dict[str, type[Parameters]] = {
    "01_derivation": Derivation,
    "02_isotropy": Isotropy,
    "03_mcmc": Mcmc,
    "04_llm_qa": LlmQa,
    "05_cost": Cost,
}

# A notebook without a section does not run.
_SECTIONS = {chapter: (schema, None) for chapter, schema in SCHEMAS.items()}
Notebooks = create_model("Notebooks", __base__=_Strict, **cast(Any, _SECTIONS))


class Profile(_Strict):
    """The size of a run: what each notebook gets, and what the whole costs on 2 cores, as measured."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: Annotated[str, Field(pattern=r"\S")]  # may have several lines
    minutes: Annotated[float, Field(gt=0)]
    memory_gb: Gigabytes
    seed: Seed = 0
    notebooks: Notebooks  # type: ignore[valid-type]

    @pydantic.field_validator("notebooks", mode="before")
    @classmethod
    def _over_defaults(cls, sections: Any, info: Any) -> Any:
        """Lay each section over its notebook's own values and over the profile's name and seed."""
        if not isinstance(sections, dict):
            return sections
        own = {"profile": info.data.get("name", "unnamed"), "seed": info.data.get("seed", 0)}
        complete = dict(sections)
        for chapter in SCHEMAS.keys() & sections.keys():
            if isinstance(section := sections[chapter], dict):
                if taken := SET_BY_PIPELINE & section.keys():
                    raise ValueError(f"{chapter}.{min(taken)} is set by the pipeline; remove it")
                complete[chapter] = defaults(chapter) | own | section
        return complete

    def chapters(self) -> list[str]:
        """Return the names of the notebooks that this profile runs, in order."""
        return sorted(self.notebooks.model_fields_set)  # type: ignore[attr-defined]

    def parameters(self, chapter: str, *, results_path: str = "") -> Parameters:
        """Return one notebook's parameters. Raises ProfileError for a notebook that the profile does not run."""
        if chapter not in self.chapters():
            advice = _nearest(chapter, self.chapters())
            raise ProfileError(f"profile {self.name!r} does not run {chapter!r}{advice}")
        section: Parameters = getattr(self.notebooks, chapter)
        return section.model_copy(update={"results_path": results_path})


def defaults(chapter: str) -> dict[str, Any]:
    """Return the values in the `parameters` cell of a notebook of this clone.

    Raises:
        ProfileError: isouq is installed without its notebooks.
    """
    try:
        notebook = json.loads((CLONE / "notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    except OSError:
        raise ProfileError(f"notebooks/{chapter}.ipynb is not there: a profile needs a clone of isouq") from None
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    assignments = cast(list[ast.Assign], ast.parse("".join(cell["source"])).body)
    return {cast(ast.Name, line.targets[0]).id: ast.literal_eval(line.value) for line in assignments}


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
    return profile


def validate(chapter: str, namespace: Mapping[str, Any]) -> Parameters:
    """Check a notebook's parameters, called as `validate("04_llm_qa", globals())` right after their cell.

    A plain value that the schema does not know is refused too: that is how a name misspelt after papermill's
    `-p`, of which papermill only warns, is caught before anything runs.

    Raises:
        ProfileError: a name, type or value that the notebook's schema does not allow, or a parameter not set.
    """
    if chapter not in SCHEMAS:
        raise ProfileError(f"no schema for notebook {chapter!r}{_nearest(chapter, SCHEMAS)}")
    plain = (bool, int, float, str, list, dict, tuple, set, type(None))
    given = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in {"In", "Out"}
    }
    return _checked(SCHEMAS[chapter], given, where=chapter)


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.suffix not in {".yml", ".yaml"}:
        path = CLONE / "profiles" / f"{path_or_name}.yml"
    if not path.is_file():
        names = sorted(p.stem for p in (CLONE / "profiles").glob("*.yml"))
        advice = (
            _nearest(path.stem, names) or f"; profiles: {', '.join(names) or 'none, they come with a clone of isouq'}"
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
        return f"{where} is not a known name{_nearest(str(loc[-1]), known) or '; known: ' + ', '.join(known)}"
    if kind == "missing":
        return f"{where} is missing, or is no plain value"
    if kind == "value_error":
        return f"{where}: {context['error']}" if where else str(context["error"])
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: {given!r} given; wanted one of {', '.join(choices)}{_nearest(str(given), choices)}"
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


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which YAML itself would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, each key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            problem = f"given twice: {', '.join(twice)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep=deep)
