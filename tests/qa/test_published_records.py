"""The committed records of the published run come out again from nothing: a slice of them, on this machine."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_golden_answers import close

from isouq.studies.qa import study

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "qa"
N = 6


def records(file: Path) -> dict[tuple[str, str], dict]:
    """The records of a committed file by stage and question, without times."""
    table = pd.read_parquet(file)
    parsed = {(row.stage, row.item_id): json.loads(row.record) for row in table.itertuples()}
    for record in parsed.values():
        record.pop("seconds", None)
    return parsed


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
