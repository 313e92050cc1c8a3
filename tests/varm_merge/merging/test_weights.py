"""Equation 7 on plain numbers, pooling over a unit, and the units of real models' tensor names."""

import math
import random
from typing import get_args

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varm_merge.merging.weights import (
    Granularity,
    Normalization,
    Settings,
    UnitStatistics,
    block_of,
    normalize,
    submodule_of,
    unit_of,
)

property_test = settings(max_examples=60, deadline=None, derandomize=True)
normalizations = st.sampled_from(get_args(Normalization))
temperatures = st.floats(0.05, 20)
statistics_of_targets = st.lists(st.just(0.0) | st.floats(1e-60, 1e30), min_size=1, max_size=6)


@property_test
@given(statistics_of_targets, normalizations, temperatures)
def test_weights_are_those_of_the_formula(
    statistics: list[float], normalization: Normalization, temperature: float
) -> None:
    expected = oracle.normalize(np.array(statistics), normalization, temperature)
    assert normalize(statistics, normalization, temperature) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@property_test
@given(statistics_of_targets, normalizations, temperatures)
def test_weights_are_shares(statistics: list[float], normalization: Normalization, temperature: float) -> None:
    weights = normalize(statistics, normalization, temperature)
    assert all(0 <= weight <= 1 for weight in weights)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15)


@property_test
@given(statistics_of_targets, normalizations, temperatures, st.randoms())
def test_permuting_targets_permutes_their_weights_exactly(
    statistics: list[float], normalization: Normalization, temperature: float, rng: random.Random
) -> None:
    order = rng.sample(range(len(statistics)), len(statistics))
    weights = normalize(statistics, normalization, temperature)
    permuted = normalize([statistics[j] for j in order], normalization, temperature)
    assert permuted == [weights[j] for j in order]


@property_test
@given(
    st.lists(st.just(0.0) | st.floats(1e-30, 1e30), min_size=1, max_size=6),
    normalizations,
    temperatures,
    st.floats(1e-24, 1e12),
)
def test_weights_do_not_depend_on_the_scale_of_the_deltas(
    statistics: list[float], normalization: Normalization, temperature: float, factor: float
) -> None:
    weights = normalize(statistics, normalization, temperature)
    scaled = normalize([value * factor for value in statistics], normalization, temperature)
    assert scaled == pytest.approx(weights, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("normalization", get_args(Normalization))
@pytest.mark.parametrize("targets", [1, 2, 3, 7])
def test_a_unit_in_which_no_target_moved_gets_uniform_weights(normalization: Normalization, targets: int) -> None:
    assert normalize([0.0] * targets, normalization, 1.0) == [1 / targets] * targets


@pytest.mark.parametrize("statistic", [5e-324, 1e-300, 1e-13, 1e-6, 1.0, 1e300])
def test_a_target_that_moved_alone_gets_all_the_weight_however_little_it_moved(statistic: float) -> None:
    assert normalize([0.0, statistic, 0.0], "sum", 1.0) == [0.0, 1.0, 0.0]


def test_deltas_of_1e_4_and_2e_4_weigh_one_fifth_and_four_fifths() -> None:
    assert normalize([1e-4**2, 2e-4**2], "sum", 1.0) == pytest.approx([0.2, 0.8])


def test_softmax_goes_from_uniform_to_the_largest_as_the_temperature_falls() -> None:
    statistics = [1e-9, 2e-9, 4e-9]
    assert normalize(statistics, "softmax", 1e6) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert normalize(statistics, "softmax", 1e-3) == pytest.approx([0, 0, 1], abs=1e-12)
    assert normalize(statistics, "softmax", 5e-324) == [0, 0, 1]
    shares = [math.exp(value / 7) for value in (3, 6, 12)]  # over the mean 7/3, at temperature 1
    assert normalize(statistics, "softmax", 1.0) == pytest.approx([share / sum(shares) for share in shares])


def test_a_unit_pools_elements_and_does_not_average_the_means_of_its_tensors() -> None:
    unit = UnitStatistics()
    unit.add({"a": 4.0, "b": 0.0}, elements=4)  # means 1 and 0
    unit.add({"a": 0.0, "b": 96.0}, elements=96)  # means 0 and 1
    assert unit.means() == {"a": 0.04, "b": 0.96}
    assert unit.weights(Settings()) == pytest.approx({"a": 0.04, "b": 0.96})


def test_tensors_may_be_pooled_in_any_order_and_grouping() -> None:
    tensors = [({"a": 1.0, "b": 2.0}, 3), ({"a": 8.0, "b": 4.0}, 5), ({"a": 0.5, "b": 0.25}, 7)]
    one_by_one, left, right = UnitStatistics(), UnitStatistics(), UnitStatistics()
    for sums, elements in tensors:
        one_by_one.add(sums, elements)
    right.add(*tensors[2])
    right.add(*tensors[0])
    left.add(*tensors[1])
    left.merge(right)
    assert left == one_by_one
    assert left.elements == {"a": 15, "b": 15}


def test_a_target_without_an_optional_tensor_is_averaged_over_the_elements_it_has() -> None:
    unit = UnitStatistics()
    unit.add({"a": 6.0, "b": 6.0}, elements=6)
    unit.add({"a": 6.0}, elements=6)
    assert unit.means() == {"a": 1.0, "b": 1.0}
    assert unit.weights(Settings(), ["a"]) == {"a": 1.0}


def test_a_unit_without_elements_has_statistic_zero_and_uniform_weights() -> None:
    unit = UnitStatistics()
    unit.add({"a": 0.0, "b": 0.0}, elements=0)
    assert unit.means() == {"a": 0.0, "b": 0.0}
    assert unit.weights(Settings()) == {"a": 0.5, "b": 0.5}


INSIDE_BLOCKS = [  # tensor, its block, its sub-module within the block
    ("model.layers.0.self_attn.q_proj.weight", "model.layers.0", "self_attn"),  # Llama
    ("model.layers.11.self_attn.o_proj.bias", "model.layers.11", "self_attn"),
    ("model.layers.1.mlp.down_proj.weight", "model.layers.1", "mlp"),
    ("model.layers.1.input_layernorm.weight", "model.layers.1", "input_layernorm"),
    ("model.layers.1.post_attention_layernorm.weight", "model.layers.1", "post_attention_layernorm"),
    ("model.layers.3.self_attn.q_norm.weight", "model.layers.3", "self_attn"),  # Qwen3
    ("model.layers.2.mlp.experts.gate_up_proj", "model.layers.2", "mlp"),  # Mixtral
    ("model.layers.2.mlp.gate.weight", "model.layers.2", "mlp"),
    ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "model.layers.2", "block_sparse_moe"),
    ("gpt_neox.layers.5.attention.query_key_value.weight", "gpt_neox.layers.5", "attention"),  # GPT-NeoX
    ("gpt_neox.layers.5.mlp.dense_4h_to_h.bias", "gpt_neox.layers.5", "mlp"),
    ("h.0.attn.c_attn.weight", "h.0", "attn"),  # GPT-2
    ("transformer.h.10.ln_1.bias", "transformer.h.10", "ln_1"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0", "layer.0.SelfAttention"),  # T5
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0", "layer.1.DenseReluDense"),
    ("encoder.block.0.layer.1.layer_norm.weight", "encoder.block.0", "layer.1.layer_norm"),
    ("decoder.block.3.layer.1.EncDecAttention.k.weight", "decoder.block.3", "layer.1.EncDecAttention"),
    ("backbone.layers.0.mixer.A_log", "backbone.layers.0", "mixer"),  # Mamba
    ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0", "mixer"),
    ("backbone.layers.0.norm.weight", "backbone.layers.0", "norm"),
    ("bert.encoder.layer.4.attention.output.LayerNorm.weight", "bert.encoder.layer.4", "attention"),  # BERT
]
OUTSIDE_BLOCKS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "embed_out.weight",
    "gpt_neox.final_layer_norm.bias",
    "wte.weight",
    "ln_f.weight",
    "shared.weight",
    "encoder.final_layer_norm.weight",
    "backbone.embeddings.weight",
    "backbone.norm_f.weight",
]


@pytest.mark.parametrize(("tensor", "block", "submodule"), INSIDE_BLOCKS)
def test_a_tensor_of_a_block_is_in_the_units_its_name_says(tensor: str, block: str, submodule: str) -> None:
    assert block_of(tensor) == block
    assert submodule_of(tensor, block) == f"{block}.{submodule}"
    assert unit_of(tensor, "layer", block) == block
    assert unit_of(tensor, "module", block) == f"{block}.{submodule}"


@pytest.mark.parametrize("tensor", OUTSIDE_BLOCKS)
def test_a_tensor_outside_all_blocks_is_a_layer_and_a_module_of_its_own(tensor: str) -> None:
    assert block_of(tensor) is None
    assert unit_of(tensor, "layer", None) == tensor
    assert unit_of(tensor, "module", None) == tensor


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_model_is_one_unit_and_matrix_and_parameter_units_are_single_tensors(tensor: str) -> None:
    units = {granularity: unit_of(tensor, granularity, block_of(tensor)) for granularity in get_args(Granularity)}
    assert units["model"] == "model"
    assert units["matrix"] == units["parameter"] == tensor
