"""Which positions of a source correspond to which positions of the pivot, answer by answer.

With ``boundary``, two positions correspond if they predict the same byte of the same answer: then both models have
read exactly the same bytes of it. With ``dtw``, they correspond if time warping pairs them within an answer. The
position that predicts the end of an answer corresponds to the other model's, and to no other position.
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

__all__ = ["Read", "compared", "end_pairs", "position_pairs", "read_blocks", "same_places", "token_pairs"]

SHIFT = np.int64(32)
Indices = NDArray[np.intp]
Tokenizers = tuple[TextTokenizer, TextTokenizer]
"""The pivot's and the source's."""


@dataclass(frozen=True)
class Read:
    """A block as one model has read it.

    ``answers`` are those that are compared, ``spans`` the bytes at which the model is queried, and ``places`` what
    each position predicts.
    """

    tokens: Tokens
    answers: tuple[Answer, ...]
    spans: tuple[Span, ...]
    places: Places

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """The positions at which the model is queried, ascending: the rows of its store."""
        return supervised_positions(self.tokens, self.spans)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """int32 [tokens]: bytes of text between a token's end and the end of the token before."""
        return np.diff(self.tokens.ends, prepend=np.int32(0))


def read_blocks(reader: Reader, blocks: Sequence[Block]) -> list[Read]:
    """Render and tokenise some blocks."""
    readings = [reader.read(block) for block in blocks]
    tokenised = reader.tokenizer.encode([reading.text for reading in readings])
    return [
        Read(tokens, reading.answers, reading.spans, places(tokens, reading.text.encode(), reading.answers))
        for reading, tokens in zip(readings, tokenised, strict=True)
    ]


def position_pairs(pivot: Read, source: Read, tokenizers: Tokenizers, contained: int | None) -> Pairs:
    """The positions that predict content of an answer and correspond.

    Args:
        pivot: A block as the pivot reads it.
        source: The same block as the source reads it.
        tokenizers: The pivot's and the source's.
        contained: None for ``boundary``; for ``dtw`` the cost of an edit (``positions.CONTAINED``).
    """
    if contained is None:
        return same_places(pivot.places, source.places)
    pairs: list[tuple[Indices, Indices]] = []
    for first, second, pivot_tokens, source_tokens in _warped(pivot, source, tokenizers, contained):
        if pivot.places.lead.get(int(first[0]), b"") == source.places.lead.get(int(second[0]), b""):
            pairs.append((first[:1], second[:1]))
        inside = np.isin(pivot_tokens, first) & np.isin(source_tokens, second)  # the last one predicts the end
        pairs.append((pivot_tokens[inside], source_tokens[inside]))
    return _joined(pairs)


def token_pairs(pivot: Read, source: Read, tokenizers: Tokenizers, contained: int | None) -> Pairs:
    """Tokens of answers that correspond: they begin together (``boundary``), or warping pairs them (``dtw``)."""
    if contained is None:
        pairs = same_places(pivot.places, source.places)
        return Pairs(pairs.pivot + 1, pairs.source + 1)
    return _joined([tokens for _, _, *tokens in _warped(pivot, source, tokenizers, contained)])


def end_pairs(pivot: Read, source: Read) -> Pairs:
    """The positions that predict the end of an answer in both."""
    ends = [(pivot.places.end(answer.turn), source.places.end(answer.turn)) for answer in source.answers]
    return _joined([(np.array([i]), np.array([j])) for i, j in ends if i is not None and j is not None])


def same_places(pivot: Places, source: Places) -> Pairs:
    """Positions that predict the same byte of content, if their next tokens take the same text before it."""
    both = [np.flatnonzero(side.place >= 0) for side in (pivot, source)]
    sides = zip((pivot, source), both, strict=True)
    names = [(side.turn[at].astype(np.int64) << SHIFT) + side.place[at] for side, at in sides]
    _, first, second = np.intersect1d(names[0], names[1], assume_unique=True, return_indices=True)
    pairs = Pairs(both[0][first].astype(np.int32), both[1][second].astype(np.int32))
    if not (pivot.lead or source.lead):
        return pairs
    lists = zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True)
    alike = np.array([pivot.lead.get(i, b"") == source.lead.get(j, b"") for i, j in lists], bool)
    return Pairs(pairs.pivot[alike], pairs.source[alike])


def _warped(pivot: Read, source: Read, tokenizers: Tokenizers, contained: int) -> Iterator[tuple[Indices, ...]]:
    """For each answer the positions of both that predict its content, and its tokens that warping pairs."""
    for answer in source.answers:
        first, second = pivot.places.content(answer.turn), source.places.content(answer.turn)
        if not len(first) or not len(second):
            continue
        ids = pivot.tokens.ids[first + 1], source.tokens.ids[second + 1]
        if tokenizers[0].sha256 == tokenizers[1].sha256 and np.array_equal(*ids):
            yield first, second, first + 1, second + 1
            continue
        both = zip(tokenizers, ids, strict=True)
        words = [[tokenizer.words[token] for token in tokens.tolist()] for tokenizer, tokens in both]
        path = warping_path(words[0], words[1], contained)
        yield first, second, first[path.pivot] + 1, second[path.source] + 1


def _joined(pairs: Sequence[Sequence[Indices]]) -> Pairs:
    columns = list(zip(*pairs, strict=True)) or [(), ()]
    first, second = (np.concatenate([np.empty(0, np.int32), *column]).astype(np.int32) for column in columns)
    return Pairs(first, second)


def compared(pivot: Read, source: Read, rows: tuple[int, int]) -> tuple[list[int], list[int], int]:
    """The positions over which the two models' cross-entropies are compared: those that predict the same bytes.

    ``rows`` is how many of each model's positions are in its store; a short context may have cut off the rest.

    Returns:
        The pivot's positions, the source's, and the number of bytes that they predict; the end of an answer
        counts as one byte.
    """
    sides = pivot, source
    stored = [side.positions[:count] for side, count in zip(sides, rows, strict=True)]
    chosen: tuple[list[int], list[int]] = [], []
    size = 0
    for answer in source.answers:
        own = next((other for other in pivot.answers if other.turn == answer.turn), None)
        if own is None or not own.pieces or not answer.pieces:
            continue
        every = [np.flatnonzero((side.places.turn == answer.turn) & (side.places.begins >= 0)) for side in sides]
        here = [positions[np.isin(positions, kept)] for positions, kept in zip(every, stored, strict=True)]
        whole = content_length(own) == content_length(answer) and all(map(np.array_equal, here, every))
        read = [side.places.place[positions] for side, positions in zip(sides, here, strict=True)]
        common = np.intersect1d(read[0][read[0] >= 0], read[1][read[1] >= 0])
        if not len(common):
            continue
        first, last = int(common[0]), content_length(own) if whole else int(common[-1])
        size += last - first
        for side, positions, result in zip(sides, here, chosen, strict=True):
            begins = side.places.begins[positions]
            result += positions[(begins >= first) & (begins < last)].tolist()
        ends = pivot.places.end(answer.turn), source.places.end(answer.turn)
        if whole and ends[0] in stored[0] and ends[1] in stored[1]:
            size += 1
            for end, result in zip(ends, chosen, strict=True):
                result.append(int(end or 0))
    return *chosen, size


def content_length(answer: Answer) -> int:
    """Bytes of content up to the end of the last piece."""
    start, stop, at = answer.pieces[-1]
    return at + stop - start
