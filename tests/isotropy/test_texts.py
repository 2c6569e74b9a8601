"""The texts of the language model's study: second wordings, the random split, and relations kept apart."""

import numpy as np
import pandas as pd
import pytest

from isouq.studies.isotropy import texts
from isouq.studies.qa.data import DataSet, Question

COMMON = set("the of is a by in to for with or".split())


def pool(*statements):
    return [Question(statement, statement, ("x",)) for statement in statements]


def test_a_statement_belongs_to_the_longest_wording_that_it_fits():
    assert texts.parse("The country of citizenship of Ada is") == ("The country of citizenship of {} is", "Ada")
    assert texts.parse("The country of Isle of Man is") == ("The country of {} is", "Isle of Man")
    assert texts.parse("Bonn is located in or next to body of water")[1] == "Bonn"
    with pytest.raises(ValueError, match="statement: 'The hat of Ada was' given, one that fits a wording in relations"):
        texts.parse("The hat of Ada was")


def test_a_second_wording_keeps_the_entity_and_is_another():
    for relation, wording in texts._wordings().items():
        statement = relation.replace("{}", "Xyz Q")
        second = texts.second_wording(statement)
        assert second.count("Xyz Q") == wording.count("{}") == 1, relation
        first, then = ({*text.replace("Xyz Q", "").lower().split()} - COMMON for text in (statement, second))
        assert first, relation
        assert not first & then, "no word that means something occurs in both"
        assert second not in texts._wordings()


def test_the_split_is_by_seed_alone_and_of_the_size_asked_for():
    first = texts.draw_paraphrased(60, 20, 900)
    assert first.sum() == 20
    assert (first == texts.draw_paraphrased(60, 20, 900)).all()
    assert (first != texts.draw_paraphrased(60, 20, 901)).any()
    share = np.mean([texts.draw_paraphrased(10, 5, seed) for seed in range(400)], axis=0)
    assert np.abs(share - 0.5).max() < 0.13, "every place is drawn as often, within 5 standard errors"


@pytest.mark.parametrize(
    ("n_queries", "n", "said"),
    [(10, 6, "at most half of the 10 queries"), (10, 2, "n: 2 given"), (0, 3, "n_queries: 0")],
)
def test_a_split_without_two_sides_is_refused(n_queries, n, said):
    with pytest.raises(ValueError, match=said):
        texts.draw_paraphrased(n_queries, n, 900)


def test_same_relations_are_matched_in_rounds_and_never_used_twice():
    asked = ["The capital of A is", "B is located in"]
    rest = pool("The capital of C is", "D follows", "E is located in", "The capital of F is", "The capital of G is")
    given = [question.question for question in texts.same_relations(asked, rest)]
    assert given == ["The capital of C is", "E is located in", "The capital of F is"]


def test_other_relations_share_none_with_the_queries():
    rest = pool("The capital of C is", "D follows", "E is located in")
    assert [q.question for q in texts.other_relations(["The capital of A is"], rest)] == [
        "D follows",
        "E is located in",
    ]


@pytest.mark.assets
def test_every_statement_of_the_set_has_a_second_wording_and_every_wording_a_statement():
    content, asked, shots = texts._statements(900)
    relations = {texts.parse(question.question)[0] for question in (*asked, *shots)}
    assert relations == set(texts._wordings())
    assert (
        len(asked) + len(shots) == len(content.questions) == len({question.question for question in content.questions})
    )


def test_a_source_with_too_few_texts_is_refused(monkeypatch):
    """Three texts of each kind are wanted; of TriviaQA's three questions one is too long."""
    questions = pool("Who?", "Where?", "What " + "w" * texts.MAX_TOKENS)
    small = DataSet("triviaqa", tuple(questions), "Q: {question}\nA:{answer}\n")
    monkeypatch.setattr(texts.qa_study, "load_questions", lambda name: small)
    monkeypatch.setattr(texts.generation, "encode_prompts", lambda tokenizer, prompts: [list(map(ord, prompts[0]))])
    monkeypatch.setattr(texts.generation, "encode_answer", lambda tokenizer, answer: [1])
    monkeypatch.setattr(texts, "_statements", lambda seed: (None, [], []))
    for name in ("_answered", "_reworded", "_prose", "_random"):
        monkeypatch.setattr(texts, name, lambda *args, **options: [([1], [2])] * 3)
    queries = pd.DataFrame({"question": ["The country of Ada is"] * 3, "paraphrased": True})
    with pytest.raises(ValueError, match="n: 3 texts of kind triviaqa wanted, there are 2 of at most 64 tokens"):
        texts.proxies(None, queries, queries)
