"""A small random Llama with a tokenizer of single characters, saved as a user's model is."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isouq import cli

LETTERS = ["<eos>", "<unk>", "\n", *" ?:.abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


def save(folder: Path, chat_template: str | None = None) -> Path:
    """Write model and tokenizer to the folder, with a context of 64 tokens, and return it."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "unk_token": "<unk>", "chat_template": chat_template}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = LlamaConfig(vocab_size=len(LETTERS), max_position_embeddings=64, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def score(folder: Path | str, source: Path | str, target: Path | str, *more: str) -> int:
    """`isouq score` from file to file."""
    return cli.main(["score", "--model", str(folder), "--input", str(source), "--output", str(target), *more])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
