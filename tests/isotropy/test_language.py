"""The study on a language model: forms equal those of whole gradients, and products those of autograd."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from architectures import build
from isouq.studies.isotropy import language, texts
from isouq.studies.isotropy.language import Study
from isouq.studies.qa.sentences import SentenceEncoder

KINDS = list(texts.PROXIES)


def table_of(kinds):
    return pd.DataFrame([{"kind": kind, "prompt_ids": [1, 2], "answer_ids": [3]} for kind in kinds])


@pytest.fixture
def rows():
    """(proxy gradients, query gradients), five of each kind and twenty queries."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 50)) * np.geomspace(1, 4, 50), rng.normal(size=(20, 50))


@pytest.fixture
def study(rows):
    X, Y = rows
    return Study(
        proxies=table_of(np.repeat(KINDS, 5)),
        queries=table_of(["query"] * 20),
        log_prob=np.zeros(20),
        gram=X @ X.T,
        products=Y @ X.T,
        squares=np.square(Y).sum(1),
        n_parameters=50,
    )


@pytest.mark.parametrize("kind", ["prose", "all"])
def test_forms_equal_the_inverse_of_the_whole_matrix(study, rows, kind):
    X, Y = rows
    of_kind = X[study.rows(kind)]
    assert len(of_kind) == (30 if kind == "all" else 5)
    F = of_kind.T @ of_kind / len(of_kind)
    unit = np.linalg.eigvalsh(F)[-len(of_kind) :].mean()
    expected = np.einsum("qp,pr,qr->q", Y, np.linalg.inv(0.3 * unit * np.eye(50) + F), Y)
    np.testing.assert_allclose(study.form(kind, damping=0.3), expected, rtol=1e-9)


def test_an_unknown_kind_is_refused(study):
    with pytest.raises(ValueError, match=r"'poetry' given, of which there are no proxies; one of paraphrase, relation"):
        study.rows("poetry")


def test_exactness_sees_products_that_are_wrong(tmp_path):
    model = build("llama", tied=True).float()
    exact = language.measure(model, table_of(KINDS), table_of(["query"] * 2), checkpoint=tmp_path / "gram.sqlite")
    assert exact.n_parameters == sum(p.numel() for p in model.parameters())
    assert np.abs(language.exactness(model, exact, 2)).max() <= 1e-4
    spoilt = replace(exact, products=exact.products * 1.01)
    assert np.abs(language.exactness(model, spoilt, 2)).max() > 9e-3


@pytest.mark.assets
def test_on_the_real_model(tmp_path):
    from isouq.language import scoring
    from isouq.studies import assets

    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    asked = texts.queries(model, tokenizer, 6, n_paraphrased=3, seed=901)
    given = texts.proxies(model, tokenizer, asked, seed=901)
    assert given["kind"].tolist() == [kind for kind in KINDS for _ in range(3)]
    by_kind = {kind: part.reset_index() for kind, part in given.groupby("kind")}
    paraphrased = asked[asked["paraphrased"]]
    assert by_kind["paraphrase"]["answer_ids"].tolist() == paraphrased["answer_ids"].tolist()
    assert [tokenizer.decode(ids) for ids in by_kind["paraphrase"]["prompt_ids"]] == [
        texts.second_wording(statement) for statement in paraphrased["question"]
    ]
    entities = {texts.parse(statement)[1] for statement in asked["question"]}
    for kind in ("relation", "other_relations"):
        assert not any(entity in text for entity in entities for text in by_kind[kind]["text"])
    assert max(len(example) for part in (given, asked) for example in language.examples(part)) <= texts.MAX_TOKENS
    study = language.measure(model, given, asked, checkpoint=tmp_path / "gram.sqlite")
    scores = scoring.score(model, language.examples(asked), scoring.Scoring())["sequence"]
    np.testing.assert_allclose(np.log(study.squares), scores.log_gradient, atol=1e-4)
    np.testing.assert_allclose(study.log_prob, scores.log_prob, rtol=1e-5)
    assert (study.form("all", damping=0.1) > 0).all()
    errors = language.exactness(model, study, 2, seed=1)
    assert errors.shape == (2, 4)
    assert np.abs(errors).max() <= 1e-4


@pytest.mark.assets
def test_sentences_of_one_meaning_have_like_vectors():
    vectors = SentenceEncoder()(["A cat sat.", "A cat was sitting.", "Interest rates rose."], batch_size=2)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(vectors.norm(dim=1), 1, rtol=1e-6)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]
