"""Moved: what is asked of a model stands in `isouq.gradients.model`."""

from isouq.gradients.model import check_differentiable, differentiable, select_parameters

__all__ = ["check_differentiable", "differentiable", "select_parameters"]
