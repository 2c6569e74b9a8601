"""A tiny package index in a folder: real wheels, an sdist and a manifest, for tests that go through real pip."""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from isouq.studies.assets import manifest

BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.mkdir(os.path.join(folder, "fake_source-1.0.dist-info"))
    with open(os.path.join(folder, "fake_source-1.0.dist-info", "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: fake-source\\nVersion: 1.0\\n")
    return "fake_source-1.0.dist-info"
def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise SystemExit("nothing is to be built")
"""

# Run out of its wheel it tells so, and passes on to the real pip.
PIP = """
import os, runpy, sys
with open(os.environ["PIP_FIND_LINKS"] + "/../via", "a") as out:
    out.write(sys.argv[1])
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""

NOTES, SECOND, FRONT, BACK = b"notes 7\n" * (1 << 17), b"more notes", b"front" * 9, b"back" * 7
SOURCED, OTHER, GGUF = b"sourced", b"from the same sdist", b"GGUF stand-in"


@dataclass(frozen=True)
class Index:
    """Where the archives are, the manifest of them, the cache to fill, and pip's environment to see only these."""

    archives: Path
    manifest: Path
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.archives), "PIP_CONFIG_FILE": os.devnull}
        return {**pip, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "ISOUQ_CACHE": str(self.cache)}


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Make an index in a folder, and make isouq and pip see it, and it only, for one test."""
    index = make_index(folder)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in index.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(manifest, "FILE", index.manifest)
    return index


def make_index(folder: Path) -> Index:
    index = Index(folder / "archives", folder / "assets.toml", folder / "cache")
    index.archives.mkdir()
    _wheel(index.archives, "fake_notes", {"notes/a.txt": NOTES, "notes/b.txt": SECOND, "unused.bin": b"x"})
    _wheel(index.archives, "fake_front", {"data/half.part0": FRONT})
    _wheel(index.archives, "fake_back", {"data/half.part1": BACK})
    _wheel(index.archives, "fake_model", {"model/toy.gguf": GGUF})
    _wheel(index.archives, "fake_pip", {"pip/__main__.py": PIP.encode()})
    _sdist(index.archives, {"data/s.txt": SOURCED, "data/o.txt": OTHER})
    packages = [_package(archive) for archive in sorted(index.archives.iterdir())]
    half = {"half": [(FRONT + BACK, ("fake-front", "data/half.part0"), ("fake-back", "data/half.part1"))]}
    entries = [
        _asset("notes", [(NOTES, ("fake-notes", "notes/a.txt")), (SECOND, ("fake-notes", "notes/b.txt"))]),
        _asset("half", half["half"], notice="Halves have terms: accept them."),
        _asset("sourced", [(SOURCED, ("fake-source", "fake_source-1.0/data/s.txt"))]),
        _asset("other", [(OTHER, ("fake-source", "fake_source-1.0/data/o.txt"))]),
        _asset("toy-lm", [(GGUF, ("fake-model", "model/toy.gguf"))], kind="causal-lm"),
    ]
    index.manifest.write_text("\n".join(packages + entries))
    return index


def _wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    dashed = name.replace("_", "-")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        # It asks for a Python that does not exist: reading a file out of it must not depend on that.
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {dashed}\nVersion: 1.0\nRequires-Python: >=9\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _sdist(folder: Path, members: dict[str, bytes]) -> None:
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    information = b"Metadata-Version: 2.1\nName: fake-source\nVersion: 1.0\n"
    files = {"pyproject.toml": build.encode(), "backend.py": BACKEND.encode(), "PKG-INFO": information}
    with tarfile.open(folder / "fake_source-1.0.tar.gz", "w:gz") as sdist:
        for name, content in {**files, **members}.items():
            entry = tarfile.TarInfo(f"fake_source-1.0/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))


def _package(archive: Path) -> str:
    name = archive.name.split("-")[0].replace("_", "-")
    content = archive.read_bytes()
    return (
        f'[packages.{name}]\nversion = "1.0"\nfile = "{archive.name}"\n'
        f'sha256 = "{hashlib.sha256(content).hexdigest()}"\nsize = {len(content)}\n'
        + ('via = "fake-pip"\n' if name == "fake-source" else "")
    )


def _asset(name: str, members: list[tuple], *, kind: str = "data", notice: str = "") -> str:
    lines = [f"[assets.{name}]", f'kind = "{kind}"', f'title = "the {name}"', 'licence = "CC0-1.0"']
    lines += [f'notice = "{notice}"', 'used_for = "tests"']
    for content, *parts in members:
        file = parts[0][1].rsplit("/", 1)[1].removesuffix(".part0")
        lines += [f"[[assets.{name}.members]]", f'file = "{file}"', f"size = {len(content)}"]
        lines += [f'sha256 = "{hashlib.sha256(content).hexdigest()}"', f"parts = {json.dumps(parts)}"]
    return "\n".join(lines) + "\n"
