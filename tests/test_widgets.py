"""The interactive pieces as HTML: safe and well-formed with any text, and true to what they draw."""

import base64
import io
import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps, image

from isouq.studies import widgets

HOSTILE = '</script><script>alert(1)</script> & "quoted" {{rows}} \''


def answers(n=2) -> pd.DataFrame:
    table = pd.DataFrame({"question": [HOSTILE] * n, "S": [-1.23456, np.nan] * (n // 2), "L": range(n)})
    return table.assign(right=pd.Categorical(["yes", None] * (n // 2)))


def test_a_browser_shows_any_text_as_it_is_and_leaves_absent_cells_empty():
    root = ET.fromstring(widgets.browser(answers(), title=HOSTILE).data)
    cells = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert cells == [["question", "S", "L", "right"], [HOSTILE, "-1.235", "0", "yes"], [HOSTILE, "", "1", ""]]
    assert [(head.get("class"), head.get("data-menu")) for head in root.iter("th")] == [
        (None, None), ("number", None), ("number", None), (None, "yes")
    ]  # fmt: skip
    assert len(list(root.iter("script"))) == 1
    assert root.find("div[@role='region']").get("aria-label") == HOSTILE


def test_a_browser_without_rows_is_refused():
    with pytest.raises(ValueError, match="table: no rows given"):
        widgets.browser(answers().head(0), title="answers")


@pytest.fixture(scope="module")
def straight():
    """Maps of a p that is a straight line in θ, on 4 × 5 points: norms, what each frame says, and its picture."""
    x, y = np.meshgrid(np.linspace(-1, 1, 4), np.linspace(-1, 1, 5), indexing="ij")
    grid, targets = np.stack([x.ravel(), y.ravel()], 1), np.array([0, 1, 2])
    problem = SimpleNamespace(
        grid=grid, shape=(5, 4), limits=(-1.0, 1.0), seed=0, inputs=grid[:3], targets=targets
    )  # from the upper left, row by row, there are 5 rows of 4
    g = np.random.default_rng(0).normal(size=(20, 6))
    root = ET.fromstring(widgets.spreads(problem, np.zeros(6), g, lambda theta: 0.5 + theta @ g.T).data)
    url = root.find("div[@class='pictures']").get("style").removeprefix("--maps: url(").removesuffix(")")
    picture = image.imread(io.BytesIO(base64.b64decode(url.partition(",")[2])), format="png")
    return problem, g, json.loads(next(root.iter("script")).text), picture, root


def test_where_p_is_a_straight_line_the_spread_changes_nothing(straight):
    _, _, data, picture, _ = straight
    n = len(data["frames"]) // len(widgets.SPREADS)
    said = [words for _, _, words in data["frames"]]
    assert said[:n] * len(widgets.SPREADS) == said
    assert said[0] == "Rank correlation with ‖g‖: 1.00. Half of the inputs differ from it by more than 0%."
    assert len(set(said)) > len(widgets.ANGLES)
    maps = picture.reshape(data["last"] + 1, 10, 8, 4)
    for of_sigma in np.split(maps, len(widgets.SPREADS)):
        np.testing.assert_allclose(of_sigma, maps[: len(of_sigma)], atol=0.02)
    assert [data["frames"][k][0] for k in range(len(widgets.ANGLES) + 1)] == [0] * len(widgets.ANGLES) + [1]


def test_the_first_map_is_the_norm_of_the_gradient_seen_from_above(straight):
    problem, g, _, picture, root = straight
    norm, (x, y) = np.linalg.norm(g, axis=1), problem.grid.T
    d = np.array([np.cos(np.deg2rad(widgets.ANGLES)), np.sin(np.deg2rad(widgets.ANGLES))])
    widest = norm[:, None] ** 2 + (widgets.STRETCHES[-1] ** 2 - 1) * (g[:, -2:] @ d) ** 2
    colour = colormaps["viridis"](norm / np.sqrt(widest.max()))
    corners = [(0, 0, -1, 1), (0, -1, 1, 1), (9, 0, -1, -1), (9, -1, 1, -1)]  # row, column, x, y
    for row, column, at_x, at_y in corners:
        (point,) = np.flatnonzero((x == at_x) & (y == at_y))
        np.testing.assert_allclose(picture[row, column], colour[point], atol=0.01)
    assert [span.text for span in root.iterfind("div[@class='ends']/span")][2] == f"{np.sqrt(widest.max()):.2g}"
