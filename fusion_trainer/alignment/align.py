"""A source's store and the pivot's → the source's distributions in the pivot's positions and ids.

Shard by shard, in several processes; each shard appears whole or not at all and depends on its rows alone, so that
a run that was stopped goes on where it was and ends with the same bytes.

Answers are laid side by side. A position of the pivot gets the source's distribution

* with ``boundary``: where a token of the source ends at the same byte of the answer;
* with ``dtw``: where one source token that contains the pivot's was warped onto it, or several, of which one
  equals or else contains it, or which make it up together (then their mixture, weighted by how often the corpus
  pairs them);
* with both: where both predict the end of the answer, whatever each model calls it;

and keeps the pivot's own otherwise."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fusion_trainer.alignment import pair_counts as corpora
from fusion_trainer.alignment.align_row import CAUSES, NOT_STORED, Sides, align_row
from fusion_trainer.alignment.pair_counts import Corpus, count, saved_counts
from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.alignment.saved_map import SavedMap, build_map, coverage, mass_by_id, saved_map
from fusion_trainer.alignment.vocabulary import RULES, VocabularyMap
from fusion_trainer.config import AlignConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader, reader_of_store
from fusion_trainer.representations.store import ALIGNED, ALIGNED_VERSION, RepresentationStore
from fusion_trainer.representations.store_tokenizer import tokenizer_of
from fusion_trainer.representations.store_writer import StoreWriter, demand_free
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import fingerprint, sha256_of

__all__ = [
    "align",
    "open_sides",
]

FROM_CORPUS = ("min_edit_distance", "statistics", "statistics_published")
"""Maps that depend on the data."""
BLOCKS_AT_ONCE = 64
"""Of the corpus, in one process's hands."""


def open_sides(config: AlignConfig, checked: bool = False) -> Sides:
    """Open all that an alignment needs.

    Args:
        config: What to align.
        checked: Whether another process has held the stores against their hashes.

    Raises:
        UserError: The stores are not of the same dialogues, or a tokenizer is not the one a store was made with.
    """
    pivot_store, source_store = (
        RepresentationStore(folder, checked) for folder in (config.pivot_store, config.source_store)
    )
    source_store.demand(data=pivot_store.identity["data"])
    dialogues = Dialogues(config.dialogues or _beside(pivot_store))
    pivot_store.demand(data=dialogues.fingerprint)
    for store in (pivot_store, source_store):
        if store.identity.get("kind") == ALIGNED:
            raise UserError(f"the store `{store.folder}` is already aligned; give the source's own")
    if pivot_store.identity["reading"] != DIALOGUES:
        raise UserError(
            f"the store `{pivot_store.folder}` is not the pivot's: its model was queried in a template of its own"
        )
    pivot = tokenizer_of(pivot_store, config.pivot_tokenizer, config.trust_remote_code)
    source = tokenizer_of(source_store, config.source_tokenizer, config.trust_remote_code)
    readers = Reader(pivot, DIALOGUES), reader_of_store(source_store.identity, source)
    return Sides(config, pivot_store, source_store, dialogues, *readers)


def _beside(store: RepresentationStore) -> Path:
    found = Dialogues.beside(store.folder, store.identity["data"])
    if found is None:
        raise UserError(f"no dialogues of the store `{store.folder}` lie beside it; name them with --dialogues")
    return found.folder


def align(config: AlignConfig) -> tuple[RepresentationStore, str]:
    """Make the aligned store that ``config`` asks for, or what of it is still missing.

    Returns:
        The store, and a report: paired positions and mapped mass, and by cause what was not.

    Raises:
        UserError: The stores or tokenizers do not belong together, or something lies in the way.
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
            raise UserError(
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
        row, counts = align_row(sides, number, of_pivot, of_source)
        rows.append(row)
        totals.update(counts)
    starts = [*(one["first_row"] for one in sides.pivot_store.manifest["shards"]), len(sides.pivot_store)]
    writer = StoreWriter(sides.config.output, None, starts)
    writer.join()
    facts = {"positions": sum(map(len, rows)), **{name: totals[name] for name in CAUSES}}
    writer.write(shard, [(block.conversation, block.block) for block in blocks], rows, facts)
    writer.wait()
    return shard


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
