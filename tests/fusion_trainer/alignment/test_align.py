"""``fusion-trainer align`` from stores of tiny models to aligned ones, against text, models and maps."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import tiny_tokenizers
import tokenizer_zoo
import torch
from click.testing import CliRunner, Result
from test_positions import transcription
from tiny_sources import END_OF_TURN
from tokenizer_zoo import Kind
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

import fusion_trainer.alignment.align as alignment
import fusion_trainer.alignment.align_row as align_row
from fusion_trainer.alignment.align import align
from fusion_trainer.alignment.positions import CONTAINED
from fusion_trainer.alignment.saved_map import load_map
from fusion_trainer.alignment.sides import in_processes, open_sides
from fusion_trainer.alignment.spread import conditional
from fusion_trainer.alignment.vocabulary import METHODS
from fusion_trainer.cli import main
from fusion_trainer.config import AlignConfig, ExtractConfig
from fusion_trainer.representations.extract import extract
from fusion_trainer.representations.store import RepresentationStore
from varm_common.errors import UserError

CHATS = [tuple(chat) for chat in tiny_sources.made_up_chats(20, words=12, turns=2)]
PIVOT = Kind("pivot", tiny_tokenizers.shared("sentencepiece_bpe", (END_OF_TURN,)), before="pieces")
SOURCES = {
    "bytes": Kind("bytes", tiny_tokenizers.shared("byte_level_bpe", (END_OF_TURN,))),
    "unigram": Kind("unigram", tiny_tokenizers.shared("unigram"), before="first", unless_there=True),
    "gemma": tokenizer_zoo.gemma(size=450),
}
LAYOUTS = {
    "bytes": "mistral",
    "unigram": "llama",
    "gemma": "mistral",
}  # Qwen2 and Gemma bring their own tokenizers
K = {"unigram": 6}
CONTEXTS = {"short": 70, "shorter": 35}
"""Of sources that do not read to the end; the second not even to every first answer."""
COLUMNS = ("ids", "logprobs", "tail", "gold_logprob")


def save(folder: Path, layout: str, tokenizer: Any, **own: Any) -> Path:
    tokenizer.save_pretrained(folder)
    tiny_sources.new_source(layout, len(tokenizer), **own).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``stores/<model>`` of a pivot, three sources of other kinds, a twin, one with more tokens, a short one."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    save(folder / "pivot", "mistral", PIVOT.tokenizer)
    for name, source in SOURCES.items():
        save(folder / name, LAYOUTS[name], source.tokenizer)
    save(folder / "twin", "mixtral", PIVOT.tokenizer, seed=3)
    more = tiny_tokenizers.train("sentencepiece_bpe", special=(END_OF_TURN, "<|more|>", "<|and more|>"))
    save(folder / "more", "llama", more)
    for name, context in CONTEXTS.items():
        save(folder / name, "mistral", SOURCES["bytes"].tokenizer, max_position_embeddings=context)
    for name in ("pivot", *SOURCES, "twin", "more", *CONTEXTS):
        extract_store(folder, name, top_k=K.get(name, 10))
    return folder


def extract_store(world: Path, name: str, output: Path | None = None, **changed: Any) -> RepresentationStore:
    settings = {
        "data": [str(world / "chats.jsonl")],
        "pivot": str(world / "pivot"),
        "template": "openchat",
        "source_template": "pivot",
        "model": str(world / name),
        "output": output or world / "stores" / name,
        "shard_tokens": 150,
    }
    return extract(ExtractConfig(**{**settings, **changed}))


def settings_of(world: Path, source: str, output: Path, **changed: Any) -> dict[str, Any]:
    stores = {"source_store": world / "stores" / source, "pivot_store": world / "stores" / "pivot"}
    return {**stores, "output": output, "maps": world / "maps", "workers": 1, **changed}


def aligned(world: Path, source: str, output: Path, **changed: Any) -> tuple[RepresentationStore, str]:
    return align(AlignConfig(**settings_of(world, source, output, **changed)))


def run(command: str, settings: dict[str, Any]) -> Result:
    """``fusion-trainer`` in this process; a traceback fails the test."""
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(main, [*command.split(), *flags])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(command: str, settings: dict[str, Any]) -> str:
    result = run(command, settings)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.output.count("Error: ") == 1
    return result.output[result.output.index("Error: ") :]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The truth of one conversation


Name = tuple[int, int, bytes]
"""An answer, which byte of it follows (``THE_END``: its end of turn), and what of the template the token takes."""
THE_END = -1


@dataclass(frozen=True)
class Read:
    """A conversation as one tokenizer reads it.

    Ids, ends, the positions at which its model is queried, and the name of what those that have read whole
    characters predict.
    """

    ids: list[int]
    ends: list[int]
    positions: list[int]
    names: dict[int, Name]
    closing: dict[int, int] = field(default_factory=dict)
    """The token that ends with the content of an answer."""

    def content(self, answer: int) -> list[int]:
        """The positions that predict content of an answer."""
        return [at for at, name in self.names.items() if name[0] == answer and name[1] != THE_END]

    def at(self, name: Name) -> int | None:
        return next((at for at, one in self.names.items() if one == name), None)

    def up_to(self, context: int) -> "Read":
        """As far as a model reads that has no longer context."""
        stored = [position for position in self.positions if position + 1 < context]
        return Read(self.ids[:context], self.ends[:context], stored, self.names)


@cache
def read(one: Kind, chat: tuple[tuple[str, str], ...]) -> Read:
    has_end = END_OF_TURN in one.tokenizer.get_vocab()
    text, spans = tiny_sources.openchat(chat, has_end)
    raw = text.encode()
    answers = tiny_sources.openchat(chat, False)[1]
    (tokens,) = one.reader.encode([text])
    ends, last = one.truth(tokens, text), one.last_read(tokens, text)
    inside = [any(start < end <= stop for start, stop in spans) for end in ends]
    positions = [position for position in range(len(ends) - 1) if inside[position + 1]]
    names: dict[int, Name] = {}
    for position in positions:
        end, following = ends[position], ends[position + 1]
        for number, (start, stop) in enumerate(answers):
            if last[end] == position and following > start and end < stop:
                names[position] = (number, max(end, start) - start, raw[end:start])
            elif last[end] == position and end == stop:
                names[position] = (number, THE_END, b"")
    found = {number: last.get(stop) for number, (_, stop) in enumerate(answers)}
    closing = {number: token for number, token in found.items() if token is not None}
    return Read(tokens.ids.tolist(), ends, positions, names, closing)


Partners = list[list[tuple[int, float]] | None]


def rows_of(pivot: Read, source: Read, partners: dict[int, list[tuple[int, float]]]) -> Partners:
    """The partners as rows of the source's store; None where one of them is not in it."""
    found: Partners = []
    for position in pivot.positions:
        mixture = partners.get(position, [])
        stored = mixture and all(place in source.positions for place, _ in mixture)
        found.append([(source.positions.index(place), weight) for place, weight in mixture] if stored else None)
    return found


def partners_by_bytes(pivot: Read, source: Read) -> Partners:
    """For each position of the pivot the row of the source's store that predicts the same byte or end."""
    partners = {position: source.at(name) for position, name in pivot.names.items()}
    return rows_of(pivot, source, {i: [(j, 1.0)] for i, j in partners.items() if j is not None})


def warped(pivot: Read, source: Read, kinds: tuple[Kind, Kind]) -> Iterator[tuple[int, int]]:
    """The tokens that warping brings together, answer by answer."""
    for answer in sorted({name[0] for name in pivot.names.values()}):
        tokens = [[place + 1 for place in each.content(answer)] for each in (pivot, source)]
        words = [
            [kind.reader.words[each.ids[token]] for token in some]
            for kind, each, some in zip(kinds, (pivot, source), tokens, strict=True)
        ]
        for i, j in transcription(words[0], words[1], CONTAINED["fusechat"]):
            yield tokens[0][i], tokens[1][j]


def partners_by_the_papers(
    pivot: Read, source: Read, kinds: tuple[Kind, Kind], weigh: Callable[[int, int], float]
) -> Partners:
    """The rules for what time warping has paired, and mixtures by the counts that ``weigh`` gives."""
    path = [
        (i, j)
        for i, j in warped(pivot, source, kinds)
        if pivot.names.get(i, (0, THE_END))[1] != THE_END and source.names.get(j, (0, THE_END))[1] != THE_END
    ]
    partners: dict[int, list[tuple[int, float]]] = {}
    for position, name in pivot.names.items():
        own = PIVOT.reader.words[pivot.ids[position]]
        if name[1] == THE_END or position == pivot.content(name[0])[0]:
            other = source.at(name)
            partners[position] = [] if other is None else [(other, 1.0)]
            continue
        places = [j for i, j in path if i == position]
        words = {j: kinds[1].reader.words[source.ids[j]] for j in places}
        equal = [j for j in places if words[j] == own]
        containing = [j for j in places if own in words[j]]
        if equal or containing:
            partners[position] = [((equal or containing)[0], 1.0)]
        elif "".join(words[j] for j in places) == own:
            counts = [weigh(source.ids[j], pivot.ids[position]) for j in places]
            total = sum(counts)
            partners[position] = [
                (j, n / total if total else 1 / len(places)) for j, n in zip(places, counts, strict=True)
            ]
    return rows_of(pivot, source, partners)


def sizes_that_follow(reading: Read) -> list[int]:
    """Of every supervised position the bytes of its next token."""
    return [reading.ends[position + 1] - reading.ends[position] for position in reading.positions]


def assert_gold_bytes(row: Any, partners: Partners, pivot: Read, source: Read) -> None:
    """The source's next token where there is a partner, of several their mean; else the pivot's; never none."""
    own, theirs = sizes_that_follow(pivot), sizes_that_follow(source)
    ends = [pivot.names.get(position, (0, 0))[1] == THE_END for position in pivot.positions]
    means = [
        size if mixture is None or end else sum(weight * theirs[place] for place, weight in mixture)
        for size, mixture, end in zip(own, partners, ends, strict=True)
    ]
    assert row.gold_bytes.dtype == np.uint16
    assert row.gold_bytes.tolist() == [max(1, round(mean)) for mean in means]


def assert_row(row: Any, own: Any, source: Any, partners: Partners, dense_SP: np.ndarray) -> None:
    """Where there is a partner, its distribution in float64 through the whole map; else the pivot's own bits."""
    assert row.paired.tolist() == [int(mixture is not None) for mixture in partners]
    k = own.ids.shape[1]
    for position, mixture in enumerate(partners):
        if mixture is None:
            for name in COLUMNS:
                assert getattr(row, name)[position].tobytes() == getattr(own, name)[position].tobytes()
            continue
        whole, gold, total = np.zeros(dense_SP.shape[1]), 0.0, 0.0
        for place, weight in mixture:
            shares = np.exp(source.logprobs[place].astype(np.float64))
            whole += weight * (shares @ dense_SP[source.ids[place]])
            gold += weight * float(source.gold_logprob[place])
            total += weight * (shares.sum() + float(source.tail[place]))
        best = -np.sort(-whole)[:k]
        np.testing.assert_allclose(np.exp(row.logprobs[position].astype(np.float64)), best, rtol=5e-3, atol=1e-7)
        np.testing.assert_allclose(whole[row.ids[position]], best, rtol=1e-5, atol=1e-9)
        assert float(row.tail[position]) == pytest.approx(min(1, total - best.sum()), abs=6e-4)
        assert float(row.gold_logprob[position]) == pytest.approx(gold, rel=1e-3, abs=1e-6)


def the_map(folder: Path, store: RepresentationStore, source: str) -> np.ndarray:
    """The map a store was made with, from its file, dense."""
    wanted = {
        "source": SOURCES[source].reader.sha256,
        "pivot": PIVOT.reader.sha256,
        "method": store.identity["map"],
    }
    if "statistics" in wanted["method"]:
        wanted["contained"] = None if store.identity["positions"] == "boundary" else CONTAINED["fusechat"]
    for path in folder.glob("vocab-map-*.safetensors"):
        saved = load_map(path)
        if all(saved.identity[name] == value for name, value in wanted.items()):
            return saved.map.matrix.toarray().astype(np.float64)
    raise AssertionError("no such map")


def assert_verified(store: RepresentationStore) -> None:
    assert list(store.problems()) == []
    result = CliRunner().invoke(main, ["store", "verify", str(store.folder)])
    assert (result.exit_code, "no problems" in result.output) == (0, True), result.output


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", SOURCES)
def test_aligned_by_bytes_every_position_is_what_text_and_map_say(
    source: str, method: str, world: Path, tmp_path: Path
) -> None:
    store, _ = aligned(world, source, tmp_path / "aligned", map=method)
    assert_verified(store)
    own, theirs = (RepresentationStore(world / "stores" / name) for name in ("pivot", source))
    dense_SP = the_map(world / "maps", store, source)
    paired = 0
    for number, chat in enumerate(CHATS):
        pivot, other = read(PIVOT, chat), read(SOURCES[source], chat)
        partners = partners_by_bytes(pivot, other)
        assert_row(store[number], own[number], theirs[number], partners, dense_SP)
        assert_gold_bytes(store[number], partners, pivot, other)
        assert (store[number].conversation, store[number].block) == (f"chat-{number}", 0)
        paired += sum(mixture is not None for mixture in partners)
    assert 0.2 < paired / store.manifest["positions"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", SOURCES)
def test_aligned_by_warping_every_position_is_what_the_papers_rules_say(
    source: str, method: str, world: Path, tmp_path: Path
) -> None:
    store, _ = aligned(world, source, tmp_path / "aligned", map=method, positions="dtw")
    assert_verified(store)
    own, theirs = (RepresentationStore(world / "stores" / name) for name in ("pivot", source))
    dense_SP, counts = the_map(world / "maps", store, source), warped_counts(source)
    for number in range(0, len(CHATS), 4):
        pivot, other = read(PIVOT, CHATS[number]), read(SOURCES[source], CHATS[number])
        partners = partners_by_the_papers(
            pivot, other, (PIVOT, SOURCES[source]), lambda s, p: counts.get((s, p), 0)
        )
        assert_row(store[number], own[number], theirs[number], partners, dense_SP)
        assert_gold_bytes(store[number], partners, pivot, other)


@cache
def warped_counts(source: str) -> dict[tuple[int, int], int]:
    """How often warping pairs two tokens over the data."""
    counts: dict[tuple[int, int], int] = {}
    for chat in CHATS:
        pivot, other = read(PIVOT, chat), read(SOURCES[source], chat)
        for i, j in warped(pivot, other, (PIVOT, SOURCES[source])):
            pair = other.ids[j], pivot.ids[i]
            counts[pair] = counts.get(pair, 0) + 1
    return counts


def test_several_images_of_statistics_are_weighed(world: Path, tmp_path: Path) -> None:
    store, report = aligned(world, "bytes", tmp_path / "aligned", map="statistics", most=3, maps=tmp_path / "maps")
    assert_verified(store)
    (path,) = (tmp_path / "maps").glob("vocab-map-*.safetensors")
    made = load_map(path).map
    assert np.diff(made.matrix.indptr).max() > 1
    dense_SP = made.matrix.toarray().astype(np.float64)
    own, theirs = (RepresentationStore(world / "stores" / name) for name in ("pivot", "bytes"))
    for number, chat in enumerate(CHATS[:6]):
        partners = partners_by_bytes(read(PIVOT, chat), read(SOURCES["bytes"], chat))
        assert_row(store[number], own[number], theirs[number], partners, dense_SP)
    assert "method              statistics" in report


# Identical tokenizers


@pytest.mark.parametrize("positions", ["boundary", "dtw"])
@pytest.mark.parametrize("method", ["prefix", "statistics"])
@pytest.mark.parametrize("source", ["pivot", "twin"])
def test_with_the_same_tokenizer_the_aligned_store_is_the_sources_to_the_bit(
    source: str, method: str, positions: str, world: Path, tmp_path: Path
) -> None:
    """Also where the pivot's own is another model's. What the source gives to its EOS is the end of turn's."""
    store, report = aligned(world, source, tmp_path / "aligned", map=method, positions=positions)
    assert_verified(store)
    theirs = RepresentationStore(world / "stores" / source)
    assert store.manifest["paired"] == store.manifest["positions"] == theirs.manifest["positions"]
    assert store.identity["map"] == "identical"
    assert "100.00%" in report
    same = 0
    for row, original in zip(store, theirs, strict=True):
        assert row.paired is not None
        assert row.paired.all()
        without = (original.ids != PIVOT.tokenizer.eos_token_id).all(1)
        same += int(without.sum())
        for name in COLUMNS:
            assert getattr(row, name).dtype == getattr(original, name).dtype
            assert getattr(row, name)[without].tobytes() == getattr(original, name)[without].tobytes(), name
        assert not (row.ids[row.logprobs > -np.inf] == PIVOT.tokenizer.eos_token_id).any()
    assert same > 0.8 * store.manifest["positions"]


def test_tokens_that_only_one_side_has_added_change_no_other_bit(world: Path, tmp_path: Path) -> None:
    """Each added token is an id without image here."""
    store, _ = aligned(world, "more", tmp_path / "aligned")
    assert_verified(store)
    assert store.identity["map"] == "identical"
    assert store.manifest["paired"] == store.manifest["positions"]
    added = {*range(len(PIVOT.tokenizer), len(PIVOT.tokenizer) + 2), PIVOT.tokenizer.eos_token_id}
    same = 0
    for row, original in zip(store, RepresentationStore(world / "stores" / "more"), strict=True):
        without = ~np.isin(original.ids, list(added)).any(1)
        for name in COLUMNS:
            assert getattr(row, name)[without].tobytes() == getattr(original, name)[without].tobytes(), name
        same += int(without.sum())
        assert not np.isin(row.ids, list(added)).any()
    assert 0 < same < store.manifest["positions"]


# Cross-entropies


@torch.no_grad()
def nats(folder: Path, reading: Read, positions: Sequence[int]) -> float:
    """What a model's predictions at some positions cost, in float64."""
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=torch.tensor([reading.ids])).logits[0]
    logprobs = logits.double().log_softmax(-1)
    return -sum(float(logprobs[position, reading.ids[position + 1]]) for position in positions)


def in_common(pivot: Read, source: Read, chat: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], int]:
    """The positions of both that predict the same bytes of the answers, and how many bytes; an end is one."""
    found: tuple[list[int], list[int]] = [], []
    size = 0
    for number, (_, answer) in enumerate(chat):
        both = [
            {one.names[at][1]: at for at in one.content(number) if at in one.positions} for one in (pivot, source)
        ]
        whole = all(len(some) == len(one.content(number)) for some, one in zip(both, (pivot, source), strict=True))
        limit = len(answer.encode()) if whole else max(both[0].keys() & both[1].keys(), default=0)
        size += limit
        ends = [one.at((number, THE_END, b"")) for one in (pivot, source)]
        closed = whole and all(end in one.positions for end, one in zip(ends, (pivot, source), strict=True))
        size += closed
        for positions, some, end in zip(found, both, ends, strict=True):
            positions += [at for byte, at in some.items() if byte < limit]
            positions += [end] if closed and end is not None else []
    return *found, size


def assert_cross_entropies(row: Any, world: Path, source: str, pivot: Read, other: Read, chat: Any) -> bool:
    """Those of both models over the same bytes; NaN where there are none."""
    *both, size = in_common(pivot, other, chat)
    sides = (("pivot", pivot, "pivot_ce"), (source, other, "ce"))
    for (folder, reading, name), positions in zip(sides, both, strict=True):
        if not size:
            assert math.isnan(getattr(row, f"{name}_per_token"))
            assert math.isnan(getattr(row, f"{name}_per_byte"))
            continue
        total = nats(world / folder, reading, positions)
        assert getattr(row, f"{name}_per_token") == pytest.approx(total / len(positions), rel=1e-3)
        assert getattr(row, f"{name}_per_byte") == pytest.approx(total / size, rel=1e-3)
    return bool(size)


@pytest.mark.parametrize("source", SOURCES)
def test_cross_entropies_are_the_models_own_over_the_same_bytes(source: str, world: Path, tmp_path: Path) -> None:
    """The end of turn is among them where the source has a token for it."""
    store, _ = aligned(world, source, tmp_path / "aligned")
    for number in range(0, len(CHATS), 5):
        both = read(PIVOT, CHATS[number]), read(SOURCES[source], CHATS[number])
        assert assert_cross_entropies(store[number], world, source, *both, CHATS[number])
        closed = END_OF_TURN in SOURCES[source].tokenizer.get_vocab()
        size = sum(len(answer.encode()) + closed for _, answer in CHATS[number])
        assert in_common(*both, CHATS[number])[2] == size


@pytest.mark.slow
@pytest.mark.parametrize(("source", "context"), CONTEXTS.items())
def test_of_a_source_that_reads_only_the_head_all_cross_entropies_are_of_the_head(
    source: str, context: int, world: Path, tmp_path: Path
) -> None:
    """Positions beyond its context have no distribution, and their bytes are not counted either."""
    store, report = aligned(world, source, tmp_path / "aligned")
    assert_verified(store)
    own = RepresentationStore(world / "stores" / "pivot")
    cut = unread = 0
    for number, chat in enumerate(CHATS):
        pivot, reading = read(PIVOT, chat), read(SOURCES["bytes"], chat)
        head = reading.up_to(context)
        if not assert_cross_entropies(store[number], world, source, pivot, head, chat):
            unread += 1
        reached = partners_by_bytes(pivot, head)
        assert store[number].paired.tolist() == [int(mixture is not None) for mixture in reached]
        unpaired = store[number].paired == 0
        assert store[number].logprobs[unpaired].tobytes() == own[number].logprobs[unpaired].tobytes()
        cut += len(head.positions) < len(reading.positions)
    assert cut > 3
    assert (unread > 0) == (source == "shorter")
    assert store.manifest["not_read"] > 0
    assert store.manifest["not_supervised"] == 0
    assert f"beyond the context    {store.manifest['not_read']:>12,}" in report


# Chunks


def chunks_by_text(pivot: Read, source: Read) -> Iterator[tuple[range, range]]:
    """The positions that predict the text between two names that both have, and those that predict an end."""
    for answer in sorted({name[0] for name in pivot.names.values()}):
        sides = [{name: at for at, name in each.names.items() if name[0] == answer} for each in (pivot, source)]
        end = (answer, THE_END, b"")
        closed = end in sides[0] and end in sides[1]
        for side, each in zip(sides, (pivot, source), strict=True):
            if answer in each.closing:
                side[end] = each.closing[answer]
        common = sorted(sides[0].keys() & sides[1].keys(), key=lambda name: (name[1] == THE_END, name[1]))
        for name, following in pairwise(common):
            yield (range(sides[0][name], sides[0][following]), range(sides[1][name], sides[1][following]))
        if closed:
            yield (range(sides[0][end], sides[0][end] + 1), range(sides[1][end], sides[1][end] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("source", [*SOURCES, "short", "twin"])
def test_chunks_are_the_text_between_common_boundaries_with_the_sources_likelihood(
    source: str, world: Path, tmp_path: Path
) -> None:
    """Their columns are the only difference. Two programs read the same; one without chunks is as it was."""
    plain, _ = aligned(world, source, tmp_path / "plain")
    store, report = aligned(world, source, tmp_path / "chunks", chunks=True)
    assert_verified(store)
    assert (plain.has_chunks, store.has_chunks) == (False, True)
    assert plain.identity == {**store.identity, "version": plain.identity["version"]}
    kind = {"short": SOURCES["bytes"], "twin": PIVOT}.get(source) or SOURCES[source]
    theirs, context = RepresentationStore(world / "stores" / source), CONTEXTS.get(source, 1 << 20)
    covered = several = 0
    for number, chat in enumerate(CHATS):
        row, before = store[number], plain[number]
        assert before.chunk_size is None
        for name in (*COLUMNS, "paired", "gold_bytes"):
            assert getattr(row, name).tobytes() == getattr(before, name).tobytes()
        pivot, other = read(PIVOT, chat), read(kind, chat).up_to(context)
        expected = {}
        for own, place in chunks_by_text(pivot, read(kind, chat)):
            if {*own} <= {*pivot.positions} and {*place} <= {*other.positions}:
                golds = [float(theirs[number].gold_logprob[other.positions.index(at)]) for at in place]
                expected[pivot.positions.index(own[0])] = len(own), sum(golds)
                several += len(own) > 1 or len(place) > 1
        assert row.chunk_size is not None
        assert row.chunk_logprob is not None
        assert {int(at): int(row.chunk_size[at]) for at in np.flatnonzero(row.chunk_size)} == {
            at: size for at, (size, _) in expected.items()
        }
        for at, (size, logprob) in expected.items():
            assert float(row.chunk_logprob[at]) == pytest.approx(logprob, rel=1e-3, abs=1e-6)
            covered += size
    assert store.manifest["chunk_positions"] == covered
    assert f"in a common chunk       {covered:>12,}" in report
    assert several or source == "twin"


def test_a_damaged_chunk_is_noticed(world: Path, tmp_path: Path) -> None:
    store, _ = aligned(world, "gemma", tmp_path / "chunks", chunks=True)
    shard = store.shard(0)
    for name, value, problem in (
        ("chunk_size", np.uint16(40000), "a chunk that reaches into another"),
        ("chunk_logprob", np.float16(1), "a wrong likelihood of a chunk"),
    ):
        column = shard.of_positions[name].copy()
        column[np.flatnonzero(shard.of_positions["chunk_size"])[0]] = value
        changed = {**shard.of_positions, name: column}
        shard_of = type("Shard", (), {**vars(shard), "of_positions": changed})
        assert any(problem in line for line in store._wrong_content(shard_of(), store.manifest["shards"][0]))


# Beyond the first token


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_inside_a_token_the_source_says_what_follows_the_text_that_was_read(
    source: str, world: Path, tmp_path: Path
) -> None:
    """Every source token that begins with it counts, at the first token that the pivot reads the rest as."""
    plain, _ = aligned(world, source, tmp_path / "plain")
    store, report = aligned(world, source, tmp_path / "spread", spread=True)
    assert_verified(store)
    theirs, kind, changed = RepresentationStore(world / "stores" / source), SOURCES[source], 0
    for number, chat in enumerate(CHATS):
        row, before, pivot, other = store[number], plain[number], read(PIVOT, chat), read(kind, chat)
        assert row.paired is not None
        assert before.paired is not None
        assert (row.paired >= before.paired).all()
        raw = tiny_sources.openchat(chat, END_OF_TURN in kind.tokenizer.get_vocab())[0].encode()
        for at, position in enumerate(pivot.positions):
            if row.paired[at] == before.paired[at]:
                for name in (*COLUMNS, "gold_bytes"):
                    assert getattr(row, name)[at].tobytes() == getattr(before, name)[at].tobytes()
                continue
            changed += 1
            answer, byte, _ = pivot.names[position]
            last = max(each for each in other.names.values() if each[0] == answer and 0 <= each[1] < byte)
            place = other.at(last)
            assert place is not None
            stored = other.positions.index(place)
            start = other.ends[place]
            since = raw[start : start + byte - last[1]]
            surfaces = [kind.reader.surfaces[token] for token in theirs[number].ids[stored].tolist()]
            shares = np.exp(theirs[number].logprobs[stored].astype(np.float64))
            begin = np.array([surface.startswith(since) for surface in surfaces])
            longer = begin & np.array([len(surface) > len(since) for surface in surfaces])
            found = np.exp(row.logprobs[at].astype(np.float64))
            tail = float(theirs[number].tail[stored])
            expected = shares[longer].sum() / shares[begin].sum() * (1 - tail)
            assert found.sum() <= expected + 2e-3
            assert found.sum() + float(row.tail[at]) == pytest.approx(1, abs=2e-3)
            rests = [surface[len(since) :] for surface, fits in zip(surfaces, longer, strict=True) if fits]
            for token in row.ids[at][found > 0].tolist():
                image = PIVOT.reader.surfaces[token]
                assert any(rest.startswith(image) for rest in rests)
            gold = kind.reader.surfaces[other.ids[place + 1]]
            assert gold.startswith(since)
            assert int(row.gold_bytes[at]) == len(gold) - len(since)
            assert float(row.gold_logprob[at]) >= float(theirs[number].gold_logprob[stored]) - 1e-2
    assert changed == store.manifest["spread"]
    assert changed or source != "bytes"
    assert "learn from it, too" in report


def test_the_distribution_after_what_was_read_worked_by_hand() -> None:
    """Of 0.8 known, "ab" and what continues it have 0.6: a half, a third and a sixth; the tail keeps its 0.2."""
    tokens = {b"ab": 0.3, b"abc": 0.1, b"abcd": 0.1, b"abx": 0.1, b"b": 0.2}
    rest = conditional(tokens, 0.2, b"ab", lambda text: {b"c": 7, b"cd": 7, b"x": 9}[text])
    assert rest is not None
    assert rest.shares == pytest.approx({7: 0.8 * 2 / 6, 9: 0.8 / 6})
    assert rest.tail == pytest.approx(0.2 + 0.8 / 2)
    assert rest.begins == pytest.approx(0.75)
    assert conditional(tokens, 0.2, b"abcd", lambda _: 1) is None
    assert conditional(tokens, 0.2, b"ab", lambda _: None) is None


@pytest.mark.parametrize("other", [{"map": "exact"}, {"positions": "dtw"}])
def test_spreading_needs_the_map_and_the_positions_that_it_continues(
    other: dict[str, str], world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "align.yaml"
    path.write_text("spread: true\n" + "".join(f"{name}: {value}\n" for name, value in other.items()))
    settings = settings_of(world, "bytes", tmp_path / "store")
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(main, ["align", str(path), *flags])
    assert result.exit_code == 1
    assert "line 1: `spread` cannot be True: it continues `map: prefix`" in result.output


# The report


@pytest.mark.parametrize("positions", ["boundary", "dtw"])
@pytest.mark.parametrize("source", ["unigram", "bytes", "short"])
def test_the_report_adds_up(source: str, positions: str, world: Path, tmp_path: Path) -> None:
    store, report = aligned(world, source, tmp_path / "aligned", map="exact", positions=positions)
    manifest = store.manifest
    paired = sum(int(row.paired.sum()) for row in store if row.paired is not None)
    assert (
        manifest["positions"] == sum(map(len, store)) == sum(map(len, RepresentationStore(world / "stores/pivot")))
    )
    assert manifest["paired"] == paired
    causes = {name: manifest[name] for name in ("no_partner", "not_supervised", "not_read")}
    assert paired + sum(causes.values()) == manifest["positions"]
    alone = "no common boundary" if positions == "boundary" else "no token fits by dtw's rules"
    lines = {line.split("  ")[0].strip() or line.strip().split("  ")[0]: line for line in report.splitlines()}
    causes_shown = {
        alone: "no_partner",
        "paired position not supervised": "not_supervised",
        "beyond the context": "not_read",
    }
    shown = {
        "positions": manifest["positions"],
        "paired": paired,
        **{c: causes[name] for c, name in causes_shown.items()},
    }
    for name, number in shown.items():
        assert f"{number:,}" in lines[name]
    assert f"{paired / manifest['positions']:.2%}" in lines["paired"]
    shares = re.findall(r"mapped ([\d.]+)%, .* image ([\d.]+)%, .* kept ([\d.]+)%, .* tail ([\d.]+)%", report)[0]
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.2)
    kept = np.concatenate([np.exp(row.logprobs.astype(float)).sum(1)[row.paired == 1] for row in store])
    assert float(shares[0]) == pytest.approx(100 * kept.mean(), abs=0.1)
    assert 0 < float(shares[0]) < 100


def test_the_manifest_names_both_parents_by_hash_and_how_it_was_made(world: Path, tmp_path: Path) -> None:
    store, _ = aligned(
        world, "unigram", tmp_path / "aligned", positions="dtw", dtw_cost="fusellm", unpaired="gold"
    )
    identity, own = store.identity, RepresentationStore(world / "stores" / "pivot").identity
    assert identity["kind"] == "aligned"
    assert identity["model"] == str(world / "unigram")
    for side, name in (("pivot_store", "pivot"), ("source_store", "unigram")):
        program = ["sha256sum", world / "stores" / name / "manifest.json"]
        assert (
            identity[side] == subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()[0]
        )
    for name in ("tokenizer", "template", "data", "top_k", "vocabulary"):
        assert identity[name] == own[name]
    chosen = {"positions": "dtw", "dtw_cost": "fusellm", "unpaired": "gold", "map": "prefix"}
    assert {name: identity[name] for name in chosen} == chosen


def test_show_reads_an_aligned_store_with_the_pivots_tokenizer(world: Path, tmp_path: Path) -> None:
    store, _ = aligned(world, "bytes", tmp_path / "stores" / "aligned")
    shown = run(f"store show {store.folder}", {"row": 3, "positions": 4, "dialogues": dialogues(world)})
    assert shown.exit_code == 0
    reading = read(PIVOT, CHATS[3])
    for position in reading.positions[:4]:
        assert f"{PIVOT.tokenizer.decode([reading.ids[position + 1]])!r}" in shown.output
    assert str(world / "bytes") in shown.output
    assert str(world / "pivot") in shown.output


@pytest.mark.parametrize("positions", ["boundary", "dtw"])
def test_causes_are_distinguished_if_the_source_reads_only_the_head(
    positions: str, world: Path, tmp_path: Path
) -> None:
    """The same tokenizer with a longer context pairs what is beyond the shorter one, and nothing else."""
    settings = {"positions": positions, "map": "exact"}
    short, whole = (aligned(world, name, tmp_path / name, **settings)[0].manifest for name in ("short", "bytes"))
    assert short["not_read"] > 30
    assert short["paired"] + short["not_read"] == whole["paired"]
    assert whole["not_read"] == 0
    for cause in ("no_partner", "not_supervised"):
        assert short[cause] == whole[cause]
    if positions == "boundary":
        read_by_both = [(read(PIVOT, chat), read(SOURCES["bytes"], chat)) for chat in CHATS]
        assert whole["no_partner"] == sum(
            source.at(pivot.names[position]) is None if position in pivot.names else True
            for pivot, source in read_by_both
            for position in pivot.positions
        )


@pytest.mark.parametrize("source", ["bytes", "unigram"])
def test_on_request_a_position_without_partner_is_all_on_the_token_that_follows(
    source: str, world: Path, tmp_path: Path
) -> None:
    plain, _ = aligned(world, source, tmp_path / "plain")
    gold, _ = aligned(world, source, tmp_path / "gold", unpaired="gold")
    assert_verified(gold)
    checked = 0
    for one, other, chat in zip(plain, gold, CHATS, strict=True):
        assert one.paired is not None
        assert other.paired is not None
        assert one.paired.tolist() == other.paired.tolist()
        paired = one.paired == 1
        for name in COLUMNS:
            assert getattr(one, name)[paired].tobytes() == getattr(other, name)[paired].tobytes()
        reading = read(PIVOT, chat)
        follows = np.array([reading.ids[position + 1] for position in reading.positions])
        assert other.ids[~paired, 0].tolist() == follows[~paired].tolist()
        assert (other.logprobs[~paired, 0] == 0).all()
        assert np.isneginf(other.logprobs[~paired, 1:]).all()
        assert not other.tail[~paired].any()
        assert not other.gold_logprob[~paired].any()
        assert one.gold_bytes is not None
        assert other.gold_bytes is not None
        assert one.gold_bytes.tobytes() == other.gold_bytes.tobytes()
        checked += int((~paired).sum())
    assert checked > 10


def test_a_token_that_reads_nothing_counts_as_a_byte_and_no_count_overflows() -> None:
    """A normaliser's second token of one character; a hundred thousand spaces read as one."""
    own, theirs = np.array([0, 3, 100_000, 5], np.int32), np.array([2, 0, 9], np.int32)
    partners: Partners = [None, None, None, [(1, 1.0)]]
    assert align_row._gold_bytes(own, theirs, partners).tolist() == [1, 3, 65535, 1]
    assert align_row._gold_bytes(own[:1], theirs, [[(0, 0.25), (2, 0.75)]]).tolist() == [7]  # 7.25


# Running it again, elsewhere, and after a kill


def command(world: Path, source: str, output: Path, **changed: Any) -> list[str]:
    settings = settings_of(world, source, output, **changed)
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "fusion_trainer", "align", *flags]


def test_a_second_run_does_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("align", settings_of(world, "bytes", tmp_path / "aligned"))
    assert first.exit_code == 0
    before = content(tmp_path / "aligned")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "aligned").iterdir()}
    monkeypatch.setattr(alignment, "_align_shard", lambda *_: pytest.fail("aligned again"))
    second = run("align", settings_of(world, "bytes", tmp_path / "aligned"))
    assert second.exit_code == 0
    assert second.stdout == first.stdout
    assert content(tmp_path / "aligned") == before
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "aligned").iterdir()} == times


def test_a_map_is_made_once_and_reused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned(world, "bytes", tmp_path / "one", map="statistics", maps=None)
    (path,) = tmp_path.glob("vocab-map-*.safetensors")
    before, made = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(alignment, "build_map", lambda *_: pytest.fail("built again"))
    aligned(world, "bytes", tmp_path / "two", map="statistics", maps=None)
    assert [path] == list(tmp_path.glob("vocab-map-*.safetensors"))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, made)
    shards = {name: data for name, data in content(tmp_path / "one").items() if name != "manifest.json"}
    assert {name: data for name, data in content(tmp_path / "two").items() if name != "manifest.json"} == shards
    with pytest.raises(pytest.fail.Exception, match="built again"):
        aligned(world, "bytes", tmp_path / "three", map="statistics", most=2, maps=None)


@pytest.mark.slow
def test_killed_and_resumed_with_two_processes_the_bytes_are_the_same(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "aligned"
    settings: dict[str, Any] = {"positions": "dtw", "maps": tmp_path / "maps"}
    whole, _ = aligned(world, "bytes", tmp_path / "whole", **settings)
    assert len(whole.manifest["shards"]) > 10
    program = command(world, "bytes", folder, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("shard-*.arrow"))) < 2:
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = [path.name for path in sorted(folder.glob("shard-*.arrow"))]
    assert 2 <= len(there) < len(whole.manifest["shards"])
    assert not (folder / "manifest.json").exists()
    assert all((folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in there)
    unfinished = refused("align", settings_of(world, "unigram", tmp_path / "out", source_store=folder))
    assert f"`{folder}` is not finished; run its alignment again" in unfinished
    aligned(world, "bytes", folder, **{**settings, "workers": 2})
    assert content(folder) == content(tmp_path / "whole")


def test_aligning_again_into_a_finished_store_reads_and_counts_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"positions": "dtw", "map": "statistics", "maps": tmp_path / "maps"}
    _, first = aligned(world, "unigram", tmp_path / "aligned", **settings)
    for name in ("distributions", "__getitem__"):
        monkeypatch.setattr(RepresentationStore, name, lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(alignment, "_count_blocks", lambda *_: pytest.fail("counted again"))
    _, second = aligned(world, "unigram", tmp_path / "aligned", **settings)
    assert second == first


def test_the_corpus_is_counted_once_for_all_that_use_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a map, a second map over the same data, and a resumed run."""
    settings: dict[str, Any] = {"positions": "dtw", "maps": tmp_path / "maps"}
    aligned(world, "bytes", tmp_path / "one", map="statistics", **settings)
    monkeypatch.setattr(alignment, "_count_blocks", lambda *_: pytest.fail("counted again"))
    aligned(world, "bytes", tmp_path / "two", map="min_edit_distance", **settings)
    aligned(world, "bytes", tmp_path / "three", map="statistics", most=2, **settings)
    (tmp_path / "one" / "shard-00001.arrow").unlink()
    aligned(world, "bytes", tmp_path / "one", map="statistics", **settings)
    for other in ({"positions": "boundary"}, {"dtw_cost": "fusellm"}):  # pairs other tokens
        with pytest.raises(pytest.fail.Exception, match="counted again"):
            aligned(world, "bytes", tmp_path / "four", map="statistics", **{**settings, **other})
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        aligned(world, "unigram", tmp_path / "five", map="statistics", **settings)


def test_an_interrupted_count_resumes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "BLOCKS_AT_ONCE", 2)
    monkeypatch.setattr(alignment, "KEPT_EVERY", 6)
    counted: list[int] = []
    whole = alignment._count_blocks

    def count_blocks(sides: Any, start: int) -> Any:
        if len(counted) == 5:
            raise KeyboardInterrupt
        counted.append(start)
        return whole(sides, start)

    settings = {"map": "statistics", "maps": tmp_path / "maps"}
    monkeypatch.setattr(alignment, "_count_blocks", count_blocks)
    with pytest.raises(KeyboardInterrupt):
        aligned(world, "unigram", tmp_path / "aligned", **settings)
    assert counted == [0, 2, 4, 6, 8]
    assert len(list((tmp_path / "maps").iterdir())) == 1
    counted[:] = [-1] * 9
    aligned(world, "unigram", tmp_path / "aligned", **settings)
    assert counted[9:] == list(range(6, len(CHATS), 2))  # what was counted after the last save is counted again
    aligned(world, "unigram", tmp_path / "anew", **{**settings, "maps": tmp_path / "other maps"})
    (one,), (other,) = ((tmp_path / name).glob("corpus-*") for name in ("maps", "other maps"))
    assert one.read_bytes() == other.read_bytes()
    assert content(tmp_path / "aligned") == content(tmp_path / "anew")


def killed_for_memory(sides: Any, task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_with_advice(world: Path, tmp_path: Path) -> None:
    sides = open_sides(AlignConfig(**settings_of(world, "bytes", tmp_path / "aligned", workers=2)))
    with pytest.raises(UserError, match=r"memory ran out.* fewer --workers than 2; it resumes"):
        list(in_processes(sides, killed_for_memory, [1, 2, 3]))


def test_the_corpus_may_be_counted_in_any_pieces(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, blocks in enumerate((64, 3, 1)):
        monkeypatch.setattr(alignment, "BLOCKS_AT_ONCE", blocks)
        settings = {"map": "statistics", "most": 3, "maps": tmp_path / f"maps {number}"}
        aligned(world, "unigram", tmp_path / f"{number}", **settings)
        assert content(tmp_path / f"{number}") == content(tmp_path / "0")


def test_a_half_written_shard_and_a_missing_one_are_written_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned(world, "unigram", tmp_path / "whole")
    partial = tmp_path / "partial"
    with monkeypatch.context() as patch:
        patch.setattr(alignment.StoreWriter, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            aligned(world, "unigram", partial)
    assert not (partial / "manifest.json").exists()
    (partial / "shard-00003.arrow").rename(partial / "shard-00003.arrow.99999999.tmp")
    (partial / "shard-00000.arrow").unlink()
    aligned(world, "unigram", partial)
    assert content(partial) == content(tmp_path / "whole")


def test_with_the_same_tokenizer_warping_needs_no_corpus(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "_count_blocks", lambda *_: pytest.fail("counted"))
    store, _ = aligned(world, "twin", tmp_path / "aligned", positions="dtw", maps=tmp_path / "maps")
    assert store.manifest["paired"] == store.manifest["positions"]


def test_vocab_map_show_knows_its_tokenizers_and_takes_those_that_have_moved(world: Path, tmp_path: Path) -> None:
    moved = {name: shutil.copytree(world / name, tmp_path / name) for name in ("bytes", "pivot")}
    elsewhere = {f"{side}_tokenizer": str(moved[name]) for side, name in (("source", "bytes"), ("pivot", "pivot"))}
    _, report = aligned(world, "bytes", tmp_path / "aligned", maps=None, **elsewhere)
    (path,) = tmp_path.glob("vocab-map-*.safetensors")
    assert str(path) in report
    shown = run(f"vocab-map show {path}", {})
    assert shown.exit_code == 0
    assert "vocabulary mapped" in shown.output
    moved["bytes"].rename(tmp_path / "moved")
    assert f"no model folder `{moved['bytes']}`" in refused(f"vocab-map show {path}", {})
    assert run(f"vocab-map show {path}", {"source": tmp_path / "moved"}).output == shown.output
    message = refused(f"vocab-map show {path}", {"source": tmp_path / "moved", "source_revision": "v2"})
    assert "is a folder, which has no revision `v2`" in message
    changed = {"source": tmp_path / "moved", "pivot_revision": "v3"}
    assert "no revision `v3`" in refused(f"vocab-map show {path}", changed)


def test_vocab_map_show_prints_the_coverage(world: Path, tmp_path: Path) -> None:
    _, report = aligned(world, "bytes", tmp_path / "aligned", map="exact", maps=None)
    (path,) = tmp_path.glob("vocab-map-*.safetensors")
    shown = run(f"vocab-map show {path}", {"store": world / "stores" / "bytes"})
    assert shown.exit_code == 0
    assert shown.output.strip() == report[report.index("method") :].strip()
    mapped = load_map(path).map.mapped
    assert f"{mapped.sum():,} of {len(SOURCES['bytes'].surfaces):,} ids" in shown.output
    mass = np.zeros(len(mapped))
    for row in RepresentationStore(world / "stores" / "bytes"):
        np.add.at(mass, row.ids, np.exp(row.logprobs.astype(np.float64)))
    assert f"{mass[mapped].sum() / mass.sum():.2%}" in shown.output
    without = run(f"vocab-map show {path}", {})
    assert without.exit_code == 0
    assert "probability" not in without.output


# What cannot be aligned


def test_stores_of_different_data_are_refused(world: Path, tmp_path: Path) -> None:
    other = tiny_sources.write_sharegpt(tmp_path / "other.jsonl", CHATS[:3])
    store = extract_store(world, "unigram", tmp_path / "other", data=[str(other)])
    message = refused("align", settings_of(world, "unigram", tmp_path / "out", source_store=store.folder))
    assert "does not match what is needed" in message
    assert "data" in message
    assert store.identity["data"] in message
    assert RepresentationStore(world / "stores" / "pivot").identity["data"] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["source", "pivot"])
def test_another_tokenizer_than_the_stores_is_refused(side: str, world: Path, tmp_path: Path) -> None:
    changed = {f"{side}_tokenizer": world / "gemma"}
    message = refused("align", settings_of(world, "unigram", tmp_path / "out", **changed))
    assert "does not match what is needed" in message
    assert "tokenizer" in message
    assert SOURCES["gemma"].reader.sha256 in message
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_offsets_is_refused(world: Path, tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    changed = {"source_tokenizer": tmp_path / "byt5"}
    message = refused("align", settings_of(world, "unigram", tmp_path / "out", **changed))
    assert "does not report which characters a token covers" in message
    assert "tokenizer.json" in message


def test_a_map_of_other_tokenizers_is_refused(world: Path, tmp_path: Path) -> None:
    aligned(world, "bytes", tmp_path / "aligned", maps=None)
    (path,) = tmp_path.glob("vocab-map-*.safetensors")
    message = refused(f"vocab-map show {path}", {"source": world / "unigram", "pivot": world / "pivot"})
    assert "was made for other tokenizers" in message
    assert SOURCES["unigram"].reader.sha256 in message
    assert SOURCES["bytes"].reader.sha256 in message
    aligned(world, "unigram", tmp_path / "second", maps=None)
    (other,) = set(tmp_path.glob("vocab-map-*.safetensors")) - {path}
    shutil.copy(path, other)
    message = refused("align", settings_of(world, "unigram", tmp_path / "third", maps=tmp_path))
    assert "is a fusion-trainer vocabulary map, version 2 that was made from other inputs" in message
    assert str(other) in message
    store = {"source": world / "bytes", "pivot": world / "pivot", "store": world / "stores" / "unigram"}
    assert "does not match what is needed" in refused(f"vocab-map show {path}", store)
    assert "is not a fusion-trainer vocabulary map" in refused(f"vocab-map show {world / 'chats.jsonl'}", store)


def test_vocabularies_without_a_common_token_are_refused(world: Path, tmp_path: Path) -> None:
    """A source that reads every word as its one unknown token."""
    strange = Tokenizer(WordLevel({"〇": 0, "〡": 1, "〢": 2}, "〇"))
    strange.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(tmp_path / "strange", "llama", PreTrainedTokenizerFast(tokenizer_object=strange, unk_token="〇"))
    extract_store(world, str(tmp_path / "strange"), tmp_path / "store", top_k=2)
    changed = {"source_store": tmp_path / "store", "dialogues": dialogues(world)}
    message = refused("align", settings_of(world, "", tmp_path / "out", map="exact", **changed))
    assert f"the map `exact` maps no token of {tmp_path / 'strange'} to a token of {world / 'pivot'}" in message
    assert not (tmp_path / "out").exists()


def dialogues(world: Path) -> Path:
    (folder,) = (world / "stores").glob("dialogues-*")
    return folder


def test_an_unfinished_store_is_refused(world: Path, tmp_path: Path) -> None:
    for side in ("source", "pivot"):
        unfinished = shutil.copytree(world / "stores" / "unigram", tmp_path / side)
        (unfinished / "manifest.json").rename(unfinished / "extraction.json")
        message = refused("align", settings_of(world, "bytes", tmp_path / "out", **{f"{side}_store": unfinished}))
        assert f"`{unfinished}` is not finished; run its extraction again" in message
    message = refused("align", settings_of(world, "bytes", tmp_path / "out", source_store=tmp_path / "no such"))
    assert "no store" in message
    assert not (tmp_path / "out").exists()


def test_an_aligned_store_of_an_older_version_is_refused_finished_and_unfinished(
    world: Path, tmp_path: Path
) -> None:
    """One made before it had the bytes of the gold tokens."""
    store, _ = aligned(world, "unigram", tmp_path / "aligned")
    manifest = json.loads((store.folder / "manifest.json").read_text())
    del manifest["identity"]["version"]
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    message = refused(f"store show {store.folder}", {})
    assert f"`{store.folder}` is of version 1, not 3" in message
    assert "align its source again" in message
    assert "version" in refused("align", settings_of(world, "unigram", store.folder))
    (store.folder / "manifest.json").rename(store.folder / "extraction.json")
    (store.folder / "shard-00001.arrow").unlink()
    assert "is a store with other settings" in refused("align", settings_of(world, "unigram", store.folder))


@pytest.mark.parametrize("side", ["source_store", "pivot_store"])
def test_an_aligned_store_is_no_parent(side: str, world: Path, tmp_path: Path) -> None:
    store, _ = aligned(world, "unigram", tmp_path / "aligned")
    changed = {side: store.folder, "dialogues": dialogues(world)}
    message = refused("align", settings_of(world, "bytes", tmp_path / "out", **changed))
    assert f"`{store.folder}` is already aligned" in message


def test_dialogues_that_are_not_beside_the_store_must_be_named_and_others_are_refused(
    world: Path, tmp_path: Path
) -> None:
    pivot = shutil.copytree(world / "stores" / "pivot", tmp_path / "alone" / "pivot")
    settings = settings_of(world, "unigram", tmp_path / "out", pivot_store=pivot)
    assert "give their folder with --dialogues" in refused("align", settings)
    assert run("align", {**settings, "dialogues": dialogues(world)}).exit_code == 0
    other = tiny_sources.write_sharegpt(tmp_path / "other.jsonl", CHATS[:3])
    extract_store(world, "unigram", tmp_path / "else" / "store", data=[str(other)])
    (wrong,) = (tmp_path / "else").glob("dialogues-*")
    message = refused("align", {**settings, "output": tmp_path / "again", "dialogues": wrong})
    assert "does not match what is needed" in message


def test_an_output_that_holds_something_else_is_refused(world: Path, tmp_path: Path) -> None:
    aligned(world, "unigram", tmp_path / "aligned")
    before = content(tmp_path / "aligned")
    message = refused("align", settings_of(world, "unigram", tmp_path / "aligned", map="exact"))
    assert "is a store with other settings" in message
    assert "map" in message
    message = refused("align", settings_of(world, "bytes", tmp_path / "aligned"))
    assert "source_store" in message
    assert content(tmp_path / "aligned") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    message = refused("align", settings_of(world, "unigram", tmp_path / "full"))
    assert "holds other files (`thesis.txt`)" in message
    assert content(tmp_path / "full") == {"thesis.txt": b"mine"}
