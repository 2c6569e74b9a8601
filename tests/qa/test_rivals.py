"""The rivals on examples computed by hand, and what a pass through a model tells against the plainest loop."""

import math
from pathlib import Path

import pytest
import torch

from isouq.studies.qa import rivals
from isouq.studies.qa.data import Question
from isouq.studies.qa.sampling import solved_examples

LOG_PROBS, N_STEPS = [math.log(0.25), math.log(0.5), math.log(0.25)], [2, 1, 1]


def test_naive_entropy_is_the_mean_of_minus_log_p_a_token() -> None:
    assert rivals.naive_entropy(LOG_PROBS, N_STEPS) == pytest.approx((math.log(4) / 2 + math.log(2) + math.log(4)) / 3)


def test_semantic_entropy_weighs_meanings_by_length_normalised_p() -> None:
    """The weights are ½ (0.25 over two tokens), ½ and ¼, so the meanings {1, 3} and {2} have 0.6 and 0.4."""
    by_hand = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert rivals.semantic_entropy(LOG_PROBS, N_STEPS, [0, 1, 0]) == pytest.approx(by_hand)
    assert rivals.semantic_entropy(LOG_PROBS, N_STEPS, [0, 0, 0]) == 0
    counted = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert rivals.discrete_semantic_entropy([0, 1, 0]) == pytest.approx(counted)


def test_meanings_join_what_is_the_same_as_the_first_of_a_group() -> None:
    texts = ["Rome", "Paris", "rome", "Rom", "PARIS"]
    assert rivals.meanings(texts, lambda i, j: texts[i].lower() == texts[j].lower()) == [0, 1, 0, 2, 1]
    directions = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), dim=1)
    assert rivals.meanings(["a", "b", "c"], rivals.by_embedding(directions)) == [0, 1, 0]


def test_the_prompt_of_p_true() -> None:
    prompt = rivals.p_true_prompt("Who wrote Faust?", ["Goethe", "", "Schiller"], "Goethe", " A")
    assert prompt == (
        "Question: Who wrote Faust?\nBrainstormed answers:\nGoethe\nSchiller\nPossible answer: Goethe\n"
        "Is the possible answer:\nA) True\nB) False\nThe possible answer is: A"
    )


def test_p_true_is_high_where_the_model_says_false() -> None:
    assert rivals.p_true([math.log(0.1), math.log(0.3)]) == pytest.approx(0.75)
    assert rivals.p_true([-900.0, -1000.0]) == pytest.approx(0)


def test_every_second_solved_example_is_wrong_by_the_models_own_answer() -> None:
    shots = [(Question(f"{i}", f"q{i}", (f"right {i}",)), ["Right 1.", "", "other"]) for i in range(4)]
    shots[3] = (shots[3][0], ["right 3"])  # never wrong: another question's answer stands in
    lines = solved_examples(shots).split("\n")
    possible = [line.removeprefix("Possible answer: ") for line in lines if line.startswith("Possible answer")]
    labels = [line[-1] for line in lines if line.startswith("The possible answer is")]
    assert possible == ["right 0", "other", "right 2", "right 2"]
    assert labels == ["A", "B", "A", "B"]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_scores_of_one_pass_are_those_of_each_answer_alone(request, name: str) -> None:
    model = request.getfixturevalue(name)
    prompts, answers = [[5, 6, 7], [9, 10, 11, 12, 13], [20]], [[30, 31], [40], [41, 42, 43, 44]]
    found = rivals.answer_scores(model, list(zip(prompts, answers, strict=True)))
    for prompt, answer, scores in zip(prompts, answers, found, strict=True):
        embedded = model.get_input_embeddings()(torch.tensor([prompt + answer])).detach().requires_grad_()
        log_p = model(inputs_embeds=embedded, use_cache=False).logits[0].double().log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        tokens = torch.stack([log_p[row, token] for row, token in zip(rows, answer, strict=True)])
        [gradient] = torch.autograd.grad(tokens.sum(), embedded)
        entropy = torch.stack([-(log_p[row].exp() * log_p[row]).sum() for row in rows]).mean()
        assert scores["lowest_log_prob"] == pytest.approx(tokens.min().item(), abs=1e-4)
        assert scores["token_entropy"] == pytest.approx(entropy.item(), abs=1e-4)
        norm = gradient[0, : len(prompt)].double().square().sum().log().item()
        assert scores["log_embedding_gradient"] == pytest.approx(norm, abs=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_entailment_asks_in_both_directions(reader) -> None:
    judge = rivals.Entailment(reader)
    asked = []
    judge.model.forward = lambda **inputs: (
        asked.append(inputs) or type("Out", (), {"logits": torch.tensor([[0.0, 1.0]])})
    )
    same = judge.of("a", ["a", "b", "a"])
    assert same(0, 2)
    assert not asked  # equal texts need no model
    assert same(0, 1)
    assert len(asked) == 2


def test_a_judges_share_is_the_probability_that_the_answer_entails_a_reference(reader) -> None:
    judge = rivals.Entailment(reader)
    found = judge.shares("q", "b", ["a b a b", "b"])  # of two lengths, so one is padded
    for share, reference in zip(found, ["a b a b", "b"], strict=True):
        inputs = judge.tokenizer("q b", f"q {reference}", return_tensors="pt")
        with torch.no_grad():
            assert share == pytest.approx(judge.model(**inputs).logits.softmax(-1)[0, 1].item(), abs=1e-6)
    assert abs(found[0] - found[1]) > 2e-6


def test_a_model_that_is_for_something_else_is_refused_by_name_before_its_weights_are_read(reader) -> None:
    folder = Path(reader)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("ENTAILMENT", "LABEL_1"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"judge: .* language inference: it has labels contradiction, label_1, 'ent"):
        rivals.Entailment(reader, "judge")
    with pytest.raises(ValueError, match=r"nli: ./nowhere is no model for natural language inference: "):
        rivals.Entailment("./nowhere")
