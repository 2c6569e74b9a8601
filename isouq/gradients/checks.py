"""Moved: what is asked of a model stands in `isouq.gradients.model`."""

from isouq.gradients.model import ExampleError, check_model, repeatable, run

__all__ = ["ExampleError", "check_model", "repeatable", "run"]
