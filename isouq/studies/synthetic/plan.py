"""Which jobs a profile asks for; a job is a problem, a data seed and a network, and how its posterior is sampled.

``python -m isouq.pipeline.jobs sample --profile published`` runs the jobs that have no record yet; ``--problem`` and
``--seed`` select a share of them, for several machines.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from isouq.studies import require
from isouq.studies.identity import digest
from isouq.studies.synthetic import problems
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Problem

FACTORS = ["problem", "activation", "width", "prior", "design"]
MANY = 200  # examples of a classification in its other design
# The same for every profile, so that the records of a large run serve the small ones too. Narrow networks mix slowly
# and cost little: they get more draws, and short steps, which narrow regions of the posterior do not make diverge.
WIDE_ATLAS = Settings(n_chains=4, n_warmup=300, n_draws=750, target_accept=0.8, max_tree_depth=9)
NARROW_ATLAS = replace(WIDE_ATLAS, n_draws=1000, target_accept=0.95)
NARROW = 16
FIXED_SCALE = 1.0  # of the prior that does not shrink with the width


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to sample and how; fields left None take the values of the problem's ``spec``."""

    problem: str
    seed: int = 0
    width: int | None = None
    depth: int | None = None
    activation: str | None = None
    prior_scale: float | None = None
    prior_scaling: str | None = None
    n_examples: int | None = None
    gap: bool | None = None
    resolution: int | None = None
    n_starts: int = 16
    settings: Settings = field(default_factory=Settings)

    def make(self) -> Problem:
        """Make the problem. Raises ValueError for unknown or impossible settings, before anything is sampled."""
        require.count("n_starts", self.n_starts)
        model = problems.spec(self.problem).model
        network = replace(model.network, **self._given("width", "depth", "activation"))
        model = replace(model, network=network, **self._given("prior_scale", "prior_scaling"))
        data = {name: getattr(self, name) for name in ("seed", "n_examples", "resolution", "gap")}
        problem = problems.make(self.problem, model=model, **data)
        self.settings.require_memory(problem)
        return problem

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def file(self) -> str:
        """Return the name of the job's record: readable, and unique to the data, the model and the settings."""
        problem = self.make()
        network = problem.model.network
        key = digest([problem.fingerprint(), self.settings.identity(), self.n_starts])[:8]
        size = f"w{network.width}-d{network.depth}-{network.activation}-{problem.model.prior_scaling}"
        return f"{self.problem}-{size}-n{len(problem.inputs)}-s{self.seed}-{key}.npz"


def cell(job: Job) -> dict[str, Any]:
    """Return a job's FACTORS by name; a problem without a hidden layer has the activation "linear" and width 0."""
    model = problems.spec(job.problem).model
    linear = model.network.depth == 0
    if model.kind == "regression":
        with_gap = job.problem == "regression_nonlinear" if job.gap is None else job.gap
        design = "gap" if with_gap else "no_gap"
    else:
        design = "many" if job.n_examples == MANY else "few"
    return {
        "problem": job.problem,
        "activation": "linear" if linear else job.activation or model.network.activation,
        "width": 0 if linear else job.width or model.network.width,
        "prior": job.prior_scaling or model.prior_scaling,
        "design": design,
    }


def atlas(section: Any) -> list[Job]:
    """Return the jobs of the atlas: every problem with every setting and data seed that the section names.

    A design that a kind of problem does not have, and the activation and width of a problem without a hidden layer,
    make no jobs of their own.
    """
    factors = (section.activations, section.widths, section.priors, section.designs)
    settings = itertools.product(_seeds(section, section.atlas_seeds), section.atlas_problems, *factors)
    return list(dict.fromkeys(job for setting in settings if (job := atlas_job(*setting)) is not None))


def headline(section: Any) -> list[Job]:
    """Return the jobs of the headline setting, which has more data seeds than the rest of the atlas."""
    chosen = itertools.product(_seeds(section, section.headline_seeds), section.atlas_problems)
    return [headline_job(seed, problem) for seed, problem in chosen]


def dose(section: Any) -> list[Job]:
    """Return the jobs behind claim C2: `dose_problems` with `dose_seeds`, in the headline setting at `dose_widths`."""
    chosen = itertools.product(section.dose_widths, _seeds(section, section.dose_seeds), section.dose_problems)
    return [headline_job(seed, problem, width) for width, seed, problem in chosen]


def _seeds(section: Any, n: int) -> range:
    return range(section.seed, section.seed + n)


def headline_job(seed: int, problem: str, width: int = 32, prior: str = "fixed") -> Job:
    """Return the job of the headline setting (``findings.is_headline``), or of one that differs in width or prior."""
    kind = problems.spec(problem).model.kind
    activation, design = "relu" if kind == "multiclass" else "tanh", "no_gap" if kind == "regression" else "few"
    job = atlas_job(seed, problem, activation, width, prior, design)
    assert job is not None  # every problem has one of the two designs
    return job


def atlas_job(seed: int, problem: str, activation: str, width: int, prior: str, design: str) -> Job | None:
    """Return the job of one setting with one data seed, or None for a design that the problem does not have."""
    model = problems.spec(problem).model
    linear, regression = model.network.depth == 0, model.kind == "regression"
    if regression != (design in ("gap", "no_gap")):
        return None
    return Job(
        problem=problem,
        seed=seed,
        width=None if linear else width,
        activation=None if linear else activation,
        prior_scaling=prior,
        prior_scale=FIXED_SCALE if prior == "fixed" else None,
        n_examples=MANY if design == "many" else None,
        gap=(design == "gap") if regression else None,
        n_starts=8,
        settings=NARROW_ATLAS if linear or width <= NARROW else WIDE_ATLAS,
    )
