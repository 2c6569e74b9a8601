"""Golden values of a small study: they fail where a number changed and `stages.VERSION` was not raised.

After a change of numbers that is meant: raise the version, then ``python tests/qa/test_golden_answers.py`` writes
tests/data/golden_answers.json anew, and the committed records have to be computed again.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the run as a script
from test_study import letters, small_set

import conftest
from isouq.studies.qa import stages, subject
from isouq.studies.store import Store

ON_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
FILE = Path(__file__).parents[1] / "data" / "golden_answers.json"


def records(choose: bool, device: str = "cpu") -> dict[str, Any]:
    """The records of a small study by stage and question, without times."""
    model, tokenizer = conftest.llama.__wrapped__().to(device), conftest.tokenizer.__wrapped__()
    settings = subject.Settings(n_questions=6, n_shots=2, batch_size=4, max_new_tokens=5, n_samples=3, n_token_mean=2)
    asked = subject.prepare(model, tokenizer, small_set(30, choose), settings, choose=choose, encoder=letters)
    names = ("answer", "verdict", "estimate", "token_mean", "cheap", "choice", "shot", "sample", "meaning", "p_true")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "s.sqlite", {}) as store:
        stages.complete(store, asked, settings, progress=False)
        found = {stage: store.get(stage) for stage in names}
    for stage in found.values():
        for record in stage.values():
            record.pop("seconds", None)
    return found


def whole(choose: bool) -> str:
    return "choice" if choose else "free"


def close(found: Any, golden: Any) -> bool:
    """Equal, except that floats may differ in digits that a processor decides."""
    if isinstance(golden, float):
        return bool(np.isclose(found, golden, rtol=1e-4, atol=1e-4))
    if isinstance(golden, dict):
        return found.keys() == golden.keys() and all(close(found[key], golden[key]) for key in golden)
    if isinstance(golden, list):
        return len(found) == len(golden) and all(map(close, found, golden))
    return bool(found == golden)


@pytest.mark.parametrize("choose", [False, True], ids=whole)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CARD)])
def test_the_numbers_of_this_version_have_not_changed(choose: bool, device: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert golden["version"] == stages.VERSION
    found = json.loads(json.dumps(records(choose, device)))
    for stage, of_questions in golden[whole(choose)].items():
        for item_id, record in of_questions.items():
            assert close(found[stage][item_id], record), f"{stage} of {item_id}: raise stages.VERSION if this is meant"


if __name__ == "__main__":
    content = {"version": stages.VERSION} | {whole(choose): records(choose) for choose in (False, True)}
    FILE.write_text(json.dumps(content, indent=None) + "\n", encoding="utf-8")
