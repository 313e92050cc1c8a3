"""``fusion-trainer extract``, in this process: every number of a store against a dense computation in float64."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_sources
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import CONTEXT, END_OF_TURN
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_trainer.cli import main
from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations import transformers_engine
from fusion_trainer.representations.extract import extract, shard_starts
from fusion_trainer.representations.extraction import batches
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.representations.topk_model import TopKModel
from varm_common.errors import UserError

property_test = settings(max_examples=100, deadline=None, derandomize=True)
CHATS = tiny_sources.made_up_chats(14, words=14)
SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("mistral", "sentencepiece_bpe", {}),
    "llama": ("llama", "unigram", {"padded": 30}),
    "mixtral": ("mixtral", "sentencepiece_bpe", {"padded": 3}),
    "qwen2": ("qwen2", "byte_level_bpe", {"padded": 100, "special": [END_OF_TURN]}),
    "mpt": ("mpt", "unigram", {}),
    "gpt_neox": ("gpt_neox", "byte_level_bpe", {"padded": 64}),
    "gemma": ("gemma", "sentencepiece_bpe", {}),
    "gemma2": ("gemma2", "byte_level_bpe", {"special": [END_OF_TURN]}),
    "cohere": ("cohere", "byte_level_bpe", {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``chats.jsonl`` and a folder for each source; ``mistral`` is the pivot."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    for name, (layout, kind, own) in SOURCES.items():
        tiny_sources.save_source(folder / name, layout, kind, **own)
    return folder


def settings_of(world: Path, source: str, output: Path, **changed: Any) -> dict[str, Any]:
    return {
        "data": [str(world / "chats.jsonl")],
        "pivot": str(world / "mistral"),
        "template": "openchat",
        "source_template": "pivot",
        "model": str(world / source),
        "output": str(output),
        "batch_tokens": 700,
        "shard_tokens": 900,
        **changed,
    }


def run(settings: dict[str, Any], *more: object) -> Result:
    """``fusion-trainer extract`` with the settings as flags; a traceback fails the test."""
    flags = [
        text
        for name, value in settings.items()
        for one in (value if isinstance(value, list) else [value])
        for text in ("--" + name.replace("_", "-"), str(one))
    ]
    result = CliRunner().invoke(main, ["extract", *flags, *map(str, more)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def stores(world: Path) -> dict[str, Path]:
    """The store of each source, for reading only."""
    made, told = {}, []
    for source in SOURCES:
        made[source] = world / "stores" / source
        result = run(settings_of(world, source, made[source]))
        assert result.exit_code == 0, result.output
        told.append("of which kept" in result.output)
    assert told == [True] + [False] * (len(SOURCES) - 1)  # what the data has is told once
    return made


# Against a dense computation in float64


def surfaces(tokenizer: Any) -> Callable[[int], bytes]:
    """The bytes each id stands for, from the tokenizer's vocabulary alone."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()

    def surface(token: int) -> bytes:
        name = tokenizer.convert_ids_to_tokens(token)
        if token in tokenizer.all_special_ids:
            return name.encode() if name == END_OF_TURN else b""
        if byte_level:
            return bytes(byte_of[char] for char in name)
        return bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()

    return surface


def supervised(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The ids of a text, and the positions whose next token ends within a span."""
    ids = tokenizer(text).input_ids
    sizes = [len(surface) for surface in map(surfaces(tokenizer), ids)]
    joined = b"".join(map(surfaces(tokenizer), ids))
    assert joined in (text.encode(), b" " + text.encode())
    ends = np.cumsum(sizes) - (len(joined) - len(text.encode()))
    inside = [any(start < end <= stop for start, stop in spans) for end in ends]
    return ids, [position for position in range(len(ids) - 1) if inside[position + 1]]


@dataclass(frozen=True)
class Dense:
    """Float64 log-probabilities [positions, rows of the model], the gold tokens, the ids that are tokens."""

    logprobs_SV: np.ndarray
    gold: list[int]
    known: list[int]


@cache
def opened(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the plain model of a checkpoint that does not change."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def dense(folder: Path, chat: Sequence[tuple[str, str]], context: int = CONTEXT) -> Dense:
    """A conversation alone through the plain model."""
    tokenizer, model = opened(folder)
    ends = folder.name == "mistral" or END_OF_TURN in tokenizer.get_vocab()  # the pivot, or one that has the token
    ids, positions = supervised(tokenizer, *tiny_sources.openchat(chat, ends))
    ids, positions = ids[:context], [position for position in positions if position + 1 < context]
    logits_SV = model(input_ids=torch.tensor([ids])).logits[0, positions]
    gold = [ids[position + 1] for position in positions]
    return Dense(logits_SV.double().log_softmax(-1).numpy(), gold, sorted(set(tokenizer.get_vocab().values())))


def assert_row_is_dense(row: Any, expected: Dense, k: int) -> None:
    """Equal to the rounding of float16, and of float32 sums in another order."""
    logprobs_SV, positions = expected.logprobs_SV, np.arange(len(expected.gold))
    assert row.ids.shape == (len(positions), k)
    ids_SK = row.ids.astype(np.int64)
    assert all(len(set(ids)) == k for ids in ids_SK.tolist())
    assert set(ids_SK.flatten().tolist()) <= set(expected.known)
    best_SK = -np.sort(-logprobs_SV[:, expected.known], axis=1)[:, :k]
    half = {"rtol": 2**-11, "atol": 2e-4}
    np.testing.assert_allclose(row.logprobs.astype(np.float64), best_SK, **half)
    np.testing.assert_allclose(np.take_along_axis(logprobs_SV, ids_SK, 1), best_SK, rtol=0, atol=2e-4)
    np.testing.assert_allclose(row.gold_logprob.astype(np.float64), logprobs_SV[positions, expected.gold], **half)
    others_SV = np.exp(logprobs_SV)
    others_SV[positions[:, None], ids_SK] = 0
    np.testing.assert_allclose(row.tail.astype(np.float64), others_SV.sum(1), rtol=2**-11, atol=5e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_every_number_of_a_store_is_that_of_the_plain_model_in_float64(
    source: str, world: Path, stores: dict[str, Path]
) -> None:
    store = RepresentationStore(stores[source])
    assert len(store) == len(CHATS)
    assert len(store.manifest["shards"]) > 2
    for number, (row, chat) in enumerate(zip(store, CHATS, strict=True)):
        assert (row.conversation, row.block) == (f"chat-{number}", 0)
        assert_row_is_dense(row, dense(world / source, chat), k=10)


def test_rows_of_all_stores_stand_for_the_same_blocks_in_the_order_of_the_data(
    world: Path, tmp_path: Path
) -> None:
    """Long dialogues are several blocks then."""
    names = []
    for source in ("mistral", "qwen2"):
        config = settings_of(world, source, tmp_path / source, max_length=128, dialogues=str(tmp_path / "blocks"))
        assert run(config).exit_code == 0
        names.append([(row.conversation, row.block) for row in RepresentationStore(tmp_path / source)])
    dialogues = Dialogues(tmp_path / "blocks")
    assert names[0] == names[1] == [(dialogues[n].conversation, dialogues[n].block) for n in range(len(dialogues))]
    assert len(names[0]) > len(CHATS)
    assert list(dict(names[0])) == [f"chat-{number}" for number in range(len(CHATS))]


def test_the_manifest_names_everything_the_store_is_made_from(world: Path, stores: dict[str, Path]) -> None:
    manifest = RepresentationStore(stores["qwen2"]).manifest
    identity = manifest["identity"]
    assert identity["model"] == str(world / "qwen2")
    assert identity["top_k"] == 10
    assert {"revision", "weights", "config", "tokenizer", "template", "data", "dtype"} <= identity.keys()
    (made_with,) = manifest["made_with"]
    assert made_with["torch"] == torch.__version__
    assert made_with["transformers"] == transformers.__version__
    assert {shard["batch_tokens"] for shard in manifest["shards"]} == {700}
    assert identity["vocabulary"] == len(AutoTokenizer.from_pretrained(world / "qwen2"))
    expected = [dense(world / "qwen2", chat) for chat in CHATS]
    assert manifest["rows"] == len(CHATS)
    assert manifest["positions"] == sum(len(one.gold) for one in expected)
    assert [shard["first_row"] for shard in manifest["shards"]] == list(
        np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])])[:-1]
    )
    others = [RepresentationStore(folder).identity for source, folder in stores.items() if source != "qwen2"]
    assert {other["data"] for other in others} == {identity["data"]}
    assert all(other["weights"] != identity["weights"] for other in others)


def test_extracted_stores_verify(stores: dict[str, Path]) -> None:
    for folder in stores.values():
        assert list(RepresentationStore(folder).problems()) == []


def test_texts_longer_than_the_models_context_are_cut_and_counted(world: Path, tmp_path: Path) -> None:
    short = tiny_sources.save_source(
        tmp_path / "short", "mistral", "sentencepiece_bpe", max_position_embeddings=90
    )
    result = run(settings_of(world, "mistral", tmp_path / "store", model=str(short)))
    assert result.exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(short)
    lengths = [len(tokenizer(tiny_sources.openchat(chat)[0]).input_ids) for chat in CHATS]
    cut = sum(max(0, length - 90) for length in lengths)
    store = RepresentationStore(tmp_path / "store")
    assert store.manifest["cut_tokens"] == cut > 0
    assert store.manifest["tokens"] == sum(min(90, length) for length in lengths)
    assert f"{cut:,} tokens are beyond the model's context length" in result.output
    for row, chat in zip(store, CHATS, strict=True):
        assert_row_is_dense(row, dense(short, chat, context=90), k=10)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("auto", 0.15), ("float32", 0.0)])
def test_the_weights_are_used_in_the_requested_dtype(
    dtype: str, tolerance: float, world: Path, tmp_path: Path
) -> None:
    saved = tiny_sources.save_source(
        tmp_path / "saved", "mistral", "sentencepiece_bpe", dtype=torch.bfloat16, initializer_range=0.1
    )
    assert run(settings_of(world, "mistral", tmp_path / dtype, model=str(saved), dtype=dtype)).exit_code == 0
    row = RepresentationStore(tmp_path / dtype)[0]
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids, positions = supervised(tokenizer, *tiny_sources.openchat(CHATS[0], ends=False))
    with torch.no_grad():
        exact = model(input_ids=torch.tensor([ids])).logits[0, positions].double().log_softmax(-1)
    gold = exact[torch.arange(len(positions)), [ids[position + 1] for position in positions]]
    difference = np.abs(row.gold_logprob.astype(np.float64) - gold.numpy()).max()
    assert difference < (tolerance or 5e-3)
    assert tolerance == 0 or difference > 5e-3
    assert not list(RepresentationStore(tmp_path / dtype).problems())


# Batches and shards


@property_test
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed(lengths: list[int], limit: int) -> None:
    made = batches(lengths, limit)
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= limit
    for batch, following in pairwise(made):
        assert min(lengths[row] for row in batch) >= max(lengths[row] for row in following)
        assert lengths[batch[0]] * (len(batch) + 1) > limit


@property_test
@given(st.lists(st.integers(1, 600), min_size=1, max_size=200))
def test_a_batch_of_some_size_is_hardly_padded(lengths: list[int]) -> None:
    made = batches(lengths, 16384)
    for batch in made:
        longest = lengths[batch[0]]
        for before, row in enumerate(batch):
            assert lengths[row] >= 0.75 * longest or before * longest < 2048
    padded = sum(lengths[batch[0]] * len(batch) for batch in made)
    assert padded <= sum(lengths) / 0.75 + 2048 * len(made)


@property_test
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_shards_hold_every_row_once_in_order_and_no_more_tokens_than_allowed(
    lengths: list[int], limit: int
) -> None:
    starts = shard_starts(np.array(lengths, np.int32), limit)
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    for start, stop in pairwise(starts):
        assert start < stop
        assert stop == start + 1 or sum(lengths[start:stop]) <= limit
        assert stop == len(lengths) or sum(lengths[start : stop + 1]) > limit


def test_no_batch_is_larger_than_batch_tokens_unless_a_text_alone_is(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    plain = TopKModel.distributions

    def watched(self: TopKModel, ids_BL: torch.Tensor, *others: Any) -> Any:
        shapes.append(tuple(ids_BL.shape))
        return plain(self, ids_BL, *others)

    monkeypatch.setattr(TopKModel, "distributions", watched)
    assert run(settings_of(world, "mistral", tmp_path / "store", batch_tokens=300)).exit_code == 0
    assert all(rows == 1 or rows * length <= 300 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 1
    assert any(rows == 1 and length > 300 for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == len(CHATS)


def test_batches_change_nothing_but_rounding(world: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    assert run(settings_of(world, "gemma2", tmp_path / "store", batch_tokens=1, shard_tokens=10**6)).exit_code == 0
    alone, together = RepresentationStore(tmp_path / "store"), RepresentationStore(stores["gemma2"])
    assert len(alone.manifest["shards"]) == 1
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(one.gold_logprob, other.gold_logprob, rtol=2**-10, atol=1e-4)


def test_the_order_of_the_shards_changes_no_byte(
    world: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = StoreWriter.missing
    monkeypatch.setattr(StoreWriter, "missing", lambda self: missing(self)[::-1])
    assert run(settings_of(world, "qwen2", tmp_path / "store")).exit_code == 0
    assert content(tmp_path / "store") == content(stores["qwen2"])


# Settings, and running again


def test_a_config_file_and_flags_give_the_same_bytes(world: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    config = settings_of(world, "qwen2", tmp_path / "from file", template="chatml", top_k=3)
    (tmp_path / "qwen2.yaml").write_text(yaml.safe_dump(config))
    result = run({"template": "openchat", "top_k": 10}, tmp_path / "qwen2.yaml")  # a flag wins
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "from file") == content(stores["qwen2"])


def test_a_call_from_python_gives_the_same_bytes(world: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    store = extract(ExtractConfig(**settings_of(world, "qwen2", tmp_path / "store")))
    assert content(store.folder) == content(stores["qwen2"])


def test_a_second_run_does_nothing(world: Path, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in stores["llama"].parent.rglob("*")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished store needs no model")

    monkeypatch.setattr(transformers_engine, "load_causal_lm", refuse)
    assert run(settings_of(world, "llama", stores["llama"])).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in stores["llama"].parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [("top_k", 5, 10), ("dtype", "float16", "float32"), ("shard_tokens", 500, 900), ("model", "mixtral", None)],
)
def test_other_settings_into_the_same_folder_are_refused_with_both_values(
    setting: str, value: Any, was: Any, world: Path, stores: dict[str, Path]
) -> None:
    before = content(stores["llama"])
    changed = str(world / value) if setting == "model" else value
    result = run(settings_of(world, "llama", stores["llama"]) | {setting: changed})
    assert result.exit_code == 1
    assert "is a store with other settings" in result.output
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.startswith("  ")}
    if was is not None:
        assert lines[setting] == [str(value), str(was)]
    else:
        identities = [RepresentationStore(stores[source]).identity for source in ("mixtral", "llama")]
        assert lines["weights"] == [identity["weights"] for identity in identities]
        assert lines["tokenizer"] == [identity["tokenizer"] for identity in identities]
    assert content(stores["llama"]) == before


def test_another_config_over_the_same_weights_is_another_model(
    world: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(world / "llama", tmp_path / "llama")
    assert run(settings_of(world, str(copied), stores["llama"])).exit_code == 0
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    result = run(settings_of(world, str(copied), stores["llama"]))
    assert result.exit_code == 1
    assert "is a store with other settings" in result.output


def test_an_interrupted_run_resumes_with_smaller_batches(world: Path, tmp_path: Path) -> None:
    """So that running out of memory late costs nothing that was done."""
    store = tmp_path / "store"
    assert run(settings_of(world, "gemma", store)).exit_code == 0
    shards = sorted(store.glob("shard-*.arrow"))
    first = shards[0].read_bytes()
    for path in [*shards[1:], store / "manifest.json"]:
        path.unlink()
    write_plan(store, world, "gemma")
    assert run(settings_of(world, "gemma", store, batch_tokens=300)).exit_code == 0
    opened = RepresentationStore(store)
    assert [shard["batch_tokens"] for shard in opened.manifest["shards"]] == [700, *[300] * (len(shards) - 1)]
    assert shards[0].read_bytes() == first
    assert list(opened.problems()) == []


def test_a_run_may_end_with_other_versions_than_it_began_with_and_the_manifest_names_both(
    world: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert run(settings_of(world, "gemma", store)).exit_code == 0
    sorted(store.glob("shard-*.arrow"))[-1].unlink()
    (store / "manifest.json").unlink()
    older = {"device": "cpu", "torch": "2.6.0"}
    write_plan(store, world, "gemma", [older])
    assert run(settings_of(world, "gemma", store)).exit_code == 0
    made_with = RepresentationStore(store).manifest["made_with"]
    assert [one["torch"] for one in made_with] == ["2.6.0", torch.__version__]


def write_plan(store: Path, world: Path, source: str, made_with: list[dict[str, str]] | None = None) -> None:
    """What an unfinished run leaves; taken from a finished one of the same settings."""
    other = store.with_name("finished")
    assert run(settings_of(world, source, other)).exit_code == 0
    manifest = RepresentationStore(other).manifest
    plan = {"identity": manifest["identity"], "made_with": made_with or manifest["made_with"]}
    (store / "extraction.json").write_text(json.dumps(plan))
    shutil.rmtree(other)


def test_other_data_into_the_same_folder_is_refused(world: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    data = tiny_sources.write_sharegpt(tmp_path / "other.jsonl", CHATS[1:])
    config = settings_of(world, "llama", stores["llama"], data=[str(data)], dialogues=str(tmp_path / "dialogues"))
    result = run(config)
    assert result.exit_code == 1
    assert RepresentationStore(stores["llama"]).identity["data"] in result.output
    assert Dialogues(tmp_path / "dialogues").fingerprint in result.output


def test_the_advice_for_a_damaged_store_repairs_it(world: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stores["llama"], tmp_path / "store")
    shard = folder / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    (folder / "shard-00000.arrow").unlink()
    with pytest.raises(UserError, match="damaged") as error:
        RepresentationStore(folder)
    advice = str(error.value)
    if "Remove those shards" in advice:
        shard.unlink()
    if "manifest.json" in advice:
        (folder / "manifest.json").unlink()
    result = run(settings_of(world, "llama", folder))
    assert result.exit_code == 0, result.output
    assert content(folder) == content(stores["llama"])


# Bad input: a message, exit code 1, no traceback, nothing left behind


@pytest.fixture
def refused(world: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """``refused(model=…)`` runs an extraction that must be refused and returns its output."""

    def attempt(**changed: Any) -> str:
        before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
        config = settings_of(world, "mistral", tmp_path / "stores" / "out", dialogues=str(world / "blocks"))
        result = run({**config, **changed})
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - before
        assert left <= {Path("stores")}, left
        return result.output

    return attempt


def test_a_folder_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"no model folder `{tmp_path}/nothing`" in refused(model=f"{tmp_path}/nothing")


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are(
    refused: Callable[..., str], world: Path, tmp_path: Path
) -> None:
    tiny_sources.new_source("llama", 384).save_pretrained(tmp_path / "slow")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    message = refused(model=f"{tmp_path}/slow")
    assert "ByT5Tokenizer" in message
    assert "tokenizer.json" in message


def test_a_model_without_a_tokenizer(refused: Callable[..., str], tmp_path: Path) -> None:
    tiny_sources.new_source("llama", 384).save_pretrained(tmp_path / "bare")
    assert f"no tokenizer of {tmp_path}/bare" in refused(model=f"{tmp_path}/bare")


def test_a_model_without_an_lm_head(refused: Callable[..., str], world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "headless")
    transformers.LlamaModel.from_pretrained(folder).save_pretrained(folder)
    message = refused(model=str(folder))
    assert "has no lm head" in message
    assert "lm_head.weight" in message


@pytest.mark.slow
def test_a_model_that_is_no_language_model_at_all(
    refused: Callable[..., str], world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "vision")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    assert "causal language model" in refused(model=str(folder))


def test_a_checkpoint_that_lacks_a_layer(refused: Callable[..., str], world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "partial")
    tiny_models.edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refused(model=str(folder))
    assert "not all weights" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_model_without_weights(refused: Callable[..., str], world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "no weights in" in refused(model=str(folder))


def test_pickled_weights_give_the_same_store(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    tiny_models.resave(world / "llama", folder, pickled=True)
    stores = []
    for model in (world / "llama", folder):
        config = settings_of(world, "llama", tmp_path / "stores" / model.name, dialogues=str(world / "blocks"))
        result = run({**config, "model": str(model)})
        assert result.exit_code == 0, result.output
        stores.append(RepresentationStore(tmp_path / "stores" / model.name))
    for row in range(len(stores[0])):
        for name in ("ids", "logprobs", "tail", "gold_logprob"):
            assert np.array_equal(getattr(stores[0][row], name), getattr(stores[1][row], name))
    assert stores[0].identity["weights"] != stores[1].identity["weights"]


def test_a_safetensors_file_that_is_cut_short(refused: Callable[..., str], world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "llama", tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(folder) in refused(model=str(folder))


def test_nan_weights_are_named_with_the_first_position_they_spoil(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    """Here an expert of the last layer is NaN, so a position is spoilt only if it is routed there."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    folder = tiny_sources.save_source(tmp_path / "nan", "mixtral", "sentencepiece_bpe", **experts)
    expert = "model.layers.1.block_sparse_moe.experts.6.w3.weight"
    tiny_models.edit(folder, lambda tensors: tensors[expert].view(-1)[5:].fill_(torch.nan))
    data = tiny_sources.write_sharegpt(tmp_path / "one.jsonl", [CHATS[3]])
    message = refused(model=str(folder), data=[str(data)], dialogues=str(tmp_path.parent / "one block"))
    spoilt = np.isnan(dense(folder, CHATS[3]).logprobs_SV).any(1)
    _, positions = supervised(AutoTokenizer.from_pretrained(folder), *tiny_sources.openchat(CHATS[3]))
    assert not spoilt.all()
    assert not spoilt[0]
    first = positions[int(spoilt.argmax())]
    assert f"first at token position {first} of conversation 'chat-0', block 0 (one.jsonl, line 1)" in message
    assert "weights are not finite: model.layers.1." in message


LAST_WEIGHTS = {
    "mistral": "model.layers.1.mlp.down_proj.weight",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h.weight",
    "gemma": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("source", LAST_WEIGHTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(
    source: str, value: float, refused: Callable[..., str], world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(world / source, tmp_path / "nan")
    name = LAST_WEIGHTS[source]
    tiny_models.edit(folder, lambda tensors: tensors[name][7, 5].fill_(value))
    message = refused(model=str(folder))
    assert "NaN or infinite logits" in message
    assert f"weights are not finite: {name}, first at [7, 5]" in message


def test_more_places_than_tokens(refused: Callable[..., str], world: Path) -> None:
    tokens = len(AutoTokenizer.from_pretrained(world / "mistral"))
    message = refused(top_k=tokens + 1)
    assert f"--top-k {tokens + 1}" in message
    assert f"{tokens} tokens" in message


@pytest.mark.parametrize("top_k", [10, 480])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows(
    top_k: int, refused: Callable[..., str], world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(world / "gpt_neox", tmp_path / "small")
    tiny_sources.new_source("gpt_neox", 300).save_pretrained(folder)
    message = refused(model=str(folder), top_k=top_k)
    assert "300" in message
    assert "the tokenizer does not belong to these weights" in message


def test_an_output_folder_that_holds_something_else(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert "holds other files (`thesis.tex`)" in refused(output=f"{tmp_path}/mine")
    assert content(tmp_path / "mine") == {"thesis.tex": b"mine"}


def test_an_output_that_is_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "is a file" in refused(output=f"{tmp_path}/mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_output_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert f"{tmp_path}/mine" in refused(output=f"{tmp_path}/mine/store")


def test_the_folder_of_the_model_as_output(refused: Callable[..., str], world: Path) -> None:
    before = sorted(path.name for path in (world / "mistral").iterdir())
    assert "holds other files" in refused(output=str(world / "mistral"))
    assert sorted(path.name for path in (world / "mistral").iterdir()) == before


def test_a_row_that_cannot_be_used_is_named_by_file_and_line(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]} for text in ("a", 7)
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused(data=[f"{tmp_path}/bad.jsonl"], dialogues=f"{tmp_path}/blocks")
    assert "bad.jsonl" in message
    assert "2" in message


def test_unknown_missing_and_out_of_range_settings_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "extract.yaml").write_text("pivot: p\ndata: d\ntopk: 3\nbatch_tokens: 0\nmodel: m\n")
    result = run({}, tmp_path / "extract.yaml")
    assert result.exit_code == 1
    assert "line 3: unknown setting `topk`; did you mean `top_k`?" in result.output
    assert "line 4: `batch_tokens` cannot be 0" in result.output
    assert "`output` is not set (--output)" in result.output
