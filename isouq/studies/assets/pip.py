"""Archives from PyPI, with the user's own pip settings: download one by its hash, read a member out of it.

Nothing is installed and no code of a package is imported. (For an sdist, pip runs its metadata step in an
isolated build.)
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from isouq.studies.assets.manifest import AssetError, Package


def download(package: Package, scratch: Path, progress: bool) -> Path:
    """Return the archive, in a new folder under `scratch`. Raises AssetError for other bytes, or none to be had."""
    pip = [str(download(package.via, scratch, progress) / "pip")] if package.via else ["-m", "pip"]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--disable-pip-version-check"]
    # isouq keeps the bytes itself. Nothing is installed, so it does not matter which Python a package asks for.
    options += ["--no-cache-dir", "--ignore-requires-python"]
    options += ["--only-binary=:all:"] if package.file.endswith(".whl") else []
    command = [sys.executable, *pip, "download", *options, "-d", str(folder), "-r", str(requirement)]
    # TMPDIR: the next process removes pip's temporary files too after a kill. One retry, so that a missing network
    # is reported soon; the user's PIP_RETRIES takes precedence.
    environment = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(folder)}
    bar = 2 if progress else subprocess.DEVNULL  # pip draws its bar on standard output; ours is for results
    run = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, env=environment, text=True, errors="replace")
    if run.returncode != 0 or not (folder / package.file).is_file():
        raise _failure(package, run.stderr)
    return folder / package.file


def read_member(archive: Path, name: str) -> bytes:
    """Return one file out of a wheel or an sdist. Raises AssetError where there is no such member."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as sdist:
            return sdist.extractfile(name).read()  # type: ignore[union-attr]  # None for a folder
    except KeyError:
        raise AssetError(f"{archive.name} has no member {name}; the manifest is wrong") from None


def _failure(package: Package, log: str) -> AssetError:
    if hashes := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", log):
        return AssetError(
            f"{package.file} is corrupt and was refused: expected SHA-256 {hashes[1]}, got {hashes[2]}; "
            "try another index (PIP_INDEX_URL) or a folder with an intact copy (PIP_FIND_LINKS)"
        )
    if "No module named pip" in log:
        return AssetError(f"{sys.executable} has no pip to download with; `python -m ensurepip` adds it")
    if re.search(r"(?i)NewConnectionError|NameResolution|Connect\w*Timeout|Max retries|Read timed out", log):
        cause = "no network: pip cannot reach the package index"
    else:
        errors = re.findall(r"ERROR: (.*)", log) or [log.strip() or f"no {package.file} and no message"]
        cause = f"pip failed: {errors[-1]}"
    return AssetError(
        f"{package.name}: {cause}; way out: set PIP_FIND_LINKS to a folder that holds {package.file}, or set "
        "ISOUQ_CACHE to a copy of the cache folder of a machine that has the asset"
    )
