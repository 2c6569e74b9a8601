"""Draws on disk: what comes back is what was sampled; foreign and damaged files are refused."""

from dataclasses import replace

import arviz
import numpy as np
import pytest

from isouq.studies.synthetic import cache, posterior
from isouq.studies.synthetic.cache import PosteriorError
from isouq.studies.synthetic.jobs import Job
from isouq.studies.synthetic.posterior import Settings

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


def test_draws_that_failed_the_gate_come_back_with_the_reason(drawn, tmp_path):
    failed = replace(drawn, diagnostics=replace(drawn.diagnostics, rhat=1.2))
    cache.save(failed, tmp_path / "a.nc")
    back = cache.load(tmp_path / "a.nc", drawn.problem, SETTINGS)
    assert not back.diagnostics.passed
    assert back.diagnostics.failures == ("split R-hat 1.200 > 1.01",)


@pytest.mark.parametrize("what", ["problem", "settings", "version"])
def test_foreign_draws_are_refused(what, drawn, tmp_path, monkeypatch):
    cache.save(drawn, tmp_path / "a.nc")
    problem, settings = drawn.problem, SETTINGS
    if what == "problem":
        problem = Job(problem="binary_linear", resolution=4, seed=1).make()
    elif what == "settings":
        settings = replace(SETTINGS, seed=1)
    else:
        monkeypatch.setattr(posterior, "VERSION", 0)
    with pytest.raises(PosteriorError, match=rf"a\.nc holds draws of another {what}"):
        cache.load(tmp_path / "a.nc", problem, settings)


def test_a_damaged_file_is_refused(drawn, tmp_path):
    file = tmp_path / "a.nc"
    cache.save(drawn, file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(PosteriorError, match=r"a\.nc is not a readable file of draws"):
        cache.load(file, drawn.problem, SETTINGS)


@pytest.mark.parametrize("what", ["a draw", "an energy", "fewer draws", "fewer chains", "the diagnostics", "NaN"])
def test_draws_that_are_not_those_that_were_written_are_refused(what, drawn, tmp_path):
    file = tmp_path / "a.nc"
    cache.save(drawn, file)
    data = arviz.from_netcdf(str(file)).load()
    attributes = dict(data.posterior.attrs)
    if what == "a draw":
        data.posterior["theta"][1, 2, 0] += 1e-9
    elif what == "NaN":
        data.posterior["theta"][1, 2, 0] = np.nan
    elif what == "an energy":
        data.sample_stats["energy"][0, 0] += 1
    elif what == "fewer draws":
        data = data.isel(draw=slice(0, 100))
    elif what == "fewer chains":
        data = data.isel(chain=slice(0, 3))
    else:
        attributes["diagnostics"] = attributes["diagnostics"].replace('"n_divergent": 0', '"n_divergent": 1')
    data.posterior.attrs.update(attributes)
    data.to_netcdf(str(tmp_path / "b.nc"), engine="h5netcdf")
    with pytest.raises(PosteriorError, match=r"b\.nc does not hold the draws that were written to it; delete it"):
        cache.load(tmp_path / "b.nc", drawn.problem, SETTINGS)


def test_a_folder_in_the_place_of_the_draws_is_refused(drawn, tmp_path):
    cache.path(tmp_path, drawn.problem, SETTINGS).mkdir()
    with pytest.raises(PosteriorError, match="is not a readable file of draws"):
        cache.draw(drawn.problem, SETTINGS, tmp_path)
