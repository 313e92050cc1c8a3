"""The file of ``fusion-trainer run``, checked as a whole, and the stages that are made of it."""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from programs import BIN, tree
from safetensors.torch import load_file, save_file
from tiny_pipeline import ADDED, BYTES, MERGED, MISTRAL, PIPELINE, ROOT, SLERP, TITLES, TRAINED, write

from fusion_trainer.cli import main
from fusion_trainer.pipeline.plan import chosen, read_pipeline
from fusion_trainer.pipeline.runner import Runner
from fusion_trainer.pipeline.stage import Stage
from varm_common.errors import UserError
from varm_merge.recipes.check import check as check_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    return tiny_pipeline.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _check_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_trainer.pipeline.merges.output_of", tiny_pipeline.check_in_process)


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, and the current folder."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The file


def told(path: Path) -> list[str]:
    """What is wrong with a file."""
    with pytest.raises(UserError) as error:
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
prepare: {template: openchat, max_lenght: 256, fit_tokenizers: ./lost}
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
    10: "sources[3].name: `a/b` cannot be the name of a folder: use letters, digits and . + - _",
    11: "prepare.max_lenght: unknown setting `max_lenght`; did you mean `max_length`?",
    12: "extract.model: is set by the pipeline itself",
    13: "align.output: is set by the pipeline itself",
    15: "train.clm_weight: `clm_weight` cannot be 1.5: Input should be less than or equal to 1",
    17: "train.training.learning_rte: `training`: TrainingArguments has no `learning_rte`; did you mean "
    "`learning_rate`?",
    18: "train.training.output_dir: is set by the pipeline itself",
    20: "targets.bytes.sources: no source `other`; there are bytes, bytes, third, a/b",
    21: "targets.../up: `../up` cannot be the name of a folder: use letters, digits and . + - _",
    25: "targets.multi.training.seeed: `training`: TrainingArguments has no `seeed`; did you mean `seed`?",
    27: "merges.varm.targets: no target `nobody`; there are bytes, ../up, clm, multi",
    28: "merges.odd: names no `merge_method`",
    29: "merges.between: slerp merges exactly two targets, not 3; name two in `targets`",
    30: "merges.weighed.model_parameters.clm: no target `clm` in this merge",
    31: "merges.empty.targets: there is no target to merge",
    32: "evaluate.data[0]: no file `lost.jsonl`",
    33: "launch.train: no file `no.yaml`",
    34: "metges: unknown setting `metges`; did you mean `merges`?",
}
"""A problem of each line; some have two."""
AND = {
    11: "prepare.fit_tokenizers: no model folder `./lost`",
    10: "sources[3]: `./mistral` has no chat template: set `template` to pivot, pivot_own_end, openchat, ",
    12: "extract.top_k: `top_k` cannot be 0: Input should be greater than or equal to 1",
    13: "align.map: `map` cannot be 'best': Input should be 'exact', 'min_edit_distance', 'co_occurrence', ",
    20: "targets.bytes.sources_: unknown setting `sources_`;",
    30: "merges.weighed.models: is set by the pipeline itself; name `targets`",
    32: "evaluate.dtype: `dtype` cannot be 'float8': Input should be 'auto', 'bfloat16', 'float16' or 'float32'",
}


def test_everything_that_is_wrong_with_a_file_is_told_at_once_with_line_and_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varm_common.errors.SHOWN", 100)
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
        ({"sources": [{"model": "./neox", "align": {"mep": 1}}]}, "sources[0].align.mep: unknown setting `mep`"),
        ({"sources": [{"model": "./neox", "align": "dtw"}]}, "sources[0].align: is 'dtw', but must be settings"),
        ({"sources": [{"name": "pivot", "model": "./neox"}]}, "sources[0].name: `pivot` is the pivot's name"),
        ({"launch": {"merge": "srun"}}, "launch.merge: `launch` cannot be 'merge': Input should be 'extract'"),
        ({"launch__train": 3}, "launch.train: `launch` cannot be 3: Input should be a valid string"),
        ({"evaluate": {}}, "evaluate: names no held-out `data`"),
        ({"evaluate__data": []}, "evaluate: names no held-out `data`"),
        ({"prepare__data": "x"}, "prepare.data: is set by the pipeline itself"),
        ({"prepare__name": "x"}, "prepare.name: unknown setting `name`"),
        ({"extract__revision": "x"}, "extract.revision: is set by the pipeline itself"),
        ({"extract__max_length": 64}, "extract.max_length: is set under `prepare`"),
        ({"train__sources": ["bytes"]}, "train.sources: unknown setting `sources`"),
        ({"train__training": 3}, "train.training: `training` cannot be 3: Input should be a valid dictionary"),
        ({"train__lora": {"rank": 3}}, "train.lora.rank: `lora`: LoraConfig has no `rank`"),
        ({"train__pivot": "x"}, "train.pivot: is set by the pipeline itself"),
        ({"targets": {"clm": {}}}, "targets.clm: has no `sources`; for CLM alone set `clm_weight: 1`"),
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
    return {state.stage.title: state.fingerprint for state in Runner(Path("work"), stages).states(stages)}


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


def test_a_source_names_its_engine(folder: Path) -> None:
    """Another server changes nothing of the result; a source behind a server is not scored by this program."""

    def of(**own: Any) -> dict[str, Any]:
        first, *others = PIPELINE["sources"]
        return {"sources": [{**first, **own}, *others]}

    served = of(engine="vllm", server_url="http://one:8000")
    name = PIPELINE["sources"][0]["name"]
    stages = {stage.title: stage for stage in plan(folder, **served)}
    (text,) = stages[f"extract {name}"].inputs.values()
    config = yaml.safe_load(text)
    assert (config["engine"], config["server_url"]) == ("vllm", ["http://one:8000"])
    assert "engine" not in stages["extract pivot"].settings
    assert f"evaluate source-{name}" not in stages
    before = marks(folder, **served)
    assert marks(folder, **of(engine="vllm", server_url=["http://two:8000"], server_timeout=5)) == before
    assert before[f"extract {name}"] != marks(folder)[f"extract {name}"]
    problems = told(write(folder, **of(server_url="http://one:8000")))
    assert any("sources[0]: `server_url`: no effect with the engine transformers" in one for one in problems)


def test_a_model_that_uses_all_gpus_is_extracted_by_one_process(folder: Path) -> None:
    (folder / "ddp.yaml").write_text("num_processes: 8\n")
    first, *others = PIPELINE["sources"]
    for own, launched in (({}, True), ({"engine": "vllm"}, False), ({"device_map": "auto"}, False)):
        changed = {"sources": [{**first, **own}, *others], "launch": {"extract": "ddp.yaml"}}
        commands = {stage.title: stage.command for stage in plan(folder, **changed)}
        assert ("accelerate.commands.launch" in commands[f"extract {first['name']}"]) is launched
        assert "accelerate.commands.launch" in commands["extract pivot"]


def test_a_source_is_aligned_in_its_own_way(folder: Path) -> None:
    first, *others = PIPELINE["sources"]
    own = {**first, "align": {"positions": "dtw", "map": "min_edit_distance"}}
    changed = {"sources": [own, *others]}
    aligned = {stage.name: stage.settings for stage in plan(folder, **changed) if stage.kind == "align"}
    assert (aligned[first["name"]]["positions"], aligned[first["name"]]["map"]) == ("dtw", "min_edit_distance")
    before, after = marks(folder), marks(folder, **changed)
    assert {title for title in before if before[title] != after[title] and "align" in title} == {
        f"align {first['name']}"
    }
    assert before[f"extract {first['name']}"] == after[f"extract {first['name']}"]
    target = {"targets": {"a": {"sources": [first["name"]], "alm_weight": 0.5}}, "merges": {}}
    assert any("targets.a.alm_weight: needs chunks" in one for one in told(write(folder, **changed, **target)))
    own["align"] = {"chunks": True}
    assert plan(folder, **changed, **target)


def test_until_and_only_choose_what_is_needed(folder: Path) -> None:
    stages = plan(folder)

    def titles(until: str | None = None, only: str | None = None) -> list[str]:
        return [stage.title for stage in chosen(stages, until, only)]

    assert titles() == TITLES
    assert titles("align") == [*TITLES[:6], "prepare held_out"]
    of_one = [title for title in TITLES[:8] if "mistral" not in title]
    assert titles(only="bytes") == of_one
    assert titles("extract", "bytes") == of_one[:3]
    with pytest.raises(UserError, match="there is no target `third`; there are bytes, mistral"):
        titles(only="third")


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"train__clm_weight": 0.8}, TRAINED),
        ({"train__training__learning_rate": 1e-3}, TRAINED),
        ({"train__training__per_device_train_batch_size": 2}, TRAINED),
        (
            {"targets": {"bytes": {"sources": ["bytes"]}, "mistral": {"sources": ["mistral"], "unit": "token"}}},
            {"train mistral", "evaluate target-mistral"} | MERGED | SLERP,
        ),
        ({"align__positions": "dtw"}, TRAINED | {"align bytes", "align mistral"}),
        ({"extract__top_k": 5}, TRAINED | {*TITLES[1:6]}),
        (
            {"sources": [{**BYTES, "dtype": "bfloat16"}, MISTRAL]},
            {"extract bytes", "align bytes", "train bytes", "evaluate target-bytes"} | MERGED | SLERP,
        ),
        (
            {"sources": [{**BYTES, "template": "zephyr"}, MISTRAL]},
            {"extract bytes", "align bytes", "train bytes", "evaluate target-bytes"} | MERGED | SLERP,
        ),
        (
            {"extract__template": "chatml"},
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


@pytest.mark.parametrize(
    ("launch", "other"),
    [
        ("one.yaml", "two.yaml"),
        ("srun stage.sh one.yaml", "srun stage.sh two.yaml"),
        ("env ACCELERATE_MIXED_PRECISION=no python", "env ACCELERATE_MIXED_PRECISION=bf16 python"),
        ("accelerate launch --num_processes 2", "accelerate launch --num_processes 3"),
    ],
)
def test_a_launch_in_another_precision_or_by_more_processes_is_another_training(
    launch: str, other: str, folder: Path
) -> None:
    for name, precision in (("one", "no"), ("two", "bf16")):
        settings = {"num_processes": 2, "mixed_precision": precision}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    before, after = marks(folder, launch__train=launch), marks(folder, launch__train=other)
    assert {title for title in before if before[title] != after[title]} == TRAINED


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"merges__varm": {"merge_method": "tiess"}},
            "merges.varm.merge_method: mergekit knows no method `tiess`; did",
        ),
        (
            {"merges__varm__parameters": {"granularty": "layer"}},
            "merges.varm.parameters.granularty: unknown parameter `granularty` of varm; did you mean",
        ),
        ({"merges__ties__foo": 1}, "merges.ties.foo: unknown top-level key `foo`; known are"),
        ({"merges__ties__dtype": "blah"}, "merges.ties.dtype: `dtype` is `blah`, not one of float16"),
        ({"merges__ties__base_model": "./nowhere"}, "merges.ties.base_model: no model folder `./nowhere`"),
        ({"merges__ties__parameters": {}}, "has no `weight`, which ties needs"),
        ({"merges__ties__targets": 3}, "merges.ties.targets: is 3, but must be a text or a list of texts"),
        ({"merges__ties__model_parameters": 3}, "merges.ties.model_parameters: is not a mapping of targets"),
        ({"merge_options": ["--nonsense"]}, "merge_options: mergekit-yaml does not accept them: No such option"),
        ({"merge_options": ["--help"]}, "merge_options: with these options mergekit-yaml does not merge"),
        ({"extract__template": "no/such.jinja"}, "extract.template: no file `no/such.jinja`"),
        ({"sources": [{**BYTES, "template": "no/such.jinja"}]}, "sources[0].template: no file `no/such.jinja`"),
        ({"sources": [{"model": "./mistral"}]}, "sources[0]: `./mistral` has no chat template"),
        (
            {"prepare__template": "no/such.jinja"},
            "prepare.template: no file `no/such.jinja`, and none of openchat",
        ),
        ({"train__load_in": "4bit"}, "train.load_in: needs `lora`"),
        (
            {"train__training__lr_scheduler_type": "cosin"},
            "`lr_scheduler_type` cannot be 'cosin': choose one of linear",
        ),
        ({"train__training__max_steps": "many"}, "`max_steps` cannot be 'many'"),
        ({"train__training__per_device_train_batch_size": 0}, "cannot be 0: it is at least 1"),
        ({"targets": {"one": {"sources": 3}}}, "targets.one.sources: is 3, but must be a text or a list of texts"),
        ({"evaluate__data": 3}, "evaluate.data: is 3, but must be a text or a list of texts"),
    ],
)
def test_what_would_fail_hours_later_is_told_before_anything_is_run(
    changes: dict[str, Any], problem: str, folder: Path
) -> None:
    problems = told(write(folder, **changes))
    assert [one for one in problems if problem in one], problems


def test_a_number_written_as_a_text_is_a_number(folder: Path) -> None:
    changes = {"train__training__max_steps": "3", "train__training__per_device_train_batch_size": "4"}
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


@pytest.mark.parametrize("where", ["extract", "sources"])
def test_a_sources_template_that_changes_reruns_what_follows_its_extraction(where: str, folder: Path) -> None:
    own = folder / "own.jinja"
    own.write_text("{{ messages }}")
    sources = [{**BYTES, "template": "own.jinja"}, MISTRAL]
    changes: dict[str, Any] = {"extract__template": "own.jinja"} if where == "extract" else {"sources": sources}
    before = marks(folder, **changes)
    own.write_text("{{ messages }}\n")
    now = marks(folder, **changes)
    again = {title for title in TITLES if before[title] != now[title]}
    assert again == {"extract bytes", "align bytes", "train bytes", "evaluate target-bytes"} | MERGED | SLERP


def test_models_that_have_moved_are_the_same(folder: Path) -> None:
    before = marks(folder)
    for name in ("pivot", "neox"):
        shutil.move(folder / name, folder / f"moved-{name}")
    sources = [{**BYTES, "model": "./moved-neox"}, MISTRAL]
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
    "dare_ties": {"parameters": {"density": 0.6, "weight": 0.3}, "model_parameters": {"bytes": {"weight": 0.5}}},
    "sce": {"parameters": {"select_topk": 0.1}},
    "varm": {"parameters": {"granularity": "layer"}},
}


def test_a_pivot_of_the_hub_may_have_a_name_without_an_organisation(folder: Path) -> None:
    """The Hub's oldest models have such names."""
    extract = next(stage for stage in plan(folder, pivot="gpt2") if stage.kind == "extract")
    assert extract.models["model"] == ("gpt2", None)


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
        assert not check_recipe(text, models=False) if config.merge_method == "varm" else True
        base = {"linear": None, "slerp": targets[0], "absolute": "org/other"}.get(name, "./pivot")
        assert content.get("base_model") == base
        assert content.get("dtype") == ("float16" if name == "absolute" else None)
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
    assert all("not run yet" in line for line in lines)
    assert "(3 steps)" in lines[TITLES.index("train bytes")]
    epochs = {"train__training": {"num_train_epochs": 2, "per_device_train_batch_size": 2}}
    steps = 2 * math.ceil(blocks / 2)
    told = CliRunner().invoke(main, ["run", str(write(folder, **epochs)), "--dry-run", "--only", "bytes"]).stdout
    assert f"(about {steps} steps, divided by the number of processes)" in told
    assert "mistral" not in told


def test_a_dry_run_can_be_read_by_a_program(folder: Path) -> None:
    path = write(folder)
    told = json.loads(CliRunner().invoke(main, ["run", str(path), "--dry-run", "--json"]).stdout)
    assert [f"{one['kind']} {one['name']}" for one in told] == TITLES
    assert {one["made"] for one in told} == {False}
    assert told[0]["command"][2:4] == ["fusion_trainer", "prepare"]
    alone = CliRunner().invoke(main, ["run", str(path), "--json"])
    assert (alone.exit_code, "--json needs --dry-run" in alone.stderr) == (2, True)


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
    outside = {
        name: value for name, value in os.environ.items() if name != "RANK"
    }  # a test before may have set it
    started = subprocess.run(
        [ROOT / "examples" / "slurm" / "stage.sh", config, "-m", "fusion_trainer", "train", "a b.yaml"],
        env={**outside, **slurm, "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert started.stdout.splitlines() == [
        f"64 launch --config_file {config} --num_machines 2 --machine_rank {rank} --num_processes 16 "
        "--main_process_ip node7 --main_process_port 123 -m fusion_trainer train a b.yaml"
        for rank in (0, 1)
    ]
