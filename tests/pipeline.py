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
    """Run it in a folder; both streams are in `stdout`."""
    options = {"cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run(command(*arguments, profile=profile), **options)


def plan(folder: Path, *arguments: str, profile: str) -> dict[str, str]:
    """What would run in a folder, as the Makefile's `plan` asks: each job with Snakemake's reason."""
    dry = run(folder, "--dry-run", "--quiet", "host", "progress", "--nolock", *arguments, profile=profile)
    assert dry.returncode == 0, dry.stdout
    return dict(re.findall(r"^Job \d+: (.*)\nReason: (.*)$", dry.stdout, re.MULTILINE))


def jobs(output: str) -> list[str]:
    """Each job of the output of a run, in the words in which it announces itself."""
    return re.findall(r"^(?:Running|Scoring|Sampling) .*$", output, re.MULTILINE)
