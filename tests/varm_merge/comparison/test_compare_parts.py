"""The parts of ``varm-merge compare``: recipes of methods, distances, records, measuring, the command line."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mergekit.merge
import numpy as np
import pytest
import tiny_models
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions
from runs import checkpoint
from safetensors.torch import save_file
from tiny_models import Family

import varm_merge.merging.method  # noqa: F401  registers varm
from varm_common import process_usage as measure
from varm_common.errors import UserError
from varm_common.files import write_file
from varm_common.process_usage import CommandError, Run, measured
from varm_common.tables import short_names
from varm_merge.cli import main
from varm_merge.comparison.cache import Steps, demand_folder, exclusive, state_of
from varm_merge.comparison.distances import distances, moved_layers
from varm_merge.comparison.inputs import model_state
from varm_merge.comparison.recipes import Entry, check, entries, family
from varm_merge.comparison.scores import Scorers
from varm_merge.comparison.suites import Task
from varm_merge.comparison.tasks import Tasks
from varm_merge.merging.lineage import Place, weights_fingerprint

METHODS = sorted(one.spec.name for one in registered_methods())
OF_TWO_MODELS = {"slerp", "nearswap", "arcee_fusion"}
FITS = {
    1: {*METHODS} - {"nuslerp", "model_stock"},
    2: {*METHODS} - {"passthrough"},
    3: {*METHODS} - {"passthrough", "nuslerp", *OF_TWO_MODELS},
}
"""The methods that merge so many targets, by mergekit's contracts."""


# Recipes of methods


def of_methods(methods: list[str], base: Path, targets: list[Path], folder: Path) -> list[Entry]:
    found = entries([], methods, str(base), [str(target) for target in targets], folder)
    for entry in found:
        check(entry, None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_every_method_that_fits_gets_a_sound_recipe_and_the_others_a_reason(
    targets: int, family: Callable[..., Family], tmp_path: Path
) -> None:
    members = family("llama", targets=3)
    found = of_methods(METHODS, members.pivot, list(members.targets[:targets]), tmp_path)
    assert {entry.name for entry in found if not entry.problems} == FITS[targets]
    for entry in found:
        assert entry.path.read_text() == entry.text
        assert all("requires" in problem for problem in entry.problems), entry.problems
    if targets == 3:
        (slerp,) = [entry for entry in found if entry.name == "slerp"]
        assert slerp.problems[0].endswith("got 4; multislerp and karcher merge more than two")


def test_targets_that_tell_their_pivot_may_be_interpolated_without_it(mistral: Family, tmp_path: Path) -> None:
    pivot = {"model": str(mistral.pivot), "weights": weights_fingerprint(Place(str(mistral.pivot)))}
    targets = [shutil.copytree(target, tmp_path / target.name) for target in mistral.targets]
    for target in targets:
        (target / "fusion.json").write_text(json.dumps({"pivot": pivot}))
    found = of_methods(["slerp", "ties"], mistral.pivot, targets, tmp_path)
    assert [entry.problems for entry in found] == [[], []]
    foreign = of_methods(["ties"], mistral.targets[0], targets, tmp_path)
    assert "was fine-tuned from" in foreign[0].problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(FITS[2]))
def test_the_published_settings_merge_two_targets(
    method: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    members = family("llama", targets=3)
    (entry,) = of_methods([method], members.pivot, list(members.targets[:2]), tmp_path)
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    out = tmp_path / "out"
    mergekit.merge.run_merge(MergeConfiguration.model_validate(entry.content), str(out), options=options)
    assert all(np.isfinite(tensor).all() for tensor in checkpoint(out).values())


PARAMETERS = {
    "karcher:max_iter=20": {"max_iter": 20},
    "ram:epsilon=1e-3": {"epsilon": 0.001},
    "ramplus_tl:r=0.2:epsilon=1e-3": {"r": 0.2, "epsilon": 0.001},
    "model_stock:filter_wise=true": {"filter_wise": True},
    "della:density=0.6": {"weight": 1.0, "density": 0.6, "normalize": True},
    "nuslerp:nuslerp_row_wise=true": {"weight": 1.0, "nuslerp_row_wise": True},
    "task_arithmetic:lambda=0": {"weight": 0.4, "lambda": 0.0},
    "varm:layer:select_topk=0.5": {"granularity": "layer", "select_topk": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PARAMETERS)
def test_a_method_gets_the_parameters_that_it_declares(
    method: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    members = family("llama", targets=3)
    targets = list(members.targets[: 3 if "model_stock" in method else 2])
    found = of_methods([method, method.partition(":")[0]], members.pivot, targets, tmp_path)
    assert [entry.problems for entry in found] == [[], []]
    assert found[0].content["parameters"] == PARAMETERS[method]
    assert found[0].name == method.replace(":", "-")
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    merged = []
    for number, one in enumerate(found):
        config = MergeConfiguration.model_validate(one.content)
        mergekit.merge.run_merge(config, str(tmp_path / str(number)), options=options)
        merged.append(checkpoint(tmp_path / str(number)))
    if not method.startswith(("karcher", "model_stock", "nuslerp")):  # these may find the same
        assert any(not np.array_equal(merged[0][name], merged[1][name]) for name in merged[0])
    if "lambda=0" in method:
        pivot = checkpoint(members.pivot)
        assert all(np.allclose(merged[0][name], pivot[name], atol=1e-7) for name in pivot)


def test_sce_is_given_the_share_of_elements_that_was_published(mistral: Family, tmp_path: Path) -> None:
    (sce,) = of_methods(["sce"], mistral.pivot, list(mistral.targets), tmp_path)
    assert sce.content["parameters"] == {"select_topk": 0.1}  # 10 % in FuseChat-7B v2


def test_a_recipes_models_and_its_other_keys_are_taken_for_methods(mistral: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    models = [{"model": str(target)} for target in mistral.targets]
    content = {"merge_method": "varm", "base_model": str(mistral.pivot), "models": models, "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(content))
    methods = ["ties", "varm:layer", "ties:lambda=0.8", "varm:layer:lambda=1.5"]
    found = entries([recipe], methods, None, [], tmp_path / "recipes")
    assert [entry.name for entry in found] == [
        "mine",
        "ties",
        "varm-layer",
        "ties-lambda=0.8",
        "varm-layer-lambda=1.5",
    ]
    ties, layer, scaled, both = (one.content for one in found[1:])
    assert scaled["parameters"] == {"weight": 1.0, "density": 0.2, "lambda": 0.8}
    assert both["parameters"] == {"granularity": "layer", "lambda": 1.5}
    assert (ties["base_model"], ties["models"], ties["dtype"]) == (str(mistral.pivot), models, "bfloat16")
    assert ties["parameters"] == {"weight": 1.0, "density": 0.2}
    assert layer["parameters"] == {"granularity": "layer"}


def entry(tmp_path: Path, name: str, **content: Any) -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_pivot_is_the_base_model_that_is_not_merged_itself(tmp_path: Path) -> None:
    models = [{"model": "a"}, {"model": "b"}]
    slerp = entry(tmp_path, "slerp", merge_method="slerp", base_model="a", models=models)
    varm = entry(tmp_path, "varm", merge_method="varm", base_model="p", models=models)
    sliced = entry(
        tmp_path, "s", merge_method="linear", slices=[{"sources": [{"model": "c", "layer_range": [0, 1]}]}]
    )
    both = entries([slerp, varm, sliced], [], None, [], tmp_path)
    assert (family(both).pivot, family(both).targets) == ("p", ("a", "b", "c"))
    assert family(both[:1]).pivot == "a"
    assert family(both, "b").targets == ("a", "c")
    other = entries([varm, entry(tmp_path, "o", base_model="q", models=models)], [], None, [], tmp_path)
    with pytest.raises(UserError, match="the pivot is one of p or q: give the model"):
        family(other)
    with pytest.raises(UserError, match="name no base_model: give the model"):
        family(both[2:])


def test_two_names_of_one_folder_are_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p", "a"):
        Path(name).mkdir()
    one = entry(tmp_path, "one", base_model="./p", models=[{"model": "a"}, {"model": "p"}])
    two = entry(tmp_path, "two", base_model="./p", models=[{"model": "./a/"}])
    found = entries([one, two], [], None, [], tmp_path)
    assert family(found).targets == ("a",)


def test_models_are_named_by_the_fewest_last_parts_of_their_paths_that_differ() -> None:
    assert short_names(["x/a", "x/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    assert short_names(["x/ties", "x/b"], taken=["ties"]) == ["x/ties", "x/b"]


@pytest.mark.parametrize("name", ["...yaml", "..yaml", ".yaml", ".hidden.yaml", "a\\..\\b.yaml"])
def test_a_recipe_whose_name_could_be_no_folders_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("merge_method: linear\n")
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["compare", str(tmp_path / name), "--out", str(out)])
    assert done.exit_code == 1
    assert "cannot be the folder of a merged model; rename the file" in done.output
    assert not (out / "models").exists()


def test_recipes_of_one_name_are_named_with_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    paths = [entry(folder, "a", merge_method="linear") for folder in (tmp_path, tmp_path / "b")]
    found = entries([Path("../a.yaml"), Path("a.yaml")], [], None, [], tmp_path)
    assert [one.name for one in found] == [f"{path.parent.name}-a" for path in paths]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "nothing to compare: give recipes, or --methods with --base and --models", 1),
        (["--methods", "tiess", "--base", "p", "--models", "a"], "mergekit knows no method `tiess`", 1),
        (["--methods", "linaer", "--base", "p", "--models", "a"], "no method `linaer`; did you mean `linear`?", 1),
        (["--methods", "xyz", "--base", "p", "--models", "a"], "no method `xyz`; known are arcee_fusion, ", 1),
        (["--methods", "varm:layers", "--base", "p", "--models", "a"], "`varm:layers` is not a method", 1),
        (
            ["--methods", "della:densty=1", "--base", "p", "--models", "a"],
            "--methods: `della` has no parameter `densty`; did you mean `density`?",
            1,
        ),
        (
            ["--methods", "arcee_fusion:t=1", "--base", "p", "--models", "a"],
            "--methods: `arcee_fusion` has no parameter `t`; it has none",
            1,
        ),
        (
            ["--methods", "karcher:max_iter=ten", "--base", "p", "--models", "a"],
            "--methods: `karcher` does not take max_iter=`ten`: Input should be a valid integer",
            1,
        ),
        (["--methods", "ties", "--models", "a"], "--models needs --base", 1),
        (["--methods", "ties"], "--methods needs models", 1),
        (["--models", "a"], "--models needs --methods", 2),
        (["--template", "chatml"], "--template needs --held-out", 2),
        (["nowhere.yaml"], "'nowhere.yaml' does not exist", 2),
        (["--quiet", "--verbose"], "--quiet or --verbose, not both", 2),
    ],
)
def test_a_comparison_that_cannot_start_ends_in_a_sentence(
    arguments: list[str], message: str, code: int, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, ["compare", "--out", str(tmp_path / "out"), *arguments])
    assert message in done.output
    assert done.exit_code == code


def test_if_no_recipe_can_be_merged_every_problem_is_listed(tmp_path: Path) -> None:
    bad, typo = tmp_path / "bad.yaml", tmp_path / "typo.yaml"
    bad.write_text("merge_method: [\n")
    typo.write_text("merge_method: tiess\nmodels: []\n")
    done = CliRunner().invoke(main, ["compare", str(bad), str(typo), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "bad: line 2: not valid YAML" in done.output
    assert "typo: line 1: mergekit knows no method `tiess`" in done.output
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    done = CliRunner().invoke(main, ["compare", "--out", str(tmp_path), "--methods", "ties"])
    assert "is not empty and holds no comparison" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("marker", [".lock", ".varm-merge-compare"])
def test_only_the_marker_with_its_text_makes_a_folder_a_comparisons(marker: str, tmp_path: Path) -> None:
    (tmp_path / marker).write_text("of another program")
    (tmp_path / "thesis.md").write_text("mine")
    done = CliRunner().invoke(main, ["compare", "--out", str(tmp_path), "--methods", "ties"])
    assert "is not empty and holds no comparison" in done.output
    (tmp_path / "thesis.md").rename(tmp_path.parent / "thesis.md")
    (tmp_path / marker).unlink()
    (tmp_path / ".varm-merge-compare").touch()  # as if killed before it was written
    demand_folder(tmp_path)
    with exclusive(tmp_path):
        pass
    (tmp_path / "report.json").touch()
    demand_folder(tmp_path)


@dataclass
class Merging:
    """Comparisons by ``linear``, or ``recipe``, whose merges copy the pivot in place of mergekit."""

    members: Family
    folder: Path
    commands: list[list[str]] = field(default_factory=list)

    def measured(self, command: list[str], **_options: Any) -> Run:
        self.commands.append(command)
        own = command.index("--quiet") - 1
        shutil.copytree(self.members.pivot, command[own])
        return Run(1.0, 1.0, 1.0)

    def compare(self, *options: str, recipe: Path | None = None) -> Result:
        """Merges, and the commands that it ran in ``commands``."""
        self.commands.clear()
        targets = [part for target in self.members.targets for part in ("--models", str(target))]
        what = [str(recipe)] if recipe else ["--methods", "linear", *targets]
        out = ["--base", str(self.members.pivot), "--out", str(self.folder)]
        return CliRunner().invoke(main, ["compare", *what, *out, *options])


@pytest.fixture
def merging(mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merging:
    found = Merging(mistral, tmp_path / "out")
    monkeypatch.setattr("varm_merge.comparison.runner.measured", found.measured)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-keep"]])
def test_a_folder_of_the_users_among_the_models_stays(options: list[str], merging: Merging) -> None:
    with exclusive(merging.folder):
        thesis = merging.folder / "models" / "linear" / "thesis.md"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    done = merging.compare(*options)
    assert (done.exit_code, merging.commands) == (1, [])
    assert f"`{thesis.parent}` holds no merged model; move it away, or give another --out" in done.output
    assert thesis.read_text() == "mine"
    thesis.rename(merging.folder / "thesis.md")
    assert merging.compare("--no-keep").exit_code == 0
    assert not thesis.parent.exists()
    thesis.parent.mkdir()
    thesis.write_text("mine")
    merging.compare("--no-keep")
    assert thesis.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ({"tokenizer_source": "{own}"}, "own/tokenizer.json"),
        ({"tokenizer": {"source": "{own}"}}, "own/tokenizer.json"),
        ({"tokenizer": {"tokens": {"x": {"source": "{own}"}}}}, "own/tokenizer.json"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "{own}", "token_id": 1}}}}},
            "own/tokenizer.json",
        ),
        ({"slices": [{"base_model": "{base}"}]}, "base/config.json"),
        ({"models": [{"model": "{pivot}+{own}"}]}, "own/adapter_config.json"),
        ({"models": [{"model": {"model": "{pivot}", "lora": "{own}"}}]}, "own/adapter_config.json"),
    ],
)
def test_a_merge_depends_on_every_model_that_its_recipe_names(
    named: dict[str, Any], changed: str, merging: Merging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varm_merge.comparison.recipes.check_recipe", lambda *_, **__: [])
    pivot, target = (str(model) for model in (merging.members.pivot, merging.members.targets[0]))
    (tmp_path / "own").mkdir()
    for name in ("tokenizer.json", "adapter_config.json"):
        (tmp_path / "own" / name).write_text("{}")
    shutil.copytree(merging.members.targets[1], tmp_path / "base")
    text = json.dumps(named).replace("{pivot}", pivot)
    own = json.loads(text.replace("{own}", str(tmp_path / "own")).replace("{base}", str(tmp_path / "base")))
    if "slices" in own:
        own["slices"][0]["sources"] = [{"model": target, "layer_range": [0, 1]}]
    content = {"merge_method": "linear", "base_model": pivot, "models": [{"model": target}], **own}
    if "slices" in own:
        del content["models"]
    recipe = entry(tmp_path, "mine", **content)
    for merges in (1, 0):
        done = merging.compare(recipe=recipe)
        assert len(merging.commands) == merges, done.output
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    done = merging.compare(recipe=recipe)
    assert "mine: merged again, because of other inputs" in done.output
    assert len(merging.commands) == 1


@pytest.mark.slow
def test_another_seed_is_given_to_mergekit_and_merges_again(merging: Merging) -> None:
    for seed, merges in (("0", 1), ("0", 0), ("7", 1), ("7", 0)):
        done = merging.compare("--seed", seed)
        assert len(merging.commands) == merges, done.output
        for command in merging.commands:
            assert command[command.index("--random-seed") + 1] == seed
    done = merging.compare("--seed", "7", "--mergekit", "--lazy-unpickle")
    assert "linear: merged again, because of other options" in done.output
    assert "--lazy-unpickle" in merging.commands[0]


@pytest.mark.parametrize(("options", "advice"), [([], ", or --no-keep: one model"), (["--no-keep"], "room\n")])
def test_a_disk_without_room_for_the_models_ends_it_before_the_first_merge(
    options: list[str], advice: str, merging: Merging, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("varm_merge.comparison.runner.psutil.disk_usage", lambda _folder: free)
        done = merging.compare(*options)
        assert re.search(
            r"Error: the merged models take about .*kB, `.*` has 1 kB free; give an --out", done.output
        )
        assert advice in done.output
        assert (done.exit_code, merging.commands) == (1, [])
        free.free = 1 << 30
        assert merging.compare(*options).exit_code == 0
    assert len(merging.commands) == 1


def test_two_comparisons_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(UserError, match="another `varm-merge compare` is running in"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varm_merge.comparison.tasks.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'lm-eval\[api\]'"):
        Tasks((Task("arc"),)).demand()


def test_a_tasks_fingerprint_covers_its_data_and_runs_none_of_its_code(tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", tmp_path / "tasks"
    folder.mkdir()
    data.write_text("{}\n")
    (folder / "mine.yaml").write_text(
        f"task: mine\nprocess: !function utils.x\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    (folder / "utils.py").write_text("raise SystemExit\n")

    def about() -> dict[str, Any]:
        return Tasks((Task("mine"),), folder).inputs(Task("mine"))

    first = about()
    assert about() == first
    data.write_text("{}\n{}\n")
    assert about() != first


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ({"include": "../base/common.yaml"}, "base/common.yaml"),
        ({"include": ["../base/common.yaml"]}, "base/utils.py"),
        ({"include": "../base/common.yaml"}, "base/more.yaml"),
        ({"include": "../base/common.yaml"}, "included.jsonl"),
        ({"dataset_path": "data"}, "data/deep/test.jsonl"),
        ({"dataset_kwargs": {"data_dir": "data"}}, "data/deep/test.jsonl"),
        ({"dataset_kwargs": {"data_files": {"test": ["data/*/te*.jsonl"]}}}, "data/deep/test.jsonl"),
        ({"dataset_kwargs": {"data_files": "data/**/*.jsonl"}}, "data/deep/test.jsonl"),
        ({"group": "g", "task": [{"task": "x", "dataset_path": "data"}]}, "data/deep/test.jsonl"),
    ],
)
def test_a_tasks_fingerprint_covers_includes_folders_and_patterns(
    named: dict[str, Any], changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("tasks", "base", "data/deep"):
        Path(folder).mkdir(parents=True)
    Path("tasks/mine.yaml").write_text(yaml.safe_dump({"task": "mine", **named}))
    Path("base/common.yaml").write_text("include: more.yaml\n")
    data = "dataset_kwargs: {data_files: {test: included.jsonl}}"
    Path("base/more.yaml").write_text(f"include: common.yaml\n{data}\n")  # in a circle
    for file in ("base/utils.py", "included.jsonl", "data/deep/test.jsonl"):
        Path(file).write_text("{}\n")

    def about(task: str) -> dict[str, Any]:
        return Tasks((Task(task),), Path("tasks")).inputs(Task(task))

    first = [about("mine"), about("tasks/mine.yaml")]
    assert [about("mine"), about("tasks/mine.yaml")] == first
    with Path(changed).open("a") as appended:
        appended.write("# changed\n")
    assert all(one != other for one, other in zip([about("mine"), about("tasks/mine.yaml")], first, strict=True))


CHATS = [{"conversations": [{"from": "human", "value": "fox?"}, {"from": "gpt", "value": "the fox jumps"}]}] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "nosuch.jsonl"], "--held-out: no file `nosuch.jsonl`"),
        (["--held-out", "chats.jsonl", "--template", "chatmll"], "--held-out: .*`chatmll`"),
        (["--held-out", "chats.jsonl"], "--held-out: .*template"),
        (
            ["--tasks", "mine,mien", "--include-path", "tasks"],
            r"--tasks: .* no task `mien` \(did you mean `mine`\?\)",
        ),
    ],
)
def test_what_no_model_could_be_scored_on_ends_it_before_the_first_merge(
    options: list[str], message: str, mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.train_tokenizer(shutil.copytree(mistral.pivot, Path("pivot")), "the fox jumps over fox?")
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text("task: mine\ndataset_path: json\noutput_type: multiple_choice\n")
    targets = [part for target in mistral.targets for part in ("--models", str(target))]
    command = ["compare", "--methods", "linear", "--base", "pivot", *targets, "--out", "out", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    (error,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert re.match(f"Error: {message}", error)
    assert done.output.splitlines()[-1] == error
    assert "merging" not in done.output
    assert not Path("out/models").exists()


class Unscored(Scorers):
    """Cannot score a model for want of memory, and does not start what nobody needs."""

    checked: ClassVar[list[str]] = []

    def prepare(self, *_arguments: Any) -> Path:
        raise AssertionError("prepared")

    def check_tasks(self, *_arguments: Any) -> dict[str, Any]:
        self.checked.append("tasks")
        return {"mine": {"folders": [], "runs_code": False}}

    def task(self, *_arguments: Any) -> dict[str, Any]:
        raise CommandError("CUDA out of memory")


def test_without_keep_a_model_that_could_not_be_scored_stays(
    merging: Merging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varm_merge.comparison.runner.Scorers", Unscored)
    done = merging.compare("--no-keep", "--tasks", "mine")
    assert (done.exit_code, len(merging.commands)) == (1, 1)
    assert re.search(r"the models take about \d+(\.\d+)? kB in ", done.output)
    model = merging.folder / "models" / "linear"
    assert f"linear: kept in {model}, because it could not be measured completely" in done.output
    assert (model / "model.safetensors").is_file()
    assert merging.compare("--no-keep", "--tasks", "mine").exit_code == 1
    assert Unscored.checked == ["tasks"]  # known from the first time
    done = merging.compare("--no-keep")
    assert (done.exit_code, merging.commands) == (0, []), done.output
    assert not model.exists()


# Distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_exact_over_shards_and_dtypes(
    dtype: torch.dtype, family: Callable[..., Family], tmp_path: Path
) -> None:
    members = family("mistral", targets=3, dtype=dtype)
    merged = tiny_models.resave(members.targets[2], tmp_path / "merged", shard_size="5KB")
    assert len(list(merged.glob("*.safetensors"))) > 1
    found = distances(merged, members.pivot, {"a": members.targets[0], "same": members.targets[2]})
    arrays = [checkpoint(folder) for folder in (members.pivot, merged, members.targets[0])]
    pivot, model, target = (np.concatenate([one[name].ravel() for name in arrays[0]]) for one in arrays)
    size, moved = np.linalg.norm(pivot), target != pivot
    assert found["pivot"] == pytest.approx(np.linalg.norm(model - pivot) / size, rel=1e-12)
    assert found["targets"]["a"]["distance"] == pytest.approx(np.linalg.norm(model - target) / size, rel=1e-12)
    agree = np.sign((model - pivot)[moved]) == np.sign((target - pivot)[moved])
    assert found["targets"]["a"]["sign_agreement"] == np.mean(agree)
    assert found["targets"]["same"] == {"distance": 0.0, "cosine": pytest.approx(1.0), "sign_agreement": 1.0}
    assert found["not_compared"] == {"tensors": 0, "some": []}


def test_the_pivot_itself_has_no_direction_and_other_shapes_are_counted(mistral: Family, tmp_path: Path) -> None:
    found = distances(mistral.pivot, mistral.pivot, {"t": mistral.targets[0]})
    assert found["pivot"] == 0
    assert found["targets"]["t"]["cosine"] is None
    assert found["targets"]["t"]["sign_agreement"] == 0
    longer = tmp_path / "longer"
    tiny_models.resave(mistral.targets[0], longer)
    embeddings = "model.embed_tokens.weight"

    def lengthen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[embeddings] = torch.cat([tensors[embeddings], torch.ones(1, 16)])
        tensors["new"] = torch.ones(1)

    tiny_models.edit(longer, lengthen)
    found = distances(longer, mistral.pivot, {})
    assert found["not_compared"] == {"tensors": 2, "some": [embeddings, "new"]}


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 2))
def test_slices_are_comparable_only_where_each_layer_keeps_its_place(sizes: list[int], shift: int) -> None:
    ends = np.cumsum([0, *sizes]).tolist()
    ranges = [[first + shift, last + shift] for first, last in itertools.pairwise(ends)]
    recipe = {"slices": [{"sources": [{"model": "p", "layer_range": one}] * 2} for one in ranges]}
    assert (moved_layers(recipe, ends[-1]) is None) == (shift == 0)
    if not shift:
        assert f"it has {ends[-1]} layers, the pivot {ends[-1] + 1}" == moved_layers(recipe, ends[-1] + 1)
    assert moved_layers({"models": []}, 3) is None


# Records


def test_a_record_counts_only_for_what_it_depends_on(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.save("merge", "a/b", {"recipe": "x", "inputs": ["1"]}, {"runs": [1]})
    assert steps.load("merge", "a/b", {"recipe": "x", "inputs": ["1"]}) == {"runs": [1]}
    assert steps.load("merge", "a/b", {"recipe": "y", "inputs": ["1"]}) is None
    assert steps.changed("merge", "a/b", {"recipe": "y", "inputs": ["1"]}) == ["recipe"]
    path = steps.path("merge", "a/b")
    for half in (path.read_text()[:-20], "[]", "", '{"about": 1, "result": 2}'):
        path.write_text(half)
        assert steps.load("merge", "a/b", {"recipe": "x", "inputs": ["1"]}) is None


def test_the_state_of_files_changes_when_one_is_written_or_renamed(tmp_path: Path) -> None:
    file, other = tmp_path / "a.bin", tmp_path / "b.bin"
    file.write_bytes(b"one")
    other.write_bytes(b"other")
    states = [state_of([file, other])]
    assert state_of([other, file]) == states[0]
    file.write_bytes(b"two, longer")
    states.append(state_of([file, other]))
    status = file.stat()
    file.write_bytes(b"another two")  # as long
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    states.append(state_of([file, other]))
    states.append(state_of([file.rename(tmp_path / "c.bin"), other]))
    assert len({*states}) == 4
    with pytest.raises(UserError, match="cannot be read: No such file"):
        state_of([tmp_path / "nowhere"])


def test_a_full_disk_leaves_no_half_file(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(1 << 16)
    write_file(folder / "a.json", "old")
    with pytest.raises(UserError, match=r"a.json` cannot be written: No space left"):
        write_file(folder / "a.json", "x" * (1 << 20))
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    assert (folder / "a.json").read_text() == "old"


# Measuring

ALLOCATE = "import time; x = bytearray({} << 20); time.sleep(0.3)"


@pytest.mark.parametrize("linux", [True, False] if measure.LINUX else [False])
def test_the_peak_is_that_of_a_command_and_its_children(linux: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``linux`` false as it is measured elsewhere, by psutil."""
    monkeypatch.setattr(measure, "LINUX", linux)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE.format(100)!r}])"
    run = measured([sys.executable, "-c", child])
    assert 100 < run.anonymous_mib < 200
    assert run.wall_s > 0.3
    assert run.cpu_s < run.wall_s * 4


@pytest.mark.slow
def test_a_mapped_file_is_no_anonymous_memory(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(200 << 20))
    mapped = f"import mmap, time; f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)"
    read = f"{mapped}; sum(m[::4096]); time.sleep(0.2)"
    assert measured([sys.executable, "-c", read]).anonymous_mib < 60


def test_a_command_that_fails_says_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with pytest.raises(CommandError, match=r"exited 3:\nlast words$"):
        measured([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], log=log)
    assert log.read_text() == "before\nlast words\n"
    with pytest.raises(CommandError, match=r"was ended by signal 9 \(killed, perhaps because memory ran out\)"):
        measured([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(CommandError, match="`/nowhere` cannot be started: No such file"):
        measured(["/nowhere"])


CALLS = """
from pathlib import Path
from varm_common.forked import run_forked, run_module
from varm_common.process_usage import CommandError

if __name__ == "__main__":
    for argument in ("a b", "fail", "kill", "c"):
        try:
            run_forked(run_module, "speaks", argument, log=Path("log.txt"), environment={"WORD": "loud"})
        except CommandError as error:
            print(error)
"""
SPEAKS = """
import os, sys
print("said", *sys.argv[1:], os.environ, os.getppid(), flush=True)
if "kill" in sys.argv: os.kill(os.getppid(), 9)  # the fork server, as if memory was short
if "kill" in sys.argv: sys.stdin.read()
if "fail" in sys.argv: raise ValueError("no")
"""


@pytest.mark.slow
def test_a_module_runs_many_times_and_each_run_fails_alone(tmp_path: Path) -> None:
    for name, text in (("calls.py", CALLS), ("speaks.py", SPEAKS)):
        (tmp_path / name).write_text(text)
    command = [sys.executable, "calls.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.PIPE)
    assert re.fullmatch(
        r"run_module exited 1:\n(.*\n)+ValueError: no\nrun_module exited 255:\nsaid kill .*\n", done.stdout
    ), done.stdout + done.stderr
    said = [line.split() for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("said")]
    assert [words[1] for words in said] == ["a", "fail", "kill", "c"]
    assert said[0][-1] == said[1][-1] == said[2][-1] != said[3][-1]  # forks of one server, then of another
    assert all("environ({'WORD': 'loud'})" in " ".join(words) for words in said)


@pytest.mark.slow
def test_the_benchmarks_measure_by_the_package() -> None:
    folder = Path(__file__).parents[3] / "benchmarks"
    code = "import measure, varm_common.process_usage as own; print(measure.measured is own.measured)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_the_help_has_an_example_for_each_use() -> None:
    text = CliRunner().invoke(main, ["compare", "--help"]).output
    for use in ("--methods varm,varm:layer", "--no-keep", "--tasks hellaswag,mine", "--repeat 5", "--json >"):
        assert use in text


def test_a_snapshot_that_lacks_a_shard_is_downloaded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` downloads the index alone; what the shards are is known only when they are there."""
    repository = tmp_path / "models--me--other"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    shard = "model-00001-of-00001.safetensors"
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    def download(reference: ModelReference, cache_dir: str | None = None, **_: Any) -> str:
        save_file({"a": torch.zeros(1)}, snapshot / shard)
        return str(snapshot)

    monkeypatch.setattr(ModelReference, "local_path", download)
    before = model_state("me/other", str(tmp_path))
    assert (snapshot / shard).is_file()
    assert model_state("me/other", str(tmp_path)) == before
