"""The built book on paper and for e-readers: one PDF, printed by Chromium, and one EPUB, built by Sphinx.

python book/paper.py pdf build/embedded/html
python book/paper.py epub build/embedded/html

Each lands beside the pages, and the first page offers what is there.
"""

import argparse
import base64
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromium
import ebook
import onepage
from build import source_of, sphinx

NAME = "isouq"
MERGED = "_paper.html"  # stands beside the pages while it is printed
WIDTH, HEIGHT, MARGIN = 8.27, 11.69, 0.67  # inches: A4
LINE = round((WIDTH - 2 * MARGIN) * 96)  # CSS pixels
SHEET = {"paperWidth": WIDTH, "paperHeight": HEIGHT, "marginLeft": MARGIN, "marginRight": MARGIN}
SHEET |= {"marginTop": MARGIN, "marginBottom": MARGIN, "printBackground": True, "displayHeaderFooter": True}
SHEET |= {"generateTaggedPDF": True, "generateDocumentOutline": True, "headerTemplate": "<span></span>"}
SHEET["footerTemplate"] = (
    '<div style="width: 100%; text-align: center; font-size: 8pt; color: #555"><span class="pageNumber"></span></div>'
)
# What stays wider than a line becomes smaller.
FIT = """document.querySelectorAll('table, .math mjx-container').forEach((wide) => {
  if (wide.parentElement.closest('table')) return;
  const ratio = wide.closest('section, .chapter').clientWidth / Math.max(wide.scrollWidth, wide.offsetWidth);
  if (ratio < 1) wide.style.zoom = Math.floor(100 * ratio) / 100;
})"""
# The contents get their page numbers from a first print; room for them is kept.
NUMBER = """(sheets) => document.querySelectorAll('.paper-contents a').forEach((line) => {
  line.querySelector('.sheet').textContent = sheets[line.getAttribute('href').slice(1)];
})"""


def pdf(html: Path) -> Path:
    """Print every page of the book in the folder `html` into its isouq.pdf."""
    file = html / f"{NAME}.pdf"
    with laid_out(html) as page:
        page.evaluate(f"({NUMBER})({json.dumps(sheets(printed(page)))})")
        file.write_bytes(printed(page))
    return file


def sheets(printed: bytes) -> dict[str, int]:
    """Place in the joined page → number of its sheet, as Chromium's PDF has it in plain words."""
    pages = [int(number) for number in re.findall(rb"\n(\d+) 0 obj\n<</Type /Page\n", printed)]
    found = re.search(rb"/Dests (\d+) 0 R", printed)
    if not pages or not found:
        raise RuntimeError("this version of Chromium writes its PDF in another way: page numbers cannot be read")
    table = re.search(rb"\n%s 0 obj\n(.*?)endobj" % found[1], printed, re.DOTALL)
    places = re.findall(rb"/(\S+) \[(\d+) 0 R", table[1] if table else b"")
    return {name.decode(): pages.index(int(page)) + 1 for name, page in places}


def epub(html: Path) -> Path:
    """Build the EPUB of the sources that lie beside the folder `html`, with formulas that need no script."""
    source, file = source_of(html), html / f"{NAME}.epub"
    made = sphinx(source, html.with_name("epub.log"), results=html.with_name("results.json"), builder="epub")
    with _browser(html, "index.html") as page:
        ebook.finish(made / f"{NAME}.epub", file, page)
    return file


@contextmanager
def laid_out(html: Path) -> Iterator[chromium.Page]:
    """The whole book as one page in a browser, laid out for paper; the folder is as before afterwards."""
    file = html / MERGED
    file.write_text(onepage.merge(html, source_of(html) / "_toc.yml"), encoding="utf-8")
    try:
        with _browser(html, MERGED) as page:
            page.call("Emulation.setEmulatedMedia", media="print")
            page.call("Emulation.setDeviceMetricsOverride", width=LINE, height=1000, deviceScaleFactor=1, mobile=False)
            page.evaluate(FIT)
            yield page
    finally:
        file.unlink()


def offer(html: Path) -> None:
    """Have the first page name the files that are there."""
    made = [html / f"{NAME}.{kind}" for kind in ("pdf", "epub")]
    links = [f'<a href="{file.name}">{file.suffix[1:].upper()}</a>' for file in made if file.exists()]
    index = html / "index.html"
    text = re.sub(r'<p class="editions">.*?</p>', "", index.read_text(encoding="utf-8"))
    line = f'<p class="editions">The whole book in one file: {" · ".join(links)}</p>'
    before, heading, after = text.partition('<article class="bd-article">')
    index.write_text(before + heading + after.replace("</h1>", f"</h1>{line}", 1), encoding="utf-8")


@contextmanager
def _browser(html: Path, name: str) -> Iterator[chromium.Page]:
    """A page of the book, open in a browser. Raises RuntimeError if it asked another host for something."""
    with (
        tempfile.TemporaryDirectory(prefix="isouq-", ignore_cleanup_errors=True) as profile,
        chromium.browse(Path(profile)) as page,
        chromium.serve(html) as address,
    ):
        page.open(f"{address}/{name}", seconds=300)
        foreign = [url for url in page.requests() if not url.startswith((address, "data:", "blob:"))]
        if foreign:
            raise RuntimeError(f"{name} asks for {foreign}: a book must hold all that it shows")
        yield page


def printed(page: chromium.Page) -> bytes:
    """The page as a PDF, which comes a megabyte at a time."""
    stream = page.call("Page.printToPDF", **SHEET, transferMode="ReturnAsStream")["stream"]
    pieces = []
    while True:
        answer = page.call("IO.read", handle=stream, size=2**20)
        pieces.append(base64.b64decode(answer["data"]))
        if answer["eof"]:
            return b"".join(pieces)


def main() -> None:
    """Make one edition of a built book."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("pdf", "epub"))
    parser.add_argument("html", type=Path, help="folder of the built book")
    options = parser.parse_args()
    try:
        file = {"pdf": pdf, "epub": epub}[options.kind](options.html)
    except (OSError, RuntimeError) as error:
        sys.exit(f"make {options.kind}: {error}")
    offer(options.html)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
