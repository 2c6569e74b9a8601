"""A kept run is what its record says: joined chapter by chapter, refused by name where a file is of another run."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from rocrate.rocrate import ROCrate

from isouq.pipeline import jobs, kept
from isouq.studies.results import Result, ResultError, save_results, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import build  # noqa: E402

CHAPTERS = {"01_derivation": "derivation.x.value", "04_llm_qa": "qa.m.d.likelihood.auroc"}


def run(build: Path, chapter: str, *, value: float = 0.5, commit: str = "a" * 40, dirty: bool = False) -> None:
    """Leave what a chapter's run leaves: notebook, numbers, record, and the times of its jobs."""
    notebook, results = build / "notebooks" / f"{chapter}.ipynb", build / "results" / f"{chapter}.json"
    write_json({"cells": [], "made": value}, notebook)
    save_results({CHAPTERS[chapter]: Result(value=value, n=3)}, results)
    outputs = {
        f"build/tiny/{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in (notebook, results)
    }
    own = {"notebook": chapter, "started": f"2026-01-0{1 + int(value)}T00:00:00+00:00", "parameters": {"seed": 7}}
    around = {"commit": commit, "dirty": dirty, "versions": {"isouq": "0.1.0"}, "hardware": {"cores": 2}}
    inputs = {f"notebooks/{chapter}.ipynb": "c" * 64}
    write_json(
        {**own, **around, "inputs": inputs, "models": {}, "outputs": outputs}, build / "records" / f"{chapter}.json"
    )
    (build / "timings").mkdir(exist_ok=True)
    for job in (chapter, f"{kept.prefix(chapter)[:-1]}-part"):
        (build / "timings" / f"{job}.tsv").write_text(f"s\tmax_rss\n{10 + value}\t100\n")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A clone in which both chapters have run and are kept."""
    monkeypatch.chdir(tmp_path)
    for chapter in CHAPTERS:
        run(tmp_path / "build" / "tiny", chapter)
    kept.keep("tiny")
    return tmp_path


def test_a_kept_run_has_its_chapters_numbers_notebooks_and_times(folder):
    content = kept.read("results/tiny/results.json")
    assert list(content["results"]) == sorted(CHAPTERS.values())
    assert content["meta"]["commit"] == "a" * 40
    assert content["meta"]["durations"].keys() == {*CHAPTERS, "derivation-part", "qa-part"}
    assert "commit" not in content["meta"]["runs"]["01_derivation"], "what all share is not said twice"
    for path in kept.notebooks("results/tiny"):
        assert path.read_bytes() == Path("build/tiny/notebooks", path.name).read_bytes()


def test_a_chapter_that_ran_again_replaces_its_own_part_and_says_its_commit(folder):
    before = kept.read("results/tiny/results.json")
    run(folder / "build" / "tiny", "04_llm_qa", value=1.0, commit="b" * 40)
    kept.keep("profiles/tiny.yml", ["04_llm_qa"])
    after = kept.read("results/tiny/results.json")
    assert after["results"]["qa.m.d.likelihood.auroc"]["value"] == 1.0
    assert after["results"]["derivation.x.value"] == before["results"]["derivation.x.value"]
    assert (after["meta"]["commit"], after["meta"]["runs"]["04_llm_qa"]["commit"]) == ("a" * 40, "b" * 40)
    assert after["meta"]["durations"]["qa-part"] == 11.0
    assert after["meta"]["durations"]["derivation-part"] == 10.5
    assert kept.notebooks("results/tiny")


def change_results(change) -> None:
    file = Path("results/tiny/results.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def plant(content):
    content["results"]["qa.m.d.likelihood.auroc"]["value"] = 0.51


def lose(content):
    del content["results"]["derivation.x.value"]


def forget_hashes(content):
    del content["meta"]["runs"]["04_llm_qa"]["outputs"]


def add_stranger(content):
    content["results"]["weather.oslo"] = {"value": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (plant, "the 1 numbers of 04_llm_qa are not those that its run wrote"),
        (lose, "the 0 numbers of 01_derivation are not those that its run wrote"),
        (forget_hashes, "older than such records"),
        (add_stranger, "weather.oslo belongs to no chapter of its record"),
        (lambda content: content.pop("meta"), "is not a file of joined results"),
        (lambda content: content["results"].update({"qa.x": {"value": None}}), "is not a file of joined results"),
    ],
)
def test_a_changed_half_older_or_foreign_file_is_refused_by_name(folder, change, message):
    change_results(change)
    with pytest.raises(ResultError, match=message) as refused:
        kept.read("results/tiny/results.json")
    assert "results/tiny/results.json" in str(refused.value)


def test_a_file_that_is_absent_or_was_cut_off_is_refused(folder):
    with pytest.raises(ResultError, match=r"x.json cannot be read \(No such file or directory\): make book makes one"):
        kept.read("x.json")
    file = Path("results/tiny/results.json")
    file.write_text(file.read_text()[:-100])
    with pytest.raises(ResultError, match="was cut off"):
        kept.read(file)


def test_an_executed_notebook_that_is_absent_or_of_another_run_is_named_with_the_way_out(folder):
    Path("results/tiny/notebooks/01_derivation.ipynb").unlink()
    Path("results/tiny/notebooks/04_llm_qa.ipynb").write_text("{}")
    with pytest.raises(ResultError) as refused:
        kept.notebooks("results/tiny")
    first, second, way_out = str(refused.value).splitlines()
    assert first == "results/tiny/notebooks/01_derivation.ipynb is not kept"
    assert "04_llm_qa.ipynb is not the notebook that the numbers" in second
    assert 'make keep PROFILE=tiny CHAPTERS="01_derivation 04_llm_qa"' in way_out


def test_a_site_is_built_from_what_is_kept_and_says_what_is_not(folder, monkeypatch):
    given = []
    monkeypatch.setattr(build, "build", lambda html, **how: given.append((html, how)))
    build.main(["build/site/html", "--kept", "results/tiny"])
    results, notebooks = Path("results/tiny/results.json"), sorted(Path("results/tiny/notebooks").iterdir())
    assert given == [(Path("build/site/html"), {"results": results, "notebooks": notebooks})]
    notebooks[0].unlink()
    with pytest.raises(SystemExit, match=r"01_derivation.ipynb is not kept\nrun and keep: make book PROFILE=tiny"):
        build.main(["build/site/html", "--kept", "results/tiny"])
    with pytest.raises(SystemExit, match=r"results/weather keeps no results.json; runs that are kept: tiny"):
        build.main(["build/site/html", "--kept", "results/weather"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda build: run(build, "04_llm_qa", dirty=True), "04_llm_qa ran with uncommitted changes"),
        (lambda build: (build / "notebooks" / "04_llm_qa.ipynb").write_text("{}"), "is not what the run recorded"),
        (lambda build: (build / "results" / "04_llm_qa.json").unlink(), "04_llm_qa has not run"),
        (lambda build: shutil.rmtree(build / "records"), "no chapter has run in build/tiny"),
    ],
)
def test_what_a_run_did_not_leave_whole_is_not_kept(folder, spoil, message):
    before = Path("results/tiny/results.json").read_bytes()
    spoil(folder / "build" / "tiny")
    with pytest.raises(ResultError, match=message):
        kept.keep("tiny")
    assert Path("results/tiny/results.json").read_bytes() == before


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*/results.json")), ids=lambda file: file.parent.name)
def test_the_projects_own_kept_runs_are_whole_and_small(file):
    runs = kept.read(file)["meta"]["runs"]
    paths = sorted((file.parent / "notebooks").glob("*.ipynb"))
    assert paths
    assert {path.stem for path in paths} <= runs.keys()
    assert sum(path.stat().st_size for path in paths) <= kept.MOST_BYTES
    for path in paths:
        recorded = next(value for name, value in runs[path.stem]["outputs"].items() if name.endswith(path.name))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded, path


def check_crate(place: Path) -> ROCrate:
    """Read a kept run's RO-Crate back, and hold it to the run: every chapter an action, every file its hash."""
    read, meta = ROCrate(place), kept.read(place / "results.json")["meta"]
    actions = {action.id.removeprefix("#"): action for action in read.root_dataset["mentions"]}
    assert actions.keys() == meta["runs"].keys()
    for chapter, action in actions.items():
        assert meta["runs"][chapter].get("commit", meta["commit"]) in action["instrument"]["name"]
        made = action["result"] if isinstance(action["result"], list) else [action["result"]]
        assert {entity.id for entity in made} - {"results.json"} <= {f"notebooks/{chapter}.ipynb"}
    files = [entity for entity in read.data_entities if entity.type == "File"]
    assert {"results.json", *(f"notebooks/{p.name}" for p in place.glob("notebooks/*"))} <= {file.id for file in files}
    for file in files:
        assert hashlib.sha256((place / file.id).read_bytes()).hexdigest() == file["sha256"], file.id
    return read


def test_a_kept_run_is_described_for_archives(folder):
    shutil.copy(ROOT / "CITATION.cff", folder)
    assert jobs.main(["describe", "--profile", "tiny"]) == 0
    read = check_crate(Path("results/tiny"))
    assert read.license.id == "https://spdx.org/licenses/MIT"
    action = read.get("#04_llm_qa")
    assert (action["startTime"], action["endTime"]) == ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:10+00:00")
    assert {entity["name"]: entity["value"] for entity in action["object"] if "value" in entity} == {"seed": 7}
    Path("results/tiny/results.json").write_text("{}")
    assert jobs.main(["describe", "--profile", "tiny"]) == 1


@pytest.mark.parametrize("place", sorted((ROOT / "results").iterdir()), ids=lambda place: place.name)
def test_the_projects_own_kept_runs_are_described_as_they_are(place):
    check_crate(place)
