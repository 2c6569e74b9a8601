"""What a stranger relies on outside the code: pins, licence, citation, sources without outputs or private paths."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jsonschema
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from isouq.pipeline import profiles, schemas
from isouq.studies import identity

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAPER = "2603.29466"

# A home or a work folder of somebody's machine. Built from pieces, so that this file is not its own finding.
# The slash stands first: images of executed notebooks are long, and no other letter needs a second look.
PRIVATE = re.compile(
    rb"/(?<![\w.]/)(?:" + b"|".join([b"home/[a-z]", b"Users/[A-Za-z]", b"root/", b"work/", b"mnt/"]) + b")"
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def pins() -> dict[str, str]:
    """Name -> pinned version, of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [re.match(r"([a-z0-9._-]+)==([^ ;]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_by(extra: str) -> set[str]:
    """What `pip install '.[extra]'` asks for, with the extras that it names itself."""
    found = set(PROJECT["dependencies"])
    for text in PROJECT["optional-dependencies"][extra]:
        own = Requirement(text).name == PROJECT["name"]
        found |= set().union(*map(declared_by, Requirement(text).extras)) if own else {text}
    return found


distributions = functools.cache(metadata.packages_distributions)  # it takes seconds


def test_the_lock_pins_every_declared_dependency_to_a_version_that_it_allows():
    declared = {name for extra in PROJECT["optional-dependencies"] for name in declared_by(extra)}
    assert len(declared) > len(PROJECT["dependencies"]) > 0
    pinned = pins()
    for requirement in map(Requirement, declared):
        version = pinned.get(normal(requirement.name))
        assert version, f"{requirement.name} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: make lock"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_extra_notebooks_brings_what_a_notebook_and_its_modules_import(path):
    sources = ["\n".join(code_of(path)), *(file.read_text() for file in identity.module_files(path))]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"isouq"}
    brought = {normal(Requirement(text).name) for text in declared_by("notebooks")}
    assert {"papermill", "ipykernel"} < brought
    missing = {top for top in tops if not brought & set(map(normal, distributions()[top]))}
    # What these bring with them: seaborn matplotlib, pydantic its core, ipykernel the others.
    assert missing <= {"matplotlib", "pydantic_core", "IPython", "jupyter_client", "matplotlib_inline"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_alone_says_what_it_needs(path):
    blocked = "import sys\nsys.modules['isouq'] = None\n"
    command = [sys.executable, "-c", blocked + "\n".join(code_of(path)[:2])]
    run = subprocess.run(command, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith("this page needs: pip install '.[notebooks]' in a clone of isouq")


def test_the_lock_pins_exactly_and_nothing_twice():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"\S", line)]
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9._-]+==\S+( ; .+)?$", line) for line in lines)
    assert not {"torchvision", "playwright", "uv"} & pins().keys()


def test_the_conda_environment_takes_its_pins_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert f">={python.removeprefix('python=')}" == PROJECT["requires-python"]


def test_the_citation_is_valid_and_cites_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    schema = json.loads((ROOT / "tests" / "data" / "cff-1.2.0.schema.json").read_text())
    jsonschema.validate(citation, schema)
    assert [r["identifiers"][0]["value"] for r in citation["references"]] == [f"arXiv:{PAPER}"]
    del citation["authors"]
    with pytest.raises(jsonschema.ValidationError, match="'authors' is a required property"):
        jsonschema.validate(citation, schema)


def test_zenodo_and_citation_and_package_say_the_same():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for name in ("title", "version", "keywords", "license"):
        assert zenodo[name] == citation[name]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [creator["name"] for creator in zenodo["creators"]]
    assert [related["identifier"] for related in zenodo["related_identifiers"]] == [f"arXiv:{PAPER}"]
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_covers_code_and_text():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in text


def test_no_tracked_file_names_a_private_folder():
    found = {path: PRIVATE.search(path.read_bytes()) for path in tracked()}
    assert not {path: match.string[: match.end()][-60:] for path, match in found.items() if match}
    assert all(
        PRIVATE.search(text) for text in (b"see /home" + b"/ada/x", b"in '/work" + b"/main'", b"/Users" + b"/Ada")
    )


def test_no_tracked_file_is_large():
    """Executed notebooks, whose figures grow with the models, have a bound together (`kept.MOST_BYTES`)."""
    executed = {path for path in tracked() if path.parent.name == "notebooks" and "results" in path.parts}
    assert not [path for path in tracked() if path.stat().st_size > (5_000_000 if path in executed else 3_000_000)]


LIMITS = {"cells": 30, "lines of code": 150, "lines of a cell": 30}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_has_no_stored_output_and_names_the_plain_kernel(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.outputs for cell in code] == [[]] * len(code)
        assert {cell.execution_count for cell in code} == {None}
        assert notebook.metadata.kernelspec.name == "python3", "papermill by hand asks for it"

    def test_its_parameters_cell_holds_literals_that_its_schema_allows(self, path):
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert code[0].metadata.get("tags") == ["parameters", "remove-cell"]  # the page shows those of the run
        assert schemas.SCHEMAS[path.stem](**schemas.defaults(path.stem))

    def test_it_checks_its_parameters_and_saves_its_results(self, path):
        code = code_of(path)
        assert f'profiles.validate("{path.stem}", globals())' in code[1]
        used = {file.name for file in identity.module_files(path)}
        assert {"profiles.py", "plotting.py"} <= used, "an import by an old name does not tell what a change reaches"
        assert "results_path" in code[-1]

    def test_it_stays_short(self, path):
        cells = nbformat.read(path, as_version=4).cells
        code = [cell.source.splitlines() for cell in cells if cell.cell_type == "code"]
        longest = max(len(lines) for lines in code[1:])  # the first holds the parameters
        sizes = {"cells": len(cells), "lines of code": sum(map(len, code)), "lines of a cell": longest}
        assert all(sizes[name] <= limit for name, limit in LIMITS.items()), sizes


def test_every_schema_has_its_notebook_and_every_shipped_profile_runs_all():
    assert list(schemas.SCHEMAS) == [path.stem for path in NOTEBOOKS]
    chapters = {file.stem: {*profiles.load(file.stem).chapters()} for file in (ROOT / "profiles").glob("*.yml")}
    assert {"smoke", "embedded", "published"} <= chapters.keys()
    assert not {name for name in chapters if not chapters[name] >= {*schemas.SCHEMAS}}, "pages refer to every chapter"
