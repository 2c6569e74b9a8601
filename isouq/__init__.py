"""Exact squared gradient norms as epistemic uncertainty: an independent companion to arXiv 2603.29466.

    import isouq

    model, tokenizer = isouq.load_causal_lm("smollm2-135m-instruct")
    isouq.score_texts(model, tokenizer, ["The capital of France is"], [" Paris"])

The names below are loaded when they are first used, so that the command line answers at once. `isouq.gradients`,
`isouq.language` and the modules beside them are the library; `isouq.studies` and `isouq.pipeline` make the book.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isouq.classifier import score_classes, score_outputs
    from isouq.estimate import Estimate, Regression
    from isouq.language.scoring import inner_products, score_texts, score_tokens
    from isouq.studies import assets
    from isouq.studies.assets import load_causal_lm

__version__ = "0.1.0"
__all__ = [
    "Estimate",
    "Regression",
    "assets",
    "inner_products",
    "load_causal_lm",
    "score_classes",
    "score_outputs",
    "score_texts",
    "score_tokens",
]

_HOMES = {
    "estimate": ("Estimate", "Regression"),
    "classifier": ("score_classes", "score_outputs"),
    "language.scoring": ("inner_products", "score_texts", "score_tokens"),
    "studies.assets": ("load_causal_lm",),
    "studies": ("assets",),
}
_MOVED = {  # what the README and the API page showed before the library and its studies had separate folders
    "isouq.causal_lm": "isouq.language.scoring",
    "isouq.assets": "isouq.studies.assets",
    "isouq.evaluation": "isouq.studies.evaluation",
    "isouq.plotting": "isouq.studies.plotting",
    "isouq.provenance": "isouq.studies.results",
    "isouq.profiles": "isouq.pipeline.profiles",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    for module, names in _HOMES.items():
        if name in names:
            home = importlib.import_module(f"isouq.{module}")
            return getattr(home, name, None) or importlib.import_module(f"isouq.{module}.{name}")
    raise AttributeError(f"module 'isouq' has no attribute {name!r}; it has {', '.join(__all__)}")


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a public module under its old name, with a DeprecationWarning."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old name, None for all others."""
        return importlib.machinery.ModuleSpec(name, self) if name in _MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return a module with the names of the new one."""
        warnings.warn(f"{spec.name} is now {_MOVED[spec.name]}", DeprecationWarning, stacklevel=2)
        old = ModuleType(spec.name)
        vars(old).update(vars(importlib.import_module(_MOVED[spec.name])))
        return old

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the new module has been executed."""


sys.meta_path.append(_Moved())
