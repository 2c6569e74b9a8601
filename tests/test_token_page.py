"""What isouq.plotting shows: the page of tokens, read as a browser reads it, and the figure of layers."""

import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

from isouq import plotting

matplotlib.use("agg")


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of each token."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.shown = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.shown.append("")

    def handle_endtag(self, tag):
        self.handle_starttag("", ())

    def handle_data(self, data):
        self.shown[-1] += data

    def tokens(self):
        both = zip(self.tags, self.shown, strict=True)
        return [(text, attributes) for (tag, attributes), text in both if tag == "span" and "tabindex" in attributes]


@pytest.fixture
def table():
    columns = ["example", "token", "log_prob", "aleatoric", "log_epistemic"]
    texts = ["<script>", ' "a&b"', "\n", "", "é"]
    rows = [[i // 3, text, -float(i), 0.01 * i, [3.0, -1.0, -np.inf, 2.0, 7.0][i]] for i, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=columns)


def test_every_token_can_be_reached_and_says_its_text_and_its_numbers(table):
    tokens = Page(plotting.tokens(table)).tokens()
    assert [text for text, _ in tokens] == ["<script>", ' "a&b"', "↵", "⋯", "é"]
    for (_, attributes), row in zip(tokens, table.itertuples(), strict=True):
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"] == attributes["data-numbers"]
        assert attributes["aria-label"].startswith(repr(row.token))
        numbers = re.findall(r"(?:log U_E|log p|U_A) (-?[\d.]+|-inf)", attributes["aria-label"])
        assert list(map(float, numbers)) == pytest.approx([row.log_epistemic, row.log_prob, row.aleatoric])


def test_a_text_cannot_become_markup(table):
    hostile = "'\"><img src=x onerror=alert(1)></style>"
    page = Page(plotting.tokens(table.assign(token=hostile, example=hostile)))
    assert {tag for tag, _ in page.tags if tag} == {"section", "style", "p", "span", "strong"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize(
    ("by", "levels"),
    [("log_epistemic", [4, 2, 1, 3, 5]), ("aleatoric", [1, 2, 3, 4, 5]), ("log_prob", [1, 2, 3, 4, 5])],
)
def test_levels_are_fifths_of_the_tokens_and_tell_by_thickness(table, by, levels):
    section = plotting.tokens(table, by=by)
    assert [int(attributes["data-level"]) for _, attributes in Page(section).tokens()] == levels
    assert "border-bottom: calc(var(--level) * 1px)" in section
    many = pd.concat([table.assign(log_epistemic=x) for x in np.arange(20.0)], ignore_index=True)
    found = pd.Series([attributes["data-level"] for _, attributes in Page(plotting.tokens(many)).tokens()])
    assert found.value_counts().tolist() == [20] * 5


def test_a_page_stands_alone_for_light_and_dark(table, tmp_path):
    section = plotting.tokens(table, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert section in page
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    assert "prefers-color-scheme: dark" in section, "also in a notebook"
    assert page.startswith("<!doctype html>")


def test_what_cannot_be_shown_is_refused(table):
    with pytest.raises(ValueError, match="by: 'epistemic' given, one of log_epistemic, log_prob, aleatoric wanted"):
        plotting.tokens(table, by="epistemic")
    with pytest.raises(ValueError, match="'token' wanted among them"):
        plotting.tokens(table.drop(columns="token"))
    with pytest.raises(ValueError, match="no row given"):
        plotting.tokens(table[:0])
    with pytest.raises(ValueError, match="NaN in aleatoric given"):
        plotting.tokens(table.assign(aleatoric=np.nan), by="aleatoric")
    with pytest.raises(ValueError, match="'layer' wanted among them"):
        plotting.layers(table)


@pytest.mark.usefixtures("figure_style")
def test_layers_draws_the_median_of_each_kind_and_what_is_outside_the_blocks_beside_them():
    rows = [[layer, kind, 10.0 * layer + i] for layer in (0, 1) for kind in ("mlp", "attention") for i in (0, 1, 5)]
    rows += [[pd.NA, "embedding", 3.0], [pd.NA, "norm", 4.0]]
    table = pd.DataFrame(rows, columns=["layer", "kind", "log_epistemic"]).astype({"layer": "Int64"})
    [ax] = plotting.layers(table).axes
    marks = {line.get_label(): line.get_xydata().tolist() for line in ax.lines if line.get_marker() != "None"}
    assert marks["mlp"] == marks["attention"] == [[0, 1], [1, 11]]
    [[left, _]], [[right, _]] = marks["embedding"], marks["norm"]
    assert left < 0
    assert right > 1
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "embedding", "last norm"]
    assert len({line.get_marker() for line in ax.lines if line.get_marker() != "None"}) == 4, "not by colour alone"
