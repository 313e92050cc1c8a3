"""Which position of a source corresponds to which position of the pivot, for one text.

``boundary_pairs`` pairs positions at which both models have read the same bytes: there, and only there, do their
next-token distributions speak of the same thing. ``warping_path`` is the papers' way, dynamic time warping over
the tokens' strings, kept as the reference.

Warping runs along the antidiagonals of the table, whose cells do not depend on each other: numpy computes each in
three operations. Costs are whole tenths of an edit, so sums are exact and ties are ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusion_trainer.tokens import Tokens

__all__ = ["CONTAINED", "Pairs", "boundary_pairs", "warping_costs", "warping_path"]

CONTAINED = {"fusechat": 1, "fusellm": 10}
"""Tenths that an edit costs when one token contains the other; otherwise it costs 10."""
FAR = 1 << 29
AT_ONCE = 64
"""Antidiagonals whose costs are laid out together."""


@dataclass(frozen=True)
class Pairs:
    """Corresponding positions, int32 [pairs] each, in ascending order of both."""

    pivot: NDArray[np.int32]
    source: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pivot)


def boundary_pairs(pivot: Tokens, source: Tokens) -> Pairs:
    """Positions whose tokens end at the same byte of the text: all of them, each at most once.

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
    if len(pivot) > len(source):  # the shorter sequence lies along the antidiagonals
        distances = _warp(warping_costs(source, pivot, contained))
        return _walk_back(distances, len(source), len(pivot), pivot_is_short=False)
    distances = _warp(warping_costs(pivot, source, contained))
    return _walk_back(distances, len(pivot), len(source), pivot_is_short=True)


def warping_costs(rows: Sequence[str], columns: Sequence[str], contained: int) -> NDArray[np.uint16]:
    """Edit distances in tenths, uint16 [rows, columns]; each pair of different tokens is measured once."""
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
    table: NDArray[np.uint16] = costs.take(column_kind, axis=1).take(row_kind, axis=0)
    return table


def _kinds(words: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """The different words, and for each word which of them it is."""
    numbers: dict[str, int] = {}
    which = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.intp)
    return list(numbers), which


def _warp(costs_NM: NDArray[np.uint16]) -> list[NDArray[np.int32]]:
    """The table D by antidiagonals: cell (i, j) in array i + j at i − first + 1; both ends of it are far."""
    short, long = costs_NM.shape
    padded = np.zeros(short * long + AT_ONCE, np.uint16)
    padded[: short * long] = costs_NM.ravel()
    costs = np.empty((AT_ONCE, short), np.int32)
    table: list[NDArray[np.int32]] = []
    last = before = np.empty(0, np.int32)  # the two antidiagonals before, and the first row of each
    first_of_last = first_of_before = 0
    for start in range(0, short + long - 1, AT_ONCE):
        end = min(start + AT_ONCE, short + long - 1)
        low, high = max(0, start - long + 1), min(end, short)
        # row i from column start − i on: a step down and to the left is long − 1 further in memory
        rows = padded[start + low * (long - 1) :]
        view = np.lib.stride_tricks.as_strided(rows, (high - low, AT_ONCE), (2 * (long - 1), 2))
        costs[:, low:high] = view.T
        for diagonal in range(start, end):
            first, stop = max(0, diagonal - long + 1), min(diagonal + 1, short)
            here = np.empty(stop - first + 2, np.int32)  # an array of its own: numpy need not look for overlaps
            here[0] = here[-1] = FAR
            cells = here[1:-1]
            if diagonal == 0:
                cells[0] = 0
            else:
                skip = first - first_of_last
                np.minimum(last[skip : stop - first_of_last], last[skip + 1 : stop - first_of_last + 1], out=cells)
                if diagonal > 1:
                    np.minimum(cells, before[first - first_of_before : stop - first_of_before], out=cells)
            np.add(cells, costs[diagonal - start, first:stop], out=cells)
            table.append(here)
            before, first_of_before, last, first_of_last = last, first_of_last, here, first
    return table


def _walk_back(table: list[NDArray[np.int32]], short: int, long: int, pivot_is_short: bool) -> Pairs:
    i, j = short - 1, long - 1
    path = [(i, j)]
    while i or j:
        diagonal = i + j
        before = table[diagonal - 1]
        place = i - max(0, diagonal - long) + 1  # of row i in the antidiagonal before
        in_long = before[place] if j else FAR
        in_short = before[place - 1] if i else FAR
        both = table[diagonal - 2][i - max(0, diagonal - 1 - long)] if i and j else FAR
        least = min(in_long, in_short)
        if both <= least:
            i, j = i - 1, j - 1
        elif ((in_long if pivot_is_short else in_short) == least) == pivot_is_short:
            j -= 1
        else:
            i -= 1
        path.append((i, j))
    steps = np.array(path[::-1], np.int32)
    pivot, source = steps.T if pivot_is_short else steps.T[::-1]
    return Pairs(pivot, source)
