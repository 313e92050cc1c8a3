"""One expert, one matrix: each expert's each projection is a unit at ``matrix``, however it is stored."""

import json
import re
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

from varm_merge.cli import main
from varm_merge.merging import planning
from varm_merge.merging.experts import PLAIN, layout_of, matrices

Arrays = dict[str, np.ndarray]
MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text")


def halves(packed: np.ndarray, model: str) -> tuple[np.ndarray, ...]:
    """Gate and up of one expert, as the forward of ``model`` takes them apart."""
    if model == "gpt_oss":
        return packed[..., ::2], packed[..., 1::2]
    return tuple(np.split(packed, 2, axis=1 if model == "llama4_text" else 0))


def apart(tensors: Mapping[str, np.ndarray], model: str) -> Arrays:
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
                result[f"{stem}.gate_proj.{kind}"], result[f"{stem}.up_proj.{kind}"] = halves(matrix, model)
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


def assert_oracle(merged: runs.Merged, family: Family, model: str, **settings: float) -> None:
    """The merged model, loaded by transformers, and the weights are those of the formula, matrix by matrix."""
    pivot, *targets = (apart(runs.loaded(path), model) for path in (family.pivot, *family.targets))
    expected, weights = oracle.merge(pivot, targets, runs.MATRIX, **settings)
    written = apart(runs.loaded(merged.folder), model)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(written[name], values, rtol=2e-7, atol=1e-9, err_msg=name)
    units = {name: unit for name, unit in merged.units().items() if ".experts." in name}
    assert units.keys() == {name for name in expected if ".experts." in name}
    for name, unit in units.items():
        assert (unit["granularity"], unit["elements"]) == ("matrix", expected[name].size)
        np.testing.assert_allclose(merged.weights(name), weights[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["none", "all", "pivot", "target"])
@pytest.mark.parametrize("name", MODELS)
def test_each_matrix_of_each_expert_is_a_unit_however_it_is_stored(
    name: str, packed: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    family = stored(name, packed)
    merged = runs.merge(runs.recipe(family, "dtype: float32"), tmp_path / "out")
    assert_oracle(merged, family, name)
    spread = [weights[0] for unit in merged.units() if ".experts." in unit for weights in [merged.weights(unit)]]
    assert max(spread) - min(spread) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_sce_selects_within_one_experts_matrix(
    name: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    sce = {"select_topk": 0.4, "erase_minority": True}
    family = stored(name, "none")
    merged = runs.merge(runs.recipe(family, "dtype: float32", **sce), tmp_path / "out")
    assert_oracle(merged, family, name, **sce)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("name", MODELS)
def test_coarser_units_keep_the_experts_together(
    name: str, granularity: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    family = stored(name, "target")
    merged = runs.merge(runs.recipe(family, "dtype: float32", granularity=granularity), tmp_path / "out")
    unit_of = {"layer": runs.LAYER, "module": runs.MODULE}[granularity]
    runs.assert_merges(merged, family, unit_of, runs.loaded)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "granitemoe"])
def test_by_names_the_experts_of_a_packed_checkpoint_are_units(
    name: str, stored: Callable[[str, str], Family], tmp_path: Path
) -> None:
    family = stored(name, "all")
    with planning.by_name():
        merged = runs.merge(runs.recipe(family, "dtype: float32"), tmp_path / "out")
    assert_oracle(merged, family, name)


def test_by_names_the_experts_of_a_checkpoint_are_units(tmp_path: Path) -> None:
    family = architectures.save_family("deepseek_v2", tmp_path)
    with planning.by_name():
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


@pytest.mark.slow
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


# What transformers makes of packed experts


def configured(model_class: str, config: str, **settings: object) -> architectures.Architecture:
    settings = architectures.GROUPED | {"head_dim": 8} | settings
    return lambda: (getattr(transformers, model_class), getattr(transformers, config)(**settings))


OTHERS = {
    "aria_text": configured("AutoModelForCausalLM", "AriaTextConfig", moe_num_experts=3, moe_topk=2),
    "openai_privacy_filter": configured(
        "AutoModelForTokenClassification", "OpenAIPrivacyFilterConfig", **architectures.LOCAL_EXPERTS
    ),
    "qwen3_vl_moe_text": configured(
        "AutoModel",
        "Qwen3VLMoeTextConfig",
        **architectures.EXPERTS | {"moe_intermediate_size": 12, "rope_parameters": architectures.ROPE_OF_IMAGES},
    ),
}
MIXTURES = (
    *MODELS,
    *("deepseek_v3", "ernie4_5_moe", "glm4_moe", "jamba", "olmoe", "phimoe", "qwen3_next"),
    *OTHERS,
)
TOLD = [name for name in MIXTURES if name != "qwen3_vl_moe_text"]
"""Those whose model type tells the layout; the other has two, which the hidden size tells apart."""


def experts_of(name: str) -> tuple[torch.nn.Module, transformers.PretrainedConfig]:
    """The first layer's experts of a model, and its config."""
    model_class, config = (OTHERS | architectures.ARCHITECTURES)[name]()
    model = getattr(model_class, "from_config", model_class)(config).eval()
    experts = next(m for m in model.modules() if isinstance(getattr(m, "gate_up_proj", None), torch.nn.Parameter))
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.requires_grad_(False).normal_(std=0.3)
    return experts, config


def output(experts: torch.nn.Module) -> torch.Tensor:
    """Of expert 1; Llama 4's experts each take a share of the rows."""
    torch.manual_seed(1)
    rows = torch.randn(5, 16)
    if type(experts).__name__ == "Llama4TextExperts":
        return experts(rows.repeat(3, 1))[5:10]
    return experts(rows, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1))


def curvature(experts: torch.nn.Module, matrix: torch.Tensor) -> float:
    """How far the output is from a straight line along which ``matrix``, a view, is moved."""
    step = 0.1 * torch.randn_like(matrix)
    here = output(experts)
    matrix += step
    there = output(experts)
    matrix -= 2 * step
    back = output(experts)
    matrix += step
    return float((there - 2 * here + back).abs().max())


@pytest.mark.parametrize(
    ("name", "sized"), [*((name, True) for name in MIXTURES), *((name, False) for name in TOLD)]
)
def test_an_experts_output_is_linear_in_its_up_and_not_in_its_gate(name: str, sized: bool) -> None:
    experts, config = experts_of(name)
    layout = layout_of(config.model_type, config.hidden_size if sized else None)
    packed = experts.gate_up_proj
    cuts = dict(matrices("mlp.experts.gate_up_proj", packed.shape, layout))
    assert len(cuts) == 2 * len(packed)
    gate, up = (cuts[f"mlp.experts.1.{half}_proj.weight"](packed) for half in ("gate", "up"))
    assert curvature(experts, up) < 1e-3 * curvature(experts, gate)
    if hasattr(experts, "gate_up_proj_bias"):
        packed = experts.gate_up_proj_bias
        cuts = dict(matrices("mlp.experts.gate_up_proj_bias", packed.shape, layout))
        gate, up = (cuts[f"mlp.experts.1.{half}_proj.bias"](packed) for half in ("gate", "up"))
        assert curvature(experts, up) < 1e-3 * curvature(experts, gate)


def test_the_hub_has_qwen3_vl_moe_the_other_way_round() -> None:
    packed = torch.arange(2 * 16 * 24).view(2, 16, 24)  # hidden size 16, as its config's conversion says
    for layout in (layout_of("qwen3_vl_moe", 16), layout_of("qwen3_vl_moe")):
        cuts = dict(matrices("mlp.experts.gate_up_proj", packed.shape, layout))
        assert torch.equal(cuts["mlp.experts.1.gate_proj.weight"](packed), packed[1, :, :12])
        assert torch.equal(cuts["mlp.experts.1.up_proj.weight"](packed), packed[1, :, 12:])


def test_no_packing_of_transformers_is_unknown() -> None:
    other = re.compile(r"is_transposed=True|is_concatenated=False|gate_up_proj = .*num_experts, self\.hidden_")
    models = Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in models.glob("*/modeling_*.py") if other.search(path.read_text("utf-8"))}
    assert found >= {"aria", "gpt_oss", "llama4"}
    assert {name for name in found if layout_of(name) == PLAIN} == set()
