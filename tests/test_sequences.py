"""What is refused before any forward pass, how padding is removed, and which examples share a batch."""

import numpy as np
import pytest
import torch

import isouq
from architectures import VOCAB, build
from isouq.language.examples import TOKENS_PER_BATCH, Batch, Example, batches, from_pairs, from_rectangle
from isouq.language.forward import check_examples

IDS = torch.tensor([[0, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
ANSWER = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]).bool()
PRESENT = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return build("llama", tied=True)


def lists(examples):
    return [(x.ids.tolist(), x.answer.int().tolist()) for x in examples]


def test_padding_is_removed_on_either_side():
    assert lists(from_rectangle(IDS, ANSWER, PRESENT)) == [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 1])]


def test_without_an_attention_mask_every_position_counts():
    assert lists(from_rectangle(IDS, ANSWER, None))[0][0] == [0, 5, 6, 7, 8]


def test_what_follows_the_answer_is_cut_off():
    answer = torch.tensor([[False, False, True, False, False]])
    assert lists(from_rectangle(IDS[:1], answer, None)) == [([0, 5, 6], [0, 0, 1])]


def test_an_answer_may_have_a_gap():
    """Several turns of a conversation, of which some tokens are the model's."""
    answer = torch.tensor([[False, True, False, True, False]])
    assert lists(from_rectangle(IDS[:1], answer, None)) == [([0, 5, 6, 7], [0, 1, 0, 1])]


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_the_attention_mask_may_be_of_any_type(kind):
    assert lists(from_rectangle(IDS, ANSWER, PRESENT.to(kind))) == lists(from_rectangle(IDS, ANSWER, PRESENT))


def test_narrow_ids_become_int64():
    assert from_rectangle(IDS.int(), ANSWER, PRESENT)[0].ids.dtype == torch.int64


def test_a_pair_is_an_example_whose_answer_follows_its_prompt():
    assert lists(from_pairs([([5, 6], [7]), ([8], [9, 10])])) == [([5, 6, 7], [0, 0, 1]), ([8, 9, 10], [0, 1, 1])]


@pytest.mark.parametrize("pair", [([], [7]), ([5], [])])
def test_a_pair_without_prompt_or_answer_is_refused_by_its_place(pair):
    with pytest.raises(ValueError, match="pairs: example 1 has no prompt or no answer token, at least one of each"):
        from_pairs([([5], [6]), pair])


BAD = [
    ({"input_ids": IDS.tolist()}, TypeError, r"input_ids: list given, a torch\.Tensor wanted"),
    ({"answer_mask": ANSWER.tolist()}, TypeError, r"answer_mask: list given, a torch\.Tensor"),
    ({"attention_mask": PRESENT.tolist()}, TypeError, r"attention_mask: list given, a torch\.Tensor"),
    ({"input_ids": IDS[0]}, ValueError, r"input_ids: .*shape \(5,\).*\(example, token\) int64"),
    ({"input_ids": IDS.float()}, ValueError, r"input_ids: .*float32.*int64 wanted"),
    ({"input_ids": IDS[:0], "answer_mask": ANSWER[:0], "attention_mask": None}, ValueError, "input_ids: no ex"),
    ({"answer_mask": ANSWER.int()}, TypeError, r"answer_mask: torch\.int32 given, torch\.bool wanted"),
    ({"answer_mask": ANSWER[:, 1:]}, ValueError, r"answer_mask: .*\(2, 4\).*\(2, 5\) wanted"),
    ({"attention_mask": PRESENT[:1]}, ValueError, r"attention_mask: .*\(1, 5\).*\(2, 5\)"),
    ({"answer_mask": ANSWER & (torch.arange(2) > 0)[:, None]}, ValueError, "example 0 has no answer"),
    ({"answer_mask": ANSWER | PRESENT.bool()}, ValueError, "answer_mask: example 0 marks its first"),
    ({"answer_mask": ~ANSWER}, ValueError, "answer_mask: example 0 marks padding"),
    ({"attention_mask": PRESENT * torch.tensor([[1], [0]])}, ValueError, "example 1 has no token"),
    ({"attention_mask": PRESENT * (torch.arange(5) != 2)}, ValueError, "attention_mask: example 0 has a hole"),
    ({"input_ids": IDS + VOCAB - 8}, ValueError, f"example 0 has id {VOCAB}, ids from 0 to {VOCAB - 1}"),
    ({"input_ids": IDS - 6}, ValueError, f"input_ids: example 0 has id -1, ids from 0 to {VOCAB - 1}"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_refused_by_name(model, changes, error, message, unchecked):
    given = {"input_ids": IDS, "answer_mask": ANSWER, "attention_mask": PRESENT, **changes}
    with pytest.raises(error, match=message):
        check_examples(model, from_rectangle(**given))


def test_a_prompt_longer_than_the_models_context_is_refused(model):
    """The last token is only predicted, so one more than the context holds is fine."""
    ids = torch.full((1, 66), 5)
    answer = torch.zeros(1, 66, dtype=torch.bool)
    answer[0, 64] = True
    check_examples(model, from_rectangle(ids, answer))
    answer[0, 65] = True
    with pytest.raises(ValueError, match=r"input_ids: example 0 has 66 tokens, at most the model's context of 64"):
        check_examples(model, from_rectangle(ids, answer))


# ── Batches ────────────────────────────────────────────────────────────────────────────────────────────────────


def of_lengths(*lengths, n_answer=1):
    n_answers = [n_answer] * len(lengths) if isinstance(n_answer, int) else n_answer
    return [Example(torch.arange(1, n + 1), torch.arange(n) >= n - k) for n, k in zip(lengths, n_answers, strict=True)]


def test_similar_lengths_share_a_batch_the_longest_first():
    found = list(batches(of_lengths(3, 9, 5, 8, 4), 2))
    assert [batch.rows for batch in found] == [[1, 3], [2, 4], [0]]
    assert [tuple(batch.ids.shape) for batch in found] == [(2, 9), (2, 5), (1, 3)]


def test_every_example_is_in_exactly_one_batch_padded_on_the_right():
    examples = of_lengths(3, 9, 5, 8, 4, n_answer=2)
    for size in ("auto", 1, 2, 3, 7):
        seen = []
        for batch in batches(examples, size):
            for ids, answer, row in zip(batch.ids, batch.answer, batch.rows, strict=True):
                n = len(examples[row])
                assert ids[:n].equal(examples[row].ids)
                assert answer[:n].equal(examples[row].answer)
                assert not answer[n:].any()
                seen.append(row)
        assert sorted(seen) == [0, 1, 2, 3, 4]


def test_chosen_for_the_caller_a_batch_holds_a_bounded_number_of_tokens():
    lengths = [700] * 5 + [30] * 100
    for batch in batches(of_lengths(*lengths), "auto"):
        assert batch.ids.numel() <= TOKENS_PER_BATCH
    assert [len(batch.rows) for batch in batches(of_lengths(3 * TOKENS_PER_BATCH), "auto")] == [1]


def n_padded(examples) -> float:
    return float(len(examples) * max(map(len, examples)))


def test_a_batch_holds_no_more_tokens_than_there_is_room_for_but_one_sequence_at_least():
    lengths = [50, 40, 30, 20, 10]
    assert [len(b.rows) for b in batches(of_lengths(*lengths), "auto", cost=n_padded, room=100.0)] == [2, 3]
    assert [len(b.rows) for b in batches(of_lengths(*lengths), "auto", cost=n_padded, room=5.0)] == [1] * 5
    mixed = of_lengths(9, 50, 9, 9, n_answer=(3, 1, 3, 3))
    assert all(b.ids.numel() <= 50 for b in batches(mixed, "auto", cost=n_padded, room=50.0, by_answer=True))


def test_answers_of_similar_length_can_be_put_together():
    found = list(batches(of_lengths(9, 9, 5, 5, n_answer=(1, 3, 1, 3)), 2, by_answer=True))
    assert [batch.rows for batch in found] == [[1, 3], [0, 2]]
    assert tuple(found[0].ids.shape) == (2, 9)


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_batch_size_is_a_positive_integer(size, unchecked):
    with pytest.raises(ValueError, match=f"batch_size: {size!r} given, a positive integer or 'auto' wanted"):
        list(batches(of_lengths(3), size))


def test_a_batch_size_of_numpys_is_an_integer_too(unchecked):
    assert [len(batch.rows) for batch in batches(of_lengths(9, 5, 3), np.int64(2))] == [2, 1]
    assert len(isouq.score_classes(torch.nn.Linear(2, 3), torch.ones(5, 2), batch_size=np.int64(2))) == 5


def test_part_of_a_batch_carries_no_padding_of_the_others():
    (batch,) = batches(of_lengths(9, 5, 3), "auto")
    part = batch.part(slice(1, 3))
    assert isinstance(part, Batch)
    assert part.ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert part.answer.int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert part.rows == [1, 2]
