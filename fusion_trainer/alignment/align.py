"""A source's store and the pivot's → the source's distributions in the pivot's positions and ids.

Shard by shard, in several processes; each shard appears whole or not at all and depends on its rows alone, so that
a run that was stopped goes on where it was and ends with the same bytes.

Answers are laid side by side. A position of the pivot gets the source's distribution

* with ``boundary``: where a token of the source ends at the same byte of the answer;
* with ``dtw``: where one source token that contains the pivot's was warped onto it, or several, of which one
  equals or else contains it, or which make it up together (then their mixture, weighted by how often the corpus
  pairs them);
* with both: where both predict the end of the answer, whatever each model calls it;

and keeps the pivot's own otherwise.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusion_trainer.alignment import corpus as corpora
from fusion_trainer.alignment.corpus import Corpus, count, saved_counts
from fusion_trainer.alignment.maps import Places, SavedMap, build_map, coverage, mass_by_id, saved_map
from fusion_trainer.alignment.pairing import Read, compared, end_pairs, position_pairs, read_blocks, sizes
from fusion_trainer.alignment.positions import CONTAINED
from fusion_trainer.alignment.transfer import Mixture, transfer
from fusion_trainer.alignment.vocabulary import RULES, Ends, VocabularyMap
from fusion_trainer.answers import END
from fusion_trainer.config import AlignConfig
from fusion_trainer.dialogues import Dialogues
from fusion_trainer.errors import FusionError
from fusion_trainer.files import fingerprint, sha256_of
from fusion_trainer.readers import DIALOGUES, Reader, reader_of_store
from fusion_trainer.representations.reader import place_of, tokenizer_of
from fusion_trainer.representations.store import (
    ALIGNED,
    ALIGNED_VERSION,
    Aligned,
    RepresentationStore,
    StoreWriter,
    Supervised,
    demand_free,
)
from fusion_trainer.talking import is_quiet
from fusion_trainer.tokens import TextTokenizer, Tokens

__all__ = ["align", "open_sides"]

FROM_CORPUS = ("min_edit_distance", "statistics", "statistics_published")
"""Maps that depend on the data."""
BLOCKS_AT_ONCE = 64
"""Of the corpus, in one process's hands."""


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


def open_sides(config: AlignConfig, checked: bool = False) -> Sides:
    """Open all that an alignment needs.

    Args:
        config: What to align.
        checked: Whether another process has held the stores against their hashes.

    Raises:
        FusionError: The stores are not of the same dialogues, or a tokenizer is not the one a store was made with.
    """
    pivot_store, source_store = (
        RepresentationStore(folder, checked) for folder in (config.pivot_store, config.source_store)
    )
    source_store.demand(data=pivot_store.identity["data"])
    dialogues = Dialogues(config.dialogues or _beside(pivot_store))
    pivot_store.demand(data=dialogues.fingerprint)
    for store in (pivot_store, source_store):
        if store.identity.get("kind") == ALIGNED:
            raise FusionError(f"the store `{store.folder}` is already aligned; give the source's own")
    if pivot_store.identity["reading"] != DIALOGUES:
        raise FusionError(
            f"the store `{pivot_store.folder}` is not the pivot's: its model was queried in a template of its own"
        )
    pivot = tokenizer_of(pivot_store, config.pivot_tokenizer, config.trust_remote_code)
    source = tokenizer_of(source_store, config.source_tokenizer, config.trust_remote_code)
    readers = Reader(pivot, DIALOGUES), reader_of_store(source_store.identity, source)
    return Sides(config, pivot_store, source_store, dialogues, *readers)


def _beside(store: RepresentationStore) -> Path:
    found = Dialogues.beside(store.folder, store.identity["data"])
    if found is None:
        raise FusionError(f"no dialogues of the store `{store.folder}` lie beside it; name them with --dialogues")
    return found.folder


def align(config: AlignConfig) -> tuple[RepresentationStore, str]:
    """Make the aligned store that ``config`` asks for, or what of it is still missing.

    Returns:
        The store, and a report: paired positions and mapped mass, and by cause what was not.

    Raises:
        FusionError: The stores or tokenizers do not belong together, or something lies in the way.
    """
    demand_free(config.output)
    sides = open_sides(config)
    saved = _map(sides)
    identity = _identity(sides, saved.map)
    starts = [shard["first_row"] for shard in sides.pivot_store.manifest["shards"]]
    writer = StoreWriter(config.output, identity, [*starts, len(sides.pivot_store)])
    writer.begin()
    missing = [] if writer.finished else writer.missing()
    if missing:
        for opened in (sides.pivot_store, sides.source_store):
            opened.check()
        if sides.contained is not None and sides.source.sha256 != sides.pivot.sha256:
            sides.corpus = sides.corpus or _count(sides)  # weighs mixtures
        positions = {shard: sides.pivot_store.manifest["shards"][shard]["positions"] for shard in missing}
        with tqdm(
            total=sum(positions.values()), unit="pos", unit_scale=True, desc="align", disable=is_quiet()
        ) as bar:
            for shard in _in_processes(config.workers, sides, _align_shard, missing):
                bar.update(positions[shard])
    if not writer.finished:
        writer.finish()
    store = RepresentationStore(config.output)
    mass = mass_by_id(sides.source_store, sides.maps)
    of_map = coverage(saved.map, sides.source, sides.pivot, mass)
    return store, f"{_report(store.manifest)}\n\nvocabulary map      {saved.path}\n{of_map}"


def _identity(sides: Sides, made: VocabularyMap) -> dict[str, Any]:
    stores = {"pivot_store": sides.pivot_store, "source_store": sides.source_store}
    source, pivot = sides.source_store.identity, sides.pivot_store.identity
    name, revision = sides.places["pivot"]
    matrix = made.matrix
    return {
        "kind": ALIGNED,
        "version": ALIGNED_VERSION,
        "model": source["model"],
        "pivot": name,
        "pivot_revision": revision,
        **{name: sha256_of(store.folder / "manifest.json") for name, store in stores.items()},
        **{name: pivot[name] for name in ("tokenizer", "template", "data", "top_k", "vocabulary")},
        "positions": sides.config.positions,
        "dtw_cost": sides.config.dtw_cost if sides.contained is not None else None,
        "unpaired": sides.config.unpaired,
        "reading": source["reading"],
        "map": made.method,
        "map_sha256": fingerprint([matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tolist()]),
    }


def _map(sides: Sides) -> SavedMap:
    """The vocabulary map."""
    config = sides.config
    identity = {
        "version": RULES,
        "source": sides.source.sha256,
        "pivot": sides.pivot.sha256,
        "method": config.map,
        "ends": [list(sides.ends.source), sides.ends.pivot],
        **({"data": sides.dialogues.fingerprint} if config.map in FROM_CORPUS else {}),
        **({"reading": sides.source_store.identity["reading"]} if config.map in FROM_CORPUS else {}),
        **({"contained": sides.contained, "most": config.most} if config.map in FROM_CORPUS[1:] else {}),
    }

    def corpus() -> Corpus:
        sides.corpus = sides.corpus or _count(sides)
        return sides.corpus

    def build() -> VocabularyMap:
        return build_map(config.map, sides.source, sides.pivot, corpus, config.most, sides.ends)

    saved = saved_map(sides.maps, identity, sides.places, build)
    sides.made = saved.map
    return saved


def _count(sides: Sides) -> Corpus:
    identity = {
        "version": corpora.RULES,
        "source": sides.source.sha256,
        "pivot": sides.pivot.sha256,
        "data": sides.dialogues.fingerprint,
        "reading": sides.source_store.identity["reading"],
        "contained": sides.contained,
    }
    blocks = len(sides.dialogues)

    def count_from(first: int) -> Iterator[tuple[int, Corpus]]:
        starts = range(first, blocks, BLOCKS_AT_ONCE)
        with tqdm(total=blocks, initial=first, unit="block", desc="corpus", disable=is_quiet()) as bar:
            for stop, part in _in_processes(sides.config.workers, sides, _count_blocks, starts):
                bar.update(stop - bar.n)
                yield stop, part

    return saved_counts(sides.maps, identity, blocks, count_from)


# In the processes

_here: Sides | None = None
"""What this process works with."""


def _in_processes(
    workers: int | None, sides: Sides, work: Callable[[Sides, int], Any], tasks: Iterable[int]
) -> Iterator[Any]:
    """Results of ``work`` for every task, in order."""
    tasks = list(tasks)
    number = min(workers or os.cpu_count() or 1, len(tasks))
    if number <= 1:
        for task in tasks:
            yield work(sides, task)
        return
    handed = (sides.config, sides.made, sides.corpus, os.getpid())
    with ProcessPoolExecutor(number, get_context("spawn"), _begin_process, handed) as pool:
        try:
            yield from pool.map(partial(_in_process, work), tasks)  # drops each result once it is taken
        except BrokenProcessPool as error:
            raise FusionError(
                "a worker process was ended from outside, most likely because memory ran out; run the same "
                f"command again with fewer --workers than {number}: it goes on where it stopped"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process(config: AlignConfig, made: VocabularyMap | None, corpus: Corpus | None, parent: int) -> None:
    global _here
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _here = open_sides(config, checked=True)
    _here.made, _here.corpus = made, corpus


def _end_with(parent: int) -> None:
    """Do not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_process(work: Callable[[Sides, int], Any], task: int) -> Any:
    assert _here is not None
    return work(_here, task)


def _count_blocks(sides: Sides, start: int) -> tuple[int, Corpus]:
    stop = min(start + BLOCKS_AT_ONCE, len(sides.dialogues))
    blocks = [sides.dialogues[number] for number in range(start, stop)]
    return stop, count(blocks, sides.source_reader, sides.pivot_reader, sides.contained)


def _align_shard(sides: Sides, shard: int) -> int:
    described = sides.pivot_store.manifest["shards"][shard]
    numbers = range(described["first_row"], described["first_row"] + described["rows"])
    blocks = [sides.dialogues[number] for number in numbers]
    rows, totals = [], Counter[str]()
    both = zip(read_blocks(sides.pivot_reader, blocks), read_blocks(sides.source_reader, blocks), strict=True)
    for number, (of_pivot, of_source) in zip(numbers, both, strict=True):
        row, counts = _align_row(sides, number, of_pivot, of_source)
        rows.append(row)
        totals.update(counts)
    starts = [*(one["first_row"] for one in sides.pivot_store.manifest["shards"]), len(sides.pivot_store)]
    writer = StoreWriter(sides.config.output, None, starts)
    writer.join()
    facts = {"positions": sum(map(len, rows)), **{name: totals[name] for name in CAUSES}}
    writer.write(shard, [(block.conversation, block.block) for block in blocks], rows, facts)
    writer.wait()
    return shard


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


def _align_row(sides: Sides, number: int, of_pivot: Read, of_source: Read) -> tuple[Aligned, Counter[str]]:
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


def _report(manifest: dict[str, Any]) -> str:
    positions, paired = manifest["positions"], manifest["paired"]
    mass = {
        name: manifest[f"{name}_ppm"] / 1e6 / max(1, paired)
        for name in ("mass", "unmapped", "beyond", "source_tail")
    }
    share = 1 / max(1, positions)
    ends, ends_paired = manifest["ends"], manifest["ends_paired"]
    of_ends = manifest["ends_ppm"] / 1e6 / max(1, ends_paired)
    rows = max(1, manifest["compared"])
    alone = "no common boundary" if manifest["identity"]["positions"] == "boundary" else "no token fits by rule"
    return "\n".join(
        [
            f"positions               {positions:>12,}",
            f"paired                  {paired:>12,}  {paired * share:.2%}",
            *(
                f"  {cause:21} {manifest[name]:>12,}  {manifest[name] * share:.2%}"
                for cause, name in ((alone, "no_partner"), *NOT_STORED)
            ),
            f"of a paired position's mass mapped {mass['mass']:.2%}, ids without image {mass['unmapped']:.2%}, "
            f"beyond the k kept {mass['beyond']:.2%}, the source's tail {mass['source_tail']:.2%}",
            f"ends of answers         {ends:>12,}  paired {ends_paired:,} ({ends_paired / max(1, ends):.2%}); "
            f"the pivot's end gets {of_ends:.2%} there",
            f"source better in blocks {manifest['better_by_byte']:>12,}  of {manifest['compared']:,} per byte "
            f"({manifest['better_by_byte'] / rows:.1%}); per token {manifest['better_by_token']:,} "
            f"({manifest['better_by_token'] / rows:.1%})",
        ]
    )
