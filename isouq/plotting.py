"""What a score looks like: the tokens of an answer as a page, the layers of a model as a figure.

The style and figures of the book, which had this name before, are in `isouq.studies.plotting`.
"""

from __future__ import annotations

import html
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 5
NUMBERS = {"log_epistemic": "log U_E", "log_prob": "log p", "aleatoric": "U_A"}
KINDS = {  # colour and marker of each kind of parameter
    "attention": ("#0072B2", "o"),
    "mlp": ("#D55E00", "s"),
    "norm": ("#007F5F", "^"),
    "other": ("#555555", "D"),
    "embedding": ("#7B3294", "*"),
}
_STYLE = """
.isouq-tokens { --ink: #1a1a1a; --page: #ffffff; --mark: 0 90 160; color: var(--ink); background: var(--page);
  padding: 0.75rem; border-radius: 4px; font-family: system-ui, sans-serif; line-height: 2.2 }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) .isouq-tokens {
  --ink: #ececec; --page: #14181e; --mark: 90 170 240 } }
:root[data-theme=dark] .isouq-tokens { --ink: #ececec; --page: #14181e; --mark: 90 170 240 }
.isouq-tokens p { margin: 0 0 0.5rem; white-space: pre-wrap; overflow-wrap: anywhere; color: inherit }
.isouq-tokens .answer span { padding-bottom: 1px; margin-right: 1px }
.isouq-tokens span[data-level] { border-bottom: calc(var(--level) * 1px) solid rgb(var(--mark));
  background: rgb(var(--mark) / calc(var(--level) * 9% - 7%)) }
.isouq-tokens span[tabindex]:focus { outline: 2px solid var(--ink); outline-offset: 1px }
.isouq-tokens span[tabindex]:is(:focus, :hover)::after { content: attr(data-numbers); position: fixed; z-index: 9;
  left: 1rem; right: 1rem; bottom: 1rem; max-width: 40rem; padding: 0.25rem 0.75rem; white-space: pre-wrap;
  color: var(--page); background: var(--ink); border-radius: 4px; line-height: 1.6 }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Uncertainty of each token</title>
<style>:root { color-scheme: light dark } body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem 6rem }</style>
</head><body><main>
"""


def tokens(table: pd.DataFrame, path: str | Path | None = None, *, by: str = "log_epistemic") -> str:
    """Answers with every token marked by its uncertainty, as HTML that asks for nothing else.

    The thicker a token's underline and the stronger its shade, the higher its level: fifths of all tokens of the table.
    Its numbers show while the pointer or the keyboard's focus is on it, and a screen reader says them. It is legible on
    a light and on a dark page. U_E and U_A are small where the model is sure of a token and also where it finds it very
    unlikely: log p tells these apart.

    Args:
        table: What `isouq.score_each_token` gives. An `example` may be renamed: it stands before its answer.
        path: Where to write a whole page, too; None for nowhere.
        by: The column that makes the levels: log_epistemic, aleatoric, or log_prob, of which the lowest is the highest.

    Returns:
        A `<section>` with its style. `IPython.display.HTML` shows it in a notebook.

    Raises:
        ValueError: A column is missing, the table is empty, or `by` is none of these or has NaN.

    Example:
        >>> import pandas as pd
        >>> columns = ["example", "token", "log_prob", "aleatoric", "log_epistemic"]
        >>> table = pd.DataFrame([[0, " Par", -0.5, 0.24, 1.5], [0, "is", -0.1, 0.09, -2.0]], columns=columns)
        >>> isouq.plotting.tokens(table).count('tabindex="0"')
        2
    """
    if by not in NUMBERS:
        raise ValueError(f"by: {by!r} given, one of {', '.join(NUMBERS)} wanted")
    for name in ("example", "token", *NUMBERS):
        if name not in table:
            raise ValueError(f"table: columns {', '.join(map(str, table))} given, {name!r} wanted among them")
    if table.empty or table[by].isna().any():
        given = "no row" if table.empty else f"NaN in {by}"
        raise ValueError(f"table: {given} given, tokens with their numbers wanted")
    share = (-table[by] if by == "log_prob" else table[by]).rank(pct=True)
    levels = np.ceil(LEVELS * share - 1e-9).astype(int)
    marked = pd.Series([_token(row, level) for row, level in zip(table.to_dict("records"), levels, strict=True)])
    answers = [
        f'<p class="answer" dir="auto"><strong>{html.escape(str(name))}</strong>  {"".join(spans)}</p>'
        for name, spans in marked.groupby(table["example"].to_numpy(), sort=False)
    ]
    steps = " ".join(f'<span data-level="{n}" style="--level: {n}"> {n} </span>' for n in range(1, LEVELS + 1))
    most = "lowest" if by == "log_prob" else "largest"
    meaning = f"fifths of the {len(table)} tokens by {NUMBERS[by]}, {LEVELS} the {most}"
    legend = f'<p class="legend">level {steps}  {meaning}</p>'
    section = "\n".join([f'<section class="isouq-tokens"><style>{_STYLE}</style>', legend, *answers, "</section>"])
    if path is not None:
        Path(path).write_text(f"{_PAGE}{section}\n</main></body></html>\n", encoding="utf-8")
    return section


def _token(row: dict[Any, Any], level: int) -> str:
    text = str(row["token"])
    numbers = [f"level {level} of {LEVELS}", *(f"{label} {row[name]:.3g}" for name, label in NUMBERS.items())]
    told = html.escape(f"{text!r}: {', '.join(numbers)}")
    shown = html.escape(text).replace("\n", "↵<br>") or "⋯"  # nothing: inside a character of several tokens
    data = f'data-level="{level}" style="--level: {level}" data-numbers="{told}"'
    return f'<span tabindex="0" role="img" aria-label="{told}" {data}>{shown}</span>'


def layers(table: pd.DataFrame) -> Figure:
    """Draw log U_E by block, a line for each kind of parameter; what is in no block stands beside them.

    Args:
        table: What `Estimate.by_layer` gives. Of several examples the median is drawn, and a band from the first to the
            third quartile.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"layer": [0, 1], "kind": "mlp", "log_epistemic": [-3.0, -2.0]})
        >>> isouq.plotting.layers(table).axes[0].get_xlabel()
        'block'
    """
    import matplotlib.pyplot as plt

    for name in ("layer", "kind", "log_epistemic"):
        if name not in table:
            raise ValueError(f"table: columns {', '.join(map(str, table))} given, {name!r} wanted among them")
    layer = table["layer"].astype("Float64").astype(float)
    last = layer.max() if layer.notna().any() else -1.0
    before, after = (end + sign * (2 + last / 12) for end, sign in ((0, -1), (last, 1)))
    places = layer.fillna(table["kind"].map({"norm": after}).fillna(before))
    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for kind in [kind for kind in KINDS if kind in set(table["kind"])]:
        rows, (colour, marker) = table["kind"] == kind, KINDS[kind]
        values = table[rows].groupby(places[rows])["log_epistemic"]
        low, middle, high = (values.quantile(q) for q in (0.25, 0.5, 0.75))
        x = middle.index.to_numpy()
        inside = (x >= 0) & (x <= last)
        ax.plot(x[inside], middle[inside], color=colour)
        ax.fill_between(x[inside], low[inside], high[inside], color=colour, alpha=0.2, linewidth=0)
        ax.vlines(x[~inside], low[~inside], high[~inside], color=colour)
        ax.plot(x, middle, marker, color=colour, markersize=5, label=kind)
    blocks = range(0, int(last) + 1, max(1, int(last + 1) // 8))
    beside = {x: name for x, name in ((before, "embedding"), (after, "last norm")) if x in set(places)}
    ax.set_xticks([*blocks, *beside], [*map(str, blocks), *beside.values()])
    ax.set(xlabel="block", ylabel="$\\log U_E$ of its parameters")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def __getattr__(name: str) -> Any:
    """Find a name of the book's figures where it is now."""
    home = import_module("isouq.studies.plotting")
    if name.startswith("__") or not hasattr(home, name):
        raise AttributeError(f"module 'isouq.plotting' has no attribute {name!r}; it has tokens and layers")
    warnings.warn(f"isouq.plotting.{name} is now isouq.studies.plotting.{name}", DeprecationWarning, stacklevel=2)
    return getattr(home, name)
