"""Golden values of small jobs: they fail where a number changed and `posterior.VERSION` was not raised.

After a change of numbers that is meant: raise the version, then ``python tests/synthetic/test_golden.py`` writes
tests/data/golden_records.json anew, and the committed records have to be sampled again.

Short chains and smooth networks, so that processors, whose last digits differ, still agree: a difference grows with
each step. Compared are the diagnostics and every map that a record rests on, each by a weighted sum over the grid.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from isouq.studies.synthetic import point, posterior
from isouq.studies.synthetic.plan import Job
from isouq.studies.synthetic.posterior import Settings

FILE = Path(__file__).parents[1] / "data" / "golden_records.json"
SHORT = Settings(n_chains=4, n_warmup=8, n_draws=20, max_tree_depth=3)
JOBS = {
    "logistic": Job(problem="binary_linear", resolution=5, n_starts=2, settings=SHORT),
    "regression": Job(problem="regression_nonlinear", width=3, resolution=9, n_starts=2, settings=SHORT),
    "hmc, fixed prior": Job(
        problem="multiclass_clusters",
        width=3,
        prior_scaling="fixed",
        prior_scale=1.0,
        n_examples=30,
        resolution=5,
        n_starts=2,
        settings=Settings(sampler="hmc", n_chains=4, n_warmup=8, n_draws=20, trajectory_length=0.3),
    ),
}


def summary(job: Job) -> dict[str, float]:
    """Numbers of a job by name: diagnostics, and a weighted sum of each map, which no permutation leaves alone."""
    problem = job.make()
    drawn, best = posterior.sample(problem, job.settings), point.find_map(problem, n_starts=job.n_starts, seed=job.seed)
    classes = point.predicted_classes(problem, best.theta)
    reference, isotropy = posterior.reference(drawn, classes), posterior.isotropy(drawn.draws)
    maps = {name: reference[name] for name in ("mean", "variance", "mcse")}
    maps |= {"draws": drawn.draws.mean(axis=(0, 1)), "map": best.theta, "energy": drawn.energy}
    maps["gn"] = np.square(point.gradients(problem, best.theta, classes)).sum(axis=1)
    maps |= {} if (la := point.laplace(problem, best.theta, classes)) is None else {"la": la}
    sums = {f"map of {name}": float(values.ravel() @ np.cos(np.arange(values.size))) for name, values in maps.items()}
    diagnostics = {name: value for name, value in asdict(drawn.diagnostics).items() if name != "seconds"}
    named = {f".diagnostics.{name}": value for name, value in diagnostics.items()}
    return sums | named | {".isotropy": isotropy, ".map.energy": best.energy}


@pytest.mark.parametrize("name", JOBS)
def test_the_numbers_of_this_version_have_not_changed(name):
    golden = json.loads(FILE.read_text())
    assert golden["version"] == posterior.VERSION, "write the golden values of the new version: see above"
    wanted, found = golden["jobs"][name], summary(JOBS[name])
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        rel = 1e-2 if key.endswith("rhat_folded") else 1e-4  # ranks of distances from a median, some of them ties
        agrees = found[key] == pytest.approx(value, rel=rel, abs=1e-6)
        assert agrees, f"{key}: {found[key]} now, {value} in version {posterior.VERSION}: raise it, or undo the change"


if __name__ == "__main__":
    content = {"version": posterior.VERSION, "jobs": {name: summary(job) for name, job in JOBS.items()}}
    FILE.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
