"""What the Snakefile reads off a profile, without Snakemake."""

from types import SimpleNamespace

import pytest

from isouq.pipeline import graph, profiles, schemas
from isouq.studies import assets


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profile": "smoke", "profil": "x"}, "--config profil: not a known name; wanted profile"),
        ({"profile": None}, "profile: Snakemake reads None, which is no name; name the file"),
        ({"profile": 202410}, "profile: Snakemake reads 202410, which is no name"),
        ({"profile": "smok"}, "no profile 'smok'; did you mean 'smoke'?"),
    ],
)
def test_a_wrong_configuration_is_refused(config, message):
    with pytest.raises(profiles.ProfileError, match=message.replace("?", r"\?")):
        graph.Graph(config)


def test_without_a_word_the_profile_is_embedded():
    run = graph.Graph({})
    assert (run.profile.name, run.build) == ("embedded", "build/embedded")
    assert run.chapters == sorted(schemas.SCHEMAS)
    assert {"gemma-3-270m", "triviaqa", "all-minilm-l6-v2"} <= set(run.assets)


def test_each_job_before_a_notebook_is_named_after_what_it_does():
    run = graph.Graph({"profile": "smoke"})
    assert run.shards["qa-smollm2-135m-instruct-wikidata"] == ("smollm2-135m-instruct", "wikidata")
    assert len(run.shards) == 4
    assert run.before("04_llm_qa") == [f"build/smoke/qa/{shard}.done" for shard in run.shards]
    of_atlas = [f"build/smoke/mcmc/mcmc-{problem}.done" for problem in ("multiclass_clusters", "regression_nonlinear")]
    assert run.before("02_mcmc") == of_atlas
    assert run.before("03_isotropy") == of_atlas, "those of its own that 02_mcmc samples"
    assert run.before("01_derivation") == run.before("05_cost") == []


def test_each_parameter_of_a_notebook_is_a_line_of_its_own():
    run = graph.Graph({"profile": "smoke"})
    values = {name: line(SimpleNamespace(chapter="04_llm_qa")) for name, line in run.parameters().items()}
    assert values["n_questions"] == "n_questions: 8"
    assert values["data_sets"] == 'data_sets: ["triviaqa", "wikidata", "truthfulqa", "truthfulqa_choose"]'
    assert values["atlas_seeds"] == "", "a parameter of another notebook"
    shard = SimpleNamespace(shard="qa-smollm2-135m-instruct-wikidata")
    scoring = {name: line(shard) for name, line in run.scoring().items()}
    assert scoring["n_questions"] == "n_questions: 8"
    assert scoring["file"] == ""
    assert "n_folds" not in scoring
    assert "headline_seeds: 1" in run.sampling()


def test_a_job_asks_for_a_gpu_where_the_profile_places_models_there(monkeypatch):
    monkeypatch.setattr(assets, "content", lambda name: "1" * 40)  # no network: the Hub would be asked
    assert (graph.Graph({"profile": "paper"}).gpus, graph.Graph({"profile": "smoke"}).gpus) == (1, 0)


def test_a_folder_is_built_by_one_process_at_a_time(tmp_path):
    held = graph.lock(tmp_path / "tiny")
    with pytest.raises(BlockingIOError, match=r"another process is building .*tiny: wait for it, or end it"):
        graph.lock(tmp_path / "tiny")
    held.release()
    graph.lock(tmp_path / "tiny").release()
