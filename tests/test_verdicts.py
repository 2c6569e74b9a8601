"""Verdicts: what each rule does to an interval, how often it errs, and the claims as they stand in the book."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from isouq.studies import claims, require, verdicts
from isouq.studies.claims import Check, Claim, Region
from isouq.studies.results import Result
from isouq.studies.verdicts import CheckVerdict

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = claims.load(ROOT / "book" / "claims.yml")


def measured(value: float, low: float | None = None, high: float | None = None, n: int = 100) -> Result:
    return Result(value=value, low=low, high=high, n=n)


def normal(value: float, error: float = 1.0) -> Result:
    return measured(value, value - 1.959964 * error, value + 1.959964 * error)


def claim_of(n: int, *, n_core: int = 1, id: str = "C1", **fields) -> Claim:
    checks = [Check(f"check {i}", f"{id.lower()}.k{i}", Region(least=0.0), core=i < n_core, **fields) for i in range(n)]
    return Claim(id, "A claim.", "A number.", "before", tuple(checks))


def judge_values(values, *, n_core: int = 1, error: float = 1.0) -> verdicts.Verdict:
    claim = claim_of(len(values), n_core=n_core)
    return verdicts.judge([claim], {f"c1.k{i}": normal(value, error) for i, value in enumerate(values)})["C1"]


@pytest.mark.parametrize(
    ("rule", "interval", "outcome"),
    [
        ({"above": 0.5}, (0.51, 0.7), "holds"),
        ({"above": 0.5}, (0.3, 0.49), "does not hold"),
        ({"above": 0.5}, (0.45, 0.7), "undecided"),
        ({"below": 0.5}, (0.3, 0.49), "holds"),
        ({"below": 0.5}, (0.5, 0.6), "does not hold"),
        ({"near": {"value": 0.5, "margin": 0.1}}, (0.45, 0.55), "holds"),
        ({"near": {"value": 0.5, "margin": 0.1}}, (0.2, 0.3), "does not hold"),
        ({"near": {"value": 0.5, "margin": 0.1}}, (0.3, 0.7), "undecided"),
        ({"differs": 0.5}, (0.51, 0.7), "holds"),
        ({"differs": 0.5}, (0.3, 0.49), "holds"),
        ({"differs": 0.5}, (0.49, 0.51), "undecided"),
    ],
)
def test_one_check_is_judged_by_where_its_interval_lies(rule, interval, outcome):
    claim = Claim("C1", "", "", "before", (Check("one", "a.b", Region.of(rule), core=True),))
    entry = measured(sum(interval) / 2, *interval)
    assert Region.of(rule).place(*interval) == outcome
    assert verdicts.judge([claim], {"a.b": entry})["C1"].outcome == outcome


@pytest.mark.parametrize(
    ("core", "others", "text"),
    [
        (["holds"], [], "holds"),
        (["holds", "holds"], ["undecided"], "holds (2 of 3)"),
        (["holds"], ["does not hold", "not run"], "partly (1 of 2)"),
        (["holds", "undecided"], ["holds"], "partly (2 of 3)"),
        (["does not hold"], ["holds", "holds"], "does not hold"),
        (["does not hold", "undecided", "undecided"], [], "undecided (of 3 core checks 2 open, 1 failed)"),
        (["does not hold", "does not hold", "undecided"], [], "does not hold (2 of 3 core checks fail)"),
        (["undecided"], ["does not hold", "does not hold"], "undecided (why)"),
    ],
)
def test_a_claim_stands_or_falls_with_its_core_checks(core, others, text):
    claim = claim_of(len(core) + len(others), n_core=len(core))
    outcomes = zip(claim.checks, [*core, *others], strict=True)
    checks = [CheckVerdict(check, outcome, "why" if outcome == "undecided" else "") for check, outcome in outcomes]
    assert str(verdicts.combine(checks)) == text


def test_there_is_no_verdict_without_the_core_whatever_the_other_checks_say():
    claim = claim_of(3)
    found = {"c1.k1": normal(-9.0), "c1.k2": normal(-9.0)}
    verdict = verdicts.judge([claim], found)["C1"]
    assert str(verdict) == "not run (no result for 1 core check)"
    assert [one.outcome for one in verdict.checks] == ["not run", "does not hold", "does not hold"]
    with pytest.raises(ValueError, match="core checks given, some not run"):
        verdicts.combine(verdict.checks)


def test_a_t_interval_keeps_its_degrees_of_freedom_in_a_correction():
    values = np.array([0.5, 0.7, 0.9, 1.1, 0.8])
    reach = stats.t.isf(0.025, 4) * stats.sem(values)
    entry = measured(values.mean(), values.mean() - reach, values.mean() + reach, 5)
    claim = claim_of(2, n_core=2, interval="t")
    one, two = verdicts.judge([claim], {"c1.k0": entry, "c1.k1": entry})["C1"].checks
    p = stats.ttest_1samp(values, 0).pvalue
    assert [one.p_value, two.p_value] == pytest.approx([2 * p, 2 * p])
    assert one.low == pytest.approx(values.mean() - stats.t.isf(0.025 / 2, 4) * stats.sem(values))


def test_a_t_interval_cut_at_one_is_read_from_its_whole_side():
    claim = claim_of(1, interval="t")
    whole, cut = measured(0.9, 0.5, 1.3, 4), measured(0.9, 0.5, 1.0, 4)
    p_values = [verdicts.judge([claim], {"c1.k0": entry})["C1"].checks[0].p_value for entry in (whole, cut)]
    assert p_values[0] == p_values[1]


def test_a_correlation_is_judged_on_the_scale_of_fishers_z():
    z = np.array([1.2, 1.5, 1.9])
    reach = stats.t.isf(0.025, 2) * stats.sem(z)
    value, low, high = np.tanh([z.mean(), z.mean() - reach, z.mean() + reach])
    entry, claim = measured(value, low, high, 3), claim_of(2, n_core=2, interval="fisher")
    one, two = verdicts.judge([claim], {"c1.k0": entry, "c1.k1": entry})["C1"].checks
    assert [one.p_value, two.p_value] == pytest.approx([2 * stats.ttest_1samp(z, 0).pvalue] * 2)
    assert one.low == pytest.approx(np.tanh(z.mean() - stats.t.isf(0.025 / 2, 2) * stats.sem(z)))
    assert -1 < one.low < value < one.high < 1


def test_a_value_beyond_a_region_is_compared_with_its_nearest_border():
    claim = Claim("C1", "", "", "before", (Check("x", "a.b", Region.of({"near": {"value": 0, "margin": 2}}), True),))
    (check,) = verdicts.judge([claim], {"a.b": normal(3.0)})["C1"].checks
    assert check.p_value == pytest.approx(2 * stats.norm.sf(1.0), abs=1e-5)


def test_a_two_sided_rule_is_said_in_words_and_has_one_p_value():
    region = Region.of({"differs": 0})
    assert str(region) == "below or above 0"
    claim = Claim("C1", "", "", "before", (Check("x", "a.b", region, True),))
    p_values = [verdicts.judge([claim], {"a.b": normal(v)})["C1"].checks[0].p_value for v in (-1.5, 1.5)]
    assert p_values == pytest.approx([2 * stats.norm.sf(1.5)] * 2, abs=1e-5)
    assert str(verdicts.judge([claim], {"a.b": normal(0.1)})["C1"]) == "undecided (interval includes 0)"


def test_a_rule_by_the_papers_number_follows_it(tmp_path):
    stated = {"id": "C4", "claim": "x", "paper": "", "written": "trials", "each": {"n": {"one": "1", "two": "2"}}}
    check = {"label": "x", "key": "a.b", "rule": {"paper_less": 0.1}, "core": True}
    check |= {"paper": "table_1.gn.spearman.binary_rings"}
    once = {"label": "y", "key": "a.c", "rule": {"above": 0}, "once": True}
    (tmp_path / "claims.yml").write_text(yaml.safe_dump([stated | {"checks": [check, once]}]))
    (claim,) = claims.load(tmp_path / "claims.yml")
    assert [one.label for one in claim.checks] == ["x", "y", "x"], "what is stated once is not repeated"
    assert claim.checks[0].region == Region(least=0.34)


def test_an_exact_result_is_judged_by_its_value_and_others_need_an_interval():
    exact, sampled = claim_of(1, interval="exact"), claim_of(1)
    assert str(verdicts.judge([exact], {"c1.k0": measured(2.4)})["C1"]) == "holds"
    assert str(verdicts.judge([sampled], {"c1.k0": measured(2.4)})["C1"]) == "undecided (no interval at this size)"


def test_holm_factors_are_those_of_the_definition():
    # 0.01 × 4 and 0.02 × 3 (not below 0.05): from there the factor stays 3.
    assert verdicts.holm_factors([0.03, 0.01, 0.02, 0.5]).tolist() == [3, 4, 3, 3]
    assert verdicts.holm_factors([0.001, 0.001, 0.001]).tolist() == [3, 2, 1]
    assert verdicts.holm_factors([]).tolist() == []


def test_the_effective_number_of_comparisons_undoes_the_critical_value():
    for number in (1, 3, 8):
        critical = stats.norm.isf((1 - 0.95 ** (1 / number)) / 2)
        assert verdicts.effective_number(critical) == pytest.approx(number)
    with pytest.raises(ValueError, match="critical_value"):
        verdicts.effective_number(1.5)


def test_max_t_replaces_holm_where_the_claim_names_its_critical_value():
    claim = claim_of(3, n_core=3)
    joint = Claim(**{**vars(claim), "joint": ("c1.max_t",)})
    found = {f"c1.k{i}": normal(2.2) for i in range(3)}
    assert verdicts.judge([claim], found)["C1"].outcome == "undecided"
    found["c1.max_t"] = measured(2.1)  # checks that are almost copies of each other
    verdict = verdicts.judge([joint], found)["C1"]
    assert verdict.outcome == "holds"
    assert verdict.checks[0].low == pytest.approx(2.2 - 2.1, abs=1e-3)


def test_the_false_discovery_rate_is_held_over_all_claims():
    several = [claim_of(1, id=f"C{i}") for i in range(1, 11)]
    found = {f"c{i}.k0": normal(2.1 if i == 1 else 0.1) for i in range(1, 11)}
    alone, among = verdicts.judge(several[:1], found)["C1"], verdicts.judge(several, found)["C1"]
    assert alone.outcome == "holds"
    assert among.outcome == "undecided"
    assert "correction over all checks, q = 0.3" in among.reason


# How often the rules err: claims of eight checks whose estimates err independently.


def old_outcome(values: np.ndarray) -> str:
    """What the book said before: one failed check is enough, and all have to hold, each with its own interval."""
    outcomes = [Region(least=0.0).place(value - 1.96, value + 1.96) for value in values]
    return next((one for one in ("does not hold", "undecided") if one in outcomes), "holds")


def test_a_true_claim_of_eight_checks_is_seldom_refuted_and_mostly_found():
    rng = np.random.default_rng(0)
    border, effect = rng.normal(size=(500, 8)), rng.normal(2.8, 1, size=(200, 8))  # 2.8: a power of 80 % each
    assert np.mean([old_outcome(row) == "does not hold" for row in border]) > 0.15
    assert np.mean([judge_values(row).outcome == "does not hold" for row in border]) <= 0.06
    assert np.mean([judge_values(row, n_core=8).outcome == "does not hold" for row in border]) <= 0.06
    assert np.mean([old_outcome(row) == "holds" for row in effect]) < 0.25
    assert np.mean([judge_values(row).outcome == "holds" for row in effect]) > 0.5


def test_a_false_core_check_is_seldom_confirmed_however_many_others_hold():
    rng = np.random.default_rng(1)
    rows = np.column_stack([rng.normal(size=500), rng.normal(5, 1, size=(500, 7))])
    assert np.mean([judge_values(row).outcome in ("holds", "partly") for row in rows]) <= 0.06


def test_near_chance_is_seldom_confirmed_at_its_margin():
    rng = np.random.default_rng(2)
    claim = Claim("C1", "", "", "before", (Check("one", "a.b", Region(-3.0, 3.0), core=True),))
    at_margin = [verdicts.judge([claim], {"a.b": normal(x)})["C1"].outcome for x in rng.normal(3, 1, 1000)]
    inside = [verdicts.judge([claim], {"a.b": normal(x, 0.8)})["C1"].outcome for x in rng.normal(0, 0.8, 400)]
    assert at_margin.count("holds") <= 60
    assert inside.count("holds") > 300


# Bad input is refused by name before anything is judged.


def test_a_result_outside_its_interval_is_refused():
    with pytest.raises(ValueError, match=r"c1.k1: 0.5 \[0.1, 0.2\] given, a value inside its interval wanted"):
        verdicts.judge([claim_of(2)], {"c1.k0": normal(3.0), "c1.k1": measured(0.5, 0.1, 0.2)})


PLAIN = {"label": "x", "key": "a.b", "rule": {"above": 1}, "core": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "holds"}, "C1: field: 'verdict' given"),
        ({"written": "long ago"}, "C1: written: 'long ago' given"),
        ({"checks": []}, "C1: 0 checks given, none of them core"),
        ({"checks": [PLAIN | {"core": False}]}, "C1: 1 checks given, none of them core"),
        ({"checks": [PLAIN | {"core": "no"}]}, "C1: x: core: 'no' given, true or false wanted"),
        ({"checks": [PLAIN | {"rule": {"over": 1}}]}, "C1: x: rule: {'over': 1} given"),
        ({"checks": [PLAIN | {"rule": {"above": 1, "below": 2}}]}, "exactly one of above, below, near"),
        ({"checks": [PLAIN | {"rule": {"near": {"value": 1, "margin": 0}}}]}, "near, margin: 0 given"),
        ({"checks": [PLAIN | {"rule": {"near": [0, 1]}}]}, "a value and a margin wanted"),
        ({"checks": [PLAIN | {"rule": {"above": "k"}}]}, "C1: x: rule: above: k given, a finite number"),
        ({"checks": [PLAIN | {"rule": {"paper_less": 0.1}}]}, "exactly one of above, below, near"),
        ({"checks": [PLAIN | {"interval": "z"}]}, "C1: x: interval: 'z' given"),
        ({"checks": [PLAIN | {"exact": True}]}, "C1: field of a check: 'exact' given"),
        ({"checks": [PLAIN | {"key": "Not A Key"}]}, "key 'Not A Key' given"),
        ({"checks": [PLAIN | {"paper": "table_2.triviaqa.p_ture"}]}, "'p_ture' given.*did you mean 'p_true'"),
    ],
)
def test_a_claim_that_is_not_in_order_is_refused_by_name(tmp_path, changes, message):
    entry = {"id": "C1", "claim": "x", "paper": "", "written": "before", "checks": [PLAIN]} | changes
    (tmp_path / "claims.yml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=message):
        claims.load(tmp_path / "claims.yml")
    (tmp_path / "claims.yml").write_text(yaml.safe_dump([entry | {"checks": [PLAIN], "written": "before"}] * 2))
    with pytest.raises(ValueError, match=r"each only once|verdict"):
        claims.load(tmp_path / "claims.yml")


def require_known_keys(stated: list[Claim], known: set[str]) -> None:
    """A key that no run has is a misspelt one."""
    for claim in stated:
        for check in claim.checks:
            require.one_of(f"{claim.id}: {check.label}: key", check.key, known)


def test_a_rule_with_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"C1: check 0: key: 'c1.k0' given.*did you mean 'c1.k9'"):
        require_known_keys([claim_of(1)], {"c1.k9"})


# The claims as they stand in the book


def test_all_ten_claims_are_there_in_order():
    assert [claim.id for claim in CLAIMS] == [f"C{number}" for number in range(1, 11)]


def test_every_key_is_one_of_a_committed_run():
    runs = [json.loads((ROOT / "results" / name / "results.json").read_text()) for name in ("embedded", "published")]
    known = {key for run in runs for key in run["results"]}
    require_known_keys(CLAIMS, known)


def test_the_papers_own_number_with_its_spread_is_not_refuted_by_the_rule():
    stated = [check for claim in CLAIMS for check in claim.checks if check.paper is not None]
    assert stated
    for check in stated:
        assert check.region.least < check.paper.value < check.region.most, check
        assert check.paper_outcome() in ("holds", "undecided"), check


def test_the_papers_spread_has_a_width():
    truthfulqa = claims.printed("table_2.truthfulqa.combined")
    assert (truthfulqa.value, truthfulqa.sd) == (0.63, 0.08)
    chance = Check("x", "a.b", Region(least=0.5), paper=truthfulqa)
    assert chance.paper_outcome() == "undecided", "0.63 ± 0.08 does not exclude one half"
    gap = claims.printed("table_2.triviaqa.p_true - table_2.triviaqa.combined")
    assert (gap.value, gap.sd) == pytest.approx((0.08, math.hypot(0.06, 0.05)))


def test_the_page_says_in_words_what_the_simulation_found():
    page = " ".join((ROOT / "book" / "verdicts.md").read_text().split())
    before = {row["case"]: row["before"] for row in json.loads((ROOT / "book" / "verdicts.json").read_text())}
    ordinals = {4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh"}
    refuted, held = (
        ordinals[round(1 / before[case])]
        for case in ("eight checks at the border: refuted", "eight checks of 80 % power: holds")
    )
    assert f"was refuted in every {refuted} study" in page
    assert f"power of 80 % held in only every {held}." in page


def test_the_papers_numbers_in_a_claims_words_come_from_its_tables(tmp_path):
    words = next(claim for claim in CLAIMS if claim.id == "C6").paper
    assert f"combined {claims.printed('table_2.truthfulqa.combined')}, P(True)" in words
    entries = yaml.safe_load((ROOT / "book" / "claims.yml").read_text())
    entries[0]["paper"] = "Table 2: {table_2.truthfulqa.combine}"
    (tmp_path / "claims.yml").write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=r"'combine' given, .*did you mean 'combined'"):
        claims.load(tmp_path / "claims.yml")


def test_the_figure_shows_rules_that_err_in_at_most_six_percent_and_find_more():
    rows = json.loads((ROOT / "book" / "verdicts.json").read_text())
    assert {row["quantity"] for row in rows} == {"size", "power"}
    for row in rows:
        assert row["n_runs"] >= 1000
        assert row["after"] <= 0.06 if row["quantity"] == "size" else row["after"] >= 0.5, row["case"]


def test_the_committed_results_give_no_verdict_where_the_core_was_not_run():
    for name in ("embedded", "published"):
        stored = json.loads((ROOT / "results" / name / "results.json").read_text())["results"]
        found = {key: Result(**row) for key, row in stored.items()}
        judged = verdicts.judge(CLAIMS, found)
        not_run = {id for id, verdict in judged.items() if verdict.outcome == "not run"}
        lacking = {claim.id for claim in CLAIMS if any(one.core and one.key not in found for one in claim.checks)}
        assert not_run == lacking
        assert not_run == (set() if name == "published" else {"C6", "C7", "C8", "C9", "C10"})


def test_no_claim_names_a_model_that_published_does_not_ask():
    asked = {key.split(".")[1] for claim in CLAIMS for check in claim.checks for key in [check.key] if key[:3] == "qa."}
    assert asked <= {"smollm2-135m-instruct", "mean", "models", "transfer"}
