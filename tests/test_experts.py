"""One expert, one matrix: each expert's each projection is a unit at ``matrix``, however it is stored."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import architectures
import numpy as np
import oracle
import pytest
import runs
import tiny_models
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import Family

from varm_merge import planner
from varm_merge.cli import main
from varm_merge.experts import layout_of, matrices

Arrays = dict[str, np.ndarray]
MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe")


def halves(packed: np.ndarray, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gate and up of one expert: ``chunk(2, dim=0)`` in transformers' experts, ``[..., ::2]`` in GPT-OSS's."""
    if interleaved:
        return packed[..., ::2], packed[..., 1::2]
    return packed[: len(packed) // 2], packed[len(packed) // 2 :]


def apart(tensors: Mapping[str, np.ndarray], interleaved: bool) -> Arrays:
    """The tensors with every expert's matrices by themselves, named as checkpoints do that keep experts apart."""
    result: Arrays = {}
    for name, tensor in tensors.items():
        place, _, what = name.rpartition(".experts.")
        if what.removesuffix("_bias") not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        kind = "bias" if what.endswith("_bias") else "weight"
        for expert, matrix in enumerate(tensor):
            stem = f"{place}.experts.{expert}"
            if what.startswith("down"):
                result[f"{stem}.down_proj.{kind}"] = matrix
            else:
                result[f"{stem}.gate_proj.{kind}"], result[f"{stem}.up_proj.{kind}"] = halves(matrix, interleaved)
    return result


def pack(folder: Path) -> None:
    """Store the experts as transformers holds them."""
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Family]:
    """A family whose files pack the experts of none, all, the pivot, or one target."""
    made: dict[tuple[str, str], Family] = {}

    def get(name: str, packed: str) -> Family:
        if (name, packed) not in made:
            folder = tmp_path_factory.mktemp("experts")
            family = architectures.save_family(name, folder)
            chosen = {"none": (), "all": (family.pivot, *family.targets), "pivot": (family.pivot,)}
            for path in chosen.get(packed, (family.targets[0],)):
                pack(path)
            made[name, packed] = family
        return made[name, packed]

    return get


def assert_oracle(merged: runs.Merged, family: Family, interleaved: bool, **settings: float) -> None:
    """The merged model, loaded by transformers, and the weights are those of the formula, matrix by matrix."""
    pivot, *targets = (apart(runs.loaded(path), interleaved) for path in (family.pivot, *family.targets))
    expected, weights = oracle.merge(pivot, targets, runs.MATRIX, **settings)
    written = apart(runs.loaded(merged.folder), interleaved)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(written[name], values, rtol=2e-7, atol=1e-9, err_msg=name)
    units = {name: unit for name, unit in merged.units().items() if ".experts." in name}
    assert units.keys() == {name for name in expected if ".experts." in name}
    for name, unit in units.items():
        assert (unit["granularity"], unit["elements"]) == ("matrix", expected[name].size)
        np.testing.assert_allclose(merged.weights(name), weights[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("packed", ["none", "all", "pivot", "target"])
@pytest.mark.parametrize("name", MODELS)
def test_each_matrix_of_each_expert_is_a_unit_however_it_is_stored(
    name: str, packed: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    family = stored(name, packed)
    merged = runs.merge(runs.recipe(family, "dtype: float32"), tmp_path / "out")
    assert_oracle(merged, family, name == "gpt_oss")
    spread = [weights[0] for unit in merged.units() if ".experts." in unit for weights in [merged.weights(unit)]]
    assert max(spread) - min(spread) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_sce_selects_within_one_experts_matrix(
    name: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    sce = {"select_topk": 0.4, "erase_minority": True}
    family = stored(name, "none")
    merged = runs.merge(runs.recipe(family, "dtype: float32", **sce), tmp_path / "out")
    assert_oracle(merged, family, name == "gpt_oss", **sce)


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_coarser_units_keep_the_experts_together(
    name: str, granularity: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    merged = runs.merge(runs.recipe(stored(name, "none"), granularity=granularity), tmp_path / "out")
    holding = [unit for unit in merged.log["units"] if any("experts" in tensor for tensor in unit["tensors"])]
    assert len(holding) == 2
    assert all(not unit["unit"].count("experts") for unit in holding)


def test_by_names_the_experts_of_a_checkpoint_are_units(tmp_path: Path) -> None:
    family = architectures.save_family("deepseek_v2", tmp_path)
    with planner.by_name():
        merged = runs.merge(runs.recipe(family), tmp_path / "out")
    runs.assert_merges(merged, family, runs.MATRIX)
    experts = [unit for unit in merged.units() if ".experts." in unit]
    assert len(experts) == len(
        [name for name in load_file(family.pivot / "model.safetensors") if ".experts." in name]
    )


def test_the_order_of_the_experts_does_not_matter(stored: Callable[[str, str], Family], tmp_path: Path) -> None:
    family = stored("mixtral", "none")
    paths = [shutil.copytree(path, tmp_path / path.name) for path in (family.pivot, *family.targets)]

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {name.replace("experts.0.", "experts.x."): tensor for name, tensor in tensors.items()}
        renamed = {name.replace("experts.2.", "experts.0."): tensor for name, tensor in renamed.items()}
        tensors.clear()
        tensors.update({name.replace("experts.x.", "experts.2."): tensor for name, tensor in renamed.items()})

    for path in paths:
        tiny_models.edit(path, swap)
    one = runs.merge(runs.recipe(family), tmp_path / "one")
    other = runs.merge(runs.recipe(Family(paths[0], tuple(paths[1:]))), tmp_path / "other")
    there = {"0": "2", "1": "1", "2": "0"}
    for unit in one.units():
        place, found, rest = unit.partition(".experts.")
        twin = f"{place}.experts.{there[rest[0]]}{rest[1:]}" if found else unit
        assert one.weights(unit) == other.weights(twin)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_inspect_tells_the_weights_of_every_expert(
    name: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for granularity in ("matrix", "parameter"):
        recipe.write_text(runs.recipe(stored(name, "target"), granularity=granularity, select_topk=0.5))
        told = CliRunner().invoke(
            main, ["inspect", str(recipe), "--json", "--quiet", "--html", str(tmp_path / "p.html")]
        )
        assert told.exit_code == 0, told.output
        merged = runs.merge(recipe.read_text(), tmp_path / granularity)
        own = {unit["unit"]: unit for unit in json.loads(told.stdout)["units"]["recipe"]}
        assert own.keys() == merged.units().keys()
        for unit, one in merged.units().items():
            assert (own[unit]["tensors"], own[unit]["elements"]) == (one["tensors"], one["elements"])
            for target, numbers in one["targets"].items():
                assert own[unit]["targets"][target] == pytest.approx(numbers, rel=1e-12)
    assert ".experts.0.gate_proj.weight" in (tmp_path / "p.html").read_text(encoding="utf-8")


MIXTURES = (
    *MODELS,
    "deepseek_v3",
    "jamba",
    "olmoe",
    "phimoe",
    "ernie4_5_moe",
    "glm4_moe",
    "llama4_text",
    "qwen3_next",
)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_halves_are_those_of_transformers_own_experts(name: str) -> None:
    """By the flags of its experts module, where it has them."""
    model_class, config = architectures.ARCHITECTURES[name]()
    torch.manual_seed(0)
    model = getattr(model_class, "from_config", model_class)(config).eval()
    packed = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(getattr(m, "gate_up_proj", None), torch.nn.Parameter)
    ]
    assert packed
    path, experts = packed[0]
    tensor = experts.gate_up_proj
    cuts = dict(matrices(f"{path}.gate_up_proj", tensor.shape, layout_of(config.model_type)))
    assert len(cuts) == 2 * len(tensor)
    last = getattr(experts, "is_transposed", name == "llama4_text")
    interleaved = not getattr(experts, "is_concatenated", True)
    matrix = tensor[1].movedim(0, 1) if last else tensor[1]
    gate, up = (matrix[::2], matrix[1::2]) if interleaved else matrix.chunk(2)
    for half, own in (("gate", gate), ("up", up)):
        cut = next(cut for unit, cut in cuts.items() if unit.endswith(f".1.{half}_proj.weight"))(tensor)
        assert torch.equal(cut.movedim(0, 1) if last else cut, own), half
