"""Isotropy against covariances estimated from data: on small networks with a known posterior, and on real models."""
