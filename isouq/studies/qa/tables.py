"""The chapter's tables as readers see them: text with intervals, the paper's Table 2 beside ours.

Answers, rankings and AUROCs are keyed by pairs, (model, data set).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch

import pandas as pd

from isouq.studies import claims, require
from isouq.studies.evaluation import Interval, Ranking
from isouq.studies.fits import N_BINS
from isouq.studies.plotting import METHODS
from isouq.studies.qa import across, analysis, details, rivals
from isouq.studies.qa.analysis import GAIN, HEADLINE, VALUE, Analysis
from isouq.studies.qa.data import key_part
from isouq.studies.qa.details import Pair
from isouq.studies.qa.sampling import N_IDEAS
from isouq.studies.qa.subject import N_TRUE_SHOTS
from isouq.studies.rejection import MAX_REJECTION
from isouq.studies.results import Result, key_of

SHOWN = (
    *("p_true", "semantic_entropy", "naive_entropy", "aleatoric", "epistemic", "combined"),  # the paper's Table 2
    *("combined_curved", "likelihood", "log_gradient", "length"),
)
MODELS = {
    "smollm2-135m-instruct": "SmolLM2",
    "gemma-3-270m": "Gemma 3",
    "qwen-coder-0-5b-instruct": "Qwen-Coder 0.5B",
    "qwen-coder-1-5b-instruct": "Qwen-Coder 1.5B",
}
DATA_SETS = {
    "triviaqa": "TriviaQA",
    "wikidata": "Wikidata",
    "truthfulqa": "TruthfulQA (written)",
    "truthfulqa_choose": "TruthfulQA (choice)",
}
TOO_FEW = "too few right or wrong answers"


def model_name(model: str) -> str:
    """Return a model's short name, which its key has too."""
    return MODELS.get(key_of(model), model.split("/")[-1])


def label(pair: Pair) -> Pair:
    """Return a pair as readers see it: a model's short name and a data set's title."""
    return model_name(pair[0]), DATA_SETS.get(pair[1], key_part(pair[1]))


def by_pair(answers: Mapping[Pair, pd.DataFrame], rows_of: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """Return the rows that `rows_of` makes of each pair's table, indexed by model and data set, without NaN."""
    rows = {label(pair): rows_of(table) for pair, table in answers.items()}
    joined = pd.concat(rows, names=["model", "data set"]).droplevel(-1).round(3)
    joined = joined.rename(columns=lambda name: name.replace("_", " "))
    return joined.astype(object).fillna("") if len(joined) else _nothing(TOO_FEW)


def browsed(answers: Mapping[Pair, pd.DataFrame], n: int = 300) -> pd.DataFrame:
    """Return a row per question: its answer, what each judge says of it, and all its scores, high = wrong but for S.

    The first questions of each pair, as many of each, `n` at most in all. What no pair has is left out. The columns of
    verdicts, models and data sets are categories, for `widgets.browser`.
    """
    rows = pd.concat({label(pair): table.head(n // len(answers)) for pair, table in answers.items()})
    rows = rows.copy().rename_axis(["model", "data set", ""]).reset_index(["model", "data set"])  # copied in one piece
    verdicts = [name for name in map(str, rows) if re.match("right(_by_(?!chance)|_as|$)", name)]
    rows = rows.assign(**{name: rows[name].map({True: "yes", False: "no"}) for name in verdicts})
    rows = rows.astype(dict.fromkeys(("model", "data set", *verdicts), "category"))
    texts = ("model", "data set", "question", "answer", "reference", *verdicts)
    titles = {name: name.replace("_", " ") for name in texts}
    titles |= {"n_tokens": "L", "log_prob": "S", "log_gradient": "log G"}
    for kind in analysis.AGGREGATIONS:
        of = kind.replace("_", " ")
        titles |= {f"log_epistemic_{kind}": f"log U_E, {of}", f"aleatoric_{kind}": f"U_A, {of}"}
    titles |= method_labels((*analysis.RIVALS, *analysis.CHEAP))
    return rows.reindex(columns=list(titles)).dropna(axis=1, how="all").rename(columns=titles)


def description(answers: Mapping[Pair, pd.DataFrame]) -> pd.DataFrame:
    """Return how many questions each pair has, how many answers are right, empty or failed, and how long they are.

    Of a choice also the share of right ones by the mean per token and by chance.
    """
    rows = {}
    for pair, table in answers.items():
        row = {"questions": len(table), "right": _text(analysis.accuracy(table)), "empty": int(table["empty"].sum())}
        row |= {"failed": len(table.attrs["failed"]), "tokens per answer": f"{table['n_tokens'].mean():.1f}"}
        if "right_by_mean" in table:
            row["right by mean"] = _text(analysis.accuracy(table, "right_by_mean"))
            row["by chance"] = f"{table['right_by_chance'].mean():.2f}"
        rows[label(pair)] = row | {"made with": table.attrs["made"].replace(" ", "\u00a0")}
    return pd.DataFrame(rows).T.fillna("")


def p_true_question(table: pd.DataFrame) -> str:
    """Return what P(True) is asked of the shortest question of `table`, and the numbers that decide the rivals."""
    shortest = table.iloc[table["question"].str.len().argmin()]
    asked = rivals.p_true_prompt(shortest["question"], ["(a sample)", "(another sample)", "…"], shortest["answer"])
    numbers = {
        "solved examples before it": N_TRUE_SHOTS,
        "samples shown as ideas, at most": N_IDEAS,
        "samples mean the same from a cosine of": rivals.SAME_MEANING,
    }
    return "\n".join([asked, "", *(f"{name}: {number}" for name, number in numbers.items())])


def fair(results: Mapping[str, Result]) -> pd.DataFrame:
    """Return means over models as text: a row per data set and rival with a fit of its own, beside the fitted pair.

    Columns: raw, the rival's AUROC; fitted, after its fit; pair, that of the fitted pair; pair − fitted, paired.
    """
    rows: dict[Pair, dict[str, str]] = {}
    keys = {"raw": "{}.auroc", "fitted": "{}_fitted.auroc", "pair": "combined.auroc"}
    keys["pair − fitted"] = "combined.auroc_over_{}_fitted"
    for data_set, title in DATA_SETS.items():
        for name, label_of in method_labels([fitted.removesuffix("_fitted") for fitted in analysis.FAIR]).items():
            of = {head: results.get(f"qa.mean.{data_set}.{key.format(name)}") for head, key in keys.items()}
            if all(of.values()):
                rows[title, label_of] = {head: _text(one) for head, one in of.items() if one}
    return pd.DataFrame(rows).T if rows else _nothing("fewer than two models have enough right and wrong answers")


def named(results: Mapping[str, Result], *patterns: str) -> pd.DataFrame:
    """Return results as text: a row per model and data set, a column per name that one of `patterns` fits.

    A name is what follows the data set in a key: `epistemic.auroc` in `qa.gemma-3-270m.wikidata.epistemic.auroc`. That
    of `qa.transfer.MODEL.DATA_SET.auroc` begins with `transfer`. The head of the column says it in words, which wrap.
    """
    rows: dict[Pair, dict[str, str]] = {}
    for pattern in patterns:
        for key, result in results.items():
            model, data_set, name = re.sub(r"^(qa\.)(transfer\.)(\w.*?\..*?\.)", r"\1\3\2", key).split(".", 3)[1:]
            if fnmatch(name, pattern):
                pair = MODELS.get(model, model), DATA_SETS.get(data_set, data_set)
                rows.setdefault(pair, {})[_in_words(name)] = _text(result)
    return pd.DataFrame(rows).T.fillna("") if rows else _nothing(TOO_FEW)


def _in_words(name: str) -> str:
    """Return how a result is called in the head of a column: `epistemic: AUROC`, `P(True) − epistemic: AUROC`."""
    subject, _, metric = name.partition(".")
    method, mark, rest = subject.partition("_committed")
    metric, _, other = metric.partition("_over_")
    words = " − ".join(method_labels([method, *filter(None, [other])]).values()) + mark.replace("_", ", ") + rest
    return f"{words}: {metric}".removesuffix(": ").replace("_", " ").replace("auroc", "AUROC").replace("u e", "U_E")


def table_2(ranked: Mapping[Pair, Mapping[str, Mapping[str, Ranking]]]) -> pd.DataFrame:
    """Return the headline AUROCs as text: a row per data set and method of SHOWN, columns mean, paper, and each model.

    A cell has the value with its 95 % interval; the mean has, after it, mean ± standard deviation over resamples as the
    paper reports them. A model with too few right or wrong answers has no numbers and no part in the mean.
    """
    parts = {}
    for data_set in dict.fromkeys(data_set for _, data_set in ranked):
        of_models = {model: of.get(HEADLINE, {}) for (model, asked), of in ranked.items() if asked == data_set}
        columns = {model_name(model): _cells(of) for model, of in of_models.items()}
        counted = [of for of in of_models.values() if of]
        if len(counted) > 1:
            shared = [name for name in SHOWN if all(name in of for of in counted)]
            means = {name: across.mean([of[name] for of in counted]) for name in shared}
            spread = {name: "{:.2f}\u00a0±\u00a0{:.2f}".format(*one.as_in_paper()) for name, one in means.items()}
            columns["mean"] = _cells(means) + " (" + pd.Series(spread) + ")"
        published = {name: f"{mean:.2f}\u00a0±\u00a0{std:.2f}" for name, (mean, std) in _published(data_set).items()}
        table = pd.DataFrame({**columns, "paper": pd.Series(published, dtype=object)}).reindex(SHOWN)
        table = table.fillna({name: "too few" for name, cells in columns.items() if cells.empty})
        parts[label(("", data_set))[1]] = table.rename(index=method_labels(SHOWN))
    joined = pd.concat(parts).fillna("")
    first = [name for name in ("mean", "paper") if name in joined]
    return joined[first + [name for name in joined if name not in first]]


def method_labels(methods: Iterable[str]) -> dict[str, str]:
    """Return how each method is called in tables: as in figures, or by its name; a fit of one score says so."""
    parts = {name: name.partition("_fitted") for name in methods}
    called = {of: METHODS[of].label if of in METHODS else of.replace("_", " ") for of, *_ in parts.values()}
    return {name: called[of] + mark.replace("_", ", ") for name, (of, mark, _) in parts.items()}


def _cells(ranked: Mapping[str, Ranking]) -> pd.Series:
    return pd.Series({name: _text(ranked[name].interval()) for name in SHOWN if name in ranked}, dtype=object)


def beside_paper(aurocs: pd.DataFrame, data_set: str) -> pd.DataFrame:
    """Return the headline rows in the order of SHOWN, with a column `paper`: the mean in its Table 2.

    Every data set gives the same rows, NaN where there is no number, so that panels stay aligned.
    """
    published = {name: mean for name, (mean, _) in _published(data_set).items()}
    headline = aurocs[aurocs["aggregation"] == HEADLINE].set_index("method")
    rows = headline.reindex(SHOWN).rename_axis("method").reset_index()
    return rows.assign(paper=rows["method"].map(published))


def _published(data_set: str) -> Mapping[str, list[float]]:
    """The paper's Table 2 on a data set; it did not ask for a choice (departure 4)."""
    return claims.paper()["table_2"].get(data_set, {})


def compare(aurocs: Mapping[Pair, pd.DataFrame], column: str = "value") -> pd.DataFrame:
    """Return `auroc_table`s as text: a row per aggregation and score, a column per model and data set.

    `column`: "value" or "versus_likelihood". Where right or wrong answers are too few, the text says how many. Raises
    ValueError for another column and for no table.
    """
    require.one_of("column", column, ("value", "versus_likelihood"))
    if not aurocs:
        raise ValueError("aurocs: no table given, at least one wanted")
    names, sign = (VALUE, "") if column == "value" else (GAIN, "+")

    def text(row: pd.Series) -> str:
        value, low, high = (row[name] for name in names)
        return row["note"] or _interval_text(value, low, high, sign)

    tables = {label(pair): table.set_index(["aggregation", "method"]) for pair, table in aurocs.items()}
    columns = {pair: table.apply(text, axis=1) for pair, table in tables.items()}
    return pd.DataFrame(columns).reindex(max(tables.values(), key=len).index).fillna("")


def rejection(answers: Mapping[Pair, pd.DataFrame], results: Mapping[str, Result]) -> pd.DataFrame:
    """Return PRR, AURC, Brier score and ECE as text, a row per pair and score, from `details.all_results`.

    A pair's last row is what knowing nothing has: a score that is the same for all answers, or the share of wrong
    answers as every answer's probability.
    """
    limit = f"PRR, under {MAX_REJECTION:.0%} withheld"
    names = {"prr": limit, "aurc": "AURC", "brier": "Brier", "ece": f"ECE, {N_BINS} bins"}
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for pair, table in answers.items():
        prefix = f"qa.{key_of(pair[0])}.{key_part(pair[1])}"
        own = {}
        for name, title in method_labels(details.REJECTED + details.FITTED).items():
            of = {metric: results.get(f"{prefix}.{name}.{metric}") for metric in names}
            own[title] = {metric: _text(result) for metric, result in of.items() if result}
        if any(own.values()):
            share = float(analysis.scored(table)["wrong"].mean())
            nothing = {"prr": 0.0, "aurc": share, "brier": share * (1 - share), "ece": 0.0}
            own["(knows nothing)"] = {metric: f"{value:.2f}" for metric, value in nothing.items()}
        rows |= {(*label(pair), title): cells for title, cells in own.items() if cells}
    return pd.DataFrame(rows).T.rename(columns=names).fillna("") if rows else _nothing(TOO_FEW)


def prompts(
    answers: Mapping[Pair, pd.DataFrame], bare: Mapping[Pair, pd.DataFrame], analysed: Analysis
) -> pd.DataFrame:
    """Return accuracy and AUROCs with examples in the prompt and without, as text; a column per pair and prompt."""
    columns = {}
    for pair, table in bare.items():
        for prompt, of in details.prompts(answers[pair], table, analysed).items():
            cells = pd.Series({name: str(interval) for name, interval in of.items()})
            columns[(*label(pair), prompt)] = cells.rename(method_labels(of))
    names = ["accuracy", "contained", *method_labels(details.PROMPTED).values()]
    return pd.DataFrame(columns).reindex(names).fillna(TOO_FEW) if columns else _nothing("not asked")


def _nothing(why: str) -> pd.DataFrame:
    """A table that says why there is none."""
    return pd.DataFrame({"": [why]}, index=[""])


def _text(one: Interval | Result) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:.0f}" if float(one.value).is_integer() else f"{one.value:.2g}"
    return _interval_text(float(one.value), float(one.low), float(one.high))


def _interval_text(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]".replace(" ", "\u00a0")
