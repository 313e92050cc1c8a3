"""``lambda``, the scale of the merged task vector, and ``weight``, the prior of each target."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import runs
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from state_dicts import GRANULARITIES, HIGH, LOW, UNIT_OF, all_bits, apart, family, merge
from tiny_models import Family

from varm_common.errors import UserError
from varm_merge.merging.weights import Granularity, Normalization, normalize
from varm_merge.recipes.check import check
from varm_merge.recipes.problems import Looked

property_test = settings(max_examples=60, deadline=None, derandomize=True)
SCE = {"select_topk": 0.4, "erase_minority": True}
PRIORS = [2.0, 0.25, 0.0]


@pytest.mark.parametrize("steps", [{}, SCE], ids=["varm", "sce"])
@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("scale", [-0.5, 1.7])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scaled_and_weighted_merges_are_those_of_the_formula(
    granularity: Granularity, scale: float, normalization: str, steps: dict[str, Any]
) -> None:
    models = family()
    merged = merge(
        models, granularity=granularity, normalization=normalization, weight=PRIORS, **{"lambda": scale}, **steps
    )
    pivot, *targets = [{name: tensor.numpy() for name, tensor in apart(model).items()} for model in models]
    ways = {"normalization": normalization, "priors": PRIORS, "scale": scale, **steps}
    expected, _ = oracle.merge(pivot, targets, UNIT_OF[granularity], **ways)
    for name, tensor in apart(merged).items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-13, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("steps", [{}, {"select_topk": 0.4}, SCE], ids=["varm", "select", "sce"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_scale_of_0_gives_the_pivot_and_1_the_merge_to_the_bit(
    granularity: Granularity, steps: dict[str, Any]
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        models = family(3, dtype)
        plain = merge(models, granularity=granularity, **steps)
        assert all_bits(merge(models, granularity=granularity, **{"lambda": 0.0}, **steps)) == all_bits(models[0])
        for same in ({"lambda": 1.0}, {"weight": 1.0}, {"weight": [3.7] * 3}):
            assert all_bits(merge(models, granularity=granularity, **same, **steps)) == all_bits(plain)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_target_of_weight_0_is_left_out_and_a_unit_without_another_keeps_the_pivot(
    granularity: Granularity,
) -> None:
    pivot, one, other, third = family(3)
    merged = merge([pivot, one, other, third], granularity=granularity, weight=[1, 0, 0.5])
    without = merge([pivot, one, third], granularity=granularity, weight=[2, 1])
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, without[name], rtol=1e-14, atol=1e-15)
    for steps in ({}, SCE):
        kept = merge([pivot, one, other, third], granularity=granularity, weight=0, **steps)
        assert all_bits(kept) == all_bits(pivot)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_where_only_a_target_of_weight_0_moved_the_pivot_is_kept(granularity: Granularity) -> None:
    pivot, moved = family(1)
    merged = merge([pivot, pivot, moved, pivot], granularity=granularity, weight=[0, 0, 1])
    assert all_bits(merged) == all_bits(pivot)


@property_test
@given(
    st.lists(st.tuples(st.just(0.0) | st.floats(1e-30, 1e30), st.just(0.0) | st.floats(1e-6, 1e6)), min_size=1),
    st.sampled_from(["sum", "softmax"]),
    st.floats(1e-12, 1e12),
)
def test_weights_do_not_depend_on_the_scale_of_the_priors(
    targets: list[tuple[float, float]], normalization: Normalization, factor: float
) -> None:
    statistics, priors = map(list, zip(*targets, strict=True))
    weights = normalize(statistics, normalization, 1.0, priors)
    expected = oracle.normalize(np.array(statistics), normalization, 1.0, priors)
    assert weights == pytest.approx(expected, rel=1e-9, abs=1e-300)
    scaled = normalize(statistics, normalization, 1.0, [prior * factor for prior in priors])
    assert scaled == pytest.approx(weights, rel=1e-9, abs=1e-300)


# Runs of mergekit


def with_weights(family: Family, weights: list[Any], **parameters: Any) -> str:
    """A recipe with the weight of each target."""
    content = yaml.safe_load(runs.recipe(family, **parameters))
    for model, weight in zip(content["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    return json.dumps(content)


@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_mergekit_passes_both_to_the_units(granularity: Granularity, mistral: Family, tmp_path: Path) -> None:
    unit_of = {"model": runs.whole_model, "layer": runs.LAYER, "matrix": runs.MATRIX}[granularity]
    text = with_weights(mistral, [3, 0.5], granularity=granularity, **{"lambda": 1.3})
    merged = runs.merge(text, tmp_path)
    runs.assert_merges(merged, mistral, unit_of, priors=[3, 0.5], scale=1.3)
    for unit in merged.log["units"]:
        assert unit["lambda"] == [1.3] * len(unit["tensors"])
        assert [target["prior"] for target in unit["targets"].values()] == [3, 0.5]


def test_lambda_takes_filters_and_gradients_within_a_unit(mistral: Family, tmp_path: Path) -> None:
    one = [{"filter": "mlp", "value": [0.5, 1.5]}, {"filter": "self_attn", "value": 0}, {"value": 1}]
    merged = runs.merge(runs.recipe(mistral, granularity="layer", **{"lambda": one}), tmp_path)
    pivot, *targets = (runs.checkpoint(folder) for folder in (mistral.pivot, *mistral.targets))
    plain, _ = oracle.merge(pivot, targets, runs.LAYER)
    scales = {"layers.0.mlp": 0.5, "layers.1.mlp": 1.5, "self_attn": 0.0}
    for name, values in plain.items():
        scale = next((value for part, value in scales.items() if part in name), 1.0)
        runs.assert_rounded(merged.tensors[name], pivot[name] + scale * (values - pivot[name]), name)
    layer = merged.units()["model.layers.1"]
    by_tensor = dict(zip(layer["tensors"], layer["lambda"], strict=True))
    assert by_tensor["model.layers.1.mlp.up_proj.weight"] == 1.5
    assert by_tensor["model.layers.1.input_layernorm.weight"] == 1


def test_a_weight_of_a_unit_is_one_number_for_each_target(mistral: Family, tmp_path: Path) -> None:
    by_depth = with_weights(mistral, [[1, 2], 1], granularity="layer")
    merged = runs.merge(by_depth, tmp_path / "by depth")
    first = merged.units()["model.layers.1"]["targets"][str(mistral.targets[0])]
    assert first["prior"] == 2
    assert "prior" not in merged.units()["model.layers.0"]["targets"][str(mistral.targets[0])]
    for granularity, weights in (("model", [[1, 2], 1]), ("layer", [[{"filter": "mlp", "value": 2}], 1])):
        text = with_weights(mistral, weights, granularity=granularity)
        (problem,) = check(text, looked=Looked())
        assert f"cannot have two values of `weight` of {mistral.targets[0]}" in problem.message
        with pytest.raises(UserError, match="finer granularity"):
            runs.merge(text, tmp_path / "refused")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weight": -1}, "`weight` is `-1`, not greater than or equal to 0"),
        ({"weight": ".inf"}, "`weight` is `.inf`"),
        ({"weight": [{"filter": "feed_forward", "value": 2}]}, "`feed_forward` that matches no tensor"),
        ({"lambda": 2}, "`lambda` is a parameter of the whole merge"),
        ({"wieght": 2}, "did you mean `weight`?"),
    ],
)
def test_a_setting_of_a_target_that_cannot_be_used_is_a_problem(
    setting: dict[str, Any], message: str, mistral: Family
) -> None:
    content = yaml.safe_load(runs.recipe(mistral))
    content["models"][0]["parameters"] = setting
    (problem,) = check(yaml.safe_dump(content), looked=Looked())
    assert message in problem.message


def test_a_weight_of_the_pivot_is_remarked(mistral: Family) -> None:
    content = yaml.safe_load(runs.recipe(mistral, pivot_listed=True))
    content["models"][0]["parameters"] = {"weight": 2}
    looked = Looked()
    assert check(yaml.safe_dump(content, sort_keys=False), looked=looked) == []
    (remark,) = [remark for remark in looked.remarks if "weight" in remark.message]
    assert "is not used" in remark.message
    assert remark.line == yaml.safe_dump(content, sort_keys=False).splitlines().index("    weight: 2") + 1


def test_the_log_says_where_all_weights_are_0(mistral: Family, tmp_path: Path) -> None:
    frozen = [{"filter": "embed_tokens", "value": 0}, {"value": 1}]
    merged = runs.merge(runs.recipe(mistral, weight=frozen), tmp_path)
    unit = merged.units()["model.embed_tokens.weight"]
    assert unit["moved"]
    assert unit["note"] == "all weights are 0; the pivot is kept"
    pivot = runs.read_tensors(mistral.pivot)
    assert (merged.tensors["model.embed_tokens.weight"] == pivot["model.embed_tokens.weight"]).all()


def test_units_are_weighed_alike_however_a_target_is_spread(tmp_path: Path) -> None:
    """The prior multiplies the statistic of the whole unit, not those of its tensors."""
    pivot = {LOW: torch.zeros(1), HIGH: torch.zeros(99)}
    models = [pivot, {LOW: torch.ones(1), HIGH: torch.zeros(99)}, {LOW: torch.zeros(1), HIGH: torch.ones(99)}]
    merged = merge(models, granularity="module", weight=[99, 1])
    torch.testing.assert_close(merged[LOW], torch.full((1,), 0.5))
    torch.testing.assert_close(merged[HIGH], torch.full((99,), 0.5))
