"""The jobs of a profile: as many as it says, each once, and run from the command line."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pandas as pd
import pytest

from isouq.pipeline import jobs as pipeline_jobs
from isouq.pipeline import profiles, schemas
from isouq.studies.synthetic import atlas, findings, plan, problems


def test_the_command_line_runs_one_problem(tmp_path, capsys, monkeypatch):
    ran = []

    def run(job, folder):
        ran.append((job.file(), folder))
        return atlas.Record(job=job, facts={"passed": True, "cpu_seconds": 72}, fields={})

    monkeypatch.setattr(atlas, "run", run)
    monkeypatch.setattr(atlas.concurrent.futures, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    section = {"store_dir": str(tmp_path)}
    section |= {"atlas_dir": str(tmp_path / "atlas"), "atlas_problems": ["regression_linear"]}
    section |= {"priors": ["fixed"], "designs": ["no_gap"], "atlas_seeds": 1, "headline_seeds": 1}
    profile = {"name": "tiny", "description": "one job", "minutes": 1, "memory_gb": 1, "seed": 70}  # not a kept one
    (tmp_path / "tiny.yml").write_text(json.dumps(profile | {"notebooks": {"02_mcmc": section}}))
    arguments = ["--profile", str(tmp_path / "tiny.yml"), "--problem", "regression_linear"]
    pipeline_jobs.main(["sample", *arguments])
    [(name, folder)] = ran
    assert name.startswith("regression_linear-w8-d0")
    assert folder == str(tmp_path / "atlas")
    assert capsys.readouterr().out == "1 records, 0 of them failed the gate; 0.02 hours of one core\n"


def test_the_atlas_has_every_setting_once_and_the_headline_more_seeds():
    section = profiles.load("published").parameters("02_mcmc")
    chosen, more = plan.atlas(section), plan.headline(section)
    cells = pd.DataFrame([plan.cell(job) for job in chosen])
    assert len({job.file() for job in chosen}) == len(chosen) == 3 * (6 * 16 + 2 * 4)
    assert len(cells.drop_duplicates()) == 6 * 16 + 2 * 4
    assert set(cells["problem"]) == set(problems.SPECS) == set(get_args(schemas.SyntheticProblem))
    assert all((job.prior_scale is None) == (job.prior_scaling == "fan_in") for job in chosen)
    assert findings.is_headline(pd.DataFrame([plan.cell(job) for job in more])).all()
    assert sorted(job.problem for job in more) == sorted([*problems.SPECS] * 12)
    assert {job for job in chosen if findings.is_headline(pd.DataFrame([plan.cell(job)])).all()} <= set(more)
    embedded = profiles.load("embedded").parameters("02_mcmc")
    assert {*plan.atlas(embedded), *plan.headline(embedded)} <= {*chosen, *more}, "the book reads the committed records"


def test_the_committed_atlas_is_small_and_of_this_version():
    section = profiles.load("published").parameters("02_mcmc")
    files = {file.name: file for file in atlas.COMMITTED.glob("*.npz")}
    wanted = {atlas.path(job, "").name: job for job in (*plan.atlas(section), *plan.headline(section))}
    assert files.keys() == wanted.keys(), "records that no job of published asks for"
    assert not [name for name in files if atlas.find(wanted[name], [atlas.COMMITTED]) is None], "of another version"
    assert sum(file.stat().st_size for file in files.values()) < 25_000_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"atlas_seeds": 0}, "atlas_seeds: 0 given; wanted greater than or equal to 1"),
        ({"atlas_problems": ["binary_ring"]}, "did you mean 'binary_rings'"),
        ({"widths": [10**7], "atlas_problems": ["binary_xor"]}, "over memory_gb = 2"),
        (
            {"atlas_problems": ["regression_linear"], "designs": ["many"]},
            "designs: many given; regression_linear has gap",
        ),
        ({"widths": [0]}, "widths.0: 0 given; wanted greater than or equal to 1"),
        ({"designs": ["gaps"]}, "designs.0: 'gaps' given.*did you mean 'gap'"),
        ({"design": "few"}, "design: few given; regression_nonlinear has gap or no_gap"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_it_starts(tmp_path, capsys, section, message):
    section = {"atlas_dir": str(tmp_path / "records"), "store_dir": str(tmp_path)} | section
    profile = {"name": "tiny", "description": "none", "minutes": 1, "memory_gb": 1, "notebooks": {"02_mcmc": section}}
    (tmp_path / "tiny.yml").write_text(json.dumps(profile))
    assert pipeline_jobs.main(["sample", "--profile", str(tmp_path / "tiny.yml")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "records").exists()
