"""A measurement of inner products that is kept in a file: it resumes, and no run takes another's sums."""

import sqlite3

import pandas as pd
import pytest
import torch

from architectures import build, examples, upcasts_to
from isouq.gradients import products
from isouq.studies.isotropy import language
from isouq.studies.store import StoreError

ROWS = examples((9, 5, 7, 8), (3, 1, 2, 5), seed=1)
OTHERS = examples((6, 9, 4), (2, 4, 1), seed=2)


def texts(sequences) -> pd.DataFrame:
    rows = [("a", tokens[:-n].tolist(), tokens[-n:].tolist()) for tokens, n in sequences]
    return pd.DataFrame(rows, columns=["kind", "prompt_ids", "answer_ids"])


@pytest.mark.parametrize("change", ["nothing", "examples", "model", "code"])
def test_a_checkpoint_of_something_else_is_not_taken(tmp_path, monkeypatch, change):
    model, file = build("llama", tied=True), tmp_path / "deep" / "products.sqlite"
    with upcasts_to(torch.float64):
        language.measure(model, texts(ROWS), texts(OTHERS), checkpoint=file)
        [kept] = file.parent.iterdir()
        assert kept.name.startswith("products-")
        if change == "model":
            with torch.no_grad():
                model.model.norm.weight[0] += 1
        if change == "code":
            monkeypatch.setattr(language, "VERSION", language.VERSION + 1)
        proxies = texts(OTHERS if change == "examples" else ROWS)
        fresh = language.measure(model, proxies, texts(OTHERS), checkpoint=tmp_path / "fresh.sqlite")
        sweeps, gather = [], products._gather
        monkeypatch.setattr(products, "_gather", lambda *work: sweeps.append(1) or gather(*work))
        resumed = language.measure(model, proxies, texts(OTHERS), checkpoint=file)
    assert bool(sweeps) == (change != "nothing")
    for name in ("gram", "products", "squares"):
        torch.testing.assert_close(*(torch.tensor(getattr(study, name)) for study in (resumed, fresh)))


def test_a_checkpoint_in_use_is_refused_by_its_name(tmp_path):
    model, file = build("llama", tied=True), tmp_path / "products.sqlite"
    language.measure(model, texts(ROWS), texts(OTHERS), checkpoint=file)
    [kept] = tmp_path.iterdir()
    connection = sqlite3.connect(kept, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match=f"{kept.name} is in use by another process; wait for it to end"):
        language.measure(model, texts(ROWS), texts(OTHERS), checkpoint=file)
    connection.close()
