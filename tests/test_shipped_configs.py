"""What the project ships and shows can be used: training configs, accelerate configs, README's blocks."""

import re
from pathlib import Path

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


def test_the_training_config_of_the_documents_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "fusing.md").read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if "aligned_stores" in block]
    path = tmp_path / "target.yaml"
    path.write_text(shown)
    assert read_config(TrainConfig, path, {}).training["learning_rate"] == 5e-6
