"""A source's distributions of one block, in the pivot's positions and ids.

Each position of the pivot gets a distribution. If it has partners in the source, it gets theirs, mapped: the
probability of each source id is divided over its images, probabilities that meet in one id are added, and the k
largest are kept. Everything else (ids without image, ids beyond the k largest, the source's own tail) becomes
tail, so no probability is lost. A position without partners keeps the pivot's own distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fusion_trainer.representations.store import Representation

__all__ = ["Mapped", "Mixture", "fill", "map_distributions", "transfer"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Mixture = Sequence[tuple[int, float]]
"""Rows of the source and their weights, which sum to 1."""


@dataclass(frozen=True)
class Mapped:
    """Distributions over the pivot's ids at P positions.

    Attributes:
        ids: int64 [P, k]; if fewer than k ids have probability, the rest are ids without any.
        probabilities: float64 [P, k], descending.
        tail: float64 [P].
        unmapped: float64 [P], the part of the tail that belongs to ids without image.
        beyond: float64 [P], the part of the tail that is mapped but not among the k largest.
    """

    ids: Ids
    probabilities: Floats
    tail: Floats
    unmapped: Floats
    beyond: Floats


def map_distributions(
    ids: NDArray[np.unsignedinteger], probabilities: Floats, tail: Floats, matrix: csr_array, k: int
) -> Mapped:
    """Send distributions through a vocabulary map.

    Args:
        ids: [P, s], of the source.
        probabilities: float64 [P, s]; if images end up equally probable, the one that comes first here is first.
        tail: float64 [P].
        matrix: [source ids, pivot ids]; each row sums to 1 or is empty.
        k: Entries kept.
    """
    positions, width = ids.shape
    starts, stops = matrix.indptr[ids], matrix.indptr[ids.astype(np.int64) + 1]
    images = (stops - starts).ravel()  # how many each entry has
    unmapped = np.where(stops > starts, 0.0, probabilities).sum(1)

    entry = np.repeat(np.arange(positions * width), images)
    number = np.arange(len(entry)) - np.repeat(np.cumsum(images) - images, images)  # of the image in its entry
    image = np.repeat(starts.ravel(), images) + number
    mass = probabilities.ravel()[entry] * matrix.data[image].astype(np.float64)
    row, column, mass, rank = _added(entry // width, matrix.indices[image].astype(np.int64), mass, entry % width)

    order = np.lexsort((rank, -mass, row))
    row, column, mass = row[order], column[order], mass[order]
    place = np.arange(len(row)) - np.searchsorted(row, np.arange(positions))[row]
    kept = place < k
    kept_ids = np.full((positions, k), -1, np.int64)
    kept_mass = np.zeros((positions, k))
    kept_ids[row[kept], place[kept]] = column[kept]
    kept_mass[row[kept], place[kept]] = mass[kept]
    beyond = np.bincount(row[~kept], mass[~kept], positions).astype(np.float64)
    fill(kept_ids)
    return Mapped(kept_ids, kept_mass, tail + unmapped + beyond, unmapped, beyond)


def _added(row: Ids, column: Ids, mass: Floats, rank: Ids) -> tuple[Ids, Ids, Floats, Ids]:
    """Merge entries of the same row and column: their mass is added, and the best rank is kept."""
    order = np.lexsort((rank, column, row))
    row, column, mass, rank = row[order], column[order], mass[order], rank[order]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    firsts = np.flatnonzero(new)
    return row[firsts], column[firsts], np.add.reduceat(mass, firsts) if len(firsts) else mass, rank[firsts]


def fill(ids: Ids) -> None:
    """Fill the free places of each row (-1) with the lowest ids that the row does not have."""
    for row in np.flatnonzero((ids < 0).any(1)):
        free = ids[row] < 0
        unused = np.setdiff1d(np.arange(ids.shape[1] + 1), ids[row])
        ids[row, free] = unused[: free.sum()]


def transfer(
    pivot: Representation, source: Representation, partners: Sequence[Mixture | None], matrix: csr_array
) -> tuple[Representation, NDArray[np.bool_], Mapped]:
    """The distributions of one row of the aligned store.

    Args:
        pivot: The pivot's own row, P positions.
        source: The source's row.
        partners: For each of the P positions, the source's positions that correspond to it, or None.
        matrix: The vocabulary map.

    Returns:
        The pivot's row, with the source's distribution and gold log-probability at positions with partners; bool
        [P], which these are; and their mapped distributions.
    """
    paired = np.array([mixture is not None for mixture in partners], bool)
    mixtures = [mixture for mixture in partners if mixture is not None]
    width = max((len(mixture) for mixture in mixtures), default=1)
    rows = np.zeros((len(mixtures), width), np.int64)
    weights = np.zeros((len(mixtures), width))
    for number, mixture in enumerate(mixtures):
        rows[number, : len(mixture)], weights[number, : len(mixture)] = zip(*mixture, strict=True)
    probabilities = np.exp(source.logprobs[rows].astype(np.float64)) * weights[:, :, None]
    tail = (source.tail[rows].astype(np.float64) * weights).sum(1)
    shape = len(mixtures), width * source.ids.shape[1]
    k = pivot.ids.shape[1]
    mapped = map_distributions(source.ids[rows].reshape(shape), probabilities.reshape(shape), tail, matrix, k)

    changed = ("ids", "logprobs", "tail", "gold_logprob")
    row = replace(pivot, **{name: getattr(pivot, name).copy() for name in changed})
    row.ids[paired] = mapped.ids
    with np.errstate(divide="ignore"):
        row.logprobs[paired] = np.log(mapped.probabilities)
    row.tail[paired] = np.minimum(mapped.tail, 1.0)
    row.gold_logprob[paired] = (source.gold_logprob[rows].astype(np.float64) * weights).sum(1)
    return row, paired, mapped
