"""``varm-merge check`` of models on the Hub: over HTTP, headers only; and the estimated size of a merge."""

import json
import os
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from hub_server import READ_TOKEN, TOKEN, Fault, Hub
from mergekit.options import MergeOptions
from programs import BIN
from safetensors.torch import load_file, save_file
from tiny_models import Family, resave

import varm_merge.merging.method  # noqa: F401  registers varm
from varm_merge.cli import main
from varm_merge.merging.lineage import Place
from varm_merge.recipes import cost as estimate
from varm_merge.recipes.check import check
from varm_merge.recipes.headers import read_model
from varm_merge.recipes.problems import Looked

LARGE_BYTES = 5_000_000
"""Of the weights of each model on the Hub: the headers are a part of it that cannot be mistaken."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def enlarged(folder: Path, to: Path) -> dict[str, bytes]:
    """The model with a tensor more, of ``LARGE_BYTES``."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors["model.large.weight"] = torch.zeros(LARGE_BYTES // 4)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return files_of(to)


@pytest.fixture
def hub(mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = huggingface_hub.constants
    with hub_server.serving() as serving:
        for name, folder in (("pivot", mistral.pivot), ("one", mistral.targets[0]), ("two", mistral.targets[1])):
            serving.add(f"org/{name}", enlarged(folder, tmp_path / name))
        url = serving.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        yield serving


def recipe(**changes: Any) -> dict[str, Any]:
    models = [{"model": name} for name in ("org/one", "org/two")]
    return {"merge_method": "varm", "base_model": "org/pivot", "models": models, "dtype": "float32", **changes}


def messages_of(content: dict[str, Any], cache: Path, looked: Looked | None = None) -> list[str]:
    text = yaml.safe_dump(content, sort_keys=False)
    looked = looked if looked is not None else Looked()
    options = MergeOptions(transformers_cache=str(cache))
    return [f"{one.line}: {one.message}" for one in check(text, every=True, looked=looked, options=options)]


def test_of_models_on_the_hub_only_headers_are_read(hub: Hub, tmp_path: Path, mistral: Family) -> None:
    looked = Looked()
    assert messages_of(recipe(), tmp_path / "c", looked) == []
    assert hub.sent_bytes < 1_000_000  # of 15 million
    assert looked.estimate["read_bytes"] > 3 * LARGE_BYTES
    assert not list((tmp_path / "c").rglob("*.safetensors"))
    model = read_model(Place("org/one", None, str(tmp_path / "c")))
    whole = load_file(mistral.targets[0] / "model.safetensors")
    assert {name: shape for name, (shape, _) in model.tensors.items() if "large" not in name} == {
        name: tuple(tensor.shape) for name, tensor in whole.items()
    }


def test_shards_and_revisions_on_the_hub_are_read(hub: Hub, tmp_path: Path, mistral: Family) -> None:
    shards = files_of(resave(mistral.targets[0], tmp_path / "shards", shard_size="10KB"))
    assert sum(name.endswith(".safetensors") for name in shards) > 1
    hub.repositories["org/one"].branches["small"] = [("shards", shards)]
    hub.add("org/pivot", files_of(mistral.pivot))
    looked = Looked()
    found = messages_of(recipe(models=[{"model": "org/one@small"}]), tmp_path / "c", looked)
    assert found == []
    sizes = [model.bytes for model in looked.models.values()]
    assert sizes[0] == sizes[1]
    assert Place("org/one", "small", str(tmp_path / "c")).file("model.safetensors.index.json")
    assert (
        messages_of(recipe(models=[{"model": "org/one@small"}]), tmp_path / "c") == []
    )  # its shards are still away
    (problem,) = messages_of(recipe(models=[{"model": "org/one@smal"}]), tmp_path / "c")
    assert problem == "4: `org/one` has no revision `smal` on the Hub"


def test_models_that_do_not_fit_are_reported_before_they_are_downloaded(
    hub: Hub, tmp_path: Path, mistral: Family
) -> None:
    files = files_of(mistral.targets[0])
    files["config.json"] = files["config.json"].replace(b"MistralForCausalLM", b"LlamaForCausalLM")
    hub.add("org/one", files)
    (problem,) = messages_of(recipe(), tmp_path / "c")
    assert problem.startswith("4: org/one is a LlamaForCausalLM, org/pivot a MistralForCausalLM: ")


def test_missing_private_gated_and_empty_models_are_distinguished_and_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/one"].gated = True
    hub.add("org/empty", {"README.md": b"# Nothing"})
    content = recipe(models=[{"model": f"org/{name}"} for name in ("one", "nothing", "empty")])
    problems = messages_of(content, tmp_path / "c")
    assert problems[0] == "4: `org/one` is gated: accept its conditions on the Hub, then run `hf auth login`"
    assert problems[1].startswith("5: no model folder `org/nothing`, and no such model on the Hub")
    assert problems[2] == "6: `org/empty` on the Hub has no config.json"
    assert len(problems) == 3
    hub.faults = [Fault("GET", "/api/models/org/two", 9, 503)]
    (problem,) = messages_of(recipe(models=[{"model": "org/two"}]), tmp_path / "c")
    assert problem.startswith("4: no model folder `org/two`, and the Hub did not answer")


def test_who_may_read_a_gated_model_is_not_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/one"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert messages_of(recipe(), tmp_path / "c") == []


def test_a_fusion_json_that_the_hub_refuses_is_not_taken_for_none(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("HEAD", "org/one/resolve/.*/fusion.json", 9, 403)]
    (problem,) = messages_of(recipe(), tmp_path / "c")
    assert "cannot check whether the targets come from `org/pivot`: " in problem
    assert "\n" not in problem


CARD = "---\nbase_model: {}\n---\n# A target\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "remarked"),
    [
        ("other/base", True),
        ("[other/base, other/second]", True),
        ("org/pivot", False),
        ("copy/Pivot", False),
        ("[other/base, org/pivot]", False),
        ("[]", False),
        ("{a: b}", True),
    ],
)
def test_a_card_that_names_another_base_model_is_remarked(
    named: str, remarked: bool, hub: Hub, tmp_path: Path
) -> None:
    files = hub.repositories["org/one"].files()
    hub.add("org/one", {**files, "README.md": CARD.format(named).encode()})
    looked = Looked()
    assert messages_of(recipe(), tmp_path / "c", looked) == []
    found = [f"{one.line}: {one.message}" for one in looked.remarks]
    assert bool(found) == remarked
    assert all(one.startswith("4: the card of `org/one` names `") for one in found)


def test_the_card_of_a_folder_is_read_and_of_other_methods_not(mistral: Family, tmp_path: Path, hub: Hub) -> None:
    target = shutil.copytree(mistral.targets[0], tmp_path / "target")
    (target / "README.md").write_text(CARD.format("other/base"))
    content = recipe(base_model=str(mistral.pivot), models=[{"model": str(target)}])
    looked = Looked()
    assert messages_of(content, tmp_path / "c", looked) == []
    (remark,) = looked.remarks
    assert "names `other/base` as its base model, but the base_model is" in remark.message
    looked = Looked()
    sound = {**content, "merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}
    assert messages_of(sound, tmp_path / "c", looked) == []
    assert looked.remarks == []
    (target / "README.md").write_text("---\nbase_model: [\n---\n")
    looked = Looked()
    assert messages_of(content, tmp_path / "c", looked) == []
    assert looked.remarks == []


# The estimate


def checked(path: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["check", str(path), "--json", *options])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_what_has_to_be_downloaded_is_reported(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    found = checked(path, "--cache-dir", str(tmp_path / "c"))["estimate"]
    assert found["download_bytes"] == found["read_bytes"] > 3 * LARGE_BYTES
    done = CliRunner().invoke(main, ["check", str(path), "--cache-dir", str(tmp_path / "c")])
    assert ", downloads 15" in done.output


def test_too_little_room_on_the_disk_or_in_memory_is_remarked(
    mistral: Family, tmp_path: Path, small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    models = [{"model": str(one)} for one in mistral.targets]
    path.write_text(yaml.safe_dump(recipe(base_model=str(mistral.pivot), models=models)))
    assert checked(path, "--out", str(tmp_path / "not" / "yet"))["remarks"] == []
    assert not (tmp_path / "not").exists()
    free = types.SimpleNamespace(available=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: free)
        (remark,) = checked(path)["remarks"]
    assert "in memory, and 1 MB are free here; mergekit-yaml --out-shard-size" in remark["message"]
    disk = small_disk(8192)
    done = CliRunner().invoke(main, ["check", str(path), "--out", str(disk / "out"), "--json"])
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.exit_code == 1
    assert "kB free, and the merge writes" in problem["message"]
    assert list(disk.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_problem(mistral: Family, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    models = [{"model": str(one)} for one in mistral.targets]
    path.write_text(yaml.safe_dump(recipe(base_model=str(mistral.pivot), models=models)))
    for out, reason in ((Path("/proc/out"), ""), (path / "out", "Not a directory")):
        for options in ([], ["--offline"]):
            done = CliRunner().invoke(main, ["check", str(path), "--out", str(out), *options])
            assert done.exit_code == 1
            assert f"✗ line 1: `{out}` cannot be written: `{out.parent}`: {reason}" in done.output
            assert "✓" not in done.output


def test_a_hub_that_refuses_is_queried_once_and_what_to_do_is_printed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    api = huggingface_hub.HfApi.model_info
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *args, **kwargs: (asked.append(args[1]), api(*args, **kwargs))[1],
    )
    problems = messages_of(recipe(), tmp_path / "c")
    assert len(problems) == 3
    assert all(
        "Connection refused; `varm-merge check --offline` checks only the recipe" in one for one in problems
    )
    assert len(asked) == 1


def test_the_memory_is_near_what_a_merge_was_seen_to_take() -> None:
    """The runs of benchmarks/results/2026-11-21-merge.md: 1.1 B parameters in bfloat16, shards of 200 MB."""
    largest = 32000 * 2048 * 2
    for method, seen_mib in (("varm", 594), ("task_arithmetic", 925), ("sce", 1557), ("ties", 2307)):
        copies = estimate.COPIES.get(method, estimate.OTHER_COPIES)
        estimated_mib = (estimate.START_BYTES + 200e6 + copies * 4 * largest) / 2**20
        assert estimated_mib == pytest.approx(seen_mib, rel=0.75)


def test_the_memory_is_the_start_the_shard_and_a_share_of_the_largest_tensor() -> None:
    for method, written, expected in (
        ("varm", 2_000_000_000, 310_000_000 + 2_000_000_000 + 100_000_000),
        ("linear", 9_000_000_000, 310_000_000 + 5_000_000_000 + 400_000_000),
        ("ties", 2_000_000_000, 310_000_000 + 2_000_000_000 + 1_600_000_000),
    ):
        sizes = {"written_bytes": written, "largest_tensor_bytes": 400_000_000}
        found = estimate.estimate({"merge_method": method}, Looked(estimate=sizes))
        assert found["memory_bytes"] == expected


@pytest.mark.slow
def test_the_program_reads_models_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": READ_TOKEN}
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [BIN / "varm-merge", "check", path, "-q"], env={**own, **home}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"✓ {path} can be merged\n")
    assert hub.sent_bytes < 1_000_000
