"""The study on a language model: forms equal those of whole gradients; texts are what their names say."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from architectures import build

from isouq.studies.isotropy import language
from isouq.studies.isotropy.language import Study
from isouq.studies.qa.sentences import SentenceEncoder

KINDS = list(language.PROXIES)


def texts(kinds):
    return pd.DataFrame([{"kind": kind, "prompt_ids": [1, 2], "answer_ids": [3]} for kind in kinds])


@pytest.fixture
def rows():
    """(proxy gradients, query gradients), six of each kind and twenty queries of two sets."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 50)) * np.geomspace(1, 4, 50), rng.normal(size=(20, 50))


@pytest.fixture
def study(rows):
    X, Y = rows
    return Study(
        proxies=texts(np.repeat(KINDS, 6)),
        queries=texts(["wikidata"] * 10 + ["truthfulqa_choose"] * 10),
        log_prob=np.zeros(20),
        gram=X @ X.T,
        products=Y @ X.T,
        squares=np.square(Y).sum(1),
    )


@pytest.mark.parametrize("kind", ["prose", "all"])
def test_forms_equal_the_inverse_of_the_whole_matrix(study, rows, kind):
    X, Y = rows
    of_kind = X[study.rows(kind)]
    assert len(of_kind) == (30 if kind == "all" else 6)
    F = of_kind.T @ of_kind / len(of_kind)
    unit = np.linalg.eigvalsh(F)[-len(of_kind) :].mean()
    expected = np.einsum("qp,pr,qr->q", Y, np.linalg.inv(0.3 * unit * np.eye(50) + F), Y)
    np.testing.assert_allclose(study.form(kind, damping=0.3), expected, rtol=1e-9)


def test_bend_finds_a_planted_pull_towards_the_proxies(study, rows):
    """Queries that point along the proxies' gradients lose variance; nearness that says so is found, noise is not."""
    X, Y = rows
    share = np.tile(np.linspace(0, 1, 10), 2)
    toward = X[:6].sum(0)
    Y = (1 - share)[:, None] * Y + 3 * share[:, None] * toward
    pulled = replace(study, products=Y @ X.T, squares=np.square(Y).sum(1))
    near = np.stack([share, share**2], 1)
    within = language.bend(pulled, near, "triviaqa", damping=0.01)["within"]
    assert within.explained > 0.8
    assert within.p_value <= 0.01
    noise = np.random.default_rng(1).normal(size=(20, 2))
    assert language.bend(pulled, noise, "triviaqa", damping=0.01)["within"].p_value > 0.01


def test_what_differs_between_sets_only_is_not_structure_within_them(study):
    split = np.repeat([0.0, 1.0], 10)
    bent = replace(study, products=study.products * (1 + 0.5 * split)[:, None])
    near = np.stack([split, np.random.default_rng(0).normal(size=20)], 1)
    assert language.bend(bent, near, "random", damping=1e-3)["within"].p_value > 0.02


def test_correlation_within_groups_does_not_see_what_differs_between_them():
    x = np.tile(np.arange(10.0), 2)
    groups = np.repeat(["a", "b"], 10)
    apart = np.where(groups == "a", 100.0, 0.0)
    assert language.spearman_within(x, np.exp(-x) + apart, groups) == pytest.approx(-1)
    assert language.spearman_within(x + apart, x - 3 * apart, groups) == pytest.approx(1)
    mixed = np.where(groups == "a", x, -x)
    assert language.spearman_within(x, mixed, groups) == pytest.approx(0, abs=1e-12)


def test_an_unknown_kind_is_refused(study):
    with pytest.raises(ValueError, match="'poetry' given, of which there are no proxies"):
        study.rows("poetry")


def test_exactness_sees_products_that_are_wrong():
    model = build("llama", tied=True).float()
    asked, given = (texts(kinds) for kinds in (KINDS, ["wikidata"] * 2))
    exact = language.measure(model, asked, given)
    assert np.abs(language.exactness(model, exact, 2)).max() <= 1e-4
    spoilt = replace(exact, products=exact.products * 1.01)
    assert np.abs(language.exactness(model, spoilt, 2)).max() > 9e-3


@pytest.mark.assets
def test_on_the_real_model(tmp_path):
    from isouq.language import scoring
    from isouq.studies import assets

    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    asked = language.queries(model, tokenizer, 4, seed=1)
    texts = language.proxies(model, tokenizer, 2, seed=1)
    assert texts["kind"].tolist() == [kind for kind in KINDS for _ in range(2)]
    assert asked["kind"].value_counts().to_dict() == dict.fromkeys(language.QUERY_SETS, 2)
    prompts = texts["prompt_ids"].tolist()
    assert prompts[:2] == prompts[2:4]  # the same questions, gold answers and the model's own
    questions = " ".join(asked["question"])
    assert not any(tokenizer.decode(prompt).strip() in questions for prompt in prompts)
    assert max(len(example) for part in (texts, asked) for example in language.examples(part)) <= 64
    study = language.measure(model, texts, asked, checkpoint=tmp_path / "gram.sqlite")
    scores = scoring.score(model, language.examples(asked), scoring.Scoring())["sequence"]
    np.testing.assert_allclose(np.log(study.squares), scores.log_gradient, atol=1e-4)
    np.testing.assert_allclose(study.log_prob, scores.log_prob, rtol=1e-5)
    assert (study.form("all", damping=0.1) > 0).all()
    errors = language.exactness(model, study, 2, seed=1)
    assert errors.shape == (2, 4)
    assert np.abs(errors).max() <= 1e-4
    with pytest.raises(ValueError, match="n: 1000 pieces of prose"):
        language._prose(tokenizer, 1000)


@pytest.mark.assets
def test_sentences_of_one_meaning_have_like_vectors():
    vectors = SentenceEncoder()(["A cat sat.", "A cat was sitting.", "Interest rates rose."], batch_size=2)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(vectors.norm(dim=1), 1, rtol=1e-6)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]
