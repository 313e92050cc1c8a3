"""What the project ships and shows can be used: training configs, accelerate configs, README's blocks."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from fusion_trainer.config import TrainConfig, read_config

ROOT = Path(__file__).parent.parent
TRAINING = sorted((ROOT / "examples" / "fusechat_7b").glob("*.yaml"))
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
    assert (config.fusion, config.compare, config.unit, config.tail) == (
        "min_ce",
        "conversation",
        "token",
        "renormalise",
    )
    assert f"train examples/fusechat_7b/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == (8 if path.stem.endswith("8gpu") else 1)
    assert f"--config_file examples/accelerate/{path.name}" in path.read_text()


def test_the_readmes_training_config_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if "aligned_stores" in block]
    path = tmp_path / "target.yaml"
    path.write_text(shown)
    assert read_config(TrainConfig, path, {}).training["learning_rate"] == 5e-6
