"""Which ids of the pivot an id of the source stands for: sparse source × pivot matrices.

| method | an id's image |
|---|---|
| ``exact`` | the pivot's token of the same bytes, if there is one (EM) |
| ``min_edit_distance`` | exact where it exists, else the nearest token by edit distance (MinED, FuseLLM) |
| ``statistics`` | the tokens it was paired with over the corpus (MS, FuseChat) |
| ``prefix`` | the first token the pivot reads its text as: what the pivot has to predict next |

Each row sums to 1 or is empty. Tokens are compared by the bytes they stand for, so that "▁the", "Ġthe" and " the"
are one; mass that two ids send to one is added when a map is applied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.sparse import csr_array

from fusion_trainer.tokens import TextTokenizer, Tokens

__all__ = ["METHODS", "Method", "VocabularyMap", "exact", "identical", "min_edit_distance", "prefix", "statistics"]

Method = Literal["exact", "min_edit_distance", "statistics", "prefix"]
METHODS: tuple[Method, ...] = get_args(Method)

RULES = 2
"""Raised with every change of what a method maps, so that no older map is taken for a new one."""
CONTEXTS = ("\n", "a", " ", ".", "0", "(")
"""Texts after which a token's text is read, until one is found that it does not join."""
CELLS_AT_ONCE = 1 << 24
"""Of edit distances, 2 bytes each."""


@dataclass(frozen=True)
class VocabularyMap:
    """A map of ids.

    Attributes:
        matrix: float32 [source ids, pivot ids], rows sum to 1 or are empty.
        method: How it was made.
    """

    matrix: csr_array
    method: str

    @property
    def mapped(self) -> NDArray[np.bool_]:
        """bool [source ids]: which have an image."""
        filled: NDArray[np.bool_] = np.diff(self.matrix.indptr) > 0
        return filled


def identical(source: TextTokenizer, pivot: TextTokenizer) -> VocabularyMap | None:
    """The map of two tokenizers that agree in every id both have; None if they do not.

    Added tokens do not matter: those that both have are mapped by name, the others have no image.
    """
    ours, theirs = source.surfaces, pivot.surfaces
    base = {token: surface for token, surface in ours.items() if token not in source.added}
    if not base or base != {token: surface for token, surface in theirs.items() if token not in pivot.added}:
        return None
    named = {theirs[token]: token for token in pivot.added}
    images = {token: named[ours[token]] for token in source.added if ours[token] in named}
    return _one_to_one({**{token: token for token in base}, **images}, source, pivot, "identical")


def exact(source: TextTokenizer, pivot: TextTokenizer) -> VocabularyMap:
    """EM: the same bytes."""
    return _one_to_one(_exact(source, pivot), source, pivot, "exact")


def min_edit_distance(
    source: TextTokenizer, pivot: TextTokenizer, frequency: Mapping[int, int] | None = None
) -> VocabularyMap:
    """MinED: the same bytes, else the pivot's token with the least edit distance in characters.

    Args:
        source: The source's tokenizer.
        pivot: The pivot's.
        frequency: How often the corpus has each id of the pivot. Of equally near tokens the more frequent wins,
            then the one with the lower id.
    """
    images = _exact(source, pivot)
    words = pivot.words
    counts = frequency or {}
    order = sorted(words, key=lambda token: (-counts.get(token, 0), token))  # the first of equals wins
    rest = {token: word for token, word in source.words.items() if token not in images}
    images |= _nearest(rest, [words[token] for token in order], order)
    return _one_to_one(images, source, pivot, "min_edit_distance")


def statistics(
    counts: csr_array, source: TextTokenizer, pivot: TextTokenizer, most: int = 0, name: str = "statistics"
) -> VocabularyMap:
    """MS: what an id was paired with over the corpus (FuseChat, arXiv 2408.07990, token alignment by statistics).

    Args:
        counts: int64 [source ids, pivot ids], how often the alignment paired them.
        source: The source's tokenizer.
        pivot: The pivot's.
        most: Keep so many images per id, weighted by their counts. 0: one image, the pair with the least
            edit distance divided by its count; of equals the more frequent, then the lower id.
        name: Of the method.
    """
    counts = csr_array(counts, dtype=np.float64)
    rows, columns, weights = [], [], []
    for token in np.flatnonzero(np.diff(counts.indptr)).tolist():
        here = slice(counts.indptr[token], counts.indptr[token + 1])
        images, seen = counts.indices[here], counts.data[here]
        order = np.lexsort((images, -seen))
        if most:
            order = order[:most]
        else:
            word = source.words.get(token, "")
            far = [Levenshtein.distance(word, pivot.words.get(int(image), "")) for image in images[order]]
            order = order[[int(np.argmin(np.array(far) / seen[order]))]]
        rows += [token] * len(order)
        columns += images[order].tolist()
        weights += (seen[order] / seen[order].sum()).tolist()
    return VocabularyMap(_matrix(rows, columns, weights, source, pivot), name)


def prefix(source: TextTokenizer, pivot: TextTokenizer) -> VocabularyMap:
    """The first token that the pivot reads an id's text as, within a text.

    The pivot's token of the same bytes is the image only if the pivot does read it so in one of ``CONTEXTS``: a
    tokenizer that takes digits one by one never predicts "12", though it may know it. Added tokens are mapped by
    name, a special one without its like has no image: it is no text. A text that the pivot always joins to what
    precedes it, or that is no whole characters, goes to the pivot's longest token that it begins with.
    """
    same = _exact(source, pivot)
    named = {token: image for token, image in same.items() if token in source.added}
    special = {token for token, mark in source.tokenizer.added_tokens_decoder.items() if mark.special}
    rest = [token for token in source.surfaces if token not in named and token not in special]
    read = _firsts({token: _text(source.surfaces[token]) for token in rest}, pivot, same)
    longest = _Prefixes(pivot)
    found = {token: longest.of(source.surfaces[token]) for token in rest if token not in read}
    images = {**named, **read, **{token: image for token, image in found.items() if image is not None}}
    return _one_to_one(images, source, pivot, "prefix")


def _firsts(texts: Mapping[int, str], pivot: TextTokenizer, same: Mapping[int, int]) -> dict[int, int]:
    """The first token the pivot reads each text as: its own (``same``) if any context gives it, else the first."""
    found: dict[int, int] = {}
    open_texts = {token: text for token, text in texts.items() if text}
    for context in CONTEXTS:
        read = pivot.encode([context + text for text in open_texts.values()])
        for token, tokens in zip(list(open_texts), read, strict=True):
            first = _after(tokens, len(context.encode()))
            if first is None:
                continue
            if first == same.get(token, first):
                found[token] = first
                del open_texts[token]
            else:
                found.setdefault(token, first)
    return {token: first for token, first in found.items() if first != pivot.tokenizer.unk_token_id}


def _after(tokens: Tokens, end: int) -> int | None:
    """The token of some bytes that begins at a byte; None where one goes across it."""
    cut = np.flatnonzero(tokens.ends == end)
    if len(cut) and cut[-1] + 1 < len(tokens) and tokens.ends[cut[-1] + 1] > end:
        return int(tokens.ids[cut[-1] + 1])
    return None


class _Prefixes:
    """The pivot's tokens by their bytes."""

    def __init__(self, pivot: TextTokenizer) -> None:
        self.ids = _by_surface(pivot)
        self.longest = max(map(len, self.ids), default=0)

    def of(self, surface: bytes) -> int | None:
        sizes = range(min(self.longest, len(surface)), 0, -1)
        return next((self.ids[surface[:size]] for size in sizes if surface[:size] in self.ids), None)


def _by_surface(tokenizer: TextTokenizer) -> dict[bytes, int]:
    """Of tokens with the same bytes a byte's fallback comes last, and else the lower id first."""
    fallback = tokenizer.byte_fallback
    order = sorted(tokenizer.surfaces, key=lambda token: (token in fallback, token), reverse=True)
    return {tokenizer.surfaces[token]: token for token in order if tokenizer.surfaces[token]}


def _exact(source: TextTokenizer, pivot: TextTokenizer) -> dict[int, int]:
    known = _by_surface(pivot)
    return {token: known[surface] for token, surface in source.surfaces.items() if surface in known}


def _nearest(words: Mapping[int, str], candidates: Sequence[str], ids: Sequence[int]) -> dict[int, int]:
    """For each word the id of the nearest candidate, the first of equals.

    A word and a candidate are at least as far apart as their lengths differ: the search goes outwards from a
    word's length, and stops where lengths alone are further than the best found.
    """
    by_length: dict[int, NDArray[np.intp]] = {}
    lengths = np.array([len(candidate) for candidate in candidates])
    for length in np.unique(lengths).tolist():
        by_length[length] = np.flatnonzero(lengths == length)
    nearest: dict[int, int] = {}
    own_lengths: dict[int, list[int]] = {}
    for token, word in words.items():
        own_lengths.setdefault(len(word), []).append(token)
    for length, tokens in own_lengths.items():
        best = np.full(len(tokens), np.iinfo(np.int64).max)  # distance · candidates + place: one number to compare
        for other in sorted(by_length, key=lambda other: abs(other - length)):
            open_rows = np.flatnonzero(best // len(candidates) >= abs(other - length))
            if not len(open_rows):
                break
            _improve(best, open_rows, [words[tokens[row]] for row in open_rows], candidates, by_length[other])
        nearest |= {token: ids[int(found % len(candidates))] for token, found in zip(tokens, best, strict=True)}
    return nearest


def _improve(
    best: NDArray[np.int64],
    rows: NDArray[np.intp],
    words: Sequence[str],
    candidates: Sequence[str],
    places: NDArray[np.intp],
) -> None:
    """Lower ``best[rows]`` to the nearest among the candidates at ``places``."""
    others = [candidates[place] for place in places]
    at_once = max(1, CELLS_AT_ONCE // len(others))
    for start in range(0, len(rows), at_once):
        here = rows[start : start + at_once]
        distances = cdist(
            words[start : start + at_once], others, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1
        )
        column = distances.argmin(1)
        found = distances[np.arange(len(here)), column].astype(np.int64) * len(candidates) + places[column]
        best[here] = np.minimum(best[here], found)


def _text(surface: bytes) -> str:
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return ""


def _one_to_one(
    images: Mapping[int, int], source: TextTokenizer, pivot: TextTokenizer, method: str
) -> VocabularyMap:
    rows = sorted(images)
    return VocabularyMap(_matrix(rows, [images[row] for row in rows], [1.0] * len(rows), source, pivot), method)


def _matrix(
    rows: Sequence[int],
    columns: Sequence[int],
    weights: Sequence[float],
    source: TextTokenizer,
    pivot: TextTokenizer,
) -> csr_array:
    shape = max(source.surfaces) + 1, max(pivot.surfaces) + 1
    return csr_array((np.array(weights, np.float32), (np.array(rows), np.array(columns))), shape=shape)
