"""Dynamic time warping of two token sequences: the papers' way to find the tokens that correspond.

The table of costs is computed one row at a time. A path enters a row at some column k and then moves to the right.
With S the running sums of the row's costs,

    D[i, j] = S[j] + min over k ≤ j of (min(D[i−1, k−1], D[i−1, k]) − S[k−1]),

which is a running minimum. Costs are whole tenths of an edit, so sums are exact and so are ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusion_trainer.text.tokenizer import Tokens

__all__ = ["CONTAINED", "Pairs", "boundary_pairs", "warping_path", "word_costs"]

CONTAINED = {"fusechat": 1, "fusechat_v2": 10, "fusellm": 10}
"""Cost of an edit, in tenths, if one token contains the other; otherwise an edit costs 10. FuseChat's release of
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
    """Positions of one text whose tokens end at the same byte: there both models have read the same.

    Of several tokens with one end (BOS and an empty token, the pieces of a character) only the last has read up to
    there. An alignment pairs answer by answer (``pairing.position_pairs``); in a text that is one answer it pairs
    the same positions, except the last, which predicts nothing.
    """
    pivot_last, source_last = _last_at_its_end(pivot.ends), _last_at_its_end(source.ends)
    _, in_pivot, in_source = np.intersect1d(
        pivot.ends[pivot_last], source.ends[source_last], assume_unique=True, return_indices=True
    )
    return Pairs(pivot_last[in_pivot].astype(np.int32), source_last[in_source].astype(np.int32))


def _last_at_its_end(ends: NDArray[np.int32]) -> NDArray[np.intp]:
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], True)[: len(ends)])


def warping_path(pivot: Sequence[str], source: Sequence[str], contained: int = CONTAINED["fusechat"]) -> Pairs:
    """The cheapest warping of one token sequence onto the other (FuseLLM, section 3.2; FusionChat, section 3.2).

    D[i, j] = cost(i, j) + min(D[i−1, j−1], D[i, j−1], D[i−1, j]). If predecessors are equal, the path takes the
    diagonal, else the step in the source, else the step in the pivot.

    Args:
        pivot: The pivot's token strings, without the marks that stand for spaces.
        source: The source's.
        contained: Cost of an edit, in tenths, if one token contains the other.

    Returns:
        Every cell of the path, from (0, 0) to the last token of both; a position may be in several.
    """
    if not pivot or not source:
        return Pairs(np.empty(0, np.int32), np.empty(0, np.int32))
    table = _warp(*word_costs(pivot, source, contained))
    i, j = len(pivot), len(source)
    path = [(i, j)]
    while (i, j) != (1, 1):
        i, j = min(((i - 1, j - 1), (i, j - 1), (i - 1, j)), key=table.__getitem__)  # the first of equals
        path.append((i, j))
    cells = np.array(path[::-1], np.int32) - 1
    return Pairs(cells[:, 0], cells[:, 1])


def word_costs(
    pivot: Sequence[str], source: Sequence[str], contained: int
) -> tuple[NDArray[np.uint16], NDArray[np.intp], NDArray[np.intp]]:
    """Edit distances in tenths between the different words of both sequences.

    Returns:
        uint16 [pivot's words, source's words]; for each token of the pivot the number of its word; the same for
        the source.
    """
    (rows, row_of), (columns, column_of) = _numbered(pivot), _numbered(source)
    distances = cdist(rows, columns, scorer=Levenshtein.distance, dtype=np.uint16)
    costs = distances * np.uint16(10)
    if contained != 10:
        lengths = [np.array([len(word) for word in words]) for words in (rows, columns)]
        # If one word contains the other, their distance is the difference of their lengths.
        candidates = np.argwhere((distances > 0) & (distances == abs(lengths[0][:, None] - lengths[1])))
        for row, column in candidates.tolist():
            if rows[row] in columns[column] or columns[column] in rows[row]:
                costs[row, column] = distances[row, column] * contained
    return costs, row_of, column_of


def _numbered(tokens: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """The different words, and for each token the number of its word."""
    numbers: dict[str, int] = {}
    number_of = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], np.intp)
    return list(numbers), number_of


def _warp(costs: NDArray[np.uint16], pivot: NDArray[np.intp], source: NDArray[np.intp]) -> NDArray[np.int32]:
    """The table D, int32 [1 + pivot tokens, 1 + source tokens]; its border is far away, except D[0, 0] = 0."""
    sums = np.zeros((len(costs), 1 + len(source)), np.int32)
    np.cumsum(costs.take(source, axis=1), axis=1, dtype=np.int32, out=sums[:, 1:])
    table = np.full((1 + len(pivot), 1 + len(source)), FAR, np.int32)
    table[0, 0] = 0
    least = np.empty(len(source), np.int32)
    for row, word in enumerate(pivot.tolist()):
        above, along = table[row], sums[word]
        np.minimum(above[1:], above[:-1], out=least)
        np.subtract(least, along[:-1], out=least)
        np.minimum.accumulate(least, out=least)
        np.add(least, along[1:], out=table[row + 1, 1:])
    return table
