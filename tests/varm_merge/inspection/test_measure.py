"""``varm-merge inspect`` tells the weights that a merge would give, and how the targets differ."""

import itertools
import json
import os
import pty
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from click.testing import CliRunner
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tiny_models import Family

from varm_common.errors import UserError
from varm_merge.cli import main
from varm_merge.inspection import heatmap as picture
from varm_merge.inspection.grid import grid
from varm_merge.inspection.measure import inspect
from varm_merge.inspection.tables import tables
from varm_merge.merging import tensor_math

GRANULARITIES = ["model", "layer", "module", "matrix", "parameter"]
QUIET = MergeOptions(quiet=True)


def inspected(text: str, folder: Path, granularities: tuple[str, ...] = ()) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return inspect(path, QUIET, granularities)


def by_name(units: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({unit["unit"] for unit in units}) == len(units)
    return {unit["unit"]: unit for unit in units}


def assert_those_of_the_merge(units: list[dict[str, Any]], merged: runs.Merged) -> None:
    found, expected = by_name(units), merged.units()
    assert found.keys() == expected.keys()
    for name, unit in expected.items():
        for key in ("granularity", "tensors", "elements", "moved"):
            assert found[name][key] == unit[key], (name, key)
        assert found[name]["targets"].keys() == unit["targets"].keys()
        for target, numbers in unit["targets"].items():
            assert found[name]["targets"][target] == pytest.approx(numbers, rel=1e-9), (name, target)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral", "mpt", "t5"])
def test_at_every_granularity_the_weights_are_those_of_the_merge(
    architecture: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    members = family(architecture)
    found = inspected(runs.recipe(members), tmp_path)
    assert found["base_model"] == str(members.pivot)
    assert found["targets"] == [str(target) for target in members.targets]
    assert list(found["units"]) == ["recipe", *GRANULARITIES]
    for granularity in GRANULARITIES:
        merged = runs.merge(runs.recipe(members, granularity=granularity), tmp_path / granularity)
        assert_those_of_the_merge(found["units"][granularity], merged)
    assert found["units"]["recipe"] == found["units"]["matrix"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    [
        {"granularity": [{"filter": "mlp", "value": "layer"}, {"value": "module"}]},
        {"statistic": "abs", "normalization": "softmax", "temperature": 0.5, "granularity": "layer"},
        {"select_topk": 0.3, "erase_minority": True},
        {"select_topk": 0.3, "erase_minority": True, "granularity": "parameter"},
        {"keep_pivot": [{"filter": "mlp", "value": True}, {"value": False}], "granularity": "layer"},
    ],
    ids=["filters", "softmax", "sce", "sce of elements", "kept"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recipes_own_weights_are_those_of_its_merge(
    parameters: dict[str, Any], dtype: str, mistral: Family, tmp_path: Path
) -> None:
    text = runs.recipe(mistral, f"dtype: {dtype}", **parameters)
    found = inspected(text, tmp_path, ("model",))
    assert list(found["units"]) == ["recipe", "model"]
    assert_those_of_the_merge(found["units"]["recipe"], runs.merge(text, tmp_path / "out"))


def test_agreement_and_moves_are_those_of_the_task_vectors(family: Callable[..., Family], tmp_path: Path) -> None:
    members = family("llama", targets=3)
    found = inspected(runs.recipe(members), tmp_path)
    pivot = runs.checkpoint(members.pivot)
    deltas = [{n: t - pivot[n] for n, t in runs.checkpoint(target).items()} for target in members.targets]
    for tensor in found["tensors"]:
        name = tensor["tensor"]
        moves = [one["mean_squared_delta"] for one in tensor["targets"].values()]
        assert moves == pytest.approx([float(np.mean(np.square(delta[name]))) for delta in deltas], rel=1e-9)
        assert tensor["pivot_mean_square"] == pytest.approx(float(np.mean(np.square(pivot[name]))), rel=1e-9)
        assert (tensor["block"] is None) == ("layers" not in name)
    vectors = [np.concatenate([delta[name].ravel() for name in pivot]) for delta in deltas]
    whole = np.linalg.norm(np.concatenate([pivot[name].ravel() for name in pivot]))
    distances = list(found["agreement"]["relative_distance"].values())
    assert distances == pytest.approx([np.linalg.norm(vector) / whole for vector in vectors], rel=1e-9)
    pairs = list(itertools.combinations(range(3), 2))
    assert len(found["agreement"]["pairs"]) == len(pairs)
    for (one, other), pair in zip(pairs, found["agreement"]["pairs"], strict=True):
        assert pair["targets"] == [str(members.targets[one]), str(members.targets[other])]
        a, b = vectors[one], vectors[other]
        assert pair["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
        both = (a != 0) & (b != 0)
        assert pair["sign_conflicts"] == pytest.approx(np.mean(np.sign(a[both]) != np.sign(b[both])), rel=1e-9)


def test_agreement_counts_only_what_both_moved() -> None:
    pivot = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one, other = pivot + torch.tensor([1.0, -1.0, 0.0, 2.0]), pivot + torch.tensor([1.0, 1.0, 5.0, 0.0])
    found = tensor_math.agreement(pivot, [one, other])
    assert (found.pivot, found.squares) == (30.0, [6.0, 27.0])
    assert (found.products, found.moved, found.opposite) == ([0.0], [2.0], [1.0])


def targets_that_moved(members: Family, folder: Path, *parts: tuple[str, ...]) -> Family:
    """Targets of which each moved only the tensors whose names contain a word."""
    pivot = load_file(members.pivot / "model.safetensors")
    for number, (target, words) in enumerate(zip(members.targets, parts, strict=True)):
        own = load_file(target / "model.safetensors")
        kept = {name: own[name] if any(word in name for word in words) else pivot[name] for name in pivot}
        shutil.copytree(target, folder / f"target-{number}")
        save_file(kept, folder / f"target-{number}" / "model.safetensors", {"format": "pt"})
    return Family(members.pivot, tuple(folder / f"target-{number}" for number in range(len(parts))))


@pytest.mark.parametrize(
    ("parts", "added_up"),
    [
        ((("self_attn",), ("mlp", "embed", "head", "norm")), True),
        ((("",), ("",)), False),  # both moved everything
        ((("",), ("norm",)), False),  # the first one nearly replaces the other, which is no sum
        ((("q_proj", "k_proj"), ("v_proj", "o_proj")), True),  # most tensors did not move at all
    ],
)
def test_targets_that_moved_in_different_parts_are_remarked(
    mistral: Family, tmp_path: Path, parts: tuple[tuple[str, ...], ...], added_up: bool
) -> None:
    targets = targets_that_moved(mistral, tmp_path, *parts)

    def is_remarked(**parameters: Any) -> bool:
        found = inspected(runs.recipe(targets, **parameters), tmp_path)
        return any("adds up task vectors" in remark for remark in found["remarks"])

    assert is_remarked() == is_remarked(granularity="parameter") == added_up
    assert not is_remarked(granularity="model")
    assert not is_remarked(**{"lambda": 0.5})
    assert is_remarked(**{"lambda": 2.0}) == added_up


def test_weights_of_1_are_not_remarked_if_both_targets_moved(mistral: Family, tmp_path: Path) -> None:
    text = runs.recipe(mistral, normalization="softmax", temperature=1e-9)
    found = inspected(text, tmp_path)
    assert all(max(of["weight"] for of in unit["targets"].values()) > 0.99 for unit in found["units"]["recipe"])
    assert not found["remarks"]


def test_a_finished_merge_tells_its_own_weights(mistral: Family, tmp_path: Path) -> None:
    merged = runs.merge(runs.recipe(mistral, granularity="layer"), tmp_path / "out")
    for path in (merged.folder, merged.folder / "varm_weights.json"):
        found = inspect(path, QUIET)
        assert found["units"] == {"recipe": merged.log["units"]}
        assert found["targets"] == merged.log["targets"]


# What cannot be inspected


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        inspect(path, QUIET)
    return str(error.value)


def test_what_cannot_be_inspected_is_reported(mistral: Family, tmp_path: Path) -> None:
    assert "has no varm_weights.json: it was not merged by varm" in refused(tmp_path)
    path = tmp_path / "varm_weights.json"
    path.write_text("{}")
    assert "is not the varm_weights.json of a merge by varm" in refused(path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(mistral, granularty="layer").replace("base_model", "base_modle"))
    said = refused(recipe)
    assert said.startswith(f"{recipe} cannot be inspected, it has 3 problems:")
    assert "did you mean `granularity`?" in said
    recipe.write_text(runs.recipe(mistral).replace("varm", "linear"))
    assert "does not merge by `varm`" in refused(recipe)
    merged = runs.merge(runs.recipe(mistral), tmp_path / "out")
    with pytest.raises(UserError, match="has the weights of one merge"):
        inspect(merged.folder, QUIET, ("layer",))


@pytest.mark.parametrize(
    "damage",
    [
        {"units": []},
        {"units": 3},
        {"units": [{"unit": "model"}]},
        {"targets": []},
        {"targets": ["another"]},
        {"versions": "1.0"},
        {"recipe": "recipe.yaml"},
    ],
    ids=str,
)
def test_weights_of_a_merge_that_were_damaged_are_a_sentence(
    damage: dict[str, Any], mistral: Family, tmp_path: Path
) -> None:
    path = tmp_path / "varm_weights.json"
    units = inspected(runs.recipe(mistral), tmp_path, ("model",))["units"]["model"]
    whole = {"versions": {}, "recipe": {"sha256": "", "content": {}}, "base_model": "pivot", "units": units}
    whole["targets"] = [str(target) for target in mistral.targets]
    path.write_text(json.dumps(whole))
    assert inspect(path, QUIET)["units"] == {"recipe": units}
    path.write_text(json.dumps(whole | damage))
    assert "is not the varm_weights.json of a merge by varm" in refused(path)
    units[0]["targets"][str(mistral.targets[0])]["weight"] = float("nan")
    path.write_text(json.dumps(whole))
    assert "contains NaN or Inf" in refused(path)


def test_models_of_two_architectures_are_a_sentence(family: Callable[..., Family], tmp_path: Path) -> None:
    recipe, (target, _) = tmp_path / "recipe.yaml", family("llama").targets
    recipe.write_text(runs.recipe(family("mistral")) + f"  - model: {target}\n")
    assert f"{target} is a LlamaForCausalLM" in refused(recipe)


def test_a_target_with_nan_is_named(mistral: Family, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in mistral.targets[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(mistral).replace(str(mistral.targets[0]), str(broken)))
    assert f"NaN in tensor `model.layers.1.mlp.up_proj.weight` of target {broken}" in refused(recipe)


# The command


def test_the_command_prints_tables_and_json(family: Callable[..., Family], tmp_path: Path) -> None:
    members = family("llama", targets=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(members))
    names = [target.name for target in members.targets]
    done = CliRunner().invoke(main, ["inspect", str(recipe), "--quiet", "--granularity", "layer", "--top", "2"])
    assert done.exit_code == 0, done.output
    head, *_, row = done.stdout.partition("weights, layer\n")[2].split("\n\n")[0].splitlines()
    assert head.split() == ["unit", *names]
    found = inspect(recipe, QUIET, ("layer",))
    last = by_name(found["units"]["layer"])[row.split()[0]]
    assert row.split()[1:] == [f"{of['weight']:.3f}" for of in last["targets"].values()]
    most = done.stdout.partition("most moved, mean squared delta\n")[2].split("\n\n")[0].splitlines()
    moves = {t["tensor"]: max(of["mean_squared_delta"] for of in t["targets"].values()) for t in found["tensors"]}
    assert [line.split()[0] for line in most[1:]] == sorted(moves, key=moves.__getitem__, reverse=True)[:2]
    done = CliRunner().invoke(main, ["inspect", str(recipe), "--quiet", "--granularity", "layer", "--json"])
    assert json.loads(done.stdout) == json.loads(json.dumps(found))


def test_on_a_terminal_the_tables_are_drawn_and_a_mistake_is_a_sentence(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = runs.merge(runs.recipe(mistral, granularity="model"), tmp_path / "out")
    shown, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        main(["inspect", str(merged.folder)], standalone_mode=False)
    text = os.read(shown, 1 << 16).decode()
    assert "weights, recipe" in text
    assert "─" in text
    done = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: `{tmp_path}` has no varm_weights.json")


def test_the_picture_has_a_cell_for_each_unit(family: Callable[..., Family], tmp_path: Path) -> None:
    members = family("llama", targets=3)
    recipe, png = tmp_path / "recipe.yaml", tmp_path / "weights.png"
    recipe.write_text(runs.recipe(members))
    arguments = ["inspect", str(recipe), "--quiet", "--granularity", "module", "--png", str(png)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert png.read_bytes().startswith(b"\x89PNG")
    units = inspect(recipe, QUIET, ("module",))["units"]["module"]
    places = grid([units])
    weights = picture.weights(places, units, str(members.targets[1]))
    assert np.isfinite(weights).sum() == len(units)
    assert places.columns == ["model.layers.0", "model.layers.1"]
    assert {"self_attn", "mlp", "lm_head", "model.norm"} <= set(places.rows)
    units_by_name = by_name(units)
    for unit, row, column in (("model.layers.1.mlp", "mlp", 1), ("lm_head.weight", "lm_head", -1)):
        expected = units_by_name[unit]["targets"][str(members.targets[1])]["weight"]
        assert weights[places.rows.index(row), column] == expected
    done = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "nowhere" / "weights.png")])
    assert done.exit_code == 1
    assert "weights.png` cannot be written" in done.output


def test_the_picture_has_expert_2_above_expert_10() -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (10, 2)]
    rows = grid([[{"unit": name} for name in names]]).rows
    assert rows == ["mlp.experts.2.up_proj", "mlp.experts.10.up_proj"]


def test_the_command_reports_what_cannot_be_inspected_in_a_sentence(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, flags, message in (
        (
            runs.recipe(mistral),
            ["--device", "cudaa"],
            "the device `cudaa` cannot be used: Expected one of",
        ),
        (runs.recipe(mistral).replace("varm", "tise"), [], "`varm-merge check` checks"),
    ):
        recipe.write_text(text)
        done = CliRunner().invoke(main, ["inspect", str(recipe), *flags])
        assert (done.exit_code, message in done.stderr) == (1, True), done.stderr
    done = CliRunner().invoke(main, ["inspect", str(mistral.pivot)])
    assert "has no varm_weights.json: it was not merged by varm" in done.stderr


def test_a_granularity_is_shown_once(mistral: Family, tmp_path: Path) -> None:
    found = inspected(runs.recipe(mistral), tmp_path)
    titles = [title.partition(":")[0] for title, *_ in tables(found) if title.startswith("weights")]
    assert titles == [f"weights, {g}" + ", as the recipe says" * (g == "matrix") for g in GRANULARITIES]
