"""Which jobs a profile asks for.

``python -m isouq.pipeline.jobs sample --profile published`` runs the jobs that have no record yet; ``--problem`` and
``--seed`` select a share of them, for several machines.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from isouq.studies.synthetic import findings, jobs
from isouq.studies.synthetic.atlas import MANY, cell
from isouq.studies.synthetic.jobs import Job
from isouq.studies.synthetic.posterior import Settings

# The same for every profile, so that the records of a large run serve the small ones too. Narrow networks mix slowly
# and cost little: they get more draws, and short steps, which narrow regions of the posterior do not make diverge.
WIDE_ATLAS = Settings(n_chains=4, n_warmup=300, n_draws=750, target_accept=0.8, max_tree_depth=9)
NARROW_ATLAS = replace(WIDE_ATLAS, n_draws=1000, target_accept=0.95)
NARROW = 16
FIXED_SCALE = 1.0  # of the prior that does not shrink with the width
ACTIVATIONS = ("tanh", "relu")


def atlas(section: Any) -> list[Job]:
    """Return the jobs of the atlas: every problem with every setting and data seed that the section names.

    A design that a kind of problem does not have, and the activation and width of a problem without a hidden layer,
    make no jobs of their own.
    """
    factors = (section.activations, section.widths, section.priors, section.designs)
    return _grid(section, section.atlas_seeds, *factors)


def headline(section: Any) -> list[Job]:
    """Return the jobs of the headline setting, which has more data seeds than the rest of the atlas."""
    chosen = _grid(section, section.headline_seeds, ACTIVATIONS, (32,), ("fixed",), ("few", "no_gap"))
    return list(itertools.compress(chosen, findings.is_headline(pd.DataFrame([cell(job) for job in chosen]))))


def dose(section: Any) -> list[Job]:
    """Return the jobs behind claim C2: `dose_problems` with `dose_seeds`, in the headline setting at `dose_widths`."""
    chosen = []
    seeds = range(section.seed, section.seed + section.dose_seeds)
    for width, seed, problem in itertools.product(section.dose_widths, seeds, section.dose_problems):
        activation = "relu" if jobs.problems.spec(problem).model.kind == "multiclass" else "tanh"
        chosen.append(atlas_job(seed, problem, activation, width, "fixed", "few"))
    return [job for job in chosen if job is not None]


def _grid(section: Any, n_seeds: int, *factors: Iterable[Any]) -> list[Job]:
    seeds = range(section.seed, section.seed + n_seeds)
    settings = itertools.product(seeds, section.atlas_problems, *factors)
    return list(dict.fromkeys(job for setting in settings if (job := atlas_job(*setting)) is not None))


def atlas_job(seed: int, problem: str, activation: str, width: int, prior: str, design: str) -> Job | None:
    """Return the job of one setting with one data seed, or None for a design that the problem does not have."""
    model = jobs.problems.spec(problem).model
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
