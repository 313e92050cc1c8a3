"""One row of a source's store, brought into the pivot's positions and vocabulary."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.map_distributions import Mixture, transfer
from fusion_trainer.alignment.pair_counts import Corpus
from fusion_trainer.alignment.pairing import Read, compared, end_pairs, position_pairs, sizes
from fusion_trainer.alignment.positions import CONTAINED
from fusion_trainer.alignment.saved_map import Places
from fusion_trainer.alignment.vocabulary import Ends, VocabularyMap
from fusion_trainer.config import AlignConfig
from fusion_trainer.data.answers import END
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.representations.store import Aligned, RepresentationStore, Supervised
from fusion_trainer.representations.store_tokenizer import place_of
from fusion_trainer.text.tokenizer import TextTokenizer, Tokens

__all__ = [
    "CAUSES",
    "NOT_STORED",
    "Sides",
    "align_row",
]


@dataclass
class Sides:
    """Both models' stores, how they read, and the dialogues they have in common."""

    config: AlignConfig
    pivot_store: RepresentationStore
    source_store: RepresentationStore
    dialogues: Dialogues
    pivot_reader: Reader
    source_reader: Reader
    made: VocabularyMap | None = None
    corpus: Corpus | None = None
    contained: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.contained = None if self.config.positions == "boundary" else CONTAINED[self.config.dtw_cost]

    @property
    def pivot(self) -> TextTokenizer:
        return self.pivot_reader.tokenizer

    @property
    def source(self) -> TextTokenizer:
        return self.source_reader.tokenizer

    @property
    def ends(self) -> Ends:
        """What ends a turn of either."""
        own = [*self.dialogues.ends, self.pivot.tokenizer.eos_token_id]
        return Ends(tuple(self.source_store.identity["ends"]), own[0])

    @property
    def maps(self) -> Path:
        """The folder of what is built once: maps, counts, masses."""
        return self.config.maps or self.config.output.parent

    @property
    def places(self) -> Places:
        source, pivot = self.config.source_tokenizer, self.config.pivot_tokenizer
        return {"source": place_of(self.source_store, source), "pivot": place_of(self.pivot_store, pivot)}


CAUSES = (
    "paired",
    "no_partner",
    "not_supervised",
    "not_read",
    "mass_ppm",
    "unmapped_ppm",
    "beyond_ppm",
    "source_tail_ppm",
    "ends",
    "ends_paired",
    "ends_ppm",
    "compared",
    "better_by_token",
    "better_by_byte",
)
"""What a shard counts: positions; probability mass in millionths of a position (``ends_ppm`` is what the pivot's
end gets where the end of an answer is paired); blocks in which the source's cross-entropy is the lower."""
NOT_STORED = (("partner not supervised", "not_supervised"), ("beyond the context", "not_read"))
"""Why a partner is not in the source's store: its next token is not the assistant's, or was not read."""


def align_row(sides: Sides, number: int, of_pivot: Read, of_source: Read) -> tuple[Aligned, Counter[str]]:
    assert sides.made is not None
    own, source = sides.pivot_store[number], sides.source_store[number]
    positions, theirs = of_pivot.positions[: len(own)], of_source.positions
    candidates, ends = _partners(sides, of_pivot, of_source), end_pairs(of_pivot, of_source)
    candidates |= {i: [(j, 1.0)] for i, j in zip(ends.pivot.tolist(), ends.source.tolist(), strict=True)}
    partners, counts = _stored(candidates, positions, theirs, len(source))
    theirs = theirs[: len(source)]
    row, paired, mapped = transfer(own, source, partners, sides.made.matrix)
    golds = of_pivot.tokens.ids[positions + 1]
    at_end = of_pivot.places.place[positions] == END
    _name_the_end(row, paired & at_end, golds, sides.ends.pivot)
    if sides.config.unpaired == "gold":
        row = _gold_where(row, ~paired, golds)
    source_tail = mapped.tail - mapped.unmapped - mapped.beyond
    masses = {"mass_ppm": mapped.probabilities.sum(), "unmapped_ppm": mapped.unmapped.sum()}
    masses |= {"beyond_ppm": mapped.beyond.sum(), "source_tail_ppm": source_tail.sum()}
    masses |= {"ends_ppm": _probability(row, golds)[paired & at_end].sum()}
    counts.update({"paired": int(paired.sum()), **{name: round(1e6 * float(m)) for name, m in masses.items()}})
    counts.update({"ends": int(at_end.sum()), "ends_paired": int((paired & at_end).sum())})
    own_sizes = sizes(of_pivot)[positions + 1]
    gold_bytes = _gold_bytes(own_sizes, sizes(of_source)[theirs + 1], partners)
    gold_bytes[at_end] = own_sizes[at_end]  # the same thing, whatever each model calls it
    entropies = _entropies(own, source, of_pivot, of_source)
    by_token, by_byte = entropies[0] < entropies[2], entropies[1] < entropies[3]
    counts.update({"compared": int(not np.isnan(entropies[0])), "better_by_token": int(by_token)})
    counts.update({"better_by_byte": int(by_byte)})
    arrays = row.ids, row.logprobs, row.tail, row.gold_logprob, paired.astype(np.uint8), gold_bytes
    return Aligned(*arrays, *entropies), counts


def _entropies(
    own: Supervised, source: Supervised, of_pivot: Read, of_source: Read
) -> tuple[float, float, float, float]:
    """The source's cross-entropy per token and per byte, then the pivot's over the same bytes; NaN for none."""
    *both, size = compared(of_pivot, of_source, (len(own), len(source)))
    found = []
    for positions, read, store in zip(both[::-1], (of_source, of_pivot), (source, own), strict=True):
        rows = np.searchsorted(read.positions, positions)
        nats = -float(store.gold_logprob[rows].astype(np.float64).sum())
        found += [nats / len(rows), nats / size] if len(rows) and size else [float("nan")] * 2
    return found[0], found[1], found[2], found[3]


def _probability(row: Supervised, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """float64 [positions]: of one id at each position; 0 where it is not among the k."""
    shares = np.exp(row.logprobs.astype(np.float64))
    probability: NDArray[np.float64] = np.where(row.ids == ids[:, None], shares, 0.0).sum(1)
    return probability


def _name_the_end(row: Supervised, where: NDArray[np.bool_], golds: NDArray[np.int32], usual: int | None) -> None:
    """Give the probability of the pivot's usual end to the one that it writes at these positions."""
    for position in np.flatnonzero(where & (golds != usual)).tolist() if usual is not None else ():
        ids, gold = row.ids[position], int(golds[position])
        usual_at, gold_at = ids == usual, ids == gold
        ids[gold_at], ids[usual_at] = usual, gold


def _stored(
    candidates: dict[int, Mixture], positions: NDArray[np.int32], theirs: NDArray[np.int32], read: int
) -> tuple[list[Mixture | None], Counter[str]]:
    """For each of the pivot's supervised positions the rows of the source's store that stand for it, or None.

    Args:
        candidates: The source's positions for some of the pivot's, with weights.
        positions: The pivot's supervised positions.
        theirs: The source's.
        read: How many of these are in its store; its context cut off the others.

    Returns:
        The rows, and how many positions have none, by cause.
    """
    row_of = {place: row for row, place in enumerate(theirs.tolist())}
    found: list[Mixture | None] = []
    counts: Counter[str] = Counter()
    for position in positions.tolist():
        mixture = candidates.get(position)
        rows = [(row_of.get(place), weight) for place, weight in mixture or ()]
        kept = [(row, weight) for row, weight in rows if row is not None and row < read]
        if mixture is not None and len(kept) == len(mixture):
            found.append(kept)
            continue
        found.append(None)
        if mixture is None:
            counts["no_partner"] += 1
        else:
            counts["not_supervised" if any(row is None for row, _ in rows) else "not_read"] += 1
    return found, counts


def _gold_bytes(
    own: NDArray[np.int32], source: NDArray[np.int32], partners: Sequence[Mixture | None]
) -> NDArray[np.uint16]:
    """The sizes of the tokens that follow: the pivot's, and where there is a partner the source's mean."""
    means = [
        size if mixture is None else sum(weight * float(source[row]) for row, weight in mixture)
        for size, mixture in zip(own.tolist(), partners, strict=True)
    ]
    return np.clip(np.rint(means), 1, np.iinfo(np.uint16).max).astype(np.uint16)


def _gold_where(row: Supervised, where: NDArray[np.bool_], gold: NDArray[np.int32]) -> Supervised:
    """All probability on the token that really follows, at some positions."""
    k = row.ids.shape[1]
    others = np.arange(k)[None] + (np.arange(k)[None] >= gold[where, None])  # ids that are not the gold one
    row.ids[where] = np.concatenate([gold[where, None], others[:, : k - 1]], 1)
    row.logprobs[where] = np.array([0.0] + [-np.inf] * (k - 1), np.float16)
    row.tail[where] = 0.0
    row.gold_logprob[where] = 0.0
    return row


def _partners(sides: Sides, of_pivot: Read, of_source: Read) -> dict[int, Mixture]:
    """For positions of the pivot that predict content and have any: the source's positions, with weights."""
    pairs = position_pairs(of_pivot, of_source, (sides.pivot, sides.source), sides.contained)
    if sides.contained is None:
        return {i: [(j, 1.0)] for i, j in zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True)}
    begins = {int(read.places.content(turn)[0]) for read in (of_pivot,) for turn in _turns(read)}
    groups: dict[int, list[int]] = {}
    for i, j in zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True):
        groups.setdefault(i, []).append(j)
    found = (
        (
            i,
            [(js[0], 1.0)]
            if i in begins
            else _by_the_papers(sides, int(of_pivot.tokens.ids[i]), js, of_source.tokens),
        )
        for i, js in groups.items()
    )
    return {i: mixture for i, mixture in found if mixture}


def _turns(read: Read) -> list[int]:
    """The answers of which a position predicts content."""
    return [int(turn) for turn in np.unique(read.places.turn[read.places.place >= 0])]


def _by_the_papers(sides: Sides, pivot_id: int, places: Sequence[int], of_source: Tokens) -> Mixture | None:
    """Which of the source tokens warped onto one pivot token stand for it (FuseLLM; FuseChat)."""
    word = sides.pivot.words[pivot_id]
    ids = [int(of_source.ids[place]) for place in places]
    theirs = [sides.source.words[token] for token in ids]
    for fits in (lambda other: other == word, lambda other: word in other):
        for place, other in zip(places, theirs, strict=True):
            if fits(other):
                return [(place, 1.0)]
    if len(places) > 1 and "".join(theirs) == word:
        assert sides.corpus is not None
        seen = np.array([float(sides.corpus.pairs[token, pivot_id]) for token in ids])
        weights = seen / seen.sum() if seen.sum() else np.full(len(ids), 1 / len(ids))
        return list(zip(places, weights.tolist(), strict=True))
    return None
