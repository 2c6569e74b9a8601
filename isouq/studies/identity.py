"""What a stored number depends on, so that it is served again only where all of that is the same.

Data, prompts and settings are compared as what they contain (`digest`), a model with its tokenizer by
`isouq.models.weights`, libraries by `versions`. Code counts as a VERSION, raised by hand where a number changes, in
`isouq.studies.synthetic.posterior`, `isouq.studies.qa.stages` and `isouq.studies.isotropy.language`; golden values and
the reference engine guard it. So no change of words throws hours of work away. Which notebooks have to run again is
another question (`module_files`).
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
