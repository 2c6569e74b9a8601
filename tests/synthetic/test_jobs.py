"""Jobs: resumable, one small record each, and statistics over them that are right on known input."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from isouq.studies.identity import digest
from isouq.studies.synthetic import jobs, posterior
from isouq.studies.synthetic.jobs import Job
from isouq.studies.synthetic.posterior import Settings

SMALL = Job(
    problem="regression_linear",
    resolution=12,
    n_starts=2,
    settings=Settings(n_chains=4, n_warmup=150, n_draws=250),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    return folder, jobs.run(SMALL, folder, folder / "draws")


def test_a_record_is_small_and_complete(made):
    folder, record = made
    file = folder / SMALL.file()
    assert file.stat().st_size < 4000
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert record["correlation"]["la"]["pearson"] > 0.98
    assert record["correlation"]["delta"]["pearson"] > 0.999
    assert record["correlation"]["gn"] == pytest.approx(record["correlation"]["gn_draws"])
    assert 0.9 < record["ceiling"]["epistemic"]["pearson"] <= 1
    assert "aleatoric" not in record["ceiling"]


def test_what_is_there_is_not_run_again(made, monkeypatch):
    folder, record = made
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("ran again"))
    again = jobs.run_all([SMALL, SMALL], folder)
    assert again == [json.loads(json.dumps(record))] * 2


def test_a_record_of_another_version_does_not_count(made, monkeypatch):
    folder, _ = made
    assert jobs.find(SMALL, [folder]) is not None
    monkeypatch.setattr(posterior, "VERSION", 0)
    assert jobs.find(SMALL, [folder]) is None


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


def without(name):
    return lambda record: {key: value for key, value in record.items() if key != name}


def with_value(value, *path):
    def change(record):
        record = inner = json.loads(json.dumps(record))
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return record

    return change


DAMAGE = {f"without {name}": without(name) for name in ("between_share", "job", "version", "content", "scale")}
DAMAGE |= {
    "NaN": with_value(float("nan"), "isotropy"),
    "infinity": with_value(float("inf"), "scale", "sigma2"),
    "a number as text": with_value("0.5", "isotropy"),
    "another number": with_value(0.123456, "correlation", "gn", "spearman"),
    "one key more": with_value(1, "extra"),
    "passed with failures": with_value(["split R-hat 1.2 > 1.01"], "failures"),
    "another job": with_value(1, "job", "seed"),
    "a list": lambda record: [record],
    "a number": lambda record: 1,
    "null": lambda record: None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_record_that_is_not_as_it_was_written_is_refused(made, tmp_path, damage):
    (tmp_path / SMALL.file()).write_text(json.dumps(damage(made[1])))
    with pytest.raises(
        ValueError, match=rf"{SMALL.file()} is not a record of a job.*; delete it, and the job runs again"
    ):
        jobs.find(SMALL, [tmp_path])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b'{"job": {}'], ids=["empty", "cut", "no UTF-8", "cut"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / SMALL.file()).write_bytes(content)
    with pytest.raises(ValueError, match="is not a record of a job"):
        jobs.find(SMALL, [tmp_path])


def test_a_folder_in_the_place_of_a_record_is_refused(tmp_path):
    (tmp_path / SMALL.file()).mkdir()
    with pytest.raises(ValueError, match="is not a record of a job"):
        jobs.find(SMALL, [tmp_path])


def test_the_record_of_another_job_is_refused_by_both_names(made, tmp_path):
    other = replace(SMALL, seed=1)
    (tmp_path / other.file()).write_text((made[0] / SMALL.file()).read_text())
    with pytest.raises(ValueError, match=f"{other.file()} is not .* or not of this one .it belongs to {SMALL.file()}"):
        jobs.find(other, [tmp_path])


def test_a_job_that_says_the_same_in_other_words_has_the_same_record(made):
    folder, record = made
    roomy = replace(SMALL, n_examples=30, settings=replace(SMALL.settings, memory_gb=9.0))
    assert jobs.find(roomy, [folder]) == json.loads(json.dumps(record))


def test_a_number_that_a_failed_posterior_lacks_is_null(tmp_path, monkeypatch):
    plain = jobs.record
    monkeypatch.setattr(jobs, "record", lambda case: plain(case) | {"relative_mcse": float("nan")})
    made = jobs.run(SMALL, tmp_path)
    assert made["relative_mcse"] is None
    assert made["content"] == digest({name: value for name, value in made.items() if name != "content"})
    assert jobs.find(SMALL, [tmp_path]) == json.loads(json.dumps(made))


def test_a_bad_job_stops_a_study_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="width: 0 given"):
        jobs.run_all([SMALL, replace(SMALL, problem="binary_xor", width=0)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_all_runs_what_is_missing_in_processes(made, tmp_path):
    _, record = made
    wanted = [SMALL, replace(SMALL, n_examples=20)]
    records = jobs.run_all(wanted, tmp_path, n_workers=2)
    assert {file.name for file in tmp_path.iterdir()} == {job.file() for job in wanted}
    assert [one["n_examples"] for one in records] == [30, 20]
    assert records[0]["correlation"]["gn"] == pytest.approx(record["correlation"]["gn"])


def test_run_all_renews_its_processes_and_keeps_the_order(tmp_path, monkeypatch):
    pools = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, n_workers, *_):
            pools.append(n_workers)
            super().__init__(n_workers)

    monkeypatch.setattr(jobs, "PER_PROCESS", 1)
    monkeypatch.setattr(jobs, "run", lambda job, *_: {"n_examples": job.n_examples})
    monkeypatch.setattr(jobs.concurrent.futures, "ProcessPoolExecutor", Threads)
    records = jobs.run_all([replace(SMALL, n_examples=n) for n in (20, 25, 30)], tmp_path, n_workers=2)
    assert [record["n_examples"] for record in records] == [20, 25, 30]
    assert pools == [2, 2], "the third job is left to a second pool"


def test_a_constant_map_has_no_correlation():
    found = jobs.correlations(np.ones(5), np.arange(5.0))
    assert found == {"pearson": None, "spearman": None}
    with pytest.raises(ValueError, match="a: NaN or infinite at 1 of 2"):
        jobs.correlations(np.array([1.0, np.nan]), np.arange(2.0))


def test_mean_interval_is_the_t_interval_of_fishers_z():
    found = jobs.mean_interval(np.tanh([0.5, 0.6, 0.7]))
    assert found.value == pytest.approx(np.tanh(0.6))
    assert found.low == pytest.approx(np.tanh(0.6 - 4.302653 * 0.1 / np.sqrt(3)), abs=1e-6)
    assert jobs.mean_interval([0.9, 0.99]).high < 1, "not cut, but ends before one"
    assert jobs.mean_interval([0.9]) is None


def test_trend_finds_a_known_slope_whatever_the_intercepts():
    rng = np.random.default_rng(0)
    doublings = np.tile(np.arange(6.0), 10)
    group = np.repeat(np.arange(10), 6)
    values = 0.05 * doublings + rng.normal(size=10)[group] + 0.01 * rng.normal(size=60)
    found = jobs.trend(doublings, values, group)
    assert found.low < 0.05 < found.high
    assert found.high - found.low < 0.02
    with pytest.raises(ValueError, match="at least 2"):
        jobs.trend(doublings[:6], values[:6], group[:6])
