"""Generators (rng, n) → (inputs (example, 2), classes (example,)) of the twelve problems of ``problems.FRESH``."""

import numpy as np
from sklearn import datasets


def moons(rng, n):
    """Two interleaved half circles."""
    inputs, classes = datasets.make_moons(n, noise=0.15, random_state=_state(rng))
    return 1.5 * (inputs - [0.5, 0.25]), classes


def checkerboard(rng, n):
    """Three by three squares."""
    inputs = rng.uniform(-2, 2, (n, 2))
    return inputs, np.floor((inputs + 2) * 0.75).sum(axis=1).astype(np.int64) % 2


def sine(rng, n):
    """Above or below a wave, with noise in the label."""
    inputs = rng.uniform(-2, 2, (n, 2))
    return inputs, (inputs[:, 1] + rng.normal(0, 0.2, n) > np.sin(2 * inputs[:, 0])).astype(np.int64)


def square(rng, n):
    """Inside a square or around it."""
    inputs = rng.uniform(-2, 2, (n, 2))
    return inputs, (np.abs(inputs).max(axis=1) < 1.3).astype(np.int64)


def corner(rng, n):
    """One quadrant against the other three."""
    inputs = rng.normal(0, 1.1, (n, 2))
    return inputs, ((inputs + rng.normal(0, 0.15, (n, 2))).min(axis=1) > 0).astype(np.int64)


def ellipse(rng, n):
    """Inside or outside a tilted ellipse."""
    inputs = rng.normal(0, 1.1, (n, 2))
    across, along = inputs @ [0.8, -0.6], inputs @ [0.6, 0.8]
    return inputs, (across**2 / 0.5 + along**2 / 2.5 < rng.uniform(0.8, 1.2, n)).astype(np.int64)


def spirals(rng, n, *, n_arms=2, turn=4.0, reach=2.2, noise=0.12):
    """Arms that turn by so many radians on their way out."""
    classes, along = np.arange(n) % n_arms, rng.uniform(0.15, 1.0, n)
    angle = 2 * np.pi * classes / n_arms + turn * along
    inputs = reach * along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return inputs + rng.normal(0, noise, (n, 2)), classes


def stripes(rng, n):
    """Three diagonal bands."""
    inputs = rng.uniform(-2, 2, (n, 2))
    across = inputs.sum(axis=1) + rng.normal(0, 0.15, n)
    return inputs, np.digitize(across, [-1.0, 1.0]).astype(np.int64)


def pinwheel(rng, n):
    """Three bent arms."""
    classes = np.arange(n) % 3
    arms = rng.normal([1.0, 0.0], [0.35, 0.12], (n, 2))
    angle = 2 * np.pi * classes / 3 + 0.4 * np.exp(arms[:, 0])
    x, y = arms.T
    turned = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)
    return 1.4 * turned, classes


def sectors(rng, n):
    """Three unequal sectors of a disc."""
    angle, radius = rng.uniform(0, 2 * np.pi, n), 2.2 * np.sqrt(rng.uniform(size=n))
    classes = np.digitize(angle, [0.5 * np.pi, 1.2 * np.pi]).astype(np.int64)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), classes


def blobs(rng, n):
    """Three normal clouds of unequal spread."""
    centres, spreads = np.array([[-1.2, -0.8], [1.2, -0.8], [0.0, 1.2]]), [0.25, 0.5, 0.8]
    return datasets.make_blobs(n, centers=centres, cluster_std=spreads, random_state=_state(rng))


def shells(rng, n):
    """A normal cloud cut into three shells of equal size."""
    return datasets.make_gaussian_quantiles(n_samples=n, n_classes=3, random_state=_state(rng))


def _state(rng) -> int:
    """Return a seed for scikit-learn, which takes no Generator."""
    return int(rng.integers(2**32))
