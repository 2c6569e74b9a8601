"""Which jobs a profile asks for.

``python -m isouq.pipeline.jobs sample --profile published`` runs the jobs that have no record yet; ``--problem`` and
``--seed`` select a share of them, for several machines.
"""

import itertools
from dataclasses import replace
from typing import Any

from isouq.studies.synthetic import problems
from isouq.studies.synthetic.atlas import MANY
from isouq.studies.synthetic.jobs import Job
from isouq.studies.synthetic.posterior import Settings

# The same for every profile, so that the records of a large run serve the small ones too. Narrow networks mix slowly
# and cost little: they get more draws, and short steps, which narrow regions of the posterior do not make diverge.
WIDE_ATLAS = Settings(n_chains=4, n_warmup=300, n_draws=750, target_accept=0.8, max_tree_depth=9)
NARROW_ATLAS = replace(WIDE_ATLAS, n_draws=1000, target_accept=0.95)
NARROW = 16
FIXED_SCALE = 1.0  # of the prior that does not shrink with the width


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
