"""The book's two interactive pieces, as HTML that asks for no file: maps under sliders, a table to sort and filter.

Without JavaScript a reader sees the first maps and the whole table. The HTML is well-formed XML, as an EPUB wants it.
"""

import base64
import html
import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib import colormaps, colors, image
from numpy.typing import NDArray

from isouq.studies.evaluation import spearman
from isouq.studies.plotting import CLASSES

Array = NDArray[np.float64]
SPREADS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # σ; 0 stands for the limit, the straight line
STRETCHES = (1.0, 2.0, 4.0)
ANGLES = tuple(22.5 * step for step in range(8))  # degrees
N_DRAWS = 300
MARKS = {"o": "m-.08 0a.08.08 0 1 0 .16 0a.08.08 0 1 0-.16 0", "^": "m0-.1l.1.18h-.2z", "s": "m-.08-.08h.16v.16h-.16z"}


def browser(table: pd.DataFrame, *, title: str) -> HTML:
    """Return a table that sorts by a column's head, with a search and, for a column of categories, a menu.

    Numbers have four digits. What is absent is an empty cell, last in any order. The title is for screen readers.

    >>> table = pd.DataFrame({"answer": ["</script>"], "S": [-1.5]})
    >>> "<td>&lt;/script&gt;</td><td>-1.5</td>" in browser(table, title="answers").data
    True

    Raises ValueError for a table without rows.
    """
    if table.empty:
        raise ValueError("table: no rows given, at least one wanted")
    heads = ""
    for name, kind in table.dtypes.items():
        look = ' class="number"' if pd.api.types.is_numeric_dtype(kind) else ' data-menu="yes"' * (kind == "category")
        heads += f'<th scope="col"{look}>{_cell(name)}</th>'
    cells = ("".join(f"<td>{_cell(value)}</td>" for value in row) for row in table.itertuples(index=False))
    rows = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return _filled("browser", title=html.escape(title), heads=heads, rows=rows)


def _cell(value: Any) -> str:
    return "" if pd.isna(value) else html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def spreads(problem: Any, theta: Array, g: Array, values: Callable[[Array], Array]) -> HTML:
    """Return maps of the standard deviation of p over θ ~ N(θ*, Σ), in units of σ, beside isotropy's line ‖g‖.

    Σ = σ²(I + (s² − 1) d dᵀ): the direction d, at an angle in the plane of the last two parameters, is s times as wide
    as any other. Sliders choose σ, s and the angle. At σ → 0 the map is √(gᵀΣg)/σ; elsewhere it is brute force over
    N_DRAWS draws in mirrored pairs, divided by what the line has in the same draws.

    Args:
        problem: with a grid over the plane; its seed draws θ.
        theta: θ*, (param,).
        g: ∇θ p at θ* for every point of the grid, (point, param).
        values: θ (draw, param) → p (draw, point).
    """
    half = np.random.default_rng(problem.seed).normal(size=(N_DRAWS // 2, len(theta)))
    noise, norm, maps, frames = np.concatenate([half, -half]), np.linalg.norm(g, axis=1), [], []
    for sigma, s, angle in itertools.product(SPREADS, STRETCHES, ANGLES):
        if s > 1 or angle == 0:  # a circle has no angle
            d = np.zeros(len(theta))
            d[-2:] = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
            line, draws = np.sqrt(norm**2 + (s**2 - 1) * (g @ d) ** 2), noise + (s - 1) * np.outer(noise @ d, d)
            exact = values(theta + sigma * draws).std(axis=0) / (sigma * (draws @ g.T).std(axis=0)) if sigma else 1.0
            maps.append(line * exact)
        rho, off = spearman(maps[-1], norm), np.median(np.abs(maps[-1] / norm - 1))
        said = f"Rank correlation with ‖g‖: {rho:.2f}. Half of the inputs differ from it by more than {off:.0%}."
        frames.append((len(maps) - 1, f"rotate({-angle:g}) scale({s:g} 1)", said.replace("-", "−")))
    scales = (
        ["→ 0 (the line)", *(f"{sigma:g}" for sigma in SPREADS[1:])],
        ["no: isotropy", *(f"{s:g} times" for s in STRETCHES[1:])],
        [f"{angle:g}°" for angle in ANGLES],
    )
    most, palette = max(one.max() for one in maps), colormaps["viridis"](np.linspace(0, 1, 9))
    return _filled(
        "maps",
        image=_stacked(problem, maps, most),
        points=_marked(problem),
        colours=",".join(map(colors.to_hex, palette)),
        most=f"{most:.2g}",
        said=frames[0][2],
        frames=json.dumps({"scales": scales, "frames": frames, "last": len(maps) - 1}, ensure_ascii=False),
    )


def _stacked(problem: Any, maps: list[Array], most: float) -> str:
    """Return one PNG with all maps (point,), the first on top, as a data URL; colours go from 0 to `most`."""
    x, y = problem.grid.T
    order, written = np.lexsort((x, -y)), io.BytesIO()  # from the upper left, row by row
    squares = np.concatenate([one[order].reshape(problem.shape) for one in maps])
    image.imsave(written, np.kron(squares, np.ones((2, 2))), cmap="viridis", vmin=0, vmax=most, format="png")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _marked(problem: Any) -> str:
    """Return the problem's examples as an SVG picture, a shape for each class."""
    (low, high), paths = problem.limits, ""
    for label, (_, marker) in zip(np.unique(problem.targets), CLASSES, strict=False):
        places = problem.inputs[problem.targets == label]
        paths += '<path d="{}"></path>'.format("".join(f"M{x:.2f} {-y:.2f}{MARKS[str(marker)]}" for x, y in places))
    return f'<svg viewBox="{low:g} {-high:g} {high - low:g} {high - low:g}" aria-hidden="true">{paths}</svg>'


def _filled(template: str, **parts: str) -> HTML:
    """Fill every {{name}} of a template in one pass, so that no part's own text is taken for a name."""
    text = Path(__file__).with_name(f"{template}.html").read_text(encoding="utf-8")
    return HTML(re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], text))
