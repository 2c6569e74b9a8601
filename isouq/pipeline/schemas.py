"""Types and limits of each notebook's parameters; the defaults stand in its `parameters` cell and nowhere else."""

import ast
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from isouq.models import HUB_ID
from isouq.studies import assets
from isouq.studies.qa.data import is_file, key_part
from isouq.studies.results import key_of

CLONE = Path(__file__).resolve().parents[2]  # it has the profiles and the notebooks; a wheel has neither
DATA_SETS = ("triviaqa", "wikidata", "truthfulqa", "truthfulqa_choose")  # of the last, the model picks a reference
SET_BY_PIPELINE = {"profile", "results_path"}
_TAKEN = {"machine", "chain", "dose", "ranks", "targets"}  # parts of other keys, where a model's name stands

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # numpy and jax take 32 bits, and chapters count on from it
Engine = Literal["auto", "ghost", "autograd"]
MulticlassProblem = Literal["multiclass_clusters", "multiclass_spirals", "multiclass_rings"]
RankProblem = Literal[MulticlassProblem, "binary_xor", "binary_rings"]  # classifications with a hidden layer
SyntheticProblem = Literal[
    MulticlassProblem, "binary_linear", "binary_xor", "binary_rings", "regression_linear", "regression_nonlinear"
]
BinaryDose = Literal[
    "binary_moons", "binary_spirals", "binary_checkerboard", "binary_square", "binary_sine", "binary_ellipse",
    "binary_corner",
]  # fmt: skip
MulticlassDose = Literal[
    "multiclass_stripes", "multiclass_blobs", "multiclass_pinwheel", "multiclass_shells", "multiclass_sectors"
]
DoseProblem = Literal[BinaryDose, MulticlassDose]
Activation = Literal["tanh", "relu"]
Prior = Literal["fan_in", "fixed"]
Design = Literal["few", "many", "gap", "no_gap"]  # of a classification's examples, of a regression's inputs
Item = TypeVar("Item")
NotEmpty = Annotated[list[Item], Field(min_length=1)]
Several = Annotated[list[Item], Field(min_length=2)]
Chains = Annotated[int, Field(ge=4)]
Draws = Annotated[int, Field(ge=100)]
Resamples = Annotated[int, Field(ge=40)]  # fewer leave an end of a 95 % interval empty
Gigabytes = Annotated[float, Field(gt=0)]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the known words as advice, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def defaults(chapter: str) -> dict[str, Any]:
    """Return the values in the `parameters` cell of a notebook of this clone.

    Raises:
        ValueError: isouq is installed without its notebooks.
    """
    try:
        notebook = json.loads((CLONE / "notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"notebooks/{chapter}.ipynb is not there: default values need a clone of isouq") from None
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    assignments = cast(list[ast.Assign], ast.parse("".join(cell["source"])).body)
    return {cast(ast.Name, line.targets[0]).id: ast.literal_eval(line.value) for line in assignments}


def _is_on_hub_or_here(name: str) -> bool:
    return bool("/" in name and HUB_ID.fullmatch(name)) or Path(name).expanduser().is_dir()


def _known_models(models: list[str]) -> list[str]:
    known = [asset.name for asset in assets.list_assets() if asset.kind == "causal-lm"]
    keys = dict.fromkeys(_TAKEN, "a chapter")
    for model in models:
        if not (model in known or _is_on_hub_or_here(model)):
            advice = nearest(model, known) or f"; models: {', '.join(known)}"
            raise ValueError(f"{model!r} is no model of the manifest, Hub id or folder{advice}")
        key = key_of(model.removesuffix("@main"))
        if key in keys:
            raise ValueError(f"{model!r} would name its results {key!r}, as {keys[key]} does; keep or rename one")
        keys[key] = repr(model)
    return models


def _known_data_set(name: str) -> str:
    if name not in DATA_SETS and not is_file(name):
        advice = nearest(name, DATA_SETS) or f"; sets: {', '.join(DATA_SETS)}"
        raise ValueError(f"{name!r} is no data set of the manifest and no file of questions{advice}")
    if is_file(name) and "://" not in name and not Path(name).is_file():
        raise ValueError(f"{name!r}: there is no such file")
    return name


def _known_file(name: str) -> str:
    if not (Path(name).is_file() or (CLONE / name).is_file()):
        raise ValueError(f"{name!r}: there is no such file")
    return name


def _reader(name: str) -> str:
    if not _is_on_hub_or_here(name):
        raise ValueError(f"{name!r} is no Hub id (owner/name or owner/name@revision) and no folder")
    return name


DataSet = Annotated[str, AfterValidator(_known_data_set)]
Reader = Annotated[str, AfterValidator(_reader)]  # a classifier for natural language inference
Models = Annotated[list[str], Field(min_length=1), AfterValidator(_known_models)]


class Strict(BaseModel):
    """Unknown names, other types and values that mean nothing are errors."""

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


class Parameters(Strict):
    """What every notebook takes: the profile's name, a seed, and where its named results go ("": nowhere)."""

    profile: str
    seed: Seed
    results_path: str
    chapter: ClassVar[str]
    data: ClassVar[tuple[str, ...]] = ()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        """Take what is not given from the notebook's own `parameters` cell."""
        if not isinstance(given, dict) or cls.model_fields.keys() <= given.keys():
            return given
        return defaults(cls.chapter) | given

    def assets(self) -> list[str]:
        """Return the names of the models and data sets of the manifest that the notebook needs."""
        known = {asset.name for asset in assets.list_assets()}
        return sorted(known & {*getattr(self, "models", []), *self.data})


class Derivation(Parameters):
    """Both approximations, one after the other, on a small classifier."""

    chapter = "01_derivation"
    problem_name: MulticlassProblem
    width: Count
    n_samples: Draws
    n_sigmas: Annotated[int, Field(ge=5)]
    n_chains: Chains
    n_warmup: Count
    n_draws: Count


class Mcmc(Parameters):
    """Eight problems against reference posteriors: the atlas of settings, one of them in detail, the network's size.

    The atlas has every problem with every activation, width, prior and design named, and `atlas_seeds` data seeds of
    each; its declared headline setting has `headline_seeds`. `problem` to `design` are the setting that is looked at in
    detail.
    """

    chapter = "02_mcmc"
    store_dir: str
    atlas_dir: str
    n_workers: Count
    problem: SyntheticProblem
    activation: Activation
    width: Count
    prior: Prior
    design: Design
    atlas_problems: NotEmpty[SyntheticProblem]
    activations: NotEmpty[Activation]
    widths: NotEmpty[Count]
    priors: NotEmpty[Prior]
    designs: NotEmpty[Design]
    atlas_seeds: Count
    headline_seeds: Count

    @pydantic.model_validator(mode="after")
    def _makes_sense(self) -> "Mcmc":
        named = [("design", self.problem, [self.design])]
        for field, problem, given in [*named, *(("designs", name, self.designs) for name in self.atlas_problems)]:
            wanted = ("gap", "no_gap") if problem.startswith("regression") else ("few", "many")
            if not set(given) & set(wanted):
                raise ValueError(f"{field}: {', '.join(given)} given; {problem} has {' or '.join(wanted)}")
        return self


class Isotropy(Parameters):
    """An isotropic covariance against those made from data, on small networks and real models.

    `dose_problems` to `dose_widths`: the posteriors on which claim C2 is judged; their records are kept in `dose_dir`.
    `atlas_problems` with `headline_seeds`: the posteriors of 02_mcmc on which the chain of steps is taken.
    `rank_problems` and `dose_problems` with `rank_seeds` and `widths`: the networks on which claim C3 is judged.
    """

    chapter = "03_isotropy"
    data = ("triviaqa", "wikidata", "all-minilm-l6-v2")
    store_dir: str
    dose_dir: str
    atlas_dir: str
    dose_problems: Several[DoseProblem]
    dose_seeds: Count
    dose_widths: NotEmpty[Count]
    atlas_problems: NotEmpty[SyntheticProblem]
    headline_seeds: Count
    rank_problems: NotEmpty[RankProblem]
    rank_seeds: NotEmpty[Seed]
    widths: Several[Count]
    models: Models
    n_proxies: Annotated[int, Field(ge=3)]  # of each kind, the first of which are second wordings of queries
    n_queries: Annotated[int, Field(ge=8, multiple_of=2)]
    n_checked: Count  # proxies and queries whose inner products autograd computes again
    memory_gb: Gigabytes
    n_resamples: Resamples

    @pydantic.model_validator(mode="after")
    def _leaves_queries_to_compare(self) -> "Isotropy":
        if self.n_proxies > self.n_queries // 2:
            given = f"{self.n_proxies} given for {self.n_queries} queries"
            raise ValueError(
                f"n_proxies: {given}, at most half of them wanted: the others are the control's comparison"
            )
        return self


class LlmQa(Parameters):
    """Real language models on real questions.

    Each model is asked `n_questions` of each data set, and no more than `at_most` says of the model, of the data set or
    of both ("MODEL DATA_SET"); 0 leaves a pair out. `n_token_mean`: of how many of a data set's questions the answers
    are also scored by "token_mean", which costs a backward pass per token. `n_choice`: how many choices of a model are
    also read as one class among the references, all of a model that it does not name. `bare`: of how many questions a
    pair ("MODEL DATA_SET") of those asked is also asked without examples. `nli` and `judge`: classifiers for natural
    language inference, by which samples are grouped and free answers are judged, too. `device_map`: "auto" fills the
    GPUs, None is the CPU.
    """

    chapter = "04_llm_qa"
    store_dir: str
    records_dir: str | None
    models: Models
    data_sets: NotEmpty[DataSet]
    n_questions: Annotated[int, Field(ge=4)]  # fewer have no correlation to report
    at_most: dict[str, Annotated[int, Field(ge=0)]]
    bare: dict[str, Annotated[int, Field(ge=4)]]
    n_shots: Annotated[int, Field(ge=0, le=32)]
    n_samples: Annotated[int, Field(ge=0, le=100)]
    nli: Reader | None
    judge: Reader | None
    chat: bool
    dtype: Literal["float32", "bfloat16"]
    device_map: Literal["auto"] | None
    n_token_mean: dict[DataSet, Count]
    n_choice: dict[str, Annotated[int, Field(ge=0)]]
    engine: Engine
    batch_size: Count
    max_new_tokens: Count
    n_resamples: Resamples
    n_folds: Annotated[int, Field(ge=2, le=10)]  # each needs right and wrong answers, of which 10 are enough

    @pydantic.model_validator(mode="after")
    def _makes_sense(self) -> "LlmQa":
        keys = [key_part(name) for name in self.data_sets]
        if len(set(keys)) < len(keys):
            raise ValueError(f"data_sets: {self.data_sets} would name their results alike; rename a file")
        if self.n_samples == 1:
            raise ValueError("n_samples: 1 given, which has no entropy; wanted 0 or at least 2")
        pairs = [f"{model} {data_set}" for model in self.models for data_set in self.data_sets]
        for name, most in self.at_most.items():
            if name not in (known := [*self.models, *self.data_sets, *pairs]):
                raise ValueError(f"at_most: {name!r} is no model, data set or pair of these{nearest(name, known)}")
            if 0 < most < 4:
                raise ValueError(f"at_most: {name!r} has {most}; wanted at least 4, or 0 to leave it out")
        for name in self.n_choice:
            if name not in self.models:
                raise ValueError(f"n_choice: {name!r} is no model of these{nearest(name, self.models)}")
        for model, _, data_set in (name.partition(" ") for name in self.bare):
            _known_models([model])
            if _known_data_set(data_set).startswith("truthfulqa"):
                raise ValueError(f"bare: {data_set!r} has a prompt of its own without our examples; wanted another set")
        if not self.pairs():
            raise ValueError("at_most: leaves no model and data set; wanted one")
        if (fewest := min(self._size(*pair) for pair in self.pairs())) < self.n_folds:
            raise ValueError(f"n_folds: {self.n_folds} given for {fewest} questions; wanted at most as many folds")
        if self.judge and not any(name == "truthfulqa" or is_file(name) for name in self.data_sets):
            raise ValueError(f"judge: {self.judge!r} given, and no set of free answers to judge: truthfulqa or a file")
        return self

    def pairs(self) -> list[tuple[str, DataSet]]:
        """Return each model with each data set that it is asked."""
        pairs = [(model, data_set) for model in self.models for data_set in self.data_sets]
        return [pair for pair in pairs if self._size(*pair)]

    def _size(self, model: str, data_set: DataSet) -> int:
        names = (model, data_set, f"{model} {data_set}")
        return min([self.n_questions, *(self.at_most[name] for name in names if name in self.at_most)])

    def assets(self) -> list[str]:
        """Return the manifest's names among the models, the data sets', and what judges and rivals need."""
        used = {name.removesuffix("_choose") for name in self.data_sets if not is_file(name)}
        if self.n_samples or len(used) < len(self.data_sets) or "truthfulqa" in self.data_sets:
            used.add("all-minilm-l6-v2")
        if self.n_samples and "truthfulqa" in used:  # its questions are all asked: examples come from elsewhere
            used.add("triviaqa")
        return sorted({*super().assets(), *used})

    def bare_pairs(self) -> list[tuple[str, DataSet]]:
        """Return the pairs of `pairs` that are asked without examples too."""
        return [pair for pair in self.pairs() if " ".join(pair) in self.bare]

    def scoring(self, model: str, data_set: DataSet, *, bare: bool = False) -> dict[str, Any]:
        """Return what the scores of one model on one data set depend on; the rest only shapes their analysis."""
        left_out = SET_BY_PIPELINE | {"models", "data_sets", "at_most", "bare", "n_resamples", "n_folds"}
        sizes = {"n_questions": self._size(model, data_set), "n_token_mean": self.n_token_mean.get(data_set, 0)}
        if bare:
            sizes = {"n_questions": min(sizes["n_questions"], self.bare[f"{model} {data_set}"]), "n_token_mean": 0}
            sizes["n_shots"] = 0
        return self.model_dump(exclude=left_out) | sizes | {"n_choice": self.n_choice.get(model)}


class Cost(Parameters):
    """Time, memory and exactness of every method, measured on the machine."""

    chapter = "05_cost"
    data = ("triviaqa", "all-minilm-l6-v2")
    models: Models
    n_examples: Count
    n_tokens: Annotated[int, Field(ge=2)]
    n_answer: Count
    n_rounds: Count
    n_rival_rounds: Count
    n_sweep_rounds: Count
    memory_gb: Gigabytes
    sweep_tokens: Several[Annotated[int, Field(ge=2)]]
    sweep_answers: Several[Count]
    sweep_examples: Several[Count]

    @pydantic.model_validator(mode="after")
    def _answer_in_text(self) -> "Cost":
        longest = max(self.n_answer, *self.sweep_answers)
        if longest >= self.n_tokens or self.n_answer >= min(self.sweep_tokens):
            raise ValueError(f"an answer of {longest} tokens does not leave the question one; make n_tokens larger")
        return self


class YourModel(Parameters):
    """A model of one's own and a file of questions, from scores to a decision.

    `file` is a table (.csv, .jsonl, .parquet) with the column `prompt`; without a column `answer` the model answers.
    Answers are right as the column `label` says, or, without one, as `judge` finds by the column `reference`.
    """

    chapter = "06_your_model"
    work_dir: str
    model: Annotated[str, AfterValidator(lambda name: _known_models([name])[0])]
    file: Annotated[str, AfterValidator(_known_file)]
    prompt: str
    answer: str | None
    label: str | None
    reference: str
    judge: Literal["exact", "f1", "contains"]
    clusters: str | None  # a column: rows of one cell are resampled together
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    chat: bool
    max_new_tokens: Count
    n_looked_at: Count  # answers whose layers are drawn
    n_resamples: Resamples

    @property
    def models(self) -> list[str]:
        """The model, as other chapters list theirs."""
        return [self.model]


# The notebooks that a profile can name; they run in the order of their numbers.
SCHEMAS: dict[str, type[Parameters]] = {
    schema.chapter: schema for schema in (Derivation, Mcmc, Isotropy, LlmQa, Cost, YourModel)
}
