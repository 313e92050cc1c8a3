"""Vocabulary maps as files: built once, and reused for the same tokenizers, method and data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fusion_trainer.alignment import vocabulary
from fusion_trainer.alignment.co_occurrence import Neighbours, co_occurrence
from fusion_trainer.alignment.pair_counts import Corpus
from fusion_trainer.alignment.vocabulary import Ends, Method, Vocabularies, VocabularyMap
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.errors import UserError
from varm_common.saved_arrays import load_arrays, path_of, save_arrays

__all__ = ["SavedMap", "build_map", "load_map", "saved_map"]

FORMAT = "fusion-trainer vocabulary map, version 2"
Places = dict[str, tuple[str, str | None]]
"""``source`` and ``pivot``: name and revision."""


def build_map(
    method: Method,
    source: TextTokenizer,
    pivot: TextTokenizer,
    corpus: Callable[[], Corpus],
    most: int = 0,
    ends: Ends | None = None,
    neighbours: Callable[[], Neighbours] | None = None,
) -> VocabularyMap:
    """A map by one of the methods; if the tokenizers agree, ids map to themselves whatever the method.

    ``corpus`` and ``neighbours`` count over the data, and are called only for methods that need that. ``most`` is
    for ``statistics``, ``neighbours`` for ``co_occurrence``.

    Raises:
        UserError: No token of text would have an image.
    """
    both = Vocabularies(source, pivot, ends)
    made = vocabulary.identical(both)
    if made is None:
        if method == "exact":
            made = vocabulary.exact(both)
        elif method == "prefix":
            made = vocabulary.prefix(both)
        elif method == "min_edit_distance":
            made = vocabulary.min_edit_distance(both, dict(enumerate(corpus().frequency.tolist())))
        elif method == "co_occurrence":
            assert neighbours is not None
            made = co_occurrence(both, neighbours(), dict(enumerate(corpus().frequency.tolist())))
        elif method == "statistics_published":
            made = vocabulary.statistics_published(both, corpus().pairs)
        else:
            made = vocabulary.statistics(both, corpus().pairs, most)
    if set(np.flatnonzero(made.mapped).tolist()) <= source.special | both.ends.keys():
        raise UserError(
            f"the map `{method}` maps no token of {source.name} to a token of {pivot.name}; check that these are "
            "the tokenizers that the stores were made with"
        )
    return made


@dataclass(frozen=True)
class SavedMap:
    """A map and its file; what it was built from, by hash; and where the two tokenizers were at that time."""

    path: Path
    map: VocabularyMap
    identity: dict[str, Any]
    places: Places


def saved_map(
    folder: Path, identity: Mapping[str, Any], places: Places, build: Callable[[], VocabularyMap]
) -> SavedMap:
    """The map of this identity in ``folder``; if it is missing, it is built and saved there.

    Raises:
        UserError: The file there is damaged or of something else, or the disk is full.
    """
    path = path_of(folder, "vocab-map", identity)
    if path.is_file():
        return _opened(path, *load_arrays(path, FORMAT, identity))
    made = build()
    matrix = made.matrix
    described = {"identity": dict(identity), "places": places, "method": made.method, "shape": list(matrix.shape)}
    arrays = {"indptr": matrix.indptr.astype(np.int64), "indices": matrix.indices.astype(np.int64)}
    save_arrays(path, FORMAT, described, {**arrays, "weights": matrix.data})
    return SavedMap(path, made, dict(identity), places)


def load_map(path: Path) -> SavedMap:
    """A saved map.

    Raises:
        UserError: The file is not a vocabulary map, or is damaged.
    """
    return _opened(path, *load_arrays(path, FORMAT))


def _opened(path: Path, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SavedMap:
    matrix = csr_array((arrays["weights"], arrays["indices"], arrays["indptr"]), shape=tuple(described["shape"]))
    places: Places = {side: (name, revision) for side, (name, revision) in described["places"].items()}
    return SavedMap(path, VocabularyMap(matrix, described["method"]), described["identity"], places)
