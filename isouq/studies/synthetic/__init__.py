"""Small problems whose posterior can be sampled: the reference that the paper's estimate is held against.

Only this part of isouq imports jax. It works in float64, switched on during a call and never globally.
"""
