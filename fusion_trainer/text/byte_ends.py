"""The byte of a text at which each of its tokens ends, from the bytes that the tokens stand for.

A tokenizer's own offsets do not say this: they count characters, claim a whole character for each of its pieces,
and leave out white space or a combining mark. Here the tokens' bytes are laid along the text instead, piece by
piece between the added tokens. If a tokenizer rewrites the text first (NFC, NFKC), they are laid along its version
of the shortest parts of the text that can be rewritten alone.

Within a rewritten part no token has read up to any byte of the text; the token that finishes the part has read all
of it. A token that ends inside the part therefore gets the end of the next token that ends between two parts: of
tokens with the same end only the last has read up to there.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

__all__ = ["Rewriting", "lay_along"]

NEAR = 64
"""Characters on either side of a place that decide whether a text is cut there."""
UNREAD = -1
"""The end of a token inside a rewritten part, until the end of the next token outside is known."""


@dataclass(frozen=True)
class Rewriting:
    """The changes that a tokenizer makes to a text before it cuts it into tokens.

    Attributes:
        byte_level: Whether its tokens are bytes of the text; otherwise ``▁`` stands for a space.
        normalise: Its normaliser, if that does more than write spaces as ``▁``.
        lacking: The bytes that it has no token for and skips. Its own offsets do not count them.
    """

    byte_level: bool
    normalise: Callable[[str], str] | None
    lacking: bytes = b""

    def plain(self, text: str) -> bytes:
        """The bytes of a text that needs no normalising."""
        return (text if self.byte_level else text.replace("▁", " ")).encode().translate(None, self.lacking)

    def read(self, text: str) -> bytes:
        """The bytes that the tokens of ``text`` stand for, except for a space put before it."""
        return self.plain(self.normalise(text) if self.normalise else text)

    def parts(self, text: str) -> Iterator[list[str]]:
        """The smallest parts that are rewritten alone, in two versions.

        The first is fast: it looks at neighbours only. The second looks at ``NEAR`` characters on either side.
        """
        if not self.normalise:
            yield list(text)
            return
        yield [part for cluster in self._clusters(text) for part in self._cut(cluster)]
        yield self._cut(text)

    def finished(self, text: str, ends: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ends that are only known to the character, without those inside a rewritten part."""
        if not self.normalise:
            return ends
        starts = [0, *accumulate(len(char.encode()) for char in text)]
        place_of = {start: place for place, start in enumerate(starts)}
        inside = [end in place_of and not self._parts_at(text, place_of[end]) for end in ends.tolist()]
        known = np.where(inside, UNREAD, ends).astype(np.int32)
        known[-1] = starts[-1] if inside[-1] else ends[-1]
        return _after_the_part(known)

    def _clusters(self, text: str) -> Iterator[str]:
        """Characters with those that may not be rewritten apart from their left neighbour."""
        start = 0
        for place in range(1, len(text)):
            before, char = text[place - 1], text[place]
            if not _joins(before, char) and _apart(self, before, char):
                yield text[start:place]
                start = place
        if text:
            yield text[start:]

    def _cut(self, text: str) -> list[str]:
        cuts = [place for place in range(1, len(text)) if self._parts_at(text, place)]
        return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _parts_at(self, text: str, place: int) -> bool:
        return _apart(self, text[max(0, place - NEAR) : place], text[place : place + NEAR])


@lru_cache(maxsize=1 << 15)
def _apart(rewriting: Rewriting, before: str, after: str) -> bool:
    return rewriting.read(before) + rewriting.read(after) == rewriting.read(before + after)


def lay_along(
    text: str, surfaces: Sequence[bytes], marks: Sequence[AddedToken | None], rewriting: Rewriting
) -> NDArray[np.int32] | None:
    """The ends of the tokens of a text.

    Args:
        text: The text.
        surfaces: For each token the bytes it stands for.
        marks: For each token that is in the text under its own name, the added token; None for others.
        rewriting: What the tokenizer does to the text between those.

    Returns:
        int32 [tokens], bytes; None if the tokens' bytes do not make up the text.
    """
    ends = np.zeros(len(surfaces), np.int32)
    at = first = base = 0  # in characters, in tokens, in bytes
    for stop in [*(number for number, mark in enumerate(marks) if mark), len(surfaces)]:
        mark = marks[stop] if stop < len(surfaces) else None
        begin, after = _find(mark, text, at) if mark else (len(text), len(text))
        if begin < 0:
            return None
        inside = _lay_along_piece(text[at:begin], surfaces[first:stop], rewriting)
        if inside is None:
            return None
        ends[first:stop] = base + inside
        base += len(text[at:after].encode())
        if mark:
            ends[stop] = base
            at, first = after, stop + 1
    return ends


def _find(mark: AddedToken, text: str, at: int) -> tuple[int, int]:
    """Where in ``text``, from ``at`` on, a token is, with the white space that it takes; −1 if it is not there."""
    begin = text.find(mark.content, at)
    end = begin + len(mark.content)
    if mark.lstrip and begin >= 0:
        begin = at + len(text[at:begin].rstrip())
    if mark.rstrip:
        end = len(text) - len(text[end:].lstrip())
    return begin, end


def _lay_along_piece(piece: str, surfaces: Sequence[bytes], rewriting: Rewriting) -> NDArray[np.int32] | None:
    joined, raw = b"".join(surfaces), piece.encode()
    stops = np.cumsum([len(surface) for surface in surfaces], dtype=np.int32)
    if len(raw) == len(rewriting.plain(piece)):
        put = _put_before(joined, rewriting.plain(piece))
        if put is not None:
            return np.maximum(stops - put, 0, dtype=np.int32)
    for parts in rewriting.parts(piece):
        bounds, read, done = [0], list[bytes](), 0
        for part in parts:
            old, new = part.encode(), rewriting.read(part)
            inside = range(done + 1, done + len(new)) if new == old else [UNREAD] * (len(new) - 1)
            done += len(old)
            bounds += [*inside, done] if new else []
            read.append(new)
        put = _put_before(joined, b"".join(read))
        if put is not None:
            return _after_the_part(np.array(bounds, np.int32)[np.maximum(stops - put, 0)])
    return None


def _put_before(joined: bytes, read: bytes) -> int | None:
    """How many bytes (none, or one space) the tokens have before ``read``; None if they stand for other bytes."""
    return len(joined) - len(read) if joined in (read, b" " + read) else None


def _after_the_part(ends: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ends with the next known end in place of each ``UNREAD``; the last is known."""
    places = np.where(ends == UNREAD, len(ends) - 1, np.arange(len(ends)))
    following: NDArray[np.int32] = ends[np.minimum.accumulate(places[::-1])[::-1]]
    return following


def _joins(before: str, char: str) -> bool:
    """Whether composition may join a character to what precedes it, in ways that two characters do not show."""
    first = unicodedata.normalize("NFKD", char)[0]
    return unicodedata.category(first)[0] == "M" or (before.isspace() and first.isspace())
