"""Every public function of the study refuses nonsense by name: a row per function, fed what each kind must refuse."""

import inspect
import re

import numpy as np
import pandas as pd
import pytest
import torch

from isouq.studies import evaluation, fits, rejection
from isouq.studies.isotropy import chain, covariance, distortion, dose, ranks
from isouq.studies.qa import analysis, tables
from isouq.studies.synthetic import point, posterior, problems

RNG = np.random.default_rng(0)
N = 40
SCORE, OTHER, VARIANCE = RNG.normal(size=N), RNG.normal(size=N), RNG.uniform(1, 2, N)
WRONG, GROUP = (np.arange(N) % 3 == 0).astype(int), np.arange(N) // 4
ROWS, LABELS = RNG.normal(size=(N, 3)), np.arange(N) % 2
JACOBIAN, LOGITS = RNG.normal(size=(N, 2, 5)), RNG.normal(size=(N, 2))
GRAM = ROWS.T @ ROWS
PROBLEM = problems.make("binary_rings", n_examples=12, resolution=4)
THETA = RNG.normal(size=PROBLEM.model.network.n_parameters)
CLASSES = np.zeros(16, dtype=int)
DRAWS, VALUES = RNG.normal(size=(4, 20, len(THETA))), RNG.normal(size=(4, 20, 16, 1))
CASE = dose.Case(problem=PROBLEM, theta=THETA, g=ROWS, references={})
SHIFTS = np.random.default_rng(0).permuted(np.tile(np.arange(N), (5, 1)), axis=1)


def having(value: float, array: np.ndarray) -> np.ndarray:
    """The array with another value at its second place."""
    changed = array.astype(float)
    changed.flat[1] = value
    return changed


# What a kind of argument must refuse, by what it is; a function makes it of an array that is right.
TYPES = {
    "masked": lambda a: np.ma.masked_array(a, mask=having(1, 0 * a) == 1),
    "text": lambda a: a.astype(str),
    "objects": lambda a: np.full(a.shape, None),
    "complex": lambda a: a + 1j,
    "empty": lambda a: a[:0],
    "an axis more": lambda a: a[None],
    "one number": lambda a: a.ravel()[0],
    "gradients kept": lambda a: torch.tensor(a.astype(float), requires_grad=True),
    "ragged": lambda a: [[1.0], [1.0, 2.0]],
    "a mapping": lambda a: {"a": 1},
}
NAN, INFINITE = {"NaN": lambda a: having(np.nan, a)}, {"infinite": lambda a: having(np.inf, a)}
SHORTER = {"shorter": lambda a: a[:-1]}
WHOLE = {"negative": lambda a: a - 99, "too large": lambda a: a + 99, "not whole": lambda a: a + 0.5}
KINDS = {
    "array": TYPES | NAN | INFINITE | SHORTER,
    "alone": TYPES | NAN | INFINITE,  # nothing else says how long it should be
    "score": TYPES | NAN | SHORTER,  # it is ranked, so it may be infinite
    "draws": TYPES,  # the gate is there to see NaN
    "labels": TYPES | NAN | INFINITE | SHORTER | {"three classes": lambda a: a + 1},
    "enough": {name: TYPES[name] for name in TYPES if name != "empty"} | NAN,
    "classes": TYPES | NAN | SHORTER | WHOLE,
    "groups": {name: TYPES[name] for name in ("masked", "objects", "an axis more", "one number")} | NAN | SHORTER,
    "orders": TYPES | {"negative": WHOLE["negative"], "too large": WHOLE["too large"]},
    "count": dict.fromkeys((-1, 0, 2.5, True, "3", None, np.nan)),
    "count or None": dict.fromkeys((-1, 0, 2.5, True, "3", np.nan)),
    "whole": dict.fromkeys((-1, 2.5, True, "3", None)),
    "seed": dict.fromkeys((-1, 1.5, None, True, "0", 2**40)),
    "level": dict.fromkeys((0.0, 1.0, -1.0, 95.0, np.nan, "x", None, 1 - 2**-53)),
    "share": dict.fromkeys((0.0, -1.0, 1.5, np.nan, "x", None)),
    "positive": dict.fromkeys((0.0, -1.0, np.nan, np.inf, "x", None)),
    "number": dict.fromkeys((np.nan, np.inf, "x", None)),
    "name": dict.fromkeys(("no such", None, 3)),
}
PEARSON = {"a": (SCORE, "array"), "b": (OTHER, "array")}
ASKED = {"score": (SCORE, "score"), "wrong": (WRONG, "labels")}
DRAWN = {"n_resamples": (40, "count"), "seed": (0, "seed")}
NET = {"jacobian": (JACOBIAN, "array"), "logits": (LOGITS, "array")}
AT = {"problem": (PROBLEM, ""), "theta": (THETA, "array")}
ANALYSIS = analysis.Analysis(n_resamples=40)

ROWS_OF = {
    evaluation.pearson: PEARSON,
    evaluation.spearman: PEARSON,
    evaluation.auroc: ASKED,
    evaluation.bootstrap_interval: DRAWN | {
        "statistic": (np.mean, ""), "level": (0.9, "level"), "clusters": (GROUP, "groups")
    },
    evaluation.wilson_interval: {"successes": (1, "whole"), "n": (3, "count"), "level": (0.9, "level")},
    evaluation.is_constant: {"column": (SCORE, "alone")},
    evaluation.n_pairs: {"wrong": (WRONG, "labels"), "stratum": (GROUP, "groups")},
    fits.questions_needed: {"gap": (0.1, "positive"), "spread": (1.0, "number")},
    fits.auroc_spread: {"value": (0.6, "level"), "share_wrong": (0.5, "level")},
    fits.residual_ranks: {"score": (SCORE, "score"), "given": (ROWS, "array")},
    fits.draw_folds: {
        "wrong": (WRONG, "labels"), "clusters": (GROUP, "groups"), "n_folds": (3, "count"), "seed": (0, "seed")
    },
    fits.out_of_fold_scores: {
        "features": (ROWS, "array"), "wrong": (WRONG, "labels"), "clusters": (GROUP, "groups"), "n_folds": (3, "count"),
        "seed": (0, "seed"),
    },
    fits.cross_fitted: {
        "features": (ROWS, "array"), "wrong": (WRONG, "labels"), "clusters": (GROUP, "groups"), "n_folds": (3, "count"),
        "seed": (0, "seed"),
    },
    fits.brier: {"probability": (VARIANCE / 2, "array"), "wrong": (WRONG, "labels")},
    fits.ece: {"probability": (VARIANCE / 2, "array"), "wrong": (WRONG, "labels")},
    rejection.accuracies: ASKED,
    rejection.aurc: ASKED,
    rejection.prr: ASKED | {"max_rejection": (0.5, "share")},
    evaluation.enough_of_both: {"wrong": (WRONG, "enough"), "minimum": (10, "count")},
    covariance.from_rows: {"rows": (ROWS, "alone"), "n_examples": (N, "count or None")},
    covariance.from_products: {"gram": (GRAM, "array")},
    covariance.scores: NET | {"labels": (LABELS, "classes")},
    covariance.fisher_rows: NET,
    distortion.distortion: {"estimate": (VARIANCE, "array"), "reference": (VARIANCE[::-1], "array")},
    distortion.log_variance: {"name": ("variance", ""), "variance": (VARIANCE, "alone")},
    distortion.nearness: {"points": (ROWS, "alone"), "proxies": (ROWS[:5], "alone")},
    distortion.structures: {
        "fields": ([SCORE], ""), "features": (ROWS, "array"), "permutations": (SHIFTS, "orders"),
        "given": (VARIANCE[:, None], "array"),
    },
    distortion.grid_shifts: {"shape": ((4, 4), "")},
    point.find_map: {
        "problem": (PROBLEM, ""), "n_starts": (1, "count"), "seed": (0, "seed"), "max_steps": (5, "count")
    },
    point.descend: {"problem": (PROBLEM, ""), "starts": (THETA[None], "alone"), "max_steps": (5, "count")},
    point.predicted_classes: AT,
    point.gradients: AT | {"classes": (CLASSES, "classes")},
    point.probabilities: AT | {"classes": (CLASSES, "classes")},
    point.jacobian: AT | {"inputs": (PROBLEM.inputs, "alone")},
    point.hessian: AT,
    point.ggn: AT,
    point.laplace: AT | {"classes": (CLASSES, "classes")},
    point.quadratic_form: {"g": (ROWS, "alone"), "precision": (GRAM, "array")},
    point.torch_module: {"model": (PROBLEM.model, ""), "theta": (THETA, "array")},
    posterior.functions: {"problem": (PROBLEM, ""), "draws": (DRAWS, "draws")},
    posterior.of_classes: {"problem": (PROBLEM, ""), "thetas": (DRAWS[0], ""), "classes": (CLASSES, "classes")},
    posterior.judge: {
        "values": (VALUES, "draws"), "divergent": (np.zeros((4, 20)), ""), "energy": (DRAWS[..., 0], ""),
        "seconds": (0.0, ""),
    },
    posterior.isotropy: {"draws": (DRAWS, "alone")},
    problems.make: {
        "name": ("binary_xor", "name"), "seed": (0, "seed"), "n_examples": (9, "count or None"), "model": (None, ""),
        "resolution": (5, "count or None"), "gap": (None, ""),
    },
    problems.spec: {"name": ("binary_moons", "name")},
    dose.proxies: {"problem": (PROBLEM, ""), "source": ("shift 2", "name")},
    ranks.network: {
        "name": ("binary_xor", "name"), "seed": (0, "seed"), "width": (4, "count"), "prior": ("fixed", "name")
    },
    chain.laplace: AT,
    chain.gaussian: AT | {"precision": (np.eye(len(THETA)), "array"), "classes": (CLASSES, "classes")},
    chain.noise: {"halves": (VALUES[0, :2, :, 0] ** 2, "alone")},
    ranks.factored: AT | {"classes": (CLASSES, "classes")},
    ranks.measure: AT | {"weight": (1.0, "positive")},
    tables.compare: {"aurocs": ({}, ""), "column": ("value", "name")},
    analysis.curved: {"features": (ROWS, "alone")},
    analysis.scored: {"table": (pd.DataFrame(), ""), "aggregation": ("sequence", "name")},
    analysis.rankings: {
        "table": (pd.DataFrame(), ""), "aggregation": ("sequence", "name"), "analysis": (ANALYSIS, "")
    },
}  # fmt: skip
# These take a table, a problem or a case, whose parts are checked where they are used, and no number of their own.
TAKE_OBJECTS = {
    dose.case, dose.cases, dose.form, dose.excesses, dose.recipes, dose.table, dose.responses, dose.over_seeds,
    dose.verdicts, dose.bands, dose.maps, dose.curves, dose.swept, dose.named_results, ranks.table, ranks.by_width,
    ranks.slopes, ranks.text, ranks.named_results, chain.log_variances, chain.steps, chain.table, chain.by_problem,
    chain.text, chain.named_results, analysis.has_enough, analysis.if_defined, analysis.rank, analysis.last_layers,
    analysis.auroc_table, analysis.within, analysis.added_signal, analysis.agreement, analysis.accuracy,
    analysis.clustered, analysis.named_results, analysis.result_of, tables.table_2, tables.p_true_question,
    tables.label, tables.by_pair, tables.browsed, tables.description, tables.named, tables.method_labels,
    tables.rejection, tables.fair, tables.prompts, tables.model_name, tables.beside_paper, evaluation.bca,
    evaluation.defined, evaluation.max_t, evaluation.moderate, evaluation.ranking, evaluation.stratified_ranking,
    evaluation.weighted_auroc, evaluation.on_all, fits.fit_logistic, fits.steady, fits.weighted_log_score,
    fits.weighted_brier, fits.weighted_ece, fits.of_probability, rejection.weighted_aurc, rejection.weighted_prr,
    point.objective, posterior.sample, posterior.reference, problems.titles, problems.float64,
}  # fmt: skip


def test_every_public_function_has_a_row_and_every_argument_of_it_a_kind():
    modules = (evaluation, fits, rejection, covariance, distortion, point, posterior, problems, dose, ranks, chain)
    modules += (analysis, tables)
    public = {f for m in modules for n, f in vars(m).items() if inspect.isfunction(f) and not n.startswith("_")}
    public = {f for f in public if f.__module__ in {m.__name__ for m in modules}}
    assert {f.__qualname__ for f in public - TAKE_OBJECTS} <= {f.__qualname__ for f in ROWS_OF}
    for function, row in ROWS_OF.items():
        parameters = inspect.signature(function).parameters
        assert set(parameters) - {"columns"} == set(row), function.__qualname__


def call(function, **changed):
    """The function on its row of the table, some of it changed."""
    given = {key: value for key, (value, _) in ROWS_OF[function].items()} | changed
    columns = (given.pop("statistic"), SCORE) if function is evaluation.bootstrap_interval else ()
    function(*columns, **given)


@pytest.mark.parametrize("function", ROWS_OF, ids=lambda function: f"{function.__module__[6:]}.{function.__name__}")
def test_nonsense_is_refused_by_the_name_of_the_argument(function):
    for name, (value, kind) in ROWS_OF[function].items():
        for what, make in KINDS[kind].items() if kind else ():
            print(name, what)  # the last one shown is the one that fails
            with pytest.raises((ValueError, TypeError), match=rf"\b{re.escape(name)}\b"):
                call(function, **{name: what if make is None else make(value)})
    if function is not tables.compare and not function.__module__.endswith("analysis"):  # an empty table has no columns
        call(function)  # what is right is not refused


SERIES = {name: pd.Series(array) for name, array in {"score": SCORE, "other": VARIANCE, "wrong": WRONG}.items()}


@pytest.mark.parametrize(
    "call",
    [
        lambda s, w: evaluation.auroc(s["score"], w),
        lambda s, w: evaluation.ranking(s["score"], w, evaluation.Resamples.of(w)),
        lambda s, w: evaluation.stratified_ranking(s["score"], w.to_numpy(), w, evaluation.Resamples.of(w)),
        lambda s, w: evaluation.pearson(s["score"], s["other"].loc[w.index]),
        lambda s, w: evaluation.spearman(s["score"], s["other"].loc[w.index]),
        lambda s, w: evaluation.bootstrap_interval(evaluation.auroc, s["score"], w),
        lambda s, w: fits.out_of_fold_scores(s[["score"]], w),
        lambda s, w: distortion.distortion(s["other"], s["other"].loc[w.index]),
    ],
)
def test_series_of_other_rows_are_not_paired_by_position(call):
    table = pd.DataFrame(SERIES)
    with pytest.raises(ValueError, match="the same rows in the same order wanted"):
        call(table, table["wrong"].sort_values(kind="stable"))


def test_series_of_the_same_rows_give_what_arrays_give():
    assert evaluation.auroc(SERIES["score"], SERIES["wrong"]) == evaluation.auroc(SCORE, WRONG)
    plan = evaluation.Resamples.of(WRONG)
    ranked = [evaluation.ranking(score, WRONG, plan).interval() for score in (SERIES["score"], SCORE)]
    assert ranked[0] == ranked[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation.pearson(having(1.7e308, SCORE), OTHER), r"a: values up to 1\.7e\+308"),
        (lambda: evaluation.bootstrap_interval(lambda a: np.nan, SCORE), "statistic: its value: nan"),
        (lambda: evaluation.bootstrap_interval(lambda a: a[0] if a[0] > 0 else np.inf, SCORE), "statistic: its value"),
        (lambda: evaluation.bootstrap_interval(lambda a: a, SCORE), "statistic: its value"),
        (lambda: evaluation.bootstrap_interval(np.mean), "columns: 0 given"),
        (lambda: evaluation.bootstrap_interval(np.mean, SCORE, n_resamples=39), "n_resamples: 39 .* at least 40"),
        (
            lambda: evaluation.bootstrap_interval(np.mean, SCORE, n_resamples=300, level=0.999),
            "n_resamples: 300 .* at least 2000",
        ),
        (lambda: evaluation.bootstrap_interval(np.mean, SCORE[:4]), "columns: 4 rows given, too few"),
        (lambda: evaluation.wilson_interval(4, 3), "successes: 4 given, .* at most 3"),
        (lambda: evaluation.Interval(0.5, 0.6, 0.4, 3), "interval: 0.5"),
        (lambda: evaluation.Interval(np.nan, 0.6, 0.7, 3), "interval: nan"),
        (lambda: covariance.from_products(np.triu(GRAM)), "gram: not symmetric"),
        (lambda: covariance.from_rows(ROWS).share_below(0 * ROWS, 1.0), "g: 40 of 40 gradients are zero"),
        (lambda: covariance.from_rows(ROWS).share_below(ROWS, np.nan), "threshold: nan"),
        (lambda: covariance.from_rows(ROWS).quadratic_form(ROWS, damping=np.nan), "damping: nan"),
        (lambda: covariance.Products(np.ones(3), np.ones((2, 4))), "with_rows"),
        (lambda: distortion.structures([SCORE], np.ones((N, 1)), SHIFTS), "features: a constant one"),
        (lambda: distortion.structures([SCORE], ROWS[:, [0, 0]], SHIFTS), "features: a constant one"),
        (lambda: distortion.structures([SCORE], ROWS, 0 * SHIFTS), "permutations: rows given that are no order"),
        (lambda: dose.form(CASE, "fischer", ROWS), "matrix: 'fischer' given.*did you mean 'fisher'"),
        (lambda: dose.proxies(PROBLEM, "shift 4"), "source: 'shift 4' given"),
        (lambda: posterior.isotropy(np.ones((4, 10, 3))), "draws: all the same"),
        (lambda: analysis.Analysis(n_resamples=39), "n_resamples: 39"),
        (lambda: analysis.Analysis(n_folds=11), "n_folds: 11"),
        (lambda: tables.compare({}), "aurocs: no table"),
    ],
)
def test_what_is_not_defined_is_refused_in_words(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("share", [1 / N, 0.1, 0.3])
def test_a_feature_that_far_values_flatten_is_refused(share):
    """Standardised, all its other values are alike, and a ridge takes their perfect separation for nothing."""
    far = np.where(np.arange(N) < share * N, 1e9, 1.0)
    feature = ((2 * WRONG - 1) * far)[:, None]
    with pytest.raises(ValueError, match="a feature with values far beyond the others"):
        fits.out_of_fold_scores(feature, WRONG)
    rare = (np.arange(N) < 3).astype(float)[:, None]  # nothing is flattened where the others are equal
    assert np.isfinite(fits.out_of_fold_scores(rare, WRONG)).all()


def test_undefined_is_told_from_wrong():
    for call in (
        lambda: evaluation.bootstrap_interval(np.mean, SCORE[:3]),
        lambda: fits.out_of_fold_scores(ROWS, np.arange(N) < 2),
    ):
        with pytest.raises(evaluation.UndefinedStatisticError):
            call()
