"""The uncertainties that the paper compares with, and cheap ones: functions of an answer's or of samples' records.

All are oriented as ours: high means "the answer is wrong". Samples are drawn at temperature 1
(`isouq.studies.qa.generation.draw`); their log-probabilities are in nats and include the token that ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from isouq import models
from isouq.gradients.model import differentiable
from isouq.language.examples import Batch, from_pairs

SAME_MEANING = 0.8  # cosine similarity of sentence embeddings from which two answers count as one
LABELS = (" A", " B")  # true, false


def naive_entropy(log_probs: Sequence[float], n_steps: Sequence[int]) -> float:
    """Return the mean over samples of −log p per token, in nats: length-normalised predictive entropy.

    Malinin and Gales (2021), equation 8, as the baseline of Kuhn et al. (2023).
    """
    return float(-np.mean(np.asarray(log_probs) / np.asarray(n_steps)))


def semantic_entropy(log_probs: Sequence[float], n_steps: Sequence[int], meanings: Sequence[int]) -> float:
    """Return the entropy over meanings, in nats, each weighted by its samples' probabilities (Farquhar et al. 2024).

    A sample's weight is exp(log p / number of tokens); the weights are scaled to add up to 1.
    """
    weights = special.softmax(np.asarray(log_probs) / np.asarray(n_steps))
    return float(special.entr(np.bincount(meanings, weights)).sum())


def discrete_semantic_entropy(meanings: Sequence[int]) -> float:
    """Return the entropy of the shares of samples in each meaning, in nats (Farquhar et al. 2024, discrete variant)."""
    return float(special.entr(np.bincount(meanings) / len(meanings)).sum())


def meanings(texts: Sequence[str], same: Callable[[int, int], bool]) -> list[int]:
    """Return the number of each text's meaning: that of the first meaning whose first text is the `same`, or a new one.

    This is the clustering of Farquhar et al. (2024), whose `same` is entailment in both directions.
    """
    first: list[int] = []
    numbers = []
    for i in range(len(texts)):
        number = next((k for k, j in enumerate(first) if same(j, i)), len(first))
        first += [i] if number == len(first) else []
        numbers.append(number)
    return numbers


def by_embedding(directions: Tensor) -> Callable[[int, int], bool]:
    """Return whether two texts mean the same by their embeddings (text, dimension) of unit length, the cheap way."""
    similarity = (directions @ directions.T).tolist()
    return lambda i, j: similarity[i][j] >= SAME_MEANING


class Entailment:
    """Which answers to a question entail which, by a sequence classifier for natural language inference."""

    def __init__(self, name: str, parameter: str = "nli", device_map: str | None = None) -> None:
        """Load `name`, a Hub id such as microsoft/deberta-large-mnli or a folder, whose label 'entailment' is asked.

        It is on the GPU where there is one and a `device_map` is given. Raises ValueError, naming the `parameter`, for
        a model that cannot be had or has no such label.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.content = models.content(name)  # a Hub id's commit, or a digest of the folder
            source, at = (name, {}) if Path(name).is_dir() else (name.partition("@")[0], {"revision": self.content})
            labels = {label.lower(): i for i, label in AutoConfig.from_pretrained(source, **at).id2label.items()}
            if "entailment" not in labels:
                raise ValueError(f"it has labels {', '.join(labels)}, 'entailment' wanted among them")
            self.tokenizer = AutoTokenizer.from_pretrained(source, **at)
            model = AutoModelForSequenceClassification.from_pretrained(source, **at)
        except (OSError, ValueError) as error:
            raise ValueError(f"{parameter}: {name} is no model for natural language inference: {error}") from error
        self.model = model.eval().to("cuda" if device_map and torch.cuda.is_available() else "cpu")
        self.label = labels["entailment"]

    @torch.inference_mode()
    def log_probs(self, premise: str, hypotheses: Sequence[str]) -> Tensor:
        """Return log p of each label, (hypothesis, label), for whether the premise entails each hypothesis."""
        pairs = [premise] * len(hypotheses), list(hypotheses)
        inputs = self.tokenizer(*pairs, return_tensors="pt", truncation=True, padding=True).to(self.model.device)
        return self.model(**inputs).logits.float().log_softmax(-1).cpu()

    def shares(self, question: str, text: str, others: Sequence[str]) -> list[float]:
        """Return the probability that a text entails each of several others, all as answers to the question."""
        log_p = self.log_probs(f"{question} {text}", [f"{question} {other}" for other in others])
        return log_p[:, self.label].exp().tolist()

    def of(self, question: str, texts: Sequence[str]) -> Callable[[int, int], bool]:
        """Return whether texts i and j, each after the question, entail each other."""

        def entails(i: int, j: int) -> bool:
            [log_p] = self.log_probs(f"{question} {texts[i]}", [f"{question} {texts[j]}"])
            return int(log_p.argmax()) == self.label

        return lambda i, j: texts[i] == texts[j] or (entails(i, j) and entails(j, i))


def p_true_prompt(question: str, ideas: Sequence[str], possible: str, label: str = "") -> str:
    """Return one example of the prompt of P(True), or without `label` the open one.

    After Kadavath et al. (2022), section 4: the model sees some answers of its own as ideas, and is asked whether one
    possible answer is true. The words are those of Farquhar et al. (2024), whose labels are not in brackets.
    """
    shown = "".join(f"{idea}\n" for idea in ideas if idea)
    return (
        f"Question: {question}\nBrainstormed answers:\n{shown}Possible answer: {possible}\n"
        f"Is the possible answer:\nA) True\nB) False\nThe possible answer is:{label}"
    )


def p_true(log_probs: Sequence[float]) -> float:
    """Return 1 − P(True) from log p of LABELS: the probability of B among the two."""
    return float(special.expit(log_probs[1] - log_probs[0]))


def answer_scores(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[dict[str, float]]:
    """Return what one forward pass and one backward pass to the input tell of each pair of prompt and answer.

    lowest_log_prob: log p of the least likely token, in nats. token_entropy: the mean over the answer's tokens of the
    entropy of the next token, in nats. log_embedding_gradient: log‖∇_e S‖², e the input embeddings of the prompt's
    tokens. The last is our reading of SemGrad (arXiv 2605.04638), which takes the gradient by states that keep the
    meaning of the input and chooses those by a score of its own; we take the input itself.
    """
    batch = Batch.of(from_pairs(pairs), range(len(pairs)))
    scored = batch.answer[:, 1:]
    keep = scored.any(0).nonzero().flatten()
    scored, targets = scored[:, keep], batch.ids[:, 1:][:, keep]
    with differentiable(model, {}):
        embed = model.get_input_embeddings()
        embedded = embed(batch.ids[:, :-1].to(embed.weight.device)).detach().requires_grad_()
        log_p = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)
        chosen = log_p.gather(-1, targets[..., None].to(log_p.device))[..., 0].cpu()
        [gradient] = torch.autograd.grad(chosen[scored].sum(), embedded)
    entropies = -(log_p.detach().exp() * log_p.detach()).sum(-1).cpu()
    squares = gradient.double().square().sum(-1).cpu()
    of_prompts = [row[: len(prompt)].sum() for row, (prompt, _) in zip(squares, pairs, strict=True)]
    columns = {
        "lowest_log_prob": chosen.detach().masked_fill(~scored, torch.inf).amin(1),
        "token_entropy": entropies.masked_fill(~scored, 0).sum(1) / scored.sum(1),
        "log_embedding_gradient": torch.stack(of_prompts).log(),
    }
    values = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
