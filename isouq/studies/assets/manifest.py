"""What assets.toml says: the models and data there are, and where their bytes come from."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from isouq.models import ModelError

FILE = Path(__file__).with_name("assets.toml")


class AssetError(ModelError):
    """An asset that cannot be had; the message names the cause and the way out."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An archive on PyPI: `sha256` and `size` (bytes) are those of its file; `via` is the pip that gets it."""

    name: str
    version: str
    file: str
    sha256: str
    size: int
    via: "Package | None" = None  # None: the pip of this environment


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file that is kept: the concatenation of `parts`, each [package name, path in its archive]."""

    file: str
    sha256: str
    size: int
    parts: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model (`kind` "causal-lm" or "encoder") or a data set ("data") of the manifest.

    `tied`: the parameter that is kept where a file holds one tied matrix twice, quantised twice: the copy of more bits.
    """

    name: str
    kind: str
    title: str
    licence: str
    notice: str = ""
    used_for: str
    hub: str = ""
    tied: str = ""
    packages: list[Package]
    members: list[Member]

    @property
    def version(self) -> str:
        """The packages and their versions, as pip writes them."""
        return ", ".join(f"{package.name}=={package.version}" for package in self.packages)

    @property
    def size(self) -> int:
        """Bytes to download; assets out of one package share its download."""
        return sum(package.size for package in self.packages)


def assets() -> dict[str, Asset]:
    """Return the manifest's assets by name, in its order."""
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    packages: dict[str, Package] = {}
    for name, entry in table["packages"].items():  # a pip stands before the package that it gets
        via = packages.get(entry.pop("via", ""))
        packages[name] = Package(name=name, via=via, **entry)
    entries = {}
    for name, entry in table["assets"].items():
        members = [Member(**member) for member in entry.pop("members")]
        used = dict.fromkeys(package for member in members for package, _ in member.parts)
        entries[name] = Asset(name=name, packages=[packages[package] for package in used], members=members, **entry)
    return entries


def asset(name: str) -> Asset:
    """Return an asset by name. Raises AssetError with the nearest name where there is none."""
    known = assets()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the assets are {', '.join(known)}"
    raise AssetError(f"unknown asset {name!r}; {hint}")
