"""``fusion-trainer run``: a file checked as a whole, its stages, a toy fusion killed, changed and added to.

The stages are the real programs, on a pivot and sources of other architectures and tokenizers.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import runs
import tiny_fusion
import tiny_sources
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from programs import BIN, ENVIRONMENT, Programs, free_port, tree, wait_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusion_trainer.cli import main
from fusion_trainer.errors import FusionError
from fusion_trainer.pipeline import chosen, read_pipeline
from fusion_trainer.stages import Plan, Stage
from varm_merge import recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GROUPED = tiny_fusion.PIVOT
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pivot": ("llama", "sentencepiece_bpe", GROUPED),
    "neox": ("gpt_neox", "byte_level_bpe", tiny_fusion.SMALL),
    "mistral": ("mistral", "unigram", {**GROUPED, "head_dim": 8}),
    "mixtral": ("mixtral", "byte_level_bpe", {**GROUPED, "head_dim": 8}),
}
MERGES: dict[str, Any] = {
    "varm": {"merge_method": "varm", "dtype": "float32"},
    "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
    "slerp": {
        "merge_method": "slerp",
        "targets": ["bytes", "mistral"],
        "parameters": {"t": 0.5},
        "dtype": "float32",
    },
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.6}, "dtype": "float32"},
}
PIPELINE: dict[str, Any] = {
    "work": "work",
    "pivot": "./pivot",
    "data": "chats.jsonl",
    "sources": [{"name": "bytes", "model": "./neox"}, {"model": "./mistral"}],
    "prepare": {"template": "openchat", "max_length": 256},
    "extract": {"top_k": 4, "shard_tokens": 300},
    "align": {"workers": 1},
    "train": {
        "clm_weight": 0.9,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    },
    "merges": MERGES,
    "evaluate": {"data": "held_out.jsonl"},
}
ADDED = {"name": "third", "model": "./mixtral", "dtype": "float32"}
CHATS = tiny_sources.made_up_chats(12, seed=7, words=8, turns=2)
TITLES = [
    "prepare dialogues",
    *(f"extract {name}" for name in ("pivot", "bytes", "mistral")),
    *(f"{kind} {name}" for kind in ("align", "train") for name in ("bytes", "mistral")),
    *(f"merge {name}" for name in MERGES),
    "prepare held_out",
    *(
        f"evaluate {name}"
        for name in ("pivot", "source-bytes", "source-mistral", "target-bytes", "target-mistral")
    ),
    *(f"evaluate merge-{name}" for name in MERGES),
]


def changed(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings with some deep in them replaced, ``train__training__seed=3``; None leaves one out."""
    copy = json.loads(json.dumps(settings))
    for path, value in changes.items():
        *way, name = path.split("__")
        place = copy
        for step in way:
            place = place.setdefault(step, {})
        place[name] = value
        if value is None:
            del place[name]
    return copy


def write(folder: Path, settings: Mapping[str, Any] = PIPELINE, **changes: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(changed(settings, **changes), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, chats and held-out chats; for reading only."""
    folder = tmp_path_factory.mktemp("world")
    for number, (name, (layout, kind, settings)) in enumerate(MODELS.items()):
        tiny_sources.save_source(folder / name, layout, kind, seed=number, **settings)
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    held_out = tiny_sources.made_up_chats(6, seed=8, words=6, turns=1)
    tiny_sources.write_sharegpt(folder / "held_out.jsonl", held_out)
    path = folder / "held_out.jsonl"
    path.write_text(path.read_text().replace("chat-0", "sorting/0").replace("chat-3", "sorting/3"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Future[Programs]"]:
    """The process that is forked for each run imports everything while the file's first tests run."""
    imports = "import fusion_trainer.warm, mergekit.scripts.run_yaml, peft"
    with ThreadPoolExecutor(1) as thread:
        started = thread.submit(Programs, tmp_path_factory.mktemp("programs"), imports)
        yield started
        started.result().end()


@pytest.fixture
def programs(starting: "Future[Programs]") -> Programs:
    return starting.result()


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, and the current folder."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The file


def told(path: Path) -> list[str]:
    """What is wrong with a file."""
    with pytest.raises(FusionError) as error:
        read_pipeline(path)
    head, *problems = str(error.value).splitlines()
    assert head == f"{path} cannot be used:"
    return [problem.strip() for problem in problems]


WRONG = """\
work: work
pivot: ./nowhere
data: [chats.jsonl, missing.jsonl]
sources:
  - {name: bytes, model: ./neox, top_kk: 3}
  - name: bytes
    model: ./gone
    max_length: 128
  - {name: third}
  - {name: a/b, model: ./mistral}
prepare: {template: openchat, max_lenght: 256}
extract: {top_k: 0, model: ./x}
align: {map: best, output: here}
train:
  clm_weight: 1.5
  training:
    learning_rte: 0.1
    output_dir: here
targets:
  bytes: {sources: [bytes, other], sources_: 3}
  ../up: {sources: third}
  clm: {clm_weight: 0.5}
  multi:
    sources: [bytes, third]
    training: {seeed: 1}
merges:
  varm: {merge_method: varm, targets: [nobody]}
  odd: {parameters: {weight: 1}}
  between: {merge_method: slerp, targets: [bytes, multi, clm]}
  weighed: {merge_method: linear, targets: [bytes], model_parameters: {clm: {weight: 1}}, models: [x]}
  empty: {merge_method: linear, targets: []}
evaluate: {data: lost.jsonl, dtype: float8, model: ./x}
launch: {train: no.yaml}
metges: {}
"""
ALL_WRONG = {
    2: "pivot: no model folder `./nowhere`",
    3: "data[1]: no file `missing.jsonl`",
    5: "sources[0].top_kk: unknown setting `top_kk`; did you mean `top_k`?",
    6: "sources[1].name: `bytes` is the name of another source, too; give a `name`",
    7: "sources[1].model: no model folder `./gone`",
    8: "sources[1].max_length: is set under `prepare`, for all models alike",
    9: "sources[2]: names no `model`",
    10: "sources[3].name: `a/b` cannot be the name of a folder: letters, digits and . + - _ alone",
    11: "prepare.max_lenght: unknown setting `max_lenght`; did you mean `max_length`?",
    12: "extract.model: is set by the pipeline itself",
    13: "align.output: is set by the pipeline itself",
    15: "train.clm_weight: `clm_weight` cannot be 1.5: Input should be less than or equal to 1",
    17: "train.training.learning_rte: `training`: TrainingArguments has no `learning_rte`; did you mean "
    "`learning_rate`?",
    18: "train.training.output_dir: is set by the pipeline itself",
    20: "targets.bytes.sources: no source `other`; there are bytes, bytes, third, a/b",
    21: "targets.../up: `../up` cannot be the name of a folder: letters, digits and . + - _ alone",
    25: "targets.multi.training.seeed: `training`: TrainingArguments has no `seeed`; did you mean `seed`?",
    27: "merges.varm.targets: no target `nobody`; there are bytes, ../up, clm, multi",
    28: "merges.odd: names no `merge_method`",
    29: "merges.between: slerp is between two targets, not 3; name them in `targets`",
    30: "merges.weighed.model_parameters.clm: no target `clm` in this merge",
    31: "merges.empty.targets: there is no target to merge",
    32: "evaluate.data[0]: no file `lost.jsonl`",
    33: "launch.train: no file `no.yaml`",
    34: "metges: unknown setting `metges`; did you mean `merges`?",
}
"""A problem of each line; some have two."""
AND = {
    12: "extract.top_k: `top_k` cannot be 0: Input should be greater than or equal to 1",
    13: "align.map: `map` cannot be 'best': Input should be 'exact', 'min_edit_distance', 'statistics' or 'pre",
    20: "targets.bytes.sources_: unknown setting `sources_`;",
    30: "merges.weighed.models: is set by the pipeline itself; name `targets`",
    32: "evaluate.dtype: `dtype` cannot be 'float8': Input should be 'auto', 'bfloat16', 'float16' or 'float32'",
}


def test_everything_that_is_wrong_with_a_file_is_told_at_once_with_line_and_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_trainer.errors.SHOWN", 100)
    path = folder / "pipeline.yaml"
    path.write_text(WRONG)
    problems = told(path)
    numbers = [int(one.split(":")[0].removeprefix("line ")) for one in problems]
    assert numbers == sorted(numbers)
    for expected in (ALL_WRONG, AND):
        for line, text in expected.items():
            found = [one for one in problems if one.startswith(f"line {line}: {text}")]
            assert len(found) == 1, (line, text, problems)
            problems.remove(found[0])
    assert problems == ["line 32: evaluate.model: is set by the pipeline itself"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pivot": None}, "`pivot` is not set (--pivot): Folder or Hub id of the model to fuse into."),
        ({"sources": []}, "sources: `sources` cannot be []: List should have at least 1 item"),
        ({"sources": ["./neox"]}, "sources[0]: `sources` cannot be './neox': Input should be a valid dictionary"),
        ({"sources": [{"name": "pivot", "model": "./neox"}]}, "sources[0].name: `pivot` is the pivot's name"),
        ({"launch": {"merge": "srun"}}, "launch.merge: `launch` cannot be 'merge': Input should be 'extract'"),
        ({"launch__train": 3}, "launch.train: `launch` cannot be 3: Input should be a valid string"),
        ({"evaluate": {}}, "evaluate: names no held-out `data`"),
        ({"evaluate__data": []}, "evaluate: names no held-out `data`"),
        ({"prepare__data": "x"}, "prepare.data: is set by the pipeline itself"),
        ({"prepare__name": "x"}, "prepare.name: unknown setting `name`"),
        ({"extract__revision": "x"}, "extract.revision: is set by the pipeline itself"),
        ({"extract__template": "x"}, "extract.template: is set under `prepare`"),
        ({"train__sources": ["bytes"]}, "train.sources: unknown setting `sources`"),
        ({"train__training": 3}, "train.training: `training` cannot be 3: Input should be a valid dictionary"),
        ({"train__lora": {"rank": 3}}, "train.lora.rank: `lora`: LoraConfig has no `rank`"),
        ({"train__pivot": "x"}, "train.pivot: is set by the pipeline itself"),
        ({"targets": {"clm": {}}}, "targets.clm: names no `sources`; for CLM alone set `clm_weight: 1`"),
        ({"targets__bytes": None, "targets__a": 3}, "targets.a: `targets` cannot be 3"),
        ({"merges": {"varm": None, "x": 3}}, "merges.varm: `merges` cannot be None"),
        ({"targets__clm": {"clm_weight": 1}}, "merges.varm.targets: there is no target to merge"),
        ({"merges": {"a b": {"merge_method": "varm"}}}, "merges.a b: `a b` cannot be the name of a folder"),
    ],
    ids=lambda value: "",
)
def test_a_mistake_is_told_with_its_place(changes: dict[str, Any], problem: str, folder: Path) -> None:
    if changes.get("targets__bytes", 0) is None:
        changes = {"targets__a": 3}
    problems = told(write(folder, **changes))
    assert any(problem in one for one in problems), problems
    lines = (folder / "pipeline.yaml").read_text().splitlines()
    for one in problems:
        numbered = re.match(r"line (\d+): ([^.:\[]*)(.*)", one)
        if numbered:  # at the line of the place, or of what it is in
            assert any(lines[int(numbered[1]) - 1].lstrip("- ").startswith(key) for key in _keys(one)), one


def _keys(problem: str) -> list[str]:
    place = problem.partition(": ")[2].partition(":")[0]
    return [part for part in re.split(r"\.|\[\d+\]", place) if part] + ["name", "model", "./neox", "[]"]


def test_a_file_that_is_none_is_told(folder: Path) -> None:
    path = folder / "pipeline.yaml"
    assert CliRunner().invoke(main, ["run", str(path)]).stderr.startswith("Error: cannot read the config")
    path.write_text("work: [")
    assert "is not YAML" in CliRunner().invoke(main, ["run", str(path)]).stderr


# The stages


def plan(folder: Path, settings: Mapping[str, Any] = PIPELINE, **changes: Any) -> list[Stage]:
    return read_pipeline(write(folder, settings, **changes))[1]


def marks(folder: Path, settings: Mapping[str, Any] = PIPELINE, **changes: Any) -> dict[str, str]:
    """What each stage depends on, in one number."""
    stages = plan(folder, settings, **changes)
    return {stage.title: one.fingerprint for stage, one in Plan(Path("work"), stages).standings(stages)}


def test_the_stages_of_a_fusion_each_after_those_it_needs(folder: Path) -> None:
    stages = plan(folder)
    assert [stage.title for stage in stages] == TITLES
    by_title = {stage.title: stage for stage in stages}
    assert by_title["train mistral"].needs == ["prepare dialogues", "extract pivot", "align mistral"]
    assert by_title["merge ties"].needs == ["train bytes", "train mistral"]
    assert by_title["evaluate merge-ties"].needs == ["prepare held_out", "merge ties"]
    multi = plan(folder, targets={"all": {"sources": ["mistral", "bytes"]}, "clm": {"clm_weight": 1.0}}, merges={})
    assert [stage.title for stage in multi if stage.kind in ("train", "merge")] == ["train all", "train clm"]
    needs = {stage.name: stage.needs for stage in multi if stage.kind == "train"}
    assert needs["all"] == ["prepare dialogues", "extract pivot", "align mistral", "align bytes"]
    assert needs["clm"] == ["prepare dialogues"]
    assert "evaluate" not in {stage.kind for stage in plan(folder, evaluate=None)}


def test_until_and_only_choose_what_is_needed(folder: Path) -> None:
    stages = plan(folder)

    def titles(until: str | None = None, only: str | None = None) -> list[str]:
        return [stage.title for stage in chosen(stages, until, only)]

    assert titles() == TITLES
    assert titles("align") == [*TITLES[:6], "prepare held_out"]
    of_one = [title for title in TITLES[:8] if "mistral" not in title]
    assert titles(only="bytes") == of_one
    assert titles("extract", "bytes") == of_one[:3]
    with pytest.raises(FusionError, match="there is no target `third`; there are bytes, mistral"):
        titles(only="third")


TRAINED = {
    title for title in TITLES if title.startswith(("train", "merge")) or "target-" in title or "merge-" in title
}
MERGED = {title for title in TITLES if "merge" in title and "slerp" not in title}
"""What depends on all pairwise targets; slerp is between two that are named."""
SLERP = {"merge slerp", "evaluate merge-slerp"}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"train__clm_weight": 0.8}, TRAINED),
        ({"train__training__learning_rate": 1e-3}, TRAINED),
        ({"train__training__per_device_train_batch_size": 2}, TRAINED),
        (
            {"targets": {"bytes": {"sources": ["bytes"]}, "mistral": {"sources": ["mistral"], "unit": "byte"}}},
            {"train mistral", "evaluate target-mistral"} | MERGED | SLERP,
        ),
        ({"align__positions": "dtw"}, TRAINED | {"align bytes", "align mistral"}),
        ({"extract__top_k": 5}, TRAINED | {*TITLES[1:6]}),
        (
            {"sources": [{"name": "bytes", "model": "./neox", "dtype": "bfloat16"}, {"model": "./mistral"}]},
            {"extract bytes", "align bytes", "train bytes", "evaluate target-bytes"} | MERGED | SLERP,
        ),
        ({"prepare__max_length": 128}, {*TITLES}),
        ({"merges__ties__parameters__density": 0.5}, {"merge ties", "evaluate merge-ties"}),
        ({"merges__slerp__targets": ["mistral", "bytes"]}, {"merge slerp", "evaluate merge-slerp"}),
        ({"merge_options": ["--allow-crimes"]}, MERGED | SLERP),
        ({"evaluate__dtype": "bfloat16"}, {title for title in TITLES if title.startswith("evaluate")}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_reruns_what_depends_on_it_and_nothing_else(
    changes: dict[str, Any], again: set[str], folder: Path
) -> None:
    before, now = marks(folder), marks(folder, **changes)
    assert {title for title in TITLES if before[title] != now[title]} == again


@pytest.mark.parametrize(
    "changes",
    [
        {"align__workers": 2},
        {"extract__batch_tokens": 99},
        {"evaluate__batch_tokens": 99},
        {"train__training__logging_steps": 7, "train__training__disable_tqdm": True},
        {"train__training__save_steps": 2, "train__training__save_total_limit": 1},
        {"train__training__hub_token": "hf_SECRET"},
        {"launch__train": "srun --gpus 8"},
        {"data": ["chats.jsonl"], "targets": {"bytes": {"sources": "bytes"}, "mistral": {"sources": ["mistral"]}}},
    ],
    ids=lambda value: ",".join(value),
)
def test_settings_that_change_nothing_of_the_result_rerun_nothing(changes: dict[str, Any], folder: Path) -> None:
    assert marks(folder, **changes) == marks(folder)


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (
            "chats.jsonl",
            {title for title in TITLES if title.startswith("evaluate") and "source" in title}
            | {"prepare held_out", "evaluate pivot"},
        ),
        ("held_out.jsonl", {title for title in TITLES if not title.startswith("evaluate")} - {"prepare held_out"}),
        ("pivot", set()),
        ("mistral", {title for title in TITLES if "bytes" in title or "pivot" in title or "prepare" in title}),
        ("own.jinja", set()),
    ],
)
def test_data_template_or_weights_that_change_rerun_everything_after_them(
    what: str, left: set[str], folder: Path
) -> None:
    (folder / "own.jinja").write_text("{{ messages }}")
    changes = {"prepare__template": "own.jinja"}
    before = marks(folder, **changes)
    if (folder / what).is_dir():
        change_weights(folder / what)
    else:
        (folder / what).write_text((folder / what).read_text() + "\n")
    now = marks(folder, **changes)
    same = {title for title in TITLES if before[title] == now[title]}
    if what in ("pivot", "own.jinja"):  # the sources themselves are as they were, but not their texts
        assert same == set()
    else:
        assert same == left


def test_models_that_have_moved_are_the_same(folder: Path) -> None:
    before = marks(folder)
    for name in ("pivot", "neox"):
        shutil.move(folder / name, folder / f"moved-{name}")
    sources = [{"name": "bytes", "model": "./moved-neox"}, {"model": "./mistral"}]
    assert marks(folder, pivot="./moved-pivot", sources=sources) == before


def test_an_added_source_leaves_the_others_as_they_are(folder: Path) -> None:
    before, now = marks(folder), marks(folder, sources=[*PIPELINE["sources"], ADDED])
    assert {title for title in before if before[title] != now[title]} == MERGED
    assert now.keys() - before.keys() == {
        "extract third",
        "align third",
        "train third",
        "evaluate source-third",
        "evaluate target-third",
    }
    first = marks(folder, sources=[ADDED, *PIPELINE["sources"]])
    assert {title for title in before if before[title] != first[title]} == MERGED


def test_stages_are_started_as_the_file_says(folder: Path) -> None:
    (folder / "accelerate.yaml").touch()
    launch = {"extract": "accelerate.yaml", "train": "srun -n 2 'my launcher' x", "align": "nice"}
    commands = {stage.title: stage.command for stage in plan(folder, launch=launch)}
    python = [str(Path(BIN / "python").parent / Path(commands["evaluate pivot"][0]).name)]
    accelerate = [*python, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    assert commands["extract bytes"] == [
        *accelerate,
        "-m",
        "fusion_trainer",
        "extract",
        "work/configs/extract-bytes.yaml",
    ]
    assert commands["train bytes"][:5] == ["srun", "-n", "2", "my launcher", "x"]
    assert commands["train bytes"][5:] == ["-m", "fusion_trainer", "train", "work/configs/train-bytes.yaml"]
    assert commands["align bytes"][:3] == ["nice", "-m", "fusion_trainer"]
    own = [*python, "-m", "fusion_trainer"]
    assert commands["prepare dialogues"] == [*own, "prepare", "work/configs/prepare-dialogues.yaml"]
    assert commands["evaluate pivot"] == [*own, "evaluate", "work/configs/evaluate-pivot.yaml"]
    assert commands["merge ties"] == ["mergekit-yaml", "work/recipes/ties.yaml", "work/merges/ties"]


METHODS = {
    "linear": {"parameters": {"weight": 1.0}},
    "slerp": {"parameters": {"t": 0.5}},
    "task_arithmetic": {"parameters": {"weight": 0.5}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.6}},
    "dare_ties": {"parameters": {"density": 0.6}, "model_parameters": {"bytes": {"weight": 0.5}}},
    "sce": {"parameters": {"select_topk": 0.1}},
    "varm": {"parameters": {"granularity": "layer"}},
}


def test_mergekit_takes_the_recipes_that_are_written(folder: Path) -> None:
    merges = {name: {"merge_method": name, **own} for name, own in METHODS.items()}
    merges["absolute"] = {
        "merge_method": "varm",
        "base_model": "org/other",
        "dtype": "float16",
        "targets": "bytes",
    }
    stages = {stage.name: stage for stage in plan(folder, merges=merges) if stage.kind == "merge"}
    targets = ["./work/targets/bytes", "./work/targets/mistral"]
    for name, stage in stages.items():
        ((path, text),) = stage.inputs.items()
        assert path == Path(f"work/recipes/{name}.yaml")
        assert text.startswith(f"# mergekit-yaml work/recipes/{name}.yaml work/merges/{name}\n")
        content = yaml.safe_load(text)
        config = MergeConfiguration.model_validate(content)
        assert config.merge_method == merges[name]["merge_method"]
        assert [one["model"] for one in content["models"]] == targets[: 1 if name == "absolute" else 2]
        assert all(config.models[0].model.model.path == targets[0] for _ in "x")
        assert not recipe.check(text, models=False) if config.merge_method == "varm" else True
        base = {"linear": None, "slerp": targets[0], "absolute": "org/other"}.get(name, "./pivot")
        assert content.get("base_model") == base
        assert content["dtype"] == ("float16" if name == "absolute" else "bfloat16")
        assert content.get("parameters") == merges[name].get("parameters")
    dare = yaml.safe_load(next(iter(stages["dare_ties"].inputs.values())))
    assert dare["models"] == [{"model": targets[0], "parameters": {"weight": 0.5}}, {"model": targets[1]}]
    hub = plan(folder, pivot="org/pivot", pivot_revision="v2", merges={"varm": {"merge_method": "varm"}})
    (text,) = next(stage.inputs.values() for stage in hub if stage.kind == "merge")
    assert yaml.safe_load(text)["base_model"] == "org/pivot@v2"


def test_a_dry_run_tells_the_stages_why_and_how_much_and_writes_nothing(folder: Path) -> None:
    path = write(folder)
    before = tree(folder)
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert (result.exit_code, tree(folder)) == (0, before)
    tokens = round((folder / "chats.jsonl").stat().st_size / 4)
    blocks, supervised = math.ceil(tokens / 256), round(0.6 * tokens)
    head, *lines = result.stdout.splitlines()
    assert head == f"data: {blocks} blocks, {tokens:,} tokens, {supervised:,} of them supervised (estimated)"
    assert [line.split("  ")[0][2:] for line in lines] == TITLES
    assert all("not made yet" in line for line in lines)
    assert "(3 steps)" in lines[TITLES.index("train bytes")]
    epochs = {"train__training": {"num_train_epochs": 2, "per_device_train_batch_size": 2}}
    steps = 2 * math.ceil(blocks / 2)
    told = CliRunner().invoke(main, ["run", str(write(folder, **epochs)), "--dry-run", "--only", "bytes"]).stdout
    assert f"(about {steps} steps, divided by the number of processes)" in told
    assert "mistral" not in told


# The toy


@pytest.fixture(scope="module")
def whole(world: Path, starting: "Future[Programs]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole fusion was run, once; for reading only. ``said.txt`` is what it said."""
    folder = tmp_path_factory.mktemp("whole") / "toy"
    shutil.copytree(world, folder)
    write(folder)
    code, said = starting.result().run(folder, "run", "pipeline.yaml")
    assert code == 0, said
    (folder / "said.txt").write_text(said)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, times and all."""
    return shutil.copytree(whole, tmp_path / "toy")


def results(folder: Path) -> dict[str, bytes]:
    """All that is made, but for records, configs, checkpoints, and times in ``fusion.json``."""
    left_out = re.compile(r"stage\.json|sums\.json|lock|configs/.*|.*checkpoint-.*|.*/runs/.*|.*fusion\.json")
    made = tree(folder / "work")
    return {
        name: content
        for name, content in made.items()
        if not left_out.fullmatch(name.rpartition("/")[2]) and not left_out.fullmatch(name)
    }


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run_of(said: str) -> dict[str, str]:
    """What a run has told of each stage that it has run."""
    lines = re.findall(r"^\[\d+/\d+\] (\w+ \S+): (.*)$", said, re.MULTILINE)
    return {title: reason for title, reason in lines if reason != "up to date"}


def test_a_fusion_is_run_from_chats_to_scores_and_a_second_time_nothing_is_done(
    whole: Path, programs: Programs, copy: Path
) -> None:
    said = (whole / "said.txt").read_text()
    assert run_of(said) == dict.fromkeys(TITLES, "not made yet")
    assert f"{len(TITLES)} of {len(TITLES)} stages were run" in said
    before = times(copy / "work")
    code, said = programs.run(copy, "run", "pipeline.yaml")
    assert (code, run_of(said)) == (0, {})
    assert f"all {len(TITLES)} stages are up to date" in said
    written = {"sums.json", "report.md", "report.json"}
    assert {name for name, time in times(copy / "work").items() if before[name] != time} <= written
    assert results(copy) == results(whole)
    code, said = programs.run(copy, "run", "pipeline.yaml", "--dry-run")
    assert said.startswith("data: 12 blocks, ")
    assert "supervised (counted)" in said
    assert said.count("✓") == len(TITLES)
    write(copy, train__clm_weight=0.8)
    before = times(copy)
    code, said = programs.run(copy, "run", "pipeline.yaml", "--dry-run", "--until", "train")
    lines = {line[2:34].rstrip(): line for line in said.splitlines()}
    assert lines["align bytes"].endswith("  up to date")
    assert lines["train bytes"].endswith("  made again: clm_weight 0.9 → 0.8  (3 steps)")
    assert not [title for title in lines if title.startswith(("merge", "evaluate"))]
    assert (times(copy), results(copy)) == (before, results(whole))


def test_the_report_is_the_scores_of_all_models(whole: Path) -> None:
    work = whole / "work"
    names = [title.removeprefix("evaluate ") for title in TITLES if title.startswith("evaluate ")]
    groups = {name: json.loads((work / "scores" / name / "scores.json").read_text())["groups"] for name in names}
    assert json.loads((work / "report.json").read_text()) == groups
    text = (work / "report.md").read_text()
    assert text.strip() in (whole / "said.txt").read_text()
    loss, match = text.split("### Exact match")
    for table, form in (
        (loss, lambda of: f"{of['nats_per_byte']:.4f}"),
        (match, lambda of: f"{of['exact_match']:.1%}"),
    ):
        head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
        assert head == "| model | all | sorting |"
        assert rows == [f"| {name} | {form(of['all'])} | {form(of['sorting'])} |" for name, of in groups.items()]
    assert [groups["pivot"][group]["rows"] for group in ("all", "sorting")] == [6, 2]


def test_the_merges_are_those_of_their_methods(whole: Path) -> None:
    work = whole / "work"
    targets = {f"./work/targets/{name}": runs.checkpoint(work / "targets" / name) for name in ("bytes", "mistral")}
    one, other = targets.values()
    runs.assert_oracle(runs.read(work / "merges" / "varm"), runs.checkpoint(whole / "pivot"), targets, runs.MATRIX)
    linear, slerp, ties = (runs.checkpoint(work / "merges" / name) for name in ("linear", "slerp", "ties"))
    for name in one:
        np.testing.assert_allclose(linear[name], (one[name] + other[name]) / 2, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(slerp[name], half_way(one[name], other[name]), rtol=1e-4, atol=1e-6)
        assert not np.array_equal(ties[name], linear[name])
    for name in MERGES:
        assert AutoModelForCausalLM.from_pretrained(work / "merges" / name).config.model_type == "llama"


def half_way(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Slerp at 0.5, over the last axis of a tensor as a whole."""
    angle = np.arccos(np.clip(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other), -1, 1))
    if abs(np.cos(angle)) > 0.9995:
        return (one + other) / 2
    return (one + other) * np.sin(angle / 2) / np.sin(angle)


def test_another_weight_of_clm_trains_and_merges_and_scores_again(programs: Programs, copy: Path) -> None:
    before, content = times(copy / "work"), results(copy)
    path = write(copy, train__clm_weight=0.8)
    code, said = programs.run(copy, "run", "pipeline.yaml", "--until", "train")
    assert code == 0, said
    told = run_of(said)
    assert told == {f"train {name}": "made again: clm_weight 0.9 → 0.8" for name in ("bytes", "mistral")}
    report = said[said.index("### Loss") :]
    assert "| pivot |" in report
    assert "target-bytes" not in report  # its score is of the target that was
    assert "| merge-" not in report
    code, said = programs.run(copy, "run", path.name)
    assert code == 0, said
    assert run_of(said).keys() | told.keys() == TRAINED
    assert run_of(said)["merge linear"] == "made again: train bytes has changed; train mistral has changed"
    for name, bytes_ in results(copy).items():
        again = name.startswith(("targets", "recipes", "merges", "scores/target", "scores/merge", "report"))
        if not again:
            assert (bytes_, times(copy / "work")[name]) == (content[name], before[name]), name
        elif name.endswith(("model.safetensors", "scores.json")):
            assert bytes_ != content[name], name


AT = ("merges/", "recipes/", "scores/merge-")


def test_an_added_source_is_extracted_aligned_trained_and_merged_with_the_rest(
    programs: Programs, copy: Path
) -> None:
    before, content = times(copy / "work"), results(copy)
    write(copy, sources=[*PIPELINE["sources"], ADDED])
    code, said = programs.run(copy, "run", "pipeline.yaml")
    assert code == 0, said
    new = {f"{kind} third" for kind in ("extract", "align", "train")}
    new |= {"evaluate source-third", "evaluate target-third"}
    assert run_of(said).keys() == new | MERGED
    assert "train third is new" in run_of(said)["merge varm"]
    assert all(run_of(said)[title] == "not made yet" for title in new)
    now, same = results(copy), times(copy / "work")
    for name in content:
        if not name.startswith(("report", *(f"{at}{one}" for at in AT for one in ("varm", "linear", "ties")))):
            assert (now[name], same[name]) == (content[name], before[name]), name
    for name in ("varm", "linear", "ties"):
        assert now[f"merges/{name}/model.safetensors"] != content[f"merges/{name}/model.safetensors"]
    assert "| source-third |" in (copy / "work" / "report.md").read_text()


def test_a_byte_changed_in_a_store_is_noticed_and_only_that_store_made_again(
    programs: Programs, copy: Path, whole: Path
) -> None:
    shard = copy / "work" / "stores" / "bytes" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copy / "work" / "aligned" / "mistral" / "shard-00002.arrow").unlink()
    code, said = programs.run(copy, "run", "pipeline.yaml")
    assert code == 0, said
    broken = {
        "extract bytes": "stores/bytes/shard-00001.arrow",
        "align mistral": "aligned/mistral/shard-00002.arrow",
    }
    assert run_of(said) == {
        title: f"`work/{name}` is not as it was made; made again" for title, name in broken.items()
    }
    assert results(copy) == results(whole)


def test_a_stage_that_fails_ends_the_run_with_a_sentence_and_the_next_run_goes_on(
    programs: Programs, folder: Path, whole: Path
) -> None:
    sound = (folder / "mistral" / "model.safetensors").read_bytes()
    tensors = load_file(folder / "mistral" / "model.safetensors")
    tensors["lm_head.weight"].view(-1)[7] = float("nan")
    save_file(tensors, folder / "mistral" / "model.safetensors", metadata={"format": "pt"})
    write(folder)
    code, said = programs.run(folder, "run", "pipeline.yaml")
    assert code == 1
    assert "gives NaN or infinite logits" in said
    assert "Error: extract mistral ended with exit code 1; what it said stands above." in said
    assert "Traceback" not in said
    (folder / "mistral" / "model.safetensors").write_bytes(sound)
    code, said = programs.run(folder, "run", "pipeline.yaml", "--until", "align")
    assert code == 0, said
    assert run_of(said) == {
        "extract mistral": "made again: model has changed",
        "align bytes": "not made yet",
        "align mistral": "not made yet",
        "prepare held_out": "not made yet",
    }
    theirs = results(whole)
    made = {name: content for name, content in results(folder).items() if name.startswith(("stores", "aligned"))}
    assert made == {name: theirs[name] for name in made}


# Killed

GROUP = "import os; os.setpgid(0, 0)"
SLOWLY = """
import time, torch
save = torch.save
torch.save = lambda *given, **named: (time.sleep(0.2), save(*given, **named))
"""
"""Makes it last to write a checkpoint."""


def test_killed_within_and_between_stages_it_ends_with_the_same_bytes(
    programs: Programs, folder: Path, whole: Path
) -> None:
    """The whole process group, again and again in one folder, each time a little later."""
    work = folder / "work"
    rng = random.Random(2402)
    kills: list[tuple[str, Callable[[], Any]]] = [
        ("in the preparation", lambda: list(work.glob("dialogues.*.tmp"))),
        ("between two stages", (work / "dialogues" / "stage.json").exists),
        ("in an extraction", (work / "stores" / "pivot" / "shard-00001.arrow").exists),
        ("at its record", lambda: list((work / "stores" / "pivot").glob("stage.json.*.tmp"))),
        ("in an alignment", (work / "aligned" / "bytes" / "extraction.json").exists),
        ("before the first checkpoint", (work / "targets" / "bytes" / "training.json").exists),
        ("between checkpoints", (work / "targets" / "bytes" / "checkpoint-1").exists),
        ("after a target", (work / "targets" / "bytes" / "stage.json").exists),
        ("at the start of a merge", (work / "merges" / "varm" / "begun").exists),
        ("in a merge", lambda: list((work / "merges" / "linear").glob("*.safetensors"))),
        ("after a merge", (work / "merges" / "slerp" / "stage.json").exists),
        ("in an evaluation", (work / "scores" / ".source-bytes.begun.json").exists),
        ("after an evaluation", (work / "scores" / "target-bytes" / "stage.json").exists),
    ]
    write(folder)
    killed = []
    for when, reached in kills:
        run = programs.start(folder, "run", "pipeline.yaml", before=GROUP)
        wait_for(reached, run.process)
        time.sleep(rng.choice([0, 0, 0.002, 0.02]))
        assert reached(), when
        os.killpg(run.process, signal.SIGKILL)
        code, said = run.wait()
        assert code == -signal.SIGKILL, said
        killed.append(when)
    code, said = programs.run(folder, "run", "pipeline.yaml")
    assert code == 0, said
    assert results(folder) == results(whole)
    assert not [path for path in work.rglob("*") if path.name.endswith((".begun.json", ".removed", ".tmp"))]


def test_killed_alone_its_stage_ends_too_and_the_next_run_goes_on(
    programs: Programs, copy: Path, whole: Path
) -> None:
    write(copy, train__clm_weight=0.8)
    target = copy / "work" / "targets" / "bytes"
    (target / "stage.json").unlink()
    shutil.rmtree(target)
    run = programs.start(copy, "run", "pipeline.yaml", "--only", "bytes", before=SLOWLY)
    wait_for((target / "checkpoint-1").exists, run.process)
    (stage,) = psutil.Process(run.process).children()
    os.kill(run.process, signal.SIGKILL)
    assert run.wait()[0] == -signal.SIGKILL
    code, said = programs.run(copy, "run", "pipeline.yaml", "--only", "bytes")
    assert code == 0, said
    assert run_of(said) == {"train bytes": "goes on"}
    assert not stage.is_running()
    other = shutil.copytree(whole, copy.parent / "other")
    write(other, train__clm_weight=0.8)
    assert programs.run(other, "run", "pipeline.yaml", "--only", "bytes")[0] == 0
    name = "work/targets/bytes/model.safetensors"
    assert (copy / name).read_bytes() == (other / name).read_bytes() != (whole / name).read_bytes()


def test_interrupted_it_ends_its_stage_and_says_so(programs: Programs, copy: Path) -> None:
    write(copy, train__clm_weight=0.8)
    shutil.rmtree(copy / "work" / "targets" / "bytes")
    run = programs.start(copy, "run", "pipeline.yaml", "--only", "bytes", before=SLOWLY)
    wait_for((copy / "work" / "targets" / "bytes" / "checkpoint-1").exists, run.process)
    (stage,) = psutil.Process(run.process).children()
    os.kill(run.process, signal.SIGINT)  # not its stage
    code, said = run.wait()
    assert code == 1
    assert "Aborted!" in said
    assert not stage.is_running()


# Launched

TWO_MACHINES = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_machines": 2,
    "num_processes": 2,
    "machine_rank": 0,
    "mixed_precision": "no",
    "rdzv_backend": "static",
    "same_network": True,
    "main_training_function": "main",
    "debug": False,
}
"""A config of accelerate for two machines of one process each, on the CPU."""


def test_the_console_script_runs_a_stage_by_an_accelerate_config(copy: Path, whole: Path) -> None:
    write(copy, launch={"evaluate": str(ROOT / "examples" / "accelerate" / "cpu.yaml")})
    scores = copy / "work" / "scores" / "source-bytes"
    (scores / "scores.json").write_text("{}")
    (copy / "work" / "merges" / "linear" / "model.safetensors").unlink()
    program = [BIN / "fusion-trainer", "run", "pipeline.yaml"]
    done = subprocess.run(program, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_of(done.stderr).keys() == {"merge linear", "evaluate source-bytes"}
    assert results(copy) == results(whole)


STUBS = {
    "scontrol": """[ "$*" = "show hostnames node[7-8]" ] && printf 'node7\\nnode8\\n'""",
    "srun": """[ "$1" = --ntasks-per-node=1 ] || exit 9
shift
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done""",
    "accelerate": 'echo "$SRUN_CPUS_PER_TASK $*"',
}


def test_under_slurm_a_stage_is_started_on_every_node(tmp_path: Path) -> None:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64", "PORT": "123"}
    config = ROOT / "examples" / "accelerate" / "fsdp_2x8gpu.yaml"
    started = subprocess.run(
        [ROOT / "examples" / "slurm" / "stage.sh", config, "-m", "fusion_trainer", "train", "a b.yaml"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert started.stdout.splitlines() == [
        f"64 launch --config_file {config} --num_machines 2 --machine_rank {rank} --num_processes 16 "
        "--main_process_ip node7 --main_process_port 123 -m fusion_trainer train a b.yaml"
        for rank in (0, 1)
    ]


def test_two_processes_score_a_model_as_one(programs: Programs, copy: Path, whole: Path) -> None:
    scores = copy / "work" / "scores" / "target-bytes" / "scores.json"
    scores.unlink()
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    config = "work/configs/evaluate-target-bytes.yaml"
    code, said = programs.run(copy, "evaluate", config, "--batch-tokens", 100, environments=ranks)
    assert code == 0, said
    assert said.count(" nats/byte ") == 2  # the groups, told by one of the two
    alone = json.loads((whole / scores.relative_to(copy)).read_text())["groups"]
    for name, of in json.loads(scores.read_text())["groups"].items():
        assert of == pytest.approx(alone[name], rel=1e-6)


def test_a_pipeline_on_two_machines_trains_as_one_process_with_twice_the_batch(
    programs: Programs, copy: Path, whole: Path
) -> None:
    """The pipeline runs on the first; the second, here, waits for the stage that it is to take part in."""
    for number in (1, 2):
        shutil.rmtree(copy / "work" / "targets" / "bytes", ignore_errors=True)
        if number == 1:
            write(copy, train__training__per_device_train_batch_size=8)
            code, said = programs.run(copy, "run", "pipeline.yaml", "--only", "bytes")
            assert code == 0, said
            alone = runs.checkpoint(copy / "work" / "targets" / "bytes")
            continue
        (copy / "two.yaml").write_text(yaml.safe_dump(TWO_MACHINES))
        script = str(ROOT / "examples" / "slurm" / "stage.sh")
        write(copy, launch={"train": f"{script} two.yaml"})
        config = copy / "work" / "configs" / "train-bytes.yaml"
        config.unlink()
        cluster = {"NODES": "2", "HEAD": "127.0.0.1", "PORT": free_port()}
        first = programs.start(
            copy, "run", "pipeline.yaml", "--only", "bytes", environments=[{**cluster, "RANK": "0"}]
        )
        wait_for(config.exists, first.process)
        second = subprocess.run(
            [script, "two.yaml", "-m", "fusion_trainer", "train", str(config.relative_to(copy))],
            cwd=copy,
            env={**ENVIRONMENT, **cluster, "RANK": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        code, said = first.wait()
        assert (code, second.returncode) == (0, 0), said + second.stderr
    target = copy / "work" / "targets" / "bytes"
    assert json.loads((target / "fusion.json").read_text())["processes"] == 2
    assert (target / "stage.json").is_file()
    pivot, two, other = (
        runs.checkpoint(folder) for folder in (copy / "pivot", target, whole / "work" / "targets" / "bytes")
    )
    moved = {name: np.linalg.norm(alone[name] - pivot[name]) for name in pivot}
    assert all(np.linalg.norm(two[name] - alone[name]) < 1e-3 * moved[name] for name in pivot)
    assert any(np.linalg.norm(other[name] - alone[name]) > 0.1 * moved[name] for name in pivot)
