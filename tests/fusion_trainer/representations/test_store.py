"""The store: what is written comes back, in the space it may take; what is damaged or does not fit is refused."""

import json
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny_fusion
import tiny_sources
from click.testing import CliRunner, Result
from tiny_sources import END_OF_TURN
from transformers import AutoTokenizer

from fusion_trainer.cli import main
from fusion_trainer.representations.store import (
    ALIGNED,
    ALIGNED_VERSION,
    Representation,
    RepresentationStore,
    id_dtype,
)
from fusion_trainer.representations.store_writer import StoreWriter
from varm_common.errors import UserError

K = 10
LENGTHS = (130, 1, 101, 256, 0, 117, 104)
"""Supervised positions of each row."""
FIRST_ROWS = (0, 2, 3, 6, 7)
"""Of the shards, and the number of rows."""


def distributions(rng: np.random.Generator, positions: int, vocabulary: int, k: int = K) -> Representation:
    """The top k of random distributions."""
    logits = rng.normal(size=(positions, k + 20)) * 3
    ids = np.array([rng.choice(vocabulary, k + 20, replace=False) for _ in range(positions)])
    ids = ids.reshape(positions, k + 20)
    order = np.argsort(-logits, axis=1)[:, :k]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    best = np.take_along_axis(logprobs, order, 1)
    return Representation(
        np.take_along_axis(ids, order, 1).astype(id_dtype(vocabulary)),
        best.astype(np.float16),
        (1 - np.exp(best).sum(1)).astype(np.float16),
        logprobs[:, 0].astype(np.float16),
    )


def rows_of(seed: int, vocabulary: int, lengths: Sequence[int] = LENGTHS, k: int = K) -> list[Representation]:
    """Every second conversation has two blocks."""
    rng = np.random.default_rng(seed)
    names = names_of(len(lengths))
    return [
        replace(distributions(rng, positions, vocabulary, k), conversation=conversation, block=block)
        for positions, (conversation, block) in zip(lengths, names, strict=True)
    ]


def identity_of(vocabulary: int, **other: Any) -> dict[str, Any]:
    return {
        "model": "org/solar",
        "revision": "abc123",
        "tokenizer": "t" * 64,
        "template": "c" * 64,
        "data": "d" * 64,
        "top_k": K,
        "vocabulary": vocabulary,
        "dtype": "bfloat16",
        **other,
    }


def names_of(number: int) -> list[tuple[str, int]]:
    """Conversation and block of each row."""
    return [(f"chat-{row * 2 // 3} 日本", int(row % 3 == 1)) for row in range(number)]


def write_store(
    folder: Path,
    rows: Sequence[Representation],
    identity: dict[str, Any],
    *,
    first_rows: Sequence[int] = FIRST_ROWS,
    finish: bool = True,
) -> Path:
    writer = StoreWriter(folder, identity, first_rows)
    writer.begin()
    for shard in writer.missing():
        here = rows[slice(*first_rows[shard : shard + 2])]
        positions = sum(map(len, here))
        writer.write(shard, here, {"positions": positions, "tokens": 2 * positions})
    writer.wait()
    if finish:
        writer.finish()
    return folder


def refuses(folder: Path) -> str:
    """The message of opening the store."""
    with pytest.raises(UserError) as error:
        RepresentationStore(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def run(*arguments: object) -> Result:
    """``fusion-trainer`` in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for reading only."""
    return write_store(tmp_path_factory.mktemp("stores") / "solar", rows_of(0, 32002), identity_of(32002))


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    return shutil.copytree(written, tmp_path / "copied")


# What is written comes back


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(600, np.uint16), (65536, np.uint16), (65537, np.uint32), (152064, np.uint32)],
)
def test_what_is_written_comes_back_bit_by_bit(vocabulary: int, dtype: type, tmp_path: Path) -> None:
    rows = rows_of(1, vocabulary)
    rows[0].ids[0, 0] = vocabulary - 1
    store = RepresentationStore(write_store(tmp_path / "store", rows, identity_of(vocabulary)))
    assert len(store) == len(rows)
    assert store.k == K
    assert store.identity == identity_of(vocabulary)
    for row, (found, expected, name) in enumerate(zip(store, rows, names_of(len(rows)), strict=True)):
        assert (found.conversation, found.block) == name, row
        assert found.ids.dtype == dtype
        for field in ("ids", "logprobs", "tail", "gold_logprob"):
            ours, theirs = getattr(found, field), getattr(expected, field)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{field} of row {row}")
    assert run("store", "verify", store.folder).exit_code == 0


@pytest.mark.parametrize("k", [1, 2, 64])
def test_any_k_can_be_kept(k: int, tmp_path: Path) -> None:
    rows = rows_of(2, 500, k=k)
    store = RepresentationStore(write_store(tmp_path / "store", rows, identity_of(500, top_k=k)))
    for found, expected in zip(store, rows, strict=True):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    assert not list(store.problems())


@pytest.mark.parametrize(("vocabulary", "budget"), [(65536, 45), (65537, 65)])
def test_a_supervised_token_takes_no_more_bytes_than_its_budget(
    vocabulary: int, budget: int, tmp_path: Path
) -> None:
    rows = rows_of(3, vocabulary, lengths=[100 + row % 50 for row in range(100)])
    write_store(tmp_path / "store", rows, identity_of(vocabulary), first_rows=(0, 60, 100))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert on_disk == RepresentationStore(tmp_path / "store").bytes
    assert on_disk / sum(len(row) for row in rows) <= budget


def test_rows_are_views_of_the_mapped_file(written: Path) -> None:
    store = RepresentationStore(written)
    before = pa.total_allocated_bytes()
    one, again = store[3], store[3]
    assert pa.total_allocated_bytes() == before
    for field in ("ids", "logprobs", "tail", "gold_logprob"):
        array = getattr(one, field)
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert np.shares_memory(array, getattr(again, field))
    assert isinstance(one, Representation)


def test_a_store_can_be_sent_to_another_process(written: Path) -> None:
    store = RepresentationStore(written)
    assert store[0].conversation == names_of(1)[0][0]
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received[5].ids, store[5].ids)
    assert received.identity == store.identity


@pytest.mark.parametrize("row", [-1, len(LENGTHS)])
def test_a_row_that_is_not_there_is_an_index_error(written: Path, row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        RepresentationStore(written)[row]


def test_the_stores_of_two_models_over_the_same_data_line_up(written: Path, tmp_path: Path) -> None:
    """Other tokenizer, other lengths, other vocabulary, other shards: the n-th row is the same block."""
    rows = rows_of(7, 152064, lengths=[length // 2 for length in LENGTHS])
    identity = identity_of(152064, model="org/qwen", tokenizer="q" * 64)
    other = RepresentationStore(write_store(tmp_path / "qwen", rows, identity, first_rows=(0, 5, 7)))
    store = RepresentationStore(written).demand(data=other.identity["data"])
    pairs = [((a.conversation, a.block), (b.conversation, b.block)) for a, b in zip(store, other, strict=True)]
    assert all(a == b for a, b in pairs)
    assert len({a for a, _ in pairs}) == len(LENGTHS)


# A standard format


def expected_table(store: RepresentationStore, first: int, last: int) -> list[dict[str, Any]]:
    return [
        {
            "conversation": store[row].conversation,
            "block": store[row].block,
            "ids": store[row].ids.tolist(),
            "gold_logprob": store[row].gold_logprob.tolist(),
        }
        for row in range(first, last)
    ]


def read_with_pyarrow(shard: Path) -> list[dict[str, Any]]:
    with pa.memory_map(str(shard)) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def read_with_datasets(shard: Path) -> list[dict[str, Any]]:
    cache = shard.parent.parent / "cache"
    dataset = datasets.load_dataset("arrow", data_files=str(shard), split="train", cache_dir=str(cache))
    return [dict(row) for row in dataset]


def read_with_pandas(shard: Path) -> list[dict[str, Any]]:
    return pd.read_feather(shard).to_dict("records")


@pytest.mark.parametrize("read", [read_with_pyarrow, read_with_datasets, read_with_pandas])
def test_a_shard_is_a_standard_arrow_file(read: Callable[[Path], list[dict[str, Any]]], copied: Path) -> None:
    store = RepresentationStore(copied)
    found = [
        {
            "conversation": row["conversation"],
            "block": row["block"],
            "ids": [list(position["ids"]) for position in row["positions"]],
            "gold_logprob": [position["gold_logprob"] for position in row["positions"]],
        }
        for row in read(copied / "shard-00002.arrow")
    ]
    assert found == expected_table(store, 3, 6)


# Opening


def test_an_unfinished_store_says_to_run_its_extraction_again(tmp_path: Path) -> None:
    write_store(tmp_path / "store", rows_of(0, 600), identity_of(600), finish=False)
    message = refuses(tmp_path / "store")
    assert "not finished" in message
    assert "run its extraction again" in message


def test_a_folder_that_is_no_store_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "no store" in refuses(tmp_path)
    assert "no store" in refuses(tmp_path / "nothing")


def test_a_manifest_that_is_not_json_or_of_something_else_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    for other in ({**manifest, "version": 1}, {**manifest, "format": "fusion-trainer dialogues"}, [1], "x"):
        (copied / "manifest.json").write_text(json.dumps(other))
        assert "version 2" in refuses(copied)
    (copied / "manifest.json").write_text('{"format": ')
    assert "not JSON" in refuses(copied)
    (copied / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not JSON" in refuses(copied)


def test_a_missing_and_a_truncated_shard_are_named(copied: Path) -> None:
    (copied / "shard-00001.arrow").unlink()
    shard = copied / "shard-00002.arrow"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refuses(copied)
    assert "shard-00001.arrow is missing" in message
    assert f"shard-00002.arrow has {size - 100} bytes, not {size}" in message


def test_a_store_that_does_not_fit_is_refused_with_both_values_side_by_side(written: Path) -> None:
    store = RepresentationStore(written)
    assert store.demand(top_k=K, data="d" * 64, tokenizer="t" * 64) is store
    with pytest.raises(UserError) as error:
        store.demand(tokenizer="u" * 64, data="d" * 64, top_k=20)
    head, columns, *differing = str(error.value).splitlines()
    assert str(written) in head
    assert columns.split() == ["wanted", "found"]
    assert [line.split() for line in differing] == [["tokenizer", "u" * 64, "t" * 64], ["top_k", "20", "10"]]


# Beginning a store, and resuming


def test_resuming_writes_only_what_is_missing_and_the_same_bytes(written: Path, tmp_path: Path) -> None:
    rows, identity, folder = rows_of(0, 32002), identity_of(32002), tmp_path / "store"
    write_store(folder, rows, identity, finish=False)
    for lost in ("shard-00000.arrow", "shard-00003.arrow"):
        (folder / lost).unlink()
    (folder / "shard-00003.arrow.123.tmp").write_bytes(b"half of it")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    write_store(folder, rows, identity)
    assert content(folder) == content(written)
    assert all((folder / name).stat().st_mtime_ns == written_at for name, written_at in kept.items())


@pytest.mark.parametrize("finish", [True, False])
def test_a_store_of_something_else_is_left_alone(finish: bool, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", rows_of(0, 600), identity_of(600), finish=finish)
    before = content(folder)
    with pytest.raises(UserError, match=r"is a store with other settings") as error:
        StoreWriter(folder, identity_of(600, data="e" * 64, dtype="float32"), FIRST_ROWS).begin()
    differing = [line.split() for line in str(error.value).splitlines()[2:4]]
    assert differing == [["data", "e" * 64, "d" * 64], ["dtype", "float32", "bfloat16"]]
    assert "--output" in str(error.value)
    assert content(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "shard-00000.arrow.txt", "notes.tmp.md"])
def test_a_folder_that_holds_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds other files.*{name}"):
        StoreWriter(tmp_path, identity_of(600), FIRST_ROWS).begin()
    assert content(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("name", ["manifest.json", "extraction.json"])
@pytest.mark.parametrize("text", ["{", '{"format": "other"}', '{"identity": 3}', "[]", "\xff"])
def test_a_folder_with_a_manifest_of_another_program_is_left_alone(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"has another format|not JSON"):
        StoreWriter(tmp_path, identity_of(600), FIRST_ROWS).begin()
    assert content(tmp_path) == {name: text.encode("latin-1")}


def test_a_run_that_fails_before_its_first_shard_leaves_no_folder(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", identity_of(600), FIRST_ROWS)
    writer.begin()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_while_its_first_shard_is_being_written_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is written in the background, here on a slow disk."""
    rows, identity, folder = rows_of(0, 600), identity_of(600), tmp_path / "store"
    writer = StoreWriter(folder, identity, FIRST_ROWS)
    writer.begin()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: time.sleep(0.3))
        writer.write(0, rows[:2], {"positions": 131, "tokens": 262})
        while not list(folder.glob("*.tmp")):
            time.sleep(0.01)
        writer.abandon()
        writer._thread.shutdown()
    write_store(folder, rows, identity)
    assert len(RepresentationStore(folder)) == len(rows)


def test_the_bytes_do_not_depend_on_the_order_in_which_shards_are_written(written: Path, tmp_path: Path) -> None:
    rows = rows_of(0, 32002)
    writer = StoreWriter(tmp_path / "store", identity_of(32002), FIRST_ROWS)
    writer.begin()
    for shard in (2, 0, 3, 1):
        here = rows[slice(*FIRST_ROWS[shard : shard + 2])]
        positions = sum(map(len, here))
        writer.write(shard, here, {"positions": positions, "tokens": 2 * positions})
    writer.wait()
    writer.finish()
    assert content(tmp_path / "store") == content(written)


# fusion-trainer store verify


def damage(folder: Path, change: Callable[[list[Representation]], None]) -> Path:
    """A store whose rows were wrong when they were written, so that its checksums fit."""
    rows = rows_of(0, 32002)
    change(rows)
    return write_store(folder, rows, identity_of(32002))


def nan(rows: list[Representation]) -> None:
    rows[3].logprobs[17, 4] = np.nan


def infinite_gold(rows: list[Representation]) -> None:
    rows[3].gold_logprob[17] = -np.inf


def id_out_of_range(rows: list[Representation]) -> None:
    rows[3].ids[17, 2] = 32002


def id_twice(rows: list[Representation]) -> None:
    rows[3].ids[17, 9] = rows[3].ids[17, 0]


def rising(rows: list[Representation]) -> None:
    rows[3].logprobs[17] = rows[3].logprobs[17, ::-1]


def above_zero(rows: list[Representation]) -> None:
    rows[3].gold_logprob[17] = 0.25


def too_much_mass(rows: list[Representation]) -> None:
    rows[3].tail[17] += np.float16(0.02)


def negative_tail(rows: list[Representation]) -> None:
    rows[3].tail[17] = -0.001


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nan, "NaN or infinite"),
        (infinite_gold, "NaN or infinite"),
        (id_out_of_range, "an id outside the vocabulary"),
        (id_twice, "an id twice"),
        (rising, "log-probabilities that rise"),
        (above_zero, "a log-probability above 0"),
        (too_much_mass, "a total mass that is not 1"),
        (negative_tail, r"a tail outside \[0, 1\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_finds_wrong_numbers_and_says_where(
    change: Callable[[list[Representation]], None], problem: str, tmp_path: Path
) -> None:
    result = run("store", "verify", damage(tmp_path / "store", change))
    conversation, block = names_of(4)[3]
    assert result.exit_code == 1
    assert re.search(
        rf"shard-00002\.arrow: {problem} at 1 positions, first in conversation '{conversation}', block {block}, "
        r"position 17\b",
        result.output,
    ), result.output


CROSS_ENTROPIES = {
    "ce_per_token": 1.5,
    "ce_per_byte": math.nan,
    "pivot_ce_per_token": 2.25,
    "pivot_ce_per_byte": 0.75,
}


def as_aligned(row: Representation) -> Representation:
    """Of a source that reads every second position and two bytes at a time."""
    paired, gold_bytes = np.arange(len(row), dtype=np.uint8) % 2, np.full(len(row), 2, np.uint16)
    return replace(row, paired=paired, gold_bytes=gold_bytes, **CROSS_ENTROPIES)


ALIGNED_IDENTITY = {"kind": ALIGNED, "version": ALIGNED_VERSION}


def test_the_columns_of_an_aligned_store_come_back(tmp_path: Path) -> None:
    rows = [as_aligned(row) for row in rows_of(0, 32002)]
    store = RepresentationStore(write_store(tmp_path / "store", rows, identity_of(32002, **ALIGNED_IDENTITY)))
    assert list(store.problems()) == []
    for found, row in zip(store, rows, strict=True):
        for name in ("paired", "gold_bytes"):
            column = getattr(found, name)
            assert (column.dtype, column.tobytes()) == (getattr(row, name).dtype, getattr(row, name).tobytes())
        assert {name: getattr(found, name) for name in CROSS_ENTROPIES} == pytest.approx(
            CROSS_ENTROPIES, nan_ok=True
        )


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [("paired", 2, "`paired` neither 0 nor 1"), ("gold_bytes", 0, "a token of no bytes")],
)
def test_verify_finds_wrong_numbers_of_an_aligned_store(
    column: str, value: int, problem: str, tmp_path: Path
) -> None:
    rows = [as_aligned(row) for row in rows_of(0, 32002)]
    getattr(rows[3], column)[17] = value
    folder = write_store(tmp_path / "store", rows, identity_of(32002, **ALIGNED_IDENTITY))
    (found,) = RepresentationStore(folder).problems()
    assert found.startswith(f"shard-00002.arrow: {problem} at 1 positions")
    assert found.endswith("position 17")


def test_verify_finds_any_flipped_bit(copied: Path) -> None:
    for shard, byte in (("shard-00000.arrow", 3000), ("shard-00003.arrow", -300)):
        data = bytearray((copied / shard).read_bytes())
        data[byte] ^= 1
        (copied / shard).write_bytes(data)
    result = run("store", "verify", copied)
    assert result.exit_code == 1
    assert "shard-00000.arrow: its SHA-256 does not match the manifest" in result.output
    assert "shard-00003.arrow: its SHA-256 does not match the manifest" in result.output
    assert "shard-00001" not in result.output


@pytest.mark.parametrize("fill", [b"\x00", b"\xff"])
def test_verify_survives_a_shard_of_garbage(fill: bytes, copied: Path) -> None:
    shard = copied / "shard-00002.arrow"
    shard.write_bytes(fill * shard.stat().st_size)
    result = run("store", "verify", copied)
    assert result.exit_code == 1
    assert "shard-00002.arrow: not a readable shard" in result.output
    assert "shard-00003" not in result.output


def test_verify_finds_nothing_wrong_with_a_good_store(written: Path) -> None:
    result = run("store", "verify", written)
    assert result.exit_code == 0
    assert "4 shards, 7 rows, no problems" in result.output


# fusion-trainer store show


ANSWER = "is 2.\n日本"
TEXTS = {
    "pivot": f"GPT4 Correct User: 1 + 1{END_OF_TURN}GPT4 Correct Assistant: {ANSWER}{END_OF_TURN}",
    "source": f"GPT4 Correct User: 1 + 1{END_OF_TURN}GPT4 Correct Assistant: {ANSWER}{END_OF_TURN}",
    "own": f"<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n",
}
"""The second conversation as the pivot reads it, a source that reads its text, and one in its own template."""
FOLLOW = {"pivot": f" {ANSWER}{END_OF_TURN}", "source": f" {ANSWER}{END_OF_TURN}", "own": f"{ANSWER}<|im_end|>"}
"""What follows in it that a model is queried for."""


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pivot, two sources and the stores of all; ``own`` is queried in its own template, ChatML."""
    world = tmp_path_factory.mktemp("world")
    tiny_sources.save_source(world / "pivot", "mistral", "sentencepiece_bpe", special=[END_OF_TURN])
    tiny_sources.save_source(world / "source", "qwen2", "byte_level_bpe", special=[END_OF_TURN], padded=20)
    tiny_sources.save_source(world / "own", "qwen2", "byte_level_bpe", **tiny_fusion.CHATML)
    tiny_sources.write_sharegpt(world / "chats.jsonl", [[("Hi!", "A quick fox")], [("1 + 1", ANSWER)]])
    for name in TEXTS:
        result = run(
            *("extract", "--data", world / "chats.jsonl", "--pivot", world / "pivot", "--template", "openchat"),
            *("--model", world / name, "--output", world / "stores" / name, "--top-k", 5),
            *("--source-template", "own" if name == "own" else "pivot"),
        )
        assert result.exit_code == 0, result.output
    return world


@pytest.mark.parametrize("name", TEXTS)
def test_a_store_has_the_places_of_the_answers_in_the_text_that_its_model_has_read(
    name: str, extracted: Path
) -> None:
    (row,) = read_with_pyarrow(extracted / "stores" / name / "shard-00000.arrow")[1:]
    text, (turn, start, stop, end) = TEXTS[name].encode(), *row["answers"]
    assert (turn, text[start:stop].decode()) == (1, ANSWER)
    assert text[stop:end].decode() == ("<|im_end|>" if name == "own" else END_OF_TURN)


@pytest.mark.parametrize("name", TEXTS)
def test_show_prints_the_manifest_and_a_row_with_the_tokens_that_really_followed(
    name: str, extracted: Path
) -> None:
    result = run("store", "show", extracted / "stores" / name, "--row", 1)
    assert result.exit_code == 0
    store = RepresentationStore(extracted / "stores" / name)
    for key in ("tokenizer", "data", "weights", "template"):
        assert store.identity[key] in result.output
    assert "conversation 'chat-1', block 0" in result.output
    assert TEXTS[name] in result.output
    tokenizer = AutoTokenizer.from_pretrained(extracted / name)
    head, follows = len(tokenizer(TEXTS[name].removesuffix("\n")).input_ids), FOLLOW[name]
    answer = tokenizer(TEXTS[name].removesuffix("\n")).input_ids[head - len(store[1]) :]
    assert tokenizer.decode(answer) == (follows.strip() if name == "pivot" else follows)
    table = result.output.split("next token")[1].splitlines()[1:]
    assert len(table) == len(answer) == len(store[1])
    for line, token, row in zip(table, answer, range(len(answer)), strict=True):
        shown = repr(tokenizer.decode([token]))
        assert line.startswith(f"{shown:16} {float(store[1].gold_logprob[row]):7.3f}"), line
        for entry, logprob in zip(store[1].ids[row], store[1].logprobs[row], strict=True):
            assert f"{tokenizer.decode([int(entry)])!r} {math.exp(logprob):.3f}" in line


def test_show_prints_the_requested_number_of_positions(extracted: Path) -> None:
    result = run("store", "show", extracted / "stores" / "source", "--positions", 2)
    assert len(result.output.split("next token")[1].splitlines()) == 4
    assert f"{len(RepresentationStore(extracted / 'stores' / 'source')[0]) - 2} more" in result.output


def test_show_refuses_another_tokenizer_and_other_dialogues(extracted: Path, tmp_path: Path) -> None:
    store = extracted / "stores" / "source"
    result = run("store", "show", store, "--tokenizer", extracted / "pivot")
    assert result.exit_code == 1
    assert "does not match what is needed" in result.output
    assert RepresentationStore(store).identity["tokenizer"] in result.output
    tiny_sources.write_sharegpt(tmp_path / "chats.jsonl", [[("Hi!", "Another fox")]])
    prepared = ("--template", "openchat", "--dialogues", tmp_path / "dialogues")
    run("prepare", "--data", tmp_path / "chats.jsonl", "--pivot", extracted / "pivot", *prepared)
    result = run("store", "show", store, "--dialogues", tmp_path / "dialogues")
    assert result.exit_code == 1
    assert RepresentationStore(store).identity["data"] in result.output


def test_show_of_a_model_that_has_moved_takes_its_tokenizer_from_where_it_is_now(
    extracted: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(extracted / "stores" / "source", tmp_path / "store")
    result = run("store", "show", store, "--tokenizer", extracted / "source", "--row", 0)
    assert result.exit_code == 0
    assert "\n?   " in result.output  # no dialogues beside it: what followed is not known
    assert run("store", "show", store, "--row", 2).exit_code == 1
