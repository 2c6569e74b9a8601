"""Language models by name: a local folder or a Hugging Face Hub id → model and tokenizer, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CARD_SHARE = 0.8  # of a card's free memory that weights may take; the rest is for passes


class ModelError(ValueError):
    """A model that cannot be loaded; the message names the cause and the way out."""


def load_causal_lm(name: str, **placed: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a local folder or a Hugging Face Hub id: `owner/name` or `owner/name@revision`.

    A Hub id's model and tokenizer are of one commit; `placed`: device, dtype and device_map of `from_pretrained`.

    Raises ModelError when there is no such model, and when there is no network to fetch it with.
    """
    if name and (folder := Path(name).expanduser()).is_dir():
        return from_pretrained(folder, name, **placed, local_files_only=True)
    commit, offline = _commit(name)
    options = {**placed, "revision": commit, "local_files_only": offline is not None}
    try:
        return from_pretrained(name.partition("@")[0], name, **options)
    except ModelError as error:
        raise (_no_copy(name, offline) if offline else error) from error.__cause__


def content(name: str) -> str:
    """Return what a model's name stands for now: a Hub id's commit, or 12 hex digits over the bytes of a folder.

    Raises ModelError for an id that the Hub does not have, or that neither it nor the local cache can resolve.
    """
    if name and (folder := Path(name).expanduser()).is_dir():
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
        lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return _commit(name)[0]


def _commit(name: str) -> tuple[str, Exception | None]:
    """Return the commit of a Hub id, and the error of the Hub where its local cache had to answer in its place."""
    from huggingface_hub import HfApi, constants, errors

    repository, _, revision = name.partition("@")
    ref = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "refs", revision or "main")
    try:  # one short request, since transformers tries for long before it gives up
        commit = HfApi().model_info(repository, revision=revision or "main", timeout=10).sha or revision
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        advice = "check the id and the revision; a gated model needs its terms accepted there, then `hf auth login`"
        raise ModelError(f"the Hub has no {name!r} for you: {' '.join(str(error).split())}; {advice}") from error
    except Exception as error:  # errors of the HTTP client, by whatever name its version gives them
        if re.fullmatch("[0-9a-f]{40}", revision):
            return revision, error
        if ref.is_file():
            return ref.read_text().strip(), error
        raise _no_copy(name, error) from error
    if commit != revision:
        with contextlib.suppress(OSError):  # a cache that cannot be written is no use without a network
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    return commit, None


def _no_copy(name: str, cause: Exception) -> ModelError:
    what = f"cannot reach the Hub for {name!r} ({cause}) and its local cache has no copy"
    return ModelError(f"no network: {what}; a local folder or an asset (`isouq assets list`) works without one")


def from_pretrained(
    source: str | Path,
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    device_map: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load what transformers calls `source`, in evaluation mode; `name` is what the user called it.

    `device` is "cpu", "cuda", "mps" or "auto": a card where there is one, all cards where the model is larger than one.
    `dtype` is a name of torch's, or "auto": the checkpoint's own on a card, float32 on the CPU. `device_map`, in place
    of a device, is accelerate's. Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = _placed(device, dtype, device_map)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if device == "auto":
            device_map = None if _fits_a_card(source, dtype, **options) else "auto"
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **options)
        if device_map is None and device != "cpu":
            model.to("cuda" if device == "auto" else device)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"device: {device!r} has no room for {name!r}; use 'auto', or dtype 'bfloat16'") from error
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot load {name!r} as a causal language model: {error}") from error
    head, shared = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head and model.config.get_text_config().tie_word_embeddings and not (shared.is_meta or head.weight is shared):
        way_out = "remove one, or set tie_word_embeddings to false"
        raise ModelError(f"{name!r}: its config ties embedding and head, its weights hold two that differ; {way_out}")
    model.config._commit_hash = options.get("revision")  # of a Hub id; transformers no longer keeps it
    return model.eval(), tokenizer


def _placed(device: str, dtype: str, device_map: str | None) -> tuple[str, str]:
    """Return the device that is there ("auto" stands for one or more CUDA cards) and the type that "auto" means."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name, given, known in (("device", device, DEVICES), ("dtype", dtype, DTYPES)):
        if given not in known:
            raise ModelError(f"{name}: {given!r} given, one of {', '.join(known)} wanted")
    if device_map is not None and device != "cpu":
        raise ModelError(f"device: {device!r} and device_map {device_map!r} given; leave one out")
    if device == "auto" and not there["cuda"]:
        device = "mps" if there["mps"] else "cpu"
    if not there.get(device, True):
        needs = "; its CUDA build and a driver are needed" if device == "cuda" else ""
        raise ModelError(f"device: {device!r} given, but torch {torch.__version__} sees none{needs}; or use 'auto'")
    on_cpu = device == "cpu" and device_map is None
    return device, "float32" if dtype == "auto" and on_cpu else dtype


def _fits_a_card(source: str | Path, dtype: str, **options: Any) -> bool:
    """Whether the weights, whose shapes alone are made, leave room on the first card."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, **options)
    kind = (config.dtype if dtype == "auto" else getattr(torch, dtype)) or torch.float32
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=kind)
    return sum(p.nbytes for p in shapes.parameters()) <= CARD_SHARE * torch.cuda.mem_get_info()[0]


def weights(model: Any, tokenizer: Any = None) -> str:
    """Return 12 hex digits of what a model computes with: two models with the same digits give the same numbers.

    All parameters and buffers by their names, types and bytes; the configuration, with the implementation of attention;
    the end-of-sequence ids that generation stops at; and all that a tokenizer does with a text.
    """
    import torch

    config: Any = getattr(model, "config", None)
    about: dict[str, Any] = {
        "class": type(model).__qualname__,
        "config": config.to_dict() if hasattr(config, "to_dict") else {"config": str(config)},
        "attention": getattr(config, "_attn_implementation", None),
        "eos": getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        "tokenizer": _tokenizer(tokenizer),
    }
    for name in ("_name_or_path", "transformers_version"):  # the folder, and the version that wrote it
        about["config"].pop(name, None)
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=6)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer as plain JSON: vocabulary, merges, normalisation, special tokens, how it joins tokens to a text."""
    names = ("special_tokens_map", "clean_up_tokenization_spaces")
    about = {"class": type(tokenizer).__name__} | {name: getattr(tokenizer, name, None) for name in names}
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        about |= json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # these remember the last call
    elif tokenizer is not None:
        about["vocabulary"] = tokenizer.get_vocab()
    return about
