"""A tiny random Llama with a word-level tokenizer whose vocabulary has several newline tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["<eos>", "\n", ".\n", "Q:", "A:", *(f" w{i}" for i in range(40)), *(chr(c) for c in range(32, 127))]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    merges: list[tuple[str, str]] = []
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.6,  # far from uniform: greedy choices are clear
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def gemma() -> Gemma3ForCausalLM:
    """Its sliding window of 8 tokens is shorter than the prompts."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.6,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture
def reader(tmp_path: Path) -> str:
    """The folder of a tiny random classifier for natural language inference."""
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=7, **sizes, initializer_range=1.0, id2label={0: "contradiction", 1: "ENTAILMENT"})
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)
