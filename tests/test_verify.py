"""`isouq verify` says which numbers of a run differ from the kept ones, and refuses what is no run."""

import hashlib
import json
from pathlib import Path

import pytest

from isouq import cli
from isouq.pipeline import compare, kept, slices
from isouq.studies.results import ResultError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "results" / "published" / "results.json"


def entry(value: float, half: float | None = None) -> dict:
    return {"value": value} | ({} if half is None else {"low": value - half, "high": value + half})


@pytest.mark.parametrize(
    ("key", "old", "new", "agrees"),
    [
        ("mcmc.gate.n", entry(312), entry(312), True),
        ("mcmc.gate.n", entry(312), entry(311), False),
        ("cost.m.ghost.relative_to_forward", entry(2.0), entry(5.9), True),
        ("cost.m.ghost.relative_to_forward", entry(2.0), entry(6.1), False),
        ("cost.m.ghost.relative_to_forward", entry(6.1), entry(2.0), False),
        ("cost.m.ghost.relative_error", entry(1e-6), entry(9e-4), True),
        ("cost.m.ghost.relative_error", entry(1e-6), entry(2e-3), False),
        ("qa.m.wikidata.likelihood.auroc", entry(0.7, 0.03), entry(0.749, 0.04), True),  # hypot(3, 4) = 5
        ("qa.m.wikidata.likelihood.auroc", entry(0.7, 0.03), entry(0.751, 0.04), False),
        ("derivation.steps.taylor.spearman", entry(0.9), entry(0.949), True),
        ("derivation.steps.taylor.spearman", entry(0.9), entry(0.84), False),
        ("isotropy.m.gram.effective_rank", entry(100.0), entry(109.0), True),  # relative, above 1
        ("isotropy.m.gram.effective_rank", entry(100.0), entry(111.0), False),
        ("cost.machine.load", entry(1.0), entry(9.0), None),
    ],
)
def test_a_number_is_judged_by_its_kind(key, old, new, agrees):
    (row,) = compare.compare({key: old}, {key: new})
    assert row.agrees is agrees


def test_runs_of_two_sizes_are_compared_in_what_both_have_and_does_not_depend_on_size():
    key = "qa.m.wikidata.likelihood.auroc"
    old = {key: entry(0.7, 0.01), "mcmc.gate.n": entry(312), "isotropy.m.gram.effective_rank": entry(9.0)}
    new = {key: entry(0.9, 0.01), "mcmc.gate.n": entry(4), "qa.m.triviaqa.accuracy": entry(0.1, 0.1)}
    agrees = {row.key: row.agrees for row in compare.compare(old, new, same_size=False)}
    assert agrees.pop(key) is False
    assert set(agrees.values()) == {None}
    assert [row.agrees for row in compare.compare(old, new)] == [False] * 4


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*/results.json")), ids=lambda file: file.parent.name)
def test_every_kept_number_has_a_kind_and_agrees_with_itself(file):
    results = kept.read(file)["results"]
    rows = compare.compare(results, results)
    assert not [row for row in rows if row.agrees is False]
    kinds = [row.kind for row in rows]
    assert {"exact", "error", "ratio", "sampled", "shown"} == set(kinds)
    assert kinds.count("shown") < len(kinds) / 10


@pytest.fixture
def a_run(tmp_path):
    """A function that writes the published numbers as another run's, one of them changed, with hashes that hold."""

    def write(**changes: float) -> Path:
        content = json.loads(PUBLISHED.read_text())
        for key, value in changes.items():
            content["results"][key] |= {"value": value, "low": value - 0.01, "high": value + 0.01}
        for chapter, run in content["meta"]["runs"].items():
            own = {"results": kept.of_chapter(content["results"], chapter)}
            text = json.dumps(own, indent=1, ensure_ascii=False) + "\n"
            run["outputs"][f"build/published/results/{chapter}.json"] = hashlib.sha256(text.encode()).hexdigest()
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_the_command_agrees_or_names_the_number_that_differs(a_run, capsys):
    assert cli.main(["verify", str(a_run())]) == 0
    assert "DIFFER" not in capsys.readouterr().out
    key = "qa.smollm2-135m-instruct.wikidata.likelihood.auroc"
    assert cli.main(["verify", str(a_run(**{key: 0.2}))]) == 1
    out = capsys.readouterr().out
    assert f"{key}  sampled " in out
    assert "; 1 DIFFER" in out


def test_the_command_refuses_what_is_no_run_of_this_version(a_run, tmp_path, capsys):
    path = a_run()
    path.write_text(path.read_text().replace("mcmc.gate.n_passed", "mcmc.gate.n_failed"))
    assert cli.main(["verify", str(path)]) == 1
    assert "the 369 numbers of 02_mcmc are not those that its run wrote" in capsys.readouterr().err
    with pytest.raises(ResultError, match=r"mcmc\.gate\.n_failed is no key that isouq knows: the file is of another"):
        compare.compare({}, {"mcmc.gate.n_failed": entry(3)})
    assert cli.main(["verify"]) == 1
    assert "wanted a results.json, or --slice" in capsys.readouterr().err


def test_every_published_chapter_has_a_slice_that_its_list_describes():
    chapters = kept.read(PUBLISHED)["meta"]["runs"].keys()
    assert slices.SLICES.keys() == chapters
    assert [line[2:].split(":")[0] for line in slices.__doc__.splitlines() if line.startswith("- ")] == sorted(chapters)
    with pytest.raises(ResultError, match="'07_x' given; wanted some of 01_derivation"):
        slices.recompute({"results": {}}, ["07_x"])


@pytest.mark.parametrize("n_shots", [0, 5])
def test_the_slice_of_answers_finds_those_of_its_own_prompt(n_shots):
    file, identity = slices.kept_answers(n_shots)
    assert file.name.startswith(f"{slices.MODEL}--{slices.DATA_SET}-")
    assert identity["settings"]["n_shots"] == n_shots


@pytest.mark.assets
def test_a_slice_agrees_and_finds_a_planted_number():
    content, key = kept.read(PUBLISHED), f"cost.{slices.MODEL}.ghost.relative_to_forward"
    published = dict(content["results"][key])
    content["results"][key]["value"] *= 10
    exact, timed = slices.recompute(content, ["05_cost"])
    assert (exact.agrees, timed.key, timed.agrees) == (True, key, False)
    (row,) = compare.compare({key: published}, {key: {"value": timed.run}})
    assert row.agrees
