"""Build the pages of a built book with plain, newest Sphinx, and say what breaks: the way out of Jupyter Book 1.

.venv/bin/python book/canary.py build/embedded/html .venv-canary/bin/python
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from build import ANSI, BOOK, source_of

# What Jupyter Book loads and a plain build does without.
OF_JUPYTER_BOOK = ("jupyter_book", "sphinx_comments", "sphinx_jupyterbook_latex", "sphinx_thebe")
PLAIN = f"\nextensions = [name for name in extensions if name not in {OF_JUPYTER_BOOK}]\n"


def configured(source: Path) -> None:
    """Write the conf.py that Jupyter Book makes of _config.yml into `source`, without its own extensions."""
    config = source / "_config.yml"
    config.write_text((BOOK.parent / "_config.yml").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "config", "sphinx", str(source)]
    command += ["--config", str(config), "--toc", str(source / "_toc.yml")]
    subprocess.run(command, check=True, capture_output=True)
    with (source / "conf.py").open("a", encoding="utf-8") as file:
        file.write(PLAIN)


def canary(html: Path, python: Path) -> int:
    """Build with the Sphinx of another interpreter; print its warnings by kind, and return its exit status."""
    folder = html.with_name("canary").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source_of(html), folder / "book", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    configured(folder / "book")
    paths = os.pathsep.join([str(folder / "book" / "_ext"), str(BOOK.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "NO_COLOR": "1"}
    environment |= {"ISOUQ_RESULTS": str(html.with_name("results.json").resolve())}
    command = [str(python), "-m", "sphinx", "-b", "html", "-n", str(folder / "book"), str(folder / "html")]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = ANSI.sub("", run.stdout).replace(f"{folder}/", "")
    (folder / "log").write_text(text, encoding="utf-8")
    wrong = [line for line in text.splitlines() if re.search(r"(warning|error|exception):", line, re.IGNORECASE)]
    for line, times in Counter(re.sub(r"^\S*?:(\d+:)? ", "", line) for line in wrong).most_common():
        print(f"{times:4d} × {line}")
    print(f"{'Built' if not run.returncode else 'Not built'}, {len(wrong)} complaints: {folder / 'log'}")
    return run.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("html", type=Path, help="folder of the built book")
    parser.add_argument("python", type=Path, help="an interpreter that has the newest Sphinx")
    options = parser.parse_args()
    sys.exit(canary(options.html, options.python))
