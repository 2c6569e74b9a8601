"""Sphinx extension of the book: every number on a page, and every verdict, is made from results.json."""

from __future__ import annotations

import html
from typing import Any

from sphinx.application import Sphinx

from . import provenance
from .directives import Budget, Citation, Claims, ClaimsSummary, Findings, IntervalFigure, Provenance, PublicNames
from .roles import IntervalRole, ResultRole, load_results


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the roles, the directives and the footer."""
    app.add_config_value("isouq_results_digest", "", "env")
    app.connect("config-inited", load_results)
    app.connect("html-page-context", _add_footer)
    app.connect("html-page-context", _drop_thebe, priority=900)
    app.add_role("result", ResultRole())
    app.add_role("interval", IntervalRole())
    app.add_directive("claims", Claims)
    app.add_directive("claims-summary", ClaimsSummary)
    app.add_directive("findings", Findings)
    app.add_directive("provenance", Provenance)
    app.add_directive("budget", Budget)
    app.add_directive("citation", Citation)
    app.add_directive("interval-figure", IntervalFigure)
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _add_footer(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    line = html.escape(provenance.footer(app.isouq_results.meta, page))
    context["theme_extra_footer"] = f'<p class="numbers-from">{line}</p>'


def _drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out the scripts that run code on another host: Jupyter Book adds them even where they are not used."""
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if not _is_of_thebe(file)]


def _is_of_thebe(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "thebe" in f"{getattr(file, 'filename', file)} {body}".lower()
