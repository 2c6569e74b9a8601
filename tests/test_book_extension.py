"""The extension that puts results into the book: numbers, verdicts, tables, figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import isouq

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "book" / "_ext"
sys.path.insert(0, str(EXTENSION))

from isouq_book import claims, provenance, results, verdicts  # noqa: E402

ENTRY = results.Entry(0.634, 0.55, 0.71, 120)
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
        (results.Entry(1.0, 0.98, 1.0), "1.00 [0.98, 1.00]"),
        (results.Entry(12.5, unit="s"), "12.50 s"),
        (results.Entry(3e-7, 1e-7, 5e-7), "3.0 × 10⁻⁷ [1.0 × 10⁻⁷, 5.0 × 10⁻⁷]"),
    ],
)
def test_an_interval_shows_what_the_result_has(entry, text):
    assert results.format_interval(entry) == text


def test_a_request_has_a_key_a_format_and_words_for_absence():
    assert results.parse_request(f"{KEY}:.3f|too few") == results.Request(KEY, ".3f", "too few")
    with pytest.raises(ValueError, match="not of the form"):
        results.parse_request("Not A Key")


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


# Verdicts


@pytest.mark.parametrize(
    ("rule", "interval", "outcome"),
    [
        ({"above": 0.5}, (0.51, 0.7), "holds here"),
        ({"above": 0.5}, (0.3, 0.49), "does not hold here"),
        ({"above": 0.5}, (0.45, 0.7), "undecided (interval includes 0.5)"),
        ({"below": 0.5}, (0.3, 0.49), "holds here"),
        ({"below": 0.5}, (0.5, 0.6), "does not hold here"),
        ({"within": [0.4, 0.6]}, (0.45, 0.55), "holds here"),
        ({"within": [0.4, 0.6]}, (0.2, 0.3), "does not hold here"),
        ({"within": [0.4, 0.6]}, (0.3, 0.5), "undecided (interval includes 0.4)"),
        ({"within": [0.4, 0.6]}, (0.3, 0.7), "undecided (interval includes 0.4 and 0.6)"),
        ({"greater_than": "other"}, (0.61, 0.7), "holds here"),
        ({"greater_than": "other"}, (0.3, 0.39), "does not hold here"),
        ({"greater_than": "other"}, (0.3, 0.5), "undecided (interval includes values of the other's interval)"),
        ({"greater_than": "absent"}, (0.3, 0.5), "not yet run"),
        ({"above": 0.5}, (None, None), "undecided (no interval at this size)"),
    ],
)
def test_a_rule_looks_at_where_the_interval_lies(rule, interval, outcome):
    found = {"key": results.Entry(0.5, *interval), "other": results.Entry(0.5, 0.4, 0.6)}
    assert str(verdicts.judge(rule, "key", found)) == outcome


def test_an_exact_result_is_judged_by_its_value():
    found = {"key": results.Entry(2.4)}
    assert verdicts.judge({"below": 3}, "key", found, exact=True).outcome == "holds here"
    assert verdicts.judge({"below": 3}, "key", found).outcome == "undecided"
    found = {"key": results.Entry(2.4, 2.0, 3.5)}
    assert verdicts.judge({"below": 3}, "key", found, exact=True).outcome == "undecided"


def test_a_result_that_was_not_computed_gets_no_other_verdict():
    assert verdicts.judge({"above": 0.5}, "key", {}).outcome == "not yet run"


@pytest.mark.parametrize("rule", [{}, {"over": 1}, {"above": 1, "below": 2}])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ValueError, match="wanted exactly one of above"):
        verdicts.judge(rule, "key", {"key": ENTRY})


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        (["holds here", "holds here"], "holds here (2 of 2 checks)"),
        (["holds here", "does not hold here", "undecided"], "does not hold here (1 of 3 checks)"),
        (["holds here", "not yet run"], "not yet run (1 of 2 checks)"),
        (["not yet run", "not yet run"], "not yet run"),
        (["not yet run", "undecided"], "undecided (why)"),
        ([], "not yet run"),
    ],
)
def test_a_claim_holds_only_if_every_check_does(outcomes, text):
    found = [verdicts.Verdict(one, "why" if one == "undecided" else "") for one in outcomes]
    assert str(verdicts.combine(found)) == text
    assert str(verdicts.combine(found, "no such model")) == "not reproduced (no such model)"


# The claims as they stand in the book

CLAIMS = claims.load(ROOT / "book" / "claims.yml")
CHECKS = [pytest.param(check, id=f"{claim.id} {check.label}") for claim in CLAIMS for check in claim.checks]
WITHOUT_NUMBER = [claim for claim in CLAIMS if claim.paper.startswith("Stated")]


def test_all_ten_claims_are_there_in_order():
    assert [claim.id for claim in CLAIMS] == [f"C{number}" for number in range(1, 11)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_the_papers_own_numbers_pass_the_rules(claim):
    if claim in WITHOUT_NUMBER:
        assert not any(check.paper for check in claim.checks)
    else:
        assert all(verdicts.satisfied(check.rule, *check.paper) for check in claim.checks)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_asks_for_a_key_of_the_agreed_form(check):
    form = re.compile(
        r"derivation\.engine\.max_relative_difference"
        r"|isotropy\.networks\.(fisher|empirical_fisher)\.(unseen|shifted|other_problem|noise)\.(spearman|spread|structure)"
        r"|isotropy\.(smollm2-135m-instruct|gemma-3-270m)\.(triviaqa|own_answers|truthfulqa|prose)\.pull"
        r"|isotropy\.spectra\.(outlier|bulk)_(share|slope)"
        r"|mcmc\.size\.(tanh|relu)_(fan_in|fixed)\.slope"
        r"|mcmc\.(binary|multiclass|regression)_\w+\.(gn|la|aleatoric)\.(pearson|spearman)"
        r"|qa\.(smollm2-135m-instruct|gemma-3-270m)\.(triviaqa|wikidata|truthfulqa|truthfulqa_choose)"
        r"\.(p_true|semantic_entropy|naive_entropy|aleatoric|epistemic|combined)\.auroc"
        r"|cost\.(smollm2-135m-instruct|gemma-3-270m)\.\w+\.(seconds_per_question|peak_bytes|relative_to_forward|relative_error)"
    )
    for key in [check.key, *check.others()]:
        assert form.fullmatch(key), key


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"id": "C1", "claim": "x", "paper": "", "verdict": "holds"}, "C1: unknown field 'verdict'"),
        (
            {"id": "C1", "claim": "x", "paper": "", "checks": [{"label": "x", "key": "a.b", "rule": {"over": 1}}]},
            "C1: rule",
        ),
    ],
)
def test_a_claim_with_a_typed_verdict_or_an_unknown_rule_is_refused(tmp_path, claim, message):
    file = tmp_path / "claims.yml"
    file.write_text(yaml.safe_dump([claim]))
    with pytest.raises(ValueError, match=message):
        claims.load(file)


# The extension in a small book


@pytest.fixture
def small_book(tmp_path):
    """Build a book of two pages with the extension; gives a function: page and results in, outcome out."""
    source, stored = tmp_path / "source", tmp_path / "results.json"
    source.mkdir()
    (source / "conf.py").write_text('extensions = ["myst_parser", "isouq_book"]\n')
    (source / "index.md").write_text("# Home\n\n```{toctree}\npage\n```\n")

    def build(page: str, found: dict | None, **files: str) -> tuple[int, str, str]:
        written = {"page.md": "# Page\n\n" + page} | {f"{name}.yml": text for name, text in files.items()}
        for name, text in written.items():  # a file that stays as it is keeps its date, as Sphinx looks at that
            if not (source / name).exists() or (source / name).read_text() != text:
                (source / name).write_text(text)
        environment = os.environ | {"PYTHONPATH": f"{EXTENSION}{os.pathsep}{ROOT}"}
        environment.pop("ISOUQ_RESULTS", None)
        if found is not None:
            stored.write_text(json.dumps({"meta": {"profile": "tiny", "commit": "abc"}, "results": found}))
            environment["ISOUQ_RESULTS"] = str(stored)
        command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", str(source), str(tmp_path / "html")]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        built = tmp_path / "html" / "page.html"
        return run.returncode, built.read_text() if built.exists() else "", run.stderr

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
    code, _, warnings = small_book(page + "```{claims-table} absent.yml\n```", {KEY: auroc(0.7)})
    assert code != 0
    for cause in ("no result named 'a.b'", "no result named 'c.d'", "format", "'Not A Key'", "absent.yml"):
        assert re.search(f"page.md.*{re.escape(cause)}", warnings), (cause, warnings)


@pytest.mark.parametrize(
    ("found", "cause"), [(None, "ISOUQ_RESULTS is not set"), ({"a.b": 3}, "results.json: not a file of results")]
)
def test_a_book_without_a_file_of_results_fails(small_book, found, cause):
    code, _, warnings = small_book("Text.", found)
    assert code != 0
    assert cause in warnings


def test_the_claims_table_shows_values_and_generated_verdicts(small_book):
    claim = {"id": "C7", "claim": "It is *so*.", "paper": "0.52", "chapter": "notebooks/04", "each": {"m": {"a": "A"}}}
    check = {"label": "{m}: above chance", "key": "qa.{m}.auroc", "rule": {"above": 0.5}}
    page = "```{claims-table} claims.yml\n```\n\n```{provenance}\n```\n"
    written = yaml.safe_dump([claim | {"checks": [check]}])
    code, text, warnings = small_book(page, {"qa.a.auroc": auroc(0.7)}, claims=written)
    assert code == 0, warnings
    for part in ('id="claim-c7"', "<em>so</em>", "A: above chance", "0.70 [0.65, 0.75]", "not in this book yet"):
        assert part in text
    assert "holds here" in text
    code, text, _ = small_book(page, {"qa.a.auroc": auroc(0.3)}, claims=written)
    assert "does not hold here" in text


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
