"""The positions of two models that correspond, answer by answer.

With ``boundary`` those that predict the same byte of the same answer; with ``dtw`` those that time warping brings
together within an answer. The position that predicts the end of an answer corresponds to the other model's, and to
nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.positions import Pairs, warping_path
from fusion_trainer.data.answers import Answer, Places, places
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.readers import Reader
from fusion_trainer.text.tokenizer import Span, TextTokenizer, Tokens, supervised_positions

__all__ = ["Read", "compared", "end_pairs", "position_pairs", "read_blocks", "sizes", "token_pairs"]

SHIFT = np.int64(32)


@dataclass(frozen=True)
class Read:
    """A block as one model has read it.

    Attributes:
        tokens: Its tokens.
        answers: The answers that are compared.
        spans: The bytes at which the model is queried.
        places: What each position predicts.
    """

    tokens: Tokens
    answers: tuple[Answer, ...]
    spans: tuple[Span, ...]
    places: Places

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """The positions at which the model is queried, ascending: the rows of its store."""
        return supervised_positions(self.tokens, self.spans)


def read_blocks(reader: Reader, blocks: Sequence[Block]) -> list[Read]:
    """Render and tokenise some blocks."""
    readings = [reader.read(block) for block in blocks]
    encoded = reader.tokenizer.encode([reading.text for reading in readings])
    return [
        Read(tokens, one.answers, one.spans, places(tokens, one.text.encode(), one.answers))
        for one, tokens in zip(readings, encoded, strict=True)
    ]


def position_pairs(
    pivot: Read, source: Read, readers: tuple[TextTokenizer, TextTokenizer], contained: int | None
) -> Pairs:
    """Positions that predict content of an answer, and correspond.

    Args:
        pivot: A block as the pivot reads it.
        source: As the source does.
        readers: The pivot's tokenizer and the source's.
        contained: None for ``boundary``, else the cost of time warping (``positions.CONTAINED``).
    """
    if contained is None:
        return _same_places(pivot.places, source.places)
    pairs: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for first, second, of_pivot, of_source in _warped(pivot, source, readers, contained):
        begins = _same_lead(pivot.places, source.places, first[:1], second[:1])
        pairs.append((first[:1][begins], second[:1][begins]))
        inside = np.isin(of_pivot, first) & np.isin(of_source, second)  # not what predicts the end
        pairs.append((of_pivot[inside], of_source[inside]))
    return _joined(pairs)


def token_pairs(
    pivot: Read, source: Read, readers: tuple[TextTokenizer, TextTokenizer], contained: int | None
) -> Pairs:
    """Tokens of answers that correspond: that begin together (``boundary``), or were warped onto each other."""
    if contained is None:
        pairs = _same_places(pivot.places, source.places)
        return Pairs(pairs.pivot + 1, pairs.source + 1)
    found = _warped(pivot, source, readers, contained)
    return _joined([(of_pivot, of_source) for _, _, of_pivot, of_source in found])


def end_pairs(pivot: Read, source: Read) -> Pairs:
    """The positions that predict the end of an answer in both."""
    found = [(pivot.places.end(answer.turn), source.places.end(answer.turn)) for answer in source.answers]
    return _joined([(np.array([i]), np.array([j])) for i, j in found if i is not None and j is not None])


def _same_places(pivot: Places, source: Places) -> Pairs:
    """Positions that predict the same byte of content, where the next tokens begin alike."""
    of_pivot, of_source = np.flatnonzero(pivot.place >= 0), np.flatnonzero(source.place >= 0)
    names = [
        (side.turn[found].astype(np.int64) << SHIFT) + side.place[found]
        for side, found in ((pivot, of_pivot), (source, of_source))
    ]
    _, first, second = np.intersect1d(names[0], names[1], assume_unique=True, return_indices=True)
    of_pivot, of_source = of_pivot[first], of_source[second]
    alike = _same_lead(pivot, source, of_pivot, of_source)
    return Pairs(of_pivot[alike].astype(np.int32), of_source[alike].astype(np.int32))


def _same_lead(
    pivot: Places, source: Places, of_pivot: NDArray[np.intp], of_source: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether the next tokens take the same text from before the content."""
    alike = np.ones(len(of_pivot), bool)
    if pivot.lead or source.lead:
        for number, (i, j) in enumerate(zip(of_pivot.tolist(), of_source.tolist(), strict=True)):
            alike[number] = pivot.lead.get(i, b"") == source.lead.get(j, b"")
    return alike


def _warped(
    pivot: Read, source: Read, readers: tuple[TextTokenizer, TextTokenizer], contained: int
) -> Iterator[tuple[NDArray[np.intp], ...]]:
    """For each answer the positions that predict its content, and the tokens of it that were warped together."""
    for answer in source.answers:
        first, second = pivot.places.content(answer.turn), source.places.content(answer.turn)
        if not len(first) or not len(second):
            continue
        ids = pivot.tokens.ids[first + 1], source.tokens.ids[second + 1]
        if readers[0].sha256 == readers[1].sha256 and np.array_equal(*ids):
            yield first, second, first + 1, second + 1
            continue
        words = [
            [reader.words[token] for token in some.tolist()] for reader, some in zip(readers, ids, strict=True)
        ]
        path = warping_path(words[0], words[1], contained)
        yield first, second, first[path.pivot] + 1, second[path.source] + 1


def _joined(pairs: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> Pairs:
    columns = list(zip(*pairs, strict=True)) or [(), ()]
    first, second = (np.concatenate([np.empty(0, np.int32), *column]).astype(np.int32) for column in columns)
    return Pairs(first, second)


def compared(pivot: Read, source: Read, rows: tuple[int, int]) -> tuple[list[int], list[int], int]:
    """The positions over which the two models' cross-entropies are compared: those of the same bytes.

    Args:
        pivot: A block as the pivot reads it.
        source: As the source does.
        rows: How many of their positions are in their stores; a context may have cut off the others.

    Returns:
        The pivot's positions, the source's, and how many bytes of text they predict; the end of an answer counts
        as one.
    """
    sides = pivot, source
    queried = [side.positions[:count] for side, count in zip(sides, rows, strict=True)]
    found: tuple[list[int], list[int]] = [], []
    size = 0
    for answer in source.answers:
        own = next((one for one in pivot.answers if one.turn == answer.turn), None)
        if own is None or not own.pieces or not answer.pieces:
            continue
        every = [np.flatnonzero((side.places.turn == answer.turn) & (side.places.begins >= 0)) for side in sides]
        stored = [one[np.isin(one, rows_)] for one, rows_ in zip(every, queried, strict=True)]
        begins = [side.places.begins[one] for side, one in zip(sides, stored, strict=True)]
        whole = _length(own) == _length(answer) and all(
            len(one) == len(all_) for one, all_ in zip(stored, every, strict=True)
        )
        read = [side.places.place[one] for side, one in zip(sides, stored, strict=True)]
        common = np.intersect1d(read[0][read[0] >= 0], read[1][read[1] >= 0])
        if not len(common):
            continue
        first, last = int(common[0]), _length(own) if whole else int(common[-1])
        size += last - first
        for positions, here, place in zip(found, stored, begins, strict=True):
            positions += here[(place >= first) & (place < last)].tolist()
        ends = [side.places.end(answer.turn) for side in sides]
        if whole and all(end in rows_ for end, rows_ in zip(ends, queried, strict=True)):
            size += 1
            for positions, end in zip(found, ends, strict=True):
                positions.append(int(end or 0))
    return *found, size


def _length(answer: Answer) -> int:
    """Bytes of content up to the last piece's end."""
    start, stop, at = answer.pieces[-1]
    return at + stop - start


def sizes(read: Read) -> NDArray[np.int32]:
    """int32 [tokens]: bytes of text between a token's end and the end before it."""
    return np.diff(read.tokens.ends, prepend=np.int32(0))
