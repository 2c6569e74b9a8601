"""The jobs of a profile: as many as it says, each once, and run from the command line."""

import json
from typing import get_args

import pandas as pd
import pytest

from isouq.pipeline import jobs as pipeline_jobs
from isouq.pipeline import profiles, schemas
from isouq.studies.synthetic import atlas, findings, jobs, plan, problems


@pytest.mark.parametrize("name", ["smoke", "embedded", "published"])
def test_a_profile_asks_for_every_problem_and_repeats_nothing(name):
    section = profiles.load(name).parameters("02_mcmc")
    table, sizes = plan.table(section), plan.sizes(section)
    assert {job.problem for job in table} == set(problems.SPECS) == set(get_args(schemas.SyntheticProblem))
    assert len(table) == len(problems.SPECS) * section.n_seeds
    files = [job.file() for job in (*table, *sizes)]
    assert len(set(files)) == len(files)
    assert {job.prior_scaling for job in sizes} == {"fan_in", "fixed"}
    assert all((job.prior_scale is None) == (job.prior_scaling == "fan_in") for job in sizes)


def test_costly_networks_come_in_fewer_widths_and_seeds():
    changed = {"size_widths": [4, 8, 16, 64], "size_depths": [1, 2], "size_seeds": 4, "size_problems": ["binary_xor"]}
    section = schemas.Mcmc(**changed)
    found = {}
    for job in plan.sizes(section):
        widths, seeds = found.setdefault((job.depth, job.prior_scaling), (set(), set()))
        widths.add(job.width)
        seeds.add(job.seed)
    assert found[1, "fan_in"] == ({4, 8, 16, 64}, {0, 1, 2, 3})
    assert found[1, "fixed"] == ({4, 16, 64}, {0, 1, 2})
    assert found[2, "fan_in"] == ({4, 16}, {0, 1})
    assert found[2, "fixed"] == ({4, 16}, {0, 1})


def test_the_command_line_runs_one_problem(tmp_path, capsys):
    section = {"n_seeds": 1, "n_chains": 4, "n_warmup": 100, "n_draws": 100}
    section |= {"records_dir": str(tmp_path / "records"), "store_dir": str(tmp_path)}
    section |= {"atlas_dir": str(tmp_path / "atlas"), "atlas_problems": ["regression_linear"]}
    section |= {"priors": ["fixed"], "designs": ["no_gap"], "atlas_seeds": 1, "headline_seeds": 1}
    profile = {"name": "tiny", "description": "one job", "minutes": 1, "memory_gb": 1, "seed": 70}  # not a kept one
    (tmp_path / "tiny.yml").write_text(json.dumps(profile | {"notebooks": {"02_mcmc": section}}))
    arguments = ["--profile", str(tmp_path / "tiny.yml"), "--problem", "regression_linear"]
    pipeline_jobs.main(["sample", *arguments])
    (record,) = (tmp_path / "records").iterdir()
    assert record.name.startswith("regression_linear-w8-d0")
    assert [file.suffix for file in (tmp_path / "atlas").iterdir()] == [".npz"]
    assert capsys.readouterr().out.startswith("2 records")
    assert len(list((tmp_path / "mcmc").glob("*.nc"))) == 1


def test_the_atlas_has_every_setting_once_and_the_headline_more_seeds():
    section = profiles.load("published").parameters("02_mcmc")
    chosen, more = plan.atlas(section), plan.headline(section)
    cells = pd.DataFrame([atlas.cell(job) for job in chosen])
    assert len({job.file() for job in chosen}) == len(chosen) == 3 * (6 * 16 + 2 * 4)
    assert len(cells.drop_duplicates()) == 6 * 16 + 2 * 4
    assert findings.is_headline(pd.DataFrame([atlas.cell(job) for job in more])).all()
    assert sorted(job.problem for job in more) == sorted([*problems.SPECS] * 12)
    assert {job for job in chosen if findings.is_headline(pd.DataFrame([atlas.cell(job)])).all()} <= set(more)
    embedded = profiles.load("embedded").parameters("02_mcmc")
    assert {*plan.atlas(embedded), *plan.headline(embedded)} <= {*chosen, *more}, "the book reads the committed records"


def test_the_committed_atlas_is_small_and_of_this_version():
    section = profiles.load("published").parameters("02_mcmc")
    files = {file.name: file for file in atlas.COMMITTED.glob("*.npz")}
    wanted = {atlas.path(job, "").name: job for job in (*plan.atlas(section), *plan.headline(section))}
    assert files.keys() == wanted.keys(), "records that no job of published asks for"
    assert not [name for name in files if atlas.find(wanted[name], [atlas.COMMITTED]) is None], "of another version"
    assert sum(file.stat().st_size for file in files.values()) < 25_000_000


def test_the_committed_records_are_those_that_published_asks_for_and_the_code_makes():
    section = profiles.load("published").parameters("02_mcmc")
    wanted = [*plan.table(section), *plan.data_sizes(section), *plan.sizes(section)]
    files = {file.name: file for file in jobs.COMMITTED.glob("*.json")}
    assert files, "no record is committed: python -m isouq.pipeline.jobs sample --profile published"
    assert files.keys() <= {job.file() for job in wanted}, "records that no job of published asks for"
    stale = [job.file() for job in wanted if job.file() in files and jobs.find(job, [jobs.COMMITTED]) is None]
    assert not stale, "made by other code of isouq.studies.synthetic: remove them and sample again"
    assert sum(file.stat().st_size for file in files.values()) < 2_500_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"n_chains": 1}, "n_chains: 1 given; wanted greater than or equal to 4"),
        ({"size_widths": [0, 4]}, "size_widths.0: 0 given; wanted greater than or equal to 1"),
        ({"size_problems": ["binary_ring"]}, "did you mean 'binary_rings'"),
        ({"n_draws": 10**9, "atlas_problems": ["binary_linear"]}, "over memory_gb = 2"),
        (
            {"atlas_problems": ["regression_linear"], "designs": ["many"]},
            "designs: many given; regression_linear has gap",
        ),
        ({"widths": [0]}, "widths.0: 0 given; wanted greater than or equal to 1"),
        ({"designs": ["gaps"]}, "designs.0: 'gaps' given.*did you mean 'gap'"),
        ({"design": "few"}, "design: few given; regression_nonlinear has gap or no_gap"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_it_starts(tmp_path, section, message):
    section = {"n_seeds": 1, "records_dir": str(tmp_path / "records"), "store_dir": str(tmp_path)} | section
    profile = {"name": "tiny", "description": "none", "minutes": 1, "memory_gb": 1, "notebooks": {"02_mcmc": section}}
    (tmp_path / "tiny.yml").write_text(json.dumps(profile))
    with pytest.raises(ValueError, match=message):
        pipeline_jobs.main(["sample", "--profile", str(tmp_path / "tiny.yml")])
    assert not (tmp_path / "records").exists()
