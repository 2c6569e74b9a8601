"""What a language model's study says: its rules, which were committed before they were run, and the tables they make.

The *field* is log(∇Sᵀ(λI + F)⁻¹∇S / ‖∇S‖²) of every query, less its mean, in nats (`distortion`): below 0 where F takes
more variance than on average. λ is 1 in units of F's own mean eigenvalue, declared beforehand.

Control: under F from second wordings of some queries, the mean field of these lies below that of the other queries,
with its 95 % interval. They were drawn at random, so nothing but the proxies tells them apart. If the control fails,
nothing else here can be decided. The *pull* of a kind of proxies is Spearman's ρ of the field with the queries'
nearness to them: an interval wholly below 0 (less variance near the proxies) or wholly above (more) means structure,
one that holds 0 means that none was found. Whether structure matters is another question: it does when the order of
U_E changes, a rank correlation with isotropy's order below 0.99 with its whole interval. All intervals resample whole
relations, as chapter 04's do for Wikidata: statements of one relation are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

from isouq.studies import require
from isouq.studies.evaluation import Interval, auroc, bootstrap_interval, enough_of_both, ranking, spearman
from isouq.studies.isotropy.distortion import distortion, nearness
from isouq.studies.isotropy.language import Study
from isouq.studies.isotropy.texts import PROXIES, Source
from isouq.studies.resamples import Resamples, UndefinedStatisticError
from isouq.studies.results import Result, key_of

Array = NDArray[np.float64]
DAMPING = 1.0  # of F's own mean eigenvalue: proxies and damping say equally much in an average direction of F
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)
ALL = Source(-1, "all kinds together")  # at no distance of its own


def difference(field: ArrayLike, paraphrased: ArrayLike) -> float:
    """Return the mean field of the paraphrased queries less that of the others, in nats.

    Raises ValueError where one of the two is empty.
    """
    require.same_rows(field=field, paraphrased=paraphrased)
    field, near = require.numbers("field", field), require.labels("paraphrased", paraphrased)
    if near.all() or not near.any():
        raise UndefinedStatisticError(
            f"paraphrased: {near.sum()} of {len(near)} queries given, some but not all wanted"
        )
    return float(field[near].mean() - field[~near].mean())


def is_decidable(control: Interval) -> bool:
    """Return whether the positive control passed: its whole interval lies below 0."""
    return control.high < 0


def verdict(pull: Interval, control: Interval) -> str:
    """Return what an interval of a pull says, by the two-sided rule above."""
    if not is_decidable(control):
        return "not decidable"
    if pull.low <= 0 <= pull.high:
        return "not found"
    return "structured, less variance near" if pull.high < 0 else "structured, more variance near"


def detectable(n: int, power: float = 0.8) -> float:
    """Return the size of a pull that n independent queries show with this probability, at 5 %.

    By Fisher's z, whose variance for Spearman's ρ is 1.06/(n − 3) (Fieller, Hartley and Pearson 1957).
    """
    n, power = require.count("n", n, 4), require.number("power", power, 0.5, 1.0)
    return float(np.tanh((special.ndtri(0.975) + special.ndtri(power)) * np.sqrt(1.06 / (n - 3))))


def field(study: Study, kind: str, damping: float = DAMPING) -> Array:
    """Return the distortion (query,) that F from one kind of proxies ("all" for every one) makes, in nats."""
    return distortion(study.form(kind, damping=damping), study.squares)


def near(study: Study, encode: Callable[[list[str]], Any]) -> dict[str, Array]:
    """Return how near each query lies to each kind of proxies in meaning: minus the distance to the nearest one.

    `encode` gives the texts' vectors, as `SentenceEncoder` does.
    """
    queries, proxies = (np.asarray(encode(list(part["text"])), float) for part in (study.queries, study.proxies))
    return {kind: -nearness(queries, proxies[study.rows(kind)])[:, 0] for kind in _kinds(study)}


def log_scores(study: Study, kind: str | None, damping: float = DAMPING) -> tuple[Array, Array]:
    """Return log of the variance of log p and log U_E (query,) under F from one kind; None for isotropy."""
    form = study.squares if kind is None else study.form(kind, damping=damping)
    return np.log(form), np.log(form) + 2 * study.log_prob


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The control, and the tables of `ladder`, `sweep` and `gram`; `gains` are those of `gains`."""

    control: Interval
    ladder: pd.DataFrame
    sweep: pd.DataFrame
    gram: pd.DataFrame
    gains: dict[str, Interval]
    study: Study

    @property
    def spread_of_log_g(self) -> float:
        """The standard deviation of log ‖∇S‖² over queries, in nats: what a distortion has to be compared with."""
        return float(np.log(self.study.squares).std())

    def results(self, name: str) -> dict[str, Result]:
        """Return the named results of model `name`. Those that need the control have no interval where it fails."""
        study, n = self.study, len(self.study.queries)
        found = {
            "n_parameters": Result(value=study.n_parameters),
            "pull_detectable": Result(value=detectable(n), n=n),
            "control": _result(self.control, claim="C2", unit="nats"),
            "spread_of_log_g": Result(value=self.spread_of_log_g, n=n, unit="nats"),
            "spread_of_2s": Result(value=2 * study.log_prob.std(), n=n, unit="nats"),
            **{key: _result(interval) for key, interval in self.gains.items()},
        }
        if study.errors is not None:
            found["products.relative_error"] = Result(value=study.errors.max(), n=study.errors.size)
        decidable = is_decidable(self.control)
        for kind, row in self.ladder.iterrows():
            found[f"{kind}.pull"] = _result(row["pull"], decidable, claim="C2")
            found[f"{kind}.rank_u_e"] = _result(row["rank_u_e"], decidable, claim="C2")
            found[f"{kind}.rank_g"] = _result(row["rank_g"], decidable)
            found[f"{kind}.spread"] = Result(value=float(row["spread"]), n=n, unit="nats")
        found |= {f"gram.{column}": Result(value=value) for column, value in self.gram.loc["all"].to_dict().items()}
        return {f"isotropy.{key_of(name)}.{key}": result for key, result in found.items()}


def find(study: Study, encode: Callable[[list[str]], Any], *, n_resamples: int, seed: int) -> Findings:
    """Apply all rules to one model's study."""
    how = {"n_resamples": n_resamples, "seed": seed}
    columns = field(study, "paraphrase"), study.queries["paraphrased"].to_numpy()
    control = bootstrap_interval(difference, *columns, clusters=study.queries["relation"], **how)
    return Findings(
        control=control,
        ladder=ladder(study, near(study, encode), control, **how),
        sweep=sweep(study),
        gram=gram(study),
        gains=gains(study, **how),
        study=study,
    )


def ladder(
    study: Study, nearness: Mapping[str, Array], control: Interval, *, n_resamples: int, seed: int
) -> pd.DataFrame:
    """Return a row per kind of proxies, by their distance from the queries, and one for all of them.

    Columns: distance, title, spread (nats), pull, verdict, rank_g and rank_u_e, the rank correlations with isotropy of
    the variance of log p and of U_E. pull and the two ranks are intervals over queries.
    """
    plain, rows = log_scores(study, None), {}
    for kind in _kinds(study):
        bent, scores = field(study, kind), log_scores(study, kind)
        pairs = {"pull": (bent, nearness[kind]), "rank_g": (scores[0], plain[0]), "rank_u_e": (scores[1], plain[1])}
        how: dict[str, Any] = {"clusters": study.queries["relation"], "n_resamples": n_resamples, "seed": seed}
        found = {name: bootstrap_interval(spearman, *pair, **how) for name, pair in pairs.items()}
        row = PROXIES.get(kind, ALL)._asdict() | {"spread": bent.std(), **found}
        rows[kind] = row | {"verdict": verdict(found["pull"], control)}
    return pd.DataFrame.from_dict(rows, orient="index")


def ladder_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return the ladder as a page shows it; the ranks to four places, since they lie near 1."""

    def shown(interval: Interval, spec: str) -> str:
        return f"{interval.value:{spec}} [{interval.low:{spec}}, {interval.high:{spec}}]"

    columns = {
        "distance": [str(d) if d >= 0 else "" for d in table["distance"]],
        "ρ with nearness": [shown(pull, "+.2f") for pull in table["pull"]],
        "structure": table["verdict"].to_numpy(),
        "spread (nats)": [f"{spread:.3f}" for spread in table["spread"]],
        "ρ of G with isotropy's": [shown(rank, ".4f") for rank in table["rank_g"]],
        "ρ of U_E with isotropy's": [shown(rank, ".4f") for rank in table["rank_u_e"]],
    }
    return pd.DataFrame(columns, index=pd.Index(table["title"], name="proxies"))


def sweep(study: Study) -> pd.DataFrame:
    """Return what λ decides, a row for each of DAMPINGS: the control's value, then with all proxies together the rest.

    Columns: control and spread (nats), rank_g and rank_u_e as in `ladder`, and auroc_g and auroc_u_e for "the answer is
    wrong", NaN where too few answers are right or wrong.
    """
    plain, rows = log_scores(study, None), {}
    wrong, paraphrased = (study.queries[name].to_numpy(dtype=bool) for name in ("wrong", "paraphrased"))
    for damping in DAMPINGS:
        scores = log_scores(study, "all", damping)
        found = {
            "control": difference(field(study, "paraphrase", damping), paraphrased),
            "spread": field(study, "all", damping).std(),
        }
        for name, score, before in zip(("g", "u_e"), scores, plain, strict=True):
            found[f"rank_{name}"] = spearman(score, before)
            found[f"auroc_{name}"] = auroc(score, wrong) if enough_of_both(wrong) else np.nan
        rows[damping] = found
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("λ")


def gains(study: Study, *, n_resamples: int, seed: int) -> dict[str, Interval]:
    """Return isotropy's AUROC for "wrong" and what all proxies add to it, for the variance of log p and for U_E.

    Empty where too few answers are right or wrong.
    """
    wrong = study.queries["wrong"].to_numpy(dtype=bool)
    if not enough_of_both(wrong):
        return {}
    plan = Resamples.of(wrong, clusters=study.queries["relation"], n_resamples=n_resamples, seed=seed)
    plain, bent = ([ranking(s, wrong, plan) for s in log_scores(study, kind)] for kind in (None, "all"))
    return {
        "wikidata.isotropic.auroc": plain[0].interval(),
        "wikidata.all.auroc_gain": bent[0].minus(plain[0]).interval(),
        "wikidata.all.auroc_gain_u_e": bent[1].minus(plain[1]).interval(),
    }


def gram(study: Study) -> pd.DataFrame:
    """Return how alike the proxies' gradients are, a row per kind: n, effective_rank, median_cosine, random_cosine.

    The effective rank is (Σe)²/Σe² of the cosines' eigenvalues e, at most n. random_cosine is the median size of the
    cosine of two random directions in as many dimensions as the model has parameters, 0.6745/√P.
    """
    lengths, rows = np.sqrt(np.diag(study.gram)), {}
    for kind in _kinds(study):
        places = study.rows(kind)
        cosines = study.gram[np.ix_(places, places)] / np.outer(lengths[places], lengths[places])
        between, n = np.abs(cosines[np.triu_indices(len(places), 1)]), len(places)
        rows[kind] = [n, n**2 / np.square(cosines).sum(), np.median(between), 0.6745 / np.sqrt(study.n_parameters)]
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["n", "effective_rank", "median_cosine", "random_cosine"]
    )


def _kinds(study: Study) -> list[str]:
    return [*study.proxies["kind"].unique(), "all"]


def _result(interval: Interval, decidable: bool = True, **fields: Any) -> Result:
    ends: dict[str, Any] = {"low": interval.low, "high": interval.high} if decidable else {}
    return Result(value=interval.value, n=interval.n, **ends, **fields)
