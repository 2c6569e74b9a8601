"""Named results that mean something, notebooks that fail loudly, and a record that another run can be held against."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from isouq import provenance
from isouq.provenance import NotebookError, Result, ResultError

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


@pytest.mark.parametrize("key", ["", "qa", "qa.", ".qa", "QA.x", "qa.a b", "qa/x.y", "qa..x", "qa.-x"])
def test_a_key_of_another_form_is_refused_and_nothing_is_written(tmp_path, key):
    with pytest.raises(ResultError, match="dotted lower-case parts"):
        provenance.save_results({key: Result(value=1.0)}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_results_are_written_with_numpys_numbers_as_plain_ones(tmp_path):
    result = Result(value=np.float32(0.5), low=np.float64(0.25), high=1, n=np.int64(12), claim="C6", unit="s")
    key = "qa.smollm2-135m-instruct.triviaqa.epistemic_geometric.auroc"
    provenance.save_results({key: result}, tmp_path / "r.json")
    expected = {"value": 0.5, "low": 0.25, "high": 1, "n": 12, "unit": "s", "claim": "C6", "note": ""}
    assert json.loads((tmp_path / "r.json").read_text()) == {"results": {key: expected}}


def test_an_empty_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    provenance.save_results({"a.b": Result(value=1.0)}, "")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_wherever_it_hides_and_the_old_file_stays(tmp_path):
    path = tmp_path / "r.json"
    provenance.write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        provenance.write_json({"a": [math.nan]}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def saved(folder: Path, name: str, **results: float) -> Path:
    path = folder / f"{name}.json"
    provenance.save_results({key.replace("__", "."): Result(value=value) for key, value in results.items()}, path)
    return path


def test_collecting_joins_results_and_keeps_the_record(tmp_path):
    first, second = saved(tmp_path, "01_a", b__y=1.0), saved(tmp_path, "02_b", a__x=2.0)
    record, timing = tmp_path / "record.json", tmp_path / "01_a.tsv"
    run = {"notebook": "01_a", "parameters": {"seed": 5}, "inputs": {"a": "0" * 64}, **provenance.environment()}
    provenance.write_json(run, record)
    timing.write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\t-\n")
    out = tmp_path / "results.json"
    provenance.collect([first, second], out, profile="smoke", records=[record], timings=[timing])
    content = json.loads(out.read_text())
    assert {key: entry["value"] for key, entry in content["results"].items()} == {"a.x": 2.0, "b.y": 1.0}
    meta = content["meta"]
    assert (meta["profile"], meta["seeds"], meta["durations"]) == ("smoke", {"01_a": 5}, {"01_a": 12.5})
    assert meta["peak_memory_mb"] == {"01_a": None}, "what was too short to be measured is not a number"
    assert meta["runs"] == {"01_a": {"parameters": {"seed": 5}, "inputs": {"a": "0" * 64}}}


def test_a_key_that_two_notebooks_write_is_refused_by_both_names(tmp_path):
    paths = [saved(tmp_path, "01_a", a__x=1.0), saved(tmp_path, "02_b", a__x=1.0)]
    with pytest.raises(ResultError, match=r"a\.x is written by 01_a and by 02_b"):
        provenance.collect(paths, tmp_path / "out.json", profile="smoke")


def test_a_key_twice_in_one_file_is_refused_although_json_would_keep_the_last(tmp_path):
    path = saved(tmp_path, "01_a", a__x=1.0)
    entry = json.dumps(json.loads(path.read_text())["results"]["a.x"])
    path.write_text(f'{{"results": {{"a.x": {entry}, "a.x": {entry}}}}}')
    with pytest.raises(ResultError, match=r"given twice: a\.x"):
        provenance.collect([path], tmp_path / "out.json", profile="smoke")


def test_the_environment_names_the_commit_and_versions_but_no_host_user_or_path():
    found = provenance.environment()
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
    found = provenance.environment()
    assert (found["commit"], found["dirty"]) == (None, None)


def test_module_files_follow_imports_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "isouq"
    for name, source in {
        "__init__": "from isouq.deep import thing",
        "a": "def f():\n    from isouq import b",
        "b": "import numpy",
        "deep": "thing = 1",
        "unused": "",
        "sub/__init__": "from isouq import unused",
        "sub/c": "from . import d",
        "sub/d": "from ..b import something",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setattr(provenance, "PACKAGE", package)

    def found(source: str) -> set[str]:
        notebook = tmp_path / "n.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), notebook)
        return {file.relative_to(package).with_suffix("").as_posix() for file in provenance.module_files(notebook)}

    assert found("from isouq import a") == {"__init__", "a", "b"}, "also an import inside a function"
    assert found("import isouq.sub.c as c") == {"__init__", "sub/__init__", "sub/c", "sub/d", "b"}
    assert found("import isouq") == {"__init__", "deep"}, "a package's own names: what it imports counts"
    assert found("from isouq import thing") == {"__init__", "deep"}
    assert found("import isouq_other, numpy") == set()
    itself = {file.name for file in provenance.module_files(package / "a.py")}
    assert itself == {"__init__.py", "a.py", "b.py"}, "a job that runs a module depends on it"


def notebook_of(folder: Path, *cells: str) -> Path:
    path = folder / "09_tiny.ipynb"
    parameters = nbformat.v4.new_code_cell('seed = 0\nresults_path = ""', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)]), path)
    return path


def run(source: Path, folder: Path) -> tuple[Path, Path]:
    parameters = {"seed": 3, "results_path": str(folder / "results" / "09_tiny.json")}
    output, record = folder / "notebooks" / source.name, folder / "record.json"
    provenance.run_notebook(source, output, parameters=parameters, record=record, failed=folder / "failed")
    return output, record


def test_a_notebook_that_runs_leaves_its_copy_its_results_and_their_hashes(tmp_path):
    save = "save_results({'tiny.x': Result(value=seed)}, results_path)"
    source = notebook_of(tmp_path, "from isouq.provenance import Result, save_results", save)
    output, record = run(source, tmp_path)
    content = json.loads(record.read_text())
    assert content["parameters"]["seed"] == 3
    files = {"inputs": [source, ROOT / "isouq" / "provenance.py", ROOT / "requirements.lock"], "outputs": [output]}
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
    assert not (tmp_path / "record.json").exists()


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
    assert provenance.key_of(model) == key
    for form in ("qa.{}.wikidata.accuracy", "cost.{}.ghost.seconds", "isotropy.{}.n"):
        path = tmp_path / "r.json"
        for given in (model, key)[".b" in model :]:  # a letter after a dot may begin the next part
            provenance.save_results({form.format(given): Result(value=0.5)}, path)
            assert list(json.loads(path.read_text())["results"]) == [form.format(key)]


def test_two_keys_that_are_saved_as_one_are_refused(tmp_path):
    results = {f"qa.{name}.wikidata.accuracy": Result(value=0.5) for name in ("owner/Name", "owner-name")}
    with pytest.raises(ResultError, match=r"would be saved as qa\.owner-name\.wikidata\.accuracy, which"):
        provenance.save_results(results, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_key_with_more_than_a_models_name_wrong_stays_refused(tmp_path):
    for key in ("mcmc.Binary Rings.rho", "qa.Some/Model", "qa.x.Accuracy", "qa.x..y", "QA.owner/name.x"):
        with pytest.raises(ResultError, match="dotted lower-case parts"):
            provenance.save_results({key: Result(value=0.5)}, tmp_path / "r.json")


def test_a_foreign_kernel_on_jupyter_path_does_not_run_the_notebook(tmp_path, monkeypatch):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    started = tmp_path / "started"
    spec = {"argv": ["touch", str(started)], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    saving = "from isouq.provenance import *\nsave_results({'a.b': Result(value=1)}, results_path)"
    cells = ["results_path = ''\nmodels = []", saving, "import sys\nprint(sys.executable)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    parameters = {"results_path": str(tmp_path / "r.json"), "models": ["/data/My model", "~/m", "owner/name"]}
    options = {"parameters": parameters, "record": tmp_path / "record.json", "failed": tmp_path / "failed"}
    provenance.run_notebook(tmp_path / "n.ipynb", tmp_path / "out.ipynb", models={"/data/My model": "0a1b"}, **options)
    assert not started.exists()
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs[0].text.strip() == sys.executable
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["kernel"]["python"].split() == ["CPython", ".".join(map(str, sys.version_info[:3]))]
    assert record["models"] == {"my-model": "0a1b"}
    assert record["parameters"] == {"results_path": ".../r.json", "models": [".../My model", ".../m", "owner/name"]}
