"""What a file says of the run that made it, and what keeps two runs' scores apart."""

import pandas as pd
import pytest

from isouq.use import tables
from isouq.use.calibrate import differences


def test_parquet_says_what_its_scores_depend_on(tmp_path) -> None:
    run = {"model": "tiny", "weights": "12", "aggregation": "sequence"}
    sink = tables.Sink(tmp_path / "scores.parquet")
    sink.about = run
    with (tmp_path / "scores.parquet").open("wb") as out:
        sink.write([pd.DataFrame({"log_prob": [-1.0]})], out)
    assert tables.about_of(tmp_path / "scores.parquet") == run


def test_other_files_say_nothing_and_what_is_no_parquet_is_refused(tmp_path) -> None:
    pd.DataFrame({"log_prob": [-1.0]}).to_parquet(tmp_path / "plain.parquet")
    (tmp_path / "scores.csv").write_text("log_prob\n-1\n")
    (tmp_path / "scores.parquet").write_text("log_prob\n-1\n")
    assert tables.about_of(tmp_path / "plain.parquet") is None
    assert tables.about_of(tmp_path / "scores.csv") is None
    with pytest.raises(ValueError, match=r"scores\.parquet: no Parquet file"):
        tables.about_of(tmp_path / "scores.parquet")


def test_only_what_numbers_depend_on_keeps_runs_apart() -> None:
    run = {"model": "a", "weights": "12", "aggregation": "sequence", "dtype": "float32", "isouq": "1"}
    assert differences(run, run | {"model": "a folder", "isouq": "2"}) == ""
    assert differences(run, run | {"aggregation": "sequence, geometric, token_mean"}) == ""
    other = run | {"model": "b", "weights": "34", "dtype": "bfloat16", "system": "Be brief."}
    wanted = "weights '12' of 'a' there, '34' of 'b' here, dtype 'float32' there, 'bfloat16' here, "
    assert differences(run, other) == wanted + "system None there, 'Be brief.' here"
