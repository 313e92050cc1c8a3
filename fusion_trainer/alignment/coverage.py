"""How much of a vocabulary, and of a store's probability, a map covers: the report of ``vocab-map show``."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from fusion_trainer.alignment.vocabulary import VocabularyMap
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.saved_arrays import load_arrays, path_of, save_arrays

__all__ = ["coverage", "mass_by_id"]

MASS_FORMAT = "fusion-trainer probability by id"
WORST, EXAMPLES = 20, 10
Floats = NDArray[np.float64]


def mass_by_id(store: RepresentationStore, folder: Path | None = None) -> Floats:
    """float64 [ids]: the probability of each id, summed over the store's positions; saved in ``folder``."""
    identity = {"store": store.sha256}
    path = folder and path_of(folder, "mass", identity)
    if path and path.is_file():
        return load_arrays(path, MASS_FORMAT, identity)[1]["mass"]
    mass = np.zeros(store.identity["vocabulary"])
    for ids, logprobs in store.distributions():
        mass += np.bincount(ids.ravel(), np.exp(logprobs.ravel().astype(np.float64)), len(mass))
    if path:
        save_arrays(path, MASS_FORMAT, {"identity": identity}, {"mass": mass})
    return mass


def coverage(made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer, mass: Floats | None) -> str:
    """How much is mapped, the worst ids, and some examples.

    ``mass``, float64 [ids], weights the ids by their probability in the source's store; with None all are equal.
    """
    size = max(max(source.surfaces) + 1, len(made.mapped), 0 if mass is None else len(mass))
    distances = _distances(made, source, pivot, size)
    mapped, exact = ~np.isnan(distances), distances == 0
    known = np.zeros(size, bool)
    known[list(source.surfaces)] = True
    weight = known.astype(np.float64) if mass is None else np.pad(mass, (0, size - len(mass)))

    number = int((mapped & known).sum())
    lines = [
        f"method              {made.method}",
        f"vocabulary mapped   {number:,} of {known.sum():,} ids ({number / known.sum():.1%}), of which exact "
        f"{(exact & known).sum() / max(1, number):.1%}",
    ]
    if mass is not None:
        covered = weight[mapped].sum()
        lines.append(
            f"probability mapped  {covered / max(weight.sum(), 1e-300):.2%} of what the store's top k hold, "
            f"of which exact {weight[exact].sum() / max(covered, 1e-300):.2%}"
        )
    if worst := _largest(np.where(known & ~mapped, weight, -1), WORST, least=0):
        lines.append("most probable ids without an image:")
        lines += [f"  {token:>7}  {source.surfaces[token]!r}  {weight[token]:.3g}" for token in worst]
    loss = weight * np.nan_to_num(distances)
    if worst := _largest(loss, WORST, least=1e-300):
        lines.append(
            "mapped ids that lose most, probability × edit distance to the image as a share of its length:"
        )
        lines += [f"{_example(made, token, source, pivot)}  {loss[token]:.3g}" for token in worst]
    lines.append("some rows:")
    likely = _largest(np.where(known & mapped, weight, -1), size, least=0)
    chosen = likely[:: max(1, len(likely) // EXAMPLES)][:EXAMPLES]
    return "\n".join([*lines, *(_example(made, token, source, pivot) for token in chosen)])


def _largest(values: Floats, number: int, least: float) -> list[int]:
    """The ids of the largest values that are at least ``least``; of equal ones the lower first."""
    order = np.argsort(-values, kind="stable")[:number]
    return [int(token) for token in order if values[token] >= least]


def _images(made: VocabularyMap, token: int) -> list[tuple[int, float]]:
    here = slice(made.matrix.indptr[token], made.matrix.indptr[token + 1])
    return list(zip(made.matrix.indices[here].tolist(), made.matrix.data[here].tolist(), strict=True))


def _distances(made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer, size: int) -> Floats:
    """For each id the weighted edit distance to its images, 0 to 1; NaN if it has none.

    A special token is mapped by its function, so its distance is 0.
    """
    distances = np.full(size, np.nan)
    for token in np.flatnonzero(made.mapped).tolist():
        text = _text(source, token)
        distances[token] = sum(
            share * Levenshtein.normalized_distance(text, _text(pivot, image)) * (token not in source.special)
            for image, share in _images(made, token)
        )
    return distances


def _text(tokenizer: TextTokenizer, token: int) -> str:
    return tokenizer.surfaces.get(token, b"").decode(errors="surrogateescape")


def _example(made: VocabularyMap, token: int, source: TextTokenizer, pivot: TextTokenizer) -> str:
    shown = ", ".join(f"{pivot.surfaces[image]!r} {share:.2f}" for image, share in _images(made, token))
    return f"  {token:>7}  {source.surfaces[token]!r} → {shown}"
