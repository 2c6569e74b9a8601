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
# and cost little: they get twice the draws, and short steps, which narrow regions of the posterior do not make diverge.
# Wide ones cost most and mix best: they get fewer draws. Under a fixed prior the posterior is stiff and needs longer
# trajectories. All have fewer examples than in Table 1, since the cost grows with their number.
SIZE_SETTINGS = Settings(n_chains=4, n_warmup=300, n_draws=500, target_accept=0.8, max_tree_depth=8)
NARROW, WIDE = 16, 128
SIZE_EXAMPLES = 40
FIXED_SCALE = 1.0  # of the prior that does not shrink with the width
ACTIVATIONS, PRIORS = ("tanh", "relu"), ("fan_in", "fixed")
# The costly networks, those of more than one hidden layer or under a fixed prior (whose posterior is stiff), are run
# at these of the widths asked for, and on fewer seeds.
DEEP_WIDTHS, DEEP_SEEDS = (4, 16, 32), 2
FIXED_WIDTHS, FIXED_SEEDS = (4, 16, 64, 256), 3
# Those of the atlas, the same for every profile, too.
WIDE_ATLAS = Settings(n_chains=4, n_warmup=300, n_draws=750, target_accept=0.8, max_tree_depth=9)
NARROW_ATLAS = replace(WIDE_ATLAS, n_draws=1000, target_accept=0.95)
DATA_SIZE_PROBLEM, DATA_SIZE_SEEDS = "binary_rings", 3


def table(section: Any) -> list[Job]:
    """Return the jobs behind Table 1: every problem with every data seed, as in ``problems.SPECS``.

    Problems without a hidden layer get three times the draws, which are cheap and correlated. The posterior of the
    nonlinear regression, whose noise is small, has narrow regions, so its steps are shorter.
    """
    chosen = []
    for name, spec in jobs.problems.SPECS.items():
        settings = Settings(n_chains=section.n_chains, n_warmup=section.n_warmup, n_draws=section.n_draws)
        if spec.model.network.depth == 0:
            settings = replace(settings, n_draws=3 * section.n_draws)
        elif spec.model.kind == "regression":
            settings = replace(settings, target_accept=0.95)
        chosen += [Job(problem=name, seed=section.seed + k, settings=settings) for k in range(section.n_seeds)]
    return chosen


def data_sizes(section: Any) -> list[Job]:
    """Return the jobs on the number of examples: one problem, the first data seeds of Table 1."""
    of_problem = [job for job in table(section) if job.problem == DATA_SIZE_PROBLEM]
    return [replace(job, n_examples=n) for job in of_problem[:DATA_SIZE_SEEDS] for n in section.data_sizes]


def sizes(section: Any) -> list[Job]:
    """Return the jobs on the network's size: problem, activation, prior, depth, width and data seed."""
    chosen = []
    for depth, prior in itertools.product(section.size_depths, PRIORS):
        widths, n_seeds = set(section.size_widths), section.size_seeds
        if prior == "fixed":
            widths, n_seeds = widths & set(FIXED_WIDTHS), min(n_seeds, FIXED_SEEDS)
        if depth > 1:
            widths, n_seeds = set(section.size_widths) & set(DEEP_WIDTHS), min(n_seeds, DEEP_SEEDS)
        seeds = range(section.seed, section.seed + n_seeds)
        axes = (section.size_problems, ACTIVATIONS, sorted(widths), seeds)
        for problem, activation, width, seed in itertools.product(*axes):
            job = Job(
                problem=problem,
                seed=seed,
                width=width,
                depth=depth,
                activation=activation,
                prior_scaling=prior,
                prior_scale=FIXED_SCALE if prior == "fixed" else None,
                n_examples=SIZE_EXAMPLES,
                resolution=60 if problem.startswith("regression") else 12,
                n_starts=8,
                settings=_size_settings(width, prior),
            )
            chosen.append(job)
    return chosen


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
    used = findings.is_headline(pd.DataFrame([cell(job) for job in chosen]))
    return list(itertools.compress(chosen, used))


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


def _size_settings(width: int, prior: str) -> Settings:
    settings = replace(SIZE_SETTINGS, max_tree_depth=9) if prior == "fixed" else SIZE_SETTINGS
    if width <= NARROW:
        return replace(settings, n_draws=1000, target_accept=0.95)
    return replace(settings, n_warmup=200, n_draws=400) if width >= WIDE else settings
