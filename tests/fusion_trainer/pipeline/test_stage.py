"""Stages made once, with commands that only write files: what is run again and why, and what is never removed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import wait_for

from fusion_trainer.pipeline import processes, runner, state
from fusion_trainer.pipeline.processes import run_command
from fusion_trainer.pipeline.runner import Runner
from fusion_trainer.pipeline.stage import Stage
from varm_common import files
from varm_common.errors import UserError

FIRST = {
    "prepare": "manifest.json",
    "extract": "extraction.json",
    "align": "extraction.json",
    "train": "training.json",
    "merge": "config.json",
    "evaluate": "scores.json",
}
"""What a command writes before all else."""
RESULT = {
    "prepare": "blocks.arrow",
    "extract": "shard-00000.arrow",
    "align": "shard-00000.arrow",
    "train": "model.safetensors",
    "merge": "model.safetensors",
    "evaluate": "scores.json",
}
"""And in the end."""
SHELL = ["/bin/sh", "-ec"]
WRITES = """
log=$0 first=$1 result=$2 config=$3 output=$4
echo $output >> $log
mkdir -p $output
printf begun > $output/$first
cat $config > $output/$result
"""
NEEDS: dict[str, list[str]] = {
    "prepare data": [],
    "extract pivot": ["prepare data"],
    "extract a": ["prepare data"],
    "align a": ["extract pivot", "extract a"],
    "train a": ["align a"],
    "merge both": ["train a"],
    "evaluate merged": ["merge both"],
}


def a_stage(work: Path, title: str, needs: Sequence[str] = (), program: str = WRITES, **settings: Any) -> Stage:
    """A stage that writes its settings into its folder, and its folder's name into ``work/../log``."""
    kind, _, name = title.partition(" ")
    output, config = work / kind / name, work / "configs" / f"{kind}-{name}"
    command = [*SHELL, program, work.parent / "log", FIRST[kind], RESULT[kind], config, output]
    inputs = {config: json.dumps(settings)}
    return Stage(kind, name, output, [str(part) for part in command], inputs, settings, needs, {}, {})


def pipeline(work: Path, programs: dict[str, str] | None = None, **changed: Any) -> list[Stage]:
    """All of ``NEEDS``; ``changed`` are settings by the stage's name."""
    return [
        a_stage(work, title, needs, (programs or {}).get(title, WRITES), size=changed.get(title.split()[1], 1))
        for title, needs in NEEDS.items()
    ]


def result(work: Path, title: str) -> Path:
    """What a stage has written last."""
    return work / title.replace(" ", "/") / RESULT[title.split()[0]]


def run(stages: Sequence[Stage]) -> list[str]:
    return Runner(stages[0].output.parents[1], stages).run(stages)


def reasons(stages: Sequence[Stage]) -> dict[str, str]:
    """Why each stage that is not up to date has to run."""
    states = Runner(stages[0].output.parents[1], stages).states(stages)
    return {one.stage.title: one.reason for one in states if not one.made}


def refused(stages: Sequence[Stage]) -> str:
    with pytest.raises(UserError) as error:
        run(stages)
    return str(error.value)


def times(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("sums.json", "lock")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of a small run
    return tmp_path / "work"


def test_every_stage_is_run_once_in_order(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(pipeline(work)) == list(NEEDS)
    order = [str(work / title.replace(" ", "/")) for title in NEEDS]
    assert (work.parent / "log").read_text().splitlines() == order
    assert "[4/7] align a: not run yet" in capfd.readouterr().err
    before = times(work)
    assert run(pipeline(work)) == []
    assert times(work) == before
    assert (work.parent / "log").read_text().splitlines() == order
    assert "[4/7] align a: up to date" in capfd.readouterr().err
    assert json.loads(result(work, "train a").read_text()) == {"size": 1}


def test_a_changed_setting_runs_again_what_depends_on_it_and_says_why(work: Path) -> None:
    run(pipeline(work))
    before = times(work)
    changed = pipeline(work, a=2)
    assert reasons(changed) == {
        "extract a": "runs again: size 1 → 2",
        "align a": "runs again: size 1 → 2; extract a has changed",
        "train a": "runs again: size 1 → 2; align a has changed",
        "merge both": "runs again: train a has changed",
        "evaluate merged": "runs again: merge both has changed",
    }
    assert run(changed) == [*NEEDS][2:]
    assert {path: now for path, now in times(work).items() if "/pivot" in path or "/data" in path} == {
        path: then for path, then in before.items() if "/pivot" in path or "/data" in path
    }
    assert result(work, "extract a").read_text() == '{"size": 2}'
    assert run(changed) == []
    assert set(reasons(pipeline(work))) == {*NEEDS} - {"prepare data", "extract pivot"}


def test_only_the_stages_asked_for_are_run(work: Path) -> None:
    everything = pipeline(work)
    started = Runner(work, everything)
    assert started.run(everything[:2]) == ["prepare data", "extract pivot"]
    assert list(reasons(everything)) == [*NEEDS][2:]
    assert started.run(everything[:3]) == ["extract a"]


def test_the_reason_names_what_has_changed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = a_stage(work, "prepare b")
    first = a_stage(work, "train a", ["prepare b"], training={"seed": 1, "lora": None}, name="å")
    run([needed, first])

    def reason(*before: Stage, **given: Any) -> str:
        needs = [one.title for one in before]
        return reasons([*before, a_stage(work, "train a", needs, **given)])["train a"]

    same = {"training": {"seed": 1, "lora": None}, "name": "å"}
    assert reason(needed, **{**same, "training": {"seed": 2, "lora": None}}) == "runs again: training.seed 1 → 2"
    assert reason(needed, **{**same, "name": "ä"}) == 'runs again: name "å" → "ä"'
    assert reason(**same) == "runs again: prepare b is gone"
    assert reason(needed, a_stage(work, "prepare c"), **same) == "runs again: prepare c is new"
    several = reason(needed, **{**same, "training": {"seed": 2, "lora": {"r": 4}}, "a": 1, "b": 2, "c": 3})
    assert several == "runs again: a null → 1; b null → 2; c null → 3; training.lora.r null → 4; and 1 more"
    monkeypatch.setattr(state, "RULES", 3)
    assert reasons([needed, first])["prepare b"] == "runs again: this version computes this stage differently"


def test_what_a_stage_reads_from_outside_is_known_by_its_content(work: Path, tmp_path: Path) -> None:
    model, folder, file = tmp_path / "model", tmp_path / "dataset", tmp_path / "chats.jsonl"
    for path in (model / "model.safetensors", folder / "deep" / "rows.parquet", file):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some")

    def stands(**changed: Any) -> str | None:
        models = {
            "pivot": (str(changed.get("model", model)), None),
            "other": ("org/name", changed.get("revision")),
        }
        data = {"data[0]": str(changed.get("file", file)), "data[1]": str(folder), "data[2]": "org/set"}
        reads = replace(a_stage(work, "prepare data"), models=models, files=data)
        found = reasons([reads]).get("prepare data")
        if found == "not run yet" or changed.get("run"):
            run([reads])
        return found

    assert stands() == "not run yet"
    (model / "notes.bin").write_text("not read")
    os.utime(file)
    assert stands() is None
    for path, name in (
        (model / "model.safetensors", "pivot"),
        (model / "pytorch_model-00001-of-00002.bin", "pivot"),
        (model / "tokenizer.json", "pivot"),
        (folder / "deep" / "rows.parquet", "data[1]"),
        (folder / "more.parquet", "data[1]"),
        (file, "data[0]"),
    ):
        path.write_text("more")
        assert stands(run=True) == f"runs again: {name} has changed"
        assert stands() is None
    assert stands(revision="v2") == "runs again: other has changed"
    moved, elsewhere = shutil.copytree(model, tmp_path / "moved"), shutil.copy(file, tmp_path / "other.jsonl")
    assert stands(model=moved, file=elsewhere) is None


# Broken folders


@pytest.mark.parametrize("how", ["removed", "longer", "a byte changed", "the record removed too"])
def test_a_broken_stage_is_noticed_and_made_again_alone(how: str, work: Path) -> None:
    run(pipeline(work))
    broken = result(work, "align a")
    whole = broken.read_bytes()
    before = times(work)
    if how == "longer":
        broken.write_bytes(whole + b" ")
    elif how == "a byte changed":
        time.sleep(0.01)
        broken.write_bytes(whole[:-1] + b"!")
    else:
        broken.unlink()
    if how == "the record removed too":
        (work / "align" / "a" / "stage.json").unlink()
        assert "where align a would write" in refused(pipeline(work))
        return
    assert reasons(pipeline(work)) == {"align a": f"runs again: `{broken}` was changed or removed"}
    assert run(pipeline(work)) == ["align a"]
    assert broken.read_bytes() == whole
    others = {path: state for path, state in before.items() if "/align/a/" not in path}
    assert {path: state for path, state in times(work).items() if path in others and "configs" not in path} == {
        path: state for path, state in others.items() if "configs" not in path
    }


def test_files_are_read_again_only_when_size_or_time_say_so(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pipeline(work))
    read: list[str] = []
    sha256_of = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    run(pipeline(work))
    assert read == []
    os.utime(result(work, "align a"))
    assert run(pipeline(work)) == []
    assert read == [RESULT["align"]]
    (work / "sums.json").write_text("[")
    assert run(pipeline(work)) == []
    assert len(read) > len(NEEDS)


def test_checkpoints_logs_and_other_stages_tokens_are_no_part_of_the_result(work: Path) -> None:
    run(pipeline(work))
    passing = ["train/a/checkpoint-3/model", "train/a/runs/now/events", "prepare/data/tokens-12.arrow"]
    for name in passing:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    assert run(pipeline(work)) == []
    run(pipeline(work, a=2, data=2))
    assert not [name for name in passing if (work / name).exists()]


# Failures


FAILS = f"{WRITES}\nprintf half > $output/$result\necho why >&2\nexit 3"
KILLED = f"{WRITES}\nkill -9 $$"
NOTHING = "mkdir -p $4/part"


@pytest.mark.parametrize(
    ("program", "said"),
    [(FAILS, "ended with exit code 3"), (KILLED, "ended by signal 9"), (NOTHING, "wrote no result to `")],
)
@pytest.mark.parametrize("title", ["extract a", "merge both"])
def test_a_stage_that_fails_ends_the_run_and_the_next_goes_on(
    title: str, program: str, said: str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = work.parent / "whole"
    run(pipeline(whole))
    before, rest = [*NEEDS][: [*NEEDS].index(title)], [*NEEDS][[*NEEDS].index(title) :]
    told = refused(pipeline(work, {title: program}))
    assert f"{title} {said}" in told
    if program == FAILS:
        assert "Fix the problem and run the same command again" in told
        assert "why" in capfd.readouterr().err
    assert [title for title in NEEDS if (work / title.replace(" ", "/") / "stage.json").exists()] == before
    assert reasons(pipeline(work))[title] == "resumes"
    assert run(pipeline(work)) == rest
    for one in NEEDS:
        assert result(work, one).read_bytes() == result(whole, one).read_bytes()
    assert not [path for path in work.rglob(".*") if path.name.endswith(("begun.json", "removed"))]
    assert not (work / "merge" / "both" / "begun").exists()


def test_what_was_begun_otherwise_is_begun_anew(work: Path) -> None:
    """A merge always; any stage when its settings have changed meanwhile."""
    left = f"{WRITES}\ntouch $output/left.json\nexit 1"
    for title in ("train a", "merge both"):
        refused(pipeline(work, {title: left}))
        assert (work / title.replace(" ", "/") / "left.json").exists()
        if title == "train a":
            assert reasons(pipeline(work, a=2))[title] == "runs again: size 1 → 2; align a has changed"
        run(pipeline(work, a=2))
        assert not (work / title.replace(" ", "/") / "left.json").exists()
        shutil.rmtree(work)


def test_a_program_that_is_not_there_is_told(work: Path) -> None:
    stage = replace(a_stage(work, "train a"), command=["no-such-launcher", "x"])
    assert refused([stage]) == "`no-such-launcher` cannot be started: No such file or directory; see `launch`"


def test_a_work_folder_that_cannot_be_used_is_told(work: Path) -> None:
    work.write_text("")
    assert f"`{work}` cannot be written: File exists" in refused(pipeline(work))


# What no stage has made


def put(path: Path, text: str = "years of work") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("train/a", "years of work"),
        ("train/a/model.safetensors", "years of work"),
        ("train/a/training.json", "years of work"),
        ("train/a/stage.json", '{"fingerprint": "years of work", "depends": {}}'),
        ("train/a/stage.json", '{"stage": "align a", "fingerprint": "x", "depends": {}, "files": {}}'),
        ("train/a/deep/er/notes", "years of work"),
    ],
)
def test_a_folder_that_no_stage_has_made_is_refused_before_anything_runs(
    where: str, text: str, work: Path
) -> None:
    put(work / where, text)
    if where.endswith("stage.json"):
        put(work / "train" / "a" / "thesis")
    put(work / "merge" / "both" / "model.safetensors")
    before = times(work.parent)
    told = refused(pipeline(work))
    assert "these files were not written by this pipeline:" in told
    assert f"`{work / 'train' / 'a'}" in told
    assert f"`{work / 'merge' / 'both' / 'model.safetensors'}`, where merge both would write" in told
    assert times(work.parent) == before


def test_what_was_put_into_a_stages_folder_is_not_removed_with_it(work: Path) -> None:
    run(pipeline(work))
    notes = work / "train" / "a" / "deep" / "notes"
    put(notes)
    assert run(pipeline(work)) == []
    before = times(work.parent)
    for changed in (pipeline(work, a=2), pipeline(work, data=2)):
        assert f"`{notes}`, where train a would write" in refused(changed)
        assert times(work.parent) == before
    notes.rename(work.parent / "notes")
    run(pipeline(work, a=2))
    assert (work.parent / "notes").read_text() == "years of work"


@pytest.mark.parametrize("title", NEEDS)
def test_what_took_the_place_of_an_unfinished_stage_is_not_removed(title: str, work: Path) -> None:
    refused(pipeline(work, {title: FAILS}))
    folder = work / title.replace(" ", "/")
    shutil.rmtree(folder)
    put(folder / "weights" / "thesis")
    before = times(folder)
    name = title.split()[1]
    assert f"where {title} would write" in refused(pipeline(work, **{name: 2}))
    assert times(folder) == before


def test_what_was_put_into_an_unfinished_stages_folder_is_no_part_of_its_result(work: Path) -> None:
    refused(pipeline(work, {"train a": FAILS}))
    put(work / "train" / "a" / "thesis")
    assert run(pipeline(work)) == [*NEEDS][4:]
    assert "`, where train a would write" in refused(pipeline(work, a=2))
    (work / "train" / "a" / "thesis").unlink()
    assert run(pipeline(work)) == []


def test_whatever_happens_nothing_is_lost_that_no_stage_has_made(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings change, stages fail, files come and go, the machine is switched off at any write."""
    rng = random.Random(2402)
    settings = dict.fromkeys(("data", "pivot", "a", "both", "merged"), 1)
    own: dict[Path, str] = {}
    countdown = [-1]

    class SwitchedOffError(BaseException):
        pass

    def fragile(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise SwitchedOffError
            return function(*given, **named)

        return called

    def write(command: Sequence[str], _lock: int) -> int:
        first, last, config, output = command[-4:]
        tick(Path(output) / first, "begun")
        tick(Path(output) / last, Path(config).read_text())
        return int(rng.random() < 0.1)

    tick = fragile(put)
    monkeypatch.setattr(runner, "run_command", write)
    for name in ("write_json", "_delete", "atomic_file"):
        monkeypatch.setattr(runner, name, fragile(getattr(runner, name)))
    monkeypatch.setattr(Path, "replace", fragile(Path.replace))
    made = refusals = stops = 0
    for step in range(120):
        if rng.random() < 0.5:
            settings[rng.choice([*settings])] = rng.randint(1, 3)
        if rng.random() < 0.25:
            folder = work / rng.choice([*NEEDS]).replace(" ", "/")
            path = folder / rng.choice(["thesis", "part/thesis", "deep/er/config.json", "scores.docx"])
            if folder.parent.is_dir() and not folder.is_file():
                own[path] = f"work of step {step}"
                put(path, own[path])
        elif rng.random() < 0.5:
            for path in own:
                path.unlink()
            own.clear()
        countdown[0] = rng.randint(1, 60) if rng.random() < 0.5 else -1
        try:
            made += len(run(pipeline(work, **settings)))
        except UserError as error:
            refusals += "these files were not written by this pipeline" in str(error)
        except SwitchedOffError:
            stops += 1
        for path, text in own.items():
            assert path.read_text() == text
    assert min(made / len(NEEDS), refusals, stops) > 8, (made, refusals, stops)
    countdown[0] = -1
    monkeypatch.setattr(rng, "random", lambda: 1.0)
    for path in own:
        path.unlink()
    run(pipeline(work, **settings))
    for title in NEEDS:
        assert json.loads(result(work, title).read_text()) == {"size": settings[title.split()[1]]}


def test_what_is_put_in_the_way_while_the_run_is_under_way_is_not_removed(work: Path) -> None:
    thesis = work / "train" / "a" / "thesis"
    program = f"{WRITES}\nmkdir -p {thesis.parent}\nprintf 'years of work' > {thesis}"
    assert f"`{thesis}`, where train a would write" in refused(pipeline(work, {"align a": program}))
    assert thesis.read_text() == "years of work"


def test_a_removal_that_is_stopped_is_finished_by_the_next_run(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pipeline(work))

    def stopped(folder: Path) -> None:
        next(path for path in folder.rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(pipeline(work, a=2))
    assert (work / "extract" / ".a.removed").exists()
    assert run(pipeline(work, a=2)) == [*NEEDS][2:]
    assert not (work / "extract" / ".a.removed").exists()


def test_a_stage_that_was_moved_to_another_disk_is_made_again_as_well(work: Path, tmp_path: Path) -> None:
    run(pipeline(work))
    (work / "train" / "a").rename(tmp_path / "large")
    (work / "train" / "a").symlink_to(tmp_path / "large")
    assert run(pipeline(work)) == []
    assert "train a" in run(pipeline(work, a=2))
    assert result(work, "train a").read_text() == '{"size": 2}'
    assert not (tmp_path / "large").exists()


# Processes

BEGIN = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from pathlib import Path
from test_stage import pipeline, run
"""
SLOWLY = f"{WRITES}\nexec sleep 60"
ENDS_BY_ITSELF = f"""{WRITES}
exec {sys.executable} -c '
import sys, time
from fusion_trainer.pipeline.processes import end_with_the_run
end_with_the_run()
open(sys.argv[1], "w")
time.sleep(60)' $log.watching
"""


def start(work: Path, code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", f"{BEGIN}work = Path({str(work)!r})\n{code}"],
        env=environment,
        start_new_session=True,
        stderr=said,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("title", ["prepare data", "train a", "merge both"])
def test_killed_with_all_its_processes_in_a_stage_the_next_run_goes_on(title: str, work: Path) -> None:
    started = start(work, f"run(pipeline(work, {{{title!r}: {SLOWLY!r}}}))")
    written = result(work, title)
    wait_for(lambda: written.exists() and written.read_bytes() > b"begun", started.pid)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert reasons(pipeline(work))[title] == "resumes"
    assert run(pipeline(work)) == [*NEEDS][[*NEEDS].index(title) :]


@pytest.mark.slow
def test_killed_alone_a_run_takes_its_stage_along_and_the_next_run_waits_for_that(work: Path) -> None:
    started = start(work, f"run(pipeline(work, {{'train a': {ENDS_BY_ITSELF!r}}}))")
    wait_for((work.parent / "log.watching").exists, started.pid)
    (stage,) = psutil.Process(started.pid).children(recursive=True)
    os.kill(started.pid, signal.SIGKILL)  # and nobody waits for it yet: it is a zombie
    assert run(pipeline(work)) == [*NEEDS][4:]
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE
    started.wait()


@pytest.mark.slow
def test_two_runs_at_once_are_refused_as_long_as_a_stage_of_the_first_is_at_work(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run itself was killed, and its stage knows nothing of it."""
    monkeypatch.setattr(runner, "PATIENCE_S", 0.3)
    started = start(work, f"run(pipeline(work, {{'train a': {SLOWLY!r}}}))")
    written = result(work, "train a")
    wait_for(lambda: written.exists() and written.read_bytes(), started.pid)
    before = times(work)
    for _ in range(2):
        assert f"`{work}` is in use by another run" in refused(pipeline(work))
        assert times(work) == before
        with suppress(ProcessLookupError):
            os.kill(started.pid, signal.SIGKILL)
            started.wait()
    os.killpg(started.pid, signal.SIGKILL)
    assert run(pipeline(work)) == [*NEEDS][4:]


def test_a_command_finds_the_programs_beside_this_python_and_whom_to_end_with(tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    assert run_command([*SHELL, "env > $0", str(tmp_path / "environment")], lock) == 0
    lines = (tmp_path / "environment").read_text().splitlines()
    assert f"{processes.ENDS_WITH}={processes.platform.node()} {os.getpid()}" in lines
    (path,) = (line for line in lines if line.startswith("PATH="))
    assert path.removeprefix("PATH=").split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "ends"), [("elsewhere {gone}", False), ("{here} {gone}", True), ("", False)])
def test_a_stage_ends_with_its_run_unless_that_is_on_another_machine(owner: str, ends: bool) -> None:
    gone = subprocess.Popen([*SHELL, ""])
    gone.wait()
    named = owner.format(gone=gone.pid, here=processes.platform.node())
    code = "import time; from fusion_trainer.pipeline.processes import end_with_the_run as e; e(); time.sleep(0.3)"
    environment = {**os.environ, processes.ENDS_WITH: named}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == int(ends)


def test_a_stage_whose_result_is_another_is_followed_by_those_after_it(work: Path) -> None:
    """Made again by the same request; the bytes differ, as on another device."""
    stages_ = pipeline(work)
    run(stages_)
    out = result(work, "align a")
    kept = out.read_bytes()
    out.unlink()
    assert run(stages_) == ["align a"]  # to the same bytes
    record = json.loads((out.parent / "stage.json").read_text())
    out.write_bytes(kept + b" ")
    record["files"] = {
        name: hashlib.sha256((out.parent / name).read_bytes()).hexdigest() for name in record["files"]
    }
    (out.parent / "stage.json").write_text(json.dumps(record))
    assert run(stages_) == ["train a", "merge both", "evaluate merged"]


def test_a_result_changed_without_its_time_is_noticed(work: Path) -> None:
    stages_ = pipeline(work)
    run(stages_)
    out = result(work, "extract a")
    found = out.stat()
    out.write_bytes(b"x" * found.st_size)
    os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert run(stages_)[0] == "extract a"


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "runs/Nov01/events", "notes.tmp"])
@pytest.mark.parametrize("title", ["train a", "merge both"])
def test_what_the_user_has_in_the_place_of_a_stage_is_never_removed(name: str, title: str, work: Path) -> None:
    theirs = result(work, title).parent / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    with pytest.raises(UserError, match=f"where {title} would write"):
        run(pipeline(work))
    assert theirs.read_text() == "years of work"


def test_files_of_the_user_in_the_work_folder_are_never_written_over(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / "report.md").write_text("mine")
    with pytest.raises(UserError, match=r"report\.md"):
        run(pipeline(work))
    assert [path.name for path in work.iterdir()] == ["report.md"]
    (work / "report.md").unlink()
    run(pipeline(work))
    (work / "report.md").write_text("the run's")
    assert run(pipeline(work)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["varm-merge", "nonsense"], "`varm-merge nonsense` ended with exit code 2"),
        (["varm-merge", "check", "--json"], "`varm-merge check` ended with exit code 2"),
        (["no-such-program", "check"], "`no-such-program` cannot be started: No such file or directory"),
    ],
)
def test_a_program_that_does_not_do_its_work_is_an_error(command: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        processes.output_of(command)
