"""The answers in a text: where they are, and which byte of which answer a position predicts.

Every model reads a conversation in its own template. The texts differ; only the contents of the answers are the
same bytes in all of them. A position is therefore named by what it predicts: byte c of answer a, or the end of
answer a. Positions of two models correspond if their names are equal: then both have read the same bytes of the
same answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.text.tokenizer import Span, Tokens

__all__ = ["END", "Answer", "Piece", "Places", "comparable_spans", "places", "supervised_spans", "whole_text"]

END = -2
"""The place of a position that predicts the end of an answer."""
NOWHERE = -1
Piece = tuple[int, int, int]
"""First byte in the text, the one after the last, and the byte of the content that the piece begins with."""


@dataclass(frozen=True)
class Answer:
    """One answer in a text; all numbers are bytes of the text's UTF-8.

    Attributes:
        turn: Which message of the conversation it is.
        open: Where the assistant begins to write: after the generation prompt. Text between this and the content
            (a tag that opens the reasoning) is learnt, but not compared with other models.
        pieces: Where the content is, in order. There are several if the template puts something between.
        mark: Where the marker of the answer's end begins, white space before it excluded.
        end: Where that marker ends; ``mark`` if there is none.
        closed: Whether the marker follows the whole content. Otherwise no other model's end corresponds to it.
    """

    turn: int
    open: int
    pieces: tuple[Piece, ...]
    mark: int
    end: int
    closed: bool = True

    def cut(self, size: int) -> "Answer":
        """The same answer in a text that was cut after ``size`` bytes."""
        if self.end <= size:
            return self
        pieces = tuple((start, min(stop, size), at) for start, stop, at in self.pieces if start < size)
        return replace(self, pieces=pieces, mark=min(self.mark, size), end=size, closed=False)

    def moved(self, place: Callable[[int], int]) -> "Answer":
        """The same answer in another text, in which ``place`` gives the new place of each byte."""
        pieces = tuple((place(start), place(stop), at) for start, stop, at in self.pieces)
        return replace(self, open=place(self.open), pieces=pieces, mark=place(self.mark), end=place(self.end))


def whole_text(size: int) -> Answer:
    """A text of ``size`` bytes, all of which is learnt."""
    return Answer(0, 0, ((0, size, 0),), size, size, closed=False)


def supervised_spans(answers: Sequence[Answer]) -> tuple[Span, ...]:
    """The bytes that a model learns to write: each answer from its opening to its end."""
    return tuple((answer.open, answer.end) for answer in answers)


def comparable_spans(answers: Sequence[Answer]) -> tuple[Span, ...]:
    """The bytes that a model is queried for: each answer's content, and its end where that can be compared."""
    compared = [answer for answer in answers if answer.pieces]
    return tuple((each.pieces[0][0], each.end if each.closed else each.pieces[-1][1]) for each in compared)


@dataclass(frozen=True)
class Places:
    """The prediction target of each position of a tokenised text.

    Attributes:
        turn: int32 [positions], the answer's turn; −1 if the next token belongs to no answer.
        begins: int32 [positions], the byte of the answer's content at which the next token begins; ``END`` if
            the next token is the whole marker of the answer's end; −1 for none.
        place: The same, but −1 for positions that have not read up to there: of tokens with the same end only the
            last has.
        lead: Positions whose next token begins before the content → the bytes before the content in that token.
    """

    turn: NDArray[np.int32]
    begins: NDArray[np.int32]
    place: NDArray[np.int32]
    lead: dict[int, bytes] = field(default_factory=dict)

    def content(self, turn: int) -> NDArray[np.intp]:
        """The positions that predict content of an answer, ascending."""
        return np.flatnonzero((self.turn == turn) & (self.place >= 0))

    def end(self, turn: int) -> int | None:
        """The position that predicts the answer's end."""
        ends = np.flatnonzero((self.turn == turn) & (self.place == END))
        return int(ends[0]) if len(ends) else None


def places(tokens: Tokens, text: bytes, answers: Sequence[Answer]) -> Places:
    """Name the positions of a tokenised text.

    Args:
        tokens: The text's.
        text: Its UTF-8.
        answers: Where its answers are.
    """
    before, after = tokens.ends[:-1], tokens.ends[1:]
    turn, begins = np.full(len(before), NOWHERE, np.int32), np.full(len(before), NOWHERE, np.int32)
    lead: dict[int, bytes] = {}
    for answer in answers:
        for number, (start, stop, done) in enumerate(answer.pieces):
            first, last = np.searchsorted(before, [start, stop])
            here = slice(int(first), int(last))
            turn[here], begins[here] = answer.turn, before[here] - start + done
            if number == 0 and first > 0 and before[first - 1] < start < after[first - 1]:
                turn[first - 1], begins[first - 1] = answer.turn, done
                lead[int(first) - 1] = text[before[first - 1] : start]
        if answer.closed and answer.pieces and answer.mark < answer.end:
            ending = int(np.searchsorted(after, answer.mark, side="right"))
            if ending < len(after) and after[ending] == answer.end and before[ending] >= answer.pieces[-1][1]:
                turn[ending], begins[ending] = answer.turn, END
    return Places(turn, begins, np.where(before == after, NOWHERE, begins).astype(np.int32), lead)
