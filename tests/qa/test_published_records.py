"""The committed records of the published run come out again from nothing: a slice of them, on this machine."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_golden_answers import close

from isouq.studies.fits import fit_logistic
from isouq.studies.qa import analysis, study
from isouq.studies.resamples import Resamples
from isouq.studies.store import identity_of

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "qa"
TWICE = "smollm2-135m-instruct--triviaqa-*.parquet"
WIKIDATA = [f for f in sorted(PUBLISHED.glob("*--wikidata-*.parquet")) if identity_of(f)["settings"]["n_shots"]]
N = 6


def records(file: Path) -> dict[tuple[str, str], dict]:
    """The records of a committed file by stage and question, without times."""
    table = pd.read_parquet(file)
    parsed = {(row.stage, row.item_id): json.loads(row.record) for row in table.itertuples()}
    for record in parsed.values():
        record.pop("seconds", None)
    return parsed


def test_a_processor_and_a_card_give_the_same_answers_and_numbers() -> None:
    """The same questions to the same model with another torch on another device; samples may part at a near tie."""
    made = {identity_of(file)["settings"].get("device_map"): records(file) for file in PUBLISHED.glob(TWICE)}
    here, there = made[None], made["auto"]
    asked = [item_id for stage, item_id in here if stage == "answer"]
    assert len(asked) == 300
    answers = [(here["answer", i], there["answer", i]) for i in asked]
    assert all(one["token_ids"] == other["token_ids"] for one, other in answers)
    scores = np.array([[of["estimate", i]["sequence"]["log_epistemic"] for i in asked] for of in (here, there)])
    assert np.abs(scores[0] - scores[1]).max() < 1e-3
    assert np.ptp(scores) > 10, "a range in which 1e-3 says something"
    samples = [
        (a, b) for i in asked for a, b in zip(*(of["sample", i]["token_ids"] for of in (here, there)), strict=True)
    ]
    assert np.mean([a == b for a, b in samples]) > 0.95


@pytest.mark.parametrize("file", WIKIDATA, ids=lambda file: file.name)
def test_every_resample_of_relations_has_its_curved_fit(file: Path) -> None:
    """Newton's plain steps ran away in some: a few relations can be nearly all right or all wrong."""
    kept = records(file)
    rows = [
        {"question": kept["question", i]["question"], "wrong": not kept["verdict", i]["right"], **record["sequence"]}
        for (stage, i), record in kept.items()
        if stage == "estimate"
    ]
    table = analysis.clustered(pd.DataFrame(rows), "wikidata")
    log_u = np.column_stack([table["log_prob"] + np.log(-np.expm1(table["log_prob"])), table["log_epistemic"]])
    plan = Resamples.of(table["wrong"], clusters=table["cluster"], by_name=True)
    fits = fit_logistic(analysis.curved(log_u), table["wrong"].to_numpy(), plan.counts)
    assert np.isfinite(fits).all()


@pytest.mark.assets
def test_a_slice_of_the_published_run_reproduces_its_records(tmp_path: Path):
    settings = study.Settings(
        n_questions=N, n_token_mean=2, store_dir=str(tmp_path), records_dir=str(tmp_path / "again")
    )
    study.run("smollm2-135m-instruct", "wikidata", settings, progress=False)
    (again,) = (tmp_path / "again").glob("*.parquet")
    published = records(PUBLISHED / again.name)
    for (stage, item_id), record in records(again).items():
        assert close(record, published[stage, item_id]), f"{stage} of {item_id}"
