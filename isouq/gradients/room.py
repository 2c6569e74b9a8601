"""Moved: what fits the memory stands in `isouq.gradients.products`."""

from isouq.gradients.products import room

__all__ = ["room"]
