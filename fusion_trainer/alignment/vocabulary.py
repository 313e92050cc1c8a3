"""Vocabulary maps: which ids of the pivot an id of the source stands for, as sparse source × pivot matrices.

| method | the image of an id |
|---|---|
| ``exact`` | the pivot's token of the same bytes, if there is one (EM) |
| ``min_edit_distance`` | exact if it exists, else the nearest token by edit distance (MinED, FuseLLM) |
| ``co_occurrence`` | the same, but of equally near tokens the one with the most similar neighbours (FuseLLM) |
| ``statistics`` | the tokens it was paired with over the corpus (MS, as in FuseChat's paper) |
| ``statistics_published`` | the same, as FuseChat's release does it |
| ``prefix`` | the first token the pivot reads its text as: what the pivot has to predict next |

Each row sums to 1 or is empty. Tokens are compared by the bytes they stand for, so "▁the", "Ġthe" and " the" are
the same.

This holds for tokens of text. All methods map a special token by its function (it begins a text, ends a turn, or
pads) or not at all, and no text maps to a special token. Other added tokens (``<think>``, ``[multimodal]``) map to
the same bytes or not at all, unless they are plain white space, which is text.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.sparse import csr_array

from fusion_trainer.text.tokenizer import TextTokenizer, Tokens

__all__ = [
    "METHODS",
    "Ends",
    "FirstTokens",
    "Method",
    "Vocabularies",
    "VocabularyMap",
    "exact",
    "identical",
    "min_edit_distance",
    "nearest",
    "prefix",
    "statistics",
    "statistics_published",
]

Method = Literal["exact", "min_edit_distance", "co_occurrence", "statistics", "statistics_published", "prefix"]
METHODS: tuple[Method, ...] = get_args(Method)

RULES = 3
"""Version of the methods: raised whenever a method changes, so that a map of older rules is not reused."""
CONTEXTS = ("\n", "a", " ", ".", "0", "(")
"""Texts after which a token's text is read, until one is found that the tokenizer does not join with it."""
CELLS_AT_ONCE = 1 << 24
"""Edit distances computed at once, 2 bytes each."""
Images = dict[int, int]
"""An id of the pivot for some ids of the source."""
Mixtures = Mapping[int, Mapping[int, float]]
"""Ids of the pivot, with weights that sum to 1, for some ids of the source."""


@dataclass(frozen=True)
class Ends:
    """The source's ids that end a turn (if empty, its EOS), and the pivot's id for them all (if None, its EOS)."""

    source: tuple[int, ...] = ()
    pivot: int | None = None


@dataclass(frozen=True)
class VocabularyMap:
    """float32 [source ids, pivot ids], each row sums to 1 or is empty; and the method that made the map."""

    matrix: csr_array
    method: str

    @property
    def mapped(self) -> NDArray[np.bool_]:
        """bool [source ids]: which ids have an image."""
        return np.asarray(np.diff(self.matrix.indptr) > 0)


class Vocabularies:
    """The ids of a source's and the pivot's tokenizer, by what they stand for.

    Attributes:
        text: The source's ids of text.
        marks: Its added tokens that are neither text nor special.
        pivot_text: The pivot's ids of text.
        pivot_marks: Its added tokens that are neither text nor special.
        ends: For each id that ends a turn of the source, the pivot's end of a turn.
        functions: The images of all special tokens that have one.
    """

    def __init__(self, source: TextTokenizer, pivot: TextTokenizer, ends: Ends | None = None) -> None:
        self.source, self.pivot = source, pivot
        ours, theirs, ends = source.tokenizer, pivot.tokenizer, ends or Ends()
        closing = {token for token in ends.source or (ours.eos_token_id,) if token in source.surfaces}
        end = theirs.eos_token_id if ends.pivot is None else ends.pivot
        self.text, self.marks = _text_and_marks(source, closing)
        self.pivot_text, self.pivot_marks = _text_and_marks(pivot, {end})
        self.ends: Images = {} if end is None else dict.fromkeys(closing, end)
        named = ((ours.pad_token_id, theirs.pad_token_id), (ours.bos_token_id, theirs.bos_token_id))
        unnamed = {None, *closing}
        others = {token: image for token, image in named if token not in unnamed and image not in (None, end)}
        self.functions: Images = others | self.ends

    def same(self, tokens: Iterable[int]) -> Images:
        """The images with the same bytes."""
        known = _by_surface(self.pivot, self.pivot_text | self.pivot_marks)
        surfaces = self.source.surfaces
        return {token: known[surfaces[token]] for token in tokens if surfaces[token] in known}

    def map(self, images: Images, method: str, mixtures: Mixtures | None = None) -> VocabularyMap:
        """The map with one image for each id in ``images``, and weighted images for the ids in ``mixtures``."""
        rows = {token: {image: 1.0} for token, image in images.items()} | dict(mixtures or {})
        entries = [(token, image, share) for token in sorted(rows) for image, share in rows[token].items()]
        sources, pivots, weights = zip(*entries, strict=True) if entries else ((), (), ())
        places = np.array(sources, np.int64), np.array(pivots, np.int64)
        shape = max(self.source.surfaces) + 1, max(self.pivot.surfaces) + 1
        return VocabularyMap(csr_array((np.array(weights, np.float32), places), shape=shape), method)


def _text_and_marks(tokenizer: TextTokenizer, closing: set[int]) -> tuple[frozenset[int], frozenset[int]]:
    special = tokenizer.special | closing
    marks = tokenizer.marks.keys() - special
    return frozenset(tokenizer.surfaces.keys() - special - marks), frozenset(marks)


def _by_surface(tokenizer: TextTokenizer, tokens: Iterable[int]) -> dict[bytes, int]:
    """Bytes → id. Of ids with the same bytes the lowest is taken, a fallback for single bytes only last."""
    fallback = tokenizer.byte_fallback
    order = sorted(tokens, key=lambda token: (token in fallback, token), reverse=True)
    return {tokenizer.surfaces[token]: token for token in order if tokenizer.surfaces[token]}


def identical(both: Vocabularies) -> VocabularyMap | None:
    """The map of two tokenizers that have the same tokens of text; None if they differ.

    Every id maps to itself, except that the source's ends of turns map to the pivot's. Added tokens may differ:
    those that both have map by name, the others have no image.
    """
    source, pivot = both.source, both.pivot
    ours, theirs = source.surfaces, pivot.surfaces
    base = {token: surface for token, surface in ours.items() if token not in source.added}
    if not base or base != {token: surface for token, surface in theirs.items() if token not in pivot.added}:
        return None
    equal = (token for token in theirs if ours.get(token) == theirs[token])
    named = {theirs[token]: token for token in (*pivot.added, *equal)}
    added = {token: named[ours[token]] for token in source.added if ours[token] in named}
    return both.map({token: token for token in base} | added | both.ends, "identical")


def exact(both: Vocabularies) -> VocabularyMap:
    """EM: the same bytes."""
    return both.map(both.same(both.text | both.marks) | both.functions, "exact")


def min_edit_distance(both: Vocabularies, frequency: Mapping[int, int] | None = None) -> VocabularyMap:
    """MinED: the same bytes, else the pivot's token with the least edit distance in characters.

    If several tokens are equally near, the one that is most frequent in the corpus is taken (``frequency`` counts
    the pivot's ids), then the one with the lowest id.
    """
    images = both.same(both.text | both.marks)
    images |= {token: tied[0] for token, tied in nearest(both, frequency)}
    return both.map(images | both.functions, "min_edit_distance")


def nearest(both: Vocabularies, frequency: Mapping[int, int] | None = None) -> Iterator[tuple[int, list[int]]]:
    """For each of the source's ids of text without an equal: the pivot's ids with the least edit distance.

    The first one is the most frequent in the corpus; of equally frequent ones it is the lowest.
    """
    counts = frequency or {}
    candidates: dict[str, list[int]] = {}
    for token in sorted(both.pivot_text, key=lambda token: (-counts.get(token, 0), token)):
        candidates.setdefault(both.pivot.words[token], []).append(token)
    tokens: dict[str, list[int]] = {}
    for token in both.text - both.same(both.text).keys():
        tokens.setdefault(both.source.words[token], []).append(token)
    words, others, spelt = list(tokens), list(candidates), list(candidates.values())
    rows = max(1, CELLS_AT_ONCE // max(1, len(others)))
    for start in range(0, len(words) if others else 0, rows):
        some = words[start : start + rows]
        distances = cdist(some, others, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        for word, row, least in zip(some, distances, distances.min(1), strict=True):
            tied = [token for place in np.flatnonzero(row == least).tolist() for token in spelt[place]]
            yield from ((token, tied) for token in tokens[word])


def statistics(both: Vocabularies, counts: csr_array, most: int = 0) -> VocabularyMap:
    """MS: what an id was paired with over the corpus (FuseChat, arXiv 2408.07990, token alignment by statistics).

    Args:
        both: The two vocabularies.
        counts: int64 [source ids, pivot ids], how often the alignment paired them.
        most: Images kept per id, weighted by their counts. 0: one image, the pair with the least edit distance
            divided by its count; of equal ones the more frequent, then the lower id.
    """
    mixtures: dict[int, dict[int, float]] = {}
    for token, paired, seen in _paired(both, counts):
        order = np.lexsort((paired, -seen))
        if most:
            order = order[:most]
        else:
            word = both.source.words[token]
            distances = [Levenshtein.distance(word, both.pivot.words[image]) for image in paired[order].tolist()]
            order = order[[int(np.argmin(np.array(distances) / seen[order]))]]
        weights = seen[order] / seen[order].sum()
        mixtures[token] = dict(zip(paired[order].tolist(), weights.tolist(), strict=True))
    return both.map(both.same(both.marks) | both.functions, "statistics", mixtures)


def statistics_published(both: Vocabularies, counts: csr_array) -> VocabularyMap:
    """MS as FuseChat's release of August 2024 computes it, for comparison.

    The pivot's token of the same bytes if there is one, whether they were paired or not. Else, of the tokens it
    was paired with, the one with the least distance × σ(count); of equal ones the lowest id. The distance is the
    edit distance of the tokens without spaces, a tenth of it if one contains the other. σ(1) = 0.73 and σ(5) =
    0.99, so a pair seen once counts as *nearer* than one seen often.
    """
    images = both.same(both.text | both.marks)
    for token, paired, seen in _paired(both, counts):
        if token not in images:
            word = both.source.words[token]
            others = [both.pivot.words[image] for image in paired.tolist()]
            weights = [0.1 if word in other or other in word else 1.0 for other in others]
            distances = [Levenshtein.distance(word, other) for other in others]
            images[token] = int(paired[np.argmin(np.array(distances) * weights / (1 + np.exp(-seen)))])
    return both.map(images | both.functions, "statistics_published")


def _paired(both: Vocabularies, counts: csr_array) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.float64]]]:
    """For each of the source's ids of text: the ids it was paired with and may map to, and how often."""
    counts = csr_array(counts, dtype=np.float64)
    counts.sort_indices()
    for token in np.flatnonzero(np.diff(counts.indptr)).tolist():
        if token not in both.text:
            continue
        here = slice(counts.indptr[token], counts.indptr[token + 1])
        paired, seen = counts.indices[here], counts.data[here]
        same = both.source.surfaces[token]
        fits = [
            image in both.pivot_text or (image in both.pivot_marks and both.pivot.surfaces[image] == same)
            for image in paired.tolist()
        ]
        if any(fits):
            yield token, paired[fits], seen[fits]


def prefix(both: Vocabularies) -> VocabularyMap:
    """The first token that the pivot reads an id's text as, within a text.

    The pivot's token of the same bytes is the image only if the pivot reads it so in one of ``CONTEXTS``: a
    tokenizer that takes digits one by one never predicts "12", even if it has that token. A text that the pivot
    always joins with what precedes it, or that is not made of whole characters, maps to the pivot's longest token
    that it begins with.
    """
    images = both.same(both.marks) | _first_tokens(both)
    by_surface = _by_surface(both.pivot, both.pivot_text)
    for token in both.text - images.keys():
        if (image := _longest_head(both.source.surfaces[token], by_surface)) is not None:
            images[token] = image
    return both.map(images | both.functions, "prefix")


def _longest_head(text: bytes, by_surface: Mapping[bytes, int]) -> int | None:
    """The longest token that a text begins with."""
    heads = (text[:size] for size in range(len(text), 0, -1))
    return next((by_surface[head] for head in heads if head in by_surface), None)


def _first_tokens(both: Vocabularies) -> Images:
    """For the source's ids of text, the first token that the pivot reads their text as.

    That is the token of the same bytes if any context gives it, else the first context's. A text that the pivot
    reads as a special token has no image here.
    """
    same = both.same(both.text)
    images: Images = {}
    texts = {}
    for token in sorted(both.text):
        with suppress(UnicodeDecodeError):
            if text := both.source.surfaces[token].decode():
                texts[token] = text
    for context in CONTEXTS:
        tokenised = both.pivot.encode([context + text for text in texts.values()])
        for token, tokens in zip(list(texts), tokenised, strict=True):
            first = _token_after(tokens, len(context.encode()))
            if first is None:
                continue
            if first == same.get(token):
                images[token] = first
                del texts[token]
            elif first in both.pivot_text:
                images.setdefault(token, first)
                if token not in same:
                    del texts[token]
    return images


def _token_after(tokens: Tokens, size: int) -> int | None:
    """The token that begins after ``size`` bytes; None if a token crosses that byte."""
    cut = np.flatnonzero(tokens.ends == size)
    if len(cut) and cut[-1] + 1 < len(tokens) and tokens.ends[cut[-1] + 1] > size:
        return int(tokens.ids[cut[-1] + 1])
    return None


class FirstTokens:
    """The pivot's first ``token`` of any text, as in ``prefix``; each text is read once."""

    def __init__(self, both: Vocabularies) -> None:
        self.pivot, self.source_text, self._text = both.pivot, both.text, both.pivot_text
        self._by_surface = _by_surface(both.pivot, both.pivot_text)
        self.token = cache(self._read)

    def _read(self, text: bytes) -> int | None:
        same, first_read = self._by_surface.get(text), None
        with suppress(UnicodeDecodeError):
            for context in CONTEXTS:
                (tokens,) = self.pivot.encode([context + text.decode()])
                first = _token_after(tokens, len(context.encode()))
                if first is not None and first == same:
                    return first
                if first_read is None and first in self._text:
                    first_read = first
        return _longest_head(text, self._by_surface) if first_read is None else first_read
