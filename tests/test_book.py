"""The built book, every page of it, in a real browser: what a reader sees, and what the page asks for."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import chromium
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("holds", "partly", "does not hold", "undecided", "not run")
ADDED_BY_SPHINX = ("genindex.html", "search.html", "py-modindex.html")


def pages_of(toc: Path) -> list[str]:
    """The pages of a table of contents, without their endings."""
    content = yaml.safe_load(toc.read_text())
    return [content["root"], *(chapter["file"] for part in content["parts"] for chapter in part["chapters"])]


def test_every_notebook_has_its_place_in_the_book():
    pages = set(pages_of(ROOT / "book" / "_toc.yml"))
    assert {f"notebooks/{file.stem}" for file in (ROOT / "notebooks").glob("*.ipynb")} <= pages


@dataclass
class Seen:
    """What one page did in the browser."""

    facts: dict
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


# Code is left out of the text: a dollar sign in it is no formula that was missed.
LOOK = """(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const prose = document.querySelector('main').cloneNode(true);
  prose.querySelectorAll('pre, code, script, style, mjx-container').forEach((element) => element.remove());
  return {
    formulas: all('.math').length,
    typeset: all('.math mjx-container').length,
    errors: all('mjx-merror, [data-mjx-error], .problematic, .system-message').map((e) => e.outerHTML),
    text: prose.textContent,
    code: all('article pre').map((e) => e.textContent).join('\\n'),
    folded: all('article details pre').map((e) => e.textContent).join('\\n'),
    ids: all('[id]').map((e) => e.id),
    fetched: all('link[href], script[src], img[src], iframe[src], source[src], object[data]')
      .map((e) => e.href || e.src || e.data).filter((url) => !/^(data|blob):/.test(url)),
    links: all('a[href]').map((e) => e.getAttribute('href')),
    images: all('article img').map((e) => ({
      source: e.getAttribute('src'), alt: e.alt, width: e.naturalWidth,
      caption: e.closest('figure')?.querySelector('figcaption')?.textContent ?? '',
      background: getComputedStyle(e).backgroundColor})),
    verdicts: all('details.claim > summary .verdict').map((e) => e.textContent),
    footer: document.querySelector('.numbers-from')?.textContent ?? '',
    width: document.documentElement.scrollWidth,
  };
})()"""


@pytest.fixture(scope="session")
def book(smoke) -> Path:
    return smoke / "html"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with chromium.browse(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="session")
def address(book):
    with chromium.serve(book) as base:
        yield base


@pytest.fixture(scope="session")
def seen(book, browser, address) -> dict[str, Seen]:
    """Every page of the book, opened once, in dark mode and no wider than a phone."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.call("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    found = {}
    for file in sorted(book.rglob("*.html")):
        name = file.relative_to(book).as_posix()
        if name.startswith("_"):  # a piece of the theme, no page
            continue
        browser.open(f"{address}/{name}")
        browser.evaluate("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().catch(() => 0))))")
        found[name] = Seen(browser.evaluate(LOOK), browser.requests(), browser.complaints())
    return found


@pytest.fixture(scope="session")
def pages(seen, book) -> dict[str, Seen]:
    """The pages that somebody wrote, without the indices that Sphinx adds."""
    return {
        name: page for name, page in seen.items() if name not in ("genindex.html", "search.html", "py-modindex.html")
    }


def notebook_pages(pages: dict[str, Seen]) -> dict[str, Seen]:
    return {name: page for name, page in pages.items() if name.startswith("notebooks/")}


@pytest.mark.book
def test_the_book_has_just_the_pages_of_its_table_of_contents(pages, book):
    wanted = pages_of(book.parent / "book" / "_toc.yml")
    assert sorted(pages) == sorted(f"{name}.html" for name in wanted)
    ran = {f"notebooks/{file.stem}.html" for file in (book.parent / "notebooks").glob("*.ipynb")}
    assert set(notebook_pages(pages)) == ran
    assert len(ran) >= 2


@pytest.mark.book
def test_every_formula_is_typeset(pages):
    for name, page in pages.items():
        assert page.facts["typeset"] == page.facts["formulas"], name
        assert not page.facts["errors"], f"{name}: {page.facts['errors'][0]}"
        assert not re.search(r"\$\$|\\\(|\\\[|\{(result|interval|eq|cite:[pt])\}", page.facts["text"]), name
    for name in ["index.html", "notation.html", *notebook_pages(pages)]:
        assert pages[name].facts["typeset"] > 0, name


@pytest.mark.book
def test_no_page_complains_or_asks_another_host(seen, address):
    for name, page in seen.items():
        assert not page.complaints, f"{name}: {page.complaints}"
        assert len(page.requests) > 1, f"{name}: the network was not watched"
        asked = page.requests + page.facts["fetched"]  # also what a browser may fetch only later
        foreign = [url for url in asked if not url.startswith((address + "/", "data:", "blob:"))]
        assert not foreign, f"{name}: {foreign}"


@pytest.mark.book
def test_every_internal_link_and_anchor_resolves(seen, book):
    broken = []
    for name, page in seen.items():
        for link in page.facts["links"]:
            target = urlsplit(urljoin(f"http://book/{name}", link))
            if target.netloc != "book" or target.scheme != "http":
                continue
            path = unquote(target.path).lstrip("/") or "index.html"
            if not (book / path).is_file():
                broken.append(f"{name}: {link}: no such file")
            elif target.fragment and path in seen and unquote(target.fragment) not in seen[path].facts["ids"]:
                broken.append(f"{name}: {link}: no such place")
    assert not broken, "\n".join(broken)


@pytest.mark.book
def test_every_figure_loads_and_has_a_caption_words_and_a_white_card(pages):
    figures = [(name, image) for name, page in pages.items() for image in page.facts["images"]]
    for name, image in figures:
        where = f"{name}: {image['source']}"
        assert image["width"] > 0, f"{where} does not load"
        assert image["caption"].strip(), f"{where} has no caption"
        assert len(image["alt"].split()) >= 3, f"{where}: alt text {image['alt']!r}"
        assert "_images" not in image["alt"], f"{where} has no alt text"
        assert image["background"] == "rgb(255, 255, 255)", f"{where} is not on white in dark mode"
    with_figures = {name for name, _ in figures}
    assert set(notebook_pages(pages)) <= with_figures


@pytest.mark.book
def test_no_page_is_wider_than_a_phone(pages):
    assert not {name: page.facts["width"] for name, page in pages.items() if page.facts["width"] > 420}


def press(browser, key: str, code: int, text: str = "") -> None:
    """Press a key on what has the focus."""
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)


@pytest.mark.book
def test_the_sliders_move_by_keyboard_and_say_what_they_show(browser, address):
    browser.open(f"{address}/notebooks/01_derivation.html")
    said, place = (
        f"document.querySelector('.isouq-maps {what}"
        for what in (".said').textContent", ".moving').style.backgroundPositionY")
    )
    before = browser.evaluate(said), browser.evaluate(place)
    assert "correlation with ‖g‖: 1.00" in before[0]
    browser.evaluate("document.querySelectorAll('.isouq-maps input')[1].focus()")
    press(browser, "ArrowRight", 39)
    slider = "document.activeElement.getAttribute('aria-valuetext')"
    assert browser.evaluate(slider) == "2 times"
    assert browser.evaluate(said) != before[0]
    assert browser.evaluate(place) != before[1]
    press(browser, "ArrowLeft", 37)
    assert (browser.evaluate(said), browser.evaluate(place)) == before
    assert not browser.complaints()


@pytest.mark.book
def test_the_answers_sort_and_filter_by_keyboard(browser, address):
    browser.open(f"{address}/notebooks/04_llm_qa.html")
    shown = """[...document.querySelectorAll('.isouq-browser tbody tr')].filter((row) => !row.hidden)
      .map((row) => [...row.cells].map((cell) => cell.textContent))"""
    heads = browser.evaluate("[...document.querySelectorAll('.isouq-browser th')].map((head) => head.textContent)")
    column, of_set, first = heads.index("S"), heads.index("data set"), browser.evaluate(shown)
    assert len({row[of_set] for row in first}) > 1
    for order, sign in {"ascending": 1, "descending": -1}.items():
        browser.evaluate(f"document.querySelectorAll('.isouq-browser th button')[{column}].focus()")
        press(browser, "Enter", 13, "\r")
        assert browser.evaluate("document.activeElement.parentElement.getAttribute('aria-sort')") == order
        values = [sign * float(row[column]) for row in browser.evaluate(shown) if row[column]]
        assert values == sorted(values)
    assert sorted(browser.evaluate(shown)) == sorted(first)
    browser.evaluate("document.querySelectorAll('.isouq-browser select')[1].focus()")
    press(browser, "ArrowDown", 40)
    wanted = browser.evaluate("document.activeElement.value")
    assert {row[of_set] for row in browser.evaluate(shown)} == {wanted}
    said = browser.evaluate("document.querySelector('.isouq-browser .said').textContent")
    assert said == f"{sum(row[of_set] == wanted for row in first)} of {len(first)} rows"
    assert not browser.complaints()


@pytest.mark.book
def test_the_first_page_is_light(pages, book, address):
    """As a server sends it, compressed, before MathJax and fonts."""
    asked = {urlsplit(url).path.lstrip("/") for url in pages["index.html"].requests if url.startswith(address)}
    files = [book / unquote(path) for path in asked if "mathjax" not in path and "woff" not in path]
    sizes = {file.name: len(gzip.compress(file.read_bytes())) for file in files if file.is_file()}
    assert len(sizes) > 5
    assert sum(sizes.values()) <= 500_000, sizes


@pytest.mark.book
def test_icons_show_without_their_script(browser, address):
    browser.open(f"{address}/index.html")
    shown = "getComputedStyle(document.querySelector('.fa-solid'), '::before').content"
    assert browser.evaluate(shown) not in ("none", "normal", "")


@pytest.mark.book
def test_the_search_finds_a_word_without_another_host(browser, address):
    browser.open(f"{address}/search.html?q=isotropy")
    browser.wait("document.querySelectorAll('#search-results li').length > 0")
    assert all(url.startswith(address) or url.startswith("data:") for url in browser.requests())


@pytest.mark.book
def test_each_page_says_which_run_its_numbers_come_from(pages, book):
    meta = json.loads((book.parent / "results.json").read_text())["meta"]
    for name, page in pages.items():
        assert f"profile smoke, commit {meta['commit'][:10]}" in page.facts["footer"], name
    for name, page in notebook_pages(pages).items():
        assert 'profile = "smoke"' in page.facts["folded"], f"{name} does not have its run's parameters, folded"
        assert page.facts["code"].count("\nresults_path = ") == 1, f"{name} shows the defaults too"


@pytest.mark.book
def test_every_claim_has_a_verdict_from_the_fixed_set(pages):
    page = pages["claims.html"]
    for number in range(1, 11):
        assert f"claim-c{number}" in page.facts["ids"]
    assert len(page.facts["verdicts"]) == 10
    for verdict in page.facts["verdicts"]:
        assert verdict.startswith(OUTCOMES), verdict


@pytest.mark.book
def test_no_executed_notebook_holds_an_error(book):
    for file in (book.parent / "notebooks").glob("*.ipynb"):
        outputs = [out for cell in json.loads(file.read_text())["cells"] for out in cell.get("outputs", [])]
        assert outputs, f"{file.name} was not executed"
        assert not [out for out in outputs if out["output_type"] == "error"], file.name
        assert not [out for out in outputs if out.get("name") == "stderr"], file.name


@pytest.mark.book
def test_no_built_file_knows_where_it_was_built(book):
    places = {str(ROOT), str(Path.home())} - {"/"}
    texts = {".html", ".js", ".css", ".json", ".txt", ".ipynb", ".md", ".svg"}
    for file in (*book.rglob("*"), *(book.parent / "notebooks").glob("*.ipynb"), book.parent / "results.json"):
        if file.suffix in texts:
            content = file.read_text(errors="replace")
            assert not [place for place in places if place in content], file
