"""Merging on a GPU, without one: no two devices meet, and the results are those of the CPU to the bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import state_dicts
import tiny_models
import torch
from pretend_gpu import GpuTensor, on_gpu, pretend_gpu
from torch import Tensor

from varm_merge.comparison import distances
from varm_merge.merging import tensor_math
from varm_merge.merging.tensor_math import ElementWeights, agreement, blend, blend_elements, delta_sums, select
from varm_merge.recipes import rounding

SHAPE = (7, 11)


@pytest.fixture(autouse=True)
def new_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_math, "_workspace", type(tensor_math._workspace)())  # buffers outlive a test


def models(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A pivot and three targets; some elements of them tie."""
    reserve = torch.Generator().manual_seed(0)
    pivot = torch.randn(SHAPE, generator=reserve)
    targets = [pivot + 0.01 * torch.randn(SHAPE, generator=reserve) for _ in range(3)]
    for number, target in enumerate(targets):
        target[:3] = pivot[:3] + (0.5 if number else 0.0)
    return [one.to(dtype) for one in (pivot, *targets)]


def blended(weights: Any, **steps: Any) -> Callable[..., Any]:
    def run(pivot: Tensor, *targets: Tensor) -> Any:
        out = torch.empty(pivot.shape, device=pivot.device)
        options = {"selection": None, "erase_minority": False, **steps}
        if callable(options["selection"]):
            options["selection"] = options["selection"](pivot, *targets)
        return blend_elements(pivot, targets, weights, out, **options), out

    return run


def plainly_blended(pivot: Tensor, *targets: Tensor) -> Tensor:
    out = torch.empty(targets[0].shape, dtype=torch.bfloat16, device=targets[0].device)
    blend(pivot, targets, [0.2, 0.5, 0.3], out)
    return out


def half_selected(pivot: Tensor, *targets: Tensor) -> Any:
    return select(pivot, targets, 0.55)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "delta_sums": lambda pivot, *targets: delta_sums(pivot, targets, "square", None),
    "delta_sums of |Δ|, selected": lambda pivot, *targets: delta_sums(
        pivot, targets, "abs", half_selected(pivot, *targets)
    ),
    "agreement": lambda pivot, *targets: agreement(pivot, targets),
    "select": half_selected,
    "select, with a tie at the edge": lambda pivot, *targets: select(pivot, targets, 0.2),
    "blend": plainly_blended,
    "blend_elements, selected and erased": blended([0.1, 0.6, 0.3], selection=half_selected, erase_minority=True),
    "parameter": blended(ElementWeights("square", "sum", 1.0)),
    "parameter, softmax, erased": blended(ElementWeights("abs", "softmax", 0.5), erase_minority=True),
    "distances": lambda pivot, merged, *targets: [
        numbers.tolist() for numbers in distances._sums(pivot, merged, targets)
    ],
    "rounding": lambda pivot, target, *_: rounding.compared(pivot, target.bfloat16()),
}


def on_cpu(result: Any) -> Any:
    """The result with its tensors as lists of numbers."""
    if isinstance(result, tuple):
        return tuple(map(on_cpu, result))
    return result.float().tolist() if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_on_the_tensors_of_a_gpu_gives_what_it_gives_on_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_math, "CPU_CHUNK", 30)
    monkeypatch.setattr(tensor_math, "ACCELERATOR_CHUNK", 30)
    function, expected = FUNCTIONS[name], on_cpu(FUNCTIONS[name](*models()))
    with pretend_gpu():
        found = on_cpu(function(*map(on_gpu, models())))
    assert found == expected


def merged_tensors(settings: dict[str, Any], family: Sequence[Any]) -> dict[str, list[Any]]:
    return {name: on_cpu(tensor) for name, tensor in state_dicts.merge(family, **settings).items()}


@pytest.mark.parametrize("granularity", ["model", "matrix", "parameter"])
def test_varm_merges_state_dicts_on_a_gpu(granularity: str) -> None:
    settings = {"granularity": granularity, "select_topk": 0.7, "erase_minority": True}
    family = state_dicts.family(2)
    expected = merged_tensors(settings, family)
    with pretend_gpu():
        there = [{name: on_gpu(tensor) for name, tensor in model.items()} for model in family]
        made = state_dicts.merge(there, **settings)
        assert all(isinstance(tensor, GpuTensor) for tensor in made.values())
        assert {name: on_cpu(tensor) for name, tensor in made.items()} == expected


@pytest.mark.slow
def test_a_merge_with_cuda_writes_the_bytes_of_a_merge_on_the_cpu(
    mistral: tiny_models.Family, tmp_path: Path
) -> None:
    text = runs.recipe(mistral, granularity="layer", select_topk=0.8)
    expected = runs.merge(text, tmp_path / "cpu")
    with pretend_gpu():
        found = runs.merge(text, tmp_path / "cuda", device="cuda")
    assert found.log == expected.log
    for file in expected.folder.glob("*.safetensors"):
        assert (found.folder / file.name).read_bytes() == file.read_bytes()
