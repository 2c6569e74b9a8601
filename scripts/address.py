"""Write the repository's address where it has to stand; the only place that needs it is this command.

    make address URL=https://github.com/OWNER/NAME

pyproject.toml, CITATION.cff and _config.yml have lines that end in `# make address`, as comments until there is an
address. Each is made a line of its own, with the address in place of the last one or of the placeholder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "CITATION.cff", "_config.yml")
MARK = "  # make address"
ADDRESS = re.compile(r"https://[a-z0-9.-]+/[\w.-]+/[\w.-]*[\w-]")


def fill(text: str, url: str) -> str:
    """Return a file's text with the address in its marked lines.

    >>> fill('# url: "https://github.com/OWNER/isouq/issues"  # make address', "https://example.org/a/b")
    'url: "https://example.org/a/b/issues"  # make address'

    Raises ValueError for what is no address of a repository, and for a text without a marked line.
    """
    if not ADDRESS.fullmatch(url) or url.endswith(".git"):
        raise ValueError(f"URL: {url!r} given; wanted https://HOST/OWNER/NAME, without .git or a slash at its end")
    lines = text.split("\n")
    marked = [number for number, line in enumerate(lines) if line.endswith(MARK)]
    if not marked:
        raise ValueError(f"no line ends in {MARK.strip()!r}: get the file back with `git checkout`")
    for number in marked:
        line = re.sub(r"^(\s*)# ", r"\1", lines[number])
        lines[number] = ADDRESS.sub(url, line)
    return "\n".join(lines)


def main(url: str) -> None:
    """Fill all files, or none."""
    texts = {name: fill((ROOT / name).read_text(encoding="utf-8"), url) for name in FILES}
    for name, text in texts.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    print(f"{', '.join(FILES)}: {url}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1]:
        sys.exit("usage: make address URL=https://github.com/OWNER/NAME")
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"make address: {error}")
