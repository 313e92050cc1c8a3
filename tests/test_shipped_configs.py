"""What the project ships and shows can be used: training configs, accelerate configs, README's blocks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from fusion_trainer.config import TrainConfig, read_config
from fusion_trainer.pipeline.plan import read_pipeline

ROOT = Path(__file__).parent.parent
PIPELINES = sorted((ROOT / "examples").glob("fuse*/pipeline.yaml"))
TRAINING = sorted(set((ROOT / "examples" / "fusechat_7b").glob("*.yaml")) - set(PIPELINES))
ACCELERATE = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_papers_settings_are_those_of_the_paper(path: Path) -> None:
    config = read_config(TrainConfig, path, {})
    training = config.training
    assert 8 * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 128
    wanted = {
        "num_train_epochs": 3,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    assert {name: training[name] for name in wanted} == wanted
    assert config.clm_weight == (1.0 if path.stem == "clm" else 0.9)
    if path.stem != "clm":  # of which nothing is fused
        rule = (config.fusion, config.compare, config.unit, config.tail)
        assert rule == ("min_ce", "conversation", "token", "renormalise")
    assert f"train examples/fusechat_7b/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    machines = 2 if "_2x8" in path.stem else 1
    assert config.num_machines == machines
    assert config.num_processes == (8 * machines if path.stem.endswith("8gpu") else 1)
    assert f"examples/accelerate/{path.name} \\\n#     -m fusion_trainer train" in path.read_text()


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.parent.name)
def test_the_pipelines_of_the_real_models_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_trainer.pipeline.merges.output_of", tiny_pipeline.check_in_process)
    config, stages = read_pipeline(path)
    titles = [stage.title for stage in stages]
    for source in config.sources:
        assert {f"extract {source['name']}", f"align {source['name']}"} <= set(titles)
    for stage in stages:
        assert set(stage.needs) <= set(titles[: titles.index(stage.title)])
        if stage.kind == "merge":
            (recipe,) = stage.inputs.values()
            assert yaml.safe_load(recipe)["models"]
    for launch in config.launch.values():
        assert (ROOT / launch).is_file()
    assert f"fusion-trainer run examples/{path.parent.name}/pipeline.yaml" in path.read_text()


PUBLISHED = {
    "fusechat_7b": ("fusechat_7b_v1_", "varm varm_model varm_layer varm_module varm_parameter linear slerp "
    "task_arithmetic ties dare"),
    "fusechat_7b_v2": ("fusechat_7b_v2_", "sce linear task_arithmetic ties dare"),
}  # fmt: skip
"""The published merges of a pipeline, and the beginning of their recipes' names."""
LABELS = {"Mixtral": "mixtral", "Solar": "solar", "SOLAR": "solar", "Starling": "starling", "InternLM": "internlm"}
LABELS |= {"Qwen": "qwen"}
"""The pipelines' targets, by what the names of the published ones contain."""


def published(path: Path) -> dict[str, Any]:
    """What a recipe in ``yaml_recipes/`` merges, with the pipeline's names for the models."""
    content = yaml.safe_load(path.read_text())

    def named(model: str) -> str:
        if model == "openchat/openchat_3.5":
            return "pivot"
        (label,) = [label for part, label in LABELS.items() if f"-{part}" in model]
        return label

    return what_it_merges(content, named, content["dtype"])


def what_it_merges(recipe: dict[str, Any], named: Callable[[str], str], dtype: str) -> dict[str, Any]:
    """Method, models in their order each with all its parameters, base model and the result's dtype."""
    shared = recipe.get("parameters", {})
    return {
        "method": recipe["merge_method"],
        "base": named(recipe["base_model"]) if "base_model" in recipe else None,
        "models": [(named(one["model"]), {**shared, **one.get("parameters", {})}) for one in recipe["models"]],
        "dtype": dtype,
    }


@pytest.mark.parametrize("pipeline", PUBLISHED)
def test_the_merges_of_the_pipelines_are_the_published_ones(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_trainer.pipeline.merges.output_of", tiny_pipeline.check_in_process)
    config, stages = read_pipeline(ROOT / "examples" / pipeline / "pipeline.yaml")
    beginning, names = PUBLISHED[pipeline]
    recipes = {
        stage.name: yaml.safe_load(next(iter(stage.inputs.values()))) for stage in stages if stage.kind == "merge"
    }
    assert set(names.split()) == recipes.keys() - ({"varm"} if pipeline == "fusechat_7b_v2" else set())
    for name in names.split():
        written = published(ROOT / "yaml_recipes" / f"{beginning}{'varm_matrix' if name == 'varm' else name}.yaml")
        folders = {f"./{config.work}/targets/{label}": label for label in LABELS.values()}
        folders["openchat/openchat_3.5"] = "pivot"
        assert what_it_merges(recipes[name], folders.__getitem__, recipes[name]["out_dtype"]) == written
        assert "dtype" not in recipes[name]  # which would round the float32 targets before the merge


R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
FUSEO1 = {
    "qwq": ("QwQ-32B", "Qwen2.5-32B", ["Qwen/QwQ-32B-Preview", R1]),
    "qwq_skyt1": ("QwQ-SkyT1-32B", "Qwen2.5-32B", ["Qwen/QwQ-32B-Preview", R1, "NovaSky-AI/Sky-T1-32B-Preview"]),
    "qwq_skyt1_flash": (
        "QwQ-SkyT1-Flash-32B",
        "Qwen2.5-32B",
        ["Qwen/QwQ-32B-Preview", R1, "NovaSky-AI/Sky-T1-32B-Flash"],
    ),
    "qwen25_instruct": ("Qwen2.5-Instruct-32B", "Qwen2.5-32B", ["Qwen/Qwen2.5-32B-Instruct", R1]),
    "qwen25_coder": ("Qwen2.5-Coder-32B", "Qwen2.5-Coder-32B", ["Qwen/Qwen2.5-Coder-32B-Instruct", R1]),
}
"""The result's name, the pivot and the targets of each file in FuseO1-Preview/mergekit/fuseo1_configs."""


@pytest.mark.parametrize("name", FUSEO1)
def test_the_fuseo1_recipes_are_the_published_sce_merges(name: str) -> None:
    text = (ROOT / "yaml_recipes" / f"fuseo1_r1_{name}.yaml").read_text()
    hub, pivot, models = FUSEO1[name]
    recipe = yaml.safe_load(text)
    assert recipe["base_model"] == f"Qwen/{pivot}"
    assert [one["model"] for one in recipe["models"]] == models
    assert recipe["parameters"] == {"granularity": "matrix", "select_topk": 1.0, "erase_minority": True}
    assert (recipe["merge_method"], recipe["dtype"]) == ("varm", "bfloat16")
    assert f"FuseAI/FuseO1-DeepSeekR1-{hub}-Preview" in text


def test_a_model_that_is_spread_over_gpus_is_extracted_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_trainer.pipeline.merges.output_of", tiny_pipeline.check_in_process)
    _, stages = read_pipeline(ROOT / "examples" / "fusechat_7b_v2" / "pipeline.yaml")
    commands = {stage.name: " ".join(stage.command) for stage in stages if stage.kind == "extract"}
    launched = {name for name, command in commands.items() if "accelerate" in command}
    assert launched == {"pivot", "starling", "solar", "internlm"}
    assert commands.keys() - launched == {"mixtral", "qwen"}


def test_the_training_config_of_the_documents_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "fusing.md").read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if "aligned_stores" in block]
    path = tmp_path / "target.yaml"
    path.write_text(shown)
    assert read_config(TrainConfig, path, {}).training["learning_rate"] == 5e-6
