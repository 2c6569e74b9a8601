"""What `import isouq` gives: the public names with their examples, and the old names of modules that moved."""

import doctest
import importlib
import inspect
import sys

import pytest

import isouq

CALLABLE = [name for name in isouq.__all__ if callable(getattr(isouq, name))]
SECTIONS = {"Returns:", "Raises:", "Example:"}


@pytest.mark.parametrize("name", CALLABLE)
def test_a_public_name_says_what_it_takes_and_gives_and_its_example_runs(name, capsys):
    public = getattr(isouq, name)
    wanted = {"Attributes:", *SECTIONS} - {"Returns:"} if inspect.isclass(public) else {"Args:", *SECTIONS}
    text = inspect.getdoc(public)
    assert wanted <= {line.strip() for line in text.splitlines()}
    if not inspect.isclass(public):
        for argument in inspect.signature(public).parameters:
            assert f"\n    {argument}: " in text, f"{argument} is not described"
    [example] = doctest.DocTestFinder(recurse=False).find(public, name, globs={})
    assert example.examples
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize(("old", "new"), isouq._MOVED.items())
def test_a_module_that_moved_is_found_under_its_old_name_with_a_warning(monkeypatch, old, new):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match=r"'isouq' has no attribute 'score'; it has Estimate, .*score_tokens"):
        _ = isouq.score
