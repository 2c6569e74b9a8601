"""The directives that pages are made from: {claims}, {claims-summary}, {findings}, {provenance} and others."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from isouq.pipeline import profiles
from isouq.studies import claims, verdicts
from isouq.studies.claims import Claim
from isouq.studies.results import Result
from isouq.studies.verdicts import CheckVerdict, Verdict

from . import findings, provenance
from .results import format_interval, format_number
from .roles import quote

_LOGGER = logging.getLogger(__name__)


class _OfClaims(SphinxDirective):
    """A directive that judges a file of claims by this run's results."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the nodes, or warn that the file of claims is not in order."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        try:
            stated = claims.load(path)
            return self.build(stated, verdicts.judge(stated, self.env.app.isouq_results.entries))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOGGER.warning("%s: %s", self.name, error, location=self.get_location())
            return []

    def build(self, stated: Sequence[Claim], judged: Mapping[str, Verdict]) -> list[nodes.Node]:
        """Return what stands in the page."""
        raise NotImplementedError


class Findings(_OfClaims):
    """{findings} FILE: a sentence for each claim that has one, chosen by its verdict, and how many claims hold.

    `claims` names those of which the first sentence is shown, in place of all.
    """

    option_spec: ClassVar[dict[str, Any]] = {"claims": directives.unchanged_required}

    def build(self, stated: Sequence[Claim], judged: Mapping[str, Verdict]) -> list[nodes.Node]:
        """Return a list of sentences, each with its claim and verdict, and the count."""
        only, entries = self.options.get("claims", "").split(), self.env.app.isouq_results.entries
        listing = nodes.bullet_list(classes=["findings"])
        for claim, text in findings.sentences(stated, judged, entries, only=only):
            outcome = _outcome(replace(judged[claim.id], reason=""))
            checks = findings.share(judged[claim.id])
            words = [nodes.Text(f"{text} ({claim.id}: "), outcome, nodes.Text(f", {checks})" if checks else ")")]
            listing += nodes.list_item("", nodes.paragraph("", "", *words))
        return [listing, _paragraph(findings.count(judged))]


class ClaimsSummary(_OfClaims):
    """{claims-summary} FILE: a row for each claim: its words, the verdict, one number here and in the paper."""

    def build(self, stated: Sequence[Claim], judged: Mapping[str, Verdict]) -> list[nodes.Node]:
        """Return the table."""
        rows = []
        for claim in stated:
            link = nodes.reference("", "", nodes.strong("", claim.id), refid=_id_of(claim), internal=True)
            name = nodes.paragraph("", "", link, nodes.Text(f" {claim.short}"))
            outcome = _outcome(replace(judged[claim.id], reason=""))
            verdict = [nodes.paragraph("", "", outcome), _paragraph(findings.share(judged[claim.id]), ["number-of"])]
            number, paper = [], []
            for label, here, printed in findings.rows(claim, judged[claim.id], self.env.app.isouq_results.entries):
                number += [_paragraph(here), _paragraph(label, ["number-of"])]
                paper.append(_paragraph(printed))
            rows.append([[name], verdict, number, paper])
        columns = {"Claim": 37, "Verdict": 15, "Numbers": 33, "In the paper": 15}
        return [_table(list(columns), list(columns.values()), rows, "summary")]


class Claims(_OfClaims):
    """{claims} FILE: every claim folded, with its verdict; inside the checks, the paper's words and the chapter."""

    def build(self, stated: Sequence[Claim], judged: Mapping[str, Verdict]) -> list[nodes.Node]:
        """Return an element that folds for each claim."""
        return [node for claim in stated for node in self._folded(claim, judged[claim.id])]

    def _folded(self, claim: Claim, verdict: Verdict) -> list[nodes.Node]:
        head = nodes.inline("", "", nodes.strong("", claim.id), nodes.Text(f" {claim.short or claim.id}: "))
        head += _outcome(verdict)
        target = nodes.target("", "", ids=[_id_of(claim)])  # inside, so that a link to it opens the claim
        words = [*self._words(claim.claim), nodes.Text(" "), *self._chapter(claim.chapter)]
        title = nodes.paragraph("", "", target, *words)
        paper = nodes.paragraph("", "", nodes.strong("", "In the paper: "), *self._words(claim.paper))
        notes = filter(None, (claim.note, claims.WRITTEN[claim.written]))
        small = [nodes.paragraph("", "", *self._words(note), classes=["claim-note"]) for note in notes]
        inside = [title, paper, _measurements(verdict, self.env.app.isouq_results.entries), *small]
        opened, closed = '<details class="claim"><summary>', "</details>"
        return [_html(opened), head, _html("</summary>"), *inside, _html(closed)]

    def _words(self, text: str) -> list[nodes.Node]:
        """The text read as Markdown, so that it may hold mathematics and links."""
        content = nodes.Element()
        self.state.nested_parse(StringList([text], self.arguments[0]), 0, content)
        return list(content.children[0].children)

    def _chapter(self, chapter: str) -> list[nodes.Node]:
        if not chapter:
            return [nodes.Text("no chapter yet")]
        name = chapter.rsplit("/", 1)[-1]
        if chapter not in self.env.found_docs:
            return [nodes.literal("", name), nodes.Text(" (not in this book yet)")]
        where = {"reftarget": f"/{chapter}", "refdoc": self.env.docname, "refexplicit": True}
        shown = nodes.literal("", name)
        return [addnodes.pending_xref("", shown, refdomain="std", reftype="doc", **where)]


class Provenance(SphinxDirective):
    """{provenance}: profile, commit, date, machine and versions behind the numbers of this book."""

    def run(self) -> list[nodes.Node]:
        """Build the box from the record in results.json."""
        rows = provenance.rows(self.env.app.isouq_results.meta)
        cells = [[[_paragraph(name)], [_paragraph(text)]] for name, text in rows]
        return [_table(["Record", "This book"], [25, 75], cells, "provenance")]


class Citation(SphinxDirective):
    """{citation} FILE: BibTeX of the paper and of this software with its version and run, from CITATION.cff."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build both entries."""
        file = profiles.CLONE / self.arguments[0]
        self.env.note_dependency(str(file))
        text = provenance.bibtex(yaml.safe_load(file.read_text(encoding="utf-8")), self.env.app.isouq_results.meta)
        return [nodes.literal_block(text, text, language="bibtex")]


class Budget(SphinxDirective):
    """{budget} FILE: the GPU hours and memory of a profile, as `isouq.pipeline.jobs budget --out FILE` kept them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the table from the file, since counting needs the questions and some time."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        cells = [[[_paragraph(text)] for text in row] for row in kept["rows"]]
        return [_table(kept["header"], [36, 16, 16, 16, 16], cells, "summary"), _paragraph(kept["basis"])]


class IntervalFigure(SphinxDirective):
    """{interval-figure} PATTERN ...: values with their intervals, a panel for each pattern, a row per method.

    A pattern is a key with {method} in it. The content is the caption; the text for screen readers is made
    from the values.
    """

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {
        "name": directives.unchanged_required,
        "titles": directives.unchanged_required,
        "methods": directives.unchanged_required,
        "xlabel": directives.unchanged_required,
        "reference": float,
    }

    def run(self) -> list[nodes.Node]:
        """Draw the figure into the build folder and refer to it from the page."""
        from . import figure

        entries = self.env.app.isouq_results.entries
        titles = [title.strip() for title in self.options["titles"].split("|")]
        methods = self.options["methods"].split()
        panels = figure.read_panels(self.arguments[0].split(), titles, methods, entries)
        if not panels:
            return [_paragraph("This run has no results for this figure.", classes=["result-absent"])]
        folder = Path(self.env.doctreedir) / "isouq_figures"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.options['name']}.svg"
        axis = {"xlabel": self.options["xlabel"], "reference": self.options.get("reference")}
        alt = figure.draw(panels, methods, file, **axis)
        here = Path(self.env.doc2path(self.env.docname)).parent
        image = nodes.image(uri=Path(os.path.relpath(file, here)).as_posix(), alt=alt)
        caption = nodes.caption()
        content = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, content)
        if content.children:
            caption += content.children[0].children
        shown = nodes.figure("", image, caption)
        self.set_source_info(shown)
        self.add_name(shown)
        return [shown]


class PublicNames(SphinxDirective):
    """{public-names} MODULE: every name in the module's `__all__`, functions first, with signature and docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Let autodoc write the entries, so that a name added to the package is on the page."""
        package, kinds = importlib.import_module(self.arguments[0]), ("function", "class", "module")
        entries: dict[str, list[str]] = {kind: [] for kind in kinds}
        for name in package.__all__:
            value = getattr(package, name)
            kind = kinds[inspect.isclass(value) + 2 * inspect.ismodule(value)]
            entries[kind] += [f".. auto{kind}:: {self.arguments[0]}.{name}", "   :members:" * (kind != "function"), ""]
        lines = ["```{eval-rst}", *(line for kind in kinds for line in entries[kind]), "```"]
        content = nodes.Element()
        self.state.nested_parse(StringList(lines, self.arguments[0]), 0, content)
        return list(content.children)


def _measurements(verdict: Verdict, entries: dict[str, Result]) -> nodes.Node:
    """Return a claim's checks, one item each: rule, value with its own 95 % interval and n, and the outcome."""
    listing = nodes.bullet_list(classes=["claim-checks"])
    for one in verdict.checks:
        words = nodes.paragraph("", "", *([nodes.strong("", "core"), nodes.Text(" ")] if one.check.core else []))
        words += nodes.Text(f"{one.check.label}, {one.check.region}: ")
        if one.check.key in entries:
            words += [quote(one.check.key, format_interval(entries[one.check.key])), nodes.Text(_simultaneous(one))]
        words += _outcome(one)
        if one.check.paper is not None:
            words += nodes.Text(f"; the paper's {one.check.paper} by this rule: {one.check.paper_outcome()}")
        listing += nodes.list_item("", words)
    return listing


def _simultaneous(one: CheckVerdict) -> str:
    if one.low is None or one.high is None:
        return "; "
    spec = ".2f" if max(abs(one.low), abs(one.high)) >= 0.01 else ""
    return f", with all checks [{format_number(one.low, spec)}, {format_number(one.high, spec)}]; "


def _outcome(verdict: Verdict | CheckVerdict) -> nodes.Node:
    words = f"{verdict.outcome} ({verdict.reason})" if verdict.reason else verdict.outcome
    return nodes.inline("", words, classes=["verdict", f"verdict-{verdict.outcome.replace(' ', '-')}"])


def _id_of(claim: Claim) -> str:
    return f"claim-{claim.id.lower()}"


def _html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


def _paragraph(text: str, classes: list[str] | None = None) -> nodes.paragraph:
    return nodes.paragraph("", text, classes=classes or [])


def _table(header: list[str], widths: list[int], rows: list[list[list[nodes.Node]]], style: str) -> nodes.table:
    group = nodes.tgroup("", cols=len(header))
    group += [nodes.colspec(colwidth=width) for width in widths]
    top = nodes.row("", *[nodes.entry("", _paragraph(name)) for name in header])
    body = nodes.tbody("", *[nodes.row("", *[nodes.entry("", *cell) for cell in row]) for row in rows])
    group += [nodes.thead("", top), body]
    return nodes.table("", group, classes=[f"{style}-table", "colwidths-given"])
