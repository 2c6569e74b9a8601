"""What a file says of the run that made it, and what keeps two runs' scores apart."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from isouq import models
from isouq.use import about

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_parquet_carries_the_run_beside_pandas_own_notes(tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES))
    run = about.of_run("tiny", model, None, "geometric", chat=True)
    assert (run["weights"], run["dtype"], run["aggregation"]) == (models.weights(model), "float32", "geometric")
    table = pa.Table.from_pandas(pd.DataFrame({"log_prob": [-1.0]}, index=[7]))
    with pq.ParquetWriter(tmp_path / "scores.parquet", about.with_about(table.schema, run)) as writer:
        writer.write_table(table.cast(about.with_about(table.schema, run)))
    assert about.about_of(tmp_path / "scores.parquet") == run
    assert pd.read_parquet(tmp_path / "scores.parquet").index.tolist() == [7]


def test_other_files_say_nothing_and_what_is_no_parquet_is_refused(tmp_path) -> None:
    pd.DataFrame({"log_prob": [-1.0]}).to_parquet(tmp_path / "plain.parquet")
    (tmp_path / "scores.csv").write_text("log_prob\n-1\n")
    (tmp_path / "scores.parquet").write_text("log_prob\n-1\n")
    assert about.about_of(tmp_path / "plain.parquet") is None
    assert about.about_of(tmp_path / "scores.csv") is None
    with pytest.raises(ValueError, match=r"scores\.parquet: no Parquet file"):
        about.about_of(tmp_path / "scores.parquet")


def test_only_what_numbers_depend_on_keeps_runs_apart() -> None:
    run = {"model": "a", "weights": "12", "aggregation": "sequence", "dtype": "float32", "isouq": "1"}
    assert about.differences(run, run | {"model": "a folder", "isouq": "2"}) == ""
    other = run | {"model": "b", "weights": "34", "dtype": "bfloat16", "system": "Be brief."}
    wanted = "weights '12' of 'a' there, '34' of 'b' here, dtype 'float32' there, 'bfloat16' here, "
    assert about.differences(run, other) == wanted + "system None there, 'Be brief.' here"
