"""``fusion-trainer extract`` as processes: killed, shared by several, out of disk, out of memory.

Importing torch and transformers takes seconds. The console script and ``accelerate launch`` are run as a user runs
them; for the many runs that are to be killed, one process imports everything and forks itself for each run.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_fusion
import tiny_sources
import torch
from programs import BIN, ENVIRONMENT, Programs, free_port, tree, wait_for

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore

pytestmark = pytest.mark.slow

CHATS = tiny_sources.made_up_chats(250, words=10, turns=1)
SETTINGS = ["--template", "openchat", "--batch-tokens", "250", "--shard-tokens", "220"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    started = Programs(tmp_path_factory.mktemp("programs"))
    yield started
    started.end()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, a pivot, and a ChatML source; in bfloat16, where another shape of a batch gives other bytes."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    tiny_sources.save_source(folder / "pivot", "mistral", "sentencepiece_bpe")
    own = {"padded": 50, "dtype": torch.bfloat16, **tiny_fusion.CHATML}
    tiny_sources.save_source(folder / "source", "qwen2", "byte_level_bpe", **own)
    return folder


def extract(world: Path, *more: object) -> list[str]:
    """The arguments that write the store ``stores/source`` below the current folder."""
    paths = ["--data", world / "chats.jsonl", "--pivot", world / "pivot", "--model", world / "source"]
    return ["extract", *map(str, paths), *SETTINGS, "--output", "stores/source", *map(str, more)]


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``stores`` that the console script writes: prepared dialogues and the store."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    program = [BIN / "fusion-trainer", *extract(world)]
    result = subprocess.run(program, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "supervised tokens" in result.stdout
    assert "100%" in result.stderr  # the progress bar
    assert re.search(r"tok/s, [\d.]+k?tok/s of the model's own\]", result.stderr)
    store = RepresentationStore(folder / "stores" / "source")
    assert len(store) == len(CHATS)
    assert len(store.manifest["shards"]) > 60
    return folder / "stores"


def no_half_written_shard(stores: Path, uninterrupted: Path) -> int:
    """Every shard that is there is whole; returns how many there are."""
    shards = list((stores / "source").glob("*.arrow")) if stores.is_dir() else []
    for shard in shards:
        assert shard.read_bytes() == (uninterrupted / "source" / shard.name).read_bytes(), shard.name
    return len(shards)


def test_killed_at_any_point_and_started_again_the_store_has_the_same_bytes(
    programs: Programs, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed in the preparation, at some number of shards as soon as the last has its name, and at the end."""
    stores = tmp_path / "stores"
    store = stores / "source"
    shards = len(RepresentationStore(uninterrupted / "source").manifest["shards"])
    rng = random.Random(2402)
    kills: list[tuple[str, Callable[[], Any]]] = [
        ("in the preparation", lambda: list(stores.glob("dialogues-*.tmp/blocks.arrow*"))),
        ("at the start of the extraction", (store / "extraction.json").exists),
        *(
            (f"at {number} shards", lambda number=number: (store / f"shard-{number - 1:05}.arrow").exists())
            for number in sorted(rng.sample(range(1, shards), 5))
        ),
        ("at the last shard", (store / f"shard-{shards - 1:05}.arrow").exists),
        ("at the manifest", lambda: list(store.glob("manifest.json*"))),
    ]
    killed = []
    for when, reached in kills:
        run = programs.start(tmp_path, *extract(world))
        wait_for(reached, run.process)
        if "shards" in when:
            time.sleep(rng.choice([0, 0, 0.002, 0.004]))
        with suppress(ProcessLookupError):
            os.kill(run.process, signal.SIGKILL)
        code, said = run.wait()
        assert code in (0, -signal.SIGKILL), said
        if code:
            killed.append(when)
        there = no_half_written_shard(stores, uninterrupted)
        assert there in (0, shards) or (store / "extraction.json").is_file(), when
        assert there == shards or not (store / "manifest.json").exists()
    assert len(killed) >= len(kills) - 2, killed  # at the very end a run may be faster than the signal
    code, said = programs.run(tmp_path, *extract(world))
    assert code == 0, said
    assert tree(stores) == tree(uninterrupted)
    assert f"{shards} shards" in programs.run(tmp_path, "store", "verify", "stores/source")[1]


def test_interrupted_from_the_keyboard_a_run_ends_soon_and_can_be_gone_on_with(
    programs: Programs, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    for attempt in range(5):  # on a busy machine a run may be over before it can be interrupted
        tmp_path = tmp_path / f"attempt-{attempt}"
        tmp_path.mkdir()
        run = programs.start(tmp_path, *extract(world))
        wait_for((tmp_path / "stores" / "source" / "shard-00004.arrow").exists, run.process)
        os.kill(run.process, signal.SIGINT)
        code, said = run.wait()
        if code:
            break
    assert code == 1
    assert "Aborted!" in said
    assert "Traceback" not in said
    assert 5 <= no_half_written_shard(tmp_path / "stores", uninterrupted) < 60
    assert programs.run(tmp_path, *extract(world))[0] == 0
    assert tree(tmp_path / "stores") == tree(uninterrupted)


def test_two_processes_share_the_work_and_write_the_same_bytes_as_one(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """``--multi_gpu`` is accelerate's way to start several processes, also where there is no GPU."""
    launch = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    program = [*launch, *options, "-m", "fusion_trainer", *extract(world)]
    result = subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("supervised tokens,") == 1  # one of the two tells the result
    assert tree(tmp_path / "stores") == tree(uninterrupted)
    tokens = Dialogues(next(uninterrupted.glob("dialogues-*"))).lengths.sum()
    share = re.findall(r"100%.*/([\d.]+)k \[", result.stderr)[-1]  # of the process that shows its bar
    assert float(share) * 1000 < 0.7 * tokens


def test_two_processes_that_share_one_model_write_the_numbers_of_one(
    programs: Programs, world: Path, tmp_path: Path
) -> None:
    """Each has half of every layer, so that sums have another order; a store rounds them to float16."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    own = ["--dtype", "float32", "--shard-tokens", "2500", "--batch-tokens", "1000", "--output"]
    shared = ["--tensor-parallel", "2"]
    assert programs.run(tmp_path, *extract(world, *own, "stores/one"))[0] == 0
    code, said = programs.run(tmp_path, *extract(world, *own, "stores/two", *shared), environments=ranks)
    assert code == 0, said
    assert said.count("supervised tokens,") == 1
    one, two = (RepresentationStore(tmp_path / "stores" / name) for name in ("one", "two"))
    assert one.identity == two.identity
    assert len(one.manifest["shards"]) > 1
    for alone, together in zip(one, two, strict=True):
        np.testing.assert_array_equal(alone.ids, together.ids)
        for name in ("logprobs", "tail", "gold_logprob"):
            numbers = [getattr(row, name).astype(np.float64) for row in (alone, together)]
            np.testing.assert_allclose(*numbers, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ([], "--tensor-parallel 2 needs 2 processes, and there is 1: start it with `torchrun --nproc-per-node 2"),
        (["--device-map", "auto"], "leave out --device-map"),
    ],
)
def test_a_model_that_is_to_be_shared_needs_its_processes(
    more: list[str], error: str, programs: Programs, world: Path, tmp_path: Path
) -> None:
    code, said = programs.run(tmp_path, *extract(world, "--tensor-parallel", "2", *more))
    assert code == 1
    assert error in said
    assert not tree(tmp_path)


# A full disk


def test_a_full_disk_ends_in_a_message_and_a_store_that_can_be_gone_on_with(
    programs: Programs, world: Path, uninterrupted: Path, small_disk: Callable[[int], Path]
) -> None:
    folder = small_disk(sum(map(len, tree(uninterrupted).values())) // 2)
    code, said = programs.run(folder, *extract(world))
    assert code == 1
    assert "the disk is full" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert 5 < no_half_written_shard(folder / "stores", uninterrupted) < 60
    assert not list((folder / "stores").rglob("*.tmp"))
    small_disk(1 << 26)
    assert programs.run(folder, *extract(world))[0] == 0
    assert tree(folder / "stores") == tree(uninterrupted)


def test_a_disk_that_is_full_before_the_first_shard_ends_in_a_message(
    programs: Programs, world: Path, small_disk: Callable[[int], Path]
) -> None:
    folder = small_disk(8192)
    code, said = programs.run(folder, *extract(world))
    assert code == 1
    assert "Traceback" not in said
    assert "disk is full" in said or "No space left on device" in said
    assert not tree(folder)


@pytest.mark.parametrize("what", ["a shard", "the manifest"])
def test_a_file_that_may_not_be_written_ends_in_a_message_and_a_store_that_can_be_gone_on_with(
    what: str, programs: Programs, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A limit on the size of files: below the size of some shards, and between them and the manifest."""
    dialogues = shutil.copytree(next(uninterrupted.glob("dialogues-*")), tmp_path / "dialogues")
    arguments = extract(world, "--dialogues", dialogues)
    sizes = sorted(path.stat().st_size for path in (uninterrupted / "source").glob("*.arrow"))
    assert (uninterrupted / "source" / "manifest.json").stat().st_size > sizes[-1]
    limit = sizes[-1] if what == "the manifest" else sizes[-2]
    code, said = programs.run(tmp_path, *arguments, file_size=limit)
    assert code == 1
    assert "Traceback" not in said
    assert "File too large" in said
    there = no_half_written_shard(tmp_path / "stores", uninterrupted)
    assert there == len(sizes) if what == "the manifest" else 0 < there < len(sizes)
    assert not list((tmp_path / "stores").rglob("*.tmp"))
    assert programs.run(tmp_path, *arguments)[0] == 0
    assert tree(tmp_path / "stores" / "source") == tree(uninterrupted / "source")


# Memory


def test_out_of_memory_the_message_says_which_flag_to_lower(
    programs: Programs, world: Path, tmp_path: Path
) -> None:
    """Attention over 32 × 860 tokens at once takes over 1 GB; only 600 MB more may be had."""
    long_answers = [[("Count.", " ".join(["1 2 3 fox"] * 120))] for _ in range(32)]
    data = tiny_sources.write_sharegpt(tmp_path / "long.jsonl", long_answers)
    arguments = ["extract", "--pivot", world / "pivot", "--model", world / "source", "--template", "openchat"]
    arguments += ["--data", data, "--output", "stores/source", "--attention", "eager", "--batch-tokens"]
    code, said = programs.run(tmp_path, *arguments, 10**6, more_memory=600 << 20)
    assert code == 1, said
    assert "Traceback" not in said
    assert "out of memory on cpu with a batch of 32 × " in said
    assert "lower --batch-tokens (now 1000000)" in said
    assert not (tmp_path / "stores" / "source").exists()
    code, said = programs.run(tmp_path, *arguments, 1000, more_memory=600 << 20)
    assert code == 0, said
