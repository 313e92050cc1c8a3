"""The training stage in this process: what it takes, what it writes, and how it goes on."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_fusion
import tiny_sources
import torch
from click.testing import CliRunner
from tiny_fusion import CHATS, World, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import fusion_trainer.training.target as targets
import fusion_trainer.training.train as stage
from fusion_trainer.alignment.align import align
from fusion_trainer.cli import main
from fusion_trainer.config import AlignConfig, PrepareConfig, TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.prepare import prepare
from fusion_trainer.training.batches import Collator, FusionData
from fusion_trainer.training.train import train
from fusion_trainer.training.trainer import FusionTrainer
from varm_common.errors import UserError
from varm_common.files import sha256_of
from varm_merge.merging.lineage import Place, weights_fingerprint

OFTEN = {"save_strategy": "steps", "save_steps": 1}
CLM = {"kind": "none", "clm_weight": 1.0}


def refused(config: TrainConfig) -> str:
    with pytest.raises(UserError) as error:
        train(config)
    return str(error.value)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[FusionTrainer]:
    """The trainers that the stage makes."""
    made: list[FusionTrainer] = []

    class Watched(FusionTrainer):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(stage, "FusionTrainer", Watched)
    return made


@pytest.fixture(scope="module")
def target(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with held-out rows and a secret; for reading only."""
    output = tmp_path_factory.mktemp("target") / "target"
    return train(fusion.config(output, held_out=0.25, training={"hub_token": "hf_SECRET", "seed": 3}))


# The target


def test_the_target_is_a_checkpoint_of_transformers(target: Path, fusion: World) -> None:
    """In safetensors only, with the pivot's tokenizer and generation settings, and nothing half-written."""
    pivot = fusion.folder / "pivot"
    model, start = AutoModelForCausalLM.from_pretrained(target), weights(pivot)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.use_cache
    assert weights(target).keys() == start.keys()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in weights(target).items())
    theirs, own = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(pivot)
    assert theirs(CHATS[0][0][0]).input_ids == own(CHATS[0][0][0]).input_ids
    assert (target / "generation_config.json").read_bytes() == (pivot / "generation_config.json").read_bytes()
    names = {path.name for path in target.iterdir()}
    assert names == {
        "config.json",
        "fusion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    text = tiny_sources.openchat(CHATS[0])[0]
    assert model.generate(**theirs(text[:40], return_tensors="pt"), max_new_tokens=3).shape[1] > 3


def test_its_weights_are_those_that_the_trainer_ends_with(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    train(fusion.config(tmp_path / "target"))
    (trainer,) = trainers
    ends = trainer.model.state_dict()
    assert all(torch.equal(tensor, ends[name]) for name, tensor in weights(tmp_path / "target").items())
    same = fusion.trainer(tmp_path)
    same.train()
    assert all(torch.equal(tensor, same.model.state_dict()[name]) for name, tensor in ends.items())


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=str)
def test_a_compiled_model_gives_the_same_target(lora: Any, fusion: World, tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    found, expected = (
        weights(train(fusion.config(tmp_path / str(len(how)), lora=lora, training=how))) for how in (compiled, {})
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_fusion_json_describes_the_inputs_of_the_target(target: Path, fusion: World) -> None:
    record = json.loads((target / "fusion.json").read_text())
    pivot = fusion.folder / "pivot"
    assert record["pivot"]["model"] == str(pivot)
    assert record["pivot"]["revision"] is None
    assert record["pivot"]["weights"] == weights_fingerprint(Place(str(pivot)))
    assert record["pivot"]["tokenizer"] == fusion.tokenizer.sha256
    assert record["dialogues"] == fusion.dialogues.fingerprint
    own, source = record["stores"]
    assert own["model"] == str(pivot)
    assert source == {
        "kind": "aligned",
        "model": str(fusion.folder / "bytes"),
        "positions": "boundary",
        "map": "prefix",
        "top_k": 10,
        "folder": str(fusion.folder / "aligned" / "bytes"),
        "sha256": sha256_of(fusion.folder / "aligned" / "bytes" / "manifest.json"),
    }
    assert (record["config"]["clm_weight"], record["config"]["fusion"], record["processes"]) == (0.5, "min_ce", 1)
    assert (record["training"]["seed"], record["training"]["max_steps"]) == (3, 3)
    assert record["versions"].keys() >= {"transformers", "torch", "varm-merge"}
    assert record["mixed_precision"] == "no"
    assert math.isfinite(record["results"]["eval_perplexity_per_byte"])


def test_no_secret_is_written(target: Path, fusion: World, tmp_path: Path) -> None:
    """transformers would keep its arguments in every checkpoint."""
    again = train(fusion.config(tmp_path / "target", training={**OFTEN, "hub_token": "hf_SECRET"}))
    assert len(list(again.glob("checkpoint-*"))) == 3
    for folder in (target, again):
        assert not [name for name, text in content(folder).items() if b"SECRET" in text]


@pytest.mark.parametrize(
    ("asked", "written"),
    [({}, "float32"), ({"output_dtype": "auto"}, "bfloat16"), ({"output_dtype": "float16"}, "float16")],
    ids=lambda value: "",
)
def test_the_target_is_in_float32_unless_output_dtype_says_otherwise(
    asked: dict[str, str], written: str, fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    """Trained in float32, rounded once at the end if at all; ``auto`` is the pivot's dtype."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.bfloat16).save_pretrained(pivot)
    train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), **asked))
    ends = trainers[0].model.state_dict()
    dtype = getattr(torch, written)
    assert all(tensor.dtype == torch.float32 for tensor in ends.values())
    assert all(torch.equal(tensor, ends[name].to(dtype)) for name, tensor in weights(tmp_path / "target").items())
    assert all(tensor.dtype == dtype for tensor in weights(tmp_path / "target").values())
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_pivot_gives_a_tied_target(dtype: torch.dtype, fusion: World, tmp_path: Path) -> None:
    """The shared weight stands in its file once, also where it was trained in another dtype."""
    pivot, vocabulary = tmp_path / "pivot", len(fusion.tokenizer.tokenizer)
    shutil.copytree(fusion.folder / "pivot", pivot)
    tied = tiny_sources.new_source("llama", vocabulary, **tiny_fusion.PIVOT, tie_word_embeddings=True)
    tied.to(dtype).save_pretrained(pivot)
    train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot)))
    assert weights(tmp_path / "target").keys() == weights(pivot).keys()
    assert "lm_head.weight" not in weights(pivot)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("packing", [False, True])
def test_a_padding_token_without_a_row_in_the_pivot_is_never_used(
    packing: bool, fusion: World, tmp_path: Path
) -> None:
    """Many tokenizers have one that was added after the model was trained."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    tokenizer = AutoTokenizer.from_pretrained(pivot)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(pivot)
    target = train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), packing=packing))
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) - 1


def test_a_pivot_with_several_chat_templates_keeps_them(fusion: World, tmp_path: Path) -> None:
    """They are files in a folder of their own."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    tokenizer = AutoTokenizer.from_pretrained(pivot)
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = {"default": own, "tool_use": f"tools {own}"}
    tokenizer.save_pretrained(pivot)
    target = train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), dialogues=fusion.dialogues.folder))
    assert AutoTokenizer.from_pretrained(target).chat_template.keys() == {"default", "tool_use"}


def test_generation_settings_that_transformers_refuses_to_write_are_kept_as_they_are(
    fusion: World, tmp_path: Path
) -> None:
    """Such as those of Llama 2 and Vicuna; checkpoints are written, too."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    settings = json.dumps({"temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "eos_token_id": 2})
    (pivot / "generation_config.json").write_text(settings)
    train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), training=OFTEN))
    assert (tmp_path / "target" / "generation_config.json").read_text() == settings
    train(fusion.config(tmp_path / "adapted", **CLM, pivot=str(pivot), lora={"target_modules": "all-linear"}))
    assert (tmp_path / "adapted" / "generation_config.json").read_text() == settings


# LoRA

LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}


def test_with_lora_the_target_is_the_pivot_plus_its_adapters(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    target = train(fusion.config(tmp_path / "target", lora=LORA, training={"gradient_checkpointing": True}))
    learned = [name for name, weight in trainers[0].model.named_parameters() if weight.requires_grad]
    assert learned
    assert all("lora_" in name for name in learned)
    start, found = weights(fusion.folder / "pivot"), weights(target)
    adapters = {
        name.removeprefix("base_model.model."): tensor.double()
        for name, tensor in tiny_fusion.load_file(target / "adapter" / "adapter_model.safetensors").items()
    }
    assert found.keys() == start.keys()
    adapted = {name.partition(".lora_")[0] + ".weight" for name in adapters}
    assert len(adapted) == 2
    for name, tensor in found.items():
        if name not in adapted:
            assert torch.equal(tensor, start[name]), name
            continue
        low, high = (adapters[name.replace("weight", f"lora_{letter}.weight")] for letter in "AB")
        assert high.abs().max() > 0
        torch.testing.assert_close(
            tensor.double(), start[name].double() + 12 / 3 * high @ low, rtol=1e-6, atol=1e-6
        )
    model = AutoModelForCausalLM.from_pretrained(target)
    assert type(model).__name__ == "LlamaForCausalLM"


def tied_pivot(fusion: World, folder: Path) -> Path:
    """The pivot with one tensor for embedding and head."""
    pivot = shutil.copytree(fusion.folder / "pivot", folder)
    settings = {**tiny_fusion.PIVOT, "tie_word_embeddings": True}
    tiny_sources.new_source("llama", len(fusion.tokenizer.tokenizer), **settings).save_pretrained(pivot)
    return pivot


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_adapters_that_make_two_tensors_of_a_tied_one_are_refused(
    lora: dict[str, Any], fusion: World, tmp_path: Path
) -> None:
    pivot = tied_pivot(fusion, tmp_path / "pivot")
    config = fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), lora={**LORA, **lora})
    assert "the pivot has one tensor for `lm_head.weight` and `model.embed_tokens.weight`" in refused(config)


def assert_what_was_trained(target: Path, trained: Any) -> None:
    ids = torch.arange(20)[None]
    logits = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    torch.testing.assert_close(logits, trained.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_tensor_is_trained_as_one(fusion: World, tmp_path: Path, trainers: list[FusionTrainer]) -> None:
    pivot = tied_pivot(fusion, tmp_path / "pivot")
    lora = {**LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    target = train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), lora=lora))
    assert_what_was_trained(target, trainers[0].model)
    assert not torch.equal(*(weights(folder)["model.embed_tokens.weight"] for folder in (target, pivot)))


def test_adapters_that_change_the_pivot_at_random_are_merged_into_what_was_trained(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    """PiSSA moves the main part of the weights into the adapters, found by a random algorithm."""
    lora = {**LORA, "init_lora_weights": "pissa_niter_4"}
    target = train(fusion.config(tmp_path / "target", **CLM, lora=lora, training={"seed": 7}))
    assert_what_was_trained(target, trainers[0].model)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_of_a_quantised_pivot_are_added_to_the_pivot_itself(
    bits: str, fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    """QLoRA: the pivot's own weights, not their quantised copies, are what the adapters are added to."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    of_32 = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}  # what 4 bits on CPU divide by
    if bits == "4bit":
        model = tiny_sources.new_source("llama", len(fusion.tokenizer.tokenizer), **{**tiny_fusion.PIVOT, **of_32})
        model.save_pretrained(pivot)
    adapters = {"lora": {**LORA, "target_modules": ["q_proj"]}, "load_in": bits}
    kind = CLM if bits == "4bit" else {}  # its stores would be another pivot's
    evaluated = {"held_out": 0.25, "training": {"eval_strategy": "steps", "eval_steps": 1}}
    target = train(fusion.config(tmp_path / "target", **kind, **adapters, **evaluated, pivot=str(pivot)))
    layers = trainers[0].model.get_base_model().model.layers
    assert type(layers[0].mlp.down_proj).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    start, found = weights(pivot), weights(target)
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in found if "q_proj" in name}


# Held-out rows


def test_held_out_rows_are_evaluated_and_never_learned_from(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(FusionData):
        def __getitem__(self, number: int) -> Any:
            self.__dict__.setdefault("read", set()).update(self.groups[number])
            return super().__getitem__(number)

    monkeypatch.setattr(stage, "FusionData", Watched)
    settings = {"held_out": 0.25, "training": {"max_steps": -1, "num_train_epochs": 2}}
    targets = [train(fusion.config(tmp_path / kind, kind, **settings)) for kind in ("pairwise", "multi")]
    learned, evaluated = trainers[0].train_dataset.read, trainers[0].eval_dataset.read
    assert (learned, evaluated) == (trainers[1].train_dataset.read, trainers[1].eval_dataset.read)
    assert learned | evaluated == set(range(len(CHATS)))
    assert not learned & evaluated
    assert 2 <= len(evaluated) <= 8
    rows = [Collator(0)([[fusion.data().example(block)]]) for block in sorted(evaluated)]
    for target, kind in zip(targets, ("pairwise", "multi"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(target).double()
        total = tokens = 0.0
        for batch in rows:
            with torch.no_grad():
                logits = model(batch["input_ids"]).logits[0][batch["positions"]].log_softmax(1)
            total -= float(logits[range(len(logits)), batch["gold"]].sum())
            tokens += len(logits)
        record = json.loads((target / "fusion.json").read_text())
        assert record["results"]["eval_clm"] == pytest.approx(total / tokens, rel=1e-5), kind


def test_rows_are_held_out_by_conversation_whatever_the_target(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    """Conversations cut into several blocks go to one side as a whole; with more held out, the others stay."""
    data = str(fusion.folder / "chats.jsonl")
    short = prepare(
        PrepareConfig(
            data=[data],
            pivot=str(fusion.folder / "pivot"),
            template="openchat",
            max_length=80,
            dialogues=tmp_path / "short",
        ),
        tmp_path,
    )
    assert len(short) > len(CHATS)
    held: list[set[str]] = []
    for share, packing, seed in ((0.2, False, 1), (0.2, True, 2), (0.5, False, 1)):
        settings = {"dialogues": str(short.folder), "held_out": share, "packing": packing}
        train(fusion.config(tmp_path / f"{share}-{packing}", **CLM, **settings, training={"seed": seed}))
        sides = [
            [block for group in data.groups for block in group]
            for data in (trainers[-1].train_dataset, trainers[-1].eval_dataset)
        ]
        assert sorted(sides[0] + sides[1]) == list(range(len(short)))
        learned, evaluated = ({short[block].conversation for block in side} for side in sides)
        assert not learned & evaluated
        held.append(evaluated)
    assert held[0] == held[1] < held[2]


@pytest.mark.parametrize(("share", "part"), [(1e-9, "to evaluate on"), (1 - 1e-9, "to learn from")])
def test_a_share_that_leaves_one_side_empty_is_refused(
    share: float, part: str, fusion: World, tmp_path: Path
) -> None:
    assert f"leaves no rows {part}" in refused(fusion.config(tmp_path / "target", held_out=share))


# Packing


def test_packed_rows_hold_every_block_once_and_are_no_longer_than_the_longest(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    train(fusion.config(tmp_path / "target", packing=True))
    data = trainers[0].train_dataset
    assert sorted(block for group in data.groups for block in group) == list(range(len(CHATS)))
    assert max(data.lengths) == int(data.tokens.lengths.max())
    assert len(data) < len(CHATS)
    assert trainers[0].data_collator.packed


def test_packing_of_a_pivot_that_cannot_keep_conversations_apart_is_refused(fusion: World, tmp_path: Path) -> None:
    pivot = tmp_path / "pivot"
    fusion.tokenizer.tokenizer.save_pretrained(pivot)
    tiny_sources.new_source("mpt", len(fusion.tokenizer.tokenizer)).save_pretrained(pivot)
    message = refused(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), packing=True))
    assert "MptForCausalLM does not keep packed conversations apart" in message
    assert "leave `packing` off" in message


# What a target is of


def test_a_finished_target_is_left_as_it_is(target: Path, fusion: World) -> None:
    before = times(target)
    shown = {"logging_steps": 7, "report_to": "tensorboard", "eval_strategy": "epoch", "hub_token": "hf_OTHER"}
    saved = {"save_strategy": "steps", "save_steps": 9, "save_total_limit": 2}
    divided = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    settings = {"held_out": 0.25, "training": {"seed": 3, **shown, **saved, **divided}}
    assert train(fusion.config(target, **settings)) == target
    assert times(target) == before


@pytest.mark.parametrize(
    ("changed", "key", "wanted", "found"),
    [
        ({"training": {"seed": 4}}, "seed", "4", "3"),
        ({"training": {"learning_rate": 0.02}}, "learning_rate", "0.02", "0.01"),
        ({"training": {"gradient_accumulation_steps": 2}}, "rows of an update", "8", "4"),
        ({"training": {"max_steps": 4}}, "max_steps", "4", "3"),
        ({"clm_weight": 0.9}, "clm_weight", "0.9", "0.5"),
        ({"held_out": 0.3}, "held_out", "0.3", "0.25"),
        ({"fusion": "avg_ce"}, "fusion", "avg_ce", "min_ce"),
        ({"lora": {"r": 4}}, "lora", "{'r': 4}", "None"),
        ({"output_dtype": "auto"}, "output_dtype", "auto", "float32"),
        ({"kind": "multi"}, "store 2", "", "None"),
        ({**CLM}, "store 0", "None", ""),
    ],
    ids=lambda value: "",
)
def test_a_target_is_not_continued_as_another(
    changed: dict[str, Any], key: str, wanted: str, found: str, target: Path, fusion: World
) -> None:
    """Both values stand side by side; nothing is touched."""
    before = times(target)
    settings = {"held_out": 0.25, **changed, "training": {"seed": 3, **changed.get("training", {})}}
    message = refused(fusion.config(target, **settings))
    assert f"`{target / 'fusion.json'}` was made with other settings:" in message
    assert "Give another output_dir, or remove that folder." in message
    (line,) = (line for line in message.splitlines() if line.startswith(f"  {key} "))
    assert line.replace(key, "", 1).split() == [*wanted.split(), *found.split()] or not (wanted and found)
    assert wanted in line
    assert found in line
    assert times(target) == before


def test_another_pivot_or_other_dialogues_are_another_target(fusion: World, tmp_path: Path) -> None:
    target = train(fusion.config(tmp_path / "target", **CLM))
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "other")
    moved = AutoModelForCausalLM.from_pretrained(pivot)
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1
    moved.save_pretrained(pivot)
    assert "\n  pivot's weights " in refused(fusion.config(target, **CLM, pivot=str(pivot)))
    elsewhere = shutil.copytree(fusion.folder / "pivot", tmp_path / "elsewhere")
    before = times(target)
    train(fusion.config(target, **CLM, pivot=str(elsewhere)))
    assert times(target) == before
    data = tiny_sources.write_sharegpt(tmp_path / "chats.jsonl", CHATS[1:])
    settings = {"data": [str(data)], "pivot": str(fusion.folder / "pivot"), "template": "openchat"}
    prepare(PrepareConfig(**settings, dialogues=tmp_path / "fewer"), tmp_path)
    message = refused(fusion.config(target, **CLM, dialogues=str(tmp_path / "fewer")))
    assert "\n  dialogues " in message


@pytest.mark.parametrize("what", ["a file", "thesis.txt", "fusion.json", "training.json", "a checkpoint"])
def test_an_output_folder_that_holds_something_else_is_left_alone(
    what: str, fusion: World, tmp_path: Path
) -> None:
    output = tmp_path / "target"
    if what == "a file":
        output.write_text("years of work")
    elif what == "a checkpoint":
        (output / "checkpoint-7").mkdir(parents=True)
        (output / "checkpoint-7" / "model.safetensors").write_text("years of work")
    else:
        output.mkdir()
        (output / what).write_text('"years of work"')
    before = times(tmp_path)
    message = refused(fusion.config(output))
    assert f"`{output}" in message
    reasons = {
        "a file": "is a file",
        "fusion.json": "holds something else",
        "training.json": "holds something else",
    }
    assert reasons.get(what, "holds other files") in message
    assert times(tmp_path) == before


# Going on


class SwitchedOffError(BaseException):
    """The machine is switched off."""


SETTINGS: dict[str, dict[str, Any]] = {
    "multi, grouped, accumulated, evaluated": {
        "kind": "multi",
        "fusion": "avg_ce",
        "compare": "token",
        "tail": "bucket",
        "clm_weight_schedule": "soft",
        "held_out": 0.25,
        "training": {
            "train_sampling_strategy": "group_by_length",
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "data_seed": 0,
        },
    },
    "packed, decaying, epochs": {
        "packing": True,
        "clm_weight_schedule": "hard_and_decay",
        "training": {
            "max_steps": -1,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "max_grad_norm": 0.1,
        },
    },
    "adapters with dropout, checkpointed gradients, bf16": {
        "lora": {**LORA, "lora_dropout": 0.3},
        "training": {"gradient_checkpointing": True, "bf16": True, "weight_decay": 0.1, "warmup_steps": 2},
    },
    "best of all, few kept": {
        "held_out": 0.25,
        "training": {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_total_limit": 1,
            "metric_for_best_model": "clm",
            "greater_is_better": True,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_and_started_again_it_ends_with_the_same_bytes(
    name: str, fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice, each time between two checkpoints; what only shows or saves may change meanwhile."""
    settings = SETTINGS[name]
    training = {"max_steps": 6, **settings["training"], "save_strategy": "steps", "save_steps": 2}
    whole = train(fusion.config(tmp_path / "whole", **{**settings, "training": training}))
    learn, steps = FusionTrainer.compute_loss, list[int]()
    for stop in (3, 5):

        def compute_loss(trainer: Any, *given: Any, stop: int = stop, **named: Any) -> Any:
            steps.append(trainer.state.global_step)
            if steps[-1] == stop:
                raise SwitchedOffError
            return learn(trainer, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(FusionTrainer, "compute_loss", compute_loss)
            with pytest.raises(SwitchedOffError):
                train(fusion.config(tmp_path / "parts", **{**settings, "training": training}))
        assert (tmp_path / "parts" / "training.json").is_file()
        assert (tmp_path / "parts" / f"checkpoint-{stop - 1}").is_dir()
        assert not (tmp_path / "parts" / "fusion.json").exists()
        training = {**training, "logging_steps": 2, "disable_tqdm": False, "dataloader_num_workers": 1}
    assert list(dict.fromkeys(steps)) == [0, 1, 2, 3, 4, 5]
    assert steps.index(2, steps.index(3)) > steps.index(3)  # gone on from the second
    assert 0 not in steps[steps.index(3) :]
    parts = train(fusion.config(tmp_path / "parts", **{**settings, "training": training}))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    record = [json.loads((target / "fusion.json").read_text())["results"] for target in (whole, parts)]
    for key in ("eval_clm", "eval_fusion", "eval_perplexity_per_byte"):
        assert record[0].get(key) == record[1].get(key)
        assert (key in record[0]) == ("held_out" in settings)
    assert not (parts / "training.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 5, 7])
def test_stopped_after_the_last_step_it_trains_no_further(
    steps: int, fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, at its end, and in the next: only the target is still to be written."""
    training = {"max_steps": steps, **OFTEN}
    whole = train(fusion.config(tmp_path / "whole", **CLM, training=training))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "finish_training", lambda *_: (_ for _ in ()).throw(SwitchedOffError))
        with pytest.raises(SwitchedOffError):
            train(fusion.config(tmp_path / "parts", **CLM, training=training))
    monkeypatch.setattr(FusionTrainer, "compute_loss", lambda *_, **__: pytest.fail("trained"))
    parts = train(fusion.config(tmp_path / "parts", **CLM, training=training))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_training_that_ran_out_of_memory_resumes_in_smaller_batches(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows in an update, so that the training is the same."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "adam_epsilon": 1e-5}
    whole = train(fusion.config(tmp_path / "whole", training=settings))
    learn = FusionTrainer.training_step

    def full(trainer: Any, *given: Any, **named: Any) -> Any:
        if trainer.state.global_step == 7:
            raise torch.OutOfMemoryError("no memory left on the device")
        return learn(trainer, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", full)
        message = refused(fusion.config(tmp_path / "parts", training=settings))
    assert "out of memory: no memory left on the device" in message
    assert "Try gradient_checkpointing, a smaller per_device_train_batch_size with more" in message
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    parts = train(fusion.config(tmp_path / "parts", training={**settings, **divided}))
    start = weights(fusion.folder / "pivot")
    one, other = (
        {name: tensor - start[name] for name, tensor in weights(folder).items()} for folder in (whole, parts)
    )
    assert 0 < tiny_fusion.far_apart(one, other) < 1e-4


def test_a_training_stopped_before_its_first_checkpoint_begins_again(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(fusion.config(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(SwitchedOffError))
        with pytest.raises(SwitchedOffError):
            train(fusion.config(tmp_path / "parts"))
    parts = train(fusion.config(tmp_path / "parts"))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("asked", [True, "checkpoint-1"])
def test_the_checkpoint_to_resume_from_can_be_chosen(
    asked: Any, fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "finish_training", lambda *_: (_ for _ in ()).throw(SwitchedOffError))
        with pytest.raises(SwitchedOffError):
            train(fusion.config(output, training=OFTEN))
    wanted = True if asked is True else str(output / asked)
    began = []
    begin = FusionTrainer.train

    def watched(trainer: Any, resume_from_checkpoint: Any = None) -> Any:
        began.append(resume_from_checkpoint)
        return begin(trainer, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(FusionTrainer, "train", watched)
    train(fusion.config(output, training={**OFTEN, "resume_from_checkpoint": wanted}))
    assert began == [str(output / ("checkpoint-3" if asked is True else asked))]


def test_who_wants_no_checkpoint_has_to_remove_it(fusion: World, tmp_path: Path) -> None:
    output = tmp_path / "target"
    train(fusion.config(output, training=OFTEN))
    (output / "fusion.json").rename(output / "training.json")  # as if stopped before the end
    message = refused(fusion.config(output, training={**OFTEN, "resume_from_checkpoint": False}))
    checkpoint = output / "checkpoint-3"
    assert message == (
        f"resume_from_checkpoint is false, but the checkpoint `{checkpoint}` exists; remove it to start over"
    )


def test_two_trainings_do_not_write_into_one_folder(fusion: World, tmp_path: Path) -> None:
    output = tmp_path / "target"
    with targets.exclusive(output):
        message = refused(fusion.config(output))
        assert content(output).keys() == {targets.LOCK}
    assert message == f"another training run is writing to `{output}`; give another output_dir, or wait"
    assert not content(output)
    train(fusion.config(output))


def test_a_checkpoint_that_is_damaged_is_named(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "finish_training", lambda *_: (_ for _ in ()).throw(SwitchedOffError))
        with pytest.raises(SwitchedOffError):
            train(fusion.config(output, training=OFTEN))
    (output / "checkpoint-3" / "model.safetensors").unlink()
    message = refused(fusion.config(output, training=OFTEN))
    assert f"the training cannot resume from `{output / 'checkpoint-3'}`: " in message


def test_a_training_that_diverges_keeps_its_last_sound_checkpoint(fusion: World, tmp_path: Path) -> None:
    """Weights beyond float32 after the second update."""
    output = tmp_path / "target"
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e38, "lr_scheduler_type": "constant"}
    message = refused(fusion.config(output, training={**OFTEN, **settings}))
    assert "is NaN or infinite in step 2" in message
    assert "The batch's rows:\n  block " in message
    assert "chat-" in message
    assert str(fusion.folder / "chats.jsonl") in message or "chats.jsonl" in message
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-1", "training.json"]
    before = content(output)
    assert "is NaN or infinite in step 2" in refused(fusion.config(output, training={**OFTEN, **settings}))
    assert content(output) == before


# What does not fit


def test_the_folder_of_the_target_must_be_named(fusion: World, tmp_path: Path) -> None:
    config = fusion.config(tmp_path)
    del config.training["output_dir"]
    assert "`training` has no output_dir; set it to the folder of the target" in refused(config)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"load_in": "4bit"}, "`load_in: 4bit` needs `lora`"),
        ({"training": {"eval_strategy": "epoch"}}, "`eval_strategy` needs rows to evaluate on; set `held_out`"),
        ({"training": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"training": {"eval_on_start": True}}, "`eval_on_start` needs rows to evaluate on; set `held_out`"),
        ({"training": {"fp16": True}}, "fp16 needs a GPU"),
        ({"training": {"max_steps": 0}}, "max_steps: 0 trains nothing"),
        ({"training": {"max_steps": -1, "num_train_epochs": 0}}, "num_train_epochs: 0.0 cannot be trained"),
        ({"training": {"learning_rate": 0}}, "learning_rate: 0.0 trains nothing"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate: nan trains nothing"),
        (
            {"training": {"save_strategy": "best"}},
            "`save_strategy`: `args.metric_for_best_model` must be provided",
        ),
        ({"training": {"report_to": "clearml"}}, "ClearMLCallback requires 'clearml' to be installed"),
        ({"training": {"report_to": "nowhere"}}, "`report_to`: nowhere is not supported"),
        ({"training": {"log_level": "loud"}}, "`log_level`: KeyError: 'loud'"),
        ({"training": {"accelerator_config": "no.json"}}, "`accelerator_config`: [Errno 2]"),
        ({"training": {"train_sampling_strategy": "at random"}}, "train_sampling_strategy: use group_by_length"),
        ({"training": {"resume_from_checkpoint": "/nowhere"}}, "there is no checkpoint `/nowhere`"),
        ({"training": {"bf16": True, "fp16": True}}, "the training arguments cannot be used: "),
        ({"training": {**OFTEN, "load_best_model_at_end": True}}, "the training arguments cannot be used: "),
        ({"lora": {"target_modules": ["no_such_proj"]}}, "`lora` cannot be used: "),
        ({"lora": {"lora_bias": True}}, "merging LoRA weights won't be possible"),
        ({"lora": {"bias": "most"}}, "`lora` cannot be used: NotImplementedError: Requested bias: most"),
        ({"pivot": "nowhere/at/all"}, "no model folder `nowhere/at/all`"),
        ({"kind": "none"}, "`aligned_stores` has no store to fuse; for CLM alone set `clm_weight: 1`"),
        ({**CLM, "dialogues": None}, "the dialogues are not next to the stores; set `dialogues` to their folder"),
    ],
    ids=lambda value: "",
)
def test_settings_that_do_not_go_together_are_refused(
    changed: dict[str, Any], part: str, fusion: World, tmp_path: Path
) -> None:
    """The folder is not claimed: the settings put right may have it."""
    assert part in refused(fusion.config(tmp_path / "target", **changed))
    assert not content(tmp_path)


def test_a_pivot_without_a_position_for_each_token_is_refused(fusion: World, tmp_path: Path) -> None:
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    longest = max(fusion.data().lengths)
    for room in (longest - 1, longest):
        settings = {"vocab_size": 700, "n_positions": room, "n_embd": 16, "n_layer": 1, "n_head": 2}
        GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(pivot)
        config = fusion.config(tmp_path / "target", **CLM, pivot=str(pivot))
        if room < longest:
            told = f"no position for all {longest} tokens of the longest block (its context is {room})"
            assert told in refused(config)
    train(config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"adam_beta1": 2.0},
        {"lr_scheduler_kwargs": {"bend": 1}},
        {"lr_scheduler_type": "warmup_stable_decay"},
        {"optim_args": "x"},
        {"dataloader_num_workers": -1},
        {"seed": -1},
        {"neftune_noise_alpha": "loud"},
    ],
    ids=str,
)
def test_arguments_that_only_the_first_step_finds_wrong_end_in_a_sentence(
    arguments: dict[str, Any], fusion: World, tmp_path: Path
) -> None:
    message = refused(fusion.config(tmp_path / "target", **CLM, training=arguments))
    assert "the training arguments cannot be used: " in message
    assert not (tmp_path / "target" / "fusion.json").exists()


def test_an_error_that_no_argument_causes_keeps_its_traceback(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise KeyError("gold")

    monkeypatch.setattr(FusionTrainer, "compute_loss", faulty)
    with pytest.raises(KeyError, match="gold"):
        train(fusion.config(tmp_path / "target", **CLM))


def test_a_wrong_argument_is_reported_with_its_line(fusion: World, tmp_path: Path) -> None:
    """That of the argument where it is known, else that of ``training``."""
    for arguments, place in (({"eval_on_start": True}, 7), ({"adam_beta1": 2.0}, 5), ({"data_seed": "x"}, 5)):
        config = fusion.config(tmp_path / "target", **CLM, training=arguments)
        (name,) = arguments
        places = {"training": "x.yaml, line 5", "training.save_strategy": "x.yaml, line 6"}
        config._places = {**places, f"training.{name}": f"x.yaml, line {place}"}
        assert f"x.yaml, line {place}: " in refused(config)


# Nothing was trained


def test_a_target_that_equals_its_pivot_is_none(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients are zero; or all that was learned is rounded away."""
    output = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(
            FusionTrainer,
            "create_optimizer",
            lambda trainer, *_: setattr(trainer, "optimizer", Idle(trainer.model)),
        )
        message = refused(fusion.config(output, **CLM))
    assert "nothing was trained: every weight of the target would equal the pivot's" in message
    assert sorted(path.name for path in output.iterdir()) == ["training.json"]
    light = {"training": {"learning_rate": 1e-12}, "output_dtype": "float16", "lora": {"r": 2}}
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.float16).save_pretrained(pivot)
    message = refused(fusion.config(tmp_path / "light", **CLM, pivot=str(pivot), **light))
    assert "nothing was trained" in message
    assert not (tmp_path / "light" / "fusion.json").exists()


class Idle(torch.optim.SGD):
    """Moves nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.parameters(), 1.0)

    def step(self, closure: Any = None) -> None:
        return None


def test_rows_without_a_token_to_learn_from_are_no_training(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(stage.TokenFile):
        def __getitem__(self, number: int) -> Any:
            row = super().__getitem__(number)
            return dataclasses.replace(row, positions=row.positions[:0])

    monkeypatch.setattr(stage, "TokenFile", Silent)
    assert "no row has a token of an answer to learn from" in refused(fusion.config(tmp_path / "target", **CLM))


def test_a_held_out_loss_that_is_not_finite_is_no_result(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = FusionTrainer.train

    def spoil(trainer: Any, **named: Any) -> None:
        learn(trainer, **named)
        next(trainer.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(FusionTrainer, "train", spoil)
    message = refused(fusion.config(tmp_path / "target", **CLM, held_out=0.25))
    assert (
        "the loss on the held-out rows is NaN or infinite after step 3 (the model's weights are not finite)"
        in message
    )
    assert not (tmp_path / "target" / "fusion.json").exists()


# The disk


def test_a_disk_that_fills_while_training_still_takes_the_target(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Callable[[int], Path]
) -> None:
    """Its space is held from the beginning; without that space nothing is trained."""
    whole = train(fusion.config(tmp_path / "whole"))
    size = sum(path.stat().st_size for path in whole.iterdir())
    disk, learn, steps = small_disk(3 * size), FusionTrainer.train, list[int]()

    def fill(trainer: Any, **named: Any) -> None:
        learn(trainer, **named)
        steps.append(trainer.state.global_step)
        with (disk / "of somebody else").open("wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    monkeypatch.setattr(FusionTrainer, "train", fill)
    target = train(fusion.config(disk / "target"))
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (target / "fusion.json").is_file()
    message = refused(fusion.config(disk / "second"))
    assert f"`{disk / 'second'}` cannot be written: the target takes about " in message
    assert len(steps) == 1


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{}"])
def test_a_damaged_state_of_a_checkpoint_is_named(
    text: str, fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "finish_training", lambda *_: (_ for _ in ()).throw(SwitchedOffError))
        with pytest.raises(SwitchedOffError):
            train(fusion.config(output, **CLM, training=OFTEN))
    (output / "checkpoint-3" / "trainer_state.json").write_text(text)
    if text == "{}":
        (output / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    message = refused(fusion.config(output, **CLM, training=OFTEN))
    assert f"the training cannot resume from `{output / 'checkpoint-3'}`: " in message
    assert "Remove that folder" in message
    assert ("trainer_state.json` " in message) == (text != "{}")


@pytest.mark.parametrize("text", ["", '{"format": "fusion-trainer target", "version": 1, "training": []}'])
def test_a_damaged_fusion_json_is_a_sentence(text: str, fusion: World, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "fusion.json").write_text(text)
    message = refused(fusion.config(tmp_path / "target", **CLM))
    assert "is not JSON (0 bytes" in message if not text else "is damaged (" in message


def test_clm_alone_finds_the_dialogues_beside_stores_that_it_does_not_read(
    fusion: World, tmp_path: Path, trainers: list[FusionTrainer]
) -> None:
    """The same config with another λ is the baseline."""
    target = train(fusion.config(tmp_path / "target", clm_weight=1.0, dialogues=None))
    assert trainers[0].train_dataset.stores == []
    plain = train(fusion.config(tmp_path / "plain", **CLM))
    assert (target / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def strange(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Settings with one thing that does not fit."""
    folder = tmp_path_factory.mktemp("strange")
    shutil.copytree(fusion.folder, folder, dirs_exist_ok=True)

    def store(name: str, model: str, **changed: Any) -> Path:
        return tiny_fusion.extract_store(folder, model, **{"output": folder / "stores" / name, **changed}).folder

    def aligned(name: str, source: Path, pivot: Path) -> Path:
        output = folder / "aligned" / name
        align(AlignConfig(source_store=source, pivot_store=pivot, output=output, workers=1))
        return output

    def settings(what: str) -> dict[str, Any]:
        if what == "not aligned":
            return {"aligned_stores": [str(fusion.folder / "stores" / "bytes")]}
        if what == "no store":
            return {"aligned_stores": [str(fusion.folder / "stores")]}
        if what == "k":
            pivot = store("pivot-4", "pivot", top_k=4)
            few = aligned("bytes-4", store("bytes-4", "bytes", top_k=4), pivot)
            return {"aligned_stores": [str(few)]}
        if what == "another pivot's tokenizer":
            pivot = store("of-unigram", "unigram", pivot=str(folder / "unigram"))
            return {"pivot_store": str(pivot)}
        if what == "another pivot":
            model = tiny_sources.new_source("llama", len(fusion.tokenizer.tokenizer), seed=9, **tiny_fusion.PIVOT)
            model.save_pretrained(shutil.copytree(folder / "pivot", folder / "twin"))
            return {"pivot": str(folder / "twin")}
        if what == "another config":
            edited = shutil.copytree(folder / "pivot", folder / "edited")
            config = json.loads((edited / "config.json").read_text())
            (edited / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
            return {"pivot": str(edited)}
        if what == "other data":
            data = tiny_sources.write_sharegpt(folder / "other.jsonl", CHATS[1:])
            return {"pivot_store": str(store("other", "pivot", data=[str(data)]))}
        if what == "other dialogues":
            data = tiny_sources.write_sharegpt(folder / "some.jsonl", CHATS[2:])
            some = prepare(
                PrepareConfig(data=[str(data)], pivot=str(folder / "pivot"), template="openchat"), folder / "x"
            )
            return {"dialogues": str(some.folder)}
        assert what == "another pivot's store"
        again = store("again", "pivot", shard_tokens=300)
        return {"pivot_store": str(again)}

    return settings


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("not aligned", ["is not aligned to the pivot; run `fusion-trainer align`"]),
        ("no store", ["stores`"]),
        ("k", ["does not match what is needed:", "\n  top_k ", "4", "10"]),
        ("another pivot's tokenizer", ["does not match what is needed:", "\n  tokenizer "]),
        ("another pivot", ["does not match what is needed:", "\n  weights "]),
        ("another config", ["does not match what is needed:", "\n  config "]),
        ("other data", ["does not match what is needed:", "\n  data "]),
        ("other dialogues", ["does not match what is needed:", "\n  data "]),
        ("another pivot's store", ["does not match what is needed:", "\n  pivot_store "]),
    ],
)
def test_stores_that_do_not_fit_are_refused_before_anything_is_written(
    what: str, parts: list[str], strange: Callable[[str], dict[str, Any]], fusion: World, tmp_path: Path
) -> None:
    message = refused(fusion.config(tmp_path / "target", **strange(what)))
    for part in parts:
        assert part in message
    assert not list(tmp_path.iterdir())


def test_the_tokens_of_the_dialogues_are_kept_beside_them(fusion: World, tmp_path: Path) -> None:
    folder = shutil.copytree(fusion.dialogues.folder, tmp_path / "dialogues")
    for path in folder.glob("tokens-*"):
        path.unlink()
    train(fusion.config(tmp_path / "target", **CLM, dialogues=str(folder)))
    (made,) = folder.glob("tokens-*")
    assert made.read_bytes() == fusion.tokens.read_bytes()
    assert len(Dialogues(folder)) == len(CHATS)
    sound = made.read_bytes()
    for damaged in (sound[:200], sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]):
        made.write_bytes(damaged)
        train(fusion.config(tmp_path / f"target-{len(damaged)}", **CLM, dialogues=str(folder)))
        assert [path.read_bytes() for path in folder.glob("tokens-*")] == [sound]


# fusion-trainer train


def test_the_command_reads_yaml_and_flags(fusion: World, tmp_path: Path) -> None:
    settings = fusion.settings(tmp_path / "target")
    settings["training"]["learning_rate"] = "1e-2"  # as YAML reads it
    (tmp_path / "target.yaml").write_text(json.dumps(settings))
    flags = ["--training", "max_steps=1", "--training", "learning_rate=5e-3", "--clm-weight", "0.75"]
    result = CliRunner().invoke(main, ["train", str(tmp_path / "target.yaml"), *flags])
    assert result.exit_code == 0, result.output
    assert f"the target is in {tmp_path / 'target'}" in result.output
    record = json.loads((tmp_path / "target" / "fusion.json").read_text())
    assert (record["training"]["max_steps"], record["training"]["learning_rate"]) == (1, 0.005)
    assert record["training"]["per_device_train_batch_size"] == 4
    assert record["config"]["clm_weight"] == 0.75


def test_the_command_ends_in_a_sentence(fusion: World, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text(json.dumps(fusion.settings(tmp_path / "target.yaml")))
    result = CliRunner().invoke(main, ["train", str(tmp_path / "target.yaml")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"Error: `{tmp_path / 'target.yaml'}` is a file; output_dir names the target's folder" in result.output
