"""Sentence embeddings by a small model that is independent of the models under study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from isouq.studies import assets

ENCODER = "all-minilm-l6-v2"


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Show no bar of loaded weights, which would stand in a page of the book."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class SentenceEncoder:
    """all-MiniLM-L6-v2: a text's vector is the mean over its first 128 tokens, scaled to unit length."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = assets.path(ENCODER)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        with no_loading_bar():
            self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Return the vectors of `texts`: (text, 384), float32."""
        parts = []
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            batch = self.tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            means = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(means, dim=1))
        return torch.cat(parts)
