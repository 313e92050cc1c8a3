"""A ``mergekit-yaml`` run with ``merge_method: varm`` writes what the paper's formula says, and only that."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import runs
import tiny_models
from tiny_models import Family

from varm_common.errors import UserError

LLAMA_BLOCK = r"model\.layers\.\d+"
BLOCKS = {
    "bart": r"model\.(encoder|decoder)\.layers\.\d+",
    "gemma": LLAMA_BLOCK,
    "gpt_neox": r"gpt_neox\.layers\.\d+",
    "llama": LLAMA_BLOCK,
    "mistral": LLAMA_BLOCK,
    "mixtral": LLAMA_BLOCK,
    "mpt": r"transformer\.blocks\.\d+",
    "qwen2": LLAMA_BLOCK,
    "t5": r"(encoder|decoder)\.block\.\d+",
}
ARCHITECTURES = [pytest.param(name, marks=[pytest.mark.slow] if name != "mistral" else []) for name in BLOCKS]
SUBMODULES = {"t5": r"\.layer\.\d+\.\w+"}
UNITS = {"model": runs.whole_model, "layer": runs.LAYER, "module": runs.MODULE, "matrix": runs.MATRIX}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["model", "layer", "module"])
def test_a_unit_is_the_model_or_a_block_or_a_module_of_a_block(
    architecture: str, granularity: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    block = BLOCKS[architecture]
    unit_of = {
        "model": runs.whole_model,
        "layer": runs.units_named(block),
        "module": runs.units_named(block + SUBMODULES.get(architecture, r"\.\w+")),
    }[granularity]
    # mergekit merges the experts of a Mixtral fused, as transformers 5 loads them
    read = runs.loaded if architecture == "mixtral" else runs.checkpoint
    merged = runs.merge(runs.recipe(family(architecture), granularity=granularity), tmp_path)
    runs.assert_merges(merged, family(architecture), unit_of, read)


@pytest.mark.parametrize("parameters", [{}, {"granularity": "matrix"}])
def test_a_unit_is_one_tensor_unless_the_recipe_says_otherwise(
    parameters: dict[str, str], mistral: Family, tmp_path: Path
) -> None:
    merged = runs.merge(runs.recipe(mistral, **parameters), tmp_path)
    runs.assert_merges(merged, mistral, runs.MATRIX)


def test_a_unit_is_one_element_at_parameter_granularity(mistral: Family, tmp_path: Path) -> None:
    merged = runs.merge(runs.recipe(mistral, granularity="parameter"), tmp_path)
    runs.assert_merges(merged, mistral, None)


@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
@pytest.mark.parametrize("targets", [1, 3])
def test_one_target_or_three(
    targets: int, granularity: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    merged = runs.merge(runs.recipe(family("mistral", targets), granularity=granularity), tmp_path)
    runs.assert_merges(merged, family("mistral", targets), UNITS[granularity])


def test_the_pivot_may_be_listed_among_the_models(mistral: Family, tmp_path: Path) -> None:
    listed = runs.merge(runs.recipe(mistral, granularity="layer", pivot_listed=True), tmp_path / "listed")
    left_out = runs.merge(runs.recipe(mistral, granularity="layer"), tmp_path / "left_out")
    runs.assert_same_tensors(listed, left_out)


@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_every_parameter_reaches_the_units(granularity: str, mistral: Family, tmp_path: Path) -> None:
    settings = {"statistic": "abs", "normalization": "softmax", "temperature": 0.5}
    sce_steps = {"select_topk": 0.3, "erase_minority": True}
    text = runs.recipe(mistral, granularity=granularity, **settings, **sce_steps)
    runs.assert_merges(runs.merge(text, tmp_path), mistral, UNITS[granularity], **settings, **sce_steps)


def test_filters_give_tensors_different_granularities(mistral: Family, tmp_path: Path) -> None:
    granularity = [
        {"filter": "mlp", "value": "module"},
        {"filter": "layers.1.self_attn", "value": "matrix"},
        {"filter": "embed_tokens", "value": "model"},
        {"filter": "lm_head", "value": "model"},
        {"value": "layer"},
    ]

    def unit_of(tensor: str) -> str:
        if "mlp" in tensor:
            return runs.MODULE(tensor)
        if "layers.1.self_attn" in tensor:
            return tensor
        return "model" if "embed_tokens" in tensor or "lm_head" in tensor else runs.LAYER(tensor)

    merged = runs.merge(runs.recipe(mistral, granularity=granularity), tmp_path)
    runs.assert_merges(merged, mistral, unit_of)
    found = {name: unit["granularity"] for name, unit in merged.units().items()}
    assert found["model.layers.0"] == "layer"
    assert found["model.layers.0.mlp"] == "module"
    assert found["model.layers.1.self_attn.q_proj.weight"] == "matrix"
    assert found["model"] == "model"


@pytest.mark.parametrize("granularity", ["model", "layer", "matrix", "parameter"])
def test_a_tensor_that_keeps_the_pivot_is_copied_and_belongs_to_no_unit(
    granularity: str, mistral: Family, tmp_path: Path
) -> None:
    kept = ["embed_tokens", "layers.1.mlp"]
    keep = [*({"filter": part, "value": True} for part in kept), {"value": False}]
    merged = runs.merge(runs.recipe(mistral, granularity=granularity, keep_pivot=keep), tmp_path)
    pivot = runs.checkpoint(mistral.pivot)
    same = {name for name in pivot if any(part in name for part in kept)}
    assert 1 < len(same) < len(pivot)
    written = runs.arrays(merged.tensors)
    assert all(np.array_equal(written[name], pivot[name]) for name in same)

    def others(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if name not in same}

    targets = {target: others(runs.checkpoint(target)) for target in mistral.targets}
    rest = runs.Merged(merged.folder, others(merged.tensors), merged.log)
    runs.assert_oracle(rest, others(pivot), targets, None if granularity == "parameter" else UNITS[granularity])


def test_a_list_spreads_granularities_over_the_depth(mistral: Family, tmp_path: Path) -> None:
    merged = runs.merge(runs.recipe(mistral, granularity=["layer", "module"]), tmp_path)
    runs.assert_merges(
        merged, mistral, lambda tensor: (runs.MODULE if "layers.1." in tensor else runs.LAYER)(tensor)
    )


def test_a_filter_that_matches_no_tensor_is_refused(mistral: Family, tmp_path: Path) -> None:
    granularity = [{"filter": "feed_forward", "value": "layer"}, {"value": "matrix"}]
    with pytest.raises(UserError, match=r"`feed_forward` that matches no tensor.*model\.embed_tokens\.weight"):
        runs.merge(runs.recipe(mistral, granularity=granularity), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "one", "other"),
    [("statistic", "abs", "square"), ("normalization", "softmax", "sum"), ("temperature", 2.0, 1.0)],
)
def test_a_unit_with_two_ways_to_weigh_is_refused(
    option: str, one: object, other: object, mistral: Family, tmp_path: Path
) -> None:
    setting = {option: [{"filter": "up_proj", "value": one}, {"value": other}]}
    with pytest.raises(UserError, match=rf"(?s)unit `model\.layers\.0.*`{option}`.*{one}|{other}"):
        runs.merge(runs.recipe(mistral, granularity="module", **setting), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    runs.merge(runs.recipe(mistral, granularity="matrix", **setting), tmp_path / "out")


def slice_of(layers: dict[Path, int], *lines: str) -> str:
    """One output layer: from each model the layer that ``layers`` gives."""
    sources = [f"  - {{model: {model}, layer_range: [{at}, {at + 1}]}}" for model, at in layers.items()]
    return "\n".join(["- sources:", *sources, *lines]) + "\n"


def relayered(tensors: runs.Arrays, layers: list[int]) -> runs.Arrays:
    """``tensors`` of a model whose layer i is layer ``layers[i]``."""
    outside = {name: values for name, values in tensors.items() if "layers" not in name}
    moved = {
        name.replace(f"layers.{source}.", f"layers.{index}."): values
        for index, source in enumerate(layers)
        for name, values in tensors.items()
        if f"layers.{source}." in name
    }
    return outside | moved


@pytest.mark.parametrize("granularity", ["model", "layer", "module"])
def test_slices_are_measured_on_the_layers_they_merge(granularity: str, mistral: Family, tmp_path: Path) -> None:
    """Layers move to other indices, and a target may give another layer than the pivot does."""
    pivot, (one, other) = mistral.pivot, mistral.targets
    origins = {pivot: [1, 0, 1], one: [1, 0, 1], other: [0, 0, 1]}
    slices = [slice_of({model: layers[index] for model, layers in origins.items()}) for index in range(3)]
    head = f"merge_method: varm\nbase_model: {pivot}\nparameters: {{granularity: {granularity}}}\nslices:\n"
    merged = runs.merge(head + "".join(slices), tmp_path)
    inputs = {model: relayered(runs.checkpoint(model), layers) for model, layers in origins.items()}
    runs.assert_oracle(merged, inputs.pop(pivot), inputs, UNITS[granularity])


def test_a_slice_may_have_a_pivot_of_its_own(mistral: Family, tmp_path: Path) -> None:
    pivot, (one, other) = mistral.pivot, mistral.targets
    text = "merge_method: varm\nparameters: {granularity: layer}\nslices:\n" + "".join(
        slice_of({pivot: index, one: index, other: index}, f"  base_model: {base}")
        for index, base in enumerate([pivot, one])
    )
    merged = runs.merge(text, tmp_path)
    inputs = {model: runs.checkpoint(model) for model in (pivot, one, other)}
    after = ("model.layers.1.", "model.norm.", "lm_head.")  # merged with the last slice
    for base in (pivot, one):
        names = [name for name in inputs[pivot] if name.startswith(after) == (base == one)]
        targets = [model for model in inputs if model != base]
        expected, weights = oracle.merge(
            {name: inputs[base][name] for name in names}, [inputs[target] for target in targets], runs.LAYER
        )
        for name in names:
            runs.assert_rounded(merged.tensors[name], expected[name], name)
        for unit, weights_K in weights.items():
            assert list(merged.units()[unit]["targets"]) == [str(target) for target in targets]
            np.testing.assert_allclose(merged.weights(unit), weights_K, rtol=1e-9)
    assert merged.log["base_model"] is None  # there is no pivot of the whole merge


def test_modules_of_a_model_are_merged_each_by_its_own_parameters(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    checkpoints = family("t5")
    models = json.dumps([{"model": str(target)} for target in checkpoints.targets])
    text = f"""
merge_method: varm
base_model: {checkpoints.pivot}
modules:
  shared: {{models: {models}}}
  encoder: {{models: {models}, parameters: {{granularity: layer}}}}
  decoder: {{models: {models}, parameters: {{granularity: model}}}}
"""

    def unit_of(tensor: str) -> str:
        return "model" if tensor.startswith("decoder") else runs.units_named(r"encoder\.block\.\d+")(tensor)

    runs.assert_merges(runs.merge(text, tmp_path), checkpoints, unit_of)


@pytest.mark.parametrize("granularity", ["model", "matrix"])
def test_a_tensor_that_a_model_plans_twice_counts_once(granularity: str, tmp_path: Path) -> None:
    """mergekit lists the projector of Qwen2-VL once for each of its two layers, under the same names."""
    checkpoints = tiny_models.save_projectors(tmp_path)
    models = json.dumps([{"model": str(target)} for target in checkpoints.targets])
    text = f"""
merge_method: varm
base_model: {checkpoints.pivot}
parameters: {{granularity: {granularity}}}
modules: {{multi_modal_projector: {{models: {models}}}}}
"""
    runs.assert_merges(runs.merge(text, tmp_path / "out"), checkpoints, UNITS[granularity])
