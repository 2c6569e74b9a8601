"""The study of profile `paper` on small random models of its architectures: bfloat16, a device map, a judge."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_study import letters
from transformers import AutoConfig, AutoModelForCausalLM

from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.pipeline import profiles
from isouq.studies.qa import stages, study, subject
from isouq.studies.qa.study import Settings
from isouq.studies.store import Store

PAPER = profiles.load("paper")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "initializer_range": 0.6, "bos_token_id": None, "eos_token_id": 0}
HOW = {"n_questions": 6, "n_shots": 2, "n_samples": 3, "n_token_mean": 3, "max_new_tokens": 5, "batch_size": 4}


def small_model(architecture: dict, tokenizer, folder: Path) -> str:
    """Save a random model of the same kind, with float32 weights that bfloat16 can hold."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture | SMALL | {"vocab_size": len(tokenizer), "pad_token_id": None})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=PAPER.gpu.architectures)
def model(request, tokenizer, tmp_path) -> str:
    return small_model(PAPER.gpu.architectures[request.param], tokenizer, tmp_path / "model")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = [{"question": f"what is {i}?", "answer": ["x", f"y {i}"], "false_answers": ["a b"]} for i in range(20)]
    pd.DataFrame(rows).to_parquet(tmp_path / "q.parquet")
    return str(tmp_path / "q.parquet")


def test_the_profile_names_an_architecture_for_each_model() -> None:
    section = PAPER.parameters("04_llm_qa")
    assert list(PAPER.gpu.architectures) == section.models
    assert {section.dtype, section.device_map} == {"bfloat16", "auto"}


def test_every_stage_runs_in_bfloat16_under_a_device_map(model, questions, reader, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subject, "SentenceEncoder", lambda: letters)
    how = HOW | {"dtype": "bfloat16", "device_map": "auto", "store_dir": str(tmp_path / "store")}
    settings = Settings(**how, nli=reader, judge=reader)
    kept, plain = {}, study.Store.get

    def get(store, stage):
        kept[stage] = plain(store, stage)
        return kept[stage]

    monkeypatch.setattr(study.Store, "get", get)
    table = study.run(model, questions, settings, progress=False)
    assert table.attrs["failed"] == {}
    scored = table[~table["empty"]]
    assert {"right", "right_by_rouge", "right_by_entailment", "semantic_entropy_entailment", "p_true"} <= set(table)
    numbers = scored.filter(regex="^(log_|likelihood|naive|semantic|p_true|lowest|token_entropy|embedding|layer)")
    numbers = numbers.drop(columns=[name for name in numbers if name.endswith("token_mean")])
    assert np.isfinite(numbers.to_numpy(dtype=float)).all()
    assert study.run(model, questions, settings, progress=False).equals(table)
    # The same ids in float32, which has the same weights:
    lm, tokenizer, _ = study._load_model(model, "float32", None)
    asked = study.prepare(lm, tokenizer, study.load_questions(questions), settings)
    prompts = {q.item_id: prompt for q, prompt in zip(asked.questions, asked.prompts, strict=True)}
    pairs = [(prompts[i], kept["answer"][i]["token_ids"]) for i in scored["item_id"]]
    exact = scoring.score(lm, from_pairs(pairs), scoring.Scoring())["sequence"]
    assert scored["log_prob"].to_numpy() == pytest.approx(exact.log_prob.numpy(), rel=0.03, abs=0.3)
    assert scored["log_epistemic_sequence"].to_numpy() == pytest.approx(exact.log_epistemic.numpy(), rel=0.05, abs=0.6)


def test_a_true_choice_in_bfloat16_has_no_more_digits_than_it_can(model, questions, tmp_path) -> None:
    lm, tokenizer, _ = study._load_model(model, "bfloat16", "auto")
    settings = Settings(**HOW, dtype="bfloat16")
    asked = study.prepare(lm, tokenizer, study.load_questions(questions), settings, choose=True, encoder=letters)
    with Store(tmp_path / "s.sqlite", {}) as store:
        stages.complete(store, asked, settings, progress=False)
        table = study.tabulate(store, asked.questions)
    assert table.attrs["failed"] == {}
    assert np.isfinite(table[["log_epistemic_choice", "log_p_choice", "log_epistemic_sequence"]].to_numpy()).all()


def test_what_is_new_enters_the_identity_only_where_it_is_asked_for() -> None:
    plain = Settings().identity()
    assert plain == {"seed": 0, "n_shots": 5, "max_new_tokens": 24, "engine": "auto", "n_samples": 10, "nli": ""}
    for name, value in {"dtype": "bfloat16", "device_map": "auto", "judge": "owner/name", "chat": True}.items():
        assert Settings(**{name: value}).identity() == plain | {name: value}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 1}, "n_samples: 1 given, an integer of at least 2"),
        ({"n_samples": -2}, "n_samples: -2 given"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 given, an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size: 2.0 given"),
        ({"n_shots": -1}, "n_shots: -1 given"),
        ({"seed": None}, "seed: None given"),
        ({"dtype": "float16"}, "dtype: 'float16' given, one of float32, bfloat16 wanted; did you mean 'bfloat16'"),
        ({"engine": "ghist"}, "engine: 'ghist' given, .* did you mean 'ghost'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_judge_that_is_none_is_refused_before_the_model_is_read(questions) -> None:
    with pytest.raises(ValueError, match="judge: no such judge is no model for natural language inference"):
        study.run("no such model", questions, Settings(judge="no such judge"))


def test_weights_that_do_not_fit_the_gpus_are_refused(model, monkeypatch) -> None:
    plain = study.assets.load_causal_lm

    def offloaded(name, **options):
        lm, tokenizer = plain(name, **options)
        return lm.to("meta"), tokenizer

    monkeypatch.setattr(study.assets, "load_causal_lm", offloaded)
    study._load_model.cache_clear()
    with pytest.raises(ValueError, match=r"device_map: .*model does not fit into the GPUs"):
        study._load_model(model, "bfloat16", "auto")


def test_a_question_longer_than_the_context_fails_alone(tokenizer, llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(llama.config, "max_position_embeddings", 60)
    questions = [study.data.Question(f"{i}", "what " * (20 if i == 3 else 1), (f"x{i}",)) for i in range(8)]
    data_set = study.data.DataSet("small", tuple(questions), "Q:{question}\nA:{answer}\n")
    settings = Settings(**HOW | {"n_questions": 8, "n_shots": 0, "n_samples": 0})
    asked = study.prepare(llama, tokenizer, data_set, settings)
    with Store(tmp_path / "s.sqlite", {}) as store:
        stages.complete(store, asked, settings, progress=False)
        table = study.tabulate(store, asked.questions)
    assert list(table.attrs["failed"]) == ["3"]
    assert "at most the model's context of 60 wanted" in table.attrs["failed"]["3"]
    assert len(table) == 7


def test_records_made_elsewhere_are_served_whole_or_not_at_all(
    model, questions, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "SentenceEncoder", lambda: letters)
    records = tmp_path / "records"
    how = HOW | {"records_dir": str(records)}
    made = study.run(model, questions, Settings(**how, store_dir=str(tmp_path / "a")), progress=False)
    monkeypatch.setattr(study.identity, "versions", lambda *names: dict.fromkeys(names, "0.1"))
    here = str(tmp_path / "b")

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "answer", refuse)
        patch.setattr(stages, "_estimate", refuse)
        served = study.run(model, questions, Settings(**how, store_dir=here, device_map="auto"), progress=False)
        pd.testing.assert_frame_equal(served, made)
        assert served.attrs["made"] == made.attrs["made"] != "CPU, torch 0.1"
    (before,) = records.iterdir()
    content = before.read_bytes()
    more = study.run(model, questions, Settings(**how | {"n_questions": 8}, store_dir=here), progress=False)
    assert (len(more), more.attrs["made"]) == (8, "CPU, torch 0.1")
    assert before.read_bytes() == content
    assert len(list(records.iterdir())) == 2
    # Of other settings they are another run's:
    other = study.run(model, questions, Settings(**how | {"seed": 1}, store_dir=here), progress=False)
    assert other.attrs["made"] == "CPU, torch 0.1"


def test_a_choice_is_read_as_one_among_the_references_as_often_as_asked(model, questions, tmp_path) -> None:
    lm, tokenizer, _ = study._load_model(model, "float32", None)
    settings = Settings(**HOW | {"n_samples": 0, "n_choice": 2})
    asked = study.prepare(lm, tokenizer, study.load_questions(questions), settings, choose=True, encoder=letters)
    with Store(tmp_path / "s.sqlite", {}) as store:
        stages.complete(store, asked, settings, progress=False)
        assert set(store.get("choice")) == {question.item_id for question in asked.questions[:2]}
