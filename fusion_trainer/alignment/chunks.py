"""Chunks of an answer: the bytes between two boundaries that both tokenizers have.

Both models read a chunk as whole tokens, and both have read the same bytes of the answer before it. So the
likelihoods that they give to the chunk can be compared (approximate likelihood matching, arXiv 2503.20083), also
where the tokens inside have no partner. The end of an answer is a chunk of one token.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.pairing import Read, content_length, end_pairs, same_places
from fusion_trainer.data.answers import Answer
from fusion_trainer.representations.store import Representation

__all__ = ["chunk_columns", "common_chunks"]

MOST = int(np.iinfo(np.uint16).max)
"""The most pivot tokens that the chunk of a store has."""
LEAST = float(np.finfo(np.float16).min)


def common_chunks(pivot: Read, source: Read) -> list[NDArray[np.int64]]:
    """The N chunks of a block, as short as they can be, and then the ends of its answers.

    A chunk is left out where a template puts other text into it.

    Returns:
        int64 [N, 2] for each model: the next tokens of the positions from the first up to the second.
    """
    pairs = same_places(pivot.places, source.places)
    columns = pivot.places.turn[pairs.pivot], pivot.places.place[pairs.pivot], pairs.pivot, pairs.source
    stops = np.array(list(_content_ends(pivot, source)), np.int64).reshape(-1, 4)
    turns, bytes_, *both = np.concatenate([np.stack(columns, 1).astype(np.int64), stops]).T
    order = np.lexsort((bytes_, turns))
    turns, bytes_ = turns[order], bytes_[order]
    kept, bounds = turns[1:] == turns[:-1], []
    for read, positions in zip((pivot, source), both, strict=True):
        positions = positions[order]
        lead = np.array([len(read.places.lead.get(position, b"")) for position in positions.tolist()], np.int64)
        sizes = np.diff(read.tokens.ends[positions]) - lead[:-1]
        kept = kept & (sizes == np.diff(bytes_)) & (np.diff(positions) > 0)
        bounds.append(np.stack([positions[:-1], positions[1:]], 1))
    ends = end_pairs(pivot, source)
    of_ends = [np.stack([positions, positions + 1], 1).astype(np.int64) for positions in (ends.pivot, ends.source)]
    return [np.concatenate([part[kept], end]) for part, end in zip(bounds, of_ends, strict=True)]


def _content_ends(pivot: Read, source: Read) -> Iterator[tuple[int, int, int, int]]:
    """For answers whose content ends alike: turn, bytes of content, and each model's token that ends there."""
    for answer in source.answers:
        own = next((other for other in pivot.answers if other.turn == answer.turn), None)
        if own is None or not own.pieces or not answer.pieces:
            continue
        last = [_last_token(read, which) for read, which in ((pivot, own), (source, answer))]
        if last[0] is not None and last[1] is not None and content_length(own) == content_length(answer):
            yield answer.turn, content_length(own), last[0], last[1]


def _last_token(read: Read, answer: Answer) -> int | None:
    """The token that ends with an answer's content, if one does."""
    ending = np.flatnonzero(read.tokens.ends == answer.pieces[-1][1])
    return int(ending[-1]) if len(ending) else None


def chunk_columns(
    pivot: Read, source: Read, own: Representation, other: Representation
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """``chunk_size`` and ``chunk_logprob`` of an aligned row, for the chunks that are wholly in both stores."""
    own_bounds, source_bounds = common_chunks(pivot, source)
    sizes, logprobs = np.zeros(len(own), np.uint16), np.zeros(len(own), np.float16)
    rows, stored = _rows(pivot.positions[: len(own)], own_bounds)
    source_rows, read = _rows(source.positions[: len(other)], source_bounds)
    kept = stored & read & (rows[:, 1] - rows[:, 0] <= MOST)
    first, stop = rows[kept].T
    sums = np.concatenate([[0.0], np.cumsum(other.gold_logprob.astype(np.float64))])[source_rows[kept]]
    sizes[first] = stop - first
    logprobs[first] = np.clip(sums[:, 1] - sums[:, 0], LEAST, 0.0)
    return sizes, logprobs


def _rows(positions: NDArray[np.int32], bounds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The rows of chunks among a store's positions, int64 [N, 2], and whether all their positions are there."""
    rows = np.searchsorted(positions, bounds).astype(np.int64)
    return rows, rows[:, 1] - rows[:, 0] == bounds[:, 1] - bounds[:, 0]
