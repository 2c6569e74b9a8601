"""The extension that puts results into the book: numbers, verdicts, tables, figures."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import sphinx.cmd.build as sphinx
import yaml

import isouq
from isouq.pipeline import jobs
from isouq.studies.results import Result

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "book" / "_ext"
sys.path.insert(0, str(EXTENSION))

from isouq_book import provenance, results  # noqa: E402

ENTRY = Result(value=0.634, low=0.55, high=0.71, n=120)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
KEY = "qa.gemma-3-270m.triviaqa.combined.auroc"


# How numbers are written


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.634, "", "0.63"),
        (-0.2, "", "−0.20"),
        (0, "", "0"),
        (7993, "", "7,993"),
        (12345.6, "", "12,346"),
        (0.00032, "", "3.2 × 10⁻⁴"),
        (0.634, ".1%", "63.4%"),
        (-1.34e-14, ".1e", "−1.3 × 10⁻¹⁴"),
    ],
)
def test_numbers_are_written_as_a_reader_expects(value, spec, text):
    assert results.format_number(value, spec) == text


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (ENTRY, "0.63 [0.55, 0.71], n = 120"),
        (Result(value=1.0, low=0.98, high=1.0), "1.00 [0.98, 1.00]"),
        (Result(value=12.5, unit="s"), "12.50 s"),
        (Result(value=0.99949, low=0.99912, high=0.99976), "0.9995 [0.9991, 0.9998]"),
        (Result(value=-0.003, low=-0.11, high=0.1), "0.00 [−0.11, 0.10]"),
        (Result(value=3e-7, low=1e-7, high=5e-7), "3.0 × 10⁻⁷ [1.0 × 10⁻⁷, 5.0 × 10⁻⁷]"),
    ],
)
def test_an_interval_shows_what_the_result_has(entry, text):
    assert results.format_interval(entry) == text


@pytest.mark.parametrize("content", ["{", "[]", '{"results": {"a.b": 3}}', '{"results": {"a.b": {"low": 1}}}'])
def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        results.load(file)


def test_the_record_names_the_run_and_its_uncommitted_changes():
    meta = {"profile": "smoke", "commit": "0123456789abcdef", "dirty": True, "durations": {"01": 90.0}}
    assert dict(provenance.rows(meta)) == {
        "profile": "smoke",
        "commit": "0123456789 with uncommitted changes",
        "minutes": "01 1.5",
    }
    assert "smoke" in provenance.footer(meta)
    assert "no results" in provenance.footer({})


# The extension in a small book


@pytest.fixture
def small_book(tmp_path, monkeypatch):
    """Build a book of two pages with the extension; gives a function: page and results in, outcome out.

    In this process: one of its own would load Sphinx and isouq anew for each page.
    """
    source, stored = tmp_path / "source", tmp_path / "results.json"
    source.mkdir()
    (source / "conf.py").write_text('extensions = ["myst_parser", "isouq_book"]\n')
    (source / "index.md").write_text("# Home\n\n```{toctree}\npage\n```\n")

    def build(page: str, found: dict | None, **files: str) -> tuple[int, str, str]:
        written = {"page.md": "# Page\n\n" + page} | {f"{name}.yml": text for name, text in files.items()}
        for name, text in written.items():  # a file that stays as it is keeps its date, as Sphinx looks at that
            if not (source / name).exists() or (source / name).read_text() != text:
                (source / name).write_text(text)
        monkeypatch.delenv("ISOUQ_RESULTS", raising=False)
        if found is not None:
            stored.write_text(json.dumps({"meta": {"profile": "tiny", "commit": "abc"}, "results": found}))
            monkeypatch.setenv("ISOUQ_RESULTS", str(stored))
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = sphinx.main(["-n", "-W", "--keep-going", str(source), str(tmp_path / "html")])
        built = tmp_path / "html" / "page.html"
        return code, built.read_text() if built.exists() else "", said.getvalue()

    return build


def auroc(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 99, "unit": ""}


def test_a_present_key_is_shown_and_other_results_change_the_page(small_book):
    page = f"Value {{result}}`{KEY}:.3f`, {{interval}}`{KEY}`, {{result}}`no.such.key|too few`."
    code, text, warnings = small_book(page, {KEY: auroc(0.7)})
    assert code == 0, warnings
    for part in (">0.700<", "0.70 [0.65, 0.75], n = 99", "too few", f'title="{KEY}"'):
        assert part in text
    code, text, warnings = small_book(page, {KEY: auroc(0.8)})
    assert code == 0, warnings
    assert ">0.800<" in text


def test_every_missing_or_malformed_request_fails_the_build_and_is_named(small_book):
    page = f"{{result}}`a.b`, {{interval}}`c.d`, {{result}}`{KEY}:.2q`, {{result}}`Not A Key`.\n\n"
    code, _, warnings = small_book(page + "```{claims} absent.yml\n```", {KEY: auroc(0.7)})
    assert code != 0
    for cause in (
        "no result named 'a.b'",
        "no result named 'c.d'",
        "format",
        "'Not A Key' is not of the form",
        "absent.yml",
    ):
        assert re.search(f"page.md.*{re.escape(cause)}", warnings), (cause, warnings)


@pytest.mark.parametrize(
    ("found", "cause"), [(None, "ISOUQ_RESULTS is not set"), ({"a.b": 3}, "results.json: not a file of results")]
)
def test_a_book_without_a_file_of_results_fails(small_book, found, cause):
    code, _, warnings = small_book("Text.", found)
    assert code != 0
    assert cause in warnings


def test_a_folded_claim_shows_rules_values_and_generated_verdicts(small_book):
    claim = {"id": "C7", "claim": "It is *so*.", "paper": "0.52", "chapter": "notebooks/04", "written": "before"}
    check = {"label": "{m}: AUROC", "key": "qa.{m}.auroc", "rule": {"above": 0.5}, "core": True}
    check["paper"] = "table_2.triviaqa.epistemic"
    page = "```{claims} claims.yml\n```\n\n```{provenance}\n```\n"
    written = yaml.safe_dump([claim | {"each": {"m": {"a": "A"}}, "checks": [check]}])
    code, text, warnings = small_book(page, {"qa.a.auroc": auroc(0.7)}, claims=written)
    assert code == 0, warnings
    words = re.sub("<[^>]+>", "", text)
    for part in ("core A: AUROC, above 0.5: 0.70 [0.65, 0.75], n = 99, with all checks [0.65, 0.75]; holds", "so"):
        assert part in words
    for part in ("paper’s 0.52 ± 0.07 by this rule: undecided", "not in this book yet", "rules were written before"):
        assert part in words.replace("'", "’").replace("&#x27;", "’")
    assert 'id="claim-c7"' in text
    assert 'class="verdict verdict-holds"' in text
    code, text, _ = small_book(page, {"qa.a.auroc": auroc(0.3)}, claims=written)
    assert 'class="verdict verdict-does-not-hold"' in text
    code, text, _ = small_book(page, {"other.key": auroc(0.3)}, claims=written)
    assert re.search(r"<details.*<summary>.*not run \(no result for 1 core check\).*</summary>", text, re.DOTALL)


def test_findings_are_the_sentences_that_the_verdicts_choose(small_book):
    finding = {
        "holds": "It is {qa.a.auroc:.3f}, {qa.a.auroc:interval .0%}, {no.such}.",
        "partly": "Half.",
        "does not hold": "Not on {failing}; on {holding}.",
        "undecided": "Open.",
    }
    claim = {"id": "C1", "claim": "It is so.", "short": "it is so", "paper": "0.52", "written": "before"}
    check = {"label": "AUROC, all", "key": "qa.a.auroc", "rule": {"above": 0.5}, "core": True}
    check["paper"] = "table_2.triviaqa.p_true"
    page = "```{findings} claims.yml\n```\n\n```{claims-summary} claims.yml\n```\n"
    written = yaml.safe_dump([claim | {"finding": finding, "checks": [check]}])
    for value, sentence in (
        (0.7, "It is 0.700, 70% [65%, 75%], (not measured). (C1: holds)"),
        (0.3, "Not on AUROC; on none. (C1: does not hold)"),
    ):
        code, text, warnings = small_book(page, {"qa.a.auroc": auroc(value)}, claims=written)
        assert code == 0, warnings
        words = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", text))
        assert sentence in words
        assert f"{value:.2f} [{value - 0.05:.2f}, {value + 0.05:.2f}] AUROC, all" in words
        assert "Of the 1 claims that we took from the paper, 1 " in words
    code, text, _ = small_book(page, {"other.key": auroc(0.3)}, claims=written)
    assert "No answer yet to whether it is so. (C1: not run)" in re.sub("<[^>]+>", "", text)
    del finding["partly"]
    written = yaml.safe_dump([claim | {"finding": finding, "checks": [check]}])
    code, _, warnings = small_book(page, {"qa.a.auroc": auroc(0.7)}, claims=written)
    assert code != 0
    assert "C1: finding" in warnings


def test_the_first_page_shows_the_findings_that_it_names_each_as_one_sentence(small_book):
    finding = dict.fromkeys(("holds", "partly", "does not hold", "undecided"), "First sentence. Second.")
    check = {"label": "AUROC", "key": "qa.a.auroc", "rule": {"above": 0.5}, "core": True}
    claim = {"claim": "So.", "short": "so", "paper": "–", "written": "before", "finding": finding, "checks": [check]}
    stated = yaml.safe_dump([claim | {"id": "C1"}, claim | {"id": "C2"}])
    code, text, warnings = small_book(
        "```{findings} claims.yml\n:claims: C2\n```", {"qa.a.auroc": auroc(0.7)}, claims=stated
    )
    assert code == 0, warnings
    words = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", text))
    assert "First sentence. (C2: holds)" in words
    assert "Second." not in words
    assert "C1" not in words
    assert "Of the 2 claims that we took from the paper, 2 hold here." in words


def test_chapters_of_several_runs_name_their_own_on_their_pages():
    runs = {
        "01_derivation": {"started": "2026-02-01T10"},
        "04_llm_qa": {"started": "2026-03-01T10", "commit": "c" * 40},
    }
    meta = {"profile": "tiny", "commit": "a" * 40, "created": "2026-02-01T11", "dirty": False, "runs": runs}
    first, last = (f"commit {letter * 10}, made on 2026-0{month}-01" for letter, month in (("a", 2), ("c", 3)))
    assert provenance.footer(meta, "notebooks/04_llm_qa") == f"Numbers: profile tiny, {last}."
    assert provenance.footer(meta, "index") == f"Numbers: profile tiny; 01_derivation: {first}; 04_llm_qa: {last}."
    assert provenance.footer({**meta, "runs": {}}, "index").startswith(
        "Numbers: profile tiny, commit aaaaaaaaaa, made on"
    )
    assert "note          = {Numbers: profile tiny; 01_derivation" in provenance.bibtex(CITATION, meta)
    assert "{Grünefeld, N. and Frellsen, J. and Hardmeier, C.}" in provenance.bibtex(CITATION, meta)


@pytest.mark.usefixtures("figure_style")
def test_a_figure_is_drawn_from_results_and_says_in_words_what_it_shows(small_book):
    page = (
        "```{interval-figure} qa.one.{method}.auroc qa.two.{method}.auroc\n:name: fig-one\n:titles: One | Two\n"
        ":methods: epistemic aleatoric\n:xlabel: AUROC\n:reference: 0.5\nThe *caption*.\n```\n"
    )
    code, text, warnings = small_book(page, {"qa.one.epistemic.auroc": auroc(0.7)})
    assert code == 0, warnings
    assert 'alt="One: epistemic 0.70 [0.65, 0.75], n = 99"' in text
    assert "The <em>caption</em>." in text
    assert 'src="_images/fig-one.svg"' in text
    code, text, warnings = small_book(page, {"other.key": auroc(0.7)})
    assert code == 0, warnings
    assert "This run has no results for this figure." in text


# The page of functions and classes


def test_the_page_of_functions_has_every_public_name_and_renders_without_a_warning(tmp_path):
    settings = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
    options = {name: settings[name] for name in settings if name.startswith(("autodoc", "napoleon", "default_role"))}
    extensions = ["myst_parser", "isouq_book", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
    options |= {"extensions": extensions, "root_doc": "api", "nitpick_ignore_regex": [("py:.*", ".*")]}
    options["myst_enable_extensions"] = ["dollarmath"]
    (tmp_path / "conf.py").write_text("\n".join(f"{name} = {value!r}" for name, value in options.items()))
    (tmp_path / "api.md").write_text((ROOT / "book" / "api.md").read_text())
    (tmp_path / "results.json").write_text('{"results": {}}')
    paths = {"PYTHONPATH": f"{EXTENSION}{os.pathsep}{ROOT}", "ISOUQ_RESULTS": str(tmp_path / "results.json")}
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", str(tmp_path), str(tmp_path / "html")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "html" / "api.html").read_text()
    shown = re.findall(r'id="(?:module-)?isouq\.(\w+)"', page)
    assert set(shown) >= set(isouq.__all__)
    assert {"Regression", "inner_products", "score_outputs"} <= set(shown)
    assert len(shown) == len(set(shown)), "a name has two entries"
    assert "log_gradient" in page, "properties of the results are part of their entries"


def test_a_budget_is_a_table_of_what_a_profile_is_estimated_to_take(small_book):
    kept = (ROOT / "book" / "budget.json").read_text()
    code, text, warnings = small_book("```{budget} kept.yml\n```\n", {KEY: auroc(0.7)}, kept=kept)
    assert code == 0, warnings
    words = re.sub("<[^>]+>", "", text)
    for part in ("microsoft/phi-4", "14.7 billion", "together", "Estimated, not measured: for one NVIDIA H100 SXM"):
        assert part in words


@pytest.mark.assets
def test_the_kept_budget_is_that_of_the_profile(tmp_path):
    jobs.budget("paper", tmp_path / "budget.json")
    assert (tmp_path / "budget.json").read_text() == (ROOT / "book" / "budget.json").read_text(), (
        "run .venv/bin/python -m isouq.pipeline.jobs budget --profile paper --out book/budget.json"
    )
