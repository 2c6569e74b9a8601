"""Snakemake as the Makefile calls it, with the interpreter that runs the tests."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, profile: str) -> list[str]:
    """The words of the Makefile's command line, on two cores."""
    line = re.search(r"^SNAKEMAKE := \$\(PY\) (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = line[1].replace("$(CORES)", "2").split()
    return [sys.executable, *words, *arguments, "--config", f"profile={profile}"]


def run(folder: Path, *arguments: str, profile: str, **options) -> subprocess.CompletedProcess:
    """Run it in a folder; what it says on both streams is in `stdout`."""
    options = {"cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run(command(*arguments, profile=profile), **options)


def jobs(output: str) -> dict[str, str]:
    """Each announced job with its reason."""
    return dict(re.findall(r"^((?:Running|Scoring|Joining|Fetching|Building)[^(\n]*) \((.*)\)$", output, re.MULTILINE))
