"""The estimate of GPU hours and memory, against counted operations and the library's own measure of memory."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isouq.language.examples import from_pairs
from isouq.language.forward import pass_cost
from isouq.pipeline import budget, profiles, schemas
from isouq.studies.qa import data, stages, study, subject
from isouq.studies.store import Store

ARCHITECTURE = {"model_type": "llama", "vocab_size": 140, "hidden_size": 64, "intermediate_size": 128}
ARCHITECTURE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARED = {"max_new_tokens": 6, "n_samples": 3, "n_shots": 2, "n_token_mean": 3, "batch_size": 4, "n_questions": 12}


class Counter(TorchDispatchMode):
    """Adds up the operations of all matrix products, forward and backward, by torch's own formulas."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture
def questions(monkeypatch) -> data.DataSet:
    asked = [data.Question(f"{i}", f"what is {i:02}?", ("abc", "de"), ("fg hi",)) for i in range(40)]
    whole = data.DataSet("small", tuple(asked), "Q:{question}\nA:{answer}\n")
    monkeypatch.setattr(study, "load_questions", lambda name: whole)
    monkeypatch.setattr(budget, "CHARACTERS", 1.0)  # the tokenizer has no longer tokens
    return whole


def section() -> schemas.LlmQa:
    own = {"n_token_mean": {"wikidata": 3, "truthfulqa_choose": 3}, "n_folds": 2, "at_most": {}}
    given = schemas.defaults("04_llm_qa") | SHARED | own
    return schemas.LlmQa(**given | {"data_sets": ["wikidata", "truthfulqa_choose"], "models": ["gemma-3-270m"]})


@pytest.mark.parametrize(
    ("data_set", "n_choice"), [("wikidata", None), ("truthfulqa_choose", None), ("truthfulqa_choose", 2)]
)
def test_the_operations_of_a_study_are_those_that_are_counted(
    questions, tokenizer, tmp_path, data_set, n_choice
) -> None:
    """The estimate is an upper bound: a head runs at the answers only, and short texts have cheaper norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE, eos_token_id=None)).eval()
    choose = data_set.endswith("_choose")
    whole = questions if choose else dataclasses.replace(
        questions, questions=tuple(dataclasses.replace(q, false_answers=()) for q in questions.questions)
    )  # fmt: skip
    settings = subject.Settings(**SHARED, n_choice=n_choice)
    asked = subject.prepare(
        model, tokenizer, whole, settings, choose=choose, encoder=lambda texts: torch.eye(len(texts))
    )
    with Store(tmp_path / "s.sqlite", {}) as store, Counter() as counter:
        stages.complete(store, asked, settings, progress=False)
        assert not store.get("failed")
    given = section().model_copy(update={"n_choice": {} if n_choice is None else {"gemma-3-270m": n_choice}})
    estimate = budget.flops(budget.size_of(ARCHITECTURE), budget.work(given, "gemma-3-270m", data_set))
    assert 0.5 < counter.total / estimate < 1


def test_memory_is_near_what_the_library_measures() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE)).eval()
    examples = from_pairs([([5] * 40, [7] * 20)] * 4)
    size = budget.size_of(ARCHITECTURE)
    estimate = budget.memory(size, budget.Work(0.0, 0.0, 0.0, batch=240.0), n_bytes=4) - 4 * size.parameters
    assert 0.5 < pass_cost(model, examples)(examples) / estimate < 2


def test_the_sizes_of_the_papers_models_are_their_published_ones() -> None:
    sizes = [budget.size_of(one).parameters for one in profiles.load("paper").gpu.architectures.values()]
    assert sizes == [8_030_261_248, 3_212_749_824, 7_298_617_344, 14_659_507_200]


@pytest.mark.assets
def test_the_paper_profile_fits_one_gpu_and_its_own_wall_time() -> None:
    paper = profiles.load("paper")
    table = budget.table(paper)
    assert len(table) == len(paper.parameters("04_llm_qa").pairs()) == 16
    assert table["gigabytes"].max() < 80
    assert table["hours"].max() < paper.minutes / 60
    shown = budget.shown(paper)
    rows = [dict(zip(shown["header"], row, strict=True)) for row in shown["rows"]]
    assert [row["model"] for row in rows] == [*paper.parameters("04_llm_qa").models, "together"]
    assert float(rows[-1]["GPU hours"]) == pytest.approx(table["hours"].sum(), abs=0.06)
    assert "NVIDIA H100 SXM" in shown["basis"]


def test_a_profile_that_names_no_gpu_or_not_each_model_is_refused() -> None:
    with pytest.raises(profiles.ProfileError, match="profile 'smoke' has no gpu, on which hours and memory depend"):
        budget.table(profiles.load("smoke"))
    paper = profiles.load("paper")
    gpu = paper.gpu.model_copy(update={"architectures": {}})
    with pytest.raises(profiles.ProfileError, match=r"has no gpu\.architectures\.meta-llama/Llama-3\.1-8B"):
        budget.table(paper.model_copy(update={"gpu": gpu}))
