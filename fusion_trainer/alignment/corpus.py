"""What the training data says of two vocabularies: how often each pair of tokens was aligned.

Counted per (source tokenizer, pivot tokenizer, dialogues, way of pairing), several processes at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from fusion_trainer.alignment.positions import Pairs, boundary_pairs, warping_path
from fusion_trainer.tokens import TextTokenizer, Tokens

__all__ = ["Corpus", "count", "pair_tokens", "words"]


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
    rows, columns, frequency = [np.empty(0, np.int32)], [np.empty(0, np.int32)], np.zeros(shape[1], np.int64)
    for of_source, of_pivot in zip(source.encode(texts), pivot.encode(texts), strict=True):
        pairs = pair_tokens(of_pivot, of_source, pivot, source, contained)
        source_at, pivot_at = pairs.source, pairs.pivot
        if contained is None:  # where both have read the same, the tokens that follow begin together
            both = (source_at + 1 < len(of_source)) & (pivot_at + 1 < len(of_pivot))
            source_at, pivot_at = source_at[both] + 1, pivot_at[both] + 1
        rows.append(of_source.ids[source_at])
        columns.append(of_pivot.ids[pivot_at])
        frequency += np.bincount(of_pivot.ids, minlength=shape[1])
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
