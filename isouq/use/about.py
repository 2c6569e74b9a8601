"""What a file of scores says of the run that made it, in Parquet's own metadata: model, weights, aggregation, dtype."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from isouq import models

KEY = b"isouq"
IDENTITY = ("weights", "aggregation", "dtype", "chat", "system")  # what numbers depend on; the name is for the reader
About = dict[str, Any]


def of_run(
    name: str, model: Any, tokenizer: Any, aggregation: str, *, chat: bool = False, system: str | None = None
) -> About:
    """Return what scores of a model depend on; `weights` is its fingerprint, `isouq.models.weights`."""
    return {
        "model": name,
        "weights": models.weights(model, tokenizer),
        "aggregation": aggregation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat": chat,
        "system": system,
        "isouq": metadata.version("isouq"),
    }


def with_about(schema: pa.Schema, about: About) -> pa.Schema:
    """Return the schema that says so too, for a writer of Parquet; what it says already stays."""
    return schema.with_metadata({**(schema.metadata or {}), KEY: json.dumps(about)})


def about_of(path: Path) -> About | None:
    """Return what a file says of the run that made it; None for .csv and .jsonl, which cannot, and for other files."""
    if path.suffix.lower() != ".parquet":
        return None
    try:
        kept = (pq.read_schema(path).metadata or {}).get(KEY)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from error
    return json.loads(kept) if kept else None


def differences(there: About, here: About) -> str:
    """Return in words what differs between two runs' scores, "" where they can be compared."""
    named = {name: [f"{run.get(name)!r}" for run in (there, here)] for name in IDENTITY}
    names = [f"{run['model']!r}" if run.get("model") else "unnamed" for run in (there, here)]
    named["weights"] = [f"{digits} of {name}" for digits, name in zip(named["weights"], names, strict=True)]
    parts = [f"{name} {a} there, {b} here" for name, (a, b) in named.items() if there.get(name) != here.get(name)]
    return ", ".join(parts)
