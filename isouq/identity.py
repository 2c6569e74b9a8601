"""What a stored number depends on: the weights of a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def weights(model: Any, tokenizer: Any) -> str:
    """Return 12 hex digits of all weights and the vocabulary: what changes them is another model."""
    found = hashlib.blake2b(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode(), digest_size=6)
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
