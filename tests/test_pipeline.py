"""The graph of jobs: what runs, what does not run again, what a failure or a kill leaves behind.

The mechanics are tried on a copy of the pipeline with two tiny notebooks, since they are the same for large ones;
the last tests look at the real book at smoke size.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import nbformat
import pytest
import yaml

import pipeline
from isouq.pipeline import compare, kept, profiles, schemas
from pipeline import jobs

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.book

STUDY = """
import pandas as pd

def Settings(**scoring):
    return scoring

def run(model, data_set, settings, *, progress):
    return pd.DataFrame({"right": [True], "empty": [False]})
"""


ONE = {"models": ["smollm2-135m-instruct"], "data_sets": ["triviaqa"], "at_most": {}}


def write_notebook(folder: Path, chapter: str, *, module: str, body: str = "pass") -> None:
    """Write a tiny notebook with the chapter's real parameters, which uses one module of isouq."""
    cells = [
        "\n".join(f"{name} = {value!r}" for name, value in schemas.defaults(chapter).items()),
        f'from isouq.pipeline import profiles\nprofiles.validate("{chapter}", globals())',
        f"from isouq.studies import {module}, results\n{body}",
        f"results.save_results({{'x.{chapter}': results.Result(value=seed)}}, results_path)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder / "notebooks" / f"{chapter}.ipynb")


def write_profile(folder: Path, **qa) -> None:
    sections = {"01_derivation": {}, "04_llm_qa": {**ONE, "n_questions": 5, **qa}}
    content = {"name": "tiny", "description": "for a test", "minutes": 1, "memory_gb": 1, "notebooks": sections}
    (folder / "profiles" / "tiny.yml").write_text(yaml.safe_dump(content))


def command(*arguments: str) -> list[str]:
    """What the Makefile runs, up to the joined results, which need no models, data or pages."""
    return pipeline.command(*arguments, "build/tiny/results.json", profile="tiny")


def run(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return pipeline.run(folder, *arguments, "build/tiny/results.json", profile="tiny", **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A project that has been built once: do not change it, take `project`."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    shutil.copytree(ROOT / "isouq", folder / "isouq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    (folder / "isouq" / "studies" / "qa" / "study.py").write_text(STUDY)
    for name in ("notebooks", "profiles"):
        (folder / name).mkdir()
    write_notebook(folder, "01_derivation", module="plotting")
    write_notebook(folder, "04_llm_qa", module="evaluation")
    write_profile(folder)
    (folder / "build" / "tiny").mkdir(parents=True)
    (folder / "build" / "tiny" / "assets.fetched").touch()  # nothing here needs what it stands for
    first = run(folder)
    assert first.returncode == 0, first.stdout
    assert sorted(jobs(first.stdout)) == [
        "Running notebooks/01_derivation.ipynb",
        "Running notebooks/04_llm_qa.ipynb",
        "Scoring triviaqa with smollm2-135m-instruct",
    ]
    return folder


@pytest.fixture
def project(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "project")


def test_the_results_are_joined_with_the_record_of_every_run(built):
    content = json.loads((built / "build" / "tiny" / "results.json").read_text())
    assert {key: entry["value"] for key, entry in content["results"].items()} == {
        "x.01_derivation": 0,
        "x.04_llm_qa": 0,
    }
    assert {"01_derivation", "04_llm_qa", "qa-smollm2-135m-instruct-triviaqa"} == content["meta"]["durations"].keys()
    run_of = content["meta"]["runs"]["04_llm_qa"]
    assert run_of["parameters"]["n_questions"] == 5
    assert "isouq/studies/evaluation.py" in run_of["inputs"]


def test_nothing_runs_again_when_nothing_but_times_has_changed(project):
    for path in project.rglob("*"):
        if path.is_file() and ".snakemake" not in path.parts:
            path.touch()
    before = (project / "build/tiny/results.json").read_bytes()
    again = run(project)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout
    assert (project / "build/tiny/results.json").read_bytes() == before


def plan_after(project: Path) -> dict[str, str]:
    """What would run now, and why, without the job that joins the results and follows from any."""
    plan = pipeline.plan(project, "build/tiny/results.json", profile="tiny")
    assert ("Joining results" in plan) == bool(plan)
    return {job: reason for job, reason in plan.items() if job != "Joining results"}


SCORING = "Scoring triviaqa with smollm2-135m-instruct"
QA, DERIVATION = "Running notebooks/04_llm_qa.ipynb", "Running notebooks/01_derivation.ipynb"


def test_a_parameter_of_the_analysis_runs_just_its_notebook_and_the_plan_says_why(project):
    write_profile(project, n_resamples=70)
    plan = plan_after(project)
    assert plan.keys() == {QA}
    before = schemas.defaults("04_llm_qa")["n_resamples"]
    assert re.search(rf"before: \W*n_resamples: {before}\W* now: \W*n_resamples: 70\W*$", plan[QA])
    assert jobs(run(project).stdout) == [QA]


def test_parameters_of_the_scoring_score_again_leave_the_other_notebook_and_are_all_named(project):
    write_profile(project, n_questions=6, n_shots=4)
    plan = plan_after(project)
    assert plan.keys() == {SCORING, QA}
    before, now = plan[SCORING].split(" now: ")
    assert all(old in before for old in ("n_questions: 5", "n_shots: 5"))
    assert all(new in now for new in ("n_questions: 6", "n_shots: 4"))
    assert "seed" not in plan[SCORING]


def test_a_changed_file_runs_just_what_can_reach_it(project):
    def change(name: str) -> None:
        path = project / name
        path.write_text(path.read_text() + "\n# a change\n")

    change("isouq/cli.py")
    change("isouq/studies/plotting.py")
    plan = plan_after(project)
    assert plan.keys() == {DERIVATION}
    assert "Updated input files: isouq/studies/plotting.py" in plan[DERIVATION]
    change("requirements.lock")
    assert plan_after(project).keys() == {DERIVATION, QA, SCORING}


def test_an_asset_with_other_bytes_runs_what_uses_it(project):
    manifest = project / "isouq" / "studies" / "assets" / "assets.toml"
    old = "2262977fef47414b903d72c1b4e769325d4ef519481102c2ae772262163ae52d"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, "0" * 64))
    assert plan_after(project).keys() & {QA, DERIVATION} == {QA}


def test_a_failed_notebook_stops_the_build_is_kept_aside_and_its_cause_is_said(project):
    write_notebook(project, "01_derivation", module="plotting", body="def f(x):\n    return 1 / x\nf(0)")
    failed = run(project)
    assert failed.returncode != 0
    before, cause, after = failed.stdout.partition("\nZeroDivisionError: division by zero\n")
    assert before.count("notebooks/01_derivation.ipynb failed; the executed part is ") == 1
    assert cause
    assert len(after.splitlines()) <= 10, "Snakemake's closing words"
    assert "ZeroDivisionError" in (project / "build/tiny/failed/01_derivation.ipynb").read_text()
    assert not (project / "build/tiny/notebooks/01_derivation.ipynb").exists()


def test_a_run_that_was_killed_leaves_nothing_to_unlock(project):
    write_notebook(
        project, "01_derivation", module="plotting", body="open('started', 'w')\nimport time\ntime.sleep(60)"
    )
    process = subprocess.Popen(command(), cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (project / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert plan_after(project).keys() == {DERIVATION}


def test_two_runs_of_one_profile_at_once_are_refused_by_name(project):
    with (project / "build/tiny/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run(project)
        plan_after(project)  # only looks, and so may others
    assert refused.returncode != 0
    assert "another process is building build/tiny" in refused.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile=tiny", "profil=smoke"], "--config profil: not a known name; wanted profile"),
        (["profile=2024_10"], "Snakemake reads 202410, which is no name; name the file"),
    ],
)
def test_a_wrong_word_after_config_stops_all_before_anything_runs(project, words, message):
    command = [*pipeline.command("--dry-run", profile="tiny")[:-1], *words]
    refused = subprocess.run(command, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert refused.returncode != 0
    assert message in refused.stdout
    assert "Traceback" not in refused.stdout


def test_a_profile_named_like_a_number_runs_by_its_file(project):
    content = (project / "profiles" / "tiny.yml").read_text().replace("name: tiny", "name: '007'")
    (project / "profiles" / "007.yml").write_text(content)
    assert "Joining results" in pipeline.plan(project, "build/007/results.json", profile="profiles/007.yml")


def test_a_folder_whose_weights_are_replaced_is_scored_again_and_its_content_is_recorded(project):
    weights = project / "my model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    before = weights.stat()
    write_profile(project, models=["./my model"], n_resamples=70)
    assert run(project).returncode == 0
    first = json.loads((project / "build/tiny/results.json").read_text())["meta"]["runs"]["04_llm_qa"]["models"]
    assert first.keys() == {"my-model"}
    weights.write_bytes(b"two")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    plan = plan_after(project)
    assert plan.keys() == {"Scoring triviaqa with ./my model", QA}
    assert first["my-model"] in plan["Scoring triviaqa with ./my model"].split(" now: ")[0]


def test_all_runs_in_a_folder_and_with_an_interpreter_whose_names_need_quotes(built, tmp_path):
    folder = tmp_path / "Ada's bücher $HOME"
    project = shutil.copytree(built, folder / "a clone")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    own = next((folder / "venv").glob("lib/python*/site-packages"))
    (own / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    write_profile(project, n_questions=6, n_resamples=70)
    words = [str(folder / "venv" / "bin" / "python"), *command()[1:]]
    done = subprocess.run(words, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert QA in jobs(done.stdout)
    kernel = json.loads((project / "build/tiny/records/04_llm_qa.json").read_text())["kernel"]
    assert kernel["python"].endswith(platform.python_version())


def test_the_cluster_command_plans_as_it_stands_and_every_job_names_memory_and_time(project):
    text = (ROOT / "Snakefile").read_text()
    (line,) = re.findall(r"^#   \.venv/bin/python (-m snakemake .* --executor slurm .*)$", text, re.MULTILINE)
    words = line.replace("--executor slurm", "--dry-run").replace("profile=smoke", "profile=tiny").split()
    words.insert(2, "build/tiny/results.json")
    plan = subprocess.run([sys.executable, *words], cwd=project, text=True, capture_output=True)
    assert plan.returncode == 0, plan.stdout
    local = re.search(r"^localrules:\n((?:    \w+,\n)+)", text, re.MULTILINE)[1].replace(",", "").split()
    rules = dict(re.findall(r"^ *rule (\w+):\n(.*?shell:)", text, re.MULTILINE | re.DOTALL))
    assert set(local) < rules.keys()
    for name in rules.keys() - set(local):
        assert re.search(r"threads:.*resources:\s+mem_mb=.*\s+runtime=", rules[name], re.DOTALL), name


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # MAKEFLAGS of a `make test` around this test would change what the make inside it does.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=folder, text=True, env=clean, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip


def test_help_lists_every_command():
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  make ([a-z-]+)", make("help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(set(phony) - {"FORCE"})


def test_without_a_new_enough_python_make_says_what_to_install(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    refused = make("book", "PYTHON=no-such-python", folder=tmp_path)
    assert refused.returncode != 0
    assert "no Python 3.11 or newer with venv among: no-such-python" in refused.stdout
    assert not (tmp_path / ".venv").exists()


def test_a_second_run_of_the_real_book_executes_nothing(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "notebooks").iterdir()}
    again = pipeline.run(ROOT, profile="smoke")
    assert "Nothing to be done" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (smoke / "notebooks").iterdir()}


def test_the_executed_notebooks_have_their_parameters_no_error_and_no_private_path(smoke):
    profile = profiles.load("smoke")
    paths = sorted((smoke / "notebooks").glob("*.ipynb"))
    assert [path.stem for path in paths] == profile.chapters()
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), f"{path.stem} did not run to its end"
        assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
        injected = [cell.source for cell in code if "injected-parameters" in cell.metadata.get("tags", [])]
        assert len(injected) == 1
        assert 'profile = "smoke"' in injected[0]
        text = path.read_text()
        assert str(ROOT) not in text
        assert str(Path.home()) + "/" not in text


def test_the_record_names_what_ran_and_its_hashes_hold(smoke):
    content = kept.read(smoke / "results.json")
    assert all(compare.kind_of(key) for key in content["results"]), "isouq verify knows how to compare each"
    meta = content["meta"]
    assert meta["profile"] == "smoke"
    assert meta["runs"].keys() == meta["seeds"].keys() == set(profiles.load("smoke").chapters())
    assert meta["durations"].keys() >= meta["runs"].keys()
    for chapter, record in meta["runs"].items():
        assert f"notebooks/{chapter}.ipynb" in record["inputs"]
        assert record["parameters"]["profile"] == "smoke"
    assert str(ROOT) not in json.dumps(content)
    assert content["results"]
