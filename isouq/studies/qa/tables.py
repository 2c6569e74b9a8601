"""The chapter's tables as readers see them: text with intervals, the paper's Table 2 beside ours."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from isouq.studies import claims, require
from isouq.studies.evaluation import Ranking
from isouq.studies.qa import across
from isouq.studies.qa.analysis import HEADLINE

SHOWN = (
    *("p_true", "semantic_entropy", "naive_entropy", "aleatoric", "epistemic", "combined"),  # the paper's Table 2
    *("likelihood", "log_gradient", "length"),
)


def table_2(ranked: Mapping[str, Mapping[str, Mapping[str, Ranking]]], data_set: str) -> pd.DataFrame:
    """Return one data set's AUROCs as text: a row per method of SHOWN, a column per model, their mean, the paper's.

    `ranked` is what `analysis.rank` makes of each model's table. A model with too few right or wrong answers has no
    numbers and no part in the mean.
    """
    headline = {model: of_model[HEADLINE] for model, of_model in ranked.items() if of_model.get(HEADLINE)}
    columns = {model: _texts({name: headline.get(model, {}).get(name) for name in SHOWN}) for model in ranked}
    if len(headline) > 1:
        shared = [name for name in SHOWN if all(name in of_model for of_model in headline.values())]
        means = {name: across.mean([of_model[name] for of_model in headline.values()]) for name in shared}
        columns["mean"] = _texts({name: means.get(name) for name in SHOWN})
    published = {name: f"{mean:.2f}\u00a0±\u00a0{std:.2f}" for name, (mean, std) in _published(data_set).items()}
    return pd.DataFrame({**columns, "paper": pd.Series(published)}).reindex(SHOWN).fillna("")


def _texts(rankings: Mapping[str, Ranking | None]) -> pd.Series:
    return pd.Series({name: str(one.interval()).partition(", n =")[0] if one else "" for name, one in rankings.items()})


def beside_paper(aurocs: pd.DataFrame, data_set: str) -> pd.DataFrame:
    """Return the headline rows in the order of SHOWN, with a column `paper`: the mean in its Table 2.

    Every data set gives the same rows, NaN where there is no number, so that panels stay aligned.
    """
    published = {name: mean for name, (mean, _) in _published(data_set).items()}
    headline = aurocs[aurocs["aggregation"] == HEADLINE].set_index("method")
    rows = headline.reindex(SHOWN).rename_axis("method").reset_index()
    return rows.assign(paper=rows["method"].map(published))


def _published(data_set: str) -> Mapping[str, list[float]]:
    return claims.paper()["table_2"].get(data_set.removesuffix("_choose"), {})


def compare(tables: Mapping[str, pd.DataFrame], column: str = "value") -> pd.DataFrame:
    """Return one model's `auroc_table`s, keyed by data set, as text: a row per score, a column per data set.

    `column`: "value", with the paper's Table 2 beside it at the headline's rows (what its p(y|x) is, we do not
    know), or "versus_likelihood". Where right or wrong answers are too few the text says how many there are.
    """
    require.one_of("column", column, ("value", "versus_likelihood"))
    if not tables:
        raise ValueError("tables: no table given, at least one wanted")
    columns = {}
    for data_set, aurocs in tables.items():
        rows = aurocs.set_index(["aggregation", "method"])
        columns[data_set] = rows.apply(_as_text, axis=1, column=column)
        published = _published(data_set)
        if column == "value" and published:
            text = {
                (HEADLINE, method): f"{mean:.2f}\u00a0±\u00a0{std:.2f}" for method, (mean, std) in published.items()
            }
            columns[f"paper, {data_set}"] = rows.index.to_series().map(text)
    order = max(tables.values(), key=len).set_index(["aggregation", "method"]).index
    return pd.DataFrame(columns).reindex(order).fillna("")


def _as_text(row: pd.Series, column: str) -> str:
    if row["note"]:
        return row["note"]
    low, high = (row[f"{column}_{end}"] if column != "value" else row[end] for end in ("low", "high"))
    sign = "+" if column != "value" else ""
    return f"{row[column]:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]".replace(" ", "\u00a0")
