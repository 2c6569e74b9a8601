"""Dose and response: proxies and matrices are what they are called, and an excess is what the docstring says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from isouq.pipeline import schemas
from isouq.studies import claims
from isouq.studies.isotropy import dose
from isouq.studies.isotropy.dose import Case
from isouq.studies.synthetic import atlas, plan, point, problems

CLAIMS = Path(__file__).resolve().parents[2] / "book" / "claims.yml"
RECORDS = [
    atlas.find(plan.atlas_job(0, name, "tanh", 32, "fixed", "few"), [dose.COMMITTED])
    for name in ("binary_moons", "binary_sine")
]


def small(name: str) -> Case:
    """A case for which isotropy is right: all of its references are ‖g‖²."""
    problem = problems.make(name, seed=900, n_examples=30, resolution=8)
    theta = np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    g = point.gradients(problem, theta, point.predicted_classes(problem, theta))
    return Case(problem=problem, theta=theta, g=g, references=dict.fromkeys(dose.REFERENCES, np.square(g).sum(1)))


def test_a_mode_that_is_the_map_too_is_still_found():
    record = RECORDS[0]
    fields = {name: values.copy() for name, values in record.fields.items()}
    at = int(np.abs(fields["gn"][2:] / fields["mode_gn"] - 1).max(axis=1).argmin()) + 2
    for name in ("gn", "thetas"):
        fields[name][1] = fields[name][at]
    assert (dose.case(replace(record, fields=fields)).theta == fields["thetas"][at]).all()


def test_a_record_is_read_at_the_mode_of_its_local_covariance():
    record = RECORDS[0]
    found = dose.case(record)
    np.testing.assert_allclose(np.square(found.g).sum(1), record.fields["mode_gn"], rtol=1e-3)
    assert (found.references["local"] == record.fields["mode_taylor"]).all()
    H = point.ggn(found.problem, found.theta)
    np.testing.assert_allclose(
        found.references["laplace"], np.einsum("qp,pr,qr->q", found.g, np.linalg.inv(H), found.g)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: replace(r, facts=r.facts | {"passed": False, "failures": ["ESS 9 < 400"]}),
            r"failed the gate \(ESS 9",
        ),
        (lambda r: replace(r, fields={k: v for k, v in r.fields.items() if k != "mode_gn"}), "no mode has enough"),
        (
            lambda r: replace(r, fields=r.fields | {"mode_gn": 2 * r.fields["mode_gn"]}),
            "none of its modes has the ‖g‖² of",
        ),
    ],
)
def test_a_record_without_a_case_is_left_out_by_name(change, message):
    spoilt = change(RECORDS[0])
    with pytest.raises(ValueError, match=rf"binary_moons-w32.*{message}"):
        dose.case(spoilt)
    with pytest.raises(ValueError, match=rf"records: 1 problems .*, at least 2 wanted: binary_moons-w32.*{message}"):
        dose.cases([spoilt, RECORDS[1]])
    found, left_out = dose.cases([*RECORDS, spoilt])
    assert (len(found), len(left_out)) == (2, 1)


def test_proxies_are_what_their_names_say():
    problem = problems.make("binary_moons", seed=900, n_examples=30)
    drawn = {source: dose.proxies(problem, source) for source in (*dose.SOURCES, dose.CONTROL)}
    assert {inputs.shape for inputs in drawn.values()} == {(30, 2)}
    np.testing.assert_allclose(drawn["shift 2.5"] - drawn["shift 0"], np.tile([2.5, 0], (30, 1)))
    assert (drawn[dose.CONTROL] == drawn["shift 0"]).all()
    assert not any(np.isin(inputs, problem.inputs).any() for inputs in drawn.values())
    assert (drawn["other problem"] == problems.make("multiclass_stripes", seed=10_900, n_examples=30).inputs).all()
    assert np.abs(drawn["noise"]).max() <= 3
    assert (dose.proxies(problem, "noise") == drawn["noise"]).all()


@pytest.mark.parametrize("name", ["binary_xor", "multiclass_blobs"])
def test_the_fisher_of_the_training_data_at_its_own_damping_is_laplace(name):
    """Also under a prior whose scales differ between parameters, which one mean precision would not give."""
    case = small(name)
    (form,) = dose.form(case, "fisher", case.problem.inputs)
    laplace = point.quadratic_form(case.g, point.ggn(case.problem, case.theta))
    np.testing.assert_allclose(form / len(case.problem.inputs), laplace, rtol=1e-7)


@pytest.mark.parametrize("matrix", dose.MATRICES)
def test_the_largest_damping_leaves_isotropy(matrix):
    case = small("multiclass_blobs")
    own, large = dose.form(case, matrix, dose.proxies(case.problem, "shift 2"), (1.0, 1e7))
    norm = np.square(case.g).sum(1)
    assert dose.distortion(own, norm).std() > 0.1
    assert dose.distortion(large, norm).std() < 1e-3


def test_kfac_under_several_prior_scales_is_refused():
    case = small("binary_xor")
    with pytest.raises(ValueError, match="matrix: 'kfac' has one damping; the prior has several scales, use 'fisher'"):
        dose.form(case, "kfac", case.problem.inputs)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_drawn_labels_follow_the_model(n_classes):
    logits = np.tile([[1.0, 0.0, -1.0]] if n_classes == 3 else [[1.0]], (3000, 1))
    drawn = dose._drawn_labels(logits, seed=0)
    p = np.exp([1.0, 0.0, -1.0] if n_classes == 3 else [0.0, 1.0])
    np.testing.assert_allclose(np.bincount(drawn, minlength=n_classes) / 3000, p / p.sum(), atol=0.03)


def test_an_excess_is_over_isotropy_and_of_the_matrix():
    """Where isotropy is right only the matrix has structure; where the matrix is, it has none and isotropy all."""
    case = small("binary_sine")
    rows = pd.DataFrame(list(dose.excesses(case)))
    assert not rows.loc[rows["matrix"] == "isotropic", ["structure", "excess", "nats2", "added"]].any(axis=None)
    far = rows[(rows["source"] == "shift 2") & (rows["matrix"] == "fisher")]
    assert (far["excess"] == far["structure"]).all()
    assert (far["added"] > 0).all()
    (form,) = dose.form(case, "fisher", dose.proxies(case.problem, "shift 2"))
    turned = pd.DataFrame(list(dose.excesses(replace(case, references=case.references | {"local": form}))))
    turned = turned[(turned["source"] == "shift 2") & (turned["reference"] == "local")].set_index("matrix")
    assert turned.loc["fisher", "structure"] == 0
    assert turned.loc["fisher", "excess"] == -turned.loc["isotropic", "structure"]


@pytest.fixture
def table():
    """Excesses by hand: seed k of every problem has (0.1 + k/100) for each unit of shift; isotropy and others 0."""
    rows = []
    for width in (8, 32):
        for source, matrices in dose.recipes(width).items():
            shift = float(source[6:]) if source.startswith("shift") else {"noise": -1, "control": -2}.get(source, 5)
            for matrix, (dampings, references) in matrices.items():
                rows += [
                    {"width": width, "source": source, "matrix": matrix, "nats2": 1.0, "added": 1.0, "seed": seed,
                     "problem": problem, "damping": damping, "reference": name,
                     "excess": (0.1 + seed / 100) * shift / damping}
                    for problem in ("binary_moons", "binary_sine", "binary_corner")
                    for seed in (0, 2)
                    for damping in dampings
                    for name in references
                ]  # fmt: skip
    return pd.DataFrame(rows)


def test_responses_have_the_mean_the_slope_and_the_other_sources(table):
    found = dose.responses(table).loc[(32, "fisher", "local", "binary_moons", 2)]
    expected = {"shifted": 0.24, "slope": 0.12, "near": 0, "other problem": 0.6, "noise": -0.12, "control": -0.24}
    assert found.drop(["nats2", "added", "added near"]).to_dict() == pytest.approx(expected)
    averaged = dose.over_seeds(dose.responses(table)).loc[(32, "fisher", "local", "binary_moons")]
    assert averaged["shifted"] == pytest.approx(0.22)


def test_every_check_of_small_networks_has_its_result(table):
    results = dose.named_results(table, n_records=20)
    (claim,) = (claim for claim in claims.load(CLAIMS) if claim.id == "C2")
    asked = [check.key for check in claim.checks if check.key.startswith("isotropy.dose")]
    assert len(asked) == 9
    assert set(asked) <= set(results)
    core = results["isotropy.dose.w32.fisher.local.shifted"]
    assert (core.value, core.n, core.claim) == (pytest.approx(0.22), 3, "C2")
    assert results["isotropy.dose.w32.fisher.mcmc.shift_1_5"].value == pytest.approx(0.165)
    assert results["isotropy.dose.w32.ekfac.damped"].value == pytest.approx(0.22 / 1e5)
    assert (results["isotropy.dose.n"].value, results["isotropy.dose.n_used"].value) == (20, 12)


def test_a_problem_has_a_verdict_by_its_seeds(table):
    change = {"binary_moons": 1, "binary_sine": -1, "binary_corner": 0}
    table["excess"] = table["problem"].map(change) + (table["seed"] - 1) / 100
    found = dose.verdicts(dose.responses(table), {name: name for name in change})
    assert found["verdict"].to_dict() == {
        "binary_moons": "bends", "binary_sine": "does not", "binary_corner": "undecided"
    }  # fmt: skip
    assert (found["seeds"] == 2).all()


def test_verdicts_without_the_core_width_are_refused(table):
    with pytest.raises(ValueError, match=r"responses: widths \[8\] given, 32 wanted among them"):
        dose.verdicts(dose.responses(table[table["width"] == 8]), {})


def test_the_table_of_bands_says_what_the_results_say(table):
    found = dose.bands(dose.responses(table))
    core = dose.named_results(table, n_records=20)["isotropy.dose.w32.fisher.local.slope"]
    assert found.loc[(32, "fisher", "local"), "slope"] == f"{core.value:.2f} [{core.low:.2f}, {core.high:.2f}]"
    assert found.loc[(32, "kfac", "local"), "control"] == ""


def test_maps_are_of_isotropy_and_of_what_the_proxies_made():
    case = small("binary_sine")
    fields, inputs = dose.maps(case)
    assert not fields.pop("isotropy").any()
    assert list(fields) == list(inputs) == ["Fisher, shift 0", "Fisher, shift 2", "Fisher, other problem"]
    (form,) = dose.form(case, "fisher", inputs["Fisher, shift 2"])
    assert (fields["Fisher, shift 2"] == dose.distortion(form, np.square(case.g).sum(1))).all()


def test_the_damping_sweep_and_the_curves_are_means_over_seeds(table):
    swept = dose.swept(table).set_index(["series", "damping"])
    assert len(swept) == len(dose.MATRICES) * len(dose.DAMPINGS)
    assert swept.loc[("KFAC", 10.0), "value"] == pytest.approx(0.022)
    curves = dose.curves(table).set_index(["reference", "problem", "shift"])
    assert curves.loc[("laplace", "binary_sine", 3.0), "excess"] == pytest.approx(0.33)


def test_the_committed_records_are_those_that_published_asks_for():
    files = {file.name: file for file in dose.COMMITTED.glob("*.npz")}
    asked = SimpleNamespace(seed=0, dose_seeds=3, dose_widths=[8, 32], dose_problems=get_args(schemas.DoseProblem))
    wanted = {atlas.path(job, "").name: job for job in plan.dose(asked)}
    assert len(wanted) == 72
    assert {job.problem for job in wanted.values()} == set(problems.FRESH)
    assert files.keys() == wanted.keys()
    assert not [name for name, job in wanted.items() if atlas.find(job, [dose.COMMITTED]) is None], "of another version"
    assert sum(file.stat().st_size for file in files.values()) < 6_000_000
