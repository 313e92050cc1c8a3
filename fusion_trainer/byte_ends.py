"""The byte of a text at which each of its tokens ends, from the bytes that the tokens stand for.

A tokenizer's own offsets do not tell it: they count characters, claim a whole character for each of its pieces,
leave out white space or a combining mark. Here the tokens' bytes are laid along the text instead, piece by
piece between the added tokens. Where a tokenizer rewrites the text first (NFC, NFKC), they are laid along what
it makes of each cluster of characters; a byte of the rewriting has read the whole of the shortest part that can
be rewritten alone.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mark", "Rewriting", "lay_along"]

NEAR = 64
"""Characters on either side of a place that decide whether a cluster (a long run of blanks) is cut there."""
HANGUL_TAILS = range(0x1160, 0x1200)
"""Vowels and finals, which composition joins to the syllable before them."""


@dataclass(frozen=True)
class Rewriting:
    """What a tokenizer does to a text before it cuts it.

    Attributes:
        byte_level: Its tokens are bytes of the text; otherwise ``▁`` stands for a space.
        normalise: What more it does; None if nothing.
    """

    byte_level: bool
    normalise: Callable[[str], str] | None

    def plain(self, text: str) -> bytes:
        """The bytes of a text that needs no normalising."""
        return (text if self.byte_level else text.replace("▁", " ")).encode()

    def read(self, text: str) -> bytes:
        """The bytes that the tokens of ``text`` stand for, but for a space put before it."""
        return self.plain(self.normalise(text) if self.normalise else text)

    def parts(self, text: str) -> Iterator[tuple[bytes, bytes]]:
        """The smallest parts that are rewritten alone, as they are and as they are read."""
        apart = cache(self._apart)
        for cluster in _clusters(text) if self.normalise else text:
            places = range(1, len(cluster))
            cuts = [c for c in places if apart(cluster[max(0, c - NEAR) : c], cluster[c : c + NEAR])]
            for start, stop in zip([0, *cuts], [*cuts, len(cluster)], strict=True):
                yield cluster[start:stop].encode(), self.read(cluster[start:stop])

    def _apart(self, before: str, after: str) -> bool:
        return self.read(before) + self.read(after) == self.read(before + after)


@dataclass(frozen=True)
class Mark:
    """An added token: whether it takes the white space before it and after it."""

    lstrip: bool
    rstrip: bool

    def find(self, text: str, at: int, name: str) -> tuple[int, int]:
        """Where in ``text``, from ``at`` on, it begins and ends, white space included; −1 where it is not."""
        begin = text.find(name, at)
        end = begin + len(name)
        if begin < 0:
            return begin, end
        if self.lstrip:
            begin = at + len(text[at:begin].rstrip())
        if self.rstrip:
            end = len(text) - len(text[end:].lstrip())
        return begin, end


def lay_along(
    text: str, surfaces: Sequence[bytes], literal: Sequence[Mark | None], rewriting: Rewriting
) -> NDArray[np.int32] | None:
    """The ends of the tokens of a text.

    Args:
        text: The text.
        surfaces: For each token the bytes it stands for.
        literal: For an added token, which stands in the text as it is, what it takes with it; None for others.
        rewriting: What the tokenizer does to what lies between those.

    Returns:
        int32 [tokens], bytes; None if the tokens' bytes do not make up the text.
    """
    ends = np.zeros(len(surfaces), np.int32)
    at = first = base = 0  # in characters, in tokens, in bytes
    for stop in [*(n for n, mark in enumerate(literal) if mark), len(surfaces)]:
        mark = literal[stop] if stop < len(surfaces) else None
        begin, after = mark.find(text, at, surfaces[stop].decode()) if mark else (len(text), len(text))
        if begin < 0:
            return None
        piece = text[at:begin]
        found = _lay_along_piece(piece, surfaces[first:stop], rewriting)
        if found is None:
            return None
        ends[first:stop] = base + found
        base += len(text[at:after].encode())
        if mark is not None:
            ends[stop] = base
            at, first = after, stop + 1
    return ends


def _lay_along_piece(piece: str, surfaces: Sequence[bytes], rewriting: Rewriting) -> NDArray[np.int32] | None:
    joined = b"".join(surfaces)
    sizes = np.array([len(surface) for surface in surfaces], np.int32)
    plain = rewriting.plain(piece)
    extra = len(joined) - len(plain)
    if joined == plain or joined == b" " + plain:  # a space before the text is the tokenizer's own
        bounds = np.arange(len(plain) + 1, dtype=np.int32) if len(plain) == len(piece.encode()) else None
        if bounds is not None:
            return bounds[np.maximum(np.cumsum(sizes, dtype=np.int32) - extra, 0)]
    bounds_of_read, parts, done = [0], list[bytes](), 0
    for old, new in rewriting.parts(piece):
        same = len(new) == len(old) and new == old
        bounds_of_read += [done + (place if same else len(old)) for place in range(1, len(new) + 1)]
        done += len(old)
        parts.append(new)
    read = b"".join(parts)
    extra = len(joined) - len(read)
    if joined not in (read, b" " + read):
        return None
    return np.array(bounds_of_read, np.int32)[np.maximum(np.cumsum(sizes, dtype=np.int32) - extra, 0)]


def _clusters(text: str) -> Iterator[str]:
    """Characters with what composition joins to them: marks, Hangul's tails, and white space with white space."""
    cluster = ""
    for char in text:
        if cluster and not _joins(cluster[-1], char):
            yield cluster
            cluster = ""
        cluster += char
    if cluster:
        yield cluster


def _joins(before: str, char: str) -> bool:
    if unicodedata.category(char)[0] == "M" or ord(char) in HANGUL_TAILS:
        return True
    return before.isspace() and unicodedata.normalize("NFKD", char)[0].isspace()
