"""Which rows a bootstrap draws, the same for every statistic, and how a statistic is computed on all resamples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isouq.studies import require

N_RESAMPLES = 2000
MOST_LEFT_OUT = 1000  # parts of the jackknife; of more clusters, several are left out at a time
Column = NDArray[np.float64]
Weights = NDArray[np.number]  # how often each row counts, (resample, row)
# Scores (example,) or (resample, example), wrong (example,) and weights (resample, example) to values (resample,).
Statistic = Callable[[Column, NDArray[np.bool_], Weights], Column]
BLOCK = 2**18  # numbers at a time, which a core's cache holds


class UndefinedStatisticError(ValueError):
    """The statistic has no value on this sample (one class only, or a constant column)."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """Bootstrap resamples of the rows, the same for every statistic that is computed on them.

    counts: (resample, row), how often each row was drawn. left_out: (cluster, row), ones but for one cluster's rows,
    for the jackknife; with more than MOST_LEFT_OUT clusters, but for one of so many sets of them, which tell the same
    acceleration. Both int32: half the memory, and cumulated several times as fast as floats. clusters: (row,), the
    number of each row's cluster, which folds keep whole, too.
    """

    counts: NDArray[np.int32]
    left_out: NDArray[np.int32]
    clusters: NDArray[np.int64]
    seed: int

    @property
    def unseen(self) -> NDArray[np.int32]:
        """Ones where a resample left a row out, (resample, row)."""
        return (self.counts == 0).astype(np.int32)

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
            given = f"columns: {n_clusters} rows" if clusters is None else f"clusters: {n_clusters}"
            raise UndefinedStatisticError(f"{given} given, too few for 40 different resamples")
        if by_name and clusters is not None:
            names = [str(name).encode() for name in np.unique(require.array_of("clusters", clusters))]
            numbers = [int.from_bytes(hashlib.sha256(name).digest()[:8]) for name in names]
            columns = [np.random.default_rng([seed, number]).poisson(1.0, n_resamples) for number in numbers]
            counts = np.stack(columns, axis=1).astype(np.int32)
        else:
            counts = np.empty((n_resamples, n_clusters), np.int32)
            rng = np.random.default_rng(seed)
            for row in counts:
                row[:] = np.bincount(rng.integers(0, n_clusters, n_clusters), minlength=n_clusters)
        n_parts = min(n_clusters, MOST_LEFT_OUT)
        left_out = (codes % n_parts != np.arange(n_parts)[:, None]).astype(np.int32)
        return cls(counts if clusters is None else counts[:, codes], left_out, codes, seed)


class Pooled(NamedTuple):
    """Answers in the order of a score, in pools: neighbours that are all right or all wrong are one for any ranking.

    order: (example,). last: (pool,), each pool's end in that order. wrong: (pool,). tied: the pools of right answers
    whose scores are also those of the wrong answers in the pool behind.
    """

    order: NDArray[np.int64]
    last: NDArray[np.int64]
    wrong: NDArray[np.bool_]
    tied: NDArray[np.int64]

    @classmethod
    def of(cls, score: Column, wrong: NDArray[np.bool_]) -> Pooled:
        """Sort and pool, `score` and `wrong` (example,)."""
        order = np.argsort(score)
        if not (score[order][1:] == score[order][:-1]).any():
            wrong = wrong[order]
            last = np.flatnonzero(np.append(wrong[1:] != wrong[:-1], True))
            return cls(order, last, wrong[last], last[:0])
        order = np.lexsort((wrong, score))  # right answers first among tied ones
        score, wrong = score[order], wrong[order]
        first = np.append(True, score[1:] != score[:-1])
        run = np.cumsum(first) - 1
        mixed = (np.bincount(run, wrong) % np.bincount(run) > 0)[run]
        ends = (wrong[1:] != wrong[:-1]) | (first[1:] & (mixed[1:] | mixed[:-1]))
        last = np.flatnonzero(np.append(ends, True))
        return cls(order, last, wrong[last], np.flatnonzero(run[last[1:]] == run[last[:-1]]))

    def cumulated(self, weights: Weights) -> Weights:
        """Return the weight of each pool and all before it, (resample, pool)."""
        return np.cumsum(weights.take(self.order, 1), axis=1, dtype=weights.dtype).take(self.last, 1)

    def sizes(self, cumulated: Weights, pools: NDArray[np.int64]) -> Weights:
        """Return the weight of some pools, (resample, pool)."""
        return cumulated[:, pools] - np.where(pools > 0, cumulated[:, pools - 1], 0)

    def total(self, cumulated: Weights) -> Column:
        """Return the sum over wrong pools of what a function of the cumulated weight, 0 at 0, gains in them."""
        return cumulated @ (self.wrong * 1.0 - np.append(self.wrong[1:], False))


def by_blocks(of: Callable[..., Column], weights: Weights, *others: Weights) -> Column:
    """Return `of` some rows of `weights` (resample, example) at a time, and of the same rows of `others`, joined."""
    size = max(1, BLOCK // weights.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(weights), size)]
    return np.concatenate([of(weights[part], *(other[part] for other in others)) for part in parts])


def one_by_one(statistic: Statistic, score: Column, wrong: NDArray[np.bool_], weights: Weights) -> Column:
    """Return a statistic of scores (resample, example) that differ, each of the answers that have weight alone."""
    used = [np.flatnonzero(row) for row in weights]
    rows = zip(score, weights, used, strict=True)
    return np.array([statistic(s[u], wrong[u], w[None, u])[0] if len(u) else np.nan for s, w, u in rows])
