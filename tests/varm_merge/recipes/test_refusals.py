"""What a merge refuses, and what it leaves when it is stopped: ``check`` and the merge are of one mind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_models
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.run_yaml import main as mergekit_yaml
from programs import tree, wait_for
from safetensors.torch import load_file, save_file
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


def refused(recipe: Path | str, out: Path, *expected: str, line: int | None = None) -> None:
    """Both refuse the recipe, and say ``expected``."""
    there = out.exists()
    check, merge = both(recipe, out)
    assert merge.exit_code == 1
    for part in (*expected, *([f"line {line}: "] if line else [])):
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


@pytest.mark.slow
def test_tensors_of_the_pivot_that_no_definition_names_are_not_lost(
    family: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = with_biases(family("llama"), tmp_path, 0, 1, 2)
    text = runs.recipe(models, "dtype: float32", granularity="layer")
    out = tmp_path / "out"
    refused(text, out, f"mergekit's definition of LlamaForCausalLM leaves out {BIASES}", "--by-name", line=1)
    check, _ = both(text, out)
    commands = [line.strip() for line in check.output.splitlines() if line.startswith("      ")]
    assert [command.split()[0] for command in commands] == ["varm-merge", "printf"]
    programs = {"varm-merge": main, "mergekit-pytorch": mergekit_pytorch}
    for program in programs:
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate(commands):  # the next steps work as they are printed
        shell = subprocess.run(
            ["bash", "-ec", command], check=True, env=environment, capture_output=True, text=True
        )
        program, *arguments = shell.stdout.splitlines()
        done = CliRunner().invoke(programs[Path(program).name], arguments)
        assert done.exit_code == 0, done.output
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
        expected = (
            f"`{models.targets[index - 1]}` has {BIASES}, which {models.pivot} does not have: they are left out "
            "of the merge"
        )
        assert expected in check.output


def test_a_tensor_that_one_target_lacks_is_remarked_on(family: Callable[..., Family], tmp_path: Path) -> None:
    models = family("mpt")
    target = shutil.copytree(models.targets[0], tmp_path / "target")
    name = "transformer.blocks.1.norm_2.weight"
    tiny_models.edit(target, lambda tensors: tensors.pop(name))
    text = runs.recipe(Family(models.pivot, (target, models.targets[1])), granularity="layer")
    check, _ = both(text, tmp_path / "out")
    assert f"`{target}` has no `{name}`: merged from the other models only" in check.output


def test_a_head_that_a_target_has_of_its_own_is_not_tied_away(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    tied, untied = family("qwen2"), tmp_path / "untied"
    shutil.copytree(tied.targets[1], untied)
    tiny_models.edit(untied, lambda tensors: tensors.update({"lm_head.weight": torch.ones(40, 16)}))
    rewrite(untied, tie_word_embeddings=False)
    text = runs.recipe(Family(tied.pivot, (tied.targets[0], untied)))
    check, _ = both(text, tmp_path / "out")
    assert "a head of its own" not in check.output
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False
    linear = text.replace("varm", "linear").replace("{}", '{"weight": 1}')
    (tmp_path / "linear.yaml").write_text(linear)
    check = CliRunner().invoke(main, ["check", str(tmp_path / "linear.yaml")])
    assert f"`{untied}` has a head of its own, `lm_head.weight`" in check.output  # mergekit leaves the config tied


def test_by_names_means_whole_models_of_one_layout(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = yaml.safe_load(runs.recipe(mistral))
    sources = [{"model": str(one), "layer_range": [0, 2]} for one in (mistral.pivot, *mistral.targets)]
    sliced = {key: value for key, value in content.items() if key != "models"} | {"slices": [{"sources": sources}]}
    gradient = content | {"parameters": {"normalization": "softmax", "temperature": [1, 2]}}
    for document, expected in (
        (sliced, "`slices`: a merge by names takes whole models"),
        (gradient, "`temperature` is a gradient over layers, and a merge by names has none"),
    ):
        recipe.write_text(yaml.safe_dump(document))
        for command in (["check", "--by-name"], ["yaml", "--by-name"], ["inspect", "--by-name"]):
            out = [str(tmp_path / "out")] if command[0] == "yaml" else []
            result = CliRunner().invoke(main, [*command, str(recipe), *out])
            assert (result.exit_code, expected in result.output) == (1, True), result.output
    assert not (tmp_path / "out").exists()


# Layers


SIZE = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SIZE |= {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
DEEP: dict[str, dict[str, Any]] = {
    "Gemma2Config": {"head_dim": 8},
    "Cohere2Config": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "SmolLM3Config": {"no_rope_layers": [1, 0, 1, 1]},
    "GptOssConfig": MOE,
    "OPTConfig": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
}
BY_LAYER = ("layer_types", "no_rope_layers", "attention_layers")


def models_of(config: transformers.PretrainedConfig, folder: Path, targets: int = 2, cls: Any = None) -> Family:
    """A pivot of the config with random weights, and targets that moved."""
    paths = [folder / "pivot", *(folder / f"target_{number}" for number in range(1, targets + 1))]
    for number, path in enumerate(paths):
        torch.manual_seed(0)
        model = (cls or transformers.AutoModelForCausalLM).from_config(config)
        if number:
            tiny_models.move(model.parameters(), seed=number)
        model.save_pretrained(path)
    return Family(paths[0], tuple(paths[1:]))


def sliced(models: Family, *spans: tuple[int, int]) -> str:
    """A recipe that takes the same layers of all models."""
    slices = [
        {"sources": [{"model": str(one), "layer_range": [*span]} for one in (models.pivot, *models.targets)]}
        for span in spans
    ]
    recipe = {"merge_method": "varm", "base_model": str(models.pivot), "dtype": "float32", "slices": slices}
    return yaml.safe_dump(recipe, sort_keys=False)


def loaded(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The model, and whatever transformers has to say against the folder."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return model, {
        kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }


@pytest.mark.slow
@pytest.mark.parametrize("spans", [[(0, 3)], [(0, 3), (1, 4)], [(1, 2), (0, 1), (2, 4)]], ids=str)
@pytest.mark.parametrize("config", DEEP)
def test_a_merge_has_the_layers_of_its_slices_and_a_config_that_lists_them(
    config: str, spans: list[tuple[int, int]], tmp_path: Path
) -> None:
    """mergekit knows the key of the depth for few architectures, and lists by layer (``layer_types``) for none."""
    layers = [layer for span in spans for layer in range(*span)]
    models = models_of(getattr(transformers, config)(**SIZE, **DEEP[config]), tmp_path, targets=1)
    check, _ = both(sliced(models, *spans), tmp_path / "out")
    assert check.exit_code == 0, check.output
    merged, faults = loaded(tmp_path / "out")
    target, _ = loaded(models.targets[0])
    assert faults == {}
    assert merged.config.num_hidden_layers == len(layers)
    for name in BY_LAYER:
        if (own := getattr(target.config, name, None)) is not None:
            assert getattr(merged.config, name) == [own[layer] for layer in layers]
    own_state = target.state_dict()
    for name, tensor in merged.state_dict().items():  # of one target the merge is that target
        parts = name.split(".")
        parts = [str(layers[int(part)]) if part.isdigit() else part for part in parts]
        assert torch.equal(tensor, own_state[".".join(parts)]), name


@pytest.mark.slow
def test_layers_that_the_config_cannot_describe_are_refused(tmp_path: Path) -> None:
    """Every other layer of this model has experts, by number; in the slices two such layers are neighbours."""
    config = transformers.Llama4TextConfig(**SIZE, **MOE, intermediate_size_mlp=24, moe_layers=[1, 3])
    models = models_of(config, tmp_path)
    expected = (
        "layers.5.feed_forward.experts.down_proj",
        "transformers would drop them",
        "they would get random values",
    )
    refused(sliced(models, (0, 3), (1, 4)), tmp_path / "out", *expected, line=4)


@pytest.mark.slow
def test_a_vocabulary_that_the_config_does_not_have_is_refused(mistral: Family, tmp_path: Path) -> None:
    wide = tiny_models.save_family(tmp_path / "wide", "mistral", vocab_size=tiny_models.VOCABULARY + 2)
    text = runs.recipe(Family(wide.pivot, (wide.targets[0], mistral.targets[0])))
    out, flag = tmp_path / "out", "--unsafe-truncate-embeddings"
    check, merge = both(text, out, flag)
    for result in (check, merge):
        assert result.exit_code == 1
        assert (
            f"`lm_head.weight` of the merge would have the shape [{tiny_models.VOCABULARY}, 16]" in result.output
        )
    check, _ = both(runs.recipe(Family(mistral.pivot, (mistral.targets[0], wide.targets[0]))), out, flag)
    assert check.exit_code == 0
    assert loaded(out)[1] == {}


@pytest.mark.slow
def test_a_tokenizer_that_leaves_a_tensor_behind_is_refused(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["bart"]()
    models = models_of(config, tmp_path, cls=transformers.AutoModelForSeq2SeqLM)
    for path in (models.pivot, *models.targets):
        tiny_models.train_tokenizer(path, "the cat sat on the mat")
    text = runs.recipe(models, "tokenizer: {source: union, tokens: {new: {source: {kind: zero}}}}")
    refused(text, tmp_path / "out", "`final_logits_bias` of the merge would have the shape", line=7)
    text = runs.recipe(models, "tokenizer: {source: union, tokens: {new: {}}}")
    refused(text, tmp_path / "out", "a token under `tokenizer: tokens` that no model has needs a `source`")


# By names


def by_name(models: Family, out: Path, *lines: str) -> tuple[Result, Result]:
    """``check --by-name`` and the merge, which agree."""
    recipe = out.parent / "by_name.yaml"
    recipe.write_text(runs.recipe(models, *lines))
    check = CliRunner().invoke(main, ["check", "--by-name", str(recipe), "--out", str(out)])
    merge = CliRunner().invoke(main, ["yaml", "--by-name", str(recipe), str(out), "--quiet"])
    assert check.exit_code == merge.exit_code, check.output + merge.output
    assert out.exists() == (merge.exit_code == 0)
    return check, merge


def tied(target: Path) -> None:
    tiny_models.edit(target, lambda tensors: tensors.pop("lm_head.weight"))
    rewrite(target, tie_word_embeddings=True)


def packed(target: Path) -> None:
    state = loaded(target)[0].state_dict()
    tiny_models.edit(
        target, lambda tensors: (tensors.clear(), tensors.update({n: t.clone() for n, t in state.items()}))
    )


def renamed(target: Path) -> None:
    tiny_models.edit(target, lambda ts: [ts.update({f"base.{name}": ts.pop(name)}) for name in [*ts]])


def rewrite(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("architecture", "change", "expected"),
    [
        ("mixtral", packed, "and in their place `model.layers.*.mlp.experts."),
        ("mistral", tied, "has no `lm_head.weight` of"),
        ("mistral", renamed, "a merge by names needs one layout"),
    ],
)
def test_by_names_a_target_of_another_layout_is_refused(
    architecture: str,
    change: Callable[[Path], None],
    expected: str,
    family: Callable[..., Family],
    tmp_path: Path,
) -> None:
    """Its tensors would be left out, and the merge be the pivot there."""
    models = family(architecture)
    target = shutil.copytree(models.targets[0], tmp_path / "target")
    change(target)
    for result in by_name(Family(models.pivot, (target, models.targets[1])), tmp_path / "out"):
        assert result.exit_code == 1
        assert expected in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_counters_keep_their_dtype_and_are_the_pivots(dtype: str, tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    models = models_of(config, tmp_path, cls=transformers.AutoModelForImageClassification)
    for number, path in enumerate((models.pivot, *models.targets)):
        counted = 100001 + number  # no number of either dtype
        tiny_models.edit(
            path, lambda ts, n=counted: [t.fill_(n) for name, t in ts.items() if name.endswith("tracked")]
        )
    _, merge = by_name(models, tmp_path / "out", f"dtype: {dtype}")
    assert merge.exit_code == 0, merge.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    counters = {name: tensor for name, tensor in written.items() if name.endswith("tracked")}
    assert counters
    assert all(tensor.dtype == torch.int64 and tensor.item() == 100001 for tensor in counters.values())


@pytest.mark.slow
def test_mergekit_pytorch_is_not_named_where_experts_are_packed(tmp_path: Path) -> None:
    """It knows no config, and so not which rows of the pack are of the gate."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    models = models_of(transformers.Qwen3MoeConfig(**SIZE, **experts, attention_bias=True), tmp_path)
    for path in (models.pivot, *models.targets):
        packed(path)
    check, _ = both(runs.recipe(models), tmp_path / "out")
    assert check.exit_code == 1
    assert "varm-merge yaml --by-name" in check.output
    assert "mergekit-pytorch" not in check.output


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


@pytest.mark.slow
@pytest.mark.parametrize("expected", [True, False], ids=["in the config", "not in the config"])
@pytest.mark.parametrize("method", CODES)
@pytest.mark.parametrize("which", ["all", "one"])
def test_codes_are_not_merged_as_weights(
    which: str, method: str, expected: bool, mistral: Family, tmp_path: Path
) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths if which == "all" else paths[-1:]:
        tiny_models.edit(path, CODES[method])
        config = json.loads((path / "config.json").read_text())
        extra = {"quantization_config": {"quant_method": method}} if expected else {}
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


def test_float64_is_no_code_and_whole_numbers_are_no_weights(mistral: Family, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    models, out = Family(paths[0], tuple(paths[1:])), tmp_path / "out"
    for path in paths:
        tiny_models.edit(path, lambda ts: ts.update({name: tensor.double() for name, tensor in ts.items()}))
    check, _ = both(runs.recipe(models), out)
    assert check.exit_code == 0, check.output
    runs.assert_merges(runs.read(out), models, runs.MATRIX)
    for dtype, expected in (
        (torch.int64, "has whole numbers (I64) as weights: `model.norm.weight`"),
        (torch.int16, "is quantised: `model.norm.weight`"),
        (torch.float8_e4m3fnuz, "is quantised: `model.norm.weight`"),
    ):
        tensors = runs.read_tensors(mistral.targets[0])
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        shutil.rmtree(paths[1])
        shutil.copytree(mistral.targets[0], paths[1]).joinpath("model.safetensors").unlink()
        torch.save(tensors, paths[1] / "pytorch_model.bin")
        refused(runs.recipe(models), tmp_path / "none", expected, line=5)


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


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_no_file_of_an_input_lies_in_the_output(name: str, mistral: Family, tmp_path: Path) -> None:
    target, out = shutil.copytree(mistral.targets[0], tmp_path / "target"), tmp_path / "out"
    out.mkdir()
    (target / "model.safetensors").rename(out / name)
    (target / "model.safetensors").symlink_to(out / name)
    before = tree(tmp_path)
    refused(runs.recipe(Family(mistral.pivot, (target,))), out, "links to a file in", line=5)
    (tmp_path / "recipe.yaml").unlink()
    assert tree(tmp_path) == before


def test_what_the_output_links_to_is_not_written(mistral: Family, tmp_path: Path) -> None:
    pivot, out = shutil.copytree(mistral.pivot, tmp_path / "pivot"), tmp_path / "out"
    before = tree(pivot)
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).symlink_to(pivot / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(Family(pivot, mistral.targets), "dtype: bfloat16"))
    assert CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), "--quiet"]).exit_code == 0
    assert tree(pivot) == before
    assert loaded(out)[1] == {}


def test_an_adapter_in_the_output_is_not_left_to_be_loaded(mistral: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny_models.save_adapter(mistral.pivot, out, 1)
    before = tree(out)
    refused(runs.recipe(mistral), out, "transformers would load that adapter with the merge")
    assert tree(out) == before


@pytest.mark.slow
def test_code_of_the_base_models_own_is_copied(mistral: Family, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths:
        (path / "names.py").write_text("NAME = 'my_mistral'\n")
        (path / "configuration_my.py").write_text(
            "from transformers import MistralConfig\nfrom .names import NAME\n"
            "class MyConfig(MistralConfig):\n    model_type = NAME\n"
        )
        (path / "modeling_my.py").write_text(
            "from transformers import MistralForCausalLM\nfrom .configuration_my import MyConfig\n"
            "class MyForCausalLM(MistralForCausalLM):\n    config_class = MyConfig\n"
        )
        named = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
        rewrite(path, architectures=["MyForCausalLM"], model_type="my_mistral", auto_map=named)
    check, _ = both(runs.recipe(Family(paths[0], tuple(paths[1:]))), tmp_path / "out", "--trust-remote-code")
    assert check.exit_code == 0, check.output
    for path in paths:
        shutil.rmtree(path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(merged).__name__ == "MyForCausalLM"


def test_a_relative_folder_is_no_model_of_the_hub(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit would ask the Hub for `models/pivot`, to link it in the card."""
    paths = [shutil.copytree(path, tmp_path / "models" / path.name) for path in (mistral.pivot, *mistral.targets)]
    monkeypatch.chdir(tmp_path)
    names = [path.relative_to(tmp_path) for path in paths]
    check, merge = both(runs.recipe(Family(names[0], tuple(names[1:]))), tmp_path / "out")
    assert check.exit_code == 0, merge.output
    assert "https://huggingface.co/models/" not in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def big_recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A merge of some seconds, in many shards."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    models = tiny_models.save_family(tmp_path_factory.mktemp("big"), "mistral", **wide)
    return runs.recipe(models, granularity="layer")


MERGES = """
import json, os, signal, sys
import torch, transformers
from mergekit.scripts.run_yaml import main
for line in sys.stdin:
    if (merge := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background shell
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
        main(json.loads(line))
    print(merge, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(merge, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def merges() -> Iterator[subprocess.Popen[str]]:
    """mergekit-yaml as processes that begin at once: forks of one that has imported everything."""
    with subprocess.Popen(
        [sys.executable, "-c", MERGES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield server
        assert server.stdin
        server.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["new folder", "folder with files"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda one: one.name)
def test_a_stopped_merge_leaves_what_was_there(
    number: signal.Signals, before: bool, big_recipe: str, merges: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "deep" / "er" / "out"
    recipe.write_text(big_recipe)
    if before:
        out.mkdir(parents=True)
        for name in ("model.safetensors", "notes.txt", "varm_weights.json"):
            (out / name).write_text("mine")
    kept = tree(tmp_path)
    assert merges.stdin
    assert merges.stdout
    print(
        json.dumps([str(recipe), str(out), "--quiet", "--out-shard-size", "100K"]), file=merges.stdin, flush=True
    )
    process = int(merges.stdout.readline())
    wait_for(lambda: any(out.glob(".*/*/model-2.safetensors")), process)
    os.kill(process, number)
    assert int(merges.stdout.readline()) != 0
    assert tree(tmp_path) == kept
    assert (tmp_path / "deep").exists() == before


# Numbers


@pytest.mark.slow
def test_a_result_beyond_its_dtype_names_tensor_and_line(mistral: Family, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths:
        tiny_models.edit(path, lambda tensors: tensors[UP].view(-1)[:1].fill_(1e5))
    family, recipe = Family(paths[0], tuple(paths[1:])), tmp_path / "recipe.yaml"
    for lines, expected in (
        (["dtype: float32", "out_dtype: float16"], f"line 8: the merged tensor `{UP}` has values beyond 65504"),
        (["out_dtype: float16"], f"line 7: the merged tensor `{UP}` has values beyond 65504"),
        (["dtype: float16"], "has values up to 100000, which do not fit into `dtype: float16`"),
    ):
        for granularity in ("layer", "matrix", "parameter"):
            recipe.write_text(runs.recipe(family, *lines, granularity=granularity))
            merge = CliRunner().invoke(mergekit_yaml, [str(recipe), str(tmp_path / "out"), "--quiet"])
            assert (merge.exit_code, expected in merge.output) == (1, True), merge.output
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
    refused(recipe, tmp_path / "out", "the byte 0xfc is not UTF-8", line=2)
    assert CliRunner().invoke(main, ["inspect", str(recipe)]).exit_code == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no recipe"),
        ("- a\n- b\n", "no recipe"),
        ("merge_method: VaRM\nbase_model: a\n", "mergekit knows no method `VaRM`; did you mean `varm`?"),
        ("merge_method: [varm]\n", "mergekit knows no method `['varm']`"),
        ("merge_method: !!binary dmFybQ==\n", "did you mean `varm`?"),
        ("merge_method: !x varm\n", "not valid YAML"),
    ],
)
def test_what_is_nearly_a_recipe_is_a_sentence(text: str, expected: str, tmp_path: Path) -> None:
    refused(text, tmp_path / "out", expected, line=1)


def test_a_source_needs_a_layer_range(mistral: Family, tmp_path: Path) -> None:
    text = re.sub(r"    layer_range:\n(    - \d\n)+", "", sliced(mistral, (0, 2)))
    assert "layer_range" not in text
    refused(text, tmp_path / "out", "no `layer_range` in `slices.0.sources.0`")


def test_a_model_of_another_architecture_by_name_only_is_refused(mistral: Family, tmp_path: Path) -> None:
    text = runs.recipe(mistral).replace(
        f"  - model: {mistral.targets[1]}",
        f"  - model: {{model: {{path: {mistral.targets[1]}}}, override_architecture: LlamaForCausalLM}}",
    )
    refused(text, tmp_path / "out", f"{mistral.targets[1]} is a LlamaForCausalLM", "--allow-crimes", line=6)
    refused(text, mistral.targets[1] / "out", "the merge would be written to", line=6)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("lines", [[], ["tokenizer: {source: base}"]], ids=["copied", "made"])
def test_a_chat_template_is_one_and_arrives(lines: list[str], mistral: Family, tmp_path: Path) -> None:
    pivot, out = shutil.copytree(mistral.pivot, tmp_path / "pivot"), tmp_path / "out"
    models = Family(pivot, mistral.targets)
    for template, expected in (
        ("nonsense", "`chat_template` is `nonsense`, neither Jinja nor one of auto, alpaca"),
        ("/no/such/file.jinja", "neither Jinja nor one of"),
        ("{% for m in messages %}{{ m.content", "`chat_template` is not valid Jinja: "),
    ):
        tiny_models.train_tokenizer(pivot, "the cat sat on the mat")
        refused(runs.recipe(models, f"chat_template: {json.dumps(template)}", *lines), out, expected, line=7)
    for template, written in (("chatml", "<|im_start|>"), (TEMPLATE, TEMPLATE)):
        both(runs.recipe(models, f"chat_template: {json.dumps(template)}", *lines), out)
        assert written in str(transformers.AutoTokenizer.from_pretrained(out).chat_template)


def test_a_chat_template_needs_a_tokenizer(mistral: Family, tmp_path: Path) -> None:
    refused(runs.recipe(mistral, "chat_template: chatml"), tmp_path / "out", "there is no tokenizer", line=7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": None}, "names no `architectures`"),
        ({"architectures": []}, "names no `architectures`"),
        ({"architectures": ["MistralForCausalLM", "MistralModel"]}, "names 2 `architectures`"),
        ({"model_type": "mistral_of_mine"}, "mistral_of_mine"),
    ],
)
def test_a_config_that_mergekit_cannot_plan_from_is_a_sentence(
    change: dict[str, Any], expected: str, mistral: Family, tmp_path: Path
) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (mistral.pivot, *mistral.targets)]
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **change}))
    refused(runs.recipe(Family(paths[0], tuple(paths[1:]))), tmp_path / "out", expected)


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


@pytest.mark.slow
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


def cut_off(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return edit


def prompt(adapter: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "names": (changed(lambda ts: [ts.update({f"x.{name}": ts.pop(name)}) for name in [*ts]]), "it lacks"),
    "one lacks": (changed(lambda ts: ts.pop(min(ts))), "it lacks"),
    "one more": (
        changed(lambda ts: ts.update({"base_model.model.x.lora_A.weight": torch.ones(1)})),
        "fit nothing",
    ),
    "width": (changed(lambda ts: ts.update({n: torch.ones(2, 32) for n in ts if "lora_A" in n})), "size mismatch"),
    "NaN": (changed(lambda ts: ts[min(ts)].fill_(torch.nan)), "NaN or Inf in its"),
    "empty": (changed(lambda ts: ts.clear()), "has no tensors"),
    "cut off": (cut_off, "is cut off or damaged"),
    "config": (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "adapter_config.json of the"),
    "kind": (prompt, "is a PROMPT_TUNING adapter, which cannot be merged into weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", UNFIT)
def test_an_adapter_that_does_not_fit_is_reported_before_the_merge(
    fault: str, mistral: Family, tmp_path: Path
) -> None:
    adapter = tiny_models.save_adapter(mistral.pivot, tmp_path / "lora", 1)
    UNFIT[fault][0](adapter)
    text = runs.recipe(Family(mistral.pivot, (Path(f"{mistral.pivot}+{adapter}"), mistral.targets[0])))
    check, merge = both(text, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    for result in (check, merge):
        assert result.exit_code == 1
        assert f"line 5: {'the adapter' if fault not in ('kind', 'config') else ''}" in result.output
        assert UNFIT[fault][1] in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "base"])
def test_a_kept_merge_of_an_adapter_is_of_that_adapter_and_base(
    what: str, mistral: Family, tmp_path: Path
) -> None:
    base = shutil.copytree(mistral.targets[1], tmp_path / "base")
    adapter = tiny_models.save_adapter(base, tmp_path / "lora", 1)
    text = runs.recipe(Family(mistral.pivot, (Path(f"{base}+{adapter}"),)))
    flags = ("--lora-merge-cache", str(tmp_path / "cache"))
    for out in ("one", "again"):
        check, _ = both(text, tmp_path / out, *flags)
        assert check.exit_code == 0, check.output
    if what == "adapter":
        changed(lambda ts: [tensor.mul_(5) for tensor in ts.values()])(adapter)
    else:
        tiny_models.edit(base, lambda ts: [tensor.mul_(2) for tensor in ts.values()])
    check, _ = both(text, tmp_path / "stale", *flags)
    assert "was made from another version of it: remove that folder" in check.output
    (kept,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(kept)
    check, _ = both(text, tmp_path / "new", *flags)
    assert check.exit_code == 0
    written = load_file(tmp_path / "new" / "model.safetensors")[UP]
    assert torch.equal(written, load_file(kept / "model.safetensors")[UP])
    (kept / "varm_adapter.json").unlink()
    check, _ = both(text, tmp_path / "unknown", *flags)
    assert "does not record its parents" in check.output


@pytest.mark.slow
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


@pytest.mark.slow
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
