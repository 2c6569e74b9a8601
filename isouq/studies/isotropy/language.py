"""A real language model with all its parameters: how an exact empirical Fisher of proxies changes its answers' U_E.

Proxies give the rows of F; queries are the answers that are scored. Only inner products of gradients are formed
(`covariance.from_products`), so F is exact for a model of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isouq import models
from isouq.language import scoring
from isouq.language.examples import Example, from_pairs
from isouq.studies import assets, identity
from isouq.studies.isotropy import covariance, texts
from isouq.studies.isotropy.covariance import Products
from isouq.studies.results import key_of
from isouq.studies.store import Store, store_path

Array = NDArray[np.float64]
VERSION = 1  # of the stored sums: raised by hand where an inner product changes, which tests hold to autograd's own


def examples(table: pd.DataFrame) -> list[Example]:
    """The texts of a table, by its columns prompt_ids and answer_ids, as what is scored."""
    return from_pairs(zip(table["prompt_ids"], table["answer_ids"], strict=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """Proxies, queries, log p of the queries' answers in nats, and all inner products of their gradients.

    gram (proxy, proxy), products (query, proxy) and squares (query,): of ∇S with ∇S, over all n_parameters. errors:
    those of `exactness`, where they were asked for.
    """

    proxies: pd.DataFrame
    queries: pd.DataFrame
    log_prob: Array
    gram: Array
    products: Array
    squares: Array
    n_parameters: int
    errors: Array | None = None

    def rows(self, kind: str) -> NDArray[np.int64]:
        """The places of one kind's proxies ("all" for every one). Raises ValueError for an unknown kind."""
        places = np.flatnonzero((self.proxies["kind"] == kind).to_numpy() | (kind == "all"))
        if not len(places):
            known = ", ".join(self.proxies["kind"].unique())
            raise ValueError(f"kind: {kind!r} given, of which there are no proxies; one of {known} wanted")
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


def run(name: str, n_queries: int, n_proxies: int, *, seed: int, folder: Path, memory: float, n_checked: int) -> Study:
    """Load a model by its name, make its texts, `n_proxies` of each kind, and measure; `exactness` checks `n_checked`.

    An interrupted run resumes from its file in `folder`. Raises what `texts.queries` and `measure` raise.
    """
    model, tokenizer = assets.load_causal_lm(name)
    queries = texts.queries(model, tokenizer, n_queries, n_paraphrased=n_proxies, seed=seed)
    proxies = texts.proxies(model, tokenizer, queries, seed=seed)
    study = measure(model, proxies, queries, checkpoint=folder / f"{key_of(name)}.sqlite", memory=memory)
    return replace(study, errors=np.abs(exactness(model, study, n_checked, seed=seed)))


def measure(
    model: Any, proxies: pd.DataFrame, queries: pd.DataFrame, *, checkpoint: Path, memory: float = 2e9
) -> Study:
    """Compute all inner products of the proxies' gradients with each other and with the queries'.

    An interrupted run resumes where it stopped, from the file `checkpoint`. A digest of what the products depend on
    (model, texts, memory, code, versions) is added to the file's name, so no run takes another's sums. The digest does
    not cover the code of a model class of your own: remove the file after a change of it.

    Raises StoreError for a file that is in use, damaged or cannot be written.
    """
    rows, asked = examples(proxies), examples(queries)
    with _store(checkpoint, model, (proxies, queries), memory) as store:
        gram = scoring.gram(model, rows, asked, memory=memory, checkpoint=store)
    log_prob, _ = scoring.log_probs(model, asked)
    n_parameters = sum(p.numel() for p in model.parameters())
    arrays = {"gram": gram.rows, "products": gram.between.T, "squares": gram.squares, "log_prob": log_prob}
    found = {name: value.numpy() for name, value in arrays.items()}
    return Study(proxies=proxies, queries=queries, n_parameters=n_parameters, **found)


def _store(file: Path, model: Any, tables: tuple[pd.DataFrame, pd.DataFrame], memory: float) -> Store:
    """Return the store of one run's sums, named by the model, the texts in their order, and the code."""
    depends = {
        "weights": models.weights(model),
        "examples": identity.digest([[part["prompt_ids"].tolist(), part["answer_ids"].tolist()] for part in tables]),
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
    rows, asked = (rng.choice(len(table), n, replace=False) for table in (study.proxies, study.queries))
    picked = examples(study.proxies.iloc[rows]), examples(study.queries.iloc[asked])
    exact = scoring.gram(model, *picked, engine="autograd")
    fast = np.hstack([study.gram[np.ix_(rows, rows)], study.products[np.ix_(asked, rows)].T])
    of_rows, of_queries = exact.rows.diag().sqrt().numpy(), exact.squares.sqrt().numpy()
    lengths = np.outer(of_rows, np.concatenate([of_rows, of_queries]))
    return (fast - np.hstack([exact.rows.numpy(), exact.between.numpy()])) / lengths
