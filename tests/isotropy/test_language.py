"""The study on a language model: forms equal those of whole gradients; texts are what their names say."""

import numpy as np
import pandas as pd
import pytest

from isouq.studies.isotropy import language
from isouq.studies.isotropy.language import Study, Texts

KINDS = list(language.PROXIES)


def texts(kinds, vocabulary="v"):
    n = len(kinds)
    return Texts(prompts=[[1, 2]] * n, answers=[[3]] * n, table=pd.DataFrame({"kind": kinds}), vocabulary=vocabulary)


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


@pytest.mark.parametrize(("kind", "n"), [("prose", None), ("prose", 4), ("all", None)])
def test_forms_equal_the_inverse_of_the_whole_matrix(study, rows, kind, n):
    X, Y = rows
    some = X[study.rows(kind, n)]
    assert len(some) == (n or (30 if kind == "all" else 6))
    F = some.T @ some / len(some)
    unit = np.linalg.eigvalsh(F)[-len(some) :].mean()
    assert study.damping_unit(kind, n) == pytest.approx(unit)
    expected = np.einsum("qp,pr,qr->q", Y, np.linalg.inv(0.3 * unit * np.eye(50) + F), Y)
    np.testing.assert_allclose(study.form(kind, damping=0.3, n=n), expected, rtol=1e-9)


def test_bend_finds_a_planted_pull_towards_the_proxies(study, rows):
    """Queries that point along the proxies' gradients lose variance; nearness that says so is found, noise is not."""
    X, Y = rows
    share = np.tile(np.linspace(0, 1, 10), 2)
    toward = X[:6].sum(0)
    Y = (1 - share)[:, None] * Y + 3 * share[:, None] * toward
    pulled = Study(**{**vars(study), "products": Y @ X.T, "squares": np.square(Y).sum(1)})
    near = np.stack([share, share**2], 1)
    found = language.bend(pulled, near, "triviaqa", damping=0.01)
    assert found["within"].explained > 0.8
    assert found["within"].p_value <= 0.01
    noise = np.random.default_rng(1).normal(size=(20, 2))
    assert language.bend(pulled, noise, "triviaqa", damping=0.01)["within"].p_value > 0.01


def test_what_differs_between_sets_only_is_not_structure_within_them(study):
    split = np.repeat([0.0, 1.0], 10)
    squares = study.squares.copy()
    bent = Study(**{**vars(study), "products": study.products * (1 + 0.5 * split)[:, None], "squares": squares})
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


def test_overlaps_are_one_on_the_diagonal_and_symmetric(study):
    table = language.overlaps(study, 3)
    np.testing.assert_allclose(np.diag(table), 1)
    np.testing.assert_allclose(table, table.T)
    assert ((table >= 0) & (table <= 1 + 1e-9)).all().all()


def test_proxies_of_another_tokenizer_are_refused(study):
    with pytest.raises(ValueError, match=r"tokenizer other, the queries with v"):
        language.measure(None, texts(KINDS, "other"), texts(KINDS))


def test_an_unknown_kind_or_too_many_are_refused(study):
    with pytest.raises(ValueError, match="'poetry' and None given; there are 0"):
        study.rows("poetry")
    with pytest.raises(ValueError, match="'prose' and 7 given; there are 6"):
        study.rows("prose", 7)


@pytest.mark.assets
def test_on_the_real_model(tmp_path):
    from isouq.language import scoring
    from isouq.studies import assets

    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    asked = language.queries(model, tokenizer, 4, seed=1)
    made = language.proxies(model, tokenizer, 2, seed=1)
    assert made.table["kind"].tolist() == [kind for kind in KINDS for _ in range(2)]
    assert asked.table["kind"].value_counts().to_dict() == dict.fromkeys(language.QUERY_SETS, 2)
    assert made.prompts[:2] == made.prompts[2:4]  # the same questions, gold answers and the model's own
    questions = " ".join(asked.table["question"])
    assert not any(tokenizer.decode(prompt).strip() in questions for prompt in made.prompts)
    longest = max(len(p) + len(a) for some in (made, asked) for p, a in zip(some.prompts, some.answers, strict=True))
    assert longest <= 64
    study = language.measure(model, made, asked, checkpoint=tmp_path / "gram.sqlite")
    scores = scoring.score(model, asked.examples(), scoring.Scoring())["sequence"]
    np.testing.assert_allclose(np.log(study.squares), scores.log_gradient, atol=1e-4)
    np.testing.assert_allclose(study.log_prob, scores.log_prob, rtol=1e-5)
    assert (study.form("all", damping=0.1) > 0).all()
    errors = language.exactness(model, study, 2, seed=1)
    assert errors.shape == (2, 4)
    assert np.abs(errors).max() <= 1e-4
    spoilt = Study(**{**vars(study), "products": study.products * 1.01, "gram": study.gram * 1.01})
    assert np.abs(language.exactness(model, spoilt, 2, seed=1)).max() > 9e-3
    vectors = language.sentence_vectors(["A cat sat.", "A cat was sitting.", "Interest rates rose."])
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]
    with pytest.raises(ValueError, match="n: 1000 pieces of prose"):
        language._prose(tokenizer, 1000)
