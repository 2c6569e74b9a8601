"""Lay the pages and the executed notebooks into one folder, and have Jupyter Book read it, without a warning.

python book/build.py build/smoke/html --results build/smoke/results.json --notebooks build/smoke/notebooks/*.ipynb
python book/build.py build/site/html --kept results/published
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from isouq.pipeline import kept
from isouq.studies.results import ResultError

BOOK = Path(__file__).resolve().parent
ICONS = re.compile(r"<script[^>]*/fontawesome\.js[^>]*></script>")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def source_of(html: Path) -> Path:
    """Return the folder beside the built book that holds its pages' source; its name is no other build's, nor ours."""
    return html.with_name(f"{html.name}-source")


def build(html: Path, *, results: Path, notebooks: Sequence[Path]) -> None:
    """Build the book into the folder `html`; its source stays beside it (`source_of`), what Sphinx wrote in a log."""
    print("Building the book", file=sys.stderr, flush=True)
    source, log = source_of(html), html.with_name(f"{html.name}.log")
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "notebooks").mkdir(exist_ok=True)
    for notebook in notebooks:
        (source / "notebooks" / notebook.name).write_text(folded(notebook), encoding="utf-8")
    toc = source / "_toc.yml"
    chapters = {notebook.stem for notebook in notebooks}
    toc.write_text(yaml.safe_dump(without_absent(yaml.safe_load(toc.read_text()), chapters), sort_keys=False))
    pages = sphinx(source, log, results=results)
    lighten(pages)
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(pages, html)


def sphinx(source: Path, log: Path, *, results: Path, builder: str = "html") -> Path:
    """Have Jupyter Book read the pages in `source` with one of Sphinx's builders, and return what it wrote."""
    folder = source / "_build" / builder
    shutil.rmtree(folder, ignore_errors=True)  # an EPUB holds whatever an earlier build left there
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source)]
    command += ["--config", str(BOOK.parent / "_config.yml"), "--toc", str(source.resolve() / "_toc.yml")]
    command += ["--builder", "custom", "--custom-builder", builder, "--path-output", str(source)]
    command += ["-n", "-W", "--keep-going"]
    with log.open("w") as stream:
        environment = os.environ | {"ISOUQ_RESULTS": str(results.resolve()), "NO_COLOR": "1"}
        run = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if run.returncode:
        lines = ANSI.sub("", log.read_text()).splitlines()
        wrong = [line for line in lines if re.search("warning:|error:|exception", line, re.I)] or lines[-30:]
        sys.exit("\n".join([*wrong, f"The book has warnings or errors, above; the whole log is {log}"]))
    return folder


def lighten(html: Path) -> None:
    """Leave out the theme's 1.5 MB of icons as JavaScript: its style sheet draws the same icons from a font."""
    for page in html.rglob("*.html"):
        page.write_text(ICONS.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (html / "_static" / "scripts").glob("fontawesome.js*"):
        file.unlink()


def folded(notebook: Path) -> str:
    """The text of an executed notebook with its run's parameters folded, so that a page begins with its chapter."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-input")
            cell["metadata"]["mystnb"] = {"code_prompt_show": "Show the parameters of this run"}
    return json.dumps(content, ensure_ascii=False)


def without_absent(entry: Any, chapters: set[str]) -> Any:
    """The table of contents without the chapters that this profile does not run."""
    if isinstance(entry, list):
        return [kept for kept in (without_absent(part, chapters) for part in entry) if kept is not None]
    if isinstance(entry, dict):
        chapter = re.match("notebooks/(.*)", str(entry.get("file", "")))
        if chapter and chapter[1] not in chapters:
            return None
        return {key: without_absent(value, chapters) for key, value in entry.items()}
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the book of a run, or of a kept run, which says by name what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("html", type=Path)
    parser.add_argument("--kept", type=Path, help="folder of a kept run, in place of the next two")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--notebooks", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    if bool(given.kept) == bool(given.results and given.notebooks):
        parser.error("wanted either --kept, or --results with --notebooks")
    try:
        notebooks = kept.notebooks(given.kept) if given.kept else given.notebooks
    except ResultError as error:
        sys.exit(str(error))
    build(given.html, results=given.results or given.kept / "results.json", notebooks=notebooks)


if __name__ == "__main__":
    main()
