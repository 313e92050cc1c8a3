"""Targets in 16 bits whose deltas are mostly rounding are remarked on, by ``check`` and by ``inspect``."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny_models
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import Family

from varm_merge.cli import main
from varm_merge.recipes.rounding import compared


def saved(folder: Path, step: float, pivot: torch.dtype, target: torch.dtype, frozen: str = "") -> Family:
    """A pivot and two targets that moved by ``step`` of each weight, but for the tensors ``frozen``."""
    models = tiny_models.save_family(folder, "mistral", hidden_size=64, intermediate_size=128)
    original = load_file(models.pivot / "model.safetensors")
    for number, path in enumerate((models.pivot, *models.targets)):
        generator = torch.Generator().manual_seed(number)

        def change(
            tensors: dict[str, torch.Tensor], number: int = number, noise: torch.Generator = generator
        ) -> None:
            for name, tensor in original.items():
                still = number == 0 or (frozen and frozen in name)
                moved = tensor + (0 if still else step) * tensor.abs() * torch.randn(tensor.shape, generator=noise)
                tensors[name] = moved.to(target if number else pivot)

        tiny_models.edit(path, change)
    return models


def remarks(models: Family, folder: Path, *lines: str) -> tuple[str, str]:
    """What check and inspect say."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(runs.recipe(models, *lines, granularity="layer"))
    check = CliRunner().invoke(main, ["check", str(recipe)])
    assert check.exit_code == 0, check.output
    inspected = CliRunner().invoke(main, ["inspect", str(recipe), "--json", "--quiet"])
    assert inspected.exit_code == 0, inspected.output
    return check.stdout, "\n".join(json.loads(inspected.stdout)["remarks"])


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["", "self_attn"])
@pytest.mark.parametrize(
    ("dtype", "lines", "pickled"),
    [
        (torch.bfloat16, (), False),
        (torch.float16, (), False),
        (torch.bfloat16, ("dtype: float32",), False),
        (torch.float16, (), True),
    ],
)
def test_a_light_fine_tune_in_16_bits_is_remarked_on(
    dtype: torch.dtype, lines: tuple[str, ...], pickled: bool, frozen: str, tmp_path: Path
) -> None:
    eps = torch.finfo(dtype).eps
    models = saved(tmp_path / "m", 0.1 * eps, dtype, dtype, frozen)
    pivot, target = (load_file(path / "model.safetensors") for path in (models.pivot, models.targets[0]))
    moved = [name for name in pivot if not torch.equal(pivot[name], target[name])]
    equal = sum(int((pivot[name] == target[name]).sum()) for name in moved)
    share = equal / sum(pivot[name].numel() for name in moved)
    assert share > 0.8
    for path in (models.pivot, *models.targets) if pickled else ():
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    for remark in remarks(models, tmp_path, *lines):
        for path in models.targets:
            (line,) = [line for line in remark.splitlines() if f"of {path}'s elements equal the pivot's" in line]
            assert "its weights are mostly rounding; merge the float32 checkpoint" in line
            assert float(line.split("%")[0].split()[-1]) == pytest.approx(100 * share, abs=3)


@pytest.mark.slow
def test_what_is_no_rounding_is_not_remarked_on(tmp_path: Path) -> None:
    for number, (step, pivot, target) in enumerate(
        (
            (0.05, torch.bfloat16, torch.bfloat16),
            (1e-4, torch.bfloat16, torch.float32),
            (1e-4, torch.float32, torch.float32),
            (0.0, torch.bfloat16, torch.bfloat16),
        )
    ):
        models = saved(tmp_path / f"{number}", step, pivot, target)
        assert "equal the pivot's" not in "".join(remarks(models, tmp_path))


def test_the_recipe_that_rounds_float32_targets_is_reported_so(tmp_path: Path) -> None:
    models = saved(tmp_path / "m", 1e-4, torch.float32, torch.float32)
    for remark in remarks(models, tmp_path, "dtype: bfloat16"):
        assert "`dtype: bfloat16` rounds it; merge with `dtype: float32` and `out_dtype: bfloat16`" in remark


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=40)
)
@settings(max_examples=200, deadline=None)
def test_steps_between_floats_are_counted_as_numpy_counts_them(pairs: list[tuple[float, float]]) -> None:
    for dtype, kind in ((torch.float16, np.float16), (torch.bfloat16, None)):
        pivot, target = (torch.tensor(column).to(dtype) for column in zip(*pairs, strict=True))
        counts = compared(pivot, target)
        if torch.equal(pivot, target):
            assert counts.elements == 0
            continue
        assert (counts.elements, counts.equal) == (len(pairs), int((pivot == target).sum()))
        if kind is not None:
            ones, others = (tensor.numpy().astype(kind) for tensor in (pivot, target))
            near = [
                other in (np.nextafter(one, kind(999)), np.nextafter(one, kind(-999)), one)
                for one, other in zip(ones, others, strict=True)
            ]
            assert counts.close == sum(near)
