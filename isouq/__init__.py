"""Exact squared gradient norms as epistemic uncertainty: an independent companion to arXiv 2603.29466.

    import isouq

    model, tokenizer = isouq.load_causal_lm("smollm2-135m-instruct")
    isouq.score_texts(model, tokenizer, ["The capital of France is"], [" Paris"])

The names below are loaded when they are first used, so that the command line answers at once. `isouq.gradients`,
`isouq.language` and the modules beside them are the library; `isouq.studies` and `isouq.pipeline` make the book.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isouq import plotting
    from isouq.classifier import score_classes, score_outputs
    from isouq.estimate import Estimate, Regression
    from isouq.language.scoring import inner_products, score_texts, score_tokens
    from isouq.language.tokens import score_each_token, trace
    from isouq.studies import assets
    from isouq.studies.assets import load_causal_lm
    from isouq.use.calibrate import Calibrator, calibrate
    from isouq.use.evaluate import evaluate

__version__ = "0.1.0"
__all__ = [
    "Calibrator",
    "Estimate",
    "Regression",
    "assets",
    "calibrate",
    "evaluate",
    "inner_products",
    "load_causal_lm",
    "plotting",
    "score_classes",
    "score_each_token",
    "score_outputs",
    "score_texts",
    "score_tokens",
    "trace",
]

_HOMES = {
    **dict.fromkeys(("Estimate", "Regression"), "isouq.estimate"),
    **dict.fromkeys(("score_classes", "score_outputs"), "isouq.classifier"),
    **dict.fromkeys(("inner_products", "score_texts", "score_tokens"), "isouq.language.scoring"),
    **dict.fromkeys(("score_each_token", "trace"), "isouq.language.tokens"),
    **dict.fromkeys(("assets", "load_causal_lm"), "isouq.studies.assets"),
    **dict.fromkeys(("Calibrator", "calibrate"), "isouq.use.calibrate"),
    "evaluate": "isouq.use.evaluate",
    "plotting": "isouq.plotting",
}
_MOVED = {  # module or package → where its names went when the library, its studies and the pipeline were separated
    **{old: f"studies.{old}" for old in "assets cost evaluation identity isotropy qa store synthetic".split()},
    "causal_lm": "language.scoring",
    "encoding": "language.encoding",
    "profiles": "pipeline.schemas pipeline.profiles",
    "provenance": "studies.results pipeline.runner",
    "covariance": "studies.isotropy.covariance",
    "distortion": "studies.isotropy.distortion",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name in _HOMES:
        home = import_module(_HOMES[name])
        return getattr(home, name, home)  # assets and plotting are their homes themselves
    raise AttributeError(f"module 'isouq' has no attribute {name!r}; it has {', '.join(__all__)}")


class _Moved(MetaPathFinder, Loader):
    """Finds a module that moved, and what lies below it, under its old name, with a DeprecationWarning."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """Return a spec for an old name, None for all others."""
        return ModuleSpec(name, self) if name.startswith("isouq.") and name.split(".")[1] in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the old one; the names of two go into one module."""
        name = module.__name__
        _, old, *below = name.split(".")
        new = [".".join(["isouq", home, *below]) for home in _MOVED[old].split()]
        warnings.warn(f"{name} is now {' and '.join(new)}", DeprecationWarning, stacklevel=2)
        modules = [import_module(name) for name in new]
        for part in modules:
            vars(module).update(vars(part))
        sys.modules[name] = module if modules[1:] else modules[0]


sys.meta_path.insert(0, _Moved())  # before the finder that would look below a package's new folder
