"""The atlas: records that come back whole, θ* that are what they are called, statistics that find what was put in."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from isouq.studies.synthetic import atlas, findings, modes, plan, point, posterior, problems
from isouq.studies.synthetic.plan import Job
from isouq.studies.synthetic.posterior import Settings

SHORT = Settings(n_chains=4, n_warmup=150, n_draws=250)
SMALL = Job(problem="regression_linear", resolution=12, n_starts=2, settings=SHORT)
TANH = Job(problem="binary_xor", width=3, resolution=4, n_starts=1).make()
RELU = Job(problem="binary_xor", width=3, activation="relu", resolution=4, n_starts=1).make()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return folder, atlas.run(SMALL, folder)


def test_a_record_comes_back_as_it_was_written(made):
    folder, record = made
    back = atlas.find(SMALL, [folder / "none", folder])
    assert back.facts == record.facts
    assert back.fields.keys() == record.fields.keys()
    for name, values in record.fields.items():
        np.testing.assert_array_equal(back.fields[name], values)
        assert values.dtype == (np.uint8 if name == "classes" else np.float32)


def test_a_committed_record_comes_out_again(tmp_path):
    """Sampled anew; on another processor the chains part, so the variances may differ as much as chance allows."""
    job = plan.atlas_job(0, "regression_linear", "tanh", 8, "fixed", "no_gap")
    kept, again = atlas.find(job, [atlas.COMMITTED]).fields, atlas.analyse(job).fields
    np.testing.assert_allclose(again["gn"][:2], kept["gn"][:2], rtol=1e-3)
    np.testing.assert_allclose(again["variance"], kept["variance"], rtol=0.2)
    assert atlas.correlation(again["variance"], kept["variance"])[1] > 0.99


def test_a_record_of_a_linear_model_has_what_the_closed_form_says(made):
    fields = made[1].fields
    np.testing.assert_allclose(fields["gn"][0], 1 + SMALL.make().grid[:, 0] ** 2, rtol=1e-6)
    np.testing.assert_allclose(fields["mode_taylor"], fields["mode_variance"], rtol=1e-3)
    assert fields["mode_share"] == 1, "a Gaussian has one mode"
    np.testing.assert_allclose(fields["la"][1], fields["variance"], rtol=0.3)
    assert len(fields["gn"]) == len(fields["thetas"]) == 2 + modes.N_DRAWS
    rows = atlas.table([made[1]]).set_index(["point", "measure", "region"])
    assert rows.loc[("map", "la", "whole"), "pearson"] > 0.98
    assert rows.loc[("posterior", "reliability", "whole"), "pearson"] > 0.9


def test_what_is_there_is_not_run_again_and_another_version_is(made, monkeypatch):
    folder, record = made
    monkeypatch.setattr(atlas, "run", lambda *_: pytest.fail("ran again"))
    (again,) = atlas.run_all([SMALL], folder)
    assert again.facts == record.facts
    monkeypatch.setattr(atlas, "VERSION", 0)
    assert atlas.find(SMALL, [folder]) is None


@pytest.mark.parametrize("what", ["a field", "a fact", "another job", "cut short"])
def test_a_record_that_was_changed_is_refused(made, tmp_path, what):
    file, other = atlas.path(SMALL, tmp_path), replace(SMALL, seed=1)
    with np.load(atlas.path(SMALL, made[0])) as stored:
        arrays = dict(stored)
    if what == "a field":
        arrays["gn"] = arrays["gn"] * 2
    elif what == "a fact":
        arrays["facts"] = np.array(json.dumps(json.loads(str(arrays["facts"])) | {"passed": "yes"}))
    job = other if what == "another job" else SMALL
    file = atlas.path(job, tmp_path)
    np.savez(file, **arrays)
    if what == "cut short":
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"is not the record of this posterior .*delete it, and the job runs again"):
        atlas.find(job, [tmp_path])


# Jobs: each has a file of its own, and a study of many resumes, in several processes


def test_jobs_that_differ_have_files_that_differ():
    changes = ({"seed": 1}, {"n_examples": 31}, {"prior_scale": 2.0}, {"settings": replace(SHORT, n_draws=251)})
    assert len({job.file() for job in (SMALL, *(replace(SMALL, **change) for change in changes))}) == 5
    assert replace(SMALL, n_examples=30).file() == SMALL.file()
    roomy = replace(SMALL, settings=replace(SHORT, memory_gb=9.0))
    assert roomy.file() == SMALL.file(), "the memory allowed does not decide a draw"


def test_a_bad_job_stops_a_study_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="width: 0 given"):
        atlas.run_all([SMALL, replace(SMALL, problem="binary_xor", width=0)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_all_runs_what_is_missing_in_processes(made, tmp_path):
    folder, kept = shutil.copytree(made[0], tmp_path / "atlas"), made[1]
    wanted = [SMALL, replace(SMALL, n_examples=20)]
    records = atlas.run_all(wanted, folder, n_workers=2, compiled=tmp_path / "jax")
    assert set(folder.iterdir()) == {atlas.path(job, folder) for job in wanted}
    assert [record.job for record in records] == wanted
    assert records[0].facts == kept.facts, "times included: it was not run again"


def test_run_all_renews_its_processes_and_keeps_the_order(tmp_path, monkeypatch):
    pools = []

    def threads(n_workers, *_):
        pools.append(n_workers)
        return ThreadPoolExecutor(n_workers)

    monkeypatch.setattr(atlas, "PER_PROCESS", 1)
    monkeypatch.setattr(atlas.concurrent.futures, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(atlas, "find", lambda *_: None)
    monkeypatch.setattr(atlas, "run", lambda job, _: atlas.Record(job=job, facts={}, fields={}))
    wanted = [replace(SMALL, n_examples=n) for n in (20, 25, 30)]
    assert [record.job for record in atlas.run_all(wanted, tmp_path, n_workers=2)] == wanted
    assert pools == [2, 2], "the third job is left to a second pool"


# Statistics of one field


def test_a_field_that_varies_by_rounding_only_has_no_correlation():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=50)
    assert np.isnan(atlas.correlation(5 + 1e-13 * noise, noise)).all()
    assert np.isfinite(atlas.correlation(5 + 1e-3 * noise, noise)).all()


# Where θ* comes from


@pytest.mark.parametrize("problem", [TANH, RELU], ids=["tanh", "relu"])
def test_matching_undoes_any_exchange_of_units_and_leaves_the_function(problem):
    rng, model = np.random.default_rng(1), problem.model
    reference = rng.normal(size=model.network.n_parameters)
    (weight, bias), (following, last) = model.network.layers(reference)
    copies = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        own = np.array(signs if problem is TANH else (1, 1, 1))
        units = weight[:, order] * own, bias[list(order)] * own, following[list(order)] * own[:, None]
        copies.append(np.concatenate([*(part.ravel() for part in units), last]))
    matched = modes.match(model.network, model.scales(), reference, np.array(copies))
    np.testing.assert_allclose(matched, np.broadcast_to(reference, matched.shape), atol=1e-12)
    others = rng.normal(size=(4, len(reference)))
    moved = modes.match(model.network, model.scales(), reference, others)
    before, after = (posterior.functions(problem, thetas[None]) for thetas in (others, moved))
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert (np.linalg.norm(moved - reference, axis=1) <= np.linalg.norm(others - reference, axis=1) + 1e-12).all()


def test_draws_lie_around_the_nearer_mode_whatever_the_order_of_their_units():
    rng, n = np.random.default_rng(2), TANH.model.network.n_parameters
    scales, centres = TANH.model.scales(), np.random.default_rng(3).normal(size=(2, n)) * TANH.model.scales() * 5
    draws = np.repeat(centres, (30, 90), axis=0) + 0.1 * scales * rng.normal(size=(120, n))
    mode, local, share = modes.around(TANH, -draws.reshape(4, 30, n), np.array([centres[0], -centres[1], -centres[1]]))
    np.testing.assert_array_equal(mode, -centres[1])
    assert share == len(local) / 120 == 0.75, "a mode that was found twice keeps its draws"
    assert np.abs((local - mode) / scales).max() < 1


def test_units_of_two_hidden_layers_are_not_matched():
    deep = Job(problem="binary_xor", depth=2).make().model
    with pytest.raises(ValueError, match="network: depth: 2 given"):
        modes.match(deep.network, deep.scales(), deep.scales(), deep.scales()[None])


def test_training_stops_at_the_declared_loss_and_a_collapsed_network_is_not_admitted(monkeypatch):
    theta = modes.train(TANH, seed=0)
    assert modes.losses(TANH, theta[None])[0] < modes.constant_loss(TANH)
    np.testing.assert_array_equal(theta, modes.train(TANH, seed=0))
    draws = np.broadcast_to(theta, (4, 20, len(theta)))
    found = modes.find(TANH, draws, n_starts=1)
    assert found.admitted[0]
    monkeypatch.setattr(modes, "train", lambda problem, seed: np.zeros(len(theta)))
    assert not modes.find(TANH, draws, n_starts=1).admitted[0]


def test_the_constant_loss_is_that_of_the_best_constant():
    for name in ("binary_rings", "multiclass_clusters", "regression_nonlinear"):
        problem = problems.make(name)
        theta = np.zeros(problem.model.network.n_parameters)
        biases = theta[-problem.model.network.n_outputs :]
        biases[:] = problem.targets.mean()
        if problem.model.kind != "regression":
            share = np.log(np.bincount(problem.targets))
            biases[:] = share if len(share) == len(biases) else share[1] - share[0]
        assert modes.constant_loss(problem) == pytest.approx(modes.losses(problem, theta[None])[0])


def test_the_parts_of_the_norm_add_up():
    theta = np.random.default_rng(0).normal(size=TANH.model.network.n_parameters)
    classes = np.zeros(len(TANH.grid), dtype=int)
    total = np.square(point.gradients(TANH, theta, classes)).sum(axis=1)
    np.testing.assert_allclose(sum(modes.parts(TANH, theta, classes).values()), total)


# Designs and settings


def test_a_gap_is_where_a_design_says_and_only_a_regression_has_one():
    for name, low, high in (("regression_nonlinear", -0.5, 0.7), ("regression_linear", -0.4, 0.4)):
        with_gap, without = (problems.make(name, n_examples=300, gap=gap).inputs for gap in (True, False))
        assert not ((low < with_gap) & (with_gap < high)).any()
        assert ((low < without) & (without < high)).sum() > 50
    with pytest.raises(ValueError, match="gap: True given for binary_xor; None wanted"):
        problems.make("binary_xor", gap=True)


def test_a_setting_names_its_job_and_the_defaults_are_those_of_before():
    now = plan.atlas_job(0, "regression_nonlinear", "tanh", 8, "fan_in", "gap")
    assert now.make().fingerprint() == Job(problem="regression_nonlinear").make().fingerprint()
    many = plan.atlas_job(0, "binary_rings", "relu", 32, "fixed", "many")
    assert list(plan.cell(many).values()) == ["binary_rings", "relu", 32, "fixed", "many"]
    assert len(many.make().inputs) == plan.MANY
    linear = plan.atlas_job(0, "binary_linear", "relu", 32, "fixed", "few")
    assert (plan.cell(linear)["activation"], plan.cell(linear)["width"]) == ("linear", 0)
    assert plan.atlas_job(0, "binary_rings", "relu", 32, "fixed", "gap") is None


# Statistics over records


def test_a_mean_of_correlations_has_the_t_interval_of_fishers_z():
    value, low, _, n = findings.mean(np.tanh([0.5, np.nan, 0.6, 0.7]), is_rho=True)
    assert (value, n) == (pytest.approx(np.tanh(0.6)), 3)
    assert low == pytest.approx(np.tanh(0.6 - 4.302653 * 0.1 / np.sqrt(3)), abs=1e-6)
    assert findings.mean([0.9, 0.99], is_rho=True).high < 1, "not cut, but ends before one"
    np.testing.assert_equal(findings.mean([0.9], is_rho=True), (0.9, np.nan, np.nan, 1))
    with pytest.raises(ValueError, match="correlations: 3 to 4 given"):
        findings.mean([3.0, 4.0], is_rho=True)


def correlations(z_of, seeds=3) -> pd.DataFrame:
    """A table as `atlas.table` makes it, with Fisher's z of every setting from `z_of` (cell, seed, point)."""
    axes = (
        problems.SPECS,
        ("tanh", "relu"),
        (8, 32),
        ("fan_in", "fixed"),
        ("few", "many", "gap", "no_gap"),
        range(seeds),
    )
    rows = []
    for problem, activation, width, prior, design, seed in itertools.product(*axes):
        if (job := plan.atlas_job(seed, problem, activation, width, prior, design)) is None:
            continue
        own = {**plan.cell(job), "seed": seed, "passed": True, "admitted": 1.0, "region": "whole"}
        for kind in findings.POINTS:
            rho = np.tanh(z_of(own, seed, kind))
            rows.append(own | {"point": kind, "measure": "gn", "pearson": rho, "spearman": rho})
        rows.append(own | {"point": "posterior", "measure": "reliability", "pearson": 1.0, "spearman": 0.99})
    return pd.DataFrame(rows).drop_duplicates([*findings.FACTORS, "seed", "point", "measure"])


def planted(cell, seed, kind):
    width = 0.2 * np.log2(max(cell["width"], 8) / 8) * (1 if cell["prior"] == "fixed" else -1)
    relu, fewer = 0.5 * (cell["activation"] == "relu"), -0.3 * (kind == "map")
    return 0.4 + width + relu + fewer + 0.02 * ((7 * seed + len(cell["problem"])) % 5 - 2)


@pytest.fixture(scope="module")
def table():
    return correlations(planted)


def test_what_decides_is_found(table):
    found = findings.effects(table)
    assert found.loc["activation", "change"] == pytest.approx(0.5)
    assert found.loc["map", "change"] == pytest.approx(-0.3)
    assert found.loc["mode", "change"] == pytest.approx(0, abs=1e-12)
    assert found.loc["width", "change"] == pytest.approx(0, abs=1e-12), (
        "it rises under one prior and falls under the other"
    )
    assert found.loc["activation", "share"] == found["share"].max()
    assert found["n"].max() == 6, "an interval is over problems"


def test_the_width_has_a_verdict_of_its_own_for_each_kind_of_network(table):
    found = findings.widths(table)
    assert len(found) == 6 * 4 * 3
    assert found.groupby("prior")["verdict"].unique().map(list).to_dict() == {"fan_in": ["falls"], "fixed": ["grows"]}
    assert found["change"].abs().to_numpy() == pytest.approx(0.2)
    assert len(findings.widths(table[table["width"] != 32])) == 0, "one width has no change"
    assert found["below_ceiling"].to_numpy() == pytest.approx(found["change"].to_numpy())
    near = table.assign(spearman=table["spearman"].where(table["measure"] != "gn", table["spearman"].clip(upper=0.5)))
    assert findings.widths(near.assign(spearman=0.99))["below_ceiling"].isna().all()


def test_a_setting_whose_posteriors_failed_is_shown_without_a_value(table):
    failed = table.assign(passed=~((table["problem"] == "binary_xor") & (table["activation"] == "relu")))
    rows = findings.settings(failed)
    rows = rows[(rows["problem"] == "binary_xor") & (rows["activation"] == "relu")]
    assert len(rows) == 8
    assert rows["value"].isna().all()
    assert (rows["n_failed"] == 3).all()
    assert findings.gate(failed).loc[("binary_xor", 8), "passed"] == 12


@pytest.mark.parametrize(
    ("low", "high", "paper", "word"),
    [
        (0.75, 0.85, 0.8, "agrees"),
        (0.65, 0.85, 0.8, "compatible"),
        (0.92, 0.95, 0.8, "higher"),
        (0.1, 0.6, 0.8, "lower"),
        (np.nan, np.nan, 0.8, "no interval"),
        (0.1, 0.6, np.nan, "not in the paper"),
    ],
)
def test_an_interval_beside_the_papers_number(low, high, paper, word):
    assert findings.beside_paper(low, high, paper) == word


def test_the_headline_reads_as_values_with_intervals(table):
    rows = findings.headline(table)
    rows.loc[0, ["value", "low", "high"]] = np.nan
    shown = findings.headline_text(rows, {name: name.upper() for name in problems.SPECS})
    assert list(shown) == ["here", "paper", "verdict", "ceiling", "near", "far"]
    for text, row in zip(shown["here"], rows.itertuples(), strict=True):
        assert text.startswith("" if np.isnan(row.value) else f"{row.value:.2f}")
        assert ("[" in text) == (row.low == row.low)
        assert "nan" not in text
    assert {"‖g‖², ρ", "‖g‖², r"} == set(shown.index.get_level_values("measure"))
    assert shown.index.get_level_values("problem").str.isupper().all()
    assert not shown.isna().any().any()


def test_a_measures_correlations_stand_under_its_point_by_region(table):
    parts = {"whole": 0.0, "far": -0.5, "near": 0.25}
    shown = findings.by_region(
        pd.concat([table.assign(region=name, spearman=rho) for name, rho in parts.items()], ignore_index=True)
    )
    assert list(shown) == ["near", "far", "whole"]
    assert shown.loc[("trained", "‖g‖²")].to_dict() == parts
    assert "reliability" not in shown.index.get_level_values("measure")


def test_the_headline_is_the_declared_setting(table):
    rows = findings.headline(table)
    gn = rows[(rows["method"] == "gn") & (rows["statistic"] == "spearman")].set_index("problem")
    assert list(gn.index) == list(problems.SPECS)
    cell = {"problem": "multiclass_rings", "width": 32, "prior": "fixed", "activation": "relu"}
    wanted = np.tanh(np.mean([planted(cell, seed, "trained") for seed in range(3)]))
    assert gn.loc["multiclass_rings", "value"] == pytest.approx(wanted)
    assert gn.loc["multiclass_rings", "ceiling"] == pytest.approx(np.sqrt(0.99))


def test_the_share_of_settings_and_the_difference_are_over_problems(table):
    high, low = (correlations(lambda *_, z=z: z) for z in (3.0, 0.0))
    assert findings.share(high).value == 1
    assert findings.share(low).value == 0
    assert findings.share(high).n == findings.difference(high).n == 8
    assert findings.difference(high).low > -0.1 > findings.difference(low).high


def test_named_results_have_the_keys_that_the_claims_name(table):
    from isouq.studies import claims

    stated = {claim.id: claim for claim in claims.load(atlas.COMMITTED.parents[2] / "book" / "claims.yml")}
    results = findings.named_results(table, table)
    assert {check.key for id in ("C4", "C5") for check in stated[id].checks} <= set(results)
    assert results["mcmc.atlas.binary_xor.relu.w32.fixed.many.gn.spearman"].n == 3
    assert findings.named_results(*[table[table["problem"] == "binary_xor"]] * 2)["mcmc.gate.n"].value == 48
