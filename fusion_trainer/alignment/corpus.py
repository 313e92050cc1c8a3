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

from fusion_trainer.alignment.keeping import keep, kept_of, place
from fusion_trainer.alignment.positions import Pairs, boundary_pairs, warping_path
from fusion_trainer.tokens import TextTokenizer, Tokens

__all__ = ["RULES", "Corpus", "count", "pair_tokens", "saved_counts", "words"]

FORMAT = "fusion-trainer corpus count"
RULES = 1
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
        FusionError: A file in the way, or a disk that is full.
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


def count(texts: Sequence[str], source: TextTokenizer, pivot: TextTokenizer, contained: int | None) -> Corpus:
    """Align every text and count.

    Args:
        texts: Blocks of the dialogues.
        source: The source's tokenizer.
        pivot: The pivot's.
        contained: None pairs tokens that begin at the same byte: what one model predicts with what the other has
            to; otherwise those that warping with this cost (``positions.CONTAINED``) brings together.
    """
    shape = max(source.surfaces) + 1, max(pivot.surfaces) + 1
    rows, columns, every = ([np.empty(0, np.int32)] for _ in range(3))
    for of_source, of_pivot in zip(source.encode(texts), pivot.encode(texts), strict=True):
        pairs = pair_tokens(of_pivot, of_source, pivot, source, contained)
        source_at, pivot_at = pairs.source, pairs.pivot
        if contained is None:  # where both have read the same, the tokens that follow begin together
            both = (source_at + 1 < len(of_source)) & (pivot_at + 1 < len(of_pivot))
            source_at, pivot_at = source_at[both] + 1, pivot_at[both] + 1
        rows.append(of_source.ids[source_at])
        columns.append(of_pivot.ids[pivot_at])
        every.append(of_pivot.ids)
    frequency = np.bincount(np.concatenate(every), minlength=shape[1])
    row, column = np.concatenate(rows), np.concatenate(columns)
    return Corpus(csr_array(coo_array((np.ones(len(row), np.int64), (row, column)), shape=shape)), frequency)


def pair_tokens(
    of_pivot: Tokens, of_source: Tokens, pivot: TextTokenizer, source: TextTokenizer, contained: int | None
) -> Pairs:
    """The aligned positions of one text: boundaries, or the warping path; all, where the tokenizers are one."""
    if len(of_pivot) == len(of_source) and source.sha256 == pivot.sha256:
        every = np.arange(len(of_pivot), dtype=np.int32)
        return Pairs(every, every)
    if contained is None:
        return boundary_pairs(of_pivot, of_source)
    return warping_path(words(of_pivot, pivot), words(of_source, source), contained)


def words(tokens: Tokens, tokenizer: TextTokenizer) -> list[str]:
    """The tokens' strings without markers of spaces, as the papers compare them."""
    return [tokenizer.words[token] for token in tokens.ids.tolist()]
