"""A true choice against a gradient of the softmax itself, and what a layer's share is."""

import copy

import pytest
import torch

from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.studies.qa import answers, generation, stages, subject
from isouq.studies.qa.data import DataSet, Question


@pytest.fixture
def asked(llama, tokenizer) -> subject.Subject:
    question = Question("q", "who?", ("w1 w2", "x"), ("yes", "no way", "w3"))
    others = tuple(Question(f"{i}", f"what {i}", ("y",), ("z",)) for i in range(9))
    data_set = DataSet("small", (question, *others), "Q:{question}\nA:{answer}\n", "Q:official?\nA: prefix\n", True)
    settings = subject.Settings(n_questions=10, n_samples=0, n_shots=0)
    return subject.prepare(llama, tokenizer, data_set, settings, choose=True)


def test_a_choices_uncertainty_is_the_gradient_of_its_softmax(asked, llama, tokenizer) -> None:
    row = next(i for i, question in enumerate(asked.questions) if question.item_id == "q")
    found = answers.choice(asked, row, "auto")
    prompt = tokenizer("Q:who?\nA:")["input_ids"]
    texts = ["w1 w2", "x", "yes", "no way", "w3"]
    ids = [generation.encode_answer(tokenizer, text) for text in texts]
    llama.requires_grad_(True)
    log_p = torch.stack(
        [
            llama(input_ids=torch.tensor([prompt + answer]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
            .log_softmax(-1)[range(len(answer)), answer]
            .sum()
            for answer in ids
        ]
    ).log_softmax(0)
    assert found["log_p"] == pytest.approx(log_p.tolist(), abs=1e-4)
    assert found["n_true"] == 2
    for c in range(len(texts)):
        gradients = torch.autograd.grad(log_p[c].exp(), list(llama.parameters()), retain_graph=True)
        squares = sum(g.double().square().sum() for g in gradients)
        assert found["log_epistemic"][c] == pytest.approx(squares.log().item(), abs=1e-3)


def test_layers_add_up_to_the_whole(llama) -> None:
    how = scoring.Scoring(breakdown=True)
    estimate = scoring.score(llama, from_pairs([([5, 6], [7, 8]), ([9], [10])]), how)["sequence"]
    shares = stages.by_layer(estimate)
    kinds = {f"{block}.{kind}" for block in (0, 1) for kind in ("attention", "mlp", "norm")}
    assert set(shares[0]) == kinds | {"embedding", "norm"}
    for i, share in enumerate(shares):
        total = torch.tensor(list(share.values()), dtype=torch.float64).logsumexp(0)
        assert total.item() == pytest.approx(estimate.log_epistemic[i].item(), abs=1e-6)


def test_a_free_answer_is_judged_by_embeddings_and_words(asked) -> None:
    free = subject.Subject(
        asked.model,
        asked.tokenizer,
        asked.data_set,
        asked.questions,
        asked.prompts,
        encoder=lambda texts: torch.stack(
            [torch.nn.functional.normalize(torch.tensor([1.0 + ("w" in t), 1.0 + ("y" in t)]), dim=0) for t in texts]
        ),
    )
    row = next(i for i, question in enumerate(asked.questions) if question.item_id == "q")
    verdict = answers.verdict(free, row, {"text": "w1 w2"})
    assert verdict["right_by_rouge"]
    assert not verdict["right"]  # as near to "w3" in these two dimensions, and right is nearer
    assert verdict["rouge_contrast"] == 1
    assert answers.verdict(free, row, {"text": ""})["embedding_contrast"] == -1


TEMPLATE = "{% for m in messages %}Q:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


def test_a_chat_asks_in_turns_and_answers_without_a_space(asked, llama, tokenizer) -> None:
    settings = subject.Settings(n_questions=10, n_samples=0, n_shots=0, chat=True)
    with pytest.raises(ValueError, match="chat: the model's tokenizer has no chat template"):
        subject.prepare(llama, tokenizer, asked.data_set, settings, choose=True)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    turned = subject.prepare(llama, chatty, asked.data_set, settings, choose=True)
    text = asked.data_set.prompt(turned.questions[0])
    assert turned.prompts[0] == tokenizer(f"Q:{text}\nA:")["input_ids"]
    plain, chat = (s.reference_ids(s.questions[0])[0] for s in (asked, turned))
    assert plain == tokenizer(" " + turned.questions[0].answers[0])["input_ids"]
    assert chat == tokenizer(turned.questions[0].answers[0])["input_ids"]
    assert settings.identity() != subject.Settings(n_questions=10, n_samples=0, n_shots=0).identity()
