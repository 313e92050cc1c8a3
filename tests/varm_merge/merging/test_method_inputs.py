"""What ``varm`` takes from Python and what it refuses, and with which words."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from mergekit.merge_methods import PerGroupValues, merge_state_dicts, merge_tensors
from state_dicts import FLOATS, GRANULARITIES, HIGH, LOW, TENSORS, UNIT_OF, all_bits, apart, family, merge
from torch import Tensor, nn

from varm_common.errors import UserError
from varm_merge.merging.weights import Granularity

DAMAGED = "model.layers.0.mlp.experts.gate_up_proj"


def double(model: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in model.items()}


@pytest.mark.parametrize("granularity", ["matrix", "parameter"])
def test_merge_tensors_merges_one_tensor(granularity: Granularity) -> None:
    models = [torch.zeros(2), torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])]
    merged = merge_tensors(models, "varm", base_index=0, parameters={"granularity": granularity})
    expected = torch.tensor([2.7, 0.1]) if granularity == "matrix" else torch.tensor([3.0, 1.0])
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("granularity", ["model", "layer", "module"])
def test_merge_tensors_cannot_know_a_unit_of_many_tensors_and_says_what_can(granularity: Granularity) -> None:
    models = [torch.zeros(2), torch.ones(2)]
    with pytest.raises(UserError, match=f"`{granularity}`.*only `{LOW}`.*merge_state_dicts"):
        merge_tensors(models, "varm", base_index=0, name=LOW, parameters={"granularity": granularity})
    with pytest.raises(UserError, match=r"a tensor without a name.*merge_state_dicts"):
        merge_tensors(models, "varm", base_index=0, parameters={"granularity": granularity})


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"granularty": "layer"}, TypeError),
        ({"granularity": "tensor"}, ValueError),
        ({"statistic": "cube"}, ValueError),
        ({"normalization": "none"}, ValueError),
        ({"temperature": 0}, ValueError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"select_topk": 0}, ValueError),
        ({"select_topk": 1.01}, ValueError),
        ({"erase_minority": "sometimes"}, ValueError),
    ],
)
def test_unknown_parameters_and_values_out_of_range_are_refused(
    parameters: dict[str, Any], error: type[Exception]
) -> None:
    (option,) = parameters
    with pytest.raises(error) as refusal:
        merge(family(2), **parameters)
    assert error is ValueError or option in str(refusal.value)


def test_a_merge_without_a_pivot_is_refused() -> None:
    with pytest.raises(UserError, match="needs a base_model"):
        merge_state_dicts(family(2), "varm")


def test_a_pivot_without_targets_is_refused() -> None:
    with pytest.raises(UserError, match="at least one target"):
        merge(family(2)[:1])


@pytest.mark.parametrize("option", ["statistic", "normalization", "temperature"])
def test_two_values_of_a_setting_in_one_unit_are_refused_and_both_tensors_named(option: str) -> None:
    first, second = {"statistic": ("square", "abs"), "normalization": ("sum", "softmax")}.get(option, (1.0, 2.0))
    models = [{LOW: torch.zeros(2), HIGH: torch.zeros(2)}, {LOW: torch.ones(2), HIGH: torch.ones(2)}]
    contradiction = {option: PerGroupValues([first, second])}
    with pytest.raises(UserError, match=f"`{option}`: {first} for {LOW}, {second} for {HIGH}"):
        merge(models, granularity="module", **contradiction)
    merge(models, granularity="matrix", **contradiction)


def test_each_tensor_may_have_a_granularity_of_its_own() -> None:
    chosen = dict(zip(TENSORS, ["module"] * 4 + ["matrix"] * 2 + ["layer"] * 4, strict=True))
    models = family(2)
    merged = merge(models, granularity=PerGroupValues(list(chosen.values())))
    pivot, *targets = map(double, models)
    expected, _ = oracle.merge(pivot, targets, lambda name: f"{chosen[name]} {UNIT_OF[chosen[name]](name)}")
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("model", [0, 1, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_and_inf_are_errors_that_name_model_and_tensor(
    granularity: Granularity, model: int, damage: float
) -> None:
    models = family(3, torch.float16)
    models[model][DAMAGED][1, 2, 3] = damage
    culprit = "the pivot pivot" if model == 0 else f"target target_{model}"
    kind = "NaN" if math.isnan(damage) else "Inf"
    for options in ({}, {"select_topk": 0.3, "erase_minority": True}):
        with pytest.raises(UserError, match=f"{kind} in tensor `{DAMAGED}` of {culprit}"):
            merge(models, granularity=granularity, **options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_bfloat16_pivot_and_float32_targets_merge_in_float32_without_rounding_a_delta(
    granularity: Granularity,
) -> None:
    pivot, *targets = family(2, torch.float32)
    models = [{name: tensor.bfloat16() for name, tensor in pivot.items()}, *targets]
    merged = merge(models, granularity=granularity)
    others = merge(models, "task_arithmetic", weight=1.0)
    assert {name: tensor.dtype for name, tensor in merged.items()} == dict.fromkeys(others, torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in others.values())
    pivot_alone, *alone = (double(apart(model)) for model in models)
    expected, _ = oracle.merge(pivot_alone, alone, UNIT_OF[granularity])
    for name, tensor in apart(merged).items():
        torch.testing.assert_close(tensor, torch.from_numpy(np.asarray(expected[name])).float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dtype_rounds_the_inputs_and_out_dtype_the_result(granularity: Granularity) -> None:
    models = family(2, torch.float32)
    rounded = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in models]
    assert all_bits(merge(models, granularity=granularity, dtype=torch.bfloat16)) == all_bits(
        merge(rounded, granularity=granularity)
    )
    exact = merge(models, granularity=granularity, dtype=torch.float64)
    for out_dtype in FLOATS:
        expected = {name: tensor.to(out_dtype) for name, tensor in exact.items()}
        assert all_bits(merge(models, granularity=granularity, out_dtype=out_dtype)) == all_bits(expected)


@pytest.mark.parametrize("options", [{}, {"select_topk": 0.5, "erase_minority": True}])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty_tensors_stay_empty(granularity: Granularity, options: dict[str, Any]) -> None:
    models = [{LOW: torch.empty(0, 4), HIGH: torch.full((2, 2), float(k))} for k in range(3)]
    merged = merge(models, granularity=granularity, **options)
    assert merged[LOW].shape == (0, 4)
    assert merged[HIGH].isfinite().all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strided_inputs_merge_like_contiguous_ones_and_none_is_written_to(granularity: Granularity) -> None:
    models = family(2)
    strided = [
        {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in model.items()} for model in models
    ]
    merged = merge(strided, granularity=granularity, erase_minority=True)
    assert all_bits(merged) == all_bits(merge(models, granularity=granularity, erase_minority=True))
    assert [all_bits(model) for model in strided] == [all_bits(model) for model in family(2)]
    assert all(tensor.is_contiguous() for tensor in merged.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_modules_whose_parameters_require_grad_are_merged_outside_autograd(granularity: Granularity) -> None:
    modules = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)) for _ in range(3)]
    merged = merge(modules, granularity=granularity)
    detached = [{name: tensor.detach() for name, tensor in module.state_dict().items()} for module in modules]
    assert all_bits(merged) == all_bits(merge(detached, granularity=granularity))
    assert not any(tensor.requires_grad for tensor in merged.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_integer_buffers_are_copied_and_belong_to_no_unit(granularity: Granularity) -> None:
    models, ids = family(2), torch.arange(5)
    merged = merge([{"model.layers.0.mlp.ids": ids, **model} for model in models], granularity=granularity)
    assert torch.equal(merged.pop("model.layers.0.mlp.ids"), ids)
    assert all_bits(merged) == all_bits(merge(models, granularity=granularity))
