"""Named results that mean something, notebooks that fail loudly, and a record that another run can be held against."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from isouq.pipeline import runner
from isouq.pipeline.runner import NotebookError
from isouq.studies import results
from isouq.studies.results import Result, ResultError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["value", "low", "high"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan"), True])
def test_a_result_is_a_finite_number_or_an_error(name, number):
    fields = {"value": 0.5, "low": 0.1, "high": 0.9} | {name: number}
    with pytest.raises(ResultError, match=f"{name}: .* given; wanted a finite number"):
        Result(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0.1}, "wanted both or neither"),
        ({"low": 0.9, "high": 0.1}, "low=0.9 is above high=0.1"),
        ({"n": 0}, "n: 0 given; wanted a positive whole number"),
        ({"n": True}, "n: True given; wanted a positive whole number"),
        ({"claim": "C11"}, "claim: 'C11' given; wanted C1 to C10"),
    ],
)
def test_a_result_with_half_a_meaning_is_refused(fields, message):
    with pytest.raises(ResultError, match=re.escape(message)):
        Result(value=0.5, **fields)


@pytest.mark.parametrize("key", ["", "qa", "qa.", ".qa", "QA.x", "qa.a b", "qa..x", "qa.-x", "qa/x.y"])
def test_a_key_of_another_form_is_refused_and_nothing_is_written(tmp_path, key):
    with pytest.raises(ResultError, match="dotted lower-case parts"):
        results.save_results({key: Result(value=1.0)}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_results_are_written_with_numpys_numbers_as_plain_ones(tmp_path):
    result = Result(value=np.float32(0.5), low=np.float64(0.25), high=1, n=np.int64(12), claim="C6", unit="s")
    key = "qa.smollm2-135m-instruct.triviaqa.epistemic_geometric.auroc"
    results.save_results({key: result}, tmp_path / "r.json")
    expected = {"value": 0.5, "low": 0.25, "high": 1, "n": 12, "unit": "s", "claim": "C6", "note": ""}
    assert json.loads((tmp_path / "r.json").read_text()) == {"results": {key: expected}}


def test_an_empty_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results.save_results({"a.b": Result(value=1.0)}, "")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_wherever_it_hides_and_the_old_file_stays(tmp_path):
    path = tmp_path / "r.json"
    results.write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_json({"a": [math.nan]}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def saved(folder: Path, name: str, **values: float) -> Path:
    path = folder / f"{name}.json"
    results.save_results({key.replace("__", "."): Result(value=value) for key, value in values.items()}, path)
    return path


def test_collecting_joins_results_and_keeps_the_record(tmp_path):
    first, second = saved(tmp_path, "01_a", b__y=1.0), saved(tmp_path, "02_b", a__x=2.0)
    record, timing = tmp_path / "record.json", tmp_path / "01_a.tsv"
    run = {"notebook": "01_a", "parameters": {"seed": 5}, "inputs": {"a": "0" * 64}, **runner.environment()}
    results.write_json(run, record)
    timing.write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\t-\n")
    out = tmp_path / "results.json"
    runner.collect([first, second], out, profile="smoke", records=[record], timings=[timing])
    content = json.loads(out.read_text())
    assert {key: entry["value"] for key, entry in content["results"].items()} == {"a.x": 2.0, "b.y": 1.0}
    meta = content["meta"]
    assert (meta["profile"], meta["seeds"], meta["durations"]) == ("smoke", {"01_a": 5}, {"01_a": 12.5})
    assert meta["peak_memory_mb"] == {"01_a": None}, "what was too short to be measured is not a number"
    assert meta["runs"] == {"01_a": {"parameters": {"seed": 5}, "inputs": {"a": "0" * 64}}}


def test_a_key_that_two_notebooks_write_is_refused_by_both_names(tmp_path):
    paths = [saved(tmp_path, "01_a", a__x=1.0), saved(tmp_path, "02_b", a__x=1.0)]
    with pytest.raises(ResultError, match=r"a\.x is written by 01_a and by 02_b"):
        runner.collect(paths, tmp_path / "out.json", profile="smoke", records=[], timings=[])


def test_the_environment_names_the_commit_and_versions_but_no_host_user_or_path():
    found = runner.environment()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()
    assert isinstance(found["dirty"], bool)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"isouq", "torch", "papermill", "numpyro"} <= found["versions"].keys()
    text = json.dumps(found)
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", text)


def test_without_git_the_commit_is_unknown_rather_than_wrong(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = runner.environment()
    assert (found["commit"], found["dirty"]) == (None, None)


GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "init.defaultBranch=main")


def git(folder: Path, *arguments: str) -> str:
    run = subprocess.run([*GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "-f", ".")
    git(folder, "commit", "-q", "--allow-empty", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


def clone_of_isouq(folder: Path) -> Path:
    """What tells isouq's own project from a copy of its package."""
    for name in ("isouq/pipeline/runner.py", "CITATION.cff", "profiles/published.yml", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder / "isouq"


def recorded(package: Path, monkeypatch) -> tuple[str | None, bool | None]:
    monkeypatch.setattr(runner, "PACKAGE", package)
    found = runner.environment()
    return found["commit"], found["dirty"]


@pytest.mark.parametrize("place", [".venv/lib/isouq", "vendor/isouq", "isouq"])
@pytest.mark.parametrize("committed", [True, False])
def test_a_users_project_around_a_copy_of_isouq_is_not_isouqs_commit(tmp_path, monkeypatch, place, committed):
    if not committed:
        commit_all(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    shutil.copytree(ROOT / "isouq", tmp_path / place)
    if committed:
        commit_all(tmp_path)
    assert recorded(tmp_path / place, monkeypatch) == (None, None)


def test_isouq_as_a_folder_of_another_project_has_no_commit(tmp_path, monkeypatch):
    package = clone_of_isouq(tmp_path / "third_party" / "isouq")
    commit_all(tmp_path)
    assert recorded(package, monkeypatch) == (None, None)


def test_a_clone_a_worktree_and_a_submodule_name_isouqs_commit(tmp_path, monkeypatch):
    package = clone_of_isouq(tmp_path / "clone")
    commit = commit_all(tmp_path / "clone")
    git(tmp_path / "clone", "worktree", "add", "-q", str(tmp_path / "worktree"))
    outer = tmp_path / "outer"
    outer.mkdir()
    commit_all(outer)
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(tmp_path / "clone"), "inner")
    assert recorded(tmp_path / "worktree" / "isouq", monkeypatch) == (commit, False)
    head = git(tmp_path / "clone", "rev-parse", "HEAD")
    assert recorded(outer / "inner" / "isouq", monkeypatch) == (head, False)
    package.joinpath("pipeline", "runner.py").write_text("changed")
    assert recorded(package, monkeypatch) == (head, True)


def test_another_repository_in_the_environment_is_not_asked(tmp_path, monkeypatch):
    package, other = clone_of_isouq(tmp_path / "clone"), tmp_path / "other"
    other.mkdir()
    commit_all(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert recorded(package, monkeypatch) == (None, None), "a tarball: no repository of its own"
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    commit = commit_all(tmp_path / "clone")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert recorded(package, monkeypatch) == (commit, False)


def test_a_repository_that_git_does_not_trust_has_no_commit(tmp_path, monkeypatch):
    package = clone_of_isouq(tmp_path)
    commit_all(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    if os.geteuid() != 0:
        pytest.skip("only root gives a folder away")
    os.chown(tmp_path, 65_534, 65_534)
    os.chown(tmp_path / ".git", 65_534, 65_534)
    assert recorded(package, monkeypatch) == (None, None)


SAVING = """
from isouq.studies.results import Result, save_results
save_results({'tiny.x': Result(value=seed)}, results_path)
"""


def notebook_of(folder: Path, *cells: str) -> Path:
    path = folder / "09_tiny.ipynb"
    parameters = nbformat.v4.new_code_cell('seed = 0\nresults_path = ""', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)]), path)
    return path


def run(source: Path, folder: Path) -> tuple[Path, Path]:
    parameters = {"seed": 3, "results_path": str(folder / "results" / "09_tiny.json")}
    runner.run_notebook(source, folder, parameters=parameters, models={})
    return folder / "notebooks" / source.name, folder / "records" / "09_tiny.json"


def test_a_notebook_that_runs_leaves_its_copy_its_results_and_their_hashes(tmp_path):
    source = notebook_of(tmp_path, SAVING)
    output, record = run(source, tmp_path)
    content = json.loads(record.read_text())
    assert content["parameters"]["seed"] == 3
    files = {
        "inputs": [source, ROOT / "isouq" / "studies" / "results.py", ROOT / "requirements.lock"],
        "outputs": [output],
    }
    for kind, paths in files.items():
        for path in paths:
            name = Path(os.path.relpath(path, ROOT)).as_posix()
            assert content[kind][name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "results" / "09_tiny.json").read_text())["results"]["tiny.x"]["value"] == 3
    assert list(output.parent.iterdir()) == [output]
    assert list((tmp_path / "failed").iterdir()) == []


def test_a_notebook_that_fails_is_kept_aside_and_its_cause_comes_last(tmp_path, capfd):
    source = notebook_of(tmp_path, "def f(x):\n    return 1 / x", "f(0)", "print('never')")
    with pytest.raises(NotebookError) as caught:
        run(source, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"failed; the executed part is {(tmp_path / 'failed' / source.name).as_posix()}")
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "\x1b" not in str(caught.value)
    assert (tmp_path / "failed" / "09_tiny.txt").read_text() == f"{caught.value}\n"
    assert "ZeroDivisionError" in (tmp_path / "failed" / source.name).read_text()
    assert list((tmp_path / "notebooks").iterdir()) == []
    assert not (tmp_path / "records").exists()
    run(notebook_of(tmp_path, SAVING), tmp_path)
    assert list((tmp_path / "failed").iterdir()) == [], (
        "a failure that is mended leaves no trace to be taken for a new one"
    )


def test_a_notebook_that_saves_no_results_has_failed(tmp_path):
    with pytest.raises(NotebookError, match="without save_results"):
        run(notebook_of(tmp_path, "x = 1"), tmp_path)
    assert list((tmp_path / "notebooks").iterdir()) == []


def test_a_kernel_that_dies_is_named_as_the_cause(tmp_path):
    with pytest.raises(NotebookError, match="Kernel died"):
        run(notebook_of(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), tmp_path)


# ---- models in keys, kernels and the record ---------------------------------------------------------------

MODELS = {
    "smollm2-135m-instruct": "smollm2-135m-instruct",
    "gemma-3-270m": "gemma-3-270m",
    "some-owner/Some-Model_1.5": "some-owner-some-model-1-5",
    "Owner/Name@v2.0": "owner-name-v2-0",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen-qwen2-5-0-5b-instruct",
    "/data/My model/": "my-model",
    "~/models/A 1.b": "a-1-b",
    "../x/Modell für alle": "modell-f-r-alle",
    "/data/модель": "model",
}


@pytest.mark.parametrize(("model", "key"), MODELS.items())
def test_any_models_name_makes_a_legal_part_of_a_key(tmp_path, model, key):
    assert results.key_of(model) == key
    for form in ("qa.{}.wikidata.accuracy", "cost.{}.ghost.seconds", "isotropy.{}.n"):
        path = tmp_path / "r.json"
        for given in (model, key)[".b" in model :]:  # a letter after a dot may begin the next part
            results.save_results({form.format(given): Result(value=0.5)}, path)
            assert list(json.loads(path.read_text())["results"]) == [form.format(key)]


def test_two_keys_that_are_saved_as_one_are_refused(tmp_path):
    twice = {f"qa.{name}.wikidata.accuracy": Result(value=0.5) for name in ("owner/Name", "owner-name")}
    with pytest.raises(ResultError, match=r"would be saved as qa\.owner-name\.wikidata\.accuracy, which"):
        results.save_results(twice, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_key_with_more_than_a_models_name_wrong_stays_refused(tmp_path):
    for key in ("mcmc.Binary Rings.rho", "qa.Some/Model", "qa.x.Accuracy", "qa.x..y", "QA.owner/name.x"):
        with pytest.raises(ResultError, match="dotted lower-case parts"):
            results.save_results({key: Result(value=0.5)}, tmp_path / "r.json")


def test_a_foreign_kernel_on_jupyter_path_does_not_run_the_notebook(tmp_path, monkeypatch):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    started = tmp_path / "started"
    spec = {"argv": ["touch", str(started)], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    saving = "from isouq.studies.results import *\nsave_results({'a.b': Result(value=1)}, results_path)"
    cells = ["results_path = ''\nmodels = []", saving, "import sys\nprint(sys.executable)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    parameters = {"results_path": str(tmp_path / "r.json"), "models": ["/data/My model", "~/m", "owner/name"]}
    runner.run_notebook(tmp_path / "n.ipynb", tmp_path, parameters=parameters, models={"/data/My model": "0a1b"})
    assert not started.exists()
    assert (
        nbformat.read(tmp_path / "notebooks" / "n.ipynb", as_version=4).cells[-1].outputs[0].text.strip()
        == sys.executable
    )
    record = json.loads((tmp_path / "records" / "n.json").read_text())
    assert record["kernel"]["python"].split() == ["CPython", ".".join(map(str, sys.version_info[:3]))]
    assert record["models"] == {"my-model": "0a1b"}
    assert record["parameters"] == {"results_path": ".../r.json", "models": [".../My model", ".../m", "owner/name"]}
