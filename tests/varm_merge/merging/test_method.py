"""``varm`` through mergekit's own ``merge_state_dicts`` and ``merge_tensors``, on whole state dicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import TensorGroup
from state_dicts import FLOATS, GRANULARITIES, HIGH, LOW, UNIT_OF, StateDict, all_bits, apart, family, merge
from torch import Tensor

from varm_merge.merging.method import UNIT, Unit, VarmMethod
from varm_merge.merging.weight_log import WeightLog
from varm_merge.merging.weights import Granularity


def assert_merged_like_the_oracle(models: Sequence[StateDict], granularity: Granularity, **options: Any) -> None:
    merged = apart(merge(models, granularity=granularity, **options))
    pivot, *targets = [
        {name: tensor.double().numpy() for name, tensor in apart(model).items()} for model in models
    ]
    expected, _ = oracle.merge(pivot, targets, UNIT_OF[granularity], **options)
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        eps = 1e-13 if tensor.dtype == torch.float64 else torch.finfo(tensor.dtype).eps
        np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=eps, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("statistic", ["square", "abs"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_state_dict_merges_like_the_formula(
    granularity: Granularity, statistic: str, normalization: str
) -> None:
    options = {"statistic": statistic, "normalization": normalization, "temperature": 0.7}
    assert_merged_like_the_oracle(family(), granularity, **options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_keeps_the_pivot_is_the_pivot_to_the_bit_and_still_refuses_nan(granularity: Granularity) -> None:
    models = family()
    merged = merge(models, granularity=granularity, keep_pivot=True)
    assert all_bits(merged) == all_bits(models[0])
    next(iter(models[0].values())).reshape(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN in tensor .* of the pivot"):
        merge(models, granularity=granularity, keep_pivot=True)


@pytest.mark.slow
@pytest.mark.parametrize("erase_minority", [False, True])
@pytest.mark.parametrize("select_topk", [0.001, 0.35, 1.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sce_merges_like_the_formula(granularity: Granularity, select_topk: float, erase_minority: bool) -> None:
    sce = {"select_topk": select_topk, "erase_minority": erase_minority}
    assert_merged_like_the_oracle(family(), granularity, **sce)
    assert_merged_like_the_oracle(family(2), granularity, statistic="abs", normalization="softmax", **sce)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inputs_of_every_float_dtype_merge_like_the_formula(granularity: Granularity, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in merge(family(2, dtype), granularity=granularity).values()} == {dtype}
    assert_merged_like_the_oracle(family(2, dtype), granularity)
    assert_merged_like_the_oracle(family(2, dtype), granularity, select_topk=0.5, erase_minority=True)


@pytest.mark.parametrize("select_topk", [0.25, 1.0])
@pytest.mark.parametrize("targets", [2, 3])
def test_varm_with_both_steps_is_sce_where_the_threshold_of_sce_does_not_bite(
    targets: int, select_topk: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    models = [{"w": torch.randn(40, 25, generator=generator)} for _ in range(targets + 1)]
    sce = merge(models, "sce", select_topk=select_topk)["w"]
    ours = merge(models, select_topk=select_topk, erase_minority=True)["w"]
    torch.testing.assert_close(ours, sce, rtol=1e-5, atol=1e-5)


def test_light_fine_tunes_weigh_one_fifth_and_four_fifths_where_sce_turns_uniform() -> None:
    pivot, noise = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    models = [{"w": pivot}, {"w": pivot + 1e-4 * noise}, {"w": pivot + 2e-4 * noise}]
    moved = {method: float((merge(models, method)["w"] - pivot).std()) for method in ("varm", "sce")}
    assert moved["varm"] == pytest.approx((0.2 * 1 + 0.8 * 2) * 1e-4, rel=0.05)
    assert moved["sce"] == pytest.approx((0.5 * 1 + 0.5 * 2) * 1e-4, rel=0.05)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_scaling_every_delta_scales_the_merge_and_nothing_else(granularity: Granularity, scale: float) -> None:
    pivot, *targets = family(3, torch.float32)
    deltas = [{name: target[name] - pivot[name] for name in pivot} for target in targets]
    still = {name: torch.zeros_like(tensor) for name, tensor in pivot.items()}
    scaled = [{name: delta[name] * scale for name in pivot} for delta in deltas]
    for options in ({"normalization": "sum"}, {"normalization": "softmax"}, {"erase_minority": True}):
        ones = merge([still, *deltas], granularity=granularity, **options)
        others = merge([still, *scaled], granularity=granularity, **options)
        for name in pivot:
            torch.testing.assert_close(others[name] / scale, ones[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_order_of_the_targets_does_not_matter(granularity: Granularity) -> None:
    pivot, *targets = family(3)
    for options in ({}, {"statistic": "abs"}, {"select_topk": 0.4, "erase_minority": True}):
        merged = merge([pivot, *targets], granularity=granularity, **options)
        for order in ([2, 1, 0], [1, 2, 0]):
            permuted = merge([pivot, *(targets[k] for k in order)], granularity=granularity, **options)
            torch.testing.assert_close(permuted, merged, rtol=1e-12, atol=1e-14)


@st.composite
def small_models(draw: st.DrawFn, models: int) -> list[StateDict]:
    """Two tensors of one module, of any values that the dtype holds."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    largest = 2.0**15 if dtype == torch.float16 else 2.0**120
    values = st.floats(-largest, largest, width=16 if dtype == torch.float16 else 32) | st.sampled_from([0.0, 0.1])
    rows = draw(st.lists(st.tuples(*[values] * models), min_size=2, max_size=8))
    return [{LOW: tensor[:1], HIGH: tensor[1:]} for tensor in torch.tensor(rows, dtype=torch.float64).to(dtype).T]


property_test = settings(max_examples=40, deadline=None, derandomize=True)
granularities = st.sampled_from(GRANULARITIES)


@property_test
@given(st.integers(2, 5).flatmap(small_models), granularities, st.sampled_from(["sum", "softmax"]))
def test_every_element_lies_in_the_hull_of_its_targets(
    models: list[StateDict], granularity: Granularity, normalization: str
) -> None:
    merged = merge(models, granularity=granularity, normalization=normalization)
    for name, tensor in merged.items():
        targets = torch.stack([model[name] for model in models[1:]])
        assert ((targets.amin(0) <= tensor) & (tensor <= targets.amax(0))).all()


@property_test
@given(small_models(2), granularities, st.integers(1, 6), st.booleans())
def test_equal_targets_merge_to_that_target_to_the_bit(
    models: list[StateDict], granularity: Granularity, targets: int, erase_minority: bool
) -> None:
    pivot, target = ({name: tensor + 0.0 for name, tensor in model.items()} for model in models)  # no −0.0
    merged = merge([pivot, *[target] * targets], granularity=granularity, erase_minority=erase_minority)
    assert all_bits(merged) == all_bits(target)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_target_merges_to_itself_to_the_bit_and_into_memory_of_its_own(granularity: Granularity) -> None:
    pivot, target = family(1, torch.bfloat16)
    merged = merge([pivot, target], granularity=granularity)
    assert all_bits(merged) == all_bits(target)
    assert all_bits(merge([pivot, target], granularity=granularity, select_topk=0.1)) == all_bits(target)
    assert all(merged[name].data_ptr() != target[name].data_ptr() for name in target)


@pytest.mark.parametrize("options", [{}, {"select_topk": 0.5}, {"erase_minority": True}])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_unit_in_which_no_target_moved_keeps_the_pivot_to_the_bit(
    granularity: Granularity, options: dict[str, Any]
) -> None:
    pivot, *_ = family(1, torch.bfloat16)
    merged = merge([pivot] * 4, granularity=granularity, **options)
    assert all_bits(merged) == all_bits(pivot)


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix"])
def test_a_unit_in_which_no_target_moved_keeps_the_signs_of_its_zeros(granularity: Granularity) -> None:
    pivot = {LOW: torch.tensor([0.0, -0.0]), HIGH: torch.tensor([-0.0, 1.5])}
    assert all_bits(merge([pivot] * 4, granularity=granularity)) == all_bits(pivot)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_where_one_target_moved_and_another_did_not_the_result_is_the_one_that_moved(
    granularity: Granularity,
) -> None:
    pivot, target = family(1, torch.float32)
    merged = merge([pivot, pivot, target, pivot], granularity=granularity)
    assert all_bits(merged) == all_bits(target)


def test_a_unit_weighs_elements_alike_however_they_are_spread_over_tensors() -> None:
    pivot = {LOW: torch.zeros(1), HIGH: torch.zeros(99)}
    models = [pivot, {LOW: torch.ones(1), HIGH: torch.zeros(99)}, {LOW: torch.zeros(1), HIGH: torch.ones(99)}]
    merged = merge(models, granularity="module")  # the mean of per-tensor means would give 0.5 and 0.5
    torch.testing.assert_close(merged[LOW], torch.full((1,), 0.01))
    torch.testing.assert_close(merged[HIGH], torch.full((99,), 0.99))


def recorded(models: Sequence[Tensor], **parameters: Any) -> dict[str, Any]:
    """The entry of one tensor in the weight log."""
    log = WeightLog("pivot", {})
    group = TensorGroup.from_tensors(models, ids=["pivot", "a", "b"], base_index=0, name="w")
    unit = Unit("w", parameters.get("granularity", "matrix"), None, log)
    VarmMethod()._execute_resolved((group,), [{**parameters, UNIT: unit}])
    (record,) = log.as_json()["units"]
    return record


@pytest.mark.parametrize("granularity", ["matrix", "parameter"])
def test_the_weight_log_says_where_no_target_moved(granularity: str) -> None:
    still = recorded([torch.ones(4)] * 3, granularity=granularity)
    assert still["moved"] is False
    assert "pivot is kept" in still["note"]
    assert [target["weight"] for target in still["targets"].values()] == [0.5, 0.5]
    assert recorded([torch.ones(4), torch.ones(4), torch.zeros(4)], granularity=granularity)["moved"] is True


def test_the_weight_log_holds_statistic_and_weight_of_each_target() -> None:
    record = recorded([torch.zeros(4), torch.full((4,), 1e-4), torch.full((4,), 2e-4)])
    assert record["targets"]["a"] == pytest.approx({"statistic": 1e-8, "weight": 0.2})
    assert record["targets"]["b"] == pytest.approx({"statistic": 4e-8, "weight": 0.8})
