"""How often each pair of tokens of two vocabularies is aligned over the dialogues."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from fusion_trainer.alignment.pairing import read_blocks, token_pairs
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.readers import Reader
from varm_common.saved_arrays import load_arrays, save_arrays

__all__ = ["RULES", "Corpus", "count", "load_counts", "save_counts"]

FORMAT = "fusion-trainer corpus count"
RULES = 2
"""Version of what is counted: raised whenever that changes, so that an older count is not reused."""


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


def count(blocks: Sequence[Block], source: Reader, pivot: Reader, contained: int | None) -> Corpus:
    """Align the answers of some blocks and count the pairs of tokens, as ``pairing.token_pairs`` finds them."""
    shape = max(source.tokenizer.surfaces) + 1, max(pivot.tokenizer.surfaces) + 1
    rows, columns, read = ([np.empty(0, np.int32)] for _ in range(3))
    for of_source, of_pivot in zip(read_blocks(source, blocks), read_blocks(pivot, blocks), strict=True):
        pairs = token_pairs(of_pivot, of_source, (pivot.tokenizer, source.tokenizer), contained)
        rows.append(of_source.tokens.ids[pairs.source])
        columns.append(of_pivot.tokens.ids[pairs.pivot])
        read.append(of_pivot.tokens.ids)
    row, column = np.concatenate(rows), np.concatenate(columns)
    pair_counts = coo_array((np.ones(len(row), np.int64), (row, column)), shape=shape)
    return Corpus(csr_array(pair_counts), np.bincount(np.concatenate(read), minlength=shape[1]))


def save_counts(path: Path, identity: Mapping[str, Any], counts: Corpus, blocks: int) -> None:
    """Write the counts over the first ``blocks`` blocks."""
    pairs, ids = counts.pairs.tocoo(), np.flatnonzero(counts.frequency)
    source, pivot = (places.astype(np.int64) for places in pairs.coords)
    arrays = {"source": source, "pivot": pivot, "pairs": pairs.data}
    arrays |= {"ids": ids, "frequency": counts.frequency[ids]}
    save_arrays(path, FORMAT, {"identity": identity, "shape": pairs.shape, "blocks": blocks}, arrays)


def load_counts(path: Path, identity: Mapping[str, Any]) -> tuple[Corpus, int]:
    """The saved counts, and over how many blocks.

    Raises:
        UserError: The file is damaged or of something else.
    """
    described, arrays = load_arrays(path, FORMAT, identity)
    shape = tuple(described["shape"])
    frequency = np.zeros(shape[1], np.int64)
    frequency[arrays["ids"]] = arrays["frequency"]
    pairs = coo_array((arrays["pairs"], (arrays["source"], arrays["pivot"])), shape=shape)
    return Corpus(csr_array(pairs), frequency), described["blocks"]
