"""A profile says just what its schema allows, and an error names the nearest valid word."""

import json
import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from isouq.pipeline import profiles, schemas

ROOT = Path(__file__).resolve().parents[1]
QA = schemas.defaults("04_llm_qa")
SHIPPED = sorted(path.stem for path in (ROOT / "profiles").glob("*.yml"))


def written(folder: Path, *, name: str = "mine", **changes) -> Path:
    """Write a valid profile with some of its entries changed, and return its path."""
    base = {"name": name, "description": "for a test", "minutes": 1, "memory_gb": 1, "notebooks": {"04_llm_qa": {}}}
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(base | changes))
    return path


def complaints(path: Path) -> list[str]:
    with pytest.raises(profiles.ProfileError) as caught:
        profiles.load(path)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_by_name_and_by_path(name):
    assert profiles.load(name) == profiles.load(ROOT / "profiles" / f"{name}.yml")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_says_only_what_differs_from_the_notebooks(name):
    content = yaml.safe_load((ROOT / "profiles" / f"{name}.yml").read_text())
    for chapter, section in content["notebooks"].items():
        own = schemas.defaults(chapter)
        assert not [name for name, value in section.items() if value == own[name]]


def test_a_section_overrides_the_notebook_and_only_what_it_names(tmp_path):
    path = written(tmp_path, seed=7, notebooks={"01_derivation": {"seed": 3}, "04_llm_qa": {"n_questions": 11}})
    profile = profiles.load(path)
    assert profile.chapters() == ["01_derivation", "04_llm_qa"]
    section = profile.parameters("04_llm_qa", results_path="out.json")
    changed = {"profile": "mine", "seed": 7, "results_path": "out.json", "n_questions": 11}
    assert section.model_dump() == QA | changed
    assert profile.parameters("01_derivation").seed == 3, "a section's own seed goes before the profile's"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"n_question": 3}, "n_question is not a known name; did you mean 'n_questions'?"),
        ({"n_questions": "3"}, "n_questions: '3' given; wanted integer"),
        ({"n_questions": 0}, "n_questions: 0 given; wanted greater than or equal to 4"),
        ({"n_questions": True}, "n_questions: True given; wanted integer"),
        ({"engine": "ghist"}, "engine: 'ghist' given; wanted one of auto, ghost, autograd; did you mean 'ghost'?"),
        ({"models": []}, "models: [] given; wanted at least 1 of them"),
        ({"models": ["smolm2-135m-instruct"]}, "did you mean 'smollm2-135m-instruct'?"),
        ({"data_sets": ["trivaqa"]}, "did you mean 'triviaqa'?"),
        ({"results_path": "x.json"}, "notebooks: 04_llm_qa.results_path is set by the pipeline; remove it"),
        (None, "notebooks.04_llm_qa: nothing given; wanted a value ({} takes the defaults)"),
    ],
)
def test_what_the_schema_does_not_allow_is_refused_with_advice(tmp_path, section, expected):
    lines = complaints(written(tmp_path, notebooks={"04_llm_qa": section}))
    assert len(lines) == 1
    assert lines[0].startswith("mine.yml: notebooks.04_llm_qa" if "pipeline" not in expected else "mine.yml: ")
    assert expected in lines[0]


def test_every_problem_is_named_at_once(tmp_path):
    path = written(tmp_path, seeed=1, minutes="1e-1", notebooks={"04_llm_qq": {}})
    lines = complaints(path)
    assert lines == [
        "mine.yml: minutes: '1e-1' given; wanted number; YAML reads this as text: write a point, as in 1.0e-3",
        "mine.yml: notebooks.04_llm_qq is not a known name; did you mean '04_llm_qa'?",
        "mine.yml: seeed is not a known name; did you mean 'seed'?",
    ]


def test_a_key_given_twice_is_refused_although_yaml_would_keep_the_last(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text() + "seed: 1\nseed: 2\n")
    (line,) = complaints(path)
    assert line.startswith("mine.yml cannot be read: given twice: seed in ")


def test_a_merge_given_twice_is_refused_too(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("04_llm_qa: {}", "04_llm_qa: {<<: {seed: 1}, <<: {seed: 2}}"))
    assert "given twice: <<" in complaints(path)[0]


def test_a_name_other_than_the_files_is_refused(tmp_path):
    path = written(tmp_path).rename(tmp_path / "other.yml")
    assert complaints(path) == ["other.yml: name: 'mine' given; wanted the file's own name, 'other'"]


def test_an_unknown_profile_is_named_with_the_nearest():
    with pytest.raises(profiles.ProfileError, match="no profile 'smok'; did you mean 'smoke'"):
        profiles.load("smok")


def test_a_profile_cannot_be_changed_after_it_was_checked(tmp_path):
    profile = profiles.load(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        profile.parameters("04_llm_qa").n_questions = 5


def test_validate_takes_a_notebooks_globals_as_they_are():
    given = QA | {"n_questions": 9}
    noise = {"In": [""], "Out": {}, "_": 1, "json": json, "Path": Path, "profiles": profiles}
    assert profiles.validate("04_llm_qa", given | noise).model_dump() == given


def test_validate_refuses_a_name_misspelt_after_papermills_p():
    given = QA | {"n_question": 20}
    with pytest.raises(profiles.ProfileError, match="n_question is not a known name; did you mean 'n_questions'"):
        profiles.validate("04_llm_qa", given)


def test_validate_refuses_a_parameter_that_the_cell_does_not_set():
    given = QA | {"n_shots": Path()}
    with pytest.raises(profiles.ProfileError, match=r"04_llm_qa: not set in the parameters cell, .*: n_shots"):
        profiles.validate("04_llm_qa", given)


def test_only_what_scoring_depends_on_makes_a_score_stale():
    base = schemas.LlmQa(**QA)
    pair = base.pairs()[0]
    analysis = base.model_copy(update={"n_resamples": 7, "n_folds": 2, "results_path": "x", "profile": "y"})
    assert analysis.scoring(*pair) == base.scoring(*pair)
    for name, value in {"seed": 1, "n_questions": 11, "n_shots": 4, "n_samples": 9, "engine": "autograd"}.items():
        assert base.model_copy(update={name: value}).scoring(*pair) != base.scoring(*pair)


def test_a_pair_is_asked_as_many_questions_as_its_tightest_limit():
    models = ["smollm2-135m-instruct", "gemma-3-270m"]
    limits = {"wikidata": 90, "gemma-3-270m": 40, "gemma-3-270m triviaqa": 0}
    given = QA | {"models": models, "data_sets": ["triviaqa", "wikidata"], "n_questions": 99, "at_most": limits}
    given |= {"n_token_mean": {"wikidata": 7}}
    section = schemas.LlmQa(**given)
    assert [section.scoring(*pair)["n_token_mean"] for pair in section.pairs()] == [0, 7, 7]
    sizes = {pair: section.scoring(*pair)["n_questions"] for pair in section.pairs()}
    assert sizes == {(models[0], "triviaqa"): 99, (models[0], "wikidata"): 90, (models[1], "wikidata"): 40}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"at_most": {"trivia": 9}},
            "at_most: 'trivia' is no model, data set or pair of these; did you mean 'triviaqa'",
        ),
        ({"at_most": {"triviaqa": 3}}, "at_most: 'triviaqa' has 3; wanted at least 4, or 0"),
        ({"at_most": dict.fromkeys(QA["data_sets"], 0)}, "at_most: leaves no model and data set"),
        ({"n_samples": 1}, "n_samples: 1 given, which has no entropy"),
        ({"n_questions": 6, "n_folds": 7}, "n_folds: 7 given for 6 questions; wanted at most as many folds"),
        ({"temperature": 0}, "temperature\n"),  # samples are drawn at 1, which entropies are about
        ({"nli": "deberta-large-mnli"}, "'deberta-large-mnli' is no Hub id .* and no folder"),
        (
            {"judge": "a/b", "data_sets": ["wikidata"], "at_most": {}},
            "judge: 'a/b' given, and no set of free answers to judge",
        ),
        ({"bare": {"smollm2-135m-instruct wikidat": 9}}, "'wikidat' is no data set .*; did you mean 'wikidata'"),
        ({"bare": {"smollm2-135m wikidata": 9}}, "'smollm2-135m' is no model of the manifest"),
        ({"bare": {"wikidata": 9}}, "'wikidata' is no model of the manifest"),
        ({"bare": {"smollm2-135m-instruct truthfulqa": 9}}, "bare: 'truthfulqa' has a prompt of its own"),
    ],
)
def test_a_size_that_means_nothing_is_refused_by_name(change, expected):
    with pytest.raises(ValueError, match=expected):
        schemas.LlmQa(**QA | change)


def test_a_pair_of_those_asked_is_asked_bare_too_and_no_other():
    models, sets = ["smollm2-135m-instruct", "gemma-3-270m"], ["triviaqa", "wikidata"]
    given = QA | {"models": models[:1], "data_sets": sets, "n_questions": 20, "at_most": {"triviaqa": 9}}
    given["bare"] = {f"{models[0]} triviaqa": 50, f"{models[0]} wikidata": 5, f"{models[1]} wikidata": 5}
    section = schemas.LlmQa(**given)
    assert section.bare_pairs() == [(models[0], "triviaqa"), (models[0], "wikidata")]
    both = [(section.scoring(*pair), section.scoring(*pair, bare=True)) for pair in section.bare_pairs()]
    assert [bare["n_questions"] for _, bare in both] == [9, 5]
    for usual, bare in both:
        changed = {name for name in usual if usual[name] != bare[name]} - {"n_questions", "n_token_mean"}
        assert changed == {"n_shots"}
        assert bare["n_shots"] == 0


def test_a_file_of_questions_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    given = QA | {"models": ["gemma-3-270m"], "data_sets": ["mine.jsonl"], "at_most": {}, "n_token_mean": {}}
    section = schemas.LlmQa(**given)
    assert section.pairs() == [("gemma-3-270m", "mine.jsonl")]
    assert section.assets() == ["all-minilm-l6-v2", "gemma-3-270m"]
    with pytest.raises(ValueError, match=r"'other\.jsonl': there is no such file"):
        schemas.LlmQa(**given | {"data_sets": ["other.jsonl"]})
    with pytest.raises(ValueError, match=r"'wikidat' is no data set .*; did you mean 'wikidata'"):
        schemas.LlmQa(**given | {"data_sets": ["wikidat"]})
    Path("sub").mkdir()
    Path("sub/mine.jsonl").write_text("")
    with pytest.raises(ValueError, match="would name their results alike"):
        schemas.LlmQa(**given | {"data_sets": ["mine.jsonl", "sub/mine.jsonl"]})


def test_a_notebooks_assets_are_its_models_and_data_sets_of_the_manifest():
    models = ["gemma-3-270m", "Qwen/Qwen3-0.6B"]
    given = QA | {"models": models, "data_sets": ["truthfulqa_choose"], "at_most": {}}
    assert schemas.LlmQa(**given | {"n_samples": 0}).assets() == ["gemma-3-270m", "truthfulqa"]
    rivals = ["all-minilm-l6-v2", "gemma-3-270m", "triviaqa", "truthfulqa"]
    assert schemas.LlmQa(**given | {"n_samples": 2}).assets() == rivals


# ---- what would be refused after hours, or mean something else ------------------------------------------

BASE = {"name": "mine", "description": "for a test", "minutes": 1.5, "memory_gb": 1.5, "seed": 1}
VALID = {schema: schemas.defaults(chapter) for chapter, schema in schemas.SCHEMAS.items()}
VALID[schemas.LlmQa] |= {"n_choice": {VALID[schemas.LlmQa]["models"][0]: 3}}
VALID[profiles.Profile] = BASE | {"notebooks": {}}
FIELDS = [(schema, name) for schema, values in VALID.items() for name in values if name != "notebooks"]


def senseless(name: str, value):
    """Values of a field's type that no later step can use."""
    if isinstance(value, list):
        yield from ([], value[:1] * 2, [*value, value[0]], [value], [None], tuple(value))
        yield from ([*value[1:], bad] for bad in senseless("", value[0]))
    elif isinstance(value, dict):
        yield from ({1: 9}, {2: -1}, [*value], None, dict.fromkeys(value, True), dict.fromkeys(value, 1.5))
    elif value is None:
        yield from ("", "  ", " smoke", 3, ["smoke"])
    elif isinstance(value, float):
        yield from (math.inf, -math.inf, math.nan, True, "1.5", 10**400, -1.0)
    elif isinstance(value, bool):
        yield from (1, "yes", None, math.nan)
    elif isinstance(value, int):
        yield from (True, math.inf, math.nan, 1.5, 2**63, -1)
    elif isinstance(value, str):
        yield from ("  ", 3, *([] if name == "results_path" else [""]), *([] if name == "clusters" else [None]))
        if name != "description":
            yield from (" smoke", "smoke ", "smo\nke", "smo\0ke", "smo\u200bke")


@pytest.mark.parametrize(("schema", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", None))
def test_no_field_of_any_schema_takes_an_infinite_repeated_empty_or_blank_value(schema, name):
    schema.model_validate(VALID[schema])
    tried = list(senseless(name, VALID[schema][name]))
    assert len(tried) >= 3
    for bad in tried:
        with pytest.raises(ValidationError) as caught:
            schema.model_validate(VALID[schema] | {name: bad})
        assert {error["loc"][0] for error in caught.value.errors()} == {name}, bad


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["owner/Some", "OWNER/some"], "'OWNER/some' would name its results 'owner-some', as 'owner/Some' does"),
        (
            ["owner/some", "owner/some@main"],
            "'owner/some@main' would name its results 'owner-some', as 'owner/some' does",
        ),
        (["owner/a_b", "owner/a-b"], "would name its results 'owner-a-b', as 'owner/a_b' does"),
        (["{0}/m", "{0}/other/../m"], "would name its results 'm'"),
        (["{0}/m", "{0}/n/m"], "/m' does; keep or rename one"),
        (["{0}/machine"], "would name its results 'machine', as a chapter does"),
        (["https://huggingface.co/owner/some"], "is no model of the manifest, Hub id or folder"),
        (["{0}/gone"], "is no model of the manifest, Hub id or folder"),
    ],
)
def test_models_whose_results_could_not_be_told_apart_are_refused(tmp_path, models, message):
    for folder in ("m", "n/m", "other", "machine"):
        (tmp_path / folder).mkdir(parents=True)
    models = [model.format(tmp_path) for model in models]
    (line,) = complaints(written(tmp_path, notebooks={"04_llm_qa": {"models": models}}))
    assert message in line


@pytest.mark.parametrize("name", ["2024_10", "0x1f", "2024-10-01", "yes", "null"])
def test_a_name_that_yaml_reads_as_something_else_is_refused_with_how_to_write_it(tmp_path, name):
    path = written(tmp_path, name=name)
    assert profiles.load(path).name == name, "quoted it is a name"
    path.write_text(path.read_text().replace(f"name: '{name}'", f"name: {name}"))
    (line,) = complaints(path)
    assert line.startswith(f"{name}.yml: name: ")
    assert line.endswith("put it in quotes" if name != "null" else "nothing given; wanted a value")


@pytest.mark.parametrize("number", ["010", "-010", "0_10", "1:30", "1:30.5", "007"])
def test_a_number_that_yaml_alone_reads_as_another_is_text(tmp_path, number):
    path = written(tmp_path, seed=7)
    path.write_text(path.read_text().replace("seed: 7", f"seed: {number}"))
    assert complaints(path) == [f"mine.yml: seed: {number!r} given; wanted integer"]
    path = written(tmp_path, name="007")
    path.write_text(path.read_text().replace("name: '007'", "name: 007"))
    assert profiles.load(path).name == "007"


@pytest.mark.parametrize("chapter", schemas.SCHEMAS)
def test_a_place_that_cannot_be_is_refused_before_anything_runs(tmp_path, monkeypatch, chapter):
    (tmp_path / "file").write_text("")
    own = VALID[schemas.SCHEMAS[chapter]]
    for name in (field for field in own if field.endswith(("_dir", "_path"))):
        bad = ["~/store", str(tmp_path / "file" / "in"), str(tmp_path if name == "results_path" else tmp_path / "file")]
        for place in bad:
            if name != "results_path":
                (line,) = complaints(written(tmp_path, notebooks={chapter: {name: place}}))
                assert f"notebooks.{chapter}: {name}: {place!r} given" in line
            with pytest.raises(profiles.ProfileError, match=rf"{chapter}: {name}: .* wanted"):
                profiles.validate(chapter, own | {name: place})
    profiles.validate(chapter, own | {"results_path": str(tmp_path / "new" / "a.json")})
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a test may run as root, who may write everywhere
    with pytest.raises(profiles.ProfileError, match=r"results_path: .* may not be written, another file wanted"):
        profiles.validate(chapter, own | {"results_path": str(tmp_path / "a.json")})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_profile_is_read_in_the_encodings_of_yaml(tmp_path, encoding):
    path = written(tmp_path)
    path.write_bytes(path.read_text().replace("for a test", "für Prüfungen").encode(encoding))
    assert profiles.load(path).description == "für Prüfungen"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-32"])
def test_another_encoding_is_refused_in_one_line_that_names_the_file(tmp_path, encoding):
    path = written(tmp_path)
    path.write_bytes(path.read_text().replace("for a test", "für Prüfungen").encode(encoding))
    (line,) = complaints(path)
    assert line.startswith("mine.yml cannot be read: ")
    assert line.endswith("wanted YAML, as UTF-8")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "&a [*a]", "[" * 1500, "name: 2024-13-45", "text"])
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    (line,) = complaints(path)
    assert line.startswith("mine.yml")
    assert len(line) < 250


def test_a_folder_is_no_profile(tmp_path):
    (tmp_path / "x.yml").mkdir()
    assert "no profile" in complaints(tmp_path / "x.yml")[0]


def test_sections_may_share_entries_by_yamls_merge(tmp_path):
    path = written(tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["notebooks"]
    shared = "notebooks:\n  01_derivation: &base {seed: 3}\n  04_llm_qa: {<<: *base, n_questions: 7}\n"
    path.write_text(yaml.safe_dump(content) + shared)
    assert profiles.load(path).parameters("04_llm_qa").seed == 3


def test_outside_a_clone_a_notebook_is_checked_and_a_profile_is_refused_in_one_line(tmp_path, monkeypatch):
    for module in (profiles, schemas):
        monkeypatch.setattr(module, "CLONE", tmp_path)
    assert profiles.validate("04_llm_qa", QA).model_dump() == QA
    with pytest.raises(profiles.ProfileError, match="'smoke'; profiles: none, they come with a clone of isouq"):
        profiles.load("smoke")
    (line,) = complaints(written(tmp_path))
    assert line.endswith("notebooks/04_llm_qa.ipynb is not there: default values need a clone of isouq")


def test_second_wordings_leave_queries_to_compare_with():
    given = schemas.defaults("03_isotropy") | {"n_proxies": 5}
    assert schemas.Isotropy(**given | {"n_queries": 10}).n_proxies == 5
    with pytest.raises(ValidationError, match="n_proxies: 5 given for 8 queries, at most half of them wanted"):
        schemas.Isotropy(**given | {"n_queries": 8})
