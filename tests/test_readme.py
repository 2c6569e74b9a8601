"""The README says what is so: its snippets run as they stand, its numbers are those of the kept results."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import readme  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.assets
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_as_it_stands(snippet, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"\d\.\d", capsys.readouterr().out)


def test_there_are_snippets_for_every_public_function():
    for name in (
        "load_causal_lm",
        "score_texts",
        "score_tokens",
        "score_each_token",
        "score_classes",
        "score_outputs",
        "inner_products",
    ):
        assert any(f".{name}(" in snippet for snippet in SNIPPETS), name


def test_the_findings_and_numbers_are_those_of_the_kept_results():
    kept = sorted((ROOT / "results").glob("*/results.json"))
    assert kept, "no results are kept: python book/readme.py build/PROFILE/results.json"
    folder = readme.quoted(TEXT)
    assert readme.with_blocks(TEXT, folder) == TEXT
    assert f":claims: {' '.join(readme.FIRST)}\n" in (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    assert (ROOT / folder / "overview.svg").is_file()
    runs = [line for line in TEXT.splitlines() if line.startswith("- Profile `")]
    assert len(runs) == len(set(runs)) > 0, "each run is named once"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        readme.with_blocks("nothing", readme.quoted(TEXT))


def test_a_run_without_posteriors_is_not_said_to_have_failed_the_gate():
    kept = readme.results.load(ROOT / readme.quoted(TEXT) / "results.json")
    without = {key: entry for key, entry in kept.entries.items() if not key.startswith("mcmc.")}
    assert len(without) < len(kept.entries)
    assert readme._posteriors(replace(kept, entries=without)) == []
