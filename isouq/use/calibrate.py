"""Scores and labels → the probability that an answer is wrong, and from where on to answer: `isouq calibrate`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isouq.use.evaluate import (  # all that needs scipy and scikit-learn comes from there, or is imported when used
    N_FOLDS,
    Column,
    Ranking,
    Resamples,
    clusters_of,
    evaluation,
    features_of,
    fits,
    labelled,
    require,
    resamples,
    shown,
    special,
    with_scores,
)

METHODS = ("logistic", "isotonic")
IDENTITY = ("weights", "aggregation", "dtype", "chat", "system")  # what scores depend on; the name is for the reader
Ends = tuple[float, float, float]  # a value and its 95 % interval


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """A fitted map from scores to the probability that an answer is wrong.

    Attributes:
        score: What it is made of: "combined" (log U_E and log U_A), another name that `evaluate` knows, or a column.
        method: "logistic", or "isotonic": a rising step function of the logistic log-odds.
        coefficients: Of the logistic regression: the intercept, then one for each feature, in log-odds.
        knots: Of "isotonic": log-odds and probabilities, between which it is linear; None for "logistic".
        n: The number of labelled answers.
        brier: The Brier score on answers that the fit has not seen, with its 95 % interval over refits.
        ece: The calibration error there, in 5 bins of as many answers each, with its interval.
        abstain: The accuracy asked for, None where none was.
        threshold: Answer where p_wrong is at most this, None without `abstain`.
        accuracy: The share of right ones among the answered, by thresholds chosen on other folds, with its interval.
        answered: The share of answers given, with its interval.
        about: Model, weights, aggregation and dtype of the scores; None where their file does not say.
        version: Of isouq.

    Raises:
        ValueError: A file is no calibrator, scores are of another run, or a table lacks a column or has scores that are
            not finite (by row).

    Example:
        >>> import numpy as np, pandas as pd
        >>> rng = np.random.default_rng(0)
        >>> log_prob = -rng.gamma(2.0, size=200)
        >>> table = pd.DataFrame({"log_prob": log_prob, "right": rng.random(200) < np.exp(log_prob)})
        >>> mine = isouq.calibrate(table, score="likelihood", n_resamples=100)
        >>> mine.save(folder + "/mine.json")
        >>> p_wrong = isouq.Calibrator.load(folder + "/mine.json").apply(table)
        >>> bool(abs(p_wrong.mean() - (~table["right"]).mean()) < 0.01)
        True
    """

    score: str
    method: str
    coefficients: tuple[float, ...]
    knots: tuple[tuple[float, ...], tuple[float, ...]] | None
    n: int
    brier: Ends
    ece: Ends
    abstain: float | None = None
    threshold: float | None = None
    accuracy: Ends | None = None
    answered: Ends | None = None
    about: Mapping[str, Any] | None = None
    version: str = ""

    def apply(self, table: pd.DataFrame) -> pd.Series:
        """Return p_wrong of every row; NaN for rows with an `error`."""
        scored = with_scores(table)
        p_wrong = pd.Series(np.nan, index=range(len(table)), name="p_wrong")
        p_wrong[scored.index] = _Map(np.array(self.coefficients), self.knots)(features_of(scored, self.score))
        return p_wrong.set_axis(table.index)

    def check(self, about: Mapping[str, Any]) -> None:
        """Refuse scores of another model, aggregation or dtype; `about` as `isouq.use.tables.about_of` reads it.

        Raises ValueError naming what differs. Warns where the calibrator does not say what it is made of.
        """
        if self.about is None:
            text = "calibrator: made of scores that do not say which model they are of; not checked"
            warnings.warn(text, stacklevel=2)
        elif different := differences(self.about, about):
            raise ValueError(f"calibrator: it is of other scores ({different}); calibrate on scores of this run")

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"isouq calibrator": asdict(self)}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibrator:
        """Read what `save` wrote."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))["isouq calibrator"]
            lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
            if fields["knots"] is not None:
                lists["knots"] = tuple(map(tuple, fields["knots"]))
            made = cls(**fields | lists)
            x, y = np.array(((0, 1), (0, 1)) if made.knots is None else made.knots, dtype=float)
            beta, n = np.array(made.coefficients, dtype=float), 3 if made.score == "combined" else 2
            fine = np.isfinite(beta).all() and (np.diff(x) >= 0).all() and (abs(y - 0.5) <= 0.5).all()
            if beta.shape != (n,) or not fine:
                raise ValueError("its coefficients or knots are no map to probabilities")
            dict(made.about or {})
            return made
        except FileNotFoundError:
            raise ValueError(f"calibrator: there is no file {path}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no calibrator, one that `isouq calibrate` wrote wanted ({error})") from error

    def __str__(self) -> str:
        """Return what it is and how well it does, in a few lines."""
        lines = [
            f"{self.method} calibrator of {self.score}, fitted on {self.n} answers",
            f"on answers that the fit has not seen: Brier {shown(self.brier)}, calibration error {shown(self.ece)}",
        ]
        if self.threshold is not None and self.accuracy and self.answered:
            lines.append(f"answer where p_wrong <= {self.threshold:.4f}: accuracy {shown(self.accuracy)}")
            lines[-1] += f" ({self.abstain:g} asked for), share answered {shown(self.answered)}"
        return "\n".join(lines)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in words what differs between two runs' scores, "" where they can be compared.

    Of several aggregations the first one counts, whose columns have no suffix.
    """
    there, here = ({**run, "aggregation": run.get("aggregation", "").partition(", ")[0]} for run in (there, here))
    named = {name: [f"{run.get(name)!r}" for run in (there, here)] for name in IDENTITY}
    names = [f"{run['model']!r}" if run.get("model") else "unnamed" for run in (there, here)]
    named["weights"] = [f"{digits} of {name}" for digits, name in zip(named["weights"], names, strict=True)]
    parts = [f"{name} {a} there, {b} here" for name, (a, b) in named.items() if there.get(name) != here.get(name)]
    return ", ".join(parts)


def calibrate(
    table: pd.DataFrame,
    right: str = "right",
    *,
    score: str = "combined",
    method: str = "logistic",
    abstain: float | None = None,
    clusters: str | None = None,
    about: Mapping[str, Any] | None = None,
    n_resamples: int = evaluation.N_RESAMPLES,
    seed: int = 0,
) -> Calibrator:
    """Fit the probability that an answer is wrong to labelled scores.

    Args:
        table: What `score_texts` or `isouq score` gives, with a column of labels. Rows with an `error` are left out.
        right: The column of labels: true and false, 1 and 0, or yes and no.
        score: "combined" (log U_E and log U_A), another name that `evaluate` knows, or a column of the table.
        method: "logistic", or "isotonic", which bends the logistic log-odds; it takes more labels.
        abstain: An accuracy to keep among the answered, between 0 and 1: finds the threshold on p_wrong for it.
        clusters: As in `evaluate`; a cluster's answers also share their fold.
        about: What the scores were made with, as `isouq.use.tables.about_of` reads it from their file.
        n_resamples: Bootstrap resamples behind the intervals, at least 40.
        seed: Of the resamples and folds.

    Returns:
        A `Calibrator`, fitted on all answers. Its Brier and calibration errors are of answers that a fit has not seen:
        values by 5 folds, 20 times, intervals by refits in every resample, tried on the answers left out. The threshold
        is the largest whose answered ones, by out-of-fold p_wrong, are as accurate as asked for; the accuracy reported
        is of thresholds chosen without the fold that they are tried on, with the rows resampled.

    Raises:
        ValueError: As `evaluate`; an unknown method, `abstain` outside (0, 1), fewer right or wrong answers than folds,
            or an accuracy that no threshold keeps among at least 10 answers.

    Example:
        >>> import numpy as np, pandas as pd
        >>> rng = np.random.default_rng(0)
        >>> log_prob = -rng.gamma(1.0, size=300)
        >>> table = pd.DataFrame({"log_prob": log_prob, "right": rng.random(300) < np.exp(log_prob)})
        >>> mine = isouq.calibrate(table, score="likelihood", abstain=0.7, n_resamples=100)
        >>> mine.method, mine.n, bool(0 < mine.threshold < 1)
        ('logistic', 300, True)
    """
    require.one_of("method", method, METHODS)
    if abstain is not None:
        abstain = require.number("abstain", abstain, 0.0, 1.0)
    used, wrong, _ = labelled(table, right)
    features = fits.steady(str(score), features_of(used, score))
    groups = clusters_of(used, clusters)
    plan = resamples(wrong, n_resamples, seed, groups)
    draws: Any = [{"n_folds": N_FOLDS, "seed": (seed + repeat) % 2**32} for repeat in range(fits.N_REPEATS)]
    try:
        folds = np.stack([fits.draw_folds(wrong, clusters=plan.clusters, **draw) for draw in draws])
    except evaluation.UndefinedStatisticError as error:
        what, _, text = str(error).partition(": ")
        raise ValueError(f"{right if what == 'wrong' else clusters}: {text}; label more") from error
    held_out = _held_out(features, wrong, folds, method)
    errors = _errors(features, wrong, held_out, plan, method)
    [fitted] = _fit(features, wrong, np.ones((1, len(wrong))), method)
    found = Calibrator(
        score=score,
        method=method,
        coefficients=tuple(fitted.coefficients.tolist()),
        knots=fitted.knots,
        n=len(wrong),
        brier=errors["brier"],
        ece=errors["ece"],
        about=dict(about) if about else None,
        version=metadata.version("isouq"),
    )
    return found if abstain is None else _with_threshold(found, abstain, held_out, wrong, folds, plan, groups)


# ---- fits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Map:
    """Features (row, feature) → p_wrong (row,)."""

    coefficients: Column
    knots: tuple[tuple[float, ...], tuple[float, ...]] | None

    def __call__(self, features: Column) -> Column:
        log_odds = self.coefficients[0] + features @ self.coefficients[1:]
        return special.expit(log_odds) if self.knots is None else np.interp(log_odds, *self.knots)


def _fit(features: Column, wrong: NDArray[np.bool_], weights: Any, method: str) -> list[_Map]:
    """One map for each row of `weights`, by the answers that have weight; NaN for rows of one class."""
    maps = [_Map(beta, None) for beta in fits.fit_logistic(features, wrong, weights)]
    return maps if method == "logistic" else [_steps(*of, features, wrong) for of in zip(maps, weights, strict=True)]


def _steps(line: _Map, weights: Any, features: Column, wrong: NDArray[np.bool_]) -> _Map:
    from sklearn.isotonic import IsotonicRegression

    if np.isnan(line.coefficients).any():
        return line
    used = np.flatnonzero(weights)
    log_odds = line.coefficients[0] + features[used] @ line.coefficients[1:]
    steps = IsotonicRegression(y_min=0, y_max=1).fit(log_odds, wrong[used].astype(float), weights[used].astype(float))
    return replace(line, knots=(tuple(steps.X_thresholds_.tolist()), tuple(steps.y_thresholds_.tolist())))


def _held_out(features: Column, wrong: NDArray[np.bool_], folds: NDArray[np.int64], method: str) -> Column:
    """p_wrong by maps that have not seen the answer, (repeat, row)."""
    kept = (folds[:, None] != np.arange(N_FOLDS)[:, None]).astype(float)
    maps = _fit(features, wrong, kept.reshape(-1, len(wrong)), method)
    every = np.stack([fitted(features) for fitted in maps]).reshape(kept.shape)
    return np.take_along_axis(every, folds[:, None], axis=1)[:, 0]


def _errors(
    features: Column, wrong: NDArray[np.bool_], held_out: Column, plan: Resamples, method: str
) -> dict[str, Ends]:
    """Brier score and calibration error with their intervals: out of fold, and out of bag over refits."""
    out_of_bag = np.stack([fitted(features) for fitted in _fit(features, wrong, plan.counts, method)])
    undefined, ends = np.isnan(out_of_bag).any(axis=1), {}
    for name, how in {"brier": fits.weighted_brier, "ece": fits.weighted_ece}.items():
        value = float(how(held_out, wrong, np.ones(held_out.shape)).mean())
        draws = np.where(undefined, np.nan, how(np.nan_to_num(out_of_bag), wrong, plan.unseen))
        n_units = min(int(wrong.sum()), int((~wrong).sum()))
        ends[name] = _ends(Ranking(value, draws, draws, None, len(wrong), n_units).interval())
    return ends


def _ends(interval: evaluation.Interval) -> Ends:
    return interval.value, interval.low, interval.high


# ---- when to answer --------------------------------------------------------------------------------------------------


def _with_threshold(
    found: Calibrator,
    abstain: float,
    held_out: Column,
    wrong: NDArray[np.bool_],
    folds: NDArray[np.int64],
    plan: Resamples,
    groups: NDArray[Any] | None,
) -> Calibrator:
    labels = np.broadcast_to(wrong, held_out.shape)
    threshold, best = _threshold(held_out.ravel(), labels.ravel(), abstain, fits.N_REPEATS)
    if threshold is None:
        least = f"no threshold keeps it among {evaluation.MIN_PER_CLASS} answers or more; the best one has {best:.3f}"
        raise ValueError(f"abstain: {abstain:g} given, but {least}; ask for less, or find a better score")
    decided = np.zeros(held_out.shape)
    for repeat, fold in np.ndindex(fits.N_REPEATS, N_FOLDS):
        test = folds[repeat] == fold
        limit, _ = _threshold(held_out[repeat, ~test], wrong[~test], abstain, 1)
        decided[repeat, test] = 0 if limit is None else held_out[repeat, test] <= limit
    share = decided.mean(axis=0)

    def accuracy(share: Column, right: NDArray[np.bool_]) -> float:
        if not share.any():
            raise evaluation.UndefinedStatisticError
        return float(share @ right / share.sum())

    options: dict[str, Any] = {"clusters": groups, "n_resamples": len(plan.counts), "seed": plan.seed}
    of_answered = evaluation.bootstrap_interval(accuracy, share, ~wrong, **options)
    answered = evaluation.bootstrap_interval(np.mean, share, **options)
    return replace(found, abstain=abstain, threshold=threshold, accuracy=_ends(of_answered), answered=_ends(answered))


def _threshold(p: Column, wrong: NDArray[np.bool_], accuracy: float, repeats: int) -> tuple[float | None, float]:
    """The largest p whose answers up to it are as accurate as wanted, None if there is none; and the best accuracy."""
    order = np.argsort(p)
    last = np.flatnonzero(np.append(np.diff(p[order]) > 0, True))
    last = last[last + 1 >= min(len(p), repeats * evaluation.MIN_PER_CLASS)]
    right = np.cumsum(~wrong[order])[last] / (last + 1)
    enough = np.flatnonzero(right >= accuracy)
    return (float(p[order][last[enough[-1]]]) if len(enough) else None), float(right.max())
