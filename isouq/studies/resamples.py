"""Which rows a bootstrap draws: the same for every statistic that is computed on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isouq.studies import require

N_RESAMPLES = 2000
Column = NDArray[np.float64]


class UndefinedStatisticError(ValueError):
    """The statistic has no value on this sample (one class only, or a constant column)."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """Bootstrap resamples of the rows, the same for every statistic that is computed on them.

    counts: (resample, row), how often each row was drawn. left_out: (cluster, row), ones but for one cluster's rows,
    for the jackknife.
    """

    counts: Column
    left_out: Column
    seed: int

    @property
    def unseen(self) -> Column:
        """Ones where a resample left a row out, (resample, row)."""
        return (self.counts == 0).astype(float)

    @classmethod
    def of(
        cls,
        rows: ArrayLike,
        *,
        clusters: ArrayLike | None = None,
        by_name: bool = False,
        n_resamples: int = N_RESAMPLES,
        seed: int = 0,
    ) -> Resamples:
        """Draw `n_resamples` resamples of `rows`; `clusters` (row,) are drawn as wholes.

        `by_name`: how often a cluster is drawn hangs on its name and the seed alone, so that tables of other rows are
        resampled together with this one where they share names: a Poisson bootstrap, whose counts are Poisson with
        mean 1 (Chamandy et al. 2012).

        Raises ValueError for fewer than 40 resamples, fewer than two clusters, and rows without a cluster;
        UndefinedStatisticError for so few rows or clusters that a 95 % interval has no different resamples (four have
        35, and 40 are needed).
        """
        n = len(require.array_of("rows", rows))
        codes = np.arange(n) if clusters is None else require.groups("clusters", clusters)
        if clusters is not None:
            require.same_rows(rows=rows, clusters=clusters)
        n_resamples, seed = require.count("n_resamples", n_resamples, 40), require.seed("seed", seed)
        n_clusters = int(codes.max(initial=-1)) + 1
        if clusters is not None and n_clusters < 2:
            raise UndefinedStatisticError(f"clusters: {n_clusters} given, at least 2 wanted")
        if n_clusters < 5:
            raise UndefinedStatisticError(f"columns: {n_clusters} rows given, too few for 40 different resamples")
        if by_name and clusters is not None:
            names = [str(name).encode() for name in np.unique(require.array_of("clusters", clusters))]
            numbers = [int.from_bytes(hashlib.sha256(name).digest()[:8]) for name in names]
            columns = [np.random.default_rng([seed, number]).poisson(1.0, n_resamples) for number in numbers]
            counts = np.stack(columns, axis=1).astype(float)
        else:
            drawn = np.random.default_rng(seed).integers(0, n_clusters, (n_resamples, n_clusters))
            counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=n_clusters).astype(float)
        return cls(counts[:, codes], 1.0 - np.eye(n_clusters)[:, codes], seed)
