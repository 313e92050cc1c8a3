"""What the training data says of two vocabularies: how often each pair of tokens was aligned.

Counted once per (source tokenizer, pivot tokenizer, dialogues, way of pairing), several processes at a time, and
kept on the disk as the count goes on, so that one that was stopped does not begin anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from fusion_trainer.alignment.pairing import read_blocks, token_pairs
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.readers import Reader
from varm_common.saved_arrays import keep, kept_of, place

__all__ = ["RULES", "Corpus", "count", "saved_counts"]

FORMAT = "fusion-trainer corpus count"
RULES = 2
"""Raised with every change of what is counted, so that no older count is taken for a new one."""
KEPT_EVERY = 4096
"""Blocks that are counted between two writings of the count."""


@dataclass(frozen=True)
class Corpus:
    """Counts over the dialogues.

    Attributes:
        pairs: int64 [source ids, pivot ids], how often two tokens were aligned.
        frequency: int64 [pivot ids], how often the pivot read each id.
    """

    pairs: csr_array
    frequency: NDArray[np.int64]

    def __add__(self, other: "Corpus") -> "Corpus":
        return Corpus(self.pairs + other.pairs, self.frequency + other.frequency)

    def __reduce__(self) -> tuple[Any, ...]:
        return _dense, (self.pairs.shape, self.sparse())

    def sparse(self) -> dict[str, NDArray[np.int64]]:
        """What is not zero: pairs as ``source``, ``pivot``, ``pairs``, frequencies as ``ids``, ``frequency``."""
        pairs, ids = self.pairs.tocoo(), np.flatnonzero(self.frequency)
        source, pivot = (place.astype(np.int64) for place in pairs.coords)
        return {
            "source": source,
            "pivot": pivot,
            "pairs": pairs.data,
            "ids": ids,
            "frequency": self.frequency[ids],
        }


def _dense(shape: tuple[int, int], counts: Mapping[str, NDArray[np.int64]]) -> Corpus:
    """The inverse of ``sparse``."""
    frequency = np.zeros(shape[1], np.int64)
    frequency[counts["ids"]] = counts["frequency"]
    pairs = coo_array((counts["pairs"], (counts["source"], counts["pivot"])), shape=shape)
    return Corpus(csr_array(pairs), frequency)


def saved_counts(
    folder: Path,
    identity: Mapping[str, Any],
    blocks: int,
    count_from: Callable[[int], Iterator[tuple[int, Corpus]]],
) -> Corpus:
    """The counts of this identity in ``folder``; what is missing is counted and kept there.

    Args:
        folder: Where counts are kept.
        identity: What they are of.
        blocks: How many the dialogues have, at least one.
        count_from: Given the first block that is not counted yet, the blocks counted up to the end of each part,
            and the part's counts.

    Raises:
        UserError: A file in the way, or a disk that is full.
    """
    path = place(folder, "corpus", identity)
    total, done = None, 0
    if path.is_file():
        described, counts = kept_of(path, FORMAT, identity)
        total, done = _dense(tuple(described["shape"]), counts), described["blocks"]
    for stop, part in count_from(done) if done < blocks else ():
        total = part if total is None else total + part
        if stop - done >= KEPT_EVERY or stop == blocks:
            described = {"identity": dict(identity), "shape": list(total.pairs.shape), "blocks": stop}
            keep(path, FORMAT, described, total.sparse())
            done = stop
    assert total is not None
    return total


def count(blocks: Sequence[Block], source: Reader, pivot: Reader, contained: int | None) -> Corpus:
    """Align the answers of some blocks and count.

    Args:
        blocks: Of the dialogues.
        source: How the source reads them.
        pivot: How the pivot does.
        contained: None pairs tokens that begin at the same byte of an answer: what one model predicts with what
            the other has to; otherwise those that warping at this cost (``positions.CONTAINED``) brings together.
    """
    shape = max(source.tokenizer.surfaces) + 1, max(pivot.tokenizer.surfaces) + 1
    rows, columns, every = ([np.empty(0, np.int32)] for _ in range(3))
    for of_source, of_pivot in zip(read_blocks(source, blocks), read_blocks(pivot, blocks), strict=True):
        pairs = token_pairs(of_pivot, of_source, (pivot.tokenizer, source.tokenizer), contained)
        rows.append(of_source.tokens.ids[pairs.source])
        columns.append(of_pivot.tokens.ids[pairs.pivot])
        every.append(of_pivot.tokens.ids)
    frequency = np.bincount(np.concatenate(every), minlength=shape[1])
    row, column = np.concatenate(rows), np.concatenate(columns)
    return Corpus(csr_array(coo_array((np.ones(len(row), np.int64), (row, column)), shape=shape)), frequency)
