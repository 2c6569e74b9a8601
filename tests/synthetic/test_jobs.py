"""Jobs: each has a file of its own, and a study of many resumes, in several processes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from isouq.studies.synthetic import atlas
from isouq.studies.synthetic.plan import Job
from isouq.studies.synthetic.posterior import Settings

SMALL = Job(
    problem="regression_linear",
    resolution=12,
    n_starts=2,
    settings=Settings(n_chains=4, n_warmup=150, n_draws=250),
)


def test_jobs_that_differ_have_files_that_differ():
    others = [
        replace(SMALL, seed=1),
        replace(SMALL, n_examples=31),
        replace(SMALL, prior_scale=2.0),
        replace(SMALL, settings=replace(SMALL.settings, n_draws=251)),
    ]
    assert len({job.file() for job in (SMALL, *others)}) == 5
    assert replace(SMALL, n_examples=30).file() == SMALL.file()
    roomy = replace(SMALL.settings, memory_gb=9.0)
    assert replace(SMALL, settings=roomy).file() == SMALL.file(), "the memory allowed does not decide a draw"


def test_a_bad_job_stops_a_study_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="width: 0 given"):
        atlas.run_all([SMALL, replace(SMALL, problem="binary_xor", width=0)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_all_runs_what_is_missing_in_processes(tmp_path):
    wanted = [SMALL, replace(SMALL, n_examples=20)]
    (kept,) = atlas.run_all(wanted[:1], tmp_path)
    records = atlas.run_all(wanted, tmp_path, n_workers=2)
    assert set(tmp_path.iterdir()) == {atlas.path(job, tmp_path) for job in wanted}
    assert [record.job for record in records] == wanted
    assert records[0].facts == kept.facts, "times included: it was not run again"


def test_run_all_renews_its_processes_and_keeps_the_order(tmp_path, monkeypatch):
    pools = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, n_workers, *_):
            pools.append(n_workers)
            super().__init__(n_workers)

    monkeypatch.setattr(atlas, "PER_PROCESS", 1)
    monkeypatch.setattr(atlas, "find", lambda *_: None)
    monkeypatch.setattr(atlas, "run", lambda job, _: atlas.Record(job=job, facts={}, fields={}))
    monkeypatch.setattr(atlas.concurrent.futures, "ProcessPoolExecutor", Threads)
    wanted = [replace(SMALL, n_examples=n) for n in (20, 25, 30)]
    assert [record.job for record in atlas.run_all(wanted, tmp_path, n_workers=2)] == wanted
    assert pools == [2, 2], "the third job is left to a second pool"
