"""The roles {result} and {interval}: a number in prose, fetched from results.json when the book is built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from isouq.studies.results import Result

from .results import REQUEST, Results, load

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
        app.isouq_results = load(path)
        config.isouq_results_digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except ValueError as error:
        _LOGGER.warning("%s: %s", SOURCE, error)


def quote(key: str, shown: str) -> nodes.Node:
    """A number as it stands in a page: text, with the key of its result under the pointer."""
    return nodes.abbreviation(shown, shown, explanation=key, classes=["result"])


class ResultRole(SphinxRole):
    """A number by its key: `key`, `key:.3f` or `key:.3f|text when absent`.

    `write` makes the text of it: of {result} the value alone, of {interval} with its 95 % interval and examples.
    """

    def __init__(self, write: Callable[[Result, str], str]) -> None:
        self.write = write

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Put the number into the page, with its key as a tooltip, or warn that there is none."""
        request = REQUEST.fullmatch(self.text.strip())
        if request is None:
            return self._fail(f"{self.text!r} is not of the form key, key:format or key|text when absent")
        key, spec, absent = request.groups()
        entry = self.env.app.isouq_results.entries.get(key)
        if entry is None and absent is None:
            return self._fail(f"no result named {key!r} in the file that {SOURCE} names")
        if entry is None:
            return [nodes.inline(absent, absent, classes=["result-absent"])], []
        try:
            return [quote(key, self.write(entry, spec or ""))], []
        except ValueError as error:
            return self._fail(str(error))

    def _fail(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        _LOGGER.warning(f"{self.name}: {message}", location=self.get_location(), type="isouq", subtype="result")
        return [nodes.problematic(self.rawtext, self.rawtext)], []
