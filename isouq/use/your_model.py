"""What chapter 06 does beside the public functions: questions from a file, two answers to look at, a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from isouq.language.examples import from_pairs
from isouq.language.scoring import Scoring, score, text_pairs
from isouq.pipeline.schemas import CLONE
from isouq.studies.qa.data import READERS
from isouq.studies.results import Result
from isouq.use.calibrate import Calibrator
from isouq.use.evaluate import CONTROL, GAIN, VALUE, Evaluation, labelled, shown

KEPT = ("auroc", "aurc", "prr")  # metrics whose numbers a page may quote


def questions(file: str, *used: str | None, prompt: str, answer: str | None = None) -> pd.DataFrame:
    """Read a file of questions; its column `prompt`, and `answer` where there is one, get these names.

    A file that is not here is looked for in the clone. Without `answer` no column has this name: the model will answer.
    Columns that are `used` later have to be there, too.

    Raises ValueError for a file of another kind or without the column.
    """
    path = Path(file) if Path(file).is_file() else CLONE / file
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(f"file: {file} given, a file that ends with {', '.join(READERS)} wanted")
    table = READERS[path.suffix](str(path))
    renamed = {prompt: "prompt"} | ({answer: "answer"} if answer else {})
    for name in renamed:
        if name not in table:
            raise ValueError(f"{file}: columns {', '.join(map(str, table))} given, {name!r} wanted among them")
    taken = [name for name in ("prompt", "answer") if name in table and name not in renamed]
    table = table.drop(columns=taken).rename(columns=renamed)
    if lost := [name for name in used if name and name not in table]:
        raise ValueError(f"{file}: beside the answer that the model writes it has no column {lost[0]!r}; rename one")
    return table


def extremes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the answers that are least and most likely to be wrong, by p_wrong; `example` names them."""
    scored = table.dropna(subset="p_wrong")
    rows = scored.loc[[scored["p_wrong"].idxmin(), scored["p_wrong"].idxmax()]]
    return rows.assign(example=["most certain", "least certain"])


def by_layer(model: nn.Module, tokenizer: Any, table: pd.DataFrame, *, chat: bool = False) -> pd.DataFrame:
    """Return `Estimate.by_layer` of a table's answers, columns prompt and text; see `score_texts` for `chat`."""
    pairs = text_pairs(tokenizer, list(table["prompt"]), list(table["text"]), chat)
    how = Scoring(batch_size=4, breakdown=True)
    return score(model, from_pairs(pair[:2] for pair in pairs), how)["sequence"].by_layer()


def chosen(found: Evaluation) -> str:
    """Return the score to use: the control, unless another is shown to rank better on these answers.

    It is, where the whole 95 % interval of its gain in AUROC over the control is above 0; the largest such gain counts.
    """
    gains = found.table[(found.table["metric"] == "auroc") & (found.table["gain_low"] > 0)].sort_values("gain")
    return str(gains["score"].iloc[-1]) if len(gains) else CONTROL


def verdict(found: Evaluation) -> str:
    """Return one sentence: which score to use on these answers, or that none is shown to help.

    The control, the plain negative log-likelihood, helps where the interval of its own AUROC is above one half.
    """
    aurocs = found.table[found.table["metric"] == "auroc"].set_index("score")
    best: Any = aurocs.loc[chosen(found)]
    control: Any = aurocs.loc[CONTROL]
    where = f"on these {int(control['n'])} answers"
    plain = f"the plain negative log-likelihood (AUROC {shown(control[VALUE], 2)})"
    if best.name != CONTROL:
        auroc, gain = shown(best[VALUE], 2), shown(best[GAIN], 2)
        return f"Use {best.name}: {where} its AUROC is {auroc}, {gain} above {plain}."
    tried = f"none of {len(aurocs) - 1} other scores is shown to rank them better"
    if control["low"] > 0.5:
        return f"Use {plain}, which costs one forward pass: {where} {tried}."
    no_score = f"No score is shown to help: {where} {plain} cannot be distinguished from chance"
    return f"{no_score}, and {tried}. Label more answers."


def named_results(found: Evaluation, fitted: Calibrator, table: pd.DataFrame) -> dict[str, Result]:
    """Return what chapter 06 saves: accuracy, each score's KEPT metrics with their gains, the calibrator's errors."""
    _, wrong, _ = labelled(table, "right")
    results = {"your_model.accuracy": Result(value=1 - float(wrong.mean()), n=len(wrong))}
    for row in found.table[found.table["metric"].isin(KEPT)].to_dict("records"):
        for suffix, names in (("", VALUE), ("_gain", GAIN)):
            ends = dict(zip(VALUE, (row[name] for name in names), strict=True))
            if np.isfinite(list(ends.values())).all():
                results[f"your_model.{row['score']}.{row['metric']}{suffix}"] = Result(**ends, n=int(row["n"]))
    for name in ("brier", "ece"):
        value, low, high = getattr(fitted, name)
        results[f"your_model.calibrated.{name}"] = Result(value=value, low=low, high=high, n=fitted.n)
    return results
