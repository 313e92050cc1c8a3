"""The vocabulary map ``co_occurrence``: minimum edit distance, with ties decided by the tokens' neighbours.

Of the pivot's tokens that are equally near to a token of the source, the image is the one whose neighbours in the
text are most similar to those of the source's token (``--vocab_mapping_type co_occurrence`` in FuseLLM's release).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from fusion_trainer.alignment.pairing import Read, read_blocks
from fusion_trainer.alignment.vocabulary import Vocabularies, VocabularyMap, nearest
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.readers import Reader

__all__ = ["BLOCKS", "Neighbours", "co_occurrence", "count_neighbours"]

WINDOW = 5
"""How many tokens apart neighbours may be."""
BLOCKS = 1000
"""Blocks to count over; FuseLLM counts over the small validation split of its data."""
BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class Neighbours:
    """How often two ids stand near each other in the answers: int64 [ids, ids] of the source, and of the pivot."""

    source: csr_array
    pivot: csr_array


def count_neighbours(blocks: Sequence[Block], source: Reader, pivot: Reader) -> Neighbours:
    """Count the neighbours of each token within the answers, where both models read the same text."""
    matrices = []
    for reader in (source, pivot):
        size = max(reader.tokenizer.surfaces) + 1
        total = csr_array((size, size), dtype=np.int64)
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            total = total + _neighbours(read_blocks(reader, blocks[start : start + BLOCKS_AT_ONCE]), size)
        matrices.append(csr_array(total + total.T))
    return Neighbours(*matrices)


def _neighbours(blocks: Sequence[Read], size: int) -> csr_array:
    """int64 [ids, ids]: each pair of neighbours, once in the order of the text.

    As in the release, a pair that is exactly ``WINDOW`` apart counts half as much as a nearer one.
    """
    contents = [(block, block.places.content(answer.turn)) for block in blocks for answer in block.answers]
    texts = [block.tokens.ids[at[0] + 1 : at[-1] + 2] for block, at in contents if len(at)]
    pairs: list[NDArray[np.int64]] = [np.empty((3, 0), np.int64)]
    for ids in texts:
        for distance in range(1, min(WINDOW, len(ids) - 1) + 1):
            counts = np.full(len(ids) - distance, 1 if distance == WINDOW else 2)
            pairs.append(np.stack([ids[:-distance], ids[distance:], counts]))
    firsts, seconds, numbers = np.concatenate(pairs, axis=1)
    return csr_array(coo_array((numbers, (firsts, seconds)), shape=(size, size)))


def co_occurrence(
    both: Vocabularies, neighbours: Neighbours, frequency: Mapping[int, int] | None = None
) -> VocabularyMap:
    """MinED; of equally near tokens the one with the highest cosine between its neighbours and the source token's.

    The source's neighbours are first mapped to the pivot's ids by MinED. A token that does not occur keeps the
    image that ``min_edit_distance`` gives it.
    """
    images, ties = both.same(both.text | both.marks), dict[int, list[int]]()
    occurs = np.diff(neighbours.source.indptr) > 0
    for token, tied in nearest(both, frequency):
        images[token] = tied[0]
        if len(tied) > 1 and occurs[token]:
            ties[token] = tied
    default = both.map(images, "min_edit_distance").matrix
    common = np.unique(default.indices)
    mapped = csr_array(neighbours.source @ default)[:, common]
    pivot = csr_array(neighbours.pivot, dtype=np.float64)[:, common]
    lengths = np.sqrt(pivot.power(2).sum(1))
    for token, tied in ties.items():
        products = (pivot[tied] @ mapped[[token]].T).toarray().ravel()
        cosines = np.divide(products, lengths[tied], out=np.zeros(len(tied)), where=lengths[tied] > 0)
        images[token] = tied[int(np.argmax(cosines))]
    return both.map(images | both.functions, "co_occurrence")
