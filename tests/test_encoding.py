"""Where a prompt ends: small tokenizers of every make, judged by the ids of the whole text."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from isouq.language import encoding

WORDS = ("▁the", "▁is", "▁Paris", "Paris", "ville", "://", "▁▁", "on", "is▁")
SPECIAL = [("<s>", 1), ("</s>", 2)]


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))


def bpe(words: tuple[str, ...], letters: str) -> models.BPE:
    merges = merges_of(words)
    names = ["<unk>", "<s>", "</s>", *letters, *(a + b for a, b in merges)]
    return models.BPE({name: i for i, name in enumerate(dict.fromkeys(names))}, merges, unk_token="<unk>")


def byte_level(prefix: bool, trim: bool) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(bpe(tuple(word.replace("▁", "Ġ") for word in WORDS), "".join(letters)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not trim)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


LETTERS = "▁abehilnoprstvP:/.0é\n"


def metaspace(scheme: str) -> Tokenizer:
    backend = Tokenizer(bpe(WORDS, LETTERS))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


def llama2() -> Tokenizer:
    backend = Tokenizer(bpe(WORDS, LETTERS))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -8.0) for c in LETTERS), *((w, -4.0) for w in WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return backend


def wordpiece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "the", "is", "paris", "ville", *":/.0", *"abehilnoprstv"]
    words += [f"##{w}" for w in ("s", "ville", "paris", *"abehilnoprtv0")]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


MAKES = {
    "byte level": lambda: byte_level(False, False),
    "byte level with a space": lambda: byte_level(True, False),
    "byte level, spaces left out of offsets": lambda: byte_level(False, True),
    "byte level with a space, left out": lambda: byte_level(True, True),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "llama 2": llama2,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
TEMPLATES = {"none": "$A", "start": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>", "the same": "<s> $A <s>"}


def a_tokenizer(make: str, template: str = "none", **special: str) -> PreTrainedTokenizerFast:
    backend = MAKES[make]()
    wrap = processors.TemplateProcessing(TEMPLATES[template], special_tokens=SPECIAL)
    backend.post_processor = processors.Sequence([p for p in (backend.post_processor, wrap) if p])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def texts(make: str, n: int) -> list[tuple[str, str]]:
    """Random pairs cut out of one text at any place."""
    chance = random.Random(make)
    parts = [
        " ",
        "  ",
        "\n",
        "the",
        " the",
        "is",
        "Paris",
        " Paris",
        "ville",
        "http://",
        ".",
        "0",
        "é",
        "</s>",
        "a \n\n",
    ]
    found = []
    while len(found) < n:
        text = "".join(chance.choice(parts) for _ in range(chance.randint(2, 7)))
        border = chance.randint(1, len(text) - 1)
        found.append((text[:border], text[border:]))
    return found


@pytest.mark.parametrize("make", MAKES)
def test_a_pair_has_the_ids_of_its_whole_text_or_says_that_a_token_straddles(make):
    tokenizer = a_tokenizer(make)
    straddled = kept = 0
    for prompt, answer in texts(make, 400):
        whole, alone = ids_of(tokenizer, prompt + answer), ids_of(tokenizer, prompt)
        if not alone or not ids_of(tokenizer, answer):
            continue
        try:
            pair = encoding.pair(tokenizer, prompt, answer)
        except ValueError:  # an answer of spaces that this make drops, or joins to the word before
            assert whole[: len(alone)] == alone
            assert not whole[len(alone) :]
            continue
        straddled += pair.straddles
        if pair.straddles:
            assert pair.prompt == alone
        else:
            assert [*pair.prompt, *pair.answer] == whole
        if whole[: len(alone)] == alone and 0 not in whole:  # 0 is the unknown token, which may stand for both
            kept += 1
            assert (pair.prompt, pair.straddles) == (alone, False), (prompt, answer)
    assert kept > 50
    assert straddled > 5


def surfaces(make: str, tokenizer, text: str) -> set[int]:
    """The lengths in bytes of the beginnings of `text` that end with a token, read off the tokens' own letters."""
    letters = {letter: byte for byte, letter in bytes_to_letters().items()}
    ends, place = set(), 0
    for token in tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text)):
        place += (
            len(bytes(letters[c] for c in token))
            if make.startswith("byte level")
            else len(token.encode().replace("▁".encode(), b" "))
        )
        ends.add(place)
    invented = place - len(text.encode())
    assert invented in (0, 1)
    return {end - invented for end in ends}


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize("make", [make for make in MAKES if make.startswith("byte") or make == "llama 2"])
def test_a_pair_straddles_exactly_where_no_token_ends_at_the_border(make):
    tokenizer = a_tokenizer(make)
    left_out = "left out" in make
    for prompt, answer in texts(make, 600):
        if "</s>" in prompt + answer:
            continue  # some makes put a space after it too
        pair = encoding.pair(tokenizer, prompt, answer)
        ends = len(prompt.encode()) in surfaces(make, tokenizer, prompt + answer)
        same = ids_of(tokenizer, prompt + answer)[: len(ids_of(tokenizer, prompt))] == ids_of(tokenizer, prompt)
        if ends and (same or not left_out):
            assert not pair.straddles, (prompt, answer)
        if not ends:
            assert pair.straddles, (prompt, answer)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("make", MAKES)
def test_what_opens_every_text_stays_and_what_closes_it_goes(make, template):
    tokenizer, plain = a_tokenizer(make, template), a_tokenizer(make)
    opening = [1] if TEMPLATES[template].startswith("<s>") else []
    for prompt in ("the ville is", "the</s>", "</s>", "<s>the", "the <s>"):
        pair = encoding.pair(tokenizer, prompt, " Paris")
        assert pair.prompt == [*opening, *encoding.pair(plain, prompt, " Paris").prompt]
        assert encoding.prompt_ids(tokenizer, prompt) == [*opening, *ids_of(plain, prompt)]
    assert encoding.prompt_ids(tokenizer, "") == opening


@pytest.mark.parametrize("make", MAKES)
def test_a_start_that_is_the_end_token_too_stays_before_an_empty_prompt(make):
    tokenizer = a_tokenizer(make, "the same", bos_token="<s>", eos_token="<s>")
    pair = encoding.pair(tokenizer, "", " Paris")
    assert (pair.prompt, pair.answer) == ([1], ids_of(tokenizer, " Paris"))
    with pytest.raises(ValueError, match="the prompt is empty and the tokenizer has no start token"):
        encoding.pair(a_tokenizer(make), "", " Paris")


@pytest.mark.parametrize("make", MAKES)
def test_an_answer_by_itself_has_the_ids_that_it_has_after_a_prompt(make):
    tokenizer = a_tokenizer(make)
    prompt = "the ville is:"
    for answer in (" Paris", " the ville is", "Paris", " </s>"):
        n = len(ids_of(tokenizer, prompt))
        assert encoding.answer_ids(tokenizer, answer) == ids_of(tokenizer, prompt + answer)[n:]


def test_a_straddled_answer_gets_no_space_that_nobody_wrote():
    tokenizer = a_tokenizer("llama 2")
    pair = encoding.pair(tokenizer, "the ville is ", "Paris")
    assert pair.straddles
    assert tokenizer.convert_ids_to_tokens(pair.answer) == ["Paris"]
    assert tokenizer.convert_ids_to_tokens(pair.prompt)[-1] == "▁"
    pair = encoding.pair(tokenizer, "the http:", "//a")
    assert pair.straddles
    assert tokenizer.convert_ids_to_tokens(pair.answer) == ["/", "/", "a"]


def test_an_unknown_token_for_both_is_no_answer_that_has_no_token():
    """WordPiece makes one unknown token of a word with one unknown letter, wherever the border is in it."""
    pair = encoding.pair(a_tokenizer("wordpiece"), "the ☃", "☃")
    assert pair == ([3, 0], [0], True)


class Slow(PreTrainedTokenizer):
    """Letters, without offsets; a space comes before every text, two slashes are one token, an end closes."""

    def __init__(self, space: bool = True, **kwargs) -> None:
        self.space = space
        self.letters = ["<unk>", "<s>", "</s>", *"▁abehilnoprstvP:/.0\n", "//"]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text = (" " * self.space + text).replace(" ", "▁")
        return [c for part in text.replace("//", "\t//\t").split("\t") for c in ([part] if part == "//" else part)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1=None) -> list[int]:
        return [1, *token_ids_0, 2]


@pytest.mark.parametrize("space", [True, False])
def test_a_tokenizer_without_offsets_keeps_the_same_rules(space):
    tokenizer = Slow(space)
    assert not tokenizer.is_fast

    def tokens(text: str) -> list[int]:
        return [tokenizer.letters.index(c) for c in text]

    start = [1, *tokens("▁" * space)]
    assert encoding.pair(tokenizer, "the", " Paris") == ([*start, *tokens("the")], tokens("▁Paris"), False)
    assert encoding.pair(tokenizer, "the", "ville") == ([*start, *tokens("the")], tokens("ville"), False)
    assert encoding.pair(tokenizer, "a/", "/b") == ([*start, *tokens("a/")], tokens("/b"), True)
    # Some such tokenizers make one unknown token of several letters, and nothing tells whose they are.
    assert encoding.pair(tokenizer, "the☃", "ville") == ([*start, *tokens("the"), 0], tokens("ville"), True)
    assert encoding.prompt_ids(tokenizer, "the") == [*start, *tokens("the")]
    assert encoding.answer_ids(tokenizer, " Paris") == tokens("▁Paris")


@pytest.mark.parametrize(
    ("prompt", "answer", "error", "message"),
    [
        ("the", "", ValueError, "the answer is empty"),
        ("the", 42, TypeError, "the answer is 42, a text wanted"),
        (None, "the", TypeError, "the prompt is None, a text wanted"),
    ],
)
def test_what_is_no_text_is_refused(prompt, answer, error, message, unchecked):
    with pytest.raises(error, match=message):
        encoding.pair(a_tokenizer("llama 2"), prompt, answer)
