"""Scripts that were written before modules moved into folders still run."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("fusion_trainer.conversations", "fusion_trainer.data.conversations", "Message"),
        ("fusion_trainer.templates", "fusion_trainer.data.templates", "Template"),
        ("fusion_trainer.tokens", "fusion_trainer.text.tokenizer", "TextTokenizer"),
        ("fusion_trainer.trainer", "fusion_trainer.training.trainer", "FusionTrainer"),
        ("fusion_trainer.errors", "varm_common.errors", "FusionError"),
        ("varm_merge.errors", "varm_common.errors", "VarmError"),
        ("varm_merge.weights", "varm_merge.merging.weights", "Settings"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_is_one_object_by_its_old_and_its_new_name(old: str, new: str, name: str) -> None:
    for module in (old, new):
        importlib.import_module(module.split(".")[0])
    assert importlib.import_module(old) is importlib.import_module(new)
    assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)
    assert importlib.import_module(new).__spec__.name == new


@pytest.mark.slow
def test_an_old_name_is_reported() -> None:
    code = "import fusion_trainer.conversations as old; print(old.__name__)"
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "fusion_trainer.conversations is now fusion_trainer.data.conversations" in done.stderr


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fusion_trainer\.nothing"):
        importlib.import_module("fusion_trainer.nothing")
