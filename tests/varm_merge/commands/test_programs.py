"""mergekit's programs and their options: ``varm`` comes out the same, and other methods come out untouched."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mergekit.multigpu_executor as multi_gpu
import pytest
import runs
import tiny_models
import torch
from click.testing import CliRunner, Result
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from tiny_models import Family

from varm_merge.merging.tasks import MeasureUnit, MergeTensor

UNITS = {"model": runs.whole_model, "layer": runs.LAYER, "module": runs.MODULE, "matrix": runs.MATRIX}


@pytest.mark.parametrize("granularity", ["model", "matrix"])
@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_memory": True, "read_to_gpu": True},
        {"async_write": True, "write_threads": 2, "out_shard_size": 4000},
        {"clone_tensors": True, "safe_serialization": False},
    ],
    ids=" ".join,
)
def test_options_of_a_run_do_not_change_the_merge(
    options: dict[str, Any], granularity: str, mistral: Family, tmp_path: Path
) -> None:
    merged = runs.merge(runs.recipe(mistral, granularity=granularity), tmp_path, **options)
    runs.assert_merges(merged, mistral, UNITS[granularity])


@contextlib.contextmanager
def two_fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[type]]]:
    """Let the executor for several GPUs run on CPU threads; yields the classes of task that each device ran."""
    worked: dict[str, set[type]] = {}
    device_worker = multi_gpu.MultiGPUExecutor._device_worker

    def _device_worker(self: Any, **arguments: Any) -> None:
        worked[str(arguments["device"])] = {type(handle.task()) for handle in arguments["task_list"]}
        device_worker(self, **arguments)

    class PatientEvent(threading.Event):
        """mergekit sets it when the GPUs are done, and can lose results that still wait in its queue then."""

        def set(self) -> None:
            time.sleep(0.3)
            super().set()

    with monkeypatch.context() as patch:
        patch.setattr(multi_gpu, "get_torch_accelerator_type", lambda: "cpu")
        patch.setattr(multi_gpu, "get_torch_accelerator_count", lambda: 2)
        patch.setattr(multi_gpu, "threading", SimpleNamespace(Event=PatientEvent, Thread=threading.Thread))
        patch.setattr(multi_gpu.MultiGPUExecutor, "_device_worker", _device_worker)
        patch.setattr(torch.cuda, "Stream", lambda device: device)
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        yield worked


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_several_gpus_share_the_units(
    granularity: str, mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = runs.recipe(mistral, granularity=granularity)
    with two_fake_gpus(monkeypatch) as worked:
        parallel = runs.merge(text, tmp_path / "parallel", multi_gpu=True)
    assert worked.keys() == ({"cpu:0"} if granularity == "model" else {"cpu:0", "cpu:1"})
    assert all(MergeTensor in tasks for tasks in worked.values())
    assert all((MeasureUnit in tasks) == (granularity != "matrix") for tasks in worked.values())
    runs.assert_merges(parallel, mistral, UNITS[granularity])
    runs.assert_same_tensors(parallel, runs.merge(text, tmp_path / "serial"))


@pytest.mark.slow
def test_the_console_script_writes_the_same_bytes_in_another_process(family: Any, tmp_path: Path) -> None:
    """Bart, because mergekit infers its architecture from sets of names, whose order differs by process."""
    text = runs.recipe(family("bart"), granularity="layer")
    here = runs.merge(text, tmp_path / "here").folder
    (tmp_path / "recipe.yaml").write_text(text)
    program = [str(Path(sys.executable).parent / "mergekit-yaml"), "recipe.yaml", "there", "--quiet"]
    subprocess.run([*program, "--no-copy-tokenizer"], cwd=tmp_path, check=True, env=environment("1"))
    assert_same_bytes(here, tmp_path / "there", "model.safetensors", "varm_weights.json")


def test_a_second_run_writes_the_same_bytes(mistral: Family, tmp_path: Path) -> None:
    text = runs.recipe(mistral, granularity="module")
    one, other = (runs.merge(text, tmp_path / name).folder for name in ("one", "other"))
    assert_same_bytes(one, other, "model.safetensors", "varm_weights.json", "config.json")


OTHER_METHODS = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
}
RUN_RECIPES = """
import sys, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for recipe in Path(sys.argv[1]).glob("*.yaml"):
    configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(configuration, str(recipe.with_suffix("")), MergeOptions(quiet=True, copy_tokenizer=False))
assert not [name for name in sys.modules if "varm_merge" in name and name != "_varm_merge_autoload"]
"""


@pytest.mark.slow
def test_other_methods_write_the_same_bytes_without_the_plugin(mistral: Family, tmp_path: Path) -> None:
    for method, parameters in OTHER_METHODS.items():
        targets = mistral.targets[: 1 if method == "slerp" else 2]
        text = runs.recipe(Family(mistral.pivot, targets), pivot_listed=method == "slerp", **parameters)
        text = text.replace("merge_method: varm", f"merge_method: {method}")
        (tmp_path / f"{method}.yaml").write_text(text)
        runs.merge(text, tmp_path / "with_plugin" / method)
    subprocess.run([sys.executable, "-c", RUN_RECIPES, str(tmp_path)], check=True, env=environment("0"))
    for method in OTHER_METHODS:
        with_plugin = tmp_path / "with_plugin" / method
        assert_same_bytes(with_plugin, tmp_path / method, "model.safetensors", "config.json")
        assert not (with_plugin / "varm_weights.json").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_several_gpus_are_refused_where_there_is_none(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(mistral))
    for flag in ("--multi-gpu", "--gpu-rich"):
        done = CliRunner().invoke(mergekit_yaml, [str(recipe), str(tmp_path / "out"), flag])
        assert "Error: --multi-gpu needs a GPU" in done.output


def test_a_recipe_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "recipe.yaml"):
        done = CliRunner().invoke(mergekit_yaml, [str(path), str(tmp_path / "out")])
        assert done.output == f"Error: there is no recipe `{path}`\n"


def test_mergekit_multi_names_what_it_does_not_take(mistral: Family, tmp_path: Path) -> None:
    spaced = Family(shutil.copytree(mistral.pivot, tmp_path / "the pivot"), mistral.targets)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"{runs.recipe(spaced)}name: first\n")
    done = CliRunner().invoke(mergekit_multi, [str(recipe), "-I", str(out)])
    assert "mergekit-multi does not take a path with a space or a quote" in done.output


def test_mergekit_multi_merges_a_merge(mistral: Family, tmp_path: Path) -> None:
    first = runs.recipe(mistral, "name: first", granularity="layer")
    final = runs.recipe(Family(mistral.pivot, (Path("first"), mistral.targets[1])), granularity="module")
    (tmp_path / "recipes.yaml").write_text(f"{first}---\n{final}")
    options = ["--intermediate-dir", str(tmp_path / "between"), "--out-path", str(tmp_path / "final")]
    succeed(mergekit_multi, [str(tmp_path / "recipes.yaml"), *options, "--quiet", "--no-copy-tokenizer"])
    between = tmp_path / "between" / "first"
    runs.assert_merges(runs.read(between), mistral, runs.LAYER)
    inputs = Family(mistral.pivot, (between, mistral.targets[1]))
    runs.assert_merges(runs.read(tmp_path / "final"), inputs, runs.MODULE)


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_mergekit_pytorch_merges_flat_files(
    granularity: str, pickled: bool, mistral: Family, tmp_path: Path
) -> None:
    files = [folder / "model.safetensors" for folder in (mistral.pivot, *mistral.targets)]
    if pickled:
        names = ("pivot", "target_1", "target_2")
        files = [
            tiny_models.resave(file.parent, tmp_path / name, pickled=True) / "pytorch_model.bin"
            for file, name in zip(files, names, strict=True)
        ]
    flat = Family(files[0], tuple(files[1:]))
    (tmp_path / "recipe.yaml").write_text(runs.recipe(flat, granularity=granularity))
    succeed(mergekit_pytorch, [str(tmp_path / "recipe.yaml"), str(tmp_path / "out")])
    runs.assert_merges(
        runs.read(tmp_path / "out"), flat, UNITS[granularity], lambda file: runs.checkpoint(file.parent)
    )


def test_mergekit_pytorch_ends_with_the_name_of_a_damaged_tensor(mistral: Family, tmp_path: Path) -> None:
    damaged = tiny_models.damaged(mistral, tmp_path / "damaged", "model.norm.weight", float("nan"))
    flat = Family(mistral.pivot / "model.safetensors", (damaged.targets[1] / "model.safetensors",))
    (tmp_path / "recipe.yaml").write_text(runs.recipe(flat, granularity="layer"))
    result = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "recipe.yaml"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"Error: NaN in tensor `model.norm.weight` of target {flat.targets[0]}." in result.output
    assert not (tmp_path / "out").exists()


def environment(autoload: str) -> dict[str, str]:
    return {**os.environ, "VARM_MERGE_AUTOLOAD": autoload, "PYTHONHASHSEED": "1"}


def succeed(command: Any, arguments: list[str]) -> Result:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_same_bytes(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
