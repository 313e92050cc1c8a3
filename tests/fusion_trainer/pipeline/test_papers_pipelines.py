"""The pipelines of the papers, from download to merge, on a machine that starts with nothing but a Hub.

The Hub serves tiny models under the papers' names. The pipelines are read as they are. Only this is changed:
there are no eight GPUs (`launch`), no bitsandbytes (`load_in`), and too few rows for batches of 128
(`gradient_accumulation_steps`). OpenLLaMA is asked for at a revision, as a user does who wants another commit.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import papers_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from warm import Warm

from varm_common.checkpoints import fingerprint_of
from varm_common.files import read_json

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"
PIPELINES = ("fusechat_7b", "fusechat_7b_v2", "fusellm_7b")
OPEN_LLAMA = "openlm-research/open_llama_7b_v2"
REVISION = "refs/pr/9"


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        papers_hub.fill(hub, {OPEN_LLAMA: REVISION})
        yield hub


@pytest.fixture(scope="module")
def environment(hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Programs that start at once, and an empty cache."""
    folder = tmp_path_factory.mktemp("machine")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    warm = Warm(folder / "warm", environment)
    yield {**environment, "PATH": f"{warm.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    warm.end()


def as_written(name: str) -> dict[str, Any]:
    """A pipeline's settings without what only the papers' machines can do."""
    settings: dict[str, Any] = yaml.safe_load((EXAMPLES / name / "pipeline.yaml").read_text())
    settings.pop("launch")
    settings["train"]["training"]["gradient_accumulation_steps"] = 1
    for source in settings["sources"]:
        source.pop("load_in", None)
        if source["model"] == OPEN_LLAMA:
            source["revision"] = REVISION
    if others := settings["prepare"].get("fit_tokenizers"):
        at_revision = {OPEN_LLAMA: f"{OPEN_LLAMA}@{REVISION}"}
        settings["prepare"]["fit_tokenizers"] = [at_revision.get(other, other) for other in others]
    return settings


def run(folder: Path, environment: dict[str, str], settings: dict[str, Any]) -> str:
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = ["fusion-trainer", "run", "pipeline.yaml"]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def safe_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_the_papers_runs_from_download_to_merge(
    name: str, hub: hub_server.Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    settings = as_written(name)
    said = run(tmp_path, environment, settings)
    assert "Traceback" not in said
    work = tmp_path / settings["work"]
    pivot = hub.repositories[settings["pivot"]].files()
    chosen = sorted(file for file in pivot if file.endswith(".safetensors")) or sorted(
        file for file in pivot if file.endswith(".bin")
    )
    weights = fingerprint_of([(file, hashlib.sha256(pivot[file]).hexdigest()) for file in chosen])
    targets = settings.get("targets") or [source["name"] for source in settings["sources"]]
    for target in targets:
        record = read_json(work / "targets" / target / "fusion.json")
        assert record["pivot"]["weights"] == weights
        assert record["rounding"]["dtype"] == "bfloat16"
    for merge in settings["merges"]:
        merged = safe_weights(work / "merges" / merge)
        assert merged
        assert all(torch.isfinite(tensor).all() for tensor in merged.values()), merge
    assert "stages are up to date" in run(tmp_path, environment, settings)
    for useless in (r"consolidated", r"Llama-2-7b-hf/.*\.bin$"):
        assert hub.count("GET", useless) == 0


def test_a_model_that_needs_a_token_is_a_sentence(
    hub: hub_server.Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.add("meta-llama/Llama-2-13b-hf", {"config.json": b"{}"}, gated=True)
    settings = {**as_written("fusellm_7b"), "pivot": "meta-llama/Llama-2-13b-hf"}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    command = ["fusion-trainer", "run", "pipeline.yaml", "--until", "prepare"]
    without = {**environment, "HF_TOKEN": ""}
    done = subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)
    assert done.returncode == 1
    assert "`meta-llama/Llama-2-13b-hf` is not a folder, and the Hub replied" in done.stderr
    assert "Access to this model is restricted" in done.stderr
    assert "Traceback" not in done.stderr
