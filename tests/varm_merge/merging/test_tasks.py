"""Units that span tensors are measured before they are merged, in a stream; a run that fails leaves nothing."""

import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import runs
import tiny_models
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.architecture import ConfiguredModuleArchitecture, WeightInfo, get_architecture_info
from mergekit.architecture.json_definitions import JsonLayerTemplates, JsonModuleArchDef, JsonModuleArchitecture
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.run_yaml import main as mergekit_yaml
from tiny_models import Family

from varm_common.errors import UserError
from varm_merge.merging import method
from varm_merge.merging.planning import planned_blocks
from varm_merge.merging.tasks import MergeTensor

UNITS = {"model": runs.whole_model, "layer": runs.LAYER, "module": runs.MODULE}


class Watch:
    """What a run does, in order: (``measure`` or ``merge``, tensor); and how many loaded tensors are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.alive = 0
        self.most_alive = 0

        def after(owner: Any, name: str, happened: Callable[..., None]) -> None:
            function = getattr(owner, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                result = function(*arguments, **options)
                happened(result, *arguments)
                return result

            monkeypatch.setattr(owner, name, watched)

        after(LoadTensor, "execute", self._loaded)
        after(method, "tensor_statistics", lambda _, group, *_more: self._add("measure", group.metadata.name))
        after(MergeTensor, "execute", lambda _, task, *_more: self._add("merge", task.output_weight.name))

    def _loaded(self, tensor: torch.Tensor, _task: LoadTensor) -> None:
        if tensor.is_meta:  # of the check, which reads no weights
            return
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._dropped)

    def _dropped(self) -> None:
        self.alive -= 1

    def _add(self, event: str, tensor: str) -> None:
        self.events.append((event, tensor))


@pytest.mark.parametrize("granularity", UNITS)
def test_a_unit_is_measured_as_a_whole_before_any_of_it_is_merged(
    granularity: str, mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    runs.merge(runs.recipe(mistral, granularity=granularity), tmp_path)
    unit_of = UNITS[granularity]
    merged: set[str] = set()
    for event, tensor in watch.events:
        if event == "merge":
            merged.add(unit_of(tensor))
        assert event == "merge" or unit_of(tensor) not in merged
    several = [t for t in runs.checkpoint(mistral.pivot) if unit_of(t) != t and "layernorm" not in unit_of(t)]
    assert sorted(tensor for event, tensor in watch.events if event == "measure") == sorted(several)


def test_a_run_holds_one_tensor_of_each_model_at_a_time(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    runs.merge(runs.recipe(mistral, granularity="model"), tmp_path)
    assert watch.most_alive == 1 + len(mistral.targets)
    assert watch.alive == 0


def test_layers_are_measured_and_merged_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that has just been measured is still in the page cache when it is merged."""
    checkpoints = tiny_models.save_family(tmp_path / "deep", "mistral", num_hidden_layers=4)
    watch = Watch(monkeypatch)
    runs.merge(runs.recipe(checkpoints, granularity="layer"), tmp_path / "out")
    steps = [(event, runs.LAYER(tensor)) for event, tensor in watch.events if "layers" in tensor]
    expected = [(event, f"model.layers.{layer}") for layer in range(4) for event in ("measure", "merge")]
    assert list(dict.fromkeys(steps)) == expected


def new_planner(checkpoints: Family, granularity: str) -> MergePlanner:
    text = runs.recipe(checkpoints, granularity=granularity)
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    LoaderCache().setup(options)
    architecture = get_architecture_info(configuration, options)
    out_config = transformers.AutoConfig.from_pretrained(checkpoints.pivot)
    return MergePlanner(configuration, architecture, options, out_config)


def calls_to_plan(checkpoints: Family, granularity: str) -> int:
    """How many Python functions are called to plan a run and to put its tasks in order."""
    planner = new_planner(checkpoints, granularity)
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        Executor(planner.plan_to_disk("never_written"))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.slow
def test_the_cost_of_planning_grows_with_the_number_of_tensors_and_no_faster(tmp_path: Path) -> None:
    calls = {}
    for layers in (6, 24):  # 57 and 219 tensors
        checkpoints = tiny_models.save_family(tmp_path / f"{layers}", "mistral", num_hidden_layers=layers)
        for granularity in ("model", "layer", "matrix"):
            calls[layers, granularity] = calls_to_plan(checkpoints, granularity)
    for granularity in ("model", "layer", "matrix"):
        assert calls[24, granularity] < 4.5 * calls[6, granularity]
        assert calls[24, granularity] < 1.4 * calls[24, "matrix"]


def test_a_target_that_mergekit_lost_is_an_error_and_not_a_smaller_merge(mistral: Family) -> None:
    """Under --multi-gpu mergekit may recompute a task from inputs whose values it has thrown away."""
    tasks = new_planner(mistral, "layer").plan_to_disk("never_written")
    merge = next(task.tensor_task for task in tasks if task.tensor_name == "model.norm.weight")
    tensors = {model: torch.ones(16) for model in merge.model_order[1:]}
    with pytest.raises(UserError, match=f"`model.norm.weight` of {merge.model_order[0]}"):
        merge.execute(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix", "parameter"])
@pytest.mark.parametrize("options", [{}, {"out_shard_size": 2000}], ids=["one_shard", "many_shards"])
def test_a_damaged_target_ends_the_run_and_leaves_no_folder(
    options: dict[str, int], granularity: str, value: float, mistral: Family, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints = tiny_models.damaged(mistral, tmp_path / "damaged", name, value)
    kind = "NaN" if value != value else "Inf"
    with pytest.raises(UserError, match=f"{kind} in tensor `{name}` of target {checkpoints.targets[1]}"):
        runs.merge(runs.recipe(checkpoints, granularity=granularity), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_damaged_pivot_is_named_as_such(mistral: Family, tmp_path: Path) -> None:
    swapped = Family(mistral.targets[0], (mistral.pivot,))
    pivot = tiny_models.damaged(swapped, tmp_path / "damaged", "model.norm.weight", float("nan")).targets[0]
    with pytest.raises(UserError, match=f"NaN in tensor `model.norm.weight` of the pivot {pivot}"):
        runs.merge(runs.recipe(Family(pivot, mistral.targets), granularity="model"), tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_run_leaves_an_earlier_merge_as_it_was(mistral: Family, tmp_path: Path) -> None:
    """mergekit writes under names of its own until it is done; those shards are removed."""
    out = tmp_path / "out"
    runs.merge(runs.recipe(mistral, granularity="layer"), out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    checkpoints = tiny_models.damaged(mistral, tmp_path / "damaged", "lm_head.weight", float("nan"))
    with pytest.raises(UserError):
        runs.merge(runs.recipe(checkpoints, granularity="layer"), out, out_shard_size=2000)
    assert contents(out) == before


def test_a_finished_merge_leaves_no_weights_of_an_earlier_one(mistral: Family, tmp_path: Path) -> None:
    """An index of old shards beside ``model.safetensors`` makes transformers and mergekit read different files."""
    out = tmp_path / "out"
    runs.merge(runs.recipe(mistral, granularity="layer"), out, out_shard_size=2000)
    (out / "notes.txt").write_text("mine")
    (out / "model-7.safetensors").write_text("of a merge that was killed")
    for options in ({}, {"out_shard_size": 9000}, {"out_shard_size": 2000}):
        merged = runs.merge(runs.recipe(mistral, granularity="matrix"), out, **options)
        fresh = runs.merge(runs.recipe(mistral, granularity="matrix"), tmp_path / str(options), **options)
        assert {*contents(out)} == {*contents(fresh.folder), "notes.txt"}
        assert merged.tensors.keys() == fresh.tensors.keys()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_what_fails_after_the_weights_leaves_nothing_half(
    what: str, earlier: bool, mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights beside the config of an earlier merge would load, as neither of the two."""
    checkpoints = Family(shutil.copytree(mistral.pivot, tmp_path / "pivot"), mistral.targets)
    tiny_models.train_tokenizer(checkpoints.pivot, "the cat sat on the mat")
    out = tmp_path / "deep" / "out"
    if earlier:
        runs.merge(runs.recipe(mistral, granularity="layer"), out, out_shard_size=2000)
        (out / "notes.txt").write_text("mine")
    before = contents(out) if earlier else None
    recipe = runs.recipe(checkpoints, "tokenizer: {source: base}", granularity="matrix")

    owner = {"config": transformers.MistralConfig, "tokenizer": transformers.PreTrainedTokenizerFast}[what]
    save: Callable[..., Any] = owner.save_pretrained

    def save_unless_full(self: Any, folder: str, **options: Any) -> Any:
        if any(Path(folder).glob("*.safetensors")):
            raise OSError(28, "No space left on device")
        return save(self, folder, **options)

    monkeypatch.setattr(owner, "save_pretrained", save_unless_full)
    with pytest.raises(OSError, match="No space left"):
        runs.merge(recipe, out)
    assert (contents(out) if out.exists() else None) == before
    assert (tmp_path / "deep").exists() == earlier


def test_mergekit_pytorch_writes_weights_and_leaves_the_config(mistral: Family, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    out.mkdir()
    shutil.copy(mistral.pivot / "config.json", out)
    files = [path / "model.safetensors" for path in (mistral.pivot, *mistral.targets)]
    recipe.write_text(runs.recipe(Family(files[0], tuple(files[1:])), granularity="layer"))
    done = CliRunner().invoke(mergekit_pytorch, [str(recipe), str(out)])
    assert done.exit_code == 0, done.output
    assert {*contents(out)} == {"config.json", "model.safetensors", "varm_weights.json"}
    assert (out / "config.json").read_bytes() == (mistral.pivot / "config.json").read_bytes()


def test_a_refused_recipe_leaves_an_earlier_merge_as_it_was(mistral: Family, tmp_path: Path) -> None:
    earlier = runs.merge(runs.recipe(mistral, granularity="layer"), tmp_path / "out")
    for wrong in ({"granularty": "layer"}, {"granularity": [{"filter": "none", "value": "layer"}]}):
        with pytest.raises(UserError):
            runs.merge(runs.recipe(mistral, **wrong), tmp_path / "out")
    assert runs.read(tmp_path / "out").log == earlier.log


def test_an_error_of_mergekit_leaves_no_folder_either(mistral: Family, tmp_path: Path) -> None:
    incomplete = shutil.copytree(mistral.targets[1], tmp_path / "incomplete")
    tiny_models.edit(incomplete, lambda tensors: tensors.pop("model.norm.weight"))
    text = runs.recipe(Family(mistral.pivot, (mistral.targets[0], incomplete)), granularity="layer")
    with pytest.raises(UserError, match=r"has no `model\.norm\.weight`, which mergekit requires"):
        runs.merge(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_v_shows_where_an_unexpected_error_was_raised(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("something odd")

    monkeypatch.setattr(MergeTensor, "execute", fail)
    (tmp_path / "recipe.yaml").write_text(runs.recipe(mistral))
    command = [str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]
    for options, shown in ([], False), (["-v"], True):
        result = CliRunner().invoke(mergekit_yaml, [*command, *options])
        assert result.exit_code == 1
        assert "was not merged: RuntimeError: something odd (-v shows where)" in result.output
        assert ("Traceback" in result.output) == shown
    assert not (tmp_path / "out").exists()


def test_layers_whose_names_share_no_path_of_their_own_are_units_of_their_own(mistral: Family) -> None:
    planner = new_planner(mistral, "layer")
    planner._plan()
    weights = [WeightInfo(name=f"model.{part}.${{layer_index}}.weight") for part in ("attention", "mlp")]
    definition = JsonModuleArchDef(
        model_type="",
        architectures=[],
        pre_weights=[],
        layer_templates=JsonLayerTemplates(weights=weights),
        post_weights=[],
        num_layers_config_key="num_hidden_layers",
    )
    architecture = ConfiguredModuleArchitecture(
        info=JsonModuleArchitecture(definition=definition), config=planner.out_model_config
    )
    planner._out_module_arch = lambda _module: architecture
    blocks = planned_blocks(planner)
    assert blocks["model.attention.0.weight"] == blocks["model.mlp.0.weight"]
    assert blocks["model.attention.1.weight"] == blocks["model.mlp.1.weight"]
    assert blocks["model.attention.0.weight"] != blocks["model.attention.1.weight"]
