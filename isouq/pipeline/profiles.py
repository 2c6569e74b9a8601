"""What a profile may say: one schema per notebook, and errors that name the nearest valid word.

A profile (`profiles/*.yml`) sets the size of a run. Each notebook has a class below whose fields are exactly
the names of the notebook's `parameters` cell, with that cell's values as defaults.
"""

import difflib
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

FOLDER = Path(__file__).resolve().parents[2] / "profiles"
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

    profile: str = "embedded"
    seed: Seed = 0
    results_path: str = ""
    data: ClassVar[tuple[str, ...]] = ()

    def assets(self) -> list[str]:
        """Return the names of the models and data sets of the manifest that the notebook needs."""
        known = {asset.name for asset in assets.list_assets()}
        return sorted(known & {*getattr(self, "models", []), *self.data})


class Derivation(Parameters):
    """01_derivation: both approximations, one after the other, on a small classifier."""

    problem_name: MulticlassProblem = "multiclass_clusters"
    width: Count = 8
    n_samples: Annotated[int, Field(ge=100)] = 4000
    n_sigmas: Annotated[int, Field(ge=5)] = 17
    n_chains: Annotated[int, Field(ge=4)] = 8
    n_warmup: Count = 500
    n_draws: Count = 1000


class Isotropy(Parameters):
    """02_isotropy: an isotropic covariance against those made from data, on small networks and real models."""

    data = ("triviaqa", "truthfulqa", "wikidata", "all-minilm-l6-v2")
    store_dir: str = "build/store"
    problem_names: list[IsotropyProblem] = Field(
        default=["binary_rings", "binary_xor", "multiclass_spirals", "multiclass_clusters"], min_length=1
    )
    n_seeds: Count = 2
    n_chains: Annotated[int, Field(ge=4)] = 8
    n_warmup: Count = 400
    n_draws: Annotated[int, Field(ge=100)] = 500
    widths: list[Count] = Field(default=[8, 32, 128, 512, 2048], min_length=2)
    width_seeds: Count = 3
    models: Models = ["smollm2-135m-instruct"]
    n_proxies: Annotated[int, Field(ge=3)] = 13  # of each of five kinds
    n_queries: Annotated[int, Field(ge=8, multiple_of=2)] = 60
    n_checked: Count = 2  # proxies and queries whose inner products autograd computes again
    memory_gb: Annotated[float, Field(gt=0)] = 2.0
    n_resamples: Annotated[int, Field(ge=40)] = 2000  # fewer leave an end of a 95 % interval empty


class Mcmc(Parameters):
    """03_mcmc: eight problems against reference posteriors, and the network's size."""

    store_dir: str = "build/store"
    records_dir: str = "build/store/mcmc"
    n_workers: Count = 2
    n_seeds: Count = 2
    n_chains: Annotated[int, Field(ge=4)] = 8
    n_warmup: Count = 400
    n_draws: Annotated[int, Field(ge=100)] = 500
    data_sizes: list[Count] = Field(default=[20, 80, 320], min_length=2)
    size_problems: list[SyntheticProblem] = Field(default=["binary_rings", "multiclass_clusters"], min_length=1)
    size_widths: list[Count] = Field(default=[4, 16, 64], min_length=2)
    size_depths: list[Count] = Field(default=[1], min_length=1)
    size_seeds: Count = 2

    @staticmethod
    def problems() -> list[str]:
        """Return the problems whose posteriors can be sampled before the notebook starts, a job each."""
        return list(get_args(SyntheticProblem))


class LlmQa(Parameters):
    """04_llm_qa: real language models on real questions."""

    store_dir: str = "build/store"
    models: Models = ["smollm2-135m-instruct"]
    data_sets: list[DataSet] = Field(default=["triviaqa", "wikidata", "truthfulqa_choose"], min_length=1)
    n_questions: Annotated[int, Field(ge=4)] = 120  # fewer have no correlation to report
    n_shots: Annotated[int, Field(ge=0, le=32)] = 5
    n_token_mean: Annotated[int, Field(ge=0)] = 40
    engine: Engine = "auto"
    batch_size: Count = 8
    max_new_tokens: Count = 24
    n_resamples: Annotated[int, Field(ge=40)] = 2000  # fewer leave an end of a 95 % interval empty
    n_folds: Annotated[int, Field(ge=2, le=10)] = 5  # each needs right and wrong answers, of which 10 are enough

    def assets(self) -> list[str]:
        """Return the manifest's names among the models, and the data sets'."""
        return sorted({*super().assets(), *(name.removesuffix("_choose") for name in self.data_sets)})

    def scoring(self) -> dict[str, Any]:
        """Return what the scores of one model on one data set depend on; the rest only shapes their analysis."""
        return self.model_dump(exclude=SET_BY_PIPELINE | {"models", "data_sets", "n_resamples", "n_folds"})


class Cost(Parameters):
    """05_cost: time, memory and exactness of every method, measured on the machine."""

    data = ("triviaqa", "all-minilm-l6-v2")
    models: Models = ["smollm2-135m-instruct", "gemma-3-270m"]
    n_examples: Count = 8
    n_tokens: Annotated[int, Field(ge=2)] = 64
    n_answer: Count = 6
    n_points: Count = 2048
    n_rounds: Count = 6
    n_rival_rounds: Count = 2
    n_sweep_rounds: Count = 2
    memory_gb: Annotated[float, Field(gt=0)] = 5.0
    sweep_tokens: list[Annotated[int, Field(ge=2)]] = Field(default=[16, 64, 256], min_length=2)
    sweep_answers: list[Count] = Field(default=[1, 2, 4, 8], min_length=2)
    sweep_examples: list[Count] = Field(default=[1, 2, 4, 8], min_length=2)
    sweep_widths: list[Annotated[int, Field(ge=64, multiple_of=64)]] = Field(default=[128, 256, 512], min_length=2)

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

# No default that validates: a section is there, as a mapping, or the notebook does not run.
_SECTIONS = {chapter: (schema, None) for chapter, schema in SCHEMAS.items()}
Notebooks = create_model("Notebooks", __base__=_Strict, **cast(Any, _SECTIONS))


class Profile(_Strict):
    """The size of a run: what each notebook gets, and what the whole costs on 2 cores, as measured."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: Annotated[str, Field(pattern=r"\S")]  # may have several lines
    minutes: Annotated[float, Field(gt=0)]
    memory_gb: Annotated[float, Field(gt=0)]
    seed: Seed = 0
    notebooks: Notebooks  # type: ignore[valid-type]

    @pydantic.model_validator(mode="after")
    def _pipeline_sets_the_rest(self) -> "Profile":
        for chapter in self.chapters():
            taken = SET_BY_PIPELINE & getattr(self.notebooks, chapter).model_fields_set
            if taken:
                raise ValueError(f"notebooks.{chapter}.{min(taken)} is set by the pipeline; remove it")
        return self

    def chapters(self) -> list[str]:
        """Return the names of the notebooks that this profile runs, in order."""
        return sorted(self.notebooks.model_fields_set)  # type: ignore[attr-defined]

    def parameters(self, chapter: str, *, results_path: str = "") -> Parameters:
        """Return one notebook's parameters, with the profile's name and, unless it has its own, its seed."""
        if chapter not in self.chapters():
            advice = _nearest(chapter, self.chapters())
            raise ProfileError(f"profile {self.name!r} does not run {chapter!r}{advice}")
        section: Parameters = getattr(self.notebooks, chapter)
        seed = section.seed if "seed" in section.model_fields_set else self.seed
        return section.model_copy(update={"profile": self.name, "seed": seed, "results_path": results_path})


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
    except yaml.MarkedYAMLError as error:
        raise ProfileError(str(error)) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ProfileError(
            f"{path.name} cannot be read: {' '.join(str(error).split())}; wanted YAML, as UTF-8"
        ) from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path.name}: {content!r:.80} given; wanted a mapping with name, notebooks, ...")
    name = content.get("name", "")
    if not isinstance(name, str):
        raise ProfileError(f"{path.name}: name: YAML reads {name!r}, which is no text; write name: '{path.stem}'")
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
    unset = sorted(SCHEMAS[chapter].model_fields.keys() - given.keys())
    if unset:
        raise ProfileError(f"{chapter}: not set in the parameters cell, or not a plain value: {', '.join(unset)}")
    return _checked(SCHEMAS[chapter], given, where=chapter)


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.suffix not in {".yml", ".yaml"}:
        path = FOLDER / f"{path_or_name}.yml"
    if not path.is_file():
        names = sorted(p.stem for p in FOLDER.glob("*.yml"))
        listed = (
            f"profiles: {', '.join(names)}" if names else "the named ones are in a clone of isouq only; give a file"
        )
        advice = _nearest(path.stem, names) or f"; {listed}"
        raise ProfileError(f"no profile {str(path_or_name)!r}{advice}")
    return path


def _checked(schema: type[Model], content: Mapping[str, Any], *, where: str) -> Model:
    try:
        return schema.model_validate(dict(content))
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
        return f"{where} is missing"
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
