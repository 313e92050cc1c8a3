"""Runs of mergekit's real ``run_merge``, and their comparison with the float64 oracle."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergekit.merge
import numpy as np
import oracle
import tiny_models
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file

import varm_merge  # noqa: F401  registers the method

Arrays = dict[str, np.ndarray]
UnitOf = Callable[[str], str] | None


@dataclass(frozen=True)
class Merged:
    """What a run wrote."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    log: dict[str, Any]

    def units(self) -> dict[str, dict[str, Any]]:
        return {unit["unit"]: unit for unit in self.log["units"]}

    def weights(self, unit: str) -> list[float]:
        return [target["weight"] for target in self.units()[unit]["targets"].values()]


def recipe(family: tiny_models.Family, *lines: str, pivot_listed: bool = False, **parameters: Any) -> str:
    """A recipe that merges ``family`` with ``parameters``; more ``lines`` of YAML follow."""
    listed = [family.pivot, *family.targets] if pivot_listed else family.targets
    models = [f"  - model: {folder}" for folder in listed]
    head = ["merge_method: varm", f"base_model: {family.pivot}", f"parameters: {json.dumps(parameters)}"]
    return "\n".join([*head, "models:", *models, *lines]) + "\n"


def merge(text: str, out: Path, **options: Any) -> Merged:
    """Run the recipe ``text`` in this process, as ``mergekit-yaml`` would."""
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    quiet = {"quiet": True, "copy_tokenizer": False, **options}
    mergekit.merge.run_merge(configuration, str(out), options=MergeOptions(**quiet), config_source=text)
    return read(out)


def read(folder: Path) -> Merged:
    log = folder / "varm_weights.json"
    return Merged(folder, read_tensors(folder), json.loads(log.read_text()) if log.exists() else {})


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors (or ``.bin``) files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file)
    return tensors


def arrays(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Arrays:
    """The floating-point tensors, rounded to ``dtype`` as mergekit rounds them, then exact in float64."""
    return {
        name: tensor.to(dtype or tensor.dtype).to(torch.float64).numpy()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }


def checkpoint(folder: Path, dtype: torch.dtype | None = None) -> Arrays:
    """The tensors of an input, by the names they have in its files."""
    return arrays(read_tensors(folder), dtype)


def loaded(folder: Path) -> Arrays:
    """The parameters of an input, by the names they have in the model that transformers makes of it."""
    return arrays(transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict())


def units_named(pattern: str) -> Callable[[str], str]:
    """Units by name: what ``pattern`` matches at the start of a tensor's name, else the tensor itself."""

    def unit_of(tensor: str) -> str:
        found = re.match(pattern, tensor)
        return found[0] if found else tensor

    return unit_of


def whole_model(_tensor: str) -> str:
    return "model"


LAYER = units_named(r"model\.layers\.\d+")
MODULE = units_named(r"model\.layers\.\d+\.\w+")
MATRIX = units_named(r".*")


def assert_rounded(written: torch.Tensor, values: np.ndarray, name: str) -> None:
    """``written`` is ``values`` rounded once: they differ by less than one unit in the last place."""
    step = torch.finfo(written.dtype)
    smallest = step.smallest_normal * step.eps + 1e-15
    np.testing.assert_allclose(written.double(), values, rtol=step.eps, atol=smallest, err_msg=name)


def assert_oracle(
    merged: Merged, pivot: Arrays, targets: Mapping[Any, Arrays], unit_of: UnitOf, **settings: Any
) -> None:
    """The written tensors and every number of varm_weights.json are those of the oracle."""
    expected, weights = oracle.merge(pivot, list(targets.values()), unit_of, **settings)
    written = arrays(merged.tensors)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        assert_rounded(merged.tensors[name], values, name)
    units = merged.units()
    assert len(units) == len(merged.log["units"])
    assert merged.log["targets"] == [str(target) for target in targets]
    if unit_of is None:
        assert units.keys() == expected.keys()
        return
    assert units.keys() == weights.keys()
    for unit, weights_K in weights.items():
        names = [name for name in expected if unit_of(name) == unit]
        assert sorted(units[unit]["tensors"]) == sorted(names)
        assert units[unit]["elements"] == sum(expected[name].size for name in names)
        assert list(units[unit]["targets"]) == [str(target) for target in targets]
        np.testing.assert_allclose(merged.weights(unit), weights_K, rtol=1e-9, err_msg=unit)


def assert_merges(
    merged: Merged,
    family: tiny_models.Family,
    unit_of: UnitOf,
    read: Callable[[Path], Arrays] = checkpoint,
    **settings: Any,
) -> None:
    """``merged`` is the merge of ``family`` by the oracle, with units named by ``unit_of``."""
    targets = {target: read(target) for target in family.targets}
    assert_oracle(merged, read(family.pivot), targets, unit_of, **settings)


def assert_same_tensors(one: Merged, other: Merged) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.log["units"] == other.log["units"]
