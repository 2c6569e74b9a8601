"""Draws on disk: what comes back is what was sampled; failed, foreign and damaged files are refused."""

from dataclasses import replace

import arviz
import numpy as np
import pytest

from isouq.synthetic import cache, posterior
from isouq.synthetic.cache import PosteriorError
from isouq.synthetic.jobs import Job
from isouq.synthetic.posterior import Settings

SETTINGS = Settings(n_chains=4, n_warmup=200, n_draws=400)


@pytest.fixture(scope="module")
def drawn():
    return posterior.sample(Job(problem="binary_linear", resolution=4).make(), SETTINGS)


def test_round_trip(drawn, tmp_path, monkeypatch):
    file = cache.path(tmp_path, drawn.problem, SETTINGS)
    cache.save(drawn, file)
    monkeypatch.setattr(posterior, "sample", lambda *_: pytest.fail("sampled again"))
    back = cache.draw(drawn.problem, SETTINGS, tmp_path)
    for name in ("draws", "divergent", "energy", "n_steps"):
        np.testing.assert_array_equal(getattr(back, name), getattr(drawn, name))
    assert back.diagnostics == drawn.diagnostics
    attributes = arviz.from_netcdf(str(file)).posterior.attrs
    assert "numpyro" in attributes["versions"]
    assert '"seed": 0' in attributes["settings"]
    assert list(tmp_path.iterdir()) == [file]


def test_draws_that_failed_the_gate_are_refused(drawn, tmp_path):
    failed = replace(drawn, diagnostics=replace(drawn.diagnostics, rhat=1.2))
    cache.save(failed, tmp_path / "a.nc")
    with pytest.raises(PosteriorError, match=r"failed the gate: split R-hat 1\.200 > 1\.01"):
        cache.load(tmp_path / "a.nc", drawn.problem, SETTINGS)
    assert not cache.load(tmp_path / "a.nc", drawn.problem, SETTINGS, allow_failed=True).diagnostics.passed


@pytest.mark.parametrize("what", ["problem", "settings", "code"])
def test_foreign_draws_are_refused(what, drawn, tmp_path, monkeypatch):
    cache.save(drawn, tmp_path / "a.nc")
    problem, settings = drawn.problem, SETTINGS
    if what == "problem":
        problem = Job(problem="binary_linear", resolution=4, seed=1).make()
    elif what == "settings":
        settings = replace(SETTINGS, seed=1)
    else:
        monkeypatch.setattr(cache, "code_digest", lambda *_: "other")
    with pytest.raises(PosteriorError, match=rf"a\.nc holds draws of another {what}"):
        cache.load(tmp_path / "a.nc", problem, settings)


def test_a_damaged_file_is_refused(drawn, tmp_path):
    file = tmp_path / "a.nc"
    cache.save(drawn, file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(PosteriorError, match=r"a\.nc is not a readable file of draws"):
        cache.load(file, drawn.problem, SETTINGS)


SOURCE = '''
LIMIT = 3
def _step(x):
    return x + LIMIT
def sample(x):
    """Draw."""
    # a comment
    return _step(x)
def figure(x):
    return x
'''


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Return a function: source text -> digest of what `sample` in it depends on."""

    def of(text):
        (tmp_path / "a.py").write_text(text)
        monkeypatch.setattr(cache, "SOURCES", [tmp_path / "a.py"])
        cache.definitions.cache_clear()
        return cache.code_digest("sample")

    yield of
    cache.definitions.cache_clear()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("x + LIMIT", "x - LIMIT"),
        ("return _step(x)", "return _step(2 * x)"),
        ("def sample", "@f\ndef sample"),
    ],
)
def test_a_change_of_what_decides_the_draws_is_seen(digest, old, new):
    assert old in SOURCE
    assert digest(SOURCE) != digest(SOURCE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"""Draw."""', '"""Draw\n    again."""'), ("    # a comment\n", "\n"), ("return x\n", "return 2 * x\n")],
)
def test_a_change_of_words_or_of_other_code_is_not(digest, old, new):
    assert old in SOURCE
    assert digest(SOURCE) == digest(SOURCE.replace(old, new))


def test_the_code_behind_a_record_is_found():
    everything = cache.definitions()
    for name in ("sample", "_run", "convergence", "find_map", "_hessian", "ggn", "reference", "spearman", "MAX_RHAT"):
        assert name in everything
        assert name in cache.reached("sample", "analyse", "record")
    assert not {"rescaled", "auroc", "run_all", "trend", "SPECS"} & cache.reached("sample", "analyse", "record")
