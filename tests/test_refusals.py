"""What a merge refuses, and what it leaves when it is stopped: ``check`` and the merge are of one mind."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_models
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from programs import BIN, tree
from safetensors.torch import load_file
from tiny_models import Family

from varm_merge.cli import main

UP = "model.layers.1.mlp.up_proj.weight"


def both(recipe: Path | str, out: Path, *flags: str) -> tuple[Result, Result]:
    """``varm-merge check --out`` and the merge; they agree and end without a traceback."""
    if isinstance(recipe, str):
        path = out.parent / "recipe.yaml"
        path.write_text(recipe)
        recipe = path
    check = CliRunner().invoke(main, ["check", str(recipe), "--out", str(out), *flags])
    merge = CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), "--quiet", *flags])
    for result in (check, merge):
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Traceback" not in result.output
    assert check.exit_code == merge.exit_code, check.output + merge.output
    return check, merge


def refused(recipe: Path | str, out: Path, *told: str, line: int | None = None) -> None:
    """Both refuse the recipe, and say ``told``."""
    there = out.exists()
    check, merge = both(recipe, out)
    assert merge.exit_code == 1
    for part in (*told, *([f"line {line}: "] if line else [])):
        assert part in check.output
        assert part in merge.output
    assert out.exists() == there


# Tensors


def with_biases(family: Family, folder: Path, *indices: int) -> Family:
    """Some of the models (0 is the pivot) have biases, as a Llama with ``attention_bias`` has."""
    paths = []
    for index, path in enumerate((family.pivot, *family.targets)):
        copy = shutil.copytree(path, folder / path.name)
        if index in indices:
            tiny_models.edit(
                copy,
                lambda tensors: tensors.update(
                    {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(16) for layer in (0, 1)}
                ),
            )
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
        paths.append(copy)
    return Family(paths[0], tuple(paths[1:]))


BIASES = "`model.layers.*.self_attn.q_proj.bias` (2): 2 tensors"


def test_tensors_of_the_pivot_that_no_definition_names_are_not_lost(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    models = with_biases(family("llama"), tmp_path, 0, 1, 2)
    text = runs.recipe(models, "dtype: float32", granularity="layer")
    out = tmp_path / "out"
    refused(text, out, f"mergekit's definition of LlamaForCausalLM leaves out {BIASES}", "--by-name", line=1)
    check, _ = both(text, out)
    commands = [line.strip() for line in check.output.splitlines() if line.startswith("      ")]
    assert [command.split()[0] for command in commands] == ["varm-merge", "printf"]
    for number, command in enumerate(commands):  # the next steps work as they are printed
        place = tmp_path / str(number)
        place.mkdir()
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-ec", command], cwd=place, check=True, env=environment, capture_output=True)
        written = load_file(out / "model.safetensors")
        assert written.keys() == load_file(models.pivot / "model.safetensors").keys()
        named = [target / "model.safetensors" if number else target for target in models.targets]
        targets = {name: runs.checkpoint(target) for name, target in zip(named, models.targets, strict=True)}
        runs.assert_oracle(runs.read(out), runs.checkpoint(models.pivot), targets, runs.LAYER)
        shutil.rmtree(out)


@pytest.mark.parametrize("having", [(1, 2), (1,)])
def test_tensors_that_only_targets_have_are_remarked_on(
    having: tuple[int, ...], family: Callable[..., Family], tmp_path: Path
) -> None:
    models = with_biases(family("llama"), tmp_path, *having)
    check, _ = both(runs.recipe(models, granularity="layer"), tmp_path / "out")
    assert check.exit_code == 0
    for index in having:
        told = f"only `{models.targets[index - 1]}` has {BIASES}, not {models.pivot}: they are not in the merge"
        assert told in check.output


def test_a_tensor_that_one_target_lacks_is_remarked_on(family: Callable[..., Family], tmp_path: Path) -> None:
    models = family("mpt")
    target = shutil.copytree(models.targets[0], tmp_path / "target")
    name = "transformer.blocks.1.norm_2.weight"
    tiny_models.edit(target, lambda tensors: tensors.pop(name))
    text = runs.recipe(Family(models.pivot, (target, models.targets[1])), granularity="layer")
    check, _ = both(text, tmp_path / "out")
    assert f"`{target}` has no `{name}`: merged of the other models alone" in check.output


def test_a_head_that_the_merge_ties_is_remarked_on(family: Callable[..., Family], tmp_path: Path) -> None:
    models = family("llama")
    pivot = shutil.copytree(models.pivot, tmp_path / "pivot")
    tiny_models.edit(pivot, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((pivot / "config.json").read_text())
    (pivot / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    check, _ = both(runs.recipe(Family(pivot, models.targets), granularity="layer"), tmp_path / "out")
    for target in models.targets:
        assert f"`{target}` has a head of its own, `lm_head.weight`" in check.output


def test_by_names_means_whole_models_of_one_layout(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = yaml.safe_load(runs.recipe(mistral))
    sources = [{"model": str(one), "layer_range": [0, 2]} for one in (mistral.pivot, *mistral.targets)]
    sliced = {key: value for key, value in content.items() if key != "models"} | {"slices": [{"sources": sources}]}
    gradient = content | {"parameters": {"normalization": "softmax", "temperature": [1, 2]}}
    for document, told in (
        (sliced, "`slices`: a merge by names takes whole models"),
        (gradient, "`temperature` is a gradient over layers, and a merge by names has none"),
    ):
        recipe.write_text(yaml.safe_dump(document))
        for command in (["check", "--by-name"], ["yaml", "--by-name"], ["inspect", "--by-name"]):
            out = [str(tmp_path / "out")] if command[0] == "yaml" else []
            result = CliRunner().invoke(main, [*command, str(recipe), *out])
            assert (result.exit_code, told in result.output) == (1, True), result.output
    assert not (tmp_path / "out").exists()


# Weights that are none


def gptq(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, stem = tensors.pop(name), name.removesuffix("weight")
        tensors[f"{stem}qweight"] = torch.ones(weight.shape, dtype=torch.int32)
        tensors[f"{stem}scales"] = torch.ones(weight.shape[0]).half()


def fp8(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


def bnb(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = torch.ones(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(3)


def int8(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int8)


CODES = {"gptq": gptq, "fp8": fp8, "bitsandbytes": bnb, "int8": int8}


@pytest.mark.parametrize("told", [True, False], ids=["in the config", "not in the config"])
@pytest.mark.parametrize("method", CODES)
@pytest.mark.parametrize("which", ["all", "one"])
def test_codes_are_not_merged_as_weights(
    which: str, method: str, told: bool, mistral: Family, tmp_path: Path
) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths if which == "all" else paths[-1:]:
        tiny_models.edit(path, CODES[method])
        config = json.loads((path / "config.json").read_text())
        extra = {"quantization_config": {"quant_method": method}} if told else {}
        (path / "config.json").write_text(json.dumps({**config, **extra}))
    text = runs.recipe(Family(paths[0], tuple(paths[1:])), granularity="layer")
    refused(text, tmp_path / "out", "quantised", "Codes cannot be merged as weights")


def test_a_quantization_config_of_plain_weights_is_refused_as_well(mistral: Family, tmp_path: Path) -> None:
    target = shutil.copytree(mistral.targets[0], tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    config["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (target / "config.json").write_text(json.dumps(config))
    text = runs.recipe(Family(mistral.pivot, (target, mistral.targets[1])))
    refused(text, tmp_path / "out", "remove that entry from its config.json", line=5)


# Folders


def test_the_output_is_no_input_and_lies_in_none(mistral: Family, tmp_path: Path) -> None:
    models = tmp_path / "models"
    paths = [shutil.copytree(path, models / path.name) for path in (mistral.pivot, *mistral.targets)]
    family, before = Family(paths[0], tuple(paths[1:])), tree(models)
    (tmp_path / "link").symlink_to(paths[2])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(family, granularity="layer"))
    for out, line in (
        (paths[0], 2),
        (paths[1], 5),
        (tmp_path / "link", 6),
        (models, 2),
        (paths[2] / "merged", 6),
        (models / "x" / ".." / paths[1].name, 5),
    ):
        refused(recipe, out, "the merge would be written to", line=line)
        assert tree(models) == before


def test_two_paths_to_a_folder_are_one_model(mistral: Family, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mistral.targets[0])
    twice = Family(mistral.pivot, (mistral.targets[0], tmp_path / "link"))
    refused(runs.recipe(twice), tmp_path / "out", "is listed twice", line=6)
    (tmp_path / "base").symlink_to(mistral.pivot)
    listed = Family(tmp_path / "base", (mistral.pivot, *mistral.targets))
    merged = runs.merge(runs.recipe(listed, granularity="layer"), tmp_path / "out")
    assert len(merged.log["targets"]) == 2
    plain = runs.merge(runs.recipe(mistral, granularity="layer"), tmp_path / "plain")
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in merged.tensors.items())


def big_recipe(folder: Path) -> Path:
    """A merge of some seconds, in many shards."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    models = tiny_models.save_family(folder / "big", "mistral", **wide)
    (folder / "recipe.yaml").write_text(runs.recipe(models, granularity="layer"))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("before", [False, True], ids=["new folder", "folder with files"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda one: one.name)
def test_a_stopped_merge_leaves_what_was_there(number: signal.Signals, before: bool, tmp_path: Path) -> None:
    recipe, out = big_recipe(tmp_path), tmp_path / "deep" / "er" / "out"
    if before:
        out.mkdir(parents=True)
        for name in ("model.safetensors", "notes.txt", "varm_weights.json"):
            (out / name).write_text("mine")
    kept = tree(tmp_path)
    command = [BIN / "mergekit-yaml", recipe, out, "--quiet", "--out-shard-size", "100K"]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (out / "model-2.safetensors").exists():
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.001)
    running.send_signal(number)
    assert running.wait(60) != 0
    assert tree(tmp_path) == kept
    assert (tmp_path / "deep").exists() == before


# Numbers


def test_a_result_beyond_its_dtype_names_tensor_and_line(mistral: Family, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths:
        tiny_models.edit(path, lambda tensors: tensors[UP].view(-1)[:1].fill_(1e5))
    family, recipe = Family(paths[0], tuple(paths[1:])), tmp_path / "recipe.yaml"
    for lines, told in (
        (["dtype: float32", "out_dtype: float16"], f"line 8: the merged tensor `{UP}` has values beyond 65504"),
        (["out_dtype: float16"], f"line 7: the merged tensor `{UP}` has values beyond 65504"),
        (["dtype: float16"], "has values up to 100000, which do not fit into `dtype: float16`"),
    ):
        for granularity in ("layer", "matrix", "parameter"):
            recipe.write_text(runs.recipe(family, *lines, granularity=granularity))
            merge = CliRunner().invoke(mergekit_yaml, [str(recipe), str(tmp_path / "out"), "--quiet"])
            assert (merge.exit_code, told in merge.output) == (1, True), merge.output
            assert "damaged" not in merge.output
            assert not (tmp_path / "out").exists()
    recipe.write_text(runs.recipe(family, "dtype: float32", "out_dtype: bfloat16"))
    both(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    "span",
    ["[0, 0]", "[0, -1]", "[-1, 1]", "[2, 1]", "['0', '2']", "[0, 1.5]", "[true, 2]", "[0]", "[0, 1, 2]", "3"],
)
def test_a_layer_range_that_is_none_is_a_problem_with_its_line(span: str, mistral: Family, tmp_path: Path) -> None:
    sources = "".join(
        f"      - {{model: {path}, layer_range: {span}}}\n" for path in (mistral.pivot, *mistral.targets)
    )
    text = f"merge_method: varm\nbase_model: {mistral.pivot}\nslices:\n  - sources:\n{sources}dtype: float32\n"
    refused(text, tmp_path / "out", "`layer_range` is ", line=5)


def test_layers_that_a_model_has_not_are_a_problem(mistral: Family, tmp_path: Path) -> None:
    sources = "".join(f"      - {{model: {p}, layer_range: [1, 4]}}\n" for p in (mistral.pivot, *mistral.targets))
    text = f"merge_method: varm\nbase_model: {mistral.pivot}\nslices:\n  - sources:\n{sources}dtype: float32\n"
    refused(text, tmp_path / "out", f"`{mistral.pivot}` has no `model.layers.*.", "18 tensors", line=2)


# Files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_a_recipe_may_have_any_encoding_of_yaml(encoding: str, mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "rezept für alle.yaml"
    recipe.write_bytes(("# für alle\n" + runs.recipe(mistral, granularity="layer")).encode(encoding))
    check, _ = both(recipe, tmp_path / "out")
    assert check.exit_code == 0
    runs.assert_merges(runs.read(tmp_path / "out"), mistral, runs.LAYER)
    assert "für alle" in (tmp_path / "out" / "mergekit_config.yml").read_text(encoding="utf-8")


def test_another_encoding_is_a_sentence(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(("merge_method: varm\n# für alle\n" + runs.recipe(mistral)).encode("latin-1"))
    refused(recipe, tmp_path / "out", "the byte 0xfc is no UTF-8", line=2)
    assert CliRunner().invoke(main, ["inspect", str(recipe)]).exit_code == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": None}, "names no `architectures`"),
        ({"architectures": []}, "names no `architectures`"),
        ({"architectures": ["MistralForCausalLM", "MistralModel"]}, "names 2 `architectures`"),
        ({"model_type": "mistral_of_mine"}, "mistral_of_mine"),
    ],
)
def test_a_config_that_mergekit_cannot_plan_from_is_a_sentence(
    change: dict[str, Any], told: str, mistral: Family, tmp_path: Path
) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **change}))
    refused(runs.recipe(Family(paths[0], tuple(paths[1:]))), tmp_path / "out", told)


def test_a_full_disk_is_a_sentence(mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(runs.recipe(mistral))

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    merge = CliRunner().invoke(mergekit_yaml, [str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet"])
    assert merge.exit_code == 1
    assert "was not merged: No space left on device" in merge.output
    assert not (tmp_path / "out").exists()


# Options


def test_adapters_are_checked_inspected_and_merged(family: Callable[..., Family], tmp_path: Path) -> None:
    pivot = family("llama").pivot
    adapters = [tiny_models.save_adapter(pivot, tmp_path / f"lora{seed}", seed) for seed in (1, 2)]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    targets = tuple(Path(f"{pivot}+{adapter}") for adapter in adapters)
    recipe.write_text(runs.recipe(Family(pivot, targets), granularity="matrix"))
    refused(recipe, out, "is an adapter: give --lora-merge-cache")
    inspected = CliRunner().invoke(main, ["inspect", str(recipe), "--json", "--quiet"])
    assert inspected.exit_code == 0, inspected.output
    check, _ = both(recipe, out, "--lora-merge-cache", str(tmp_path / "cache"))
    assert check.exit_code == 0
    kept = sorted((tmp_path / "cache").iterdir())
    again, _ = both(recipe, tmp_path / "again", "--lora-merge-cache", str(tmp_path / "cache"))
    assert again.exit_code == 0
    for path in kept[0].glob("*.safetensors"):  # of a run that was killed
        path.unlink()
    half, _ = both(recipe, tmp_path / "half", "--lora-merge-cache", str(tmp_path / "cache"))
    assert f"`{kept[0]}` has no weights" in half.output
    assert "remove that folder" in half.output
    (adapters[0] / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    refused(recipe, tmp_path / "half", f"the adapter `{adapters[0]}` has no adapter_model.safetensors")
    log = runs.read(out).log
    own = {unit["unit"]: unit["targets"] for unit in json.loads(inspected.stdout)["units"]["recipe"]}
    assert {unit["unit"]: unit["targets"] for unit in log["units"]} == own


def test_crimes_are_allowed_where_mergekit_allows_them(family: Callable[..., Family], tmp_path: Path) -> None:
    mistral, llama = family("mistral"), family("llama")
    shapes = {name: tensor.shape for name, tensor in load_file(mistral.pivot / "model.safetensors").items()}
    assert shapes == {n: t.shape for n, t in load_file(llama.pivot / "model.safetensors").items()}
    text = runs.recipe(Family(llama.pivot, (llama.targets[0], mistral.targets[0])))
    refused(text, tmp_path / "out", f"{mistral.targets[0]} is a MistralForCausalLM", "--allow-crimes", line=6)
    check, _ = both(text, tmp_path / "out", "--allow-crimes")
    assert check.exit_code == 0
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "recipe.yaml"), "--allow-crimes", "--quiet"])
    assert inspected.exit_code == 0


def test_a_filter_behind_one_that_takes_its_tensors_is_remarked_on(mistral: Family, tmp_path: Path) -> None:
    head = runs.recipe(mistral).replace("parameters: {}", "")
    for entries, number in (
        ("[{value: matrix}, {filter: mlp, value: layer}]", 1),
        ("[{filter: mlp, value: layer}, {filter: mlp.up, value: matrix}, {value: matrix}]", 2),
        ("[{filter: mlp.up, value: layer}, {filter: mlp, value: layer}, {value: matrix}]", 0),
    ):
        text = f"{head}parameters:\n  granularity: {entries}\n"
        check = CliRunner().invoke(main, ["check", *written(tmp_path, text)])
        assert ("is never used" in check.output) == bool(number), check.output


def written(folder: Path, text: str) -> list[str]:
    (folder / "filters.yaml").write_text(text)
    return [str(folder / "filters.yaml")]


def test_names_that_transformers_converts_are_no_problem(family: Callable[..., Family], tmp_path: Path) -> None:
    """A Mixtral of which one target is packed, as ``state_dict()`` has it."""
    models = family("mixtral")
    packed = shutil.copytree(models.targets[0], tmp_path / "packed")
    state = transformers.AutoModelForCausalLM.from_pretrained(packed).state_dict()
    tiny_models.edit(
        packed, lambda tensors: (tensors.clear(), tensors.update({n: t.clone() for n, t in state.items()}))
    )
    recipe = runs.recipe(Family(models.pivot, (packed, models.targets[1])), granularity="layer")
    check, _ = both(recipe, tmp_path / "out")
    assert check.exit_code == 0
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "recipe.yaml"), "--quiet"]).exit_code == 0
