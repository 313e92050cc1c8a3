"""``fusion-trainer import``: published rows of tiny models against our own extraction from the same models."""

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import published_rows
import pytest
import tiny_sources
import tiny_tokenizers
from published_rows import Row
from tiny_sources import END_OF_TURN

from fusion_trainer.alignment.align import align
from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.config import AlignConfig, ExtractConfig, ImportConfig, TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import reader_of_store
from fusion_trainer.data.templates import FOLDER
from fusion_trainer.published.import_rows import import_rows
from fusion_trainer.published.rows import RowError, Tokens
from fusion_trainer.published.texts import BlockMaker
from fusion_trainer.representations.extract import extract
from fusion_trainer.representations.store import Representation, RepresentationStore
from fusion_trainer.representations.store_tokenizer import tokenizer_of
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.text.tokenizer import TextTokenizer
from fusion_trainer.training.train import train
from varm_common.errors import UserError

CHATS = tiny_sources.made_up_chats(6, seed=5, words=7, turns=2)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IM_END = "<|im_end|>"
LENGTH, K = 80, 24
ULP = 2.0**-11
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pivot, a source of the same vocabulary (``twin``) and one of another (``bytes``).

    There are the models, our own stores of them in ``stores``, and their rows in ``published``.
    """
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    for seed, name in enumerate(("pivot", "twin")):
        kind = {"special": (END_OF_TURN,), "num_key_value_heads": 1, "seed": seed, **SMALL}
        tiny_sources.save_source(folder / name, "llama", "sentencepiece_bpe", **kind)
    tiny_sources.save_source(folder / "bytes", "gpt_neox", "byte_level_bpe", special=(IM_END,), seed=2, **SMALL)
    template = (FOLDER / "openchat.jinja").read_text(encoding="utf-8").replace("{{- bos_token -}}", "")
    (folder / "im_end.jinja").write_text(template.replace(END_OF_TURN, IM_END), encoding="utf-8")
    templates = {"pivot": "own", "twin": "pivot", "bytes": str(folder / "im_end.jinja")}
    for name, ending in {"pivot": END_OF_TURN, "twin": END_OF_TURN, "bytes": IM_END}.items():
        settings = {"data": [str(folder / "chats.jsonl")], "pivot": str(folder / "pivot"), "top_k": K}
        settings |= {"template": "openchat", "source_template": templates[name], "model": str(folder / name)}
        extract(ExtractConfig(**settings, output=folder / "stores" / name))
        texts = [published_rows.chat_text(chat, ending) for chat in CHATS]
        rows = published_rows.represented(folder / name, texts, ending, LENGTH, K)
        published_rows.save(folder / "published" / name, rows)
    return folder


@pytest.fixture(scope="module")
def imported(world: Path) -> Path:
    """The imported stores of ``pivot`` and ``bytes``, and the dialogues that were made from the pivot's rows."""
    folder = world / "imported"
    for name in ("pivot", "bytes"):
        bring(world, name, folder / name, dialogues=folder / "dialogues")
    return folder


def bring(world: Path, name: str, output: Path, data: Path | None = None, **changed: Any) -> RepresentationStore:
    """Import published rows of the model ``name``."""
    settings = {"pivot": str(world / "pivot"), "data": [str(data or world / "published" / name)], "output": output}
    model = None if name == "pivot" else str(world / name)
    return import_rows(ImportConfig(**{**settings, "model": model, **changed}))[0]


@cache
def read_rows(path: Path) -> list[Row]:
    return list(datasets.load_from_disk(str(path))["train"])


def rows_of(path: Path) -> list[Row]:
    return deepcopy(read_rows(path))


def distributions(store: RepresentationStore) -> Iterator[dict[int, tuple[Representation, int]]]:
    """For each row, the token position → the row of the store, and the place of the position in it."""
    dialogues = Dialogues.beside(store.folder, store.identity["data"])
    assert dialogues is not None
    reader = reader_of_store(store.identity, tokenizer_of(store, None, False))
    for row, read in zip(store, read_blocks(reader, [dialogues[n] for n in range(len(dialogues))]), strict=True):
        assert len(row) == len(read.positions)
        yield {int(position): (row, place) for place, position in enumerate(read.positions)}


def same_distributions(ours: RepresentationStore, theirs: RepresentationStore) -> int:
    """Compare two stores of a model at every position of the first; how many tails are known.

    Published logits are rounded to float16, and so is the sum that follows from a logit and a cross-entropy.
    """
    known = 0
    for mine, other in zip(distributions(ours), distributions(theirs), strict=True):
        assert mine.keys() <= other.keys()
        for position, (row, place) in mine.items():
            again, at = other[position]
            exact, found = (
                dict(zip(r.ids[n].tolist(), r.logprobs[n].astype(float).tolist(), strict=True))
                for r, n in ((row, place), (again, at))
            )
            shared = exact.keys() & found.keys()
            assert len(shared) >= K - 2, "ids of nearly the same probability may change places at the end"
            rounding = 16 * ULP + ULP * (abs(min(exact.values())) + abs(float(row.gold_logprob[place])))
            if np.isnan(again.tail[at]):
                assert np.isclose(sum(np.exp([*found.values()])), 1, atol=0.01)
                shift = np.log(sum(np.exp([*exact.values()])))
            else:
                known += 1
                shift = 0.0
                assert abs(float(again.tail[at]) - float(row.tail[place])) < 2 * rounding
            assert max(abs(exact[token] - shift - found[token]) for token in shared) < 2 * rounding
            assert abs(float(row.gold_logprob[place]) - float(again.gold_logprob[at])) < rounding
    return known


@pytest.mark.parametrize("name", ["pivot", "bytes"])
def test_an_imported_store_equals_the_extracted_one(world: Path, imported: Path, name: str) -> None:
    ours, theirs = RepresentationStore(world / "stores" / name), RepresentationStore(imported / name)
    known = same_distributions(ours, theirs)
    assert theirs.unknown == ("tail",)
    positions = theirs.manifest["positions"]
    assert 0 < known <= positions - theirs.manifest["unknown_tail"] < positions
    assert not [*theirs.check().problems()]
    assert theirs.identity["weights"] == (ours.identity["weights"] if name == "pivot" else None)


def test_the_positions_are_those_before_a_label(world: Path, imported: Path) -> None:
    store = RepresentationStore(imported / "pivot")
    for row, found in zip(rows_of(world / "published" / "pivot"), distributions(store), strict=True):
        labels = np.array(row["labels"])
        assert sorted(found) == (np.flatnonzero(labels[1:] != -100)).tolist()


def test_what_needs_the_unknown_is_refused(imported: Path, tmp_path: Path) -> None:
    stores = {"source_store": imported / "bytes", "pivot_store": imported / "pivot"}
    with pytest.raises(UserError, match=r"(?s)`spread`.* needs `tail`, which is not known everywhere in .*bytes"):
        align(AlignConfig(**stores, output=tmp_path / "aligned", workers=1, spread=True))
    assert not (tmp_path / "aligned").exists()


@pytest.mark.slow
def test_imported_stores_are_aligned_and_train_a_target(world: Path, imported: Path, tmp_path: Path) -> None:
    stores = {"source_store": imported / "bytes", "pivot_store": imported / "pivot"}
    aligned, _ = align(AlignConfig(**stores, output=imported / "aligned", workers=1))
    own = {name: world / "stores" / model for name, model in (("source_store", "bytes"), ("pivot_store", "pivot"))}
    ours, _ = align(AlignConfig(**own, output=tmp_path / "ours", workers=1))
    assert aligned.unknown == ("tail",)
    assert not [*aligned.problems()]
    assert aligned.manifest["ends_paired"] == ours.manifest["ends_paired"] > 0
    for mine, other in zip(ours, aligned, strict=True):
        assert other.ce_per_token == pytest.approx(mine.ce_per_token, rel=0.02)
        assert other.pivot_ce_per_token == pytest.approx(mine.pivot_ce_per_token, rel=0.1)  # learns a space more
    settings = {"pivot": str(world / "pivot"), "pivot_store": imported / "pivot", "clm_weight": 0.5}
    settings |= {
        "aligned_stores": [imported / "aligned"],
        "training": {**QUIET, "output_dir": str(tmp_path / "target")},
    }
    train(TrainConfig(**settings))
    assert (tmp_path / "target" / "fusion.json").is_file()
    with pytest.raises(
        UserError, match=r"`tail: bucket` needs the probability outside the top k, .*`tail: renormal"
    ):
        train(TrainConfig(**settings, tail="bucket"))


@pytest.fixture(scope="module")
def fused(world: Path) -> Path:
    """The aligned rows of ``twin``, of which some positions are not aligned."""
    own, other = (rows_of(world / "published" / name) for name in ("pivot", "twin"))
    return published_rows.save(world / "fused", published_rows.with_source(own, other, unaligned=(20, 21, 30)))


@pytest.mark.slow
@pytest.mark.parametrize("unpaired", ["pivot", "gold"])
def test_aligned_rows_train_a_target(world: Path, fused: Path, tmp_path: Path, unpaired: Any) -> None:
    pivot_store = tmp_path / "pivot"
    store = bring(world, "twin", tmp_path / "twin", fused, pivot_store=pivot_store, unpaired=unpaired)
    own = RepresentationStore(pivot_store)
    assert store.unknown == own.unknown == ("gold_logprob", "tail")
    assert not [*store.problems(), *own.problems()]
    exact = [*distributions(RepresentationStore(world / "stores" / "twin"))]
    places = [*distributions(own)]
    unaligned = 0
    for number, row in enumerate(rows_of(fused)):
        assert store[number].ce_per_token == pytest.approx(row["fused_metric_ce"])
        assert store[number].pivot_ce_per_token == pytest.approx(row["metric_ce"])
        for position, (mine, place) in places[number].items():
            here = store[number]
            single = len(row["fused_per_step_logits"][position]) < 2
            assert here.paired is not None
            assert here.paired[place] == (not single)
            if single:
                unaligned += 1
                if unpaired == "pivot":
                    assert np.array_equal(here.ids[place], mine.ids[place])
                    assert np.array_equal(here.logprobs[place], mine.logprobs[place])
                else:
                    assert here.ids[place][0] == row["input_ids"][position + 1]
                    assert here.logprobs[place][0] == 0
            elif position in exact[number]:
                twin, at = exact[number][position]
                shares = np.exp(twin.logprobs[at].astype(float))
                wanted = dict(zip(twin.ids[at].tolist(), (shares / shares.sum()).tolist(), strict=True))
                found = dict(zip(here.ids[place].tolist(), here.logprobs[place].tolist(), strict=True))
                assert len(found.keys() & wanted.keys()) >= K - 2
                for token in found.keys() & wanted.keys():
                    assert wanted[token] == pytest.approx(np.exp(found[token]), rel=0.05)
    assert unaligned == store.manifest["no_partner"] > 0
    settings = {"pivot": str(world / "pivot"), "pivot_store": pivot_store, "aligned_stores": [store.folder]}
    settings |= {"clm_weight": 0.5, "training": {**QUIET, "output_dir": str(tmp_path / "target")}}
    train(TrainConfig(**settings))
    assert (tmp_path / "target" / "fusion.json").is_file()
    with pytest.raises(UserError, match="`compare: token` needs the probability of every next token"):
        train(TrainConfig(**settings, compare="token"))


def test_the_end_of_the_source_becomes_that_of_the_pivot(world: Path, fused: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.shared("sentencepiece_bpe", (END_OF_TURN,))
    own, other = (tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, "</s>"))
    rows = rows_of(fused)
    for row in rows:
        for ids, following in zip(row["fused_per_step_indices"], row["input_ids"][1:], strict=False):
            if following == own and len(ids) == K:
                ids[:] = [other, *(token for token in [*ids, 30, 31] if token not in (own, other))][:K]
    data = published_rows.save(tmp_path / "rows", rows)
    store = bring(world, "twin", tmp_path / "twin", data, pivot_store=tmp_path / "pivot")
    own_store, ends = RepresentationStore(tmp_path / "pivot"), 0
    for number, (row, places) in enumerate(zip(rows, distributions(own_store), strict=True)):
        for position, (_, place) in places.items():
            if row["input_ids"][position + 1] == own and store[number].paired[place]:
                assert store[number].ids[place][0] == own
                ends += 1
    assert store.manifest["ends_paired"] == ends > 0
    assert store.manifest["ends_ppm"] > 0


def test_log_probabilities_have_a_known_tail(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "published" / "pivot")
    for row in rows:
        logits = np.array(row["per_step_logits"])
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        row["per_step_logits"] = np.log(0.8 * shares).tolist()
    store = bring(world, "pivot", tmp_path / "store", published_rows.save(tmp_path / "rows", rows))
    assert store.identity["log_probabilities"]
    assert store.unknown == ()
    for row, stored in zip(rows, distributions(store), strict=True):
        for position, (found, place) in stored.items():
            assert float(found.tail[place]) == pytest.approx(0.2, abs=0.002)
            logits = np.float16(row["per_step_logits"][position])
            assert np.array_equal(found.logprobs[place], logits)


def contradict(row: Row) -> None:
    """Every token is among the k, the last of them, and predicted with certainty."""
    for ids, following in zip(row["per_step_indices"], row["input_ids"][1:], strict=False):
        if following not in ids:
            ids[-1] = following
    row["per_step_metric_ce"] = [0.0] * (LENGTH - 1)


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@pytest.mark.parametrize(
    "text", ["hello fox", "  two spaces", "sort</s> the dog", "sort</s>the  dog</s>", "日本🙂</s>", "a fox 🙂"]
)
def test_the_text_of_ids_has_these_ids(kind: str, text: str) -> None:
    """Whatever spaces the tokenizer has added, also where other rows have none, or where the row was cut."""
    tokenizer = TextTokenizer(tiny_tokenizers.shared(kind, ("</s>",) if kind == "byte_level_bpe" else ()), kind)
    ids = np.array(tokenizer.tokenizer(text)["input_ids"])
    usual = np.array(tokenizer.tokenizer("it is a quick dog</s>over the fox")["input_ids"])
    first, *rows = [Tokens(row, np.ones(len(row), bool)) for row in (usual, ids, ids[:-1])]
    maker = BlockMaker(tokenizer)
    maker._texts([first])
    read, cut = maker._texts(rows)
    assert not isinstance(read, RowError)
    assert read[1].ids.tolist() == ids.tolist()
    if text.endswith("🙂"):  # cut inside this character
        assert not isinstance(cut, RowError)
        assert cut[1].ids.tolist() == ids[: len(cut[1])].tolist()


def without(name: str) -> Callable[[Row], None]:
    return lambda row: row.update({name: None})


BAD: dict[str, tuple[Callable[[Row], None], str]] = {
    "labels": (lambda row: row["labels"].__setitem__(20, 7), "label 20 is 7, but the token is"),
    "nothing learnt": (lambda row: row.update(labels=[-100] * LENGTH), "all labels are -100"),
    "length": (lambda row: row.update(labels=row["labels"][:-1]), f"{LENGTH - 1} labels"),
    "hole": (lambda row: row["attention_mask"].__setitem__(12, 0), "token 12 is padding inside the text"),
    "ids": (lambda row: row.update(per_step_indices=[[5] * K] * LENGTH), "an id twice"),
    "NaN": (lambda row: row.update(metric_ce=float("nan")), "`metric_ce` is nan"),
    "missing": (without("per_step_logits"), "`per_step_logits` is missing"),
    "entropy": (contradict, "contradicts its logit"),
    "text": (
        lambda row: (row["input_ids"].__setitem__(3, 9999), row["labels"]),
        "id 9999 is none of the tokenizer",
    ),
}


def test_bad_rows_are_named_or_left_out(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "published" / "pivot")
    good = len(rows)
    for change, _ in BAD.values():
        row = rows_of(world / "published" / "pivot")[2]
        change(row)
        rows.append(row)
    rows += rows_of(world / "published" / "pivot")[:4]  # more than half must be good
    data = published_rows.save(tmp_path / "rows", rows)
    named = ""
    for attempt in ("read", "store"):  # those of the text are found first, then those of the distributions
        with pytest.raises(UserError) as refused:
            bring(world, "pivot", tmp_path / attempt, data)
        named += str(refused.value)
        texts = [number for number in range(good, good + len(BAD)) if f"row {number + 1}:" in named]
        rows = [row for number, row in enumerate(rows_of(data)) if number not in texts]
        data = published_rows.save(tmp_path / f"{attempt} rows", rows)
    for name, (_, message) in BAD.items():
        assert message in named, name
    store = bring(world, "pivot", tmp_path / "skipped", tmp_path / "rows", bad_rows="skip")
    assert store.manifest["bad_rows"] == sum(not len(row) for row in store) == 4
    assert len(store) == good + 4 + 4


def test_an_interrupted_import_resumes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {"shard_tokens": 100, "dialogues": tmp_path / "dialogues"}
    whole = bring(world, "pivot", tmp_path / "whole", **shards)
    assert len(whole.manifest["shards"]) > 3
    write = StoreWriter.write

    def killed(self: StoreWriter, shard: int, *rest: Any, **named: Any) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        write(self, shard, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(world, "pivot", tmp_path / "resumed", **shards)
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resumed").glob("shard-*")}
    assert len(there) == 2
    again = bring(world, "pivot", tmp_path / "resumed", **shards)
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes()
    assert there.items() <= {path.name: path.stat().st_mtime_ns for path in again.folder.glob("shard-*")}.items()


def test_rows_can_belong_to_prepared_dialogues(world: Path, tmp_path: Path) -> None:
    """Their positions count, not the labels; without a label the next token's cross-entropy is not known."""
    ours = RepresentationStore(world / "stores" / "pivot")
    prepared = Dialogues.beside(ours.folder, ours.identity["data"])
    assert prepared is not None
    whole = bring(world, "pivot", world / "stores" / "whole", dialogues=prepared.folder)
    assert same_distributions(ours, whole) > 0
    rows = rows_of(world / "published" / "pivot")
    for row in rows:
        last = max(number for number, label in enumerate(row["labels"]) if label != -100)
        row["labels"][last], row["per_step_metric_ce"][last - 1] = -100, 0.0
    data = published_rows.save(tmp_path / "rows", rows[1:])
    store = bring(world, "pivot", tmp_path / "store", data, dialogues=prepared.folder)
    assert [len(row) for row in store] == [0, *(len(row) for row in list(ours)[1:])]
    for row in list(store)[1:]:
        assert np.flatnonzero(np.isnan(row.gold_logprob)).tolist() == [len(row) - 1]
    assert not [*store.problems()]


@pytest.mark.parametrize(("length", "other_length"), [(100, 130), (117, 72)])
def test_rows_that_were_cut(world: Path, tmp_path: Path, length: int, other_length: int) -> None:
    """The pivot and the source were cut at different places of the text."""
    texts = {
        ending: [published_rows.chat_text(chat, ending) for chat in CHATS] for ending in (END_OF_TURN, IM_END)
    }
    own = published_rows.represented(world / "pivot", texts[END_OF_TURN], END_OF_TURN, length, K)
    own = [row for row in own if any(label != -100 for label in row["labels"])]
    other = published_rows.represented(world / "bytes", texts[IM_END], IM_END, other_length, K)
    data = [published_rows.save(tmp_path / name, rows) for name, rows in (("own", own), ("other", other))]
    dialogues = tmp_path / "dialogues"
    pivot = bring(world, "pivot", tmp_path / "pivot", data[0], dialogues=dialogues, bad_rows="skip")
    source = bring(world, "bytes", tmp_path / "bytes", data[1], dialogues=dialogues, bad_rows="skip")
    aligned, _ = align(
        AlignConfig(source_store=source.folder, pivot_store=pivot.folder, output=tmp_path / "aligned")
    )
    assert len(pivot) == len(own)
    assert source.manifest["without_row"] == source.manifest["unknown_gold_logprob"] == 0
    assert (source.manifest["cut_tokens"] > 0) == (other_length < length)
    assert aligned.manifest["paired"] > 0.3 * pivot.manifest["positions"] > 0


def test_rows_of_fusellm(world: Path, tmp_path: Path) -> None:
    """Plain text, read without BOS, all of it learnt, its columns named by number."""
    texts = ["the quick brown fox jumps over the lazy dog</s>", "sort the numbers 3, 1, 2: it is 1, 2, 3</s>"]
    own, other = (published_rows.represented(world / name, texts, None, 48) for name in ("pivot", "twin"))
    rows = published_rows.with_source(own, other)
    for row in rows:
        for name, there in (("logits", "fused_per_step_logits"), ("indices", "fused_per_step_indices")):
            row[f"per_step_aligned_{name}_0"] = row.pop(there)
        row["metric_ce_aligned_0"] = row.pop("fused_metric_ce")
    data = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(data)
    store = bring(world, "twin", tmp_path / "twin", data, pivot_store=tmp_path / "pivot")
    for row, stored in zip(rows, store, strict=True):
        count = sum(row["attention_mask"])
        assert len(stored) == count - 1
        ids = np.array([row["per_step_aligned_indices_0"][place][0] for place in range(count - 1)])
        assert np.array_equal(stored.ids[:, 0], ids)
    with pytest.raises(UserError, match="no aligned source 1"):
        bring(world, "twin", tmp_path / "other", data, pivot_store=tmp_path / "pivot", aligned_source=1)
    for row in rows:
        for name in ("per_step_aligned_logits", "per_step_aligned_indices", "metric_ce_aligned"):
            row[f"{name}_1"] = row[f"{name}_0"]
        row["metric_ce_aligned_1"] = 2 * row["metric_ce_aligned_0"]
    datasets.Dataset.from_list(rows).to_parquet(several := tmp_path / "several.parquet")
    with pytest.raises(UserError, match="aligned sources 0, 1: choose that of --model with --aligned-source"):
        bring(world, "twin", tmp_path / "several", several, pivot_store=tmp_path / "own")
    chosen = {"pivot_store": tmp_path / "own", "aligned_source": 0}
    first = bring(world, "twin", tmp_path / "several", several, **chosen)[0]
    with pytest.raises(UserError, match=r"(?s)other settings.*columns"):
        bring(world, "twin", tmp_path / "several", several, **chosen | {"aligned_source": 1})
    second = bring(world, "twin", tmp_path / "second", several, **chosen | {"aligned_source": 1})[0]
    assert second.ce_per_token == pytest.approx(2 * first.ce_per_token)


def test_logits_may_be_arrays_of_fixed_shape(world: Path, imported: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "published" / "pivot")
    table = datasets.Dataset.from_list(rows)
    lengths = {len(row["per_step_logits"]) for row in rows}
    longest, k = max(lengths), len(rows[0]["per_step_logits"][0])
    padded = [
        {
            **row,
            **{
                name: row[name] + [[0] * k] * (longest - len(row[name]))
                for name in ("per_step_logits", "per_step_indices")
            },
        }
        for row in rows
    ]
    kinds = {"per_step_logits": "float32", "per_step_indices": "int64"}
    features = datasets.Features(
        {**table.features, **{name: datasets.Array2D((longest, k), kind) for name, kind in kinds.items()}}
    )
    datasets.Dataset.from_list(padded, features=features).save_to_disk(tmp_path / "data")
    store = bring(world, "pivot", tmp_path / "store", tmp_path / "data")
    for row, other in zip(store, RepresentationStore(imported / "pivot"), strict=True):
        assert np.array_equal(row.ids, other.ids)
        assert np.array_equal(row.logprobs, other.logprobs)


def test_a_dataset_without_the_split_names_those_it_has(world: Path, tmp_path: Path) -> None:
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="no split `train`, but `validation`: choose with --data-split"):
        bring(world, "pivot", tmp_path / "store", tmp_path / "data")


def test_what_does_not_fit_is_refused(world: Path, fused: Path, imported: Path, tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows_of(fused)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "tokens")
    with pytest.raises(UserError, match="no column 'per_step_logits', 'per_step_indices'"):
        bring(world, "pivot", tmp_path / "store", tmp_path / "tokens")
    with pytest.raises(UserError, match="give --pivot-store"):
        bring(world, "twin", tmp_path / "store", fused)
    with pytest.raises(UserError, match="import the pivot's representations"):
        bring(world, "bytes", tmp_path / "store")
    with pytest.raises(UserError, match="its ids are not those of any block"):
        bring(world, "bytes", tmp_path / "store", world / "published" / "pivot", dialogues=imported / "dialogues")
    assert not (tmp_path / "store").exists()
    shutil.copytree(imported / "pivot", tmp_path / "damaged")
    with pytest.raises(UserError, match="other settings"):
        bring(world, "pivot", tmp_path / "damaged", world / "published" / "twin")
