"""The folder tree is the design: which module may import which, how large a file may grow, what the README shows."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "isouq"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


MODULES = [ROOT / path for path in tracked() if path.parts[0] == "isouq" and path.suffix == ".py"]

# Rooms from left to right: a room imports only from rooms in steps before its own. `qa` and `synthetic` come after
# the assets and profiles, since a scoring job is started with a profile and fetches its model.
STEPS = (
    ("identity", "checks"),
    ("store",),
    ("estimate", "gradients", "encoding", "files", "evaluation", "plotting", "provenance", "_manifest"),
    ("covariance", "sequences", "_pip"),
    ("forward",),
    ("distortion", "causal_lm", "classifier"),
    ("assets",),
    ("profiles",),
    ("qa", "synthetic"),
    ("isotropy", "cost", "scoring"),
    ("cli",),
)
STEP = {room: number for number, rooms in enumerate(STEPS) for room in rooms}

ONLY_IN = {
    "jax": {"synthetic"},
    "numpyro": {"synthetic"},
    "transformers": {"causal_lm", "qa", "assets", "isotropy", "cost"},
}
FILE_LINES = 400
CODE_LINES = 7350  # without blank lines, comments and docstrings


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports_of(path: Path) -> set[str]:
    """Every dotted name that a module imports, also inside functions, as seen from the top."""
    folder = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_its_left(path):
    room = room_of(path)
    if room == "__init__":
        return  # the public names come from everywhere, and no module needs them
    assert room in STEP, f"{room} has no place in the order of imports"
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "isouq" and rest and rest[0] != room:
            assert rest[0] in STEP, f"{path.name} imports {name}: import from the module that defines it"
            assert STEP[rest[0]] < STEP[room], f"{room} may not import {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_stays_in_its_rooms(library):
    users = {room_of(path) for path in MODULES if library in {name.split(".")[0] for name in imports_of(path)}}
    assert users
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_grows_past_what_one_can_read(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES


def test_the_package_stays_small():
    assert sum(code_lines(path) for path in MODULES) <= CODE_LINES


def code_lines(path: Path) -> int:
    """Lines with code on them: not blank, no comment, no docstring."""
    source = path.read_text()
    lines = {number for number, line in enumerate(source.splitlines(), 1) if re.match(r"\s*[^\s#]", line)}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def readme_tree() -> str:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    trees = [block for block in blocks if re.search(r"^\W*isouq/", block, re.MULTILINE)]
    assert len(trees) == 1, "the README shows the folder tree once, in a fenced block"
    return trees[0]


def test_the_readmes_tree_shows_every_module_notebook_and_profile():
    tree = readme_tree()
    shown = {word.strip(",;:·()") for word in tree.split()}
    for path in tracked():
        if path.name.startswith(".git"):
            continue
        if len(path.parts) == 1:
            names = {path.name}
        elif path.parts[0] in {"notebooks", "profiles"} or (path.parts[0] == "isouq" and path.suffix == ".py"):
            names = {path.name, path.stem} if path.name != "__init__.py" else {f"{path.parent.name}/"}
        else:
            names = {f"{path.parts[0]}/"}
        assert names & shown, f"{path} is not in the README's tree"


def test_the_readmes_tree_shows_nothing_that_is_not_there():
    names = {part + "/" for path in tracked() for part in path.parts[:-1]} | {path.name for path in tracked()}
    shown = re.findall(r"(?<!\S)(?:[\w.]+/|[\w.]+\.(?:py|yml|toml|lock|cff|json|ipynb))(?=[\s,;·]|$)", readme_tree())
    assert shown
    assert set(shown) <= names
