"""Join the pages of a built book into one, for paper: a title, the contents, a chapter per page, links within."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

# What a reader only clicks; the code that a page folds away, too. A folded solution is opened.
ON_SCREEN_ONLY = ("headerlink", "above-input", "editions", "onlyprint")
FRONT = "<p>The book on paper. Code that its pages fold away is left out; their solutions of exercises are shown.</p>"


def merge(html: Path, toc: Path) -> str:
    """The pages of the book in `html`, in the order of its table of contents, as the text of one page."""
    parts = chapters(yaml.safe_load(toc.read_text(encoding="utf-8")))
    names = [name for _, group in parts for name in group]
    articles = {name: article(html, name, names) for name in names}
    page = _read(html / f"{names[0]}.html")
    title = articles[names[0]].find("h1").get_text()
    head = [f"<title>{title}</title>", *(str(link) for link in page.find_all("link", rel="stylesheet"))]
    head += [str(script) for script in page.find_all("script") if "mathjax" in str(script).lower()]
    front = f'<header><p class="title">{title}</p>{FRONT}{page.find(class_="numbers-from") or ""}</header>'
    body = [front, _contents(page, parts, articles), *articles.values()]
    return (
        '<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light">'
        f'<head><meta charset="utf-8">{"".join(head)}</head><body class="paper"><main class="bd-content">'
        f'<article class="bd-article">{"".join(map(str, body))}</article></main></body></html>'
    )


def chapters(toc: dict) -> list[tuple[str, list[str]]]:
    """Each part's caption and pages, the first page by itself."""
    parts = [(part["caption"], [chapter["file"] for chapter in part["chapters"]]) for part in toc["parts"]]
    return [("", [toc["root"]]), *parts]


def article(html: Path, name: str, names: Sequence[str]) -> Tag:
    """One page's text, with names and addresses that hold in the joined page."""
    content = _read(html / f"{name}.html").find("article", class_="bd-article")
    content.name, content.attrs = "div", {"class": "chapter", "id": _place(name)}
    for tag in [*content.find_all(class_=ON_SCREEN_ONLY), *content.find_all(["script", "noscript"])]:
        tag.decompose()
    for tag in content.find_all("details"):
        tag["open"] = ""
    for tag in content.find_all(id=True):
        tag["id"] = _place(name, tag["id"])
    for tag in content.find_all(["a", "img"]):
        _lead(tag, name, names)
    return content


def _lead(tag: Tag, name: str, names: Sequence[str]) -> None:
    """Let a link or a picture of the page `name` lead where it led."""
    attribute = "src" if tag.name == "img" else "href"
    if not tag.get(attribute):
        return
    target = urlsplit(urljoin(f"http://book/{name}.html", tag[attribute]))
    if target.netloc != "book":
        return
    path = unquote(target.path).lstrip("/")
    if tag.name == "img":
        tag["src"] = path
    elif (page := path.removesuffix(".html")) in names:
        tag["href"] = f"#{_place(page, unquote(target.fragment))}"
    else:
        tag.unwrap()  # an index of the site, or a file of it, is not on paper


def _contents(page: BeautifulSoup, parts: list[tuple[str, list[str]]], articles: dict[str, Tag]) -> Tag:
    """The list of parts, chapters and their sections."""
    nav = page.new_tag("nav", attrs={"class": "paper-contents", "aria-label": "Contents"})
    for caption, names in parts:
        nav.append(page.new_tag("p", string=caption, attrs={"class": "part"}))
        for head in (head for name in names for head in articles[name].find_all(["h1", "h2"])):
            section = head.find_parent("section")
            line = page.new_tag("a", attrs={"class": f"to-{head.name}", "href": f"#{section['id']}"})
            line.extend([page.new_tag("span", string=head.get_text()), page.new_tag("span", attrs={"class": "sheet"})])
            nav.append(line)
    return nav


def _place(name: str, anchor: str = "") -> str:
    page = name.replace("/", "-")
    return f"{page}--{anchor}" if anchor else page


def _read(file: Path) -> BeautifulSoup:
    return BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
