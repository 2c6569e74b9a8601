"""The estimates within lm-polygraph's own benchmark; make test-polygraph runs this where that tool is installed."""

import numpy as np
import pytest
import torch

import isouq

pytest.importorskip("lm_polygraph", reason="make test-polygraph has it")

from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
from lm_polygraph.estimators import MaximumSequenceProbability
from lm_polygraph.generation_metrics import RougeMetric
from lm_polygraph.ue_metrics import PredictionRejectionArea
from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
from lm_polygraph.utils.dataset import Dataset
from lm_polygraph.utils.manager import UEManager
from lm_polygraph.utils.model import WhiteboxModel

import letters
from isouq.integrations import polygraph
from isouq.language.scoring import score_tokens

N = 20


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """A benchmark of twenty questions, run on a small random model."""
    lm, tokenizer = isouq.load_causal_lm(str(letters.save(tmp_path_factory.mktemp("model"))))
    lm.set_attn_implementation("eager")  # lm-polygraph reads the attention
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    model = WhiteboxModel(lm, tokenizer, "letters")
    questions = [f"what is {'a' * (1 + i % 5)}?" for i in range(N)]
    ours = [score(name) for score in (polygraph.Epistemic, polygraph.Aleatoric) for name in polygraph.AGGREGATIONS]
    run = UEManager(
        Dataset(questions, ["a"] * N, batch_size=4),
        model,
        [MaximumSequenceProbability(), polygraph.LogGradient("geometric"), *ours],
        builder_env_stat_calc=BuilderEnvironmentStatCalculator(model),
        available_stat_calculators=[*register_default_stat_calculators("Whitebox"), polygraph.container()],
        generation_metrics=[RougeMetric("rougeL")],
        ue_metrics=[PredictionRejectionArea()],
        processors=[],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=4,
    )
    run()
    return run


def test_its_benchmark_has_the_scores_of_the_answers_that_it_generated(manager):
    model, tokenizer = manager.model.model, manager.model.tokenizer
    for row, (text, ids) in enumerate(zip(manager.stats["input_texts"], manager.stats["greedy_tokens"], strict=True)):
        prompt, answer = tokenizer(text)["input_ids"], ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        whole = torch.tensor([prompt + answer])
        for aggregation in polygraph.AGGREGATIONS:
            one = score_tokens(model, whole, torch.arange(whole.shape[1])[None] >= len(prompt), aggregation=aggregation)
            for name, value in {"Epistemic": one.log_epistemic, "Aleatoric": one.aleatoric}.items():
                found = manager.estimations["sequence", f"Isouq{name}_{aggregation}"][row]
                assert found == pytest.approx(value.item(), rel=1e-4, abs=1e-4)


def test_it_ranks_them_beside_its_own(manager):
    names = {name for _, name, *_ in manager.metrics}
    assert {"MaximumSequenceProbability", "IsouqEpistemic_sequence", "IsouqLogGradient_geometric"} <= names


def test_what_it_saved_is_a_table_of_prompts_and_answers(manager, tmp_path):
    manager.save(str(tmp_path / "run.man"))
    table = polygraph.saved(tmp_path / "run.man")
    assert table["prompt"].tolist() == manager.stats["input_texts"]
    assert table["answer"].tolist() == manager.stats["greedy_texts"]
    torch.save({"stats": {}}, tmp_path / "other.man")
    with pytest.raises(ValueError, match=r"other\.man: no file of UEManager\.save"):
        polygraph.saved(tmp_path / "other.man")


def test_an_answer_without_a_token_is_infinitely_uncertain_and_others_keep_their_scores(manager):
    texts, given = ["what is a?", "what is b?"], [[0], [5, 6]]
    calculator = polygraph.GradientNormCalculator()
    both, alone = (
        calculator({"greedy_tokens": given[i:]}, texts[i:], manager.model)[polygraph.STATISTIC]["epistemic_sequence"]
        for i in (0, 1)
    )
    assert both == [np.inf, pytest.approx(alone[0], abs=1e-5)]


def test_other_models_and_aggregations_are_refused():
    with pytest.raises(ValueError, match="model: object given, a WhiteboxModel of a causal language model wanted"):
        polygraph.GradientNormCalculator()({"greedy_tokens": []}, [], object())
    with pytest.raises(ValueError, match="aggregation: 'mean' given, one of sequence, geometric wanted"):
        polygraph.Epistemic("mean")
