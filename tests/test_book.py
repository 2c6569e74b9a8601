"""The built book, every page of it, in a real browser: what a reader sees, and what the page asks for."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import re
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml

import chromium
import paper
from build import source_of

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
    cut: dict[int, list[str]] = field(default_factory=dict)
    barriers: dict[str, list[str]] = field(default_factory=dict)


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

# Code and tables that leave the window, or a box around them that does not scroll.
CUT = """(() => {
  document.querySelectorAll('details').forEach((e) => (e.open = true));
  const end = (e) => e.getBoundingClientRect().left + Math.max(e.scrollWidth, e.offsetWidth);
  const cut = (e) => {
    for (let box = e; box; box = box.parentElement) {
      const scrolls = /auto|scroll/.test(getComputedStyle(box).overflowX);
      if (scrolls && end(box) + 2 >= end(e)) return box.getBoundingClientRect().right > innerWidth;
      if (getComputedStyle(box).overflowX !== 'visible' && end(e) > box.getBoundingClientRect().right + 1) return true;
    }
    return end(e) > innerWidth + 1;
  };
  return [...document.querySelectorAll('article :is(pre, table)')].filter(cut).map((e) => e.outerHTML.slice(0, 200));
})()"""

# Contrast is slow to measure: one token of each kind and two rows of each table of results stand for the others.
THIN = """(() => {
  const seen = new Set();
  document.querySelectorAll('pre span[class], .sig span[class], mjx-container').forEach((e) => {
    const kind = `${e.parentElement.className} ${e.tagName} ${e.className}`;
    seen.has(kind) ? e.replaceWith(e.textContent) : seen.add(kind);
  });
  document.querySelectorAll('.dataframe tbody tr:nth-child(n+3)').forEach((e) => e.remove());
  document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important; }</style>');
})()"""
AUDIT = """axe.run(document, %s).then((found) => found.violations
  .filter((one) => ['serious', 'critical'].includes(one.impact))
  .map((one) => `${one.id}: ${one.nodes[0].html.slice(0, 200)} ${one.nodes[0].failureSummary}`))"""
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"
PHONE, DESK = 390, 1280


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


def screen(browser, *, width: int, mode: str) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])


def audit(browser) -> dict[str, list[str]]:
    """What axe-core finds serious or critical on the open page, by the mode it is shown in. Thins the page."""
    browser.evaluate(AXE.read_text() + "; true")
    found = {"both": browser.evaluate(AUDIT % "{rules: {'color-contrast': {enabled: false}}}")}
    browser.evaluate(THIN)
    for mode in ("dark", "light"):
        screen(browser, width=DESK, mode=mode)
        browser.wait(f"document.documentElement.dataset.theme === '{mode}'")
        found[mode] = browser.evaluate(AUDIT % "{runOnly: ['color-contrast']}")
    return {mode: wrong for mode, wrong in found.items() if wrong}


@pytest.fixture(scope="session")
def seen(book, browser, address) -> dict[str, Seen]:
    """Every page of the book, opened once: looked at on a phone in dark mode, then on a desk in both modes."""
    found = {}
    for file in sorted(book.rglob("*.html")):
        name = file.relative_to(book).as_posix()
        if name.startswith("_"):  # a piece of the theme, no page
            continue
        screen(browser, width=PHONE, mode="dark")
        browser.open(f"{address}/{name}")
        browser.evaluate("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().catch(() => 0))))")
        found[name] = Seen(browser.evaluate(LOOK), browser.requests(), browser.complaints())
        found[name].cut[PHONE] = browser.evaluate(CUT)
        screen(browser, width=DESK, mode="dark")
        found[name].cut[DESK] = browser.evaluate(CUT)
        found[name].barriers = audit(browser)
    return found


@pytest.fixture(scope="session")
def pages(seen, book) -> dict[str, Seen]:
    """The pages that somebody wrote, without the indices that Sphinx adds."""
    return {name: page for name, page in seen.items() if name not in ADDED_BY_SPHINX}


def notebook_pages(pages: dict[str, Seen]) -> dict[str, Seen]:
    return {name: page for name, page in pages.items() if name.startswith("notebooks/")}


@pytest.mark.book
def test_the_book_has_just_the_pages_of_its_table_of_contents(pages, book):
    wanted = pages_of(source_of(book) / "_toc.yml")
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
    assert not {name: page.facts["width"] for name, page in pages.items() if page.facts["width"] > PHONE}


@pytest.mark.book
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_code_and_no_table_is_cut_without_a_scrollbar(pages, width):
    assert not {name: page.cut[width] for name, page in pages.items() if page.cut[width]}


@pytest.mark.book
def test_no_page_has_a_serious_barrier_in_light_or_dark(seen):
    assert not {name: page.barriers for name, page in seen.items() if page.barriers}


KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


def press(browser, key: str) -> None:
    """Press a key on what has the focus."""
    text = {"text": "\r"} if key == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)


@pytest.mark.book
def test_a_page_can_be_walked_and_a_fold_opened_by_keyboard(browser, address):
    screen(browser, width=DESK, mode="light")
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.open(f"{address}/notebooks/01_derivation.html")
    press(browser, "Tab")
    assert browser.evaluate("document.activeElement.getAttribute('href')") == "#main-content"
    press(browser, "Enter")
    walk = "[...document.querySelectorAll('article :is(a[href], summary, button, [tabindex=\"0\"])')]"
    seen = "filter((e) => e.checkVisibility({checkVisibilityCSS: true}))"
    wanted = browser.evaluate(f"(window.stops = {walk}.{seen}, stops.length)")
    reached = []
    for _ in range(3 * wanted):
        press(browser, "Tab")
        reached.append(browser.evaluate("stops.indexOf(document.activeElement)"))
        if reached[-1] == wanted - 1:
            break
    assert [stop for stop in reached if stop >= 0] == list(range(wanted))
    browser.evaluate("document.querySelector('article summary').focus()")
    press(browser, "Enter")
    assert browser.evaluate("document.querySelector('article details').open")


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
    press(browser, "ArrowRight")
    slider = "document.activeElement.getAttribute('aria-valuetext')"
    assert browser.evaluate(slider) == "2 times"
    assert browser.evaluate(said) != before[0]
    assert browser.evaluate(place) != before[1]
    press(browser, "ArrowLeft")
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
        press(browser, "Enter")
        assert browser.evaluate("document.activeElement.parentElement.getAttribute('aria-sort')") == order
        values = [sign * float(row[column]) for row in browser.evaluate(shown) if row[column]]
        assert values == sorted(values)
    assert sorted(browser.evaluate(shown)) == sorted(first)
    browser.evaluate("document.querySelectorAll('.isouq-browser select')[1].focus()")
    press(browser, "ArrowDown")
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


OFF_PAPER = f"""[...document.querySelectorAll('article :is(pre, table, img, mjx-container)')]
  .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > {paper.LINE + 1}
    || e.matches('pre') && e.scrollWidth > e.clientWidth + 1)
  .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.mark.book
def test_the_printed_book_is_whole_and_fits_its_sheets(book):
    with paper.laid_out(book) as page:
        facts, off = page.evaluate(LOOK), page.evaluate(OFF_PAPER)
        contents = page.evaluate("[...document.querySelectorAll('.paper-contents a')].map((e) => e.hash.slice(1))")
        printed = paper.printed(page)
    assert not off
    assert facts["typeset"] == facts["formulas"] > 100
    assert not facts["errors"]
    for name in pages_of(source_of(book) / "_toc.yml"):
        assert name.replace("/", "-") in facts["ids"]
    assert len(set(facts["ids"])) == len(facts["ids"]), "a link would lead to the first of two places"
    links = [unquote(link[1:]) for link in facts["links"] if link.startswith("#")]
    assert set(links) <= set(facts["ids"])
    assert all(link.startswith(("#", "http", "mailto")) for link in facts["links"])
    sheets = [paper.sheets(printed)[place] for place in contents]
    assert sheets == sorted(sheets)
    assert sheets[-1] > len(pages_of(source_of(book) / "_toc.yml"))
    assert printed.count(b"/FontFile") == printed.count(b"/Subtype /CIDFont") > 0, "each font comes with its file"
    assert not (book / paper.MERGED).exists()


@pytest.mark.book
def test_the_ebook_is_strict_and_needs_no_script(book):
    with zipfile.ZipFile(paper.epub(book)) as made:
        members = {name: made.read(name) for name in made.namelist()}
    assert next(iter(members)) == "mimetype"
    pages = {name: ET.fromstring(body) for name, body in members.items() if name.endswith((".xhtml", ".opf"))}
    listed = [item for item in pages.pop("content.opf").iter() if item.get("media-type")]
    items = {item.get("href"): item.get("properties") for item in listed}
    assert {f"{name}.xhtml" for name in pages_of(source_of(book) / "_toc.yml")} <= set(items) <= set(members)
    for name, page in pages.items():
        tags = [element.tag.rpartition("}")[2] for element in page.iter()]
        assert not {"script", "iframe"} & set(tags), name
        assert ("math" in tags) == (items.get(name) == "mathml"), name
        assert "merror" not in tags, name
        assert not [tag for tag in page.iter() if tag.get("class", "").startswith("math") and not len(tag)], name
        sources = [element.get("src", "") for element in page.iter()]
        assert not [source for source in sources if "//" in source], name


@pytest.mark.parametrize("made", [[], ["pdf"], ["pdf", "epub"]])
def test_the_first_page_offers_what_is_there(tmp_path, made):
    index = tmp_path / "index.html"
    index.write_text('<h1>x</h1><article class="bd-article"><h1>Title</h1><p>text</p></article>')
    for kind in made:
        (tmp_path / f"isouq.{kind}").write_text("")
        paper.offer(tmp_path)
        paper.offer(tmp_path)
    links = re.findall(r'href="isouq\.(\w+)"', index.read_text())
    assert links == made
    assert index.read_text().count("editions") == bool(made)
