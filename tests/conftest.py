"""Fixtures of the suite: tiny checkpoints, made once per session. Nothing here reaches the network."""

import gc
import os
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_fusion
import tiny_models
import torch

torch.set_num_threads(1)  # tiny tensors; a second thread only waits for the machine's other work


LONGEST = (
    *("test_documents", "test_runs", "test_fusion_programs", "test_train_programs", "test_papers_pipelines"),
    *("test_compare", "test_compare_tasks", "test_compare_parts", "test_tune", "test_autoload", "test_refusals"),
)
"""The files that take longest, which are run first: then no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a command sets for the programs it starts ends with the test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tiny_models.Family]:
    """``family("mistral", targets=3, dtype=torch.bfloat16)``: saved once, for reading only."""
    saved: dict[object, tiny_models.Family] = {}

    def get(architecture: str, targets: int = 2, dtype: torch.dtype = torch.float32) -> tiny_models.Family:
        key = architecture, targets, dtype
        if key not in saved:
            saved[key] = tiny_models.save_family(tmp_path_factory.mktemp(architecture), *key)
        return saved[key]

    return get


@pytest.fixture(scope="session")
def mistral(family: Callable[..., tiny_models.Family]) -> tiny_models.Family:
    """A pivot and two targets, for tests that are not about the architecture."""
    return family("mistral")


@pytest.fixture(scope="session")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> tiny_fusion.World:
    """A pivot, two sources, their stores and the aligned ones; for reading only."""
    made = tiny_fusion.make(tmp_path_factory.mktemp("fusion"))
    gc.collect()
    gc.freeze()  # a Trainer collects garbage each time it begins; among all that was imported that takes long
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(bytes)`` mounts a file system of that size, or makes the mounted one that large."""
    folder = tmp_path / "disk"

    def of_size(size: int) -> Path:
        options = f"size={size}" + (",remount" if folder.is_dir() else "")
        folder.mkdir(exist_ok=True)
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if mount.returncode:
            pytest.skip("only root may mount a small file system")
        return folder

    yield of_size
    subprocess.run(["umount", folder], check=False, capture_output=True)
