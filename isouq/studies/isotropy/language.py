"""A real language model, all its parameters: what an exact empirical Fisher of proxies does to its answers' U_E.

Proxies give the rows of F, queries are the answers that are scored. Only inner products of gradients are ever formed
(`covariance.LowRank`), so that F is exact for a model of any size.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from isouq import models
from isouq.language import scoring
from isouq.language.examples import Example, from_pairs
from isouq.language.generation import stop_token_ids
from isouq.language.scoring import Gram
from isouq.studies import assets, identity
from isouq.studies.evaluation import pearson
from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.covariance import Products
from isouq.studies.isotropy.distortion import distortion, nearness, overlap, shuffles, structure
from isouq.studies.qa import candidates, data, generation, judge
from isouq.studies.store import Store, store_path

Array = NDArray[np.float64]

# Where rows of F come from; in none of them does this model's training data come in as such.
PROXIES = {
    "triviaqa": "TriviaQA, gold answers",
    "own_answers": "TriviaQA, the model's own samples",
    "truthfulqa": "TruthfulQA, best answers",
    "prose": "ordinary prose",
    "random": "random tokens",
}
# Gold labels make an empirical Fisher, labels drawn from the model a Monte Carlo Fisher: two matrices, two names.
MATRIX = {name: "fisher" if name == "own_answers" else "empirical_fisher" for name in PROXIES}
QUERY_SETS = ("wikidata", "truthfulqa_choose")
N_SHOTS = 3  # of the Wikidata prompts
PROSE_PROMPT, PROSE_ANSWER = 16, 8  # tokens
MAX_NEW_TOKENS = 8
BATCH = 16  # prompts a batch of generation


@dataclass(frozen=True, eq=False, kw_only=True)
class Texts:
    """Prompts and answers as token ids, with a table of one row each (column kind, text, …) and their tokenizer."""

    prompts: list[list[int]]
    answers: list[list[int]]
    table: pd.DataFrame
    vocabulary: str

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.prompts)

    def examples(self) -> list[Example]:
        """The texts as what is scored."""
        return from_pairs(zip(self.prompts, self.answers, strict=True))


def vocabulary(tokenizer: Any) -> str:
    """12 hex digits of a tokenizer's vocabulary: ids mean nothing under another one."""
    return identity.digest(tokenizer.get_vocab())


def load_questions(name: str) -> data.DataSet:
    """TriviaQA, Wikidata or TruthfulQA from its asset; TruthfulQA without its official prefix, which is too long."""
    files = {"triviaqa": "data-00000-of-00001.arrow", "wikidata": "task.json", "truthfulqa": "questions.json"}
    found = data.load(name, assets.path(name, files[name]))
    return data.DataSet(found.name, found.questions, found.template)


def queries(model: Any, tokenizer: Any, n: int, *, max_tokens: int = 64, seed: int = 0) -> Texts:
    """n answers of the model, half from each of QUERY_SETS, with columns kind, text, question, answer and wrong.

    Wikidata: greedy completion after N_SHOTS examples, right by exact match. TruthfulQA: the reference answer that the
    model finds likeliest, right if it is a true one. What does not fit in `max_tokens`, and empty answers, are passed
    over.
    """
    rows = [row for name in QUERY_SETS for row in _answered(model, tokenizer, name, n // 2, max_tokens, seed)]
    table = pd.DataFrame([{k: v for k, v in row.items() if not k.endswith("_ids")} for row in rows])
    ids = [[row[key] for row in rows] for key in ("prompt_ids", "answer_ids")]
    return Texts(prompts=ids[0], answers=ids[1], table=table, vocabulary=vocabulary(tokenizer))


def _answered(model: Any, tokenizer: Any, name: str, n: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    choose = name.endswith("_choose")
    questions = load_questions(name.removesuffix("_choose"))
    n_drawn = min(3 * n, len(questions.questions) // 2)  # the second half of TruthfulQA is left for proxies
    asked, shots = data.sample(questions, n_drawn, n_shots=0 if choose else N_SHOTS, seed=seed)
    prompts = generation.encode_prompts(tokenizer, [questions.prompt(question, shots) for question in asked])
    answer = _choices if choose else _completions
    found: list[dict[str, Any]] = []
    for start in range(0, n_drawn, BATCH):
        some = slice(start, start + BATCH)
        for row in answer(model, tokenizer, asked[some], prompts[some]):
            if row["answer"] and len(row["prompt_ids"]) + len(row["answer_ids"]) <= max_tokens:
                text = f"{row['question']} {row['answer']}"
                found.append({"kind": name, "text": text, **row})
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"n: {n} answers of {name} wanted, only {len(found)} of at most {max_tokens} tokens found")


def _completions(
    model: Any, tokenizer: Any, questions: Sequence[data.Question], prompts: Sequence[list[int]]
) -> list[dict[str, Any]]:
    stops = stop_token_ids(tokenizer, model)
    made = generation.generate(model, tokenizer, prompts, stops=stops, max_new_tokens=MAX_NEW_TOKENS)
    return [
        {
            "question": question.question,
            "answer": answer.text,
            "wrong": not judge.exact_match(answer.text, question.answers),
            "prompt_ids": prompt,
            "answer_ids": list(answer.token_ids),
        }
        for question, prompt, answer in zip(questions, prompts, made, strict=True)
    ]


def _choices(
    model: Any, tokenizer: Any, questions: Sequence[data.Question], prompts: Sequence[list[int]]
) -> list[dict[str, Any]]:
    texts = [[*question.answers, *question.false_answers] for question in questions]
    ids = [[generation.encode_answer(tokenizer, text) for text in some] for some in texts]
    best = [int(scores.argmax()) for scores in candidates.candidate_log_probs(model, prompts, ids)]
    return [
        {
            "question": question.question,
            "answer": texts[row][best[row]],
            "wrong": best[row] >= len(question.answers),
            "prompt_ids": prompts[row],
            "answer_ids": ids[row][best[row]],
        }
        for row, question in enumerate(questions)
    ]


def proxies(model: Any, tokenizer: Any, n: int, *, max_tokens: int = 64, seed: int = 0) -> Texts:
    """n texts from each of PROXIES, with columns kind and text; none of their questions is ever a query.

    Raises ValueError when a source has fewer than n.
    """
    trivia = _questions("triviaqa", tokenizer, n, max_tokens, seed)
    own = [(prompt, _sampled(model, tokenizer, prompt, seed + i)) for i, (prompt, _) in enumerate(trivia)]
    pairs = {
        "triviaqa": trivia,
        "own_answers": own,
        "truthfulqa": _questions("truthfulqa", tokenizer, n, max_tokens, seed),
        "prose": _prose(tokenizer, n),
        "random": _random(tokenizer, n, seed),
    }
    flat = [(kind, prompt, answer) for kind, some in pairs.items() for prompt, answer in some]
    table = pd.DataFrame({"kind": [f[0] for f in flat], "text": [tokenizer.decode([*f[1], *f[2]]) for f in flat]})
    ids = [list(part) for part in zip(*[(f[1], f[2]) for f in flat], strict=True)]
    return Texts(prompts=ids[0], answers=ids[1], table=table, vocabulary=vocabulary(tokenizer))


def _questions(name: str, tokenizer: Any, n: int, max_tokens: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Questions with their first accepted answers, from the end of the draw, whose beginning the queries take."""
    content = load_questions(name)
    asked, _ = data.sample(content, len(content.questions), n_shots=0, seed=seed)
    found = []
    for question in reversed(asked[len(asked) // 2 :]):
        [prompt] = generation.encode_prompts(tokenizer, [content.prompt(question)])
        answer = generation.encode_answer(tokenizer, question.answers[0])
        if answer and len(prompt) + len(answer) <= max_tokens:
            found.append((prompt, answer))
        if len(found) == n:
            return found
    raise ValueError(f"n: {n} proxies of {name} wanted, only {len(found)} of at most {max_tokens} tokens found")


@torch.inference_mode()
def _sampled(model: Any, tokenizer: Any, prompt: list[int], seed: int) -> list[int]:
    """An answer drawn from the model at temperature 1, from one token to MAX_NEW_TOKENS."""
    generator = torch.Generator().manual_seed(seed)
    answer: list[int] = []
    ids, cache = torch.tensor([prompt]), None
    while len(answer) < MAX_NEW_TOKENS:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, p = out.past_key_values, out.logits[0, -1].float().softmax(-1)
        token = int(torch.multinomial(p, 1, generator=generator))
        if answer and (token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token])):
            break
        answer.append(token)
        ids = torch.tensor([[token]])
    return answer


def _prose(tokenizer: Any, n: int) -> list[tuple[list[int], list[int]]]:
    text = tomllib.loads((Path(__file__).parent / "prose.toml").read_text(encoding="utf-8"))["text"]
    ids = tokenizer(text.replace("\n\n", " ").strip(), add_special_tokens=False)["input_ids"]
    width = PROSE_PROMPT + PROSE_ANSWER
    pieces = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    if n > len(pieces):
        raise ValueError(f"n: {n} pieces of prose wanted, there are {len(pieces)}")
    return [(piece[:PROSE_PROMPT], piece[PROSE_PROMPT:]) for piece in pieces[:n]]


def _random(tokenizer: Any, n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    drawn = np.random.default_rng([seed, 3]).choice(ordinary, (n, PROSE_PROMPT + PROSE_ANSWER)).tolist()
    return [(row[:PROSE_PROMPT], row[PROSE_PROMPT:]) for row in drawn]


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """What everything below needs: proxies, queries, log p of the queries' answers in nats, and all inner products."""

    proxies: Texts
    queries: Texts
    log_prob: Array
    gram: Array
    products: Array
    squares: Array

    def rows(self, kind: str, n: int | None = None) -> NDArray[np.int64]:
        """The places of one kind's proxies ("all" for every one), the first n of them. Raises ValueError."""
        found = np.flatnonzero((self.proxies.table["kind"] == kind).to_numpy() | (kind == "all"))
        if not len(found) or (n is not None and not 1 <= n <= len(found)):
            raise ValueError(f"kind, n: {kind!r} and {n} given; there are {len(found)} proxies of this kind")
        return found[:n]

    def damping_unit(self, kind: str, n: int | None = None) -> float:
        """tr(F)/n = mean eigenvalue of F other than 0: λ is given in this unit."""
        rows = self.rows(kind, n)
        return float(np.trace(self.gram[np.ix_(rows, rows)]) / len(rows) ** 2)

    def isotropic(self) -> Array:
        """‖∇S‖² of every query: log U_E = 2S + its logarithm."""
        return self.squares

    def form(self, kind: str, *, damping: float, n: int | None = None) -> Array:
        """∇Sᵀ(λI + F)⁻¹∇S of every query with F from one kind of proxies; `damping` in the unit above."""
        rows = self.rows(kind, n)
        built = covariance.from_products(self.gram[np.ix_(rows, rows)], MATRIX.get(kind, "empirical_fisher"))
        damping = damping * self.damping_unit(kind, n)
        return built.quadratic_form(Products(self.squares, self.products[:, rows]), damping=damping)


def measure(
    model: Any, proxies: Texts, queries: Texts, *, checkpoint: Path | None = None, memory: float = 2e9, progress=False
) -> Study:
    """All inner products of the proxies' gradients with each other and with the queries'.

    With `checkpoint`, a file, a run that was killed goes on where it was. A digest of what the products depend on
    (model, texts, memory, code, versions) is added to the file's name: no run takes another's sums. The code of a model
    class of your own is not seen; after a change of it, remove the file.

    Raises ValueError when the two were encoded by different tokenizers, StoreError for a file that is in use, damaged
    or cannot be written.
    """
    if proxies.vocabulary != queries.vocabulary:
        raise ValueError(
            f"proxies: encoded with tokenizer {proxies.vocabulary}, the queries with {queries.vocabulary}; encode both "
            "with the model's own"
        )
    with (
        contextlib.nullcontext() if checkpoint is None else _store(checkpoint, model, proxies, queries, memory) as store
    ):
        found: Gram = scoring.gram(
            model, proxies.examples(), queries.examples(), memory=memory, progress=progress, checkpoint=store
        )
    log_prob, _ = scoring.log_probs(model, queries.examples())
    arrays = {"gram": found.rows, "products": found.between.T, "squares": found.squares, "log_prob": log_prob}
    return Study(proxies=proxies, queries=queries, **{name: value.numpy() for name, value in arrays.items()})


def _store(file: Path, model: Any, proxies: Texts, queries: Texts, memory: float) -> Store:
    """The store of one run's sums: of this model, of these texts in this order, of this code."""
    depends = {
        "weights": models.weights(model),
        "examples": identity.digest([[texts.prompts, texts.answers] for texts in (proxies, queries)]),
        "memory": memory,
        "code": identity.code(scoring.__name__),
        "versions": identity.versions("torch", "transformers"),
    }
    return Store(store_path(file.parent, file.stem, depends), depends)


def exactness(model: Any, study: Study, n: int, *, seed: int = 0) -> Array:
    """Relative errors (n, 2n) of a random sample of `study`'s inner products against autograd's own gradients.

    n proxies with one another and with n queries: a backward pass each, products summed in float64. Relative to the
    lengths of the two gradients, ‖x‖‖g‖: gradients of different texts are nearly orthogonal.
    """
    rng = np.random.default_rng(seed)
    rows, asked = (rng.choice(len(texts), n, replace=False) for texts in (study.proxies, study.queries))
    picked = [*((study.proxies, i) for i in rows), *((study.queries, i) for i in asked)]
    whole = [_gradient(model, texts.prompts[i], texts.answers[i]) for texts, i in picked]
    exact = np.array(
        [[sum(float(a.double() @ b.double()) for a, b in zip(x, g, strict=True)) for g in whole] for x in whole]
    )
    found = np.hstack([study.gram[np.ix_(rows, rows)], study.products[np.ix_(asked, rows)].T])
    lengths = np.sqrt(np.diag(exact))
    return (found - exact[:n]) / np.outer(lengths[:n], lengths)


def _gradient(model: Any, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """∇S as autograd gives it, a flat tensor for each parameter."""
    log_p = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    score = log_p[torch.arange(len(answer)), torch.tensor(answer)].sum()
    return [g.flatten() for g in torch.autograd.grad(score, list(model.parameters()))]


def sentence_vectors(texts: Sequence[str], *, batch_size: int = 32) -> Array:
    """all-MiniLM-L6-v2: mean over tokens, then unit length: (text, 384). Independent of the model under study."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(assets.path("all-minilm-l6-v2"))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts).double().numpy()


def bend(
    study: Study, near: Array, kind: str, *, damping: float, n_permutations: int = 499, seed: int = 0
) -> dict[str, Any]:
    """How F from one kind of proxies bends U_E against isotropy, and how much of it nearness to these proxies explains.

    near: (query, 2), see `distortion.nearness`. Permutations are within each set of questions; `overall` is over all.
    """
    bent = distortion(study.form(kind, damping=damping), study.isotropic())
    groups = study.queries.table["kind"].to_numpy()
    n = len(bent.field)
    within = structure(_centred(bent.field, groups), near, shuffles(n, n_permutations, seed=seed, groups=groups))
    overall = structure(bent.field, near, shuffles(n, n_permutations, seed=seed))
    return {
        "kind": kind,
        "field": bent.field,
        "spread": bent.spread,
        "within": within,
        "overall": overall,
    }


def spearman_within(a: Array, b: Array, groups: NDArray) -> float:
    """Spearman's ρ of a and b within groups: ranks are taken in each group and scaled to its size, then pooled."""
    table = pd.DataFrame({"a": a, "b": b}).groupby(np.asarray(groups)).rank(pct=True)
    return pearson(*(_centred(table[name].to_numpy(), groups) for name in table))


def _centred(field: Array, groups: NDArray) -> Array:
    means = pd.Series(field).groupby(groups).transform("mean")
    return field - means.to_numpy()


def overlaps(study: Study, k: int) -> pd.DataFrame:
    """‖UₖᵀVₖ‖²/k between the leading k directions of every two kinds of proxies: 1 for the same, k/P by chance."""
    rows = {kind: study.rows(kind) for kind in PROXIES}

    def between(first: NDArray, second: NDArray) -> float:
        block = study.gram[np.ix_(first, second)]
        return overlap(study.gram[np.ix_(first, first)], study.gram[np.ix_(second, second)], block, k)

    values = [[between(first, second) for second in rows.values()] for first in rows.values()]
    return pd.DataFrame(values, index=list(rows), columns=list(rows))


def nearness_to(study: Study, query_vectors: Array, proxy_vectors: Array, kind: str) -> Array:
    """`distortion.nearness` of every query to one kind's proxies, by sentence vectors."""
    return nearness(query_vectors, proxy_vectors[study.rows(kind)])
