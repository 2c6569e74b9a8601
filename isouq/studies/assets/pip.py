"""Archives from PyPI, with the user's own pip settings: download one by its hash, read members out of it.

Nothing is installed and no code of a package is imported. (For an sdist, pip runs its metadata step in an
isolated build.)
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isouq.studies.assets.manifest import AssetError, Package


def download(package: Package, scratch: Path, progress: bool) -> Path:
    """Return the archive, in a new folder under `scratch`; pip refuses bytes without the pinned hash.

    Raises AssetError when pip cannot have it: no network, other bytes, no such version, no space.
    """
    pip = [str(download(package.via, scratch, progress) / "pip")] if package.via else ["-m", "pip"]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    requirement, log = folder / "requirement.txt", folder / "pip.log"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--progress-bar=off", "--disable-pip-version-check"]
    # Kept once, by us. And nothing is installed: which Python a package asks for does not matter.
    options += ["--no-cache-dir", "--ignore-requires-python"]
    options += ["--only-binary=:all:"] if package.file.endswith(".whl") else []
    command = [sys.executable, *pip, "download", *options, "-d", str(folder), "-r", str(requirement)]
    # TMPDIR: pip's temporary files lie where the next process cleans up after a kill. One retry, so that a
    # missing network is said soon; the user's PIP_RETRIES goes before.
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
        raise _failure(package, log.read_text(encoding="utf-8", errors="replace"))
    return folder / package.file


def read_members(archive: Path, targets: dict[str, Path]) -> None:
    """Write each member (path in the archive → file to write) out of a wheel or sdist, in one pass.

    Raises AssetError when the archive has no such member.
    """
    missing = dict(targets)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in set(missing) & set(wheel.namelist()):
                with wheel.open(name) as stream:
                    _write(stream, missing.pop(name))
    else:
        with tarfile.open(archive) as sdist:
            while missing and (entry := sdist.next()):
                if entry.name in missing and (content := sdist.extractfile(entry)):
                    _write(content, missing.pop(entry.name))
    if missing:
        raise AssetError(f"{archive.name} has no member {', '.join(sorted(missing))}; the manifest is wrong")


def _write(stream: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def _watch(process: subprocess.Popen[bytes], package: Package, folder: Path, progress: bool) -> None:
    """Wait for pip; the bar follows the growing file, since pip's own bar needs a terminal."""
    with tqdm(total=package.size, unit="B", unit_scale=True, desc=package.name, disable=not progress) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            if new := min(package.size, _bytes_on_disk(folder, package.file)) - bar.n:
                bar.update(new)
        if process.returncode == 0:
            bar.update(package.size - bar.n)


def _bytes_on_disk(folder: Path, file: str) -> int:
    """Return how much of a file pip has: in its own temporary folder first, then in `folder`."""
    sizes = [0]
    for candidate in (folder / file, *(entry / file for entry in folder.iterdir())):
        with contextlib.suppress(OSError):  # pip moves files and folders while we look
            sizes.append(candidate.stat().st_size)
    return max(sizes)


def _failure(package: Package, log: str) -> AssetError:
    if found := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", log):
        return AssetError(
            f"{package.file} is corrupt and was refused: expected SHA-256 {found[1]}, got {found[2]}; "
            "try another index (PIP_INDEX_URL) or a folder with an intact copy (PIP_FIND_LINKS)"
        )
    if "No module named pip" in log:
        return AssetError(f"{sys.executable} has no pip to download with; `python -m ensurepip` adds it")
    if "No space left" in log:
        return AssetError(f"{package.name}: no space left on the disk; ISOUQ_CACHE moves the cache folder")
    if re.search(r"(?i)NewConnectionError|NameResolution|Connect\w*Timeout|Max retries|Read timed out", log):
        cause = "no network: pip cannot reach the package index"
    else:
        errors = re.findall(r"ERROR: (.*)", log) or [log.strip() or f"no {package.file} and no message"]
        cause = f"pip failed: {errors[-1]}"
    return AssetError(
        f"{package.name}: {cause}; way out: set PIP_FIND_LINKS to a folder that holds {package.file}, or set "
        "ISOUQ_CACHE to a copy of the cache folder of a machine that has the asset"
    )
