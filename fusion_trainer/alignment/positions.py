"""Which position of a source corresponds to which position of the pivot, for one text.

``boundary_pairs`` pairs positions at which both models have read the same bytes: there, and only there, do their
next-token distributions speak of the same thing. ``warping_path`` is the papers' way, dynamic time warping over
the tokens' strings, kept as the reference.

Warping takes a row of the table at a time. Along a row the path runs on from the cell where it came down, so with
the row's running sums S of costs, D[i, j] = S[j] + min over k ≤ j of (the cheaper of D[i−1, k−1] and D[i−1, k]) −
S[k−1]: a running minimum. Costs are whole tenths of an edit, so sums are exact and ties are ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusion_trainer.text.tokenizer import Tokens

__all__ = ["CONTAINED", "Pairs", "boundary_pairs", "warping_costs", "warping_path"]

CONTAINED = {"fusechat": 1, "fusechat_v2": 10, "fusellm": 10}
"""Tenths that an edit costs when one token contains the other; otherwise it costs 10. FuseChat's release of
February 2024 has 1, that of August 2024 has FuseLLM's 10 again."""
FAR = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Pairs:
    """Corresponding positions, int32 [pairs] each, in ascending order of both."""

    pivot: NDArray[np.int32]
    source: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pivot)


def boundary_pairs(pivot: Tokens, source: Tokens) -> Pairs:
    """Positions of one text, read by both, whose tokens end at the same byte: all of them, each at most once.

    An alignment pairs answer by answer (``pairing.position_pairs``). For a text that is one answer it pairs the
    same positions, except the last, which predicts nothing.

    Of several tokens with one end (BOS and an empty token, the pieces a normaliser made of one character) only the
    last has read up to there.
    """
    last_of_pivot, last_of_source = _last_at_its_end(pivot.ends), _last_at_its_end(source.ends)
    _, in_pivot, in_source = np.intersect1d(
        pivot.ends[last_of_pivot], source.ends[last_of_source], assume_unique=True, return_indices=True
    )
    return Pairs(last_of_pivot[in_pivot].astype(np.int32), last_of_source[in_source].astype(np.int32))


def _last_at_its_end(ends: NDArray[np.int32]) -> NDArray[np.intp]:
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], True)[: len(ends)])


def warping_path(pivot: Sequence[str], source: Sequence[str], contained: int = CONTAINED["fusechat"]) -> Pairs:
    """The cheapest warping of one token sequence onto the other (FuseLLM, section 3.2; FusionChat, section 3.2).

    D[i, j] = cost(i, j) + min(D[i−1, j−1], D[i, j−1], D[i−1, j]); of equal predecessors the path takes the
    diagonal, else the step in the source, else the step in the pivot.

    Args:
        pivot: The pivot's token strings, without markers of spaces.
        source: The source's.
        contained: Tenths an edit costs when one token contains the other.

    Returns:
        Every cell of the path from (0, 0) to the last of both; a position may be in several.
    """
    if not pivot or not source:
        return Pairs(np.empty(0, np.int32), np.empty(0, np.int32))
    if len(pivot) > len(source):  # fewer rows take less time
        i, j = _walk_back(_warp(*_kind_costs(source, pivot, contained)), along_row_first=False)
        return Pairs(j, i)
    return Pairs(*_walk_back(_warp(*_kind_costs(pivot, source, contained)), along_row_first=True))


def warping_costs(rows: Sequence[str], columns: Sequence[str], contained: int) -> NDArray[np.uint16]:
    """Edit distances in tenths, uint16 [rows, columns]; each pair of different tokens is measured once."""
    costs, row_kind, column_kind = _kind_costs(rows, columns, contained)
    table: NDArray[np.uint16] = costs.take(column_kind, axis=1).take(row_kind, axis=0)
    return table


def _kind_costs(
    rows: Sequence[str], columns: Sequence[str], contained: int
) -> tuple[NDArray[np.uint16], NDArray[np.intp], NDArray[np.intp]]:
    """Costs between different words, and for each row and column which of these it is."""
    kinds_of_rows, row_kind = _kinds(rows)
    kinds_of_columns, column_kind = _kinds(columns)
    distances = cdist(kinds_of_rows, kinds_of_columns, scorer=Levenshtein.distance, dtype=np.uint16)
    costs = distances * np.uint16(10)
    if contained != 10:
        lengths = [np.array([len(word) for word in words]) for words in (kinds_of_rows, kinds_of_columns)]
        # a token that contains another is as far from it as it is longer
        maybe = np.argwhere((distances > 0) & (distances == abs(lengths[0][:, None] - lengths[1])))
        for row, column in maybe.tolist():
            one, other = kinds_of_rows[row], kinds_of_columns[column]
            if one in other or other in one:
                costs[row, column] = distances[row, column] * contained
    return costs, row_kind, column_kind


def _kinds(words: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """The different words, and for each word which of them it is."""
    numbers: dict[str, int] = {}
    which = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.intp)
    return list(numbers), which


def _warp(
    costs: NDArray[np.uint16], row_kind: NDArray[np.intp], column_kind: NDArray[np.intp]
) -> NDArray[np.int32]:
    """The table D, int32 [N, M + 1], behind a column that no path comes from."""
    long = len(column_kind)
    sums = np.zeros((len(costs), long + 1), np.int32)
    np.cumsum(costs.take(column_kind, axis=1), axis=1, dtype=np.int32, out=sums[:, 1:])
    table = np.empty((len(row_kind), long + 1), np.int32)
    table[:, 0] = FAR
    table[0, 1:] = sums[row_kind[0], 1:]
    least = np.empty(long, np.int32)
    for row in range(1, len(row_kind)):
        above, along = table[row - 1], sums[row_kind[row]]
        np.minimum(above[1:], above[:-1], out=least)
        np.subtract(least, along[:-1], out=least)
        np.minimum.accumulate(least, out=least)
        np.add(least, along[1:], out=table[row, 1:])
    return table


def _walk_back(table: NDArray[np.int32], along_row_first: bool) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows and columns of the path; of equal predecessors the diagonal, then the step that is named."""
    i, j = len(table) - 1, table.shape[1] - 2
    path = [(i, j)]
    while i or j:
        in_row, across = int(table[i, j]), int(table[i - 1, j + 1]) if i else FAR
        both = int(table[i - 1, j]) if i and j else FAR
        least = min(in_row, across)
        if both <= least and i and j:
            i, j = i - 1, j - 1
        elif (in_row if along_row_first else across) == least:
            i, j = (i, j - 1) if along_row_first else (i - 1, j)
        else:
            i, j = (i - 1, j) if along_row_first else (i, j - 1)
        path.append((i, j))
    steps = np.array(path[::-1], np.int32)
    return steps[:, 0], steps[:, 1]
