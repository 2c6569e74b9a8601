"""The command line, as a shell user meets it."""

import subprocess
import sys

import pytest

import package_index
from isouq import cli


@pytest.fixture
def index(tmp_path, monkeypatch):
    return package_index.enter(tmp_path, monkeypatch)


def test_assets_are_fetched_listed_and_verified_and_the_corrupt_told_from_the_good(index, capsys):
    assert cli.main(["assets", "verify", "notes"]) == 1
    assert cli.main(["assets", "verify"]) == 0
    assert cli.main(["assets", "fetch", "notes", "half"]) == 0
    capsys.readouterr()
    assert cli.main(["assets", "list"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line[:1].isalpha()}
    assert lines["notes"].split() == ["notes", "data", "1.05MB", "CC0-1.0", "in", "the", "cache"]
    assert lines["other"].endswith("not in the cache")
    assert all(
        part in shown for part in ("from fake-front==1.0, fake-back==1.0", "Halves have terms", str(index.cache))
    )
    assert cli.main(["assets", "verify", "notes", "half"]) == 0
    assert capsys.readouterr().out.split() == ["notes", "verified", "half", "verified"]
    (index.cache / "half" / "source" / "half").write_text("other")
    assert cli.main(["assets", "verify"]) == 1
    shown = capsys.readouterr()
    assert "notes                    verified\nhalf                     FAILED\n" in shown.out
    assert "isouq: half: " in shown.err
    assert "is corrupt: expected" in shown.err


@pytest.mark.parametrize("action", ["fetch", "verify"])
def test_an_unknown_asset_is_one_line_with_the_nearest(index, capsys, action):
    assert cli.main(["assets", action, "note"]) == 1
    assert capsys.readouterr().err == "isouq: unknown asset 'note'; did you mean 'notes'?\n"


@pytest.mark.parametrize("arguments", [[], ["assets"], ["asset"], ["assets", "get"]])
def test_a_wrong_command_line_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: isouq" in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.assets, "fetch", interrupt)
    assert cli.main(["assets", "fetch"]) == 130
    assert capsys.readouterr().err == "isouq: interrupted\n"


def test_listing_loads_no_heavy_library():
    script = """
import sys
from isouq import cli
code = cli.main(["assets", "list"])
heavy = {"torch", "pandas", "transformers", "jax", "sklearn"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
