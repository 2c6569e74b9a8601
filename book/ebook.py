"""Finish the EPUB that Sphinx wrote: formulas as MathML, no scripts, and markup that strict readers accept."""

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from bs4 import BeautifulSoup, Tag

import chromium

SHEETS = {"pygments.css", "epub.css", "book.css"}
TEX = re.compile(r"\s*\\(?:\((?P<inline>.*)\\\)|\[(?P<display>.*)\\\])\s*", re.DOTALL)


def finish(source: Path, target: Path, page: chromium.Page) -> None:
    """Write `source` to `target`, finished; `page` is open where MathJax is."""
    with zipfile.ZipFile(source) as book:
        members = {name: book.read(name) for name in book.namelist()}
    pages = {name: _parsed(body) for name, body in members.items() if name.endswith(".xhtml") and name != "nav.xhtml"}
    with_formulas = [name for name, content in pages.items() if content.find(class_="math")]
    _set_formulas(pages.values(), page)
    for name, content in pages.items():
        _tidy(content)
        members[name] = str(content).encode()
    for name in members:
        if name.endswith(".svg"):  # matplotlib names a picture after its content, which may occur twice
            members[name] = re.sub(rb'(<image[^>]*?) id="[^"]*"', rb"\1", members[name])
    members["content.opf"] = _declared(members["content.opf"].decode(), with_formulas).encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as book:
        for name, body in members.items():
            book.writestr(name, body, zipfile.ZIP_STORED if name == "mimetype" else None)


def _set_formulas(pages: Iterable[BeautifulSoup], page: chromium.Page) -> None:
    """Replace every formula by MathJax's MathML, which keeps the TeX as a note."""
    places = [(tag, TEX.search(tag.get_text())) for content in pages for tag in content.find_all(class_="math")]
    asked = [[tex["display"] or tex["inline"], tex["display"] is not None] for _, tex in places if tex]
    script = f"Promise.all({json.dumps(asked)}.map(([tex, display]) => MathJax.tex2mmlPromise(tex, {{display}})))"
    for (tag, _), markup in zip(places, page.evaluate(script), strict=True):
        number = tag.find(class_="eqno")
        tag.clear()
        tag.append(BeautifulSoup(markup, "html.parser"))
        if number:
            tag.insert(0, number)


def _tidy(content: BeautifulSoup) -> None:
    """Take out what only a website needs."""
    content.html["lang"] = content.html["xml:lang"] = "en"
    for tag in content.find_all(["script", "style"]):
        tag.decompose()
    for tag in content.find_all("link", rel="stylesheet"):
        if tag["href"].rsplit("/", 1)[-1] not in SHEETS:
            tag.decompose()
    for tag in content.find_all("meta", attrs={"name": "viewport"}):
        tag.decompose()
    for tag in content.find_all(["td", "th", "tr"]):
        for attribute in ("valign", "halign"):  # of pandas
            del tag[attribute]
    for tag in content.find_all("summary"):
        _to_one_line(tag)


def _to_one_line(summary: Tag) -> None:
    """The words of a fold; a notebook's has other words for when it is open."""
    words = (summary.find(class_="collapsed") or summary).get_text().strip()
    summary.attrs.clear()
    summary.string = words


def _declared(package: str, with_formulas: Iterable[str]) -> str:
    """The list of contents, which says where there is MathML."""
    for name in with_formulas:
        package = package.replace(f'href="{name}" media', f'href="{name}" properties="mathml" media')
    return package


def _parsed(body: bytes) -> BeautifulSoup:
    return BeautifulSoup(body.decode(), "html.parser")
