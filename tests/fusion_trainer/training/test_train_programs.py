"""``fusion-trainer train`` as processes: several of them, killed, out of disk; and the whole way to a merge."""

import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_fusion
import tiny_models
import tiny_sources
import torch
import yaml
from click.testing import CliRunner
from programs import BIN, ENVIRONMENT, Programs, free_port, tree, wait_for
from tiny_fusion import CHATS, World, far_apart, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_trainer.cli import main
from fusion_trainer.training.train import train

pytestmark = pytest.mark.slow
IMPORTS = """
import fusion_trainer.training.train, peft, torch.distributed.fsdp, torch.distributed.checkpoint
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("llama")  # later calls take it from a cache
"""
SHARDED = {
    "distributed_type": "FSDP",
    "use_cpu": True,
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    },
}
"""A config of accelerate."""
FSDP = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
FSDP |= {name.upper(): str(value).lower() for name, value in SHARDED["fsdp_config"].items()}  # type: ignore[attr-defined]
FSDP |= {name: FSDP[name].upper() for name in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE")}
"""What accelerate's launcher makes of it."""
SLOWLY = """
import time, torch
save = torch.save
torch.save = lambda *given, **named: (time.sleep(0.02), save(*given, **named), time.sleep(0.02))
"""
"""Makes it last to write a checkpoint."""


def ranks(number: int, **more: str) -> list[dict[str, str]]:
    """What a launcher tells each of several processes."""
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": free_port(), **more}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    started = Programs(tmp_path_factory.mktemp("programs"), IMPORTS)
    yield started
    started.end()


def written(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(settings))
    return path


def launched(program: Sequence[Any], folder: Path) -> str:
    result = subprocess.run(program, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def results(target: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((target / "fusion.json").read_text())["results"]
    return found


def logs(target: Path, key: str) -> list[float]:
    """From the last checkpoint."""
    last = max(target.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    return [log[key] for log in state["log_history"] if key in log]


# Several processes

SHARED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "adam_epsilon": 1e-5, "learning_rate": 3e-3}
SPLIT = {"training": {**SHARED, "per_device_train_batch_size": 2}, "held_out": 0.25}
WHOLE = {"training": {**SHARED, "per_device_train_batch_size": 4}, "held_out": 0.25}


@pytest.fixture(scope="module")
def one_process(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(fusion.config(tmp_path_factory.mktemp("one") / "target", **WHOLE))


@pytest.fixture(scope="module")
def ddp(programs: Programs, fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    config = written(folder / "target.yaml", fusion.settings(folder / "target", **SPLIT))
    code, printed = programs.run(folder, "train", config, environments=ranks(2))
    assert code == 0, printed
    assert printed.count("the target is in") == 1
    return folder / "target"


@pytest.fixture(scope="module")
def fsdp(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By accelerate's launcher, as a user runs it."""
    folder = tmp_path_factory.mktemp("fsdp")
    config = written(folder / "target.yaml", fusion.settings(folder / "target", **SPLIT))
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(SHARDED))
    options = ["--config_file", "accelerate.yaml", "--main_process_port", free_port()]
    launched([BIN / "accelerate", "launch", *options, "-m", "fusion_trainer", "train", config], folder)
    return folder / "target"


@pytest.mark.parametrize("several", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(
    several: str, one_process: Path, fusion: World, request: pytest.FixtureRequest
) -> None:
    """Rows have 13 to 169 supervised tokens: a mean over each process' own would be another loss."""
    target = request.getfixturevalue(several)
    assert apart(fusion.folder / "pivot", one_process, target) < 1e-4
    for key in ("loss", "grad_norm", "clm", "fusion", "supervised_tokens", "gradient_norm_ratio", "share/bytes"):
        assert logs(target, key) == pytest.approx(logs(one_process, key), rel=1e-4), key
    checkpoint = {path.name for path in (target / "checkpoint-3").iterdir()}
    assert ("pytorch_model_fsdp_0" in checkpoint) == ("optimizer_0" in checkpoint) == (several == "fsdp")
    assert ("model.safetensors" in checkpoint) == (several == "ddp")
    assert json.loads((target / "fusion.json").read_text())["processes"] == 2


@pytest.mark.parametrize("several", ["ddp", "fsdp"])
def test_two_processes_evaluate_each_row_once(
    several: str, one_process: Path, fusion: World, request: pytest.FixtureRequest
) -> None:
    """Rows that fill up the last batch do not count."""
    target = request.getfixturevalue(several)
    for key in ("eval_loss", "eval_clm", "eval_fusion", "eval_perplexity_per_byte"):
        assert results(target)[key] == pytest.approx(results(one_process)[key], rel=1e-5), key


@pytest.mark.parametrize("several", ["ddp", "fsdp"])
def test_several_processes_killed_and_started_again_end_with_the_same_bytes(
    several: str, programs: Programs, fusion: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue(several)
    output = tmp_path / "target"
    config = written(tmp_path / "target.yaml", fusion.settings(output, **SPLIT))
    more = FSDP if several == "fsdp" else {}
    run = programs.start(tmp_path, "train", config, environments=ranks(2, **more), before=SLOWLY)
    wait_for((output / "checkpoint-6").exists, run.process)
    assert run.kill()[0] != 0
    assert not (output / "fusion.json").exists()
    code, printed = programs.run(tmp_path, "train", config, environments=ranks(2, **more))
    assert code == 0, printed
    assert re.findall(r"'epoch': '([\d.]+)'", printed)[0] == "1.75"  # the seventh step of four in an epoch
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert results(output)["eval_clm"] == results(whole)["eval_clm"]


GRADIENTS = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "max_steps": 4}


def test_gradients_are_those_of_the_whole_batch_however_it_is_divided(
    programs: Programs, fusion: World, tmp_path: Path
) -> None:
    """By plain descent, so that weights show the gradients; beyond an epoch, whose end fills no batch."""
    settings = {"kind": "multi", "clm_weight_schedule": "soft"}
    grouped = {**GRADIENTS, "train_sampling_strategy": "group_by_length"}
    at_once = {**grouped, "per_device_train_batch_size": 6}
    divided = {**grouped, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    whole = train(fusion.config(tmp_path / "whole", **settings, training=at_once))
    config = written(tmp_path / "target.yaml", fusion.settings(tmp_path / "parts", **settings, training=divided))
    code, printed = programs.run(tmp_path, "train", config, environments=ranks(3))
    assert code == 0, printed
    assert apart(fusion.folder / "pivot", whole, tmp_path / "parts") < 1e-5


def apart(pivot: Path, one: Path, other: Path) -> float:
    """How far apart the updates of two targets are."""
    start = weights(pivot)
    updates = ({key: tensor - start[key] for key, tensor in weights(folder).items()} for folder in (one, other))
    return far_apart(*updates)


def test_processes_share_adapters_and_one_prints_what_16_bits_would_keep(
    programs: Programs, fusion: World, tmp_path: Path
) -> None:
    """Adapters of a pivot in bfloat16, merged into it in float32."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.bfloat16).save_pretrained(pivot)
    settings = {
        "kind": "none",
        "clm_weight": 1.0,
        "pivot": str(pivot),
        "lora": {"r": 2, "target_modules": "all-linear"},
    }
    whole = train(fusion.config(tmp_path / "whole", **settings, training={"per_device_train_batch_size": 4}))
    parts = fusion.settings(tmp_path / "parts", **settings, training={"per_device_train_batch_size": 2})
    config = written(tmp_path / "target.yaml", parts)
    code, printed = programs.run(tmp_path, "train", config, environments=ranks(2))
    assert code == 0, printed
    assert apart(pivot, whole, tmp_path / "parts") < 1e-3
    before, after = weights(pivot), weights(tmp_path / "parts")
    adapted = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert all("proj" in name for name in adapted)
    differ = torch.cat([(after[name].bfloat16() != before[name]).flatten() for name in adapted])
    share = float(differ.double().mean())
    assert 0 < share < 1
    assert (
        printed.count("In bfloat16, the pivot's dtype, ")
        == printed.count(f"dtype, {share:.1%} of the elements")
        == 1
    )
    assert json.loads((tmp_path / "parts" / "fusion.json").read_text())["rounding"]["share"] == share


def test_processes_that_would_each_train_alone_are_refused(
    programs: Programs, fusion: World, tmp_path: Path
) -> None:
    settings = fusion.settings(tmp_path / "target", training={"use_cpu": False})
    config = written(tmp_path / "target.yaml", settings)
    code, printed = programs.run(tmp_path, "train", config, environments=ranks(2))
    assert code == 1
    assert "2 processes were started, but each trains alone; on CPU set `use_cpu: true` in `training`" in printed
    assert not (tmp_path / "target").exists()


def test_a_loss_that_is_not_finite_ends_all_processes(programs: Programs, fusion: World, tmp_path: Path) -> None:
    training = {**GRADIENTS, "learning_rate": 1e38, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    config = written(tmp_path / "target.yaml", fusion.settings(tmp_path / "target", training=training))
    code, printed = programs.run(tmp_path, "train", config, environments=ranks(2))
    assert code != 0
    assert "is NaN or infinite in step 2" in printed
    assert "chat-" in printed
    kept = [path.name for path in (tmp_path / "target").glob("checkpoint*")]
    assert kept == ["checkpoint-1"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "target" / "checkpoint-1").values())


# Killed

EVERYTHING = {
    "kind": "multi",
    "packing": True,
    "held_out": 0.25,
    "clm_weight_schedule": "hard_and_decay",
    "training": {
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    },
}


@pytest.fixture(scope="module")
def uninterrupted(programs: Programs, fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = written(folder / "target.yaml", fusion.settings(folder / "target", **EVERYTHING))
    code, printed = programs.run(folder, "train", config)
    assert code == 0, printed
    assert len(list((folder / "target").glob("checkpoint-*"))) == 8
    return folder / "target"


OF_A_CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def whole_checkpoints(output: Path, uninterrupted: Path) -> int:
    """Every checkpoint that has its name is whole: it is that of the uninterrupted run; returns the last one."""
    found = [0]
    for folder in output.glob("checkpoint-*"):
        other = uninterrupted / folder.name
        assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
        for name in OF_A_CHECKPOINT[:-1]:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), folder / name
        found.append(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        assert folder.name == f"checkpoint-{found[-1]}"
    return max(found)


def test_killed_at_any_point_and_started_again_it_ends_with_the_same_bytes(
    programs: Programs, fusion: World, uninterrupted: Path, tmp_path: Path
) -> None:
    """While a checkpoint is written, as soon as it has its name, between two, and while the target is written."""
    output, rng = tmp_path / "target", random.Random(2402)
    config = written(tmp_path / "target.yaml", fusion.settings(output, **EVERYTHING))
    writing = output / "checkpoint.tmp"
    kills: list[tuple[str, Callable[[], Any]]] = [
        ("before the first step", (output / "training.json").exists),
        ("at the first checkpoint's weights", lambda: list(writing.glob("*/model.safetensors*"))),
        ("at its optimizer", lambda: list(writing.glob("*/optimizer.pt"))),
        ("as soon as the second has its name", (output / "checkpoint-2").exists),
        ("at the third", lambda: list(writing.glob("checkpoint-3/*"))),
        ("at the random numbers of the fifth", lambda: list(writing.glob("checkpoint-5/rng_state.pth"))),
        ("after the fifth", (output / "checkpoint-5").exists),
        ("at the end of the seventh", lambda: list(writing.glob("checkpoint-7/trainer_state.json"))),
        ("at the last", (output / "checkpoint-8").exists),
        ("at the target", (output / "target.tmp").exists),
    ]
    killed, last = [], 0
    for when, reached in kills:
        run = programs.start(tmp_path, "train", config, before=SLOWLY)
        wait_for(reached, run.process)
        if "after" in when:
            time.sleep(rng.choice([0.01, 0.03]))
        code, printed = run.kill()
        assert code in (0, -9), printed
        if code:
            killed.append(when)
            assert not (output / "fusion.json").exists(), when
        now = whole_checkpoints(output, uninterrupted)
        assert now >= last, when
        last = now
    assert len(killed) >= len(kills) - 2, killed  # at the very end a run may be faster than the signal
    code, printed = programs.run(tmp_path, "train", config)
    assert code == 0, printed
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    for key in ("eval_clm", "eval_fusion", "eval_perplexity_per_byte"):
        assert results(output)[key] == results(uninterrupted)[key]
    assert {path.name for path in output.iterdir()} == {path.name for path in uninterrupted.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, printed = programs.run(tmp_path, "train", config)
    assert (code, "the target is in" in printed) == (0, True), printed
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


# A full disk


def test_a_full_disk_is_reported_and_the_training_can_be_resumed(
    programs: Programs,
    fusion: World,
    uninterrupted: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
) -> None:
    size = sum(len(content) for name, content in tree(uninterrupted).items() if name.startswith("checkpoint-1/"))
    target = sum(path.stat().st_size for path in uninterrupted.iterdir() if path.is_file())
    output = (
        small_disk(int(2.7 * size) + target + (1 << 16)) / "target"
    )  # the target's space is held from the start
    config = written(tmp_path / "target.yaml", fusion.settings(output, **EVERYTHING))
    code, printed = programs.run(tmp_path, "train", config)
    assert code == 1, printed
    assert "Traceback" not in printed
    assert f"the checkpoint `{output / 'checkpoint-3'}` cannot be written: " in printed
    assert f"run the same command again: it resumes from `{output / 'checkpoint-2'}`" in printed
    assert {path.name for path in output.iterdir()} == {"checkpoint-1", "checkpoint-2", "training.json"}
    assert whole_checkpoints(output, uninterrupted) == 2
    small_disk(1 << 26)
    code, printed = programs.run(tmp_path, "train", config)
    assert code == 0, printed
    assert (output / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("limit", ["disk", "file"])
def test_a_target_that_cannot_be_written_ends_in_a_message_and_can_be_written_later(
    limit: str,
    programs: Programs,
    fusion: World,
    uninterrupted: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
) -> None:
    """Nothing of it is there then, and nothing that looks like it."""
    folder = small_disk(1 << 16) if limit == "disk" else tmp_path
    output, size = folder / "target", (uninterrupted / "model.safetensors").stat().st_size
    assert size > 1 << 16
    config = written(tmp_path / "target.yaml", fusion.settings(output))
    limits = {"file_size": size - 1} if limit == "file" else {}
    code, printed = programs.run(tmp_path, "train", config, **limits)
    assert code == 1, printed
    assert "Traceback" not in printed
    assert f"`{output}` cannot be written: " in printed
    assert "run the same command again" in printed
    assert not list(output.glob("*.safetensors"))
    assert not (output / "fusion.json").exists()
    if limit == "disk":
        small_disk(1 << 24)
    code, printed = programs.run(tmp_path, "train", config)
    assert code == 0, printed
    assert not list(output.glob("*.tmp"))
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size > 0


# The whole way: two targets of one pivot, merged by stock mergekit

WAY: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "pivot": ("mistral", "sentencepiece_bpe", tiny_fusion.OPENCHAT, "own"),
    "neox": ("gpt_neox", "byte_level_bpe", tiny_fusion.CHATML, "own"),
    "moe": ("mixtral", "unigram", {}, "pivot"),
}
"""Layout, tokenizer, how it speaks, and in which template it is queried."""


def invoke(*arguments: object) -> str:
    """What a command prints, in this process."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``targets/neox`` and ``targets/moe`` of ``pivot``, by the commands alone."""
    folder = tmp_path
    monkeypatch.chdir(folder)
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS[:12])
    for number, (name, (layout, kind, speaks, _)) in enumerate(WAY.items()):
        tiny_sources.save_source(folder / name, layout, kind, seed=number, **speaks)

    for name, (*_, template) in WAY.items():
        data = ["--data", "chats.jsonl", "--template", "openchat", "--pivot", "pivot"]
        model = ["--model", name, "--source-template", template]
        invoke("extract", *data, *model, "--output", f"stores/{name}")
    for name in ("neox", "moe"):
        stores = ["--source-store", f"stores/{name}", "--pivot-store", "stores/pivot"]
        invoke("align", *stores, "--output", f"aligned/{name}", "--workers", "1")
    for name in ("neox", "moe"):
        (folder / f"{name}.yaml").write_text(
            f"pivot: pivot\npivot_store: stores/pivot\naligned_stores: aligned/{name}\nclm_weight: 0.9\n"
            f"training:\n  output_dir: targets/{name}\n  learning_rate: 5e-3\n  max_steps: 3\n"
            "  per_device_train_batch_size: 4\n  save_strategy: 'no'\n  use_cpu: true\n"
        )
        invoke("train", f"{name}.yaml")
    return folder


def test_two_targets_are_merged_by_stock_mergekit_with_the_recipe_that_was_written(way: Path) -> None:
    """The merge is that of the oracle, and the merged model loads and writes text."""
    arguments = ["recipe", "targets/neox", "targets/moe", "--out", "recipe.yaml", "--granularity", "matrix"]
    assert "mergekit-yaml recipe.yaml OUTPUT/" in invoke(*arguments)
    recipe = yaml.safe_load((way / "recipe.yaml").read_text())
    assert recipe == {
        "merge_method": "varm",
        "base_model": "./pivot",
        "models": [{"model": "./targets/neox"}, {"model": "./targets/moe"}],
        "parameters": {"granularity": "matrix"},
        "dtype": "float32",
    }
    head = (way / "recipe.yaml").read_text().partition("merge_method")[0]
    assert "targets/neox: neox" in head
    assert "targets/moe: moe" in head
    launched([BIN / "mergekit-yaml", "recipe.yaml", "merged", "--quiet"], way)
    family = tiny_models.Family(Path("./pivot"), (Path("targets/neox"), Path("targets/moe")))
    merged = runs.read(way / "merged")
    targets = {f"./{folder}": runs.checkpoint(way / folder) for folder in family.targets}
    runs.assert_oracle(merged, runs.checkpoint(way / "pivot"), targets, runs.MATRIX)
    shares = merged.weights("lm_head.weight")
    assert shares != [0.5, 0.5]
    model, tokenizer = (kind.from_pretrained(way / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
