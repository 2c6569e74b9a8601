"""What a stored number depends on, so that it is served again only where all of that is the same.

`code`: the modules that compute it; `isouq.models.weights`: a model with its tokenizer. Data, prompts and settings are
compared as what they contain (`digest`). How bytes came to the disk decides nothing once their content is compared, so
what only fetches (`isouq.studies.assets`) does not count. The committed posteriors are the exception: they hold a
version that is raised by hand, `isouq.studies.synthetic.posterior.VERSION`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def digest(content: Any) -> str:
    """Return 12 hex digits that stand for plain JSON content. Raises ValueError for NaN and infinity."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


@functools.cache  # a process goes on with the code that it has imported, whatever is written to the disk meanwhile
def code(*modules: str) -> str:
    """Return 12 hex digits of all code of isouq that the modules can reach: `code("isouq.language.scoring")`.

    Start from the module that computes, not from the command that starts it. Comments, docstrings and layout do not
    count, and the digits are the same under every Python. Raises ValueError for what is no module of isouq.
    """
    files: set[Path] = set()
    for name in modules:
        if (file := _file_of(name)) is None:
            raise ValueError(f"modules: {name!r} given, the dotted name of a module of isouq wanted")
        files.update(module_files(file))
    return digest({file.relative_to(PACKAGE).as_posix(): _canonical(_parsed(file)) for file in files})


def module_files(path: str | Path) -> list[Path]:
    """Return the files of isouq that a notebook or module uses, directly or through others, and a module itself.

    Read off the import statements, also those inside functions, so that a change of a module runs only the notebooks
    again that can reach it. The `__init__` of a package passed on the way is returned; what it imports is followed only
    where a name of its own is used.
    """
    used: set[Path] = set()
    waiting = {Path(path).resolve()} if Path(path).suffix == ".py" else _imported(Path(path))
    while waiting:
        file = waiting.pop()
        if file not in used:
            used.add(file)
            waiting |= _imported(file)
    folders = {folder for file in used for folder in file.parents if folder.is_relative_to(PACKAGE)}
    return sorted(used | {folder / "__init__.py" for folder in folders})


def _imported(path: Path) -> set[Path]:
    """Return the files of isouq that a notebook's or module's own import statements use."""
    package = list(path.resolve().relative_to(PACKAGE.parent).parts[:-1]) if path.suffix == ".py" else []
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            names.update(alias.name.split(".")[0] for alias in node.names if not alias.asname)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            names.update(name if _file_of(name) else module for name in submodules)
    return {file for file in map(_file_of, names) if file}


def _parsed(path: Path) -> ast.Module:
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
        source = "\n".join("".join(cell["source"]) for cell in cells)
    return _tree(source)


_tree = functools.lru_cache(ast.parse)  # several notebooks reach a module


def _file_of(name: str) -> Path | None:
    """Return the file of a module or package of isouq, or None where the dotted name is neither."""
    parts = name.split(".")
    stem = PACKAGE.parent.joinpath(*parts)
    files = [file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()]
    return files[0] if files and parts[0] == PACKAGE.name else None


def _canonical(node: Any) -> str:
    """Write a syntax tree without positions, bare strings (docstrings) and empty fields.

    Not with ast.unparse or ast.dump, whose output differs between versions of Python, nor as tokens, which go into
    f-strings since 3.12. A newer Python adds fields to nodes (3.12 type_params), empty in code that an older one reads.
    """
    if isinstance(node, ast.JoinedStr):  # 3.12.1 ends the format of f"{x:{width}}" with an empty string
        node = ast.JoinedStr([part for part in node.values if getattr(part, "value", None) != ""])
    if isinstance(node, list):
        return f"[{' '.join(_canonical(part) for part in node if not _is_text(part))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in {"ctx", "kind"}}
    parts = [f"{name}={_canonical(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"({' '.join([type(node).__name__, *parts])})"


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
