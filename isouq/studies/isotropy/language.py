"""A real language model with all its parameters: how an exact empirical Fisher of proxies changes its answers' U_E.

Proxies give the rows of F; queries are the answers that are scored. Only inner products of gradients are formed
(`covariance.from_products`), so F is exact for a model of any size.
"""

from __future__ import annotations

import contextlib
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from isouq import models
from isouq.language import scoring
from isouq.language.examples import Example, from_pairs
from isouq.studies import identity
from isouq.studies.evaluation import pearson
from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.covariance import Products
from isouq.studies.isotropy.distortion import distortion, shuffles, structure
from isouq.studies.qa import answers, data, generation
from isouq.studies.qa import study as qa_study
from isouq.studies.qa.subject import Subject
from isouq.studies.store import Store, store_path

Array = NDArray[np.float64]
VERSION = 1  # of the stored sums: raised by hand where an inner product changes, which tests hold to autograd's own

# Where the rows of F come from. None of these is the model's training data as such. Gold labels make an empirical
# Fisher, labels drawn from the model ("own_answers") a Monte Carlo Fisher: two matrices, two names.
PROXIES = {
    "triviaqa": "TriviaQA, gold answers",
    "own_answers": "TriviaQA, the model's own samples",
    "truthfulqa": "TruthfulQA, best answers",
    "prose": "ordinary prose",
    "random": "random tokens",
}
QUERY_SETS = ("wikidata", "truthfulqa_choose")
N_SHOTS = 3  # of the Wikidata prompts
PROSE_PROMPT, PROSE_ANSWER = 16, 8  # tokens
MAX_NEW_TOKENS = 8
MAX_TOKENS = 64  # of a query or a question among the proxies
BATCH = 16  # prompts a batch of generation


def examples(texts: pd.DataFrame) -> list[Example]:
    """The texts of a table, by its columns prompt_ids and answer_ids, as what is scored."""
    return from_pairs(zip(texts["prompt_ids"], texts["answer_ids"], strict=True))


def _load_questions(name: str) -> data.DataSet:
    """TruthfulQA comes without its official prefix, which is too long."""
    return replace(qa_study.load_questions(name), prefix="")


def queries(model: Any, tokenizer: Any, n: int, *, seed: int = 0) -> pd.DataFrame:
    """n answers of the model, half from each of QUERY_SETS: kind, text, question, wrong, prompt_ids, answer_ids.

    Wikidata: the greedy completion after N_SHOTS examples, right by exact match. TruthfulQA: the reference answer that
    the model finds likeliest, right if it is a true one. Empty answers and texts over MAX_TOKENS are left out.
    """
    return pd.DataFrame([row for name in QUERY_SETS for row in _answered(model, tokenizer, name, n // 2, seed)])


def _answered(model: Any, tokenizer: Any, name: str, n: int, seed: int) -> list[dict[str, Any]]:
    choose = name.endswith("_choose")
    questions = _load_questions(name.removesuffix("_choose"))
    n_drawn = min(3 * n, len(questions.questions) // 2)  # the second half of TruthfulQA is left for proxies
    asked, shots = data.sample(questions, n_drawn, n_shots=0 if choose else N_SHOTS, seed=seed)
    prompts = generation.encode_prompts(tokenizer, [questions.prompt(question, shots) for question in asked])
    subject = Subject(model, tokenizer, questions, asked, prompts, choose=choose)
    rows: list[dict[str, Any]] = []
    for start in range(0, n_drawn, BATCH):
        places = range(start, min(start + BATCH, n_drawn))
        for place, answer in zip(places, answers.answer(subject, places, MAX_NEW_TOKENS), strict=True):
            ids, text, question = list(answer["token_ids"]), answer["text"], asked[place].question
            if text and len(prompts[place]) + len(ids) <= MAX_TOKENS:
                row = {"kind": name, "text": f"{question} {text}", "question": question, "prompt_ids": prompts[place]}
                rows.append({**row, "answer_ids": ids, "wrong": not answers.verdict(subject, place, answer)["right"]})
        if len(rows) >= n:
            return rows[:n]
    raise ValueError(f"n: {n} answers of {name} wanted, only {len(rows)} of at most {MAX_TOKENS} tokens found")


def proxies(model: Any, tokenizer: Any, n: int, *, seed: int = 0) -> pd.DataFrame:
    """n texts from each of PROXIES: kind, text, prompt_ids, answer_ids; none of their questions is ever a query.

    Raises ValueError when a source has fewer than n.
    """
    trivia = _questions("triviaqa", tokenizer, n, seed)
    pairs = {
        "triviaqa": trivia,
        "own_answers": [(ids, _sampled(model, tokenizer, ids, seed + i)) for i, (ids, _) in enumerate(trivia)],
        "truthfulqa": _questions("truthfulqa", tokenizer, n, seed),
        "prose": _prose(tokenizer, n),
        "random": _random(tokenizer, n, seed),
    }
    rows = [(kind, tokenizer.decode([*p, *a]), p, a) for kind, of_kind in pairs.items() for p, a in of_kind]
    return pd.DataFrame(rows, columns=["kind", "text", "prompt_ids", "answer_ids"])


def _questions(name: str, tokenizer: Any, n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return questions with their first accepted answers, from the end of the draw; queries come from its beginning."""
    content = _load_questions(name)
    asked, _ = data.sample(content, len(content.questions), n_shots=0, seed=seed)
    pairs: list[tuple[list[int], list[int]]] = []
    for question in reversed(asked[len(asked) // 2 :]):
        [prompt] = generation.encode_prompts(tokenizer, [content.prompt(question)])
        answer = generation.encode_answer(tokenizer, question.answers[0])
        if answer and len(prompt) + len(answer) <= MAX_TOKENS:
            pairs.append((prompt, answer))
        if len(pairs) == n:
            return pairs
    raise ValueError(f"n: {n} proxies of {name} wanted, only {len(pairs)} of at most {MAX_TOKENS} tokens found")


@torch.inference_mode()
def _sampled(model: Any, tokenizer: Any, prompt: list[int], seed: int) -> list[int]:
    """Draw an answer of one to MAX_NEW_TOKENS tokens from the model at temperature 1."""
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
    """Proxies, queries, log p of the queries' answers in nats, and all inner products of their gradients.

    gram (proxy, proxy), products (query, proxy) and squares (query,): of ∇S with ∇S, over all parameters.
    """

    proxies: pd.DataFrame
    queries: pd.DataFrame
    log_prob: Array
    gram: Array
    products: Array
    squares: Array

    def rows(self, kind: str) -> NDArray[np.int64]:
        """The places of one kind's proxies ("all" for every one). Raises ValueError for an unknown kind."""
        places = np.flatnonzero((self.proxies["kind"] == kind).to_numpy() | (kind == "all"))
        if not len(places):
            raise ValueError(f"kind: {kind!r} given, of which there are no proxies; one of {', '.join(PROXIES)} wanted")
        return places

    def form(self, kind: str, *, damping: float) -> Array:
        """∇Sᵀ(λI + F)⁻¹∇S of every query, with F from one kind of proxies.

        `damping` is λ in units of tr(F)/n, the mean of F's eigenvalues other than 0.
        """
        rows = self.rows(kind)
        gram = self.gram[np.ix_(rows, rows)]
        unit = float(np.trace(gram) / len(rows) ** 2)
        products = Products(self.squares, self.products[:, rows])
        return covariance.from_products(gram).quadratic_form(products, damping=damping * unit)


def measure(
    model: Any,
    proxies: pd.DataFrame,
    queries: pd.DataFrame,
    *,
    checkpoint: Path | None = None,
    memory: float = 2e9,
) -> Study:
    """Compute all inner products of the proxies' gradients with each other and with the queries'.

    With `checkpoint`, a file, an interrupted run resumes where it stopped. A digest of what the products depend on
    (model, texts, memory, code, versions) is added to the file's name, so no run takes another's sums. The digest does
    not cover the code of a model class of your own: remove the file after a change of it.

    Raises StoreError for a file that is in use, damaged or cannot be written.
    """
    rows, asked = examples(proxies), examples(queries)
    opened = contextlib.nullcontext() if checkpoint is None else _store(checkpoint, model, (proxies, queries), memory)
    with opened as store:
        gram = scoring.gram(model, rows, asked, memory=memory, checkpoint=store)
    log_prob, _ = scoring.log_probs(model, asked)
    arrays = {"gram": gram.rows, "products": gram.between.T, "squares": gram.squares, "log_prob": log_prob}
    return Study(proxies=proxies, queries=queries, **{name: value.numpy() for name, value in arrays.items()})


def _store(file: Path, model: Any, texts: tuple[pd.DataFrame, pd.DataFrame], memory: float) -> Store:
    """Return the store of one run's sums, named by the model, the texts in their order, and the code."""
    depends = {
        "weights": models.weights(model),
        "examples": identity.digest([[part["prompt_ids"].tolist(), part["answer_ids"].tolist()] for part in texts]),
        "memory": memory,
        "code": VERSION,
        "versions": identity.versions("torch", "transformers"),
    }
    return Store(store_path(file.parent, file.stem, depends), depends)


def exactness(model: Any, study: Study, n: int, *, seed: int = 0) -> Array:
    """Return relative errors (n, 2n) of some of `study`'s inner products against autograd's own gradients.

    Compares n random proxies with one another and with n random queries, by a backward pass each and sums in float64.
    Errors are relative to ‖x‖‖g‖, since gradients of different texts are nearly orthogonal.
    """
    rng = np.random.default_rng(seed)
    rows, asked = (rng.choice(len(texts), n, replace=False) for texts in (study.proxies, study.queries))
    picked = examples(study.proxies.iloc[rows]), examples(study.queries.iloc[asked])
    exact = scoring.gram(model, *picked, engine="autograd")
    fast = np.hstack([study.gram[np.ix_(rows, rows)], study.products[np.ix_(asked, rows)].T])
    of_rows, of_queries = exact.rows.diag().sqrt().numpy(), exact.squares.sqrt().numpy()
    lengths = np.outer(of_rows, np.concatenate([of_rows, of_queries]))
    return (fast - np.hstack([exact.rows.numpy(), exact.between.numpy()])) / lengths


def bend(
    study: Study, near: Array, kind: str, *, damping: float, n_permutations: int = 499, seed: int = 0
) -> dict[str, Any]:
    """Compare U_E under F from one kind of proxies with isotropy, and ask how much nearness to the proxies explains.

    near: (query, 2), see `distortion.nearness`. Returns the distortion `field`, its structure `within` each set of
    questions (where the permutations stay too), and its structure `overall`.
    """
    field = distortion(study.form(kind, damping=damping), study.squares)
    groups, n = study.queries["kind"].to_numpy(), len(field)
    within = structure(_centred(field, groups), near, shuffles(n, n_permutations, seed=seed, groups=groups))
    overall = structure(field, near, shuffles(n, n_permutations, seed=seed))
    return {"kind": kind, "field": field, "within": within, "overall": overall}


def spearman_within(a: Array, b: Array, groups: NDArray) -> float:
    """Return Spearman's ρ of a and b within groups: ranks in each group, scaled to its size, are pooled."""
    table = pd.DataFrame({"a": a, "b": b}).groupby(np.asarray(groups)).rank(pct=True)
    return pearson(*(_centred(table[name].to_numpy(), groups) for name in table))


def _centred(field: Array, groups: NDArray) -> Array:
    means = pd.Series(field).groupby(groups).transform("mean")
    return field - means.to_numpy()
