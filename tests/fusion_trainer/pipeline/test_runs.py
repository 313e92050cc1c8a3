"""``fusion-trainer run`` on a toy fusion: whole, twice, changed, added to, broken, killed, on two machines.

The stages are the real programs.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import runs
import tiny_pipeline
import yaml
from programs import BIN, ENVIRONMENT, Programs, free_port, tree, wait_for
from safetensors.torch import load_file, save_file
from tiny_pipeline import ADDED, MERGED, MERGES, PIPELINE, ROOT, TITLES, TRAINED, write
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    return tiny_pipeline.make(tmp_path_factory.mktemp("world"))


IMPORTS = """
import mergekit.scripts.run_yaml, peft, varm_merge.cli
import fusion_trainer.alignment.align, fusion_trainer.training.evaluate, fusion_trainer.training.train
import fusion_trainer.pipeline.merges as merges
from click.testing import CliRunner

merges.output_of = lambda command: CliRunner().invoke(varm_merge.cli.main, command[1:]).stdout
"""
"""What every run has imported; its recipes are checked without another process."""


@pytest.fixture(scope="module", autouse=True)
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Future[Programs]"]:
    """The process that is forked for each run imports everything while the file's first tests run."""
    with ThreadPoolExecutor(1) as thread:
        started = thread.submit(Programs, tmp_path_factory.mktemp("programs"), IMPORTS)
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
    """All that is made but records, configs, checkpoints, times in ``fusion.json``, and mergekit's model cards."""
    left_out = re.compile(
        r"stage\.json|README\.md|sums\.json|lock|configs/.*|.*checkpoint-.*|.*/runs/.*|.*fusion\.json"
    )
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
    assert run_of(said) == dict.fromkeys(TITLES, "not run yet")
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
    assert lines["train bytes"].endswith("  runs again: clm_weight 0.9 → 0.8  (3 steps)")
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
        assert head.split() == ["|", "model", "|", "all", "|", "sorting", "|"]
        lines = [f"| {name} | {form(of['all'])} | {form(of['sorting'])} |" for name, of in groups.items()]
        assert [row.split() for row in rows] == [line.split() for line in lines]
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
    assert told == {f"train {name}": "runs again: clm_weight 0.9 → 0.8" for name in ("bytes", "mistral")}
    report = said[said.index("### Loss") :]
    assert "| pivot " in report
    assert "target-bytes" not in report  # its score is of the target that was
    assert "| merge-" not in report
    code, said = programs.run(copy, "run", path.name)
    assert code == 0, said
    assert run_of(said).keys() | told.keys() == TRAINED
    assert run_of(said)["merge linear"] == "runs again: train bytes has changed; train mistral has changed"
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
    assert all(run_of(said)[title] == "not run yet" for title in new)
    now, same = results(copy), times(copy / "work")
    for name in content:
        if not name.startswith(("report", *(f"{at}{one}" for at in AT for one in ("varm", "linear", "ties")))):
            assert (now[name], same[name]) == (content[name], before[name]), name
    for name in ("varm", "linear", "ties"):
        assert now[f"merges/{name}/model.safetensors"] != content[f"merges/{name}/model.safetensors"]
    assert "| source-third " in (copy / "work" / "report.md").read_text()


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
        title: f"runs again: `work/{name}` was changed or removed" for title, name in broken.items()
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
    assert "Error: extract mistral ended with exit code 1; see its output above." in said
    assert "Traceback" not in said
    (folder / "mistral" / "model.safetensors").write_bytes(sound)
    code, said = programs.run(folder, "run", "pipeline.yaml", "--until", "align")
    assert code == 0, said
    assert run_of(said) == {
        "extract mistral": "runs again: model has changed",
        "align bytes": "not run yet",
        "align mistral": "not run yet",
        "prepare held_out": "not run yet",
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
        ("in the preparation", (work / ".dialogues.begun.json").exists),
        ("between two stages", (work / "dialogues" / "stage.json").exists),
        ("in an extraction", (work / "stores" / "pivot" / "shard-00001.arrow").exists),
        ("before its record", (work / "stores" / "bytes" / "manifest.json").exists),
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
    for when, reached in kills:
        run = programs.start(folder, "run", "pipeline.yaml", before=GROUP)
        wait_for(reached, run.process)
        time.sleep(rng.choice([0, 0, 0.002, 0.02]))
        os.killpg(run.process, signal.SIGKILL)
        code, said = run.wait()
        assert code == -signal.SIGKILL, f"{when}: {said}"
    code, said = programs.run(folder, "run", "pipeline.yaml")
    assert code == 0, said
    assert results(folder) == results(whole)
    assert not [path for path in work.rglob("*") if path.name.endswith((".begun.json", ".removed", ".tmp"))]


def has_ended(process: psutil.Process) -> bool:
    """Nobody may be there to wait for a process whose parent was killed."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


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
    assert run_of(said) == {"train bytes": "resumes"}
    assert has_ended(stage)
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
    assert has_ended(stage)


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
        assert config.exists(), first.wait()
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


def test_two_machines_extract_the_bytes_that_one_process_does(programs: Programs, copy: Path, whole: Path) -> None:
    """Each is started as a launcher would: its rank among the machines, the only process on its own."""
    store = copy / "work" / "stores" / "bytes"
    shutil.rmtree(store)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    code, said = programs.run(copy, "extract", "work/configs/extract-bytes.yaml", environments=ranks)
    assert code == 0, said
    made = {path.name: path.read_bytes() for path in store.iterdir() if path.name != "manifest.json"}
    theirs = whole / "work" / "stores" / "bytes"
    assert len(made) > 2
    assert made == {name: (theirs / name).read_bytes() for name in made}
    ours, alone = (json.loads((folder / "manifest.json").read_text()) for folder in (store, theirs))
    assert ours["identity"] == alone["identity"]
