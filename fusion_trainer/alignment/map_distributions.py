"""One conversation's source distributions, in the pivot's positions and ids.

Every position of the pivot gets a distribution. Where the source has a partner for it, that is the source's,
mapped: the probability of each source id is divided over its images, mass that meets in one id is added, the k
largest are kept, and all else (ids without image, what is beyond the k, the source's own tail) is tail, so that no
mass is lost. Where it has none, it is the pivot's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fusion_trainer.representations.store import Supervised

__all__ = ["Mapped", "Mixture", "map_distributions", "transfer"]

Mixture = Sequence[tuple[int, float]]
"""Rows of the source and their weights, which sum to 1."""


@dataclass(frozen=True)
class Mapped:
    """Distributions over the pivot's ids, at P positions.

    Attributes:
        ids: int64 [P, k]; where fewer than k ids have probability, the rest are ids without any.
        probabilities: float64 [P, k], descending.
        tail: float64 [P].
        unmapped: float64 [P], what of the tail is mass of ids without image.
        beyond: float64 [P], what of it is mass mapped but not among the k.
    """

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    tail: NDArray[np.float64]
    unmapped: NDArray[np.float64]
    beyond: NDArray[np.float64]


def map_distributions(
    ids: NDArray[np.unsignedinteger],
    probabilities: NDArray[np.float64],
    tail: NDArray[np.float64],
    matrix: csr_array,
    k: int,
) -> Mapped:
    """Send distributions through a vocabulary map.

    Args:
        ids: [P, s] of the source.
        probabilities: float64 [P, s]; of equal ones the earlier is kept first.
        tail: float64 [P].
        matrix: [source ids, pivot ids], rows sum to 1 or are empty.
        k: Entries kept.
    """
    positions, width = ids.shape
    starts, stops = matrix.indptr[ids], matrix.indptr[ids.astype(np.int64) + 1]
    fans = (stops - starts).ravel()
    unmapped = np.where(stops > starts, 0.0, probabilities).sum(1)

    entry = np.repeat(np.arange(positions * width), fans)
    image = np.repeat(starts.ravel(), fans) + np.arange(len(entry)) - np.repeat(np.cumsum(fans) - fans, fans)
    row = entry // width
    mass = probabilities.ravel()[entry] * matrix.data[image].astype(np.float64)
    row, column, mass, rank = _added(row, matrix.indices[image].astype(np.int64), mass, entry % width)

    order = np.lexsort((rank, -mass, row))
    row, column, mass = row[order], column[order], mass[order]
    firsts = np.searchsorted(row, np.arange(positions))
    place = np.arange(len(row)) - firsts[row]
    kept = place < k
    found_ids = np.full((positions, k), -1, np.int64)
    found = np.zeros((positions, k))
    found_ids[row[kept], place[kept]] = column[kept]
    found[row[kept], place[kept]] = mass[kept]
    beyond = np.bincount(row[~kept], mass[~kept], positions).astype(np.float64)
    _fill(found_ids)
    return Mapped(found_ids, found, tail + unmapped + beyond, unmapped, beyond)


def _added(
    row: NDArray[np.int64], column: NDArray[np.int64], mass: NDArray[np.float64], rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Entries of one row and column made one: their mass added, their best rank kept."""
    order = np.lexsort((rank, column, row))
    row, column, mass, rank = row[order], column[order], mass[order], rank[order]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    firsts = np.flatnonzero(new)
    return row[firsts], column[firsts], np.add.reduceat(mass, firsts) if len(firsts) else mass, rank[firsts]


def _fill(ids: NDArray[np.int64]) -> None:
    """Put the lowest ids a row does not have where it has fewer than k."""
    for row in np.flatnonzero((ids < 0).any(1)):
        free = ids[row] < 0
        unused = np.setdiff1d(np.arange(ids.shape[1] + 1), ids[row])
        ids[row, free] = unused[: free.sum()]


def transfer(
    pivot: Supervised, source: Supervised, partners: Sequence[Mixture | None], matrix: csr_array
) -> tuple[Supervised, NDArray[np.bool_], Mapped]:
    """A conversation's row of the aligned store.

    Args:
        pivot: The pivot's own distributions [P, k].
        source: The source's.
        partners: For each of the P positions the source's rows that correspond to it, or None.
        matrix: The vocabulary map.

    Returns:
        The row; bool [P], which positions are the source's; and the mapped distributions of those. The gold
        log-probability of a mapped position is the source's own, of its own next token.
    """
    paired = np.array([partner is not None for partner in partners], bool)
    mixtures = [partner for partner in partners if partner is not None]
    k = pivot.ids.shape[1]
    width = max((len(mixture) for mixture in mixtures), default=1)
    rows = np.zeros((len(mixtures), width), np.int64)
    weights = np.zeros((len(mixtures), width))
    for number, mixture in enumerate(mixtures):
        for place, (row, weight) in enumerate(mixture):
            rows[number, place], weights[number, place] = row, weight
    probabilities = np.exp(source.logprobs[rows].astype(np.float64)) * weights[:, :, None]
    tail = (source.tail[rows].astype(np.float64) * weights).sum(1)
    shape = len(mixtures), width * source.ids.shape[1]
    mapped = map_distributions(source.ids[rows].reshape(shape), probabilities.reshape(shape), tail, matrix, k)

    ids, logprobs = pivot.ids.copy(), pivot.logprobs.copy()
    tails, golds = pivot.tail.copy(), pivot.gold_logprob.copy()
    ids[paired] = mapped.ids
    with np.errstate(divide="ignore"):
        logprobs[paired] = np.log(mapped.probabilities)
    tails[paired] = np.minimum(mapped.tail, 1.0)
    golds[paired] = (source.gold_logprob[rows].astype(np.float64) * weights).sum(1)
    return Supervised(ids, logprobs, tails, golds), paired, mapped
