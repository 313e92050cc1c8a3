"""Vocabulary maps on the disk: built once, found again by what they were built from, and shown."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.sparse import csr_array

from fusion_trainer.alignment import vocabulary
from fusion_trainer.alignment.corpus import Corpus
from fusion_trainer.alignment.vocabulary import Method, VocabularyMap
from fusion_trainer.errors import FusionError, unlike
from fusion_trainer.files import fingerprint, whole_file
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.tokens import TextTokenizer

__all__ = ["build_map", "coverage", "load_map", "mass_by_id", "saved_map"]

FORMAT = "fusion-trainer vocabulary map"
KEY = "fusion_trainer"
WORST, EXAMPLES = 20, 10


def build_map(
    method: Method, source: TextTokenizer, pivot: TextTokenizer, corpus: Callable[[], Corpus], most: int = 0
) -> VocabularyMap:
    """A map by one of the methods; the tokenizers' own identity where they agree.

    Args:
        method: How.
        source: The source's tokenizer.
        pivot: The pivot's.
        corpus: Called only by the methods that ask the corpus.
        most: Of ``statistics``: images kept per id.

    Raises:
        FusionError: No id of the source would have an image.
    """
    made = vocabulary.identical(source, pivot)
    if made is None:
        if method == "exact":
            made = vocabulary.exact(source, pivot)
        elif method == "prefix":
            made = vocabulary.prefix(source, pivot)
        elif method == "min_edit_distance":
            frequency = corpus().frequency
            made = vocabulary.min_edit_distance(source, pivot, dict(enumerate(frequency.tolist())))
        else:
            made = vocabulary.statistics(corpus().pairs, source, pivot, most)
    if not made.mapped.any():
        raise FusionError(
            f"no token of {source.name} has an image among those of {pivot.name} by `{method}`: are these the "
            "tokenizers the stores were made with?"
        )
    return made


def saved_map(folder: Path, identity: Mapping[str, Any], build: Callable[[], VocabularyMap]) -> VocabularyMap:
    """The map of this identity in ``folder``; built and kept there if it is not."""
    path = folder / f"vocab-map-{fingerprint(dict(identity))[:12]}.safetensors"
    if path.is_file():
        made, found = load_map(path)
        if difference := unlike(f"`{path}` is a map of something else:", dict(identity), found):
            raise FusionError(f"{difference}\nRemove that file.")
        return made
    made = build()
    matrix = made.matrix
    arrays = {"indptr": matrix.indptr.astype(np.int64), "indices": matrix.indices.astype(np.int64)}
    described = {"format": FORMAT, "method": made.method, "shape": list(matrix.shape), "identity": dict(identity)}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save({**arrays, "weights": matrix.data}, {KEY: json.dumps(described)}))
    return made


def load_map(path: Path) -> tuple[VocabularyMap, dict[str, Any]]:
    """A saved map, and what it is of.

    Raises:
        FusionError: It is no vocabulary map.
    """
    try:
        with safe_open(path, "numpy") as file:
            described = json.loads((file.metadata() or {})[KEY])
            arrays = [file.get_tensor(name) for name in ("weights", "indices", "indptr")]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FusionError(f"`{path}` is not a {FORMAT}: {error or type(error).__name__}") from error
    matrix = csr_array((arrays[0], arrays[1], arrays[2]), shape=tuple(described["shape"]))
    return VocabularyMap(matrix, described["method"]), described["identity"]


def mass_by_id(store: RepresentationStore) -> NDArray[np.float64]:
    """float64 [ids]: the probability each id has in the store, summed over its positions."""
    mass = np.zeros(store.identity["vocabulary"])
    for row in store:
        shares = np.exp(row.logprobs.astype(np.float64))
        mass += np.bincount(row.ids.ravel(), shares.ravel(), len(mass))
    return mass


def coverage(
    made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer, mass: NDArray[np.float64] | None
) -> str:
    """How much of the vocabulary, and of the store's probability, is mapped; what is not; and some rows."""
    known = np.array(sorted(source.surfaces))
    mapped = np.zeros(max(known) + 1, bool)
    mapped[: len(made.mapped)] = made.mapped[: len(mapped)]
    lines = [
        f"method              {made.method}",
        f"vocabulary mapped   {mapped[known].sum():,} of {len(known):,} ids ({mapped[known].mean():.1%})",
    ]
    weight = np.zeros(len(mapped)) if mass is None else np.pad(mass, (0, max(0, len(mapped) - len(mass))))
    if mass is not None:
        share = weight[: len(mapped)][mapped].sum() / max(weight.sum(), 1e-300)
        lines.append(f"probability mapped  {share:.2%} of what the store's top k hold")
    worst = sorted((int(token) for token in known if not mapped[token]), key=lambda t: (-weight[t], t))[:WORST]
    if worst:
        lines.append("most probable ids without an image:")
        lines += [f"  {token:>7}  {source.surfaces[token]!r}  {weight[token]:.3g}" for token in worst]
    lines.append("some rows:")
    likely = sorted((int(token) for token in known if mapped[token]), key=lambda t: (-weight[t], t))
    for token in likely[:: max(1, len(likely) // EXAMPLES)][:EXAMPLES]:
        here = slice(made.matrix.indptr[token], made.matrix.indptr[token + 1])
        images = zip(made.matrix.indices[here].tolist(), made.matrix.data[here].tolist(), strict=True)
        shown = ", ".join(f"{pivot.surfaces[image]!r} {share:.2f}" for image, share in images)
        lines.append(f"  {token:>7}  {source.surfaces[token]!r} → {shown}")
    return "\n".join(lines)
