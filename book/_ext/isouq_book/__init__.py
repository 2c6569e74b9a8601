"""Sphinx extension of the book: every number on a page, and every verdict, is made from results.json."""

from __future__ import annotations

import html
from importlib import metadata
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

from . import provenance
from .directives import Budget, Citation, Claims, ClaimsSummary, Findings, IntervalFigure, Provenance, PublicNames
from .results import format_interval, format_number
from .roles import ResultRole, load_results

LICENCES = "Code: MIT. Text and figures: CC BY 4.0."


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the roles, the directives and the footer."""
    app.add_config_value("isouq_results_digest", "", "env")
    app.connect("config-inited", load_results)
    app.connect("config-inited", _name_the_book)
    app.connect("html-page-context", _finish_page, priority=900)  # after Jupyter Book
    app.add_role("result", ResultRole(lambda entry, spec: format_number(entry.value, spec)))
    app.add_role("interval", ResultRole(format_interval))
    app.add_directive("claims", Claims)
    app.add_directive("claims-summary", ClaimsSummary)
    app.add_directive("findings", Findings)
    app.add_directive("provenance", Provenance)
    app.add_directive("budget", Budget)
    app.add_directive("citation", Citation)
    app.add_directive("interval-figure", IntervalFigure)
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _name_the_book(app: Sphinx, config: Config) -> None:
    """Give the EPUB its title and version, which Jupyter Book sets for pages only."""
    config.project = config.epub_title = config.html_title
    config.version = config.release = metadata.version("isouq")


def _finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Name the run at the foot of a page, and mend what docutils and Jupyter Book put into it."""
    line = html.escape(provenance.footer(app.isouq_results.meta, page))
    context["theme_extra_footer"] = f'<p class="numbers-from">{line}<br>{LICENCES}</p>'
    # A list of references has items: docutils gives its entries a role that is out of use, and not theirs.
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    # Without the scripts that run code on another host: Jupyter Book adds them even where they are not used.
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if not _is_of_thebe(file)]


def _is_of_thebe(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "thebe" in f"{getattr(file, 'filename', file)} {body}".lower()
