"""A source's store and the pivot's → the source's distributions in the pivot's positions and ids.

Shards are aligned in several processes. Each shard appears only when it is complete and depends on its rows alone,
so an interrupted run resumes and ends with the same bytes.

Answers are compared one by one. A position of the pivot gets the source's distribution

* with ``boundary``: if a token of the source ends at the same byte of the answer;
* with ``dtw``: if one source token that contains the pivot's token was warped onto it, or several, of which one
  equals or contains it, or which together spell it (then their mixture, weighted by how often the corpus pairs
  them);
* with both: if both predict the end of the answer, whatever each model calls it;

and keeps the pivot's own distribution otherwise."""

from collections import Counter
from functools import partial
from typing import Any

from tqdm import tqdm

from fusion_trainer.alignment import pair_counts
from fusion_trainer.alignment.align_row import align_row
from fusion_trainer.alignment.co_occurrence import BLOCKS, Neighbours, count_neighbours
from fusion_trainer.alignment.coverage import coverage, mass_by_id
from fusion_trainer.alignment.pair_counts import Corpus, count, load_counts, save_counts
from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.alignment.saved_map import Places, SavedMap, build_map, saved_map
from fusion_trainer.alignment.sides import Sides, in_processes, open_sides
from fusion_trainer.alignment.vocabulary import RULES, VocabularyMap
from fusion_trainer.config import AlignConfig
from fusion_trainer.representations import store
from fusion_trainer.representations.store import Representation, RepresentationStore
from fusion_trainer.representations.store_tokenizer import place_of
from fusion_trainer.representations.store_writer import StoreWriter, demand_free
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import fingerprint
from varm_common.saved_arrays import path_of

__all__ = ["align"]

FROM_CORPUS = ("min_edit_distance", "co_occurrence", "statistics", "statistics_published")
"""Maps that depend on the data."""
FROM_PAIRS = ("statistics", "statistics_published")
"""Maps that depend on which tokens were paired."""
BLOCKS_AT_ONCE = 64
"""Blocks that a process tokenises in one go."""
KEPT_EVERY = 4096
"""Blocks counted between two saves of the counts."""


def align(config: AlignConfig) -> tuple[RepresentationStore, str]:
    """Make the aligned store that ``config`` describes; what is already there is kept.

    Returns:
        The store, and a report: how many positions are paired and how much probability is mapped, and the causes
        of the rest.

    Raises:
        UserError: The stores or tokenizers do not belong together, or the output folder holds something else.
    """
    demand_free(config.output)
    sides = open_sides(config)
    _demand_known(sides)
    saved = _saved_map(sides)
    sides.map = saved.map
    shards = sides.pivot_store.manifest["shards"]
    starts = [*(shard["first_row"] for shard in shards), len(sides.pivot_store)]
    writer = StoreWriter(config.output, _identity(sides, saved), starts)
    writer.begin()
    if not writer.finished:
        if missing := writer.missing():
            sides.pivot_store.check()
            sides.source_store.check()
            if sides.contained is not None and sides.source.sha256 != sides.pivot.sha256:
                _corpus(sides)  # weighs mixtures
        total = sum(shards[shard]["positions"] for shard in missing)
        with tqdm(total=total, unit="pos", unit_scale=True, desc="align", disable=is_quiet()) as bar:
            for shard, rows, facts in in_processes(sides, _align_shard, missing):
                writer.write(shard, rows, facts)
                bar.update(facts["positions"])
        writer.wait()
        writer.finish()
    aligned = RepresentationStore(config.output)
    covered = coverage(saved.map, sides.source, sides.pivot, mass_by_id(sides.source_store, sides.maps))
    return aligned, f"{_report(aligned.manifest)}\n\nvocabulary map      {saved.path}\n{covered}"


def _demand_known(sides: Sides) -> None:
    """Refuse what needs probabilities that an imported store does not have."""
    needs = {"spread": ("tail", "gold_logprob"), "chunks": ("gold_logprob",)}
    for option, columns in needs.items():
        unknown = [column for column in columns if column in sides.source_store.unknown]
        if getattr(sides.config, option) and unknown:
            raise UserError(
                f"`{option}` (--{option}) needs `{'` and `'.join(unknown)}`, which is not known everywhere in "
                f"`{sides.source_store.folder}`: it was imported from published logits. Leave the option out"
            )


def _identity(sides: Sides, saved: SavedMap) -> dict[str, Any]:
    source, pivot = sides.source_store.identity, sides.pivot_store.identity
    name, revision = _places(sides)["pivot"]
    matrix = saved.map.matrix
    unknown = sorted({*sides.source_store.unknown, *sides.pivot_store.unknown})
    return {
        "kind": store.ALIGNED,
        "version": store.WITH_CHUNKS if sides.config.chunks else store.ALIGNED_VERSION,
        "model": source["model"],
        "pivot": name,
        "pivot_revision": revision,
        "pivot_store": sides.pivot_store.sha256,
        "source_store": sides.source_store.sha256,
        **{name: pivot[name] for name in ("tokenizer", "template", "data", "top_k", "vocabulary")},
        "positions": sides.config.positions,
        "dtw_cost": sides.config.dtw_cost if sides.contained is not None else None,
        "unpaired": sides.config.unpaired,
        **({"spread": True} if sides.config.spread else {}),
        "reading": source["reading"],
        "map": saved.map.method,
        "map_sha256": fingerprint([matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tolist()]),
        **({"unknown": unknown} if unknown else {}),
    }


def _places(sides: Sides) -> Places:
    source = place_of(sides.source_store, sides.config.source_tokenizer)
    return {"source": source, "pivot": place_of(sides.pivot_store, sides.config.pivot_tokenizer)}


def _saved_map(sides: Sides) -> SavedMap:
    """The vocabulary map, built if it is not there."""
    config = sides.config
    identity: dict[str, Any] = {"version": RULES, "source": sides.source.sha256, "pivot": sides.pivot.sha256}
    identity |= {"method": config.map, "ends": [list(sides.ends.source), sides.ends.pivot]}
    if config.map in FROM_CORPUS:
        identity |= {"data": sides.dialogues.fingerprint, "reading": sides.source_store.identity["reading"]}
    if config.map in FROM_PAIRS:
        identity |= {"contained": sides.contained, "most": config.most}
    corpus, neighbours = partial(_corpus, sides), partial(_neighbours, sides)

    def build() -> VocabularyMap:
        return build_map(config.map, sides.source, sides.pivot, corpus, config.most, sides.ends, neighbours)

    return saved_map(sides.maps, identity, _places(sides), build)


def _corpus(sides: Sides) -> Corpus:
    """Counts over the dialogues, made once. They are saved regularly, so that an interrupted count resumes."""
    if sides.corpus is not None:
        return sides.corpus
    tokenizers = {"source": sides.source.sha256, "pivot": sides.pivot.sha256}
    data = {"data": sides.dialogues.fingerprint, "reading": sides.source_store.identity["reading"]}
    identity = {"version": pair_counts.RULES, **tokenizers, **data, "contained": sides.contained}
    path = path_of(sides.maps, "corpus", identity)
    blocks = len(sides.dialogues)
    total, saved = load_counts(path, identity) if path.is_file() else (None, 0)
    starts = range(saved, blocks, BLOCKS_AT_ONCE)
    with tqdm(total=blocks, initial=saved, unit="block", desc="corpus", disable=not starts or is_quiet()) as bar:
        for stop, part in in_processes(sides, _count_blocks, starts):
            bar.update(stop - bar.n)
            total = part if total is None else total + part
            if stop - saved >= KEPT_EVERY or stop == blocks:
                save_counts(path, identity, total, stop)
                saved = stop
    assert total is not None
    sides.corpus = total
    return total


def _neighbours(sides: Sides) -> Neighbours:
    """Counts over some blocks that are spread over all dialogues."""
    step = -(-len(sides.dialogues) // BLOCKS)
    blocks = [sides.dialogues[number] for number in range(0, len(sides.dialogues), step)]
    return count_neighbours(blocks, sides.source_reader, sides.pivot_reader)


def _count_blocks(sides: Sides, start: int) -> tuple[int, Corpus]:
    stop = min(start + BLOCKS_AT_ONCE, len(sides.dialogues))
    blocks = [sides.dialogues[number] for number in range(start, stop)]
    return stop, count(blocks, sides.source_reader, sides.pivot_reader, sides.contained)


def _align_shard(sides: Sides, shard: int) -> tuple[int, list[Representation], dict[str, int]]:
    """The rows of a shard, and what the manifest counts of them."""
    described = sides.pivot_store.manifest["shards"][shard]
    numbers = range(described["first_row"], described["first_row"] + described["rows"])
    rows, totals = [], Counter[str]()
    for first in range(0, len(numbers), BLOCKS_AT_ONCE):  # a tokenizer's output is larger than all that is kept
        here = numbers[first : first + BLOCKS_AT_ONCE]
        blocks = [sides.dialogues[number] for number in here]
        both = zip(read_blocks(sides.pivot_reader, blocks), read_blocks(sides.source_reader, blocks), strict=True)
        for number, (pivot, source) in zip(here, both, strict=True):
            row, counts = align_row(sides, number, pivot, source)
            rows.append(row)
            totals.update(counts)
    return shard, rows, {"positions": sum(map(len, rows)), **totals}


def _report(manifest: dict[str, Any]) -> str:
    names = ("positions", "paired", "ends", "ends_paired", "compared", "better_by_byte", "better_by_token")
    positions, paired, ends, ends_paired, compared, by_byte, by_token = (manifest[name] for name in names)
    sums = (manifest[f"{name}_ppm"] / 1e6 for name in ("mass", "unmapped", "beyond", "source_tail"))
    mass, unmapped, beyond, tail = (_share(part, paired) for part in sums)
    boundary = manifest["identity"]["positions"] == "boundary"
    causes = {
        "no_partner": "no common boundary" if boundary else "no token fits by dtw's rules",
        "not_supervised": "paired position not supervised",
        "not_read": "beyond the context",
    }

    def counted(label: str, number: int) -> str:
        return f"{label:23} {number:>12,}  {_share(number, positions):.2%}"

    lines = [f"positions               {positions:>12,}", counted("paired", paired)]
    lines += [counted(f"  {cause}", manifest[name]) for name, cause in causes.items()]
    if "spread" in manifest:
        lines.append(counted("inside a source's token", manifest["spread"]) + " learn from it, too")
    if "chunk_positions" in manifest:
        lines.append(counted("in a common chunk", manifest["chunk_positions"]))
    lines += [
        f"probability at paired positions: mapped {mass:.2%}, of ids without an image {unmapped:.2%}, outside the "
        f"k entries kept {beyond:.2%}, the source's tail {tail:.2%}",
        f"ends of answers         {ends:>12,}  paired {ends_paired:,} ({_share(ends_paired, ends):.2%}); "
        f"the pivot's end token gets {_share(manifest['ends_ppm'] / 1e6, ends_paired):.2%} there",
        f"source better in blocks {by_byte:>12,}  of {compared:,} per byte ({_share(by_byte, compared):.1%}); per "
        f"token {by_token:,} ({_share(by_token, compared):.1%})",
    ]
    return "\n".join(lines)


def _share(part: float, whole: int) -> float:
    return part / max(1, whole)
