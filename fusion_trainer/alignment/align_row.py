"""One block's row of the aligned store: the source's distributions in the pivot's positions and ids."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.chunks import chunk_columns
from fusion_trainer.alignment.map_distributions import Mixture, transfer
from fusion_trainer.alignment.pairing import Read, compared, end_pairs, position_pairs
from fusion_trainer.alignment.sides import Sides
from fusion_trainer.data.answers import END
from fusion_trainer.representations.store import CROSS_ENTROPIES, Representation

__all__ = ["align_row", "name_the_end", "put_all_on_gold"]

Integers = NDArray[np.int32]


def align_row(sides: Sides, number: int, pivot: Read, source: Read) -> tuple[Representation, dict[str, int]]:
    """Row ``number`` of the aligned store, and its part of what the manifest counts (``docs/formats.md``).

    The block is given as both models read it. Probabilities are counted in millionths of a position.
    """
    assert sides.map is not None
    own, other = sides.pivot_store[number], sides.source_store[number]
    positions, source_positions = pivot.positions[: len(own)], source.positions
    partners, causes = _stored(_partners(sides, pivot, source), positions, source_positions, len(other))
    row, paired, mapped = transfer(own, other, partners, sides.map.matrix)
    sizes = pivot.sizes[positions + 1]
    gold_bytes = _gold_bytes(sizes, source.sizes[source_positions[: len(other)] + 1], partners)
    continued = np.zeros(len(own), bool)
    if sides.spread is not None:
        text = sides.dialogues[number].text.encode()
        continued = sides.spread.apply(row, gold_bytes, ~paired, text, (pivot, source), other)
    golds = pivot.tokens.ids[positions + 1]
    at_end = pivot.places.place[positions] == END
    name_the_end(row, paired & at_end, golds, sides.ends.pivot)
    if sides.config.unpaired == "gold":
        put_all_on_gold(row, ~(paired | continued), golds)
    gold_bytes[at_end] = sizes[at_end]  # both predict the same end, whatever each model calls it
    entropies = _entropies(own, other, pivot, source)
    row = replace(row, paired=(paired | continued).astype(np.uint8), gold_bytes=gold_bytes, **entropies)
    if sides.config.chunks:
        lengths, logprobs = chunk_columns(pivot, source, own, other)
        row = replace(row, chunk_size=lengths, chunk_logprob=logprobs)
    gold_shares = np.where(row.ids == golds[:, None], np.exp(row.logprobs.astype(np.float64)), 0.0).sum(1)
    return row, {
        "paired": int(paired.sum()),
        **{cause: causes[cause] for cause in ("no_partner", "not_supervised", "not_read")},
        "mass_ppm": _ppm(mapped.probabilities.sum()),
        "unmapped_ppm": _ppm(mapped.unmapped.sum()),
        "beyond_ppm": _ppm(mapped.beyond.sum()),
        "source_tail_ppm": _ppm(np.nansum(mapped.tail - mapped.unmapped - mapped.beyond)),
        "ends": int(at_end.sum()),
        "ends_paired": int((paired & at_end).sum()),
        "ends_ppm": _ppm(gold_shares[paired & at_end].sum()),
        "compared": int(not np.isnan(entropies["ce_per_token"])),
        "better_by_token": int(entropies["ce_per_token"] < entropies["pivot_ce_per_token"]),
        "better_by_byte": int(entropies["ce_per_byte"] < entropies["pivot_ce_per_byte"]),
        **({} if sides.spread is None else {"spread": int(continued.sum())}),
        **({} if row.chunk_size is None else {"chunk_positions": int(row.chunk_size.sum(dtype=np.int64))}),
    }


def _ppm(probability: float) -> int:
    return round(1e6 * float(probability))


def _entropies(own: Representation, other: Representation, pivot: Read, source: Read) -> dict[str, Any]:
    """Both models' cross-entropies, per token and per byte, over the bytes that both predict; NaN if none."""
    *both, size = compared(pivot, source, (len(own), len(other)))
    values = []
    for positions, read, row in zip(both[::-1], (source, pivot), (other, own), strict=True):
        rows = np.searchsorted(read.positions, positions)
        nats = -float(row.gold_logprob[rows].astype(np.float64).sum())
        values += [nats / len(rows), nats / size] if len(rows) and size else [float("nan")] * 2
    return dict(zip(CROSS_ENTROPIES, values, strict=True))


def name_the_end(row: Representation, where: NDArray[np.bool_], golds: Integers, usual: int | None) -> None:
    """Give the probability of the pivot's usual end to the end that the pivot writes at these positions."""
    if usual is None:
        return
    for position in np.flatnonzero(where & (golds != usual)).tolist():
        ids, gold = row.ids[position], int(golds[position])
        usual_at, gold_at = ids == usual, ids == gold
        ids[gold_at], ids[usual_at] = usual, gold


def put_all_on_gold(row: Representation, where: NDArray[np.bool_], golds: Integers) -> None:
    """Put all probability on the token that really follows, at these positions."""
    k = row.ids.shape[1]
    others = np.arange(k)[None] + (np.arange(k)[None] >= golds[where, None])  # the lowest ids but the gold one
    row.ids[where] = np.concatenate([golds[where, None], others[:, : k - 1]], 1)
    row.logprobs[where] = np.array([0.0] + [-np.inf] * (k - 1), np.float16)
    row.tail[where] = 0.0
    row.gold_logprob[where] = 0.0


def _stored(
    partners: dict[int, Mixture], positions: Integers, source_positions: Integers, read: int
) -> tuple[list[Mixture | None], Counter[str]]:
    """For each supervised position of the pivot its partners as rows of the source's store, or None.

    The store has the first ``read`` supervised positions of the source; a short context may have cut off the rest.
    Also returns how many positions have None, by cause.
    """
    row_of = {position: row for row, position in enumerate(source_positions.tolist())}
    mixtures: list[Mixture | None] = []
    causes: Counter[str] = Counter()
    for position in positions.tolist():
        mixture = [(row_of.get(partner, -1), weight) for partner, weight in partners.get(position, ())]
        rows = [row for row, _ in mixture]
        is_stored = bool(rows) and min(rows) >= 0 and max(rows) < read
        mixtures.append(mixture if is_stored else None)
        if not is_stored:
            causes["no_partner" if not rows else "not_supervised" if min(rows) < 0 else "not_read"] += 1
    return mixtures, causes


def _gold_bytes(own: Integers, source: Integers, partners: Sequence[Mixture | None]) -> NDArray[np.uint16]:
    """Bytes of the tokens that follow: the pivot's, or the weighted mean of the source's where it has partners."""
    means = [
        size if mixture is None else sum(weight * float(source[row]) for row, weight in mixture)
        for size, mixture in zip(own.tolist(), partners, strict=True)
    ]
    return np.clip(np.rint(means), 1, np.iinfo(np.uint16).max).astype(np.uint16)


def _partners(sides: Sides, pivot: Read, source: Read) -> dict[int, Mixture]:
    """For positions of the pivot that have any: the corresponding positions of the source, with weights."""
    pairs = position_pairs(pivot, source, (sides.pivot, sides.source), sides.contained)
    groups: dict[int, list[int]] = {}
    for i, j in zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True):
        groups.setdefault(i, []).append(j)
    content = np.flatnonzero(pivot.places.place >= 0)
    firsts = content[np.unique(pivot.places.turn[content], return_index=True)[1]].tolist()  # of each answer
    partners: dict[int, Mixture] = {}
    for i, candidates in groups.items():
        if sides.contained is None or i in firsts:
            partners[i] = [(candidates[0], 1.0)]
        elif mixture := _by_the_papers(sides, int(pivot.tokens.ids[i]), candidates, source):
            partners[i] = mixture
    ends = end_pairs(pivot, source)
    return partners | {i: [(j, 1.0)] for i, j in zip(ends.pivot.tolist(), ends.source.tolist(), strict=True)}


def _by_the_papers(sides: Sides, pivot_id: int, candidates: Sequence[int], source: Read) -> Mixture | None:
    """Which of the source tokens that are warped onto one pivot token stand for it (FuseLLM; FuseChat).

    The first that equals it, else the first that contains it; else all together, if they spell it, weighted by how
    often the corpus pairs them.
    """
    word = sides.pivot.words[pivot_id]
    ids = [int(source.tokens.ids[candidate]) for candidate in candidates]
    words = [sides.source.words[token] for token in ids]
    equal = [n for n, other in enumerate(words) if other == word]
    if fitting := equal or [n for n, other in enumerate(words) if word in other]:
        return [(candidates[fitting[0]], 1.0)]
    if len(candidates) > 1 and "".join(words) == word:
        assert sides.corpus is not None
        counts = np.array([float(sides.corpus.pairs[token, pivot_id]) for token in ids])
        weights = counts / counts.sum() if counts.sum() else np.full(len(ids), 1 / len(ids))
        return list(zip(candidates, weights.tolist(), strict=True))
    return None
