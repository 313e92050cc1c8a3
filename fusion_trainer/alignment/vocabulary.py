"""Which ids of the pivot an id of the source stands for: sparse source × pivot matrices.

| method | an id's image |
|---|---|
| ``exact`` | the pivot's token of the same bytes, if there is one (EM) |
| ``min_edit_distance`` | exact where it exists, else the nearest token by edit distance (MinED, FuseLLM) |
| ``statistics`` | the tokens it was paired with over the corpus (MS, as FuseChat's paper has it) |
| ``statistics_published`` | the same as FuseChat's release does it |
| ``prefix`` | the first token the pivot reads its text as: what the pivot has to predict next |

Each row sums to 1 or is empty. Tokens are compared by the bytes they stand for, so that "▁the", "Ġthe" and " the"
are one; mass that two ids send to one is added when a map is applied.

That is for tokens of text. By every method a special token is mapped by its function (it begins a text, ends a
turn, pads) or has no image, and is the image of no text. Other added tokens (``<think>``, ``[multimodal]``) are
mapped by the same bytes alone, unless they are plain white space, which is text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    "Method",
    "VocabularyMap",
    "exact",
    "identical",
    "min_edit_distance",
    "prefix",
    "statistics",
    "statistics_published",
]

Method = Literal["exact", "min_edit_distance", "statistics", "statistics_published", "prefix"]
METHODS: tuple[Method, ...] = get_args(Method)

RULES = 3
"""Raised with every change of what a method maps, so that no older map is taken for a new one."""
CONTEXTS = ("\n", "a", " ", ".", "0", "(")
"""Texts after which a token's text is read, until one is found that it does not join."""
CELLS_AT_ONCE = 1 << 24
"""Of edit distances, 2 bytes each."""


@dataclass(frozen=True)
class Ends:
    """Ids that end a turn of the source, and the pivot's one that they stand for.

    Attributes:
        source: The source's; its EOS if empty.
        pivot: The pivot's; its EOS if None.
    """

    source: tuple[int, ...] = ()
    pivot: int | None = None


DEFAULT_ENDS = Ends()


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


def identical(source: TextTokenizer, pivot: TextTokenizer, ends: Ends = DEFAULT_ENDS) -> VocabularyMap | None:
    """The map of two tokenizers that agree in every id both have; None if they do not.

    Every id is mapped to itself, but the source's ends of turns to the pivot's. Added tokens do not matter: those
    that both have are mapped by name, the others have no image.
    """
    ours, theirs = source.surfaces, pivot.surfaces
    base = {token: surface for token, surface in ours.items() if token not in source.added}
    if not base or base != {token: surface for token, surface in theirs.items() if token not in pivot.added}:
        return None
    named = {theirs[token]: token for token in pivot.added} | {
        theirs[token]: token for token in theirs if ours.get(token) == theirs[token]
    }
    images = {token: named[ours[token]] for token in source.added if ours[token] in named}
    kinds = _Kinds.of(source, pivot, ends)
    images = {**{token: token for token in base}, **images, **kinds.ends}
    return _one_to_one(images, source, pivot, "identical")


def exact(source: TextTokenizer, pivot: TextTokenizer, ends: Ends = DEFAULT_ENDS) -> VocabularyMap:
    """EM: the same bytes."""
    kinds = _Kinds.of(source, pivot, ends)
    return _one_to_one(_exact(kinds) | kinds.functions, source, pivot, "exact")


def min_edit_distance(
    source: TextTokenizer,
    pivot: TextTokenizer,
    frequency: Mapping[int, int] | None = None,
    ends: Ends = DEFAULT_ENDS,
) -> VocabularyMap:
    """MinED: the same bytes, else the pivot's token with the least edit distance in characters.

    Args:
        source: The source's tokenizer.
        pivot: The pivot's.
        frequency: How often the corpus has each id of the pivot. Of equally near tokens the more frequent wins,
            then the one with the lower id.
        ends: What ends a turn.
    """
    kinds = _Kinds.of(source, pivot, ends)
    images = _exact(kinds)
    words = pivot.words
    counts = frequency or {}
    order = sorted(kinds.pivot_text, key=lambda token: (-counts.get(token, 0), token))  # the first of equals wins
    rest = {token: source.words[token] for token in sorted(kinds.text) if token not in images}
    images |= _nearest(rest, [words[token] for token in order], order)
    return _one_to_one(images | kinds.functions, source, pivot, "min_edit_distance")


def statistics(
    counts: csr_array,
    source: TextTokenizer,
    pivot: TextTokenizer,
    most: int = 0,
    name: str = "statistics",
    ends: Ends = DEFAULT_ENDS,
) -> VocabularyMap:
    """MS: what an id was paired with over the corpus (FuseChat, arXiv 2408.07990, token alignment by statistics).

    Args:
        counts: int64 [source ids, pivot ids], how often the alignment paired them.
        source: The source's tokenizer.
        pivot: The pivot's.
        most: Keep so many images per id, weighted by their counts. 0: one image, the pair with the least
            edit distance divided by its count; of equals the more frequent, then the lower id.
        name: Of the method.
        ends: What ends a turn.
    """
    kinds = _Kinds.of(source, pivot, ends)
    images = _exact(kinds, kinds.marks) | kinds.functions
    rows: dict[int, dict[int, float]] = {token: {image: 1.0} for token, image in images.items()}
    for token, paired, seen in _paired(counts, kinds):
        order = np.lexsort((paired, -seen))
        if most:
            order = order[:most]
        else:
            word = source.words[token]
            far = [Levenshtein.distance(word, pivot.words[image]) for image in paired[order].tolist()]
            order = order[[int(np.argmin(np.array(far) / seen[order]))]]
        weights = seen[order] / seen[order].sum()
        rows[token] = dict(zip(paired[order].tolist(), weights.tolist(), strict=True))
    return _mixed(rows, source, pivot, name)


def statistics_published(
    counts: csr_array, source: TextTokenizer, pivot: TextTokenizer, ends: Ends = DEFAULT_ENDS
) -> VocabularyMap:
    """MS as FuseChat's release of August 2024 computes it, kept for comparison.

    The pivot's token of the same bytes where there is one, paired or not. Else of the tokens it was paired with
    the one of least distance × σ(count), the lower id of equals; the distance is the edit distance of the tokens
    without spaces, a tenth of it where one contains the other. σ(1) = 0.73 and σ(5) = 0.99: a pair seen once
    counts as *nearer* than one seen often.

    Args:
        counts: int64 [source ids, pivot ids], how often the alignment paired them.
        source: The source's tokenizer.
        pivot: The pivot's.
        ends: What ends a turn.
    """
    kinds = _Kinds.of(source, pivot, ends)
    images = _exact(kinds)
    for token, paired, seen in _paired(counts, kinds):
        if token not in images:
            far = np.array(
                [_release_distance(source.words[token], pivot.words[image]) for image in paired.tolist()]
            )
            images[token] = int(paired[np.argmin(far / (1 + np.exp(-seen)))])
    return _one_to_one(images | kinds.functions, source, pivot, "statistics_published")


def prefix(source: TextTokenizer, pivot: TextTokenizer, ends: Ends = DEFAULT_ENDS) -> VocabularyMap:
    """The first token that the pivot reads an id's text as, within a text.

    The pivot's token of the same bytes is the image only if the pivot does read it so in one of ``CONTEXTS``: a
    tokenizer that takes digits one by one never predicts "12", though it may know it. A text that the pivot
    always joins to what precedes it, or that is no whole characters, goes to the pivot's longest token that it
    begins with.
    """
    kinds = _Kinds.of(source, pivot, ends)
    same = _exact(kinds)
    named = {token: image for token, image in same.items() if token in kinds.marks}
    rest = sorted(kinds.text)
    read = _firsts({token: _text(source.surfaces[token]) for token in rest}, pivot, same, kinds.pivot_text)
    longest = _Prefixes(kinds)
    found = {token: longest.of(source.surfaces[token]) for token in rest if token not in read}
    images = {**named, **read, **{token: image for token, image in found.items() if image is not None}}
    return _one_to_one(images | kinds.functions, source, pivot, "prefix")


@dataclass(frozen=True)
class _Kinds:
    """The ids of both tokenizers by what they stand for.

    Attributes:
        source: The source's tokenizer.
        pivot: The pivot's.
        text: Ids of the source that are text.
        marks: Its added tokens that are neither text nor special.
        pivot_text: The pivot's ids of text.
        pivot_marks: Its other added tokens that are not special.
        ends: Source id → the pivot's end of a turn, for all ids that end one.
        functions: The images of all special tokens that have one.
    """

    source: TextTokenizer
    pivot: TextTokenizer
    text: frozenset[int]
    marks: frozenset[int]
    pivot_text: frozenset[int]
    pivot_marks: frozenset[int]
    ends: dict[int, int]
    functions: dict[int, int]

    @classmethod
    def of(cls, source: TextTokenizer, pivot: TextTokenizer, ends: Ends) -> "_Kinds":
        ours, theirs = source.tokenizer, pivot.tokenizer
        closing = {token for token in ends.source or (ours.eos_token_id,) if token in source.surfaces}
        end = theirs.eos_token_id if ends.pivot is None else ends.pivot
        functions = {
            one: other
            for one, other in ((ours.pad_token_id, theirs.pad_token_id), (ours.bos_token_id, theirs.bos_token_id))
            if one is not None and other not in (None, end) and one not in closing
        }
        images = {} if end is None else dict.fromkeys(closing, end)
        return cls(
            source,
            pivot,
            *_text_and_marks(source, closing),
            *_text_and_marks(pivot, {end}),
            images,
            functions | images,
        )


def _text_and_marks(tokenizer: TextTokenizer, closing: set[int]) -> tuple[frozenset[int], frozenset[int]]:
    special = tokenizer.special | closing
    marks = tokenizer.marks.keys() - special
    return frozenset(tokenizer.surfaces.keys() - special - marks), frozenset(marks)


def _paired(counts: csr_array, kinds: _Kinds) -> Iterable[tuple[int, NDArray[np.intp], NDArray[np.float64]]]:
    """Each of the source's ids of text, the ids it was paired with and may be mapped to, and how often."""
    counts = csr_array(counts, dtype=np.float64)
    counts.sort_indices()
    for token in np.flatnonzero(np.diff(counts.indptr)).tolist():
        if token not in kinds.text:
            continue
        here = slice(counts.indptr[token], counts.indptr[token + 1])
        paired, seen = counts.indices[here], counts.data[here]
        same = kinds.source.surfaces[token]
        fits = [
            image in kinds.pivot_text or (image in kinds.pivot_marks and kinds.pivot.surfaces[image] == same)
            for image in paired.tolist()
        ]
        if any(fits):
            yield token, paired[fits], seen[fits]


def _release_distance(word: str, other: str) -> float:
    return Levenshtein.distance(word, other) * (0.1 if word in other or other in word else 1.0)


def _firsts(
    texts: Mapping[int, str], pivot: TextTokenizer, same: Mapping[int, int], allowed: frozenset[int]
) -> dict[int, int]:
    """The first token the pivot reads each text as: its own (``same``) if any context gives it, else the first.

    Others than its own count only if they are ``allowed``: a text that looks like a special token is none.
    """
    found: dict[int, int] = {}
    open_texts = {token: text for token, text in texts.items() if text}
    for context in CONTEXTS:
        read = pivot.encode([context + text for text in open_texts.values()])
        for token, tokens in zip(list(open_texts), read, strict=True):
            first = _after(tokens, len(context.encode()))
            if first is None:
                continue
            if first == same.get(token):
                found[token] = first
                del open_texts[token]
            elif first in allowed:
                found.setdefault(token, first)
                if token not in same:
                    del open_texts[token]
    return found


def _after(tokens: Tokens, end: int) -> int | None:
    """The token of some bytes that begins at a byte; None where one goes across it."""
    cut = np.flatnonzero(tokens.ends == end)
    if len(cut) and cut[-1] + 1 < len(tokens) and tokens.ends[cut[-1] + 1] > end:
        return int(tokens.ids[cut[-1] + 1])
    return None


class _Prefixes:
    """The pivot's tokens of text by their bytes."""

    def __init__(self, kinds: _Kinds) -> None:
        self.ids = _by_surface(kinds.pivot, kinds.pivot_text)
        self.longest = max(map(len, self.ids), default=0)

    def of(self, surface: bytes) -> int | None:
        sizes = range(min(self.longest, len(surface)), 0, -1)
        return next((self.ids[surface[:size]] for size in sizes if surface[:size] in self.ids), None)


def _by_surface(tokenizer: TextTokenizer, some: Iterable[int]) -> dict[bytes, int]:
    """Of tokens with the same bytes a byte's fallback comes last, and else the lower id first."""
    fallback = tokenizer.byte_fallback
    order = sorted(some, key=lambda token: (token in fallback, token), reverse=True)
    return {tokenizer.surfaces[token]: token for token in order if tokenizer.surfaces[token]}


def _exact(kinds: _Kinds, some: Iterable[int] | None = None) -> dict[int, int]:
    """The images of the same bytes, of ``some`` of the source's ids or of all that are not special."""
    known = _by_surface(kinds.pivot, kinds.pivot_text | kinds.pivot_marks)
    surfaces = kinds.source.surfaces
    ids = kinds.text | kinds.marks if some is None else some
    return {token: known[surfaces[token]] for token in ids if surfaces[token] in known}


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
    return _mixed({token: {image: 1.0} for token, image in images.items()}, source, pivot, method)


def _mixed(
    images: Mapping[int, Mapping[int, float]], source: TextTokenizer, pivot: TextTokenizer, method: str
) -> VocabularyMap:
    entries = [(token, image, share) for token in sorted(images) for image, share in images[token].items()]
    rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
    shape = max(source.surfaces) + 1, max(pivot.surfaces) + 1
    places = np.array(rows, np.int64), np.array(columns, np.int64)
    return VocabularyMap(csr_array((np.array(weights, np.float32), places), shape=shape), method)
