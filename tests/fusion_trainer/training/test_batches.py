"""From dialogues and stores to batches: tokens, rows that several blocks share, and what each position learns."""

import math
import os
import pickle
import random
import resource
import signal
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_fusion
import tiny_sources
import tiny_tokenizers
import tokenizer_zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import END_OF_TURN
from tokenizer_zoo import Kind
from torch.utils.data import DataLoader

import fusion_trainer.training.batches as batches
from fusion_trainer.alignment.align import align
from fusion_trainer.config import AlignConfig, ExtractConfig
from fusion_trainer.data.answers import Answer
from fusion_trainer.data.blocks import Block, Preparation
from fusion_trainer.data.dialogues import Dialogues, write_dialogues
from fusion_trainer.representations.extract import extract
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer
from fusion_trainer.training.batches import Collator, Example, FusionData, TokenFile, TokenRow, pack, write_tokens
from fusion_trainer.training.fusion import Fused, Rule
from fusion_trainer.training.loss import Targets, give_fusion_loss
from varm_common.errors import UserError

property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)
ROWS = 61
IGNORED = -100


# Rows that several blocks share


@cache
def fewest(lengths: tuple[int, ...], room: int) -> int:
    """Rows needed at best, by trying all; an item longer than a row has one of its own."""
    if not lengths:
        return 0
    first, rest = lengths[0], lengths[1:]
    best = len(lengths)
    for subset in range(1 << len(rest)):
        with_it = [item for number, item in enumerate(rest) if subset >> number & 1]
        if first + sum(with_it) <= room or not with_it:
            others = tuple(item for number, item in enumerate(rest) if not subset >> number & 1)
            best = min(best, 1 + fewest(others, room))
    return best


sizes = st.lists(st.integers(1, 120), max_size=40)


@property_test
@given(sizes, st.integers(1, 100))
def test_every_item_is_in_one_row_and_no_row_has_more_than_fits(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    assert all(len(row) == 1 or sum(lengths[item] for item in row) <= room for row in rows)


@property_test
@given(sizes, st.integers(1, 100), st.randoms(use_true_random=False))
def test_rows_depend_on_the_lengths_alone(lengths: list[int], room: int, order: random.Random) -> None:
    rows = pack(lengths, room)
    assert pack(list(lengths), room) == rows
    shuffled = pack(order.sample(lengths, len(lengths)), room)
    assert len(shuffled) == len(rows)


@property_test
@given(sizes, st.integers(1, 100))
def test_no_two_rows_fit_into_one(lengths: list[int], room: int) -> None:
    filled = sorted(sum(lengths[item] for item in row) for row in pack(lengths, room))
    assert len(filled) < 2 or filled[0] + filled[1] > room


@property_test
@given(st.lists(st.integers(1, 60), max_size=7), st.integers(20, 60))
def test_there_are_hardly_more_rows_than_at_best(lengths: list[int], room: int) -> None:
    """Best fit of descending lengths needs at most 11/9 of the fewest rows and 6/9."""
    best = fewest(tuple(sorted(lengths)), room)
    assert best <= len(pack(lengths, room)) <= math.floor((11 * best + 6) / 9)


def test_rows_worked_by_hand() -> None:
    """70 goes with 30 rather than beside 20, 60 with 40; 120 is longer than a row."""
    assert pack([30, 60, 120, 20, 40, 70], 100) == [[2], [0, 5], [1, 4], [3]]


def test_many_blocks_fill_their_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 2048, 20_000).tolist()
    rows = pack(lengths, 2048)
    assert len(rows) <= 1.005 * sum(lengths) / 2048


# The tokens' file


def blocks(number: int = 12) -> list[Block]:
    """Conversations as OpenChat writes them."""
    made = []
    for place, chat in enumerate(tiny_sources.made_up_chats(number, seed=5, words=8, turns=2)):
        text, spans = tiny_sources.openchat(chat)
        answers = []
        for number, (start, stop) in enumerate(spans):
            mark = stop - len(END_OF_TURN)
            answers.append(Answer(2 * number + 1, start, ((start, mark, 0),), mark, stop))
        made.append(Block(f"chat-{place}", 0, "made up", text, tuple(answers), 0))
    return made


def dialogues_of(folder: Path, number: int = 12) -> Dialogues:
    preparation = Preparation(TextTokenizer(tiny_tokenizers.shared("unigram"), "any"), None, 1 << 20)
    write_dialogues(folder, blocks(number), preparation, {})
    return Dialogues(folder)


KINDS = [
    Kind("byte_level_bpe", tiny_tokenizers.shared("byte_level_bpe", (END_OF_TURN,))),
    Kind("sentencepiece_bpe", tiny_tokenizers.shared("sentencepiece_bpe"), before="pieces"),
    Kind("unigram", tiny_tokenizers.shared("unigram"), before="first", unless_there=True),
    tokenizer_zoo.gemma(size=450),
]


@pytest.mark.parametrize("at_once", [256, 5])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_file_holds_the_tokenizers_own_ids_and_what_each_position_predicts(
    kind: Kind, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BLOCKS_AT_ONCE", at_once)
    found = TokenFile(write_tokens(dialogues_of(tmp_path / "dialogues"), kind.reader))
    assert len(found.lengths) == 12
    for number, block in enumerate(blocks()):
        row, ids = found[number], kind.tokenizer(block.text).input_ids
        assert row.ids.tolist() == ids
        assert row.ids.dtype == row.positions.dtype == row.gold_bytes.dtype == np.int32
        assert found.lengths[number] == len(ids)
        ends = kind.truth(kind.reader.encode([block.text])[0], block.text)
        inside = [any(start < end <= stop for start, stop in block.spans) for end in ends]
        expected = [place for place in range(len(ends) - 1) if inside[place + 1]]
        assert row.positions.tolist() == expected
        assert row.gold_bytes.tolist() == [ends[place + 1] - ends[place] for place in expected]
        assert row.bytes == sum(stop - start for start, stop in block.spans)


def test_the_file_is_made_once_for_each_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogues = dialogues_of(tmp_path / "dialogues")
    paths = [write_tokens(dialogues, kind.reader) for kind in KINDS[:2]]
    assert paths[0] != paths[1]
    assert {path.parent for path in paths} == {dialogues.folder}
    before = paths[0].stat()
    monkeypatch.setattr(TextTokenizer, "encode", lambda *_: pytest.fail("read again"))
    assert write_tokens(dialogues, KINDS[0].reader) == paths[0]
    after = paths[0].stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def write_and_be_killed(dialogues: Dialogues, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fork of this process, which ends while it writes."""
    encode, calls = TextTokenizer.encode, list[int]()

    def killed(self: TextTokenizer, texts: Sequence[str]) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, texts)

    process = os.fork()
    if process == 0:
        try:
            monkeypatch.setattr(TextTokenizer, "encode", killed)
            write_tokens(dialogues, tokenizer)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_killed_run_leaves_no_half_file_and_the_next_one_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BLOCKS_AT_ONCE", 3)
    dialogues = dialogues_of(tmp_path / "dialogues")
    reader = KINDS[0].reader
    write_and_be_killed(dialogues, reader, monkeypatch)
    (half,) = dialogues.folder.glob("tokens-*")
    assert half.suffix == ".tmp"
    path = write_tokens(dialogues, reader)
    assert sorted(dialogues.folder.glob("tokens-*")) == [path]
    whole = path.read_bytes()
    path.unlink()
    assert write_tokens(dialogues, reader).read_bytes() == whole
    assert len(TokenFile(path).lengths) == len(dialogues)


def test_a_file_that_may_not_be_written_ends_in_a_message_and_leaves_nothing(tmp_path: Path) -> None:
    dialogues = dialogues_of(tmp_path / "dialogues")
    before = sorted(dialogues.folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: File too large.*run the same command again"):
            write_tokens(dialogues, KINDS[0].reader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(dialogues.folder.iterdir()) == before
    assert write_tokens(dialogues, KINDS[0].reader).stat().st_size > 1500


# Items → batches


def example(rng: np.random.Generator, block: int, entries: int, models: int, length: int | None = None) -> Example:
    """A random block; of some the last positions lie beyond what the models have read."""
    size = length or int(rng.integers(2, 20))
    places = np.flatnonzero(rng.random(size - 1) < 0.6).astype(np.int32)
    row = TokenRow(
        rng.integers(1, ROWS, size).astype(np.int32),
        places if len(places) else np.array([size - 2], np.int32),
        np.ones(max(1, len(places)), np.int32),
        int(rng.integers(1, 99)),
    )
    if not models:
        return Example(block, row, None)
    known = len(row.positions) - int(rng.integers(0, 3)) * (rng.random() < 0.3)
    known = max(0, known)
    shares = rng.dirichlet(np.ones(entries + 1), known).astype(np.float32)
    fused = Fused(
        np.array([rng.permutation(ROWS)[:entries] for _ in range(known)], np.int64).reshape(known, entries),
        shares[:, :entries],
        shares[:, entries],
        rng.dirichlet(np.ones(models), known).astype(np.float32).reshape(known, models),
        rng.random(known).astype(np.float32),
    )
    return Example(block, row, fused)


@st.composite
def many_items(draw: st.DrawFn) -> list[list[Example]]:
    """One to four items of one to three blocks, whose distributions have different numbers of entries."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    models = draw(st.integers(0, 3))
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    numbers = iter(range(100))
    return [[example(rng, next(numbers), int(rng.integers(1, 6)), models) for _ in range(n)] for n in counts]


MODES = {"padded": {}, "packed": {"packed": True}, "flat": {"packed": True, "flat": True}}


@pytest.mark.parametrize("mode", MODES)
@property_test
@given(many_items(), st.booleans())
def test_labels_positions_and_golds_agree(mode: str, items: list[list[Example]], tail: bool) -> None:
    if mode == "padded":
        items = [[one] for item in items for one in item]
    batch = Collator(7, **MODES[mode], tail=tail)(items)
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    assert batch["input_ids"].shape == batch["labels"].shape
    positions, gold = batch["positions"], batch["gold"]
    assert torch.equal(labels[positions + 1], gold)
    assert torch.equal(ids[positions + 1], gold)
    assert sorted((positions + 1).tolist()) == torch.nonzero(labels != IGNORED).flatten().tolist()
    assert all(tensor.dtype == torch.int64 for tensor in (ids, labels, positions, gold, batch["of_item"]))
    names = {"input_ids", "labels", "positions", "of_item", "gold", "fused_ids", "fused_probabilities"}
    names |= {"shares", "confidence", "blocks", "item_of_block", "bytes"}
    names |= {"attention_mask" if mode == "padded" else "position_ids"}
    assert set(batch) == names | ({"fused_tail"} if tail else set())


@pytest.mark.parametrize("mode", MODES)
@property_test
@given(many_items())
def test_each_block_stands_whole_in_its_row(mode: str, items: list[list[Example]]) -> None:
    """Read back from the batch: tokens, places and padding."""
    if mode == "padded":
        items = [[one] for item in items for one in item]
    batch = Collator(7, **MODES[mode])(items)
    rows = [[one for item in items for one in item]] if mode == "flat" else items
    lengths = [sum(len(one.tokens.ids) for one in row) for row in rows]
    assert batch["input_ids"].shape == (len(rows), max(lengths))
    golds = []
    for number, row in enumerate(rows):
        ids = [token for one in row for token in one.tokens.ids.tolist()]
        padding = max(lengths) - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [7] * padding
        if mode == "padded":
            assert batch["attention_mask"][number].tolist() == [1] * len(ids) + [0] * padding
        else:
            places = [place for one in row for place in range(len(one.tokens.ids))]
            assert batch["position_ids"][number].tolist() == places + list(range(padding))
        start = number * max(lengths)
        for one in row:
            golds += [(start + place, int(one.tokens.ids[place + 1])) for place in one.tokens.positions.tolist()]
            start += len(one.tokens.ids)
    assert list(zip(batch["positions"].tolist(), batch["gold"].tolist(), strict=True)) == golds


@pytest.mark.parametrize("mode", MODES)
@property_test
@given(many_items())
def test_each_position_learns_what_was_fused_for_it(mode: str, items: list[list[Example]]) -> None:
    """And nothing where the models had not read so far; entries beyond a block's own have no probability."""
    batch = Collator(7, **MODES[mode], tail=True)(items)
    place = 0
    for number, item in enumerate(items):
        for one in item:
            for position in range(len(one.tokens.positions)):
                found = {
                    name: batch[name][place].numpy() for name in ("shares", "fused_probabilities", "fused_ids")
                }
                assert batch["of_item"][place] == number
                if one.fused is None or position >= len(one.fused.ids):
                    assert not found["shares"].any()
                    assert not found["fused_probabilities"].any()
                    assert batch["fused_tail"][place] == batch["confidence"][place] == 0
                else:
                    entries = one.fused.ids.shape[1]
                    assert found["fused_ids"][:entries].tolist() == one.fused.ids[position].tolist()
                    assert np.array_equal(
                        found["fused_probabilities"][:entries], one.fused.probabilities[position]
                    )
                    assert not found["fused_probabilities"][entries:].any()
                    assert np.array_equal(found["shares"], one.fused.shares[position])
                    assert batch["fused_tail"][place] == one.fused.tail[position]
                    assert batch["confidence"][place] == one.fused.confidence[position]
                place += 1
    assert place == len(batch["gold"])
    assert batch["blocks"].tolist() == [one.block for item in items for one in item]
    assert batch["item_of_block"].tolist() == [number for number, item in enumerate(items) for _ in item]
    assert batch["bytes"].tolist() == [sum(one.tokens.bytes for one in item) for item in items]


# Blocks that share a row, read by a model

KERNELS = dict.fromkeys(tiny_sources.LAYOUTS, ("sdpa", "eager")) | {"gemma2": ("eager",)}
APART = [(layout, kernel) for layout in KERNELS if layout != "mpt" for kernel in KERNELS[layout]]
BLOCK_LENGTHS = (23, 2, 17, 40, 5, 11)
SHARED_ROWS = [[0, 1], [2, 3, 4], [5]]


def learned(model: Any, collator: Collator, items: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Loss, both terms and all gradients of a batch."""
    batch = collator(items)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    fused = {name: batch[f"fused_{name}"] for name in ("ids", "probabilities", "tail")}
    weights = 0.1 + 0.8 * batch["confidence"]
    targets = Targets(positions=batch["positions"], gold=batch["gold"], **fused, clm_weight=weights)
    loss = model(**inputs, targets=targets)["loss"]
    model.zero_grad()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert targets.terms is not None
    return {"loss": loss.detach(), "clm": targets.terms.clm, "fusion": targets.terms.fusion, **gradients}


def packed_and_not(layout: str, kernel: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """What a tiny model learns from the same blocks, apart and together."""
    rng = np.random.default_rng(0)
    examples = [example(rng, number, 5, 2, length) for number, length in enumerate(BLOCK_LENGTHS)]
    model = tiny_sources.new_source(layout, ROWS, attn_implementation=kernel).train()
    if layout != "mpt":
        assert model.config._attn_implementation == kernel
    give_fusion_loss(model)
    apart = learned(model, Collator(0, tail=True), [[one] for one in examples])
    rows = [[examples[number] for number in row] for row in SHARED_ROWS]
    together = {name: learned(model, Collator(0, **MODES[name], tail=True), rows) for name in ("packed", "flat")}
    return apart, together


@pytest.mark.parametrize(("layout", "kernel"), APART)
def test_in_shared_rows_loss_and_gradients_are_those_of_rows_apart(layout: str, kernel: str) -> None:
    apart, together = packed_and_not(layout, kernel)
    steepest = max(float(tensor.abs().max()) for name, tensor in apart.items() if name not in ("clm", "fusion"))
    for found in together.values():
        assert found.keys() == apart.keys()
        for name, expected in apart.items():
            scale = 1.0 if name in ("clm", "fusion") else steepest
            np.testing.assert_allclose(found[name] / scale, expected / scale, atol=2e-5, rtol=2e-5, err_msg=name)


def test_mpt_cannot_share_rows() -> None:
    """Its positions are distances, its attention does not look at ``position_ids``."""
    apart, together = packed_and_not("mpt", "eager")
    for found in together.values():
        assert abs(found["clm"] - apart["clm"]).max() > 0.1


# Real stores

CHATS = tiny_sources.made_up_chats(9, seed=2, words=14, turns=2)
SHORT = 70
"""Tokens of context of the model that does not read to the end."""
SPEAKS = {"pivot": tiny_fusion.OPENCHAT, "short": tiny_fusion.OPENCHAT, "bytes": tiny_fusion.CHATML, "unigram": {}}
"""One source is queried in its own template, the other reads the pivot's text."""
TOKENIZER = tiny_tokenizers.shared("sentencepiece_bpe", (END_OF_TURN,))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``stores/pivot`` and ``stores/<source>`` aligned to it, and the same of a pivot with a short context."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    for name, layout, kind, own in (
        ("pivot", "llama", "sentencepiece_bpe", {}),
        ("short", "llama", "sentencepiece_bpe", {"max_position_embeddings": SHORT}),
        ("bytes", "mistral", "byte_level_bpe", {"seed": 1}),
        ("unigram", "mistral", "unigram", {"seed": 2}),
    ):
        tiny_sources.save_source(folder / name, layout, kind, **SPEAKS[name], **own)
    for name in SPEAKS:
        pivot = "short" if name == "short" else "pivot"  # the same tokenizer: the dialogues are the same
        extract(
            ExtractConfig(
                data=[str(folder / "chats.jsonl")],
                pivot=str(folder / pivot),
                template="openchat",
                source_template="own" if name == "bytes" else "pivot",
                model=str(folder / name),
                output=folder / "stores" / name,
                dialogues=folder / "dialogues",
                shard_tokens=300,
            )
        )
    for source, pivot in (("bytes", "pivot"), ("unigram", "pivot"), ("bytes", "short")):
        align(
            AlignConfig(
                source_store=folder / "stores" / source,
                pivot_store=folder / "stores" / pivot,
                output=folder / "aligned" / f"{source}-{pivot}",
                dialogues=folder / "dialogues",
                workers=1,
            )
        )
    return folder


def dialogues_in(world: Path) -> Dialogues:
    return Dialogues(world / "dialogues")


def tokens_of(world: Path) -> Path:
    return write_tokens(dialogues_in(world), TextTokenizer(TOKENIZER, "pivot"))


def store(world: Path, name: str) -> RepresentationStore:
    return RepresentationStore(world / name)


def data_of(world: Path, *stores: str, rule: Rule | None = None, groups: Any = None) -> FusionData:
    every = [[block] for block in range(len(CHATS))]
    return FusionData(tokens_of(world), [store(world, s) for s in stores], rule or Rule(), groups or every)


BOTH = ("stores/pivot", "aligned/bytes-pivot")


def as_chatml(chat: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation in ChatML, and the bytes of the answers with their ends of turn."""
    text, spans = "", []
    for question, answer in chat:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        start = len(text.encode())
        text += f"{answer}<|im_end|>\n"
        spans.append((start, len(text.encode()) - 1))
    return text, spans


Predicted = dict[tuple[int, int], tuple[int, float]]
"""For an answer and the byte of it that a token begins at: the byte that it ends at, and its nats."""


def predicted(
    reader: TextTokenizer, text: str, spans: Sequence[tuple[int, int]], marker: str, row: Any
) -> Predicted:
    """What a row of a store predicts; the marker of an end is the byte after the answer."""
    ends = reader.encode([text])[0].ends.tolist()
    nats = iter(-row.gold_logprob.astype(np.float64))
    found: Predicted = {}
    for before, after in pairwise(ends):
        for number, (start, stop) in enumerate(spans):
            if start < after <= stop and (cost := next(nats, None)) is not None:
                length = stop - len(marker) - start
                found[number, max(before - start, 0)] = min(after - start, length + 1), float(cost)
    return found


def over_common_bytes(world: Path, block: int, pivot: str, unit: str) -> tuple[float, float]:
    """The cross-entropies of pivot and source over the bytes that both predict."""
    sides = []
    for rendered, marker, name in (
        (tiny_sources.openchat, END_OF_TURN, pivot),
        (as_chatml, "<|im_end|>", "stores/bytes"),
    ):
        kind = "byte_level_bpe" if name == "stores/bytes" else "sentencepiece_bpe"
        special = tuple(tiny_fusion.CHATML["special"]) if name == "stores/bytes" else (END_OF_TURN,)
        reader = TextTokenizer(tiny_tokenizers.shared(kind, special), name)
        text, spans = rendered(CHATS[block])
        sides.append(predicted(reader, text, spans, marker, store(world, name)[block]))
    size, nats, tokens = 0, [0.0, 0.0], [0, 0]
    for answer, (_, content) in enumerate(CHATS[block]):
        begins = [{begin for number, begin in side if number == answer} for side in sides]
        ends = [{end for (number, _), (end, _) in side.items() if number == answer} for side in sides]
        if not begins[0] & begins[1]:
            continue
        first, last = min(begins[0] & begins[1]), max(ends[0] & ends[1], default=0)
        if last < len(content.encode()):  # cut off: up to where both begin a token last
            last = max(begins[0] & begins[1])
        size += last - first
        for number, side in enumerate(sides):
            inside = [cost for (of, begin), (_, cost) in side.items() if of == answer and first <= begin < last]
            nats[number], tokens[number] = nats[number] + sum(inside), tokens[number] + len(inside)
    units = [size, size] if unit == "byte" else tokens
    return nats[0] / units[0], nats[1] / units[1]


def renormalised(row: Any) -> np.ndarray:
    shares = np.exp(row.logprobs.astype(np.float64))
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize("unit", ["token", "byte"])
def test_an_item_brings_the_distributions_of_the_model_that_read_the_conversation_better(
    unit: Any, world: Path
) -> None:
    data = data_of(world, *BOTH, rule=Rule(unit=unit))
    own, aligned = (store(world, name) for name in BOTH)
    winners = Counter[str]()
    for block in range(len(CHATS)):
        (found,) = data[block]
        assert found.block == block
        of_pivot, of_source = over_common_bytes(world, block, "stores/pivot", unit)
        row = own[block] if of_pivot <= of_source else aligned[block]
        winners["pivot" if of_pivot <= of_source else "source"] += 1
        assert found.fused is not None
        assert found.fused.ids.tolist() == row.ids.tolist()
        np.testing.assert_allclose(found.fused.probabilities, renormalised(row), rtol=1e-6)
        assert found.fused.confidence == pytest.approx(math.exp(-min(of_pivot, of_source)), rel=1e-6)
    assert len(winners) == 2


def test_of_several_sources_each_has_its_share(world: Path) -> None:
    data = data_of(world, *BOTH, "aligned/unigram-pivot", rule=Rule("avg_ce", "token", "byte"))
    batch = Collator(0)([data[number] for number in range(len(data))])
    assert batch["shares"].shape == (len(batch["gold"]), 3)
    np.testing.assert_allclose(batch["shares"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(batch["fused_probabilities"].sum(1), 1, rtol=1e-5)
    assert (batch["shares"].mean(0) > 0.2).all()


def test_items_are_the_blocks_of_their_groups(world: Path) -> None:
    data = data_of(world, *BOTH, groups=[[2, 5], [0], [8, 1, 3]])
    assert len(data) == 3
    assert [[one.block for one in data[number]] for number in range(3)] == [[2, 5], [0], [8, 1, 3]]
    lengths = [len(TOKENIZER(tiny_sources.openchat(chat)[0]).input_ids) for chat in CHATS]
    assert data.lengths == [lengths[2] + lengths[5], lengths[0], lengths[8] + lengths[1] + lengths[3]]


def test_without_stores_nothing_is_fused(world: Path) -> None:
    data = data_of(world)
    assert all(one.fused is None for number in range(len(data)) for one in data[number])
    batch = Collator(0)([data[0], data[1]])
    assert batch["fused_ids"].shape == batch["fused_probabilities"].shape == (len(batch["gold"]), 0)


SHORTENED = ("stores/short", "aligned/bytes-short")


@pytest.mark.parametrize("unit", ["token", "byte"])
def test_positions_beyond_a_models_context_learn_nothing_but_their_next_token(unit: Any, world: Path) -> None:
    data = data_of(world, *SHORTENED, rule=Rule(unit=unit))
    own = store(world, SHORTENED[0])
    cut = 0
    for block in range(len(CHATS)):
        (found,) = data[block]
        positions, fused = found.tokens.positions, found.fused
        read = int((positions + 1 < SHORT).sum())
        assert fused is not None
        assert len(fused.ids) == len(own[block]) == read
        batch = Collator(0)([[found]])
        assert len(batch["gold"]) == len(positions)
        for name in ("fused_probabilities", "shares", "confidence"):
            assert batch[name][:read].any()
            assert not batch[name][read:].any()
        of_pivot, of_source = over_common_bytes(world, block, "stores/short", unit)
        assert fused.shares[:, int(of_source < of_pivot)].all()
        assert fused.confidence == pytest.approx(math.exp(-min(of_pivot, of_source)), rel=1e-6)
        cut += read < len(positions)
    assert 0 < cut < len(CHATS)


def test_stores_of_other_lengths_are_refused_with_block_and_stores(world: Path) -> None:
    data = data_of(world, "stores/short", "aligned/bytes-pivot")
    lengths = [[len(one[block]) for one in data.stores] for block in range(len(CHATS))]
    block = next(block for block, (one, other) in enumerate(lengths) if one != other)
    with pytest.raises(UserError) as error:
        data[block]
    message, supervised = str(error.value), len(TokenFile(tokens_of(world))[block].positions)
    assert f"block {block} has {supervised} supervised positions" in message
    for one, length in zip(data.stores, lengths[block], strict=True):
        assert f"`{one.folder}` {length}" in message
    assert "align again" in message


def test_a_store_of_more_positions_than_the_tokens_is_refused(world: Path) -> None:
    """One of another tokenizer's."""
    data = data_of(world, "stores/unigram")
    sizes = [(len(row), len(data.tokens[block].positions)) for block, row in enumerate(data.stores[0])]
    block = next(block for block, (stored, supervised) in enumerate(sizes) if stored > supervised)
    with pytest.raises(UserError, match=rf"block {block} .*`{data.stores[0].folder}` {sizes[block][0]}"):
        data[block]


def assert_same_batch(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_data_can_be_sent_to_another_process(world: Path) -> None:
    """It takes its files along by name."""
    data = data_of(world, *BOTH)
    data[0]
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    for number in range(len(data)):
        assert_same_batch(Collator(0)([copy[number]]), Collator(0)([data[number]]))


@pytest.mark.slow
def test_a_spawned_worker_gives_the_same_batches(world: Path) -> None:
    groups = pack(TokenFile(tokens_of(world)).lengths.tolist(), 300)
    data, collator = data_of(world, *BOTH, groups=groups), Collator(0, packed=True)
    expected = [
        collator([data[number] for number in (first, first + 1) if number < len(data)]) for first in (0, 2)
    ]
    loader = DataLoader(data, 2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    for found, batch in zip(loader, expected, strict=False):
        assert_same_batch(found, batch)
    assert len(loader) >= len(expected)
