"""The roles {result} and {interval}: a number in prose, fetched from results.json when the book is built."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from . import results as results_module
from .results import Entry, Results

_LOGGER = logging.getLogger(__name__)
SOURCE = "ISOUQ_RESULTS"


def load_results(app: Sphinx, config: Config) -> None:
    """Read the file that ISOUQ_RESULTS names, once per build.

    A file that cannot be read is a warning, so that a build with -W fails; so is every key asked of it. The
    file's hash becomes a setting of the book, so that other numbers make Sphinx read every page again.
    """
    app.isouq_results = Results()
    path = os.environ.get(SOURCE, "")
    if not path:
        _LOGGER.warning("%s is not set: name the results.json that the book is to show", SOURCE)
        return
    try:
        app.isouq_results = results_module.load(path)
        config.isouq_results_digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except ValueError as error:
        _LOGGER.warning("%s: %s", SOURCE, error)


def quote(key: str, shown: str) -> nodes.Node:
    """A number as it stands in a page: text, with the key of its result under the pointer."""
    return nodes.abbreviation(shown, shown, explanation=key, classes=["result"])


class ResultRole(SphinxRole):
    """{result}`key`, {result}`key:.3f` or {result}`key|text when absent`: the value alone."""

    def write(self, entry: Entry, spec: str) -> str:
        """The text that stands in the page."""
        return results_module.format_number(entry.value, spec)

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Put the number into the page, with its key as a tooltip, or warn that there is none."""
        try:
            request = results_module.parse_request(self.text)
            entry = self.env.app.isouq_results.entries.get(request.key)
            if entry is not None:
                shown = self.write(entry, request.spec)
                return [quote(request.key, shown)], []
        except ValueError as error:
            return self._fail(f"{self.name}: {error}")
        if request.absent is not None:
            return [nodes.inline(request.absent, request.absent, classes=["result-absent"])], []
        return self._fail(f"{self.name}: no result named {request.key!r} in the file that {SOURCE} names")

    def _fail(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        _LOGGER.warning(message, location=self.get_location(), type="isouq", subtype="result")
        return [nodes.problematic(self.rawtext, self.rawtext)], []


class IntervalRole(ResultRole):
    """{interval}`key`: the value with its 95 % interval and the number of examples."""

    def write(self, entry: Entry, spec: str) -> str:
        """The text that stands in the page."""
        return results_module.format_interval(entry, spec)
