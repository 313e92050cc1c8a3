"""Vocabulary maps on the disk: built once, found again by what they were built from, and shown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.sparse import csr_array

from fusion_trainer.alignment import vocabulary
from fusion_trainer.alignment.pair_counts import Corpus
from fusion_trainer.alignment.vocabulary import DEFAULT_ENDS, Ends, Method, VocabularyMap
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.errors import UserError
from varm_common.files import sha256_of
from varm_common.saved_arrays import keep, kept, kept_of, place

__all__ = ["SavedMap", "build_map", "coverage", "load_map", "mass_by_id", "saved_map"]

FORMAT = "fusion-trainer vocabulary map, version 2"
MASS_FORMAT = "fusion-trainer probability by id"
WORST, EXAMPLES = 20, 10
Places = dict[str, tuple[str, str | None]]
"""``source`` and ``pivot``: name and revision."""


def build_map(
    method: Method,
    source: TextTokenizer,
    pivot: TextTokenizer,
    corpus: Callable[[], Corpus],
    most: int = 0,
    ends: Ends = DEFAULT_ENDS,
) -> VocabularyMap:
    """A map by one of the methods; the tokenizers' own identity where they agree.

    Args:
        method: How.
        source: The source's tokenizer.
        pivot: The pivot's.
        corpus: Called only by the methods that ask the corpus.
        most: Of ``statistics``: images kept per id.
        ends: What ends a turn.

    Raises:
        UserError: No id of the source but its special ones would have an image.
    """
    made = vocabulary.identical(source, pivot, ends)
    if made is None:
        if method == "exact":
            made = vocabulary.exact(source, pivot, ends)
        elif method == "prefix":
            made = vocabulary.prefix(source, pivot, ends)
        elif method == "min_edit_distance":
            frequency = corpus().frequency
            made = vocabulary.min_edit_distance(source, pivot, dict(enumerate(frequency.tolist())), ends)
        elif method == "statistics_published":
            made = vocabulary.statistics_published(corpus().pairs, source, pivot, ends)
        else:
            made = vocabulary.statistics(corpus().pairs, source, pivot, most, ends=ends)
    if set(np.flatnonzero(made.mapped).tolist()) <= source.special | {*ends.source}:
        raise UserError(
            f"no token of {source.name} has an image among those of {pivot.name} by `{method}`: are these the "
            "tokenizers the stores were made with?"
        )
    return made


@dataclass(frozen=True)
class SavedMap:
    """A map on the disk.

    Attributes:
        path: Its file.
        map: The map.
        identity: What it is of, by hash.
        places: Where the two tokenizers were when it was made.
    """

    path: Path
    map: VocabularyMap
    identity: dict[str, Any]
    places: Places


def saved_map(
    folder: Path, identity: Mapping[str, Any], places: Places, build: Callable[[], VocabularyMap]
) -> SavedMap:
    """The map of this identity in ``folder``; built and kept there if it is not.

    Raises:
        UserError: A file in the way, or a disk that is full.
    """
    path = place(folder, "vocab-map", identity)
    if path.is_file():
        return _saved(path, *kept_of(path, FORMAT, identity))
    made = build()
    matrix = made.matrix
    described = {"identity": dict(identity), "places": places, "method": made.method, "shape": list(matrix.shape)}
    arrays = {"indptr": matrix.indptr.astype(np.int64), "indices": matrix.indices.astype(np.int64)}
    keep(path, FORMAT, described, {**arrays, "weights": matrix.data})
    return SavedMap(path, made, dict(identity), places)


def load_map(path: Path) -> SavedMap:
    """A saved map.

    Raises:
        UserError: It is no vocabulary map.
    """
    return _saved(path, *kept(path, FORMAT))


def _saved(path: Path, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SavedMap:
    matrix = csr_array((arrays["weights"], arrays["indices"], arrays["indptr"]), shape=tuple(described["shape"]))
    places: Places = {side: (name, revision) for side, (name, revision) in described["places"].items()}
    return SavedMap(path, VocabularyMap(matrix, described["method"]), described["identity"], places)


def mass_by_id(store: RepresentationStore, folder: Path | None = None) -> NDArray[np.float64]:
    """float64 [ids]: the probability each id has in the store, summed over its positions; kept in ``folder``."""
    identity = {"store": sha256_of(store.folder / "manifest.json")}
    path = folder and place(folder, "mass", identity)
    if path and path.is_file():
        return kept_of(path, MASS_FORMAT, identity)[1]["mass"]
    mass = np.zeros(store.identity["vocabulary"])
    for ids, logprobs in store.distributions():
        mass += np.bincount(ids.ravel(), np.exp(logprobs.ravel().astype(np.float64)), len(mass))
    if path:
        keep(path, MASS_FORMAT, {"identity": identity}, {"mass": mass})
    return mass


def coverage(
    made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer, mass: NDArray[np.float64] | None
) -> str:
    """How much of the vocabulary, and of the store's probability, is mapped; the worst ids; and some rows.

    Args:
        made: The map.
        source: The source's tokenizer.
        pivot: The pivot's.
        mass: float64 [ids], the probability each id of the source has in its store; None weighs all alike.
    """
    size = max(max(source.surfaces) + 1, len(made.mapped), 0 if mass is None else len(mass))
    far = _distances(made, source, pivot, size)
    mapped, exact = ~np.isnan(far), far == 0
    known = np.zeros(size, bool)
    known[list(source.surfaces)] = True
    weight = known.astype(np.float64) if mass is None else np.pad(mass, (0, size - len(mass)))

    number, of_these = int((mapped & known).sum()), f"{(exact & known).sum() / max(1, (mapped & known).sum()):.1%}"
    lines = [
        f"method              {made.method}",
        f"vocabulary mapped   {number:,} of {known.sum():,} ids ({number / known.sum():.1%}), of which exact "
        f"{of_these}",
    ]
    if mass is not None:
        share, exactly = weight[mapped].sum() / max(weight.sum(), 1e-300), weight[exact].sum()
        lines.append(
            f"probability mapped  {share:.2%} of what the store's top k hold, of which exact "
            f"{exactly / max(weight[mapped].sum(), 1e-300):.2%}"
        )
    if worst := _largest(np.where(known & ~mapped, weight, -1), WORST, least=0):
        lines.append("most probable ids without an image:")
        lines += [f"  {token:>7}  {source.surfaces[token]!r}  {weight[token]:.3g}" for token in worst]
    loss = weight * np.nan_to_num(far)
    if worst := _largest(loss, WORST, least=1e-300):
        lines.append(
            "mapped ids that lose most, probability × edit distance to the image as a share of its length:"
        )
        lines += [f"{_row(made, token, source, pivot)}  {loss[token]:.3g}" for token in worst]
    lines.append("some rows:")
    likely = _largest(np.where(known & mapped, weight, -1), size, least=0)
    lines += [_row(made, token, source, pivot) for token in likely[:: max(1, len(likely) // EXAMPLES)][:EXAMPLES]]
    return "\n".join(lines)


def _largest(values: NDArray[np.float64], number: int, least: float) -> list[int]:
    """The ids of the largest values from ``least`` on; of equal ones the lower first."""
    order = np.argsort(-values, kind="stable")[:number]
    return [int(token) for token in order if values[token] >= least]


def _images(made: VocabularyMap, token: int) -> list[tuple[int, float]]:
    here = slice(made.matrix.indptr[token], made.matrix.indptr[token + 1])
    return list(zip(made.matrix.indices[here].tolist(), made.matrix.data[here].tolist(), strict=True))


def _distances(made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer, size: int) -> NDArray[np.float64]:
    """For each id the edit distance to its images, 0 to 1, weighted; NaN where it has none.

    A special token is no text: mapped by its function, it is at no distance.
    """
    far = np.full(size, np.nan)
    for token in np.flatnonzero(made.mapped).tolist():
        if token in source.special:
            far[token] = 0.0
            continue
        text = _text(source, token)
        far[token] = sum(
            share * Levenshtein.normalized_distance(text, _text(pivot, image))
            for image, share in _images(made, token)
        )
    return far


def _text(tokenizer: TextTokenizer, token: int) -> str:
    return tokenizer.surfaces.get(token, b"").decode(errors="surrogateescape")


def _row(made: VocabularyMap, token: int, source: TextTokenizer, pivot: TextTokenizer) -> str:
    shown = ", ".join(f"{pivot.surfaces[image]!r} {share:.2f}" for image, share in _images(made, token))
    return f"  {token:>7}  {source.surfaces[token]!r} → {shown}"
