"""Stages that are made once: each folder carries the fingerprint of all that it depends on.

Beside what a stage has made lies ``stage.json``: what it depends on (settings, models and data by content, the
stages before it), and the size, time and SHA-256 of its files. A stage whose fingerprint is as wanted and whose
files are as they were made is left alone. One that was begun with the same fingerprint goes on. Any other is
removed and made again, with the reason told.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from fusion_trainer.errors import FusionError
from fusion_trainer.files import fingerprint, read_json, sha256_of, whole_file, write_json, written_to

__all__ = ["ENDS_WITH", "KINDS", "Plan", "Stage", "Standing"]

KINDS = ("prepare", "extract", "align", "train", "merge", "evaluate")
RULES = 1
"""Raised when stages that were made before must not be taken for what is made now."""
RECORD, LOCK, STAGE_LOCK = "stage.json", "lock", "stage.lock"
OWN = [sys.executable, "-m", "fusion_trainer"]
PARTS_OF_THE_WAY = ("checkpoint-", "runs")
"""Folders in a stage's output that are no part of its result."""
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py")
ENDS_WITH = "FUSION_TRAINER_ENDS_WITH"
"""Names the process that a stage's command must not outlive."""
PATIENCE_S = 15


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        kind: What it does.
        name: Of what.
        output: Its folder.
        command: What is run.
        inputs: Files the command reads, and what stands in them.
        settings: Those that decide what it makes.
        needs: The stages before it, as ``kind name``.
        models: Models it reads from outside, with their revisions.
        files: Data it reads from outside.
    """

    kind: str
    name: str
    output: Path
    command: list[str]
    inputs: dict[Path, str]
    settings: dict[str, Any]
    needs: list[str]
    models: list[tuple[str, str | None]]
    files: list[str]

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Standing:
    """How a stage stands: what it depends on now, whether it is made, and why not."""

    depends: dict[str, Any]
    fingerprint: str
    made: bool
    reason: str
    keep: bool = False
    """What is there is the beginning of just this stage."""


class Plan:
    """The stages of one work folder, in the order they run.

    Args:
        work: The folder.
        stages: All of them, each after those it needs.
    """

    def __init__(self, work: Path, stages: Sequence[Stage]) -> None:
        self.work, self.stages = work, list(stages)
        self.sums = _Sums(work / "sums.json")

    def standings(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, Standing]]:
        """How each stage stands."""
        marks: dict[str, str] = {}
        for stage in self.stages:
            depends = self._depends(stage, marks)
            marks[stage.title] = fingerprint([RULES, stage.kind, depends])
            if stage in stages:
                yield stage, self._standing(stage, depends, marks[stage.title])

    def run(self, stages: Sequence[Stage]) -> list[str]:
        """Make what is not made; the titles of what was.

        Raises:
            FusionError: A stage failed, its folder holds something else, or another run is at work.
        """
        made = []
        with written_to(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        with self._alone() as lock:
            for number, (stage, standing) in enumerate(self.standings(stages), 1):
                click.echo(f"[{number}/{len(stages)}] {stage.title}: {standing.reason}", err=True)
                if not standing.made:
                    self._make(stage, standing, lock)
                    made.append(stage.title)
            self.sums.keep()
        return made

    def _make(self, stage: Stage, standing: Standing, lock: int) -> None:
        begun = _begun(stage)
        with written_to(stage.output.parent):
            if not standing.keep or stage.kind == "merge":  # mergekit does not go on
                shutil.rmtree(stage.output, ignore_errors=True)
            (stage.output / RECORD).unlink(missing_ok=True)
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(begun, {"fingerprint": standing.fingerprint, "depends": standing.depends})
            for path, text in stage.inputs.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as file:
                    file.write(text.encode())
        if code := _run(stage.command, self.work, lock):
            raise FusionError(
                f"{stage.title} ended with exit code {code}; what it said stands above. Once that is mended run "
                "the same command again: it goes on from here"
            )
        files = self.sums.of(stage.output)
        if not files:
            raise FusionError(f"{stage.title} has left nothing in `{stage.output}`")
        record = {"stage": stage.title, "fingerprint": standing.fingerprint, "depends": standing.depends}
        with written_to(stage.output):
            write_json(stage.output / RECORD, {**record, "files": files})
            begun.unlink(missing_ok=True)

    def _standing(self, stage: Stage, depends: dict[str, Any], mark: str) -> Standing:
        record, begun = _read(stage.output / RECORD), _read(_begun(stage))
        if record.get("fingerprint") == mark:
            if changed := self.sums.changed(stage.output, record.get("files", {})):
                return Standing(
                    depends, mark, False, f"`{stage.output / changed}` is not as it was made; made again"
                )
            return Standing(depends, mark, True, "up to date")
        if begun.get("fingerprint") == mark:
            return Standing(depends, mark, False, "goes on", keep=True)
        if before := record or begun:
            return Standing(depends, mark, False, f"made again: {_difference(before.get('depends', {}), depends)}")
        if stage.output.exists() and (not stage.output.is_dir() or any(stage.output.iterdir())):
            raise FusionError(f"`{stage.output}` holds something this pipeline has not made; give another `work`")
        return Standing(depends, mark, False, "not made yet")

    def _depends(self, stage: Stage, marks: dict[str, str]) -> dict[str, Any]:
        outside = {model: self._model(model, revision) for model, revision in stage.models}
        outside |= {file: self.sums.one(Path(file)) if Path(file).is_file() else file for file in stage.files}
        return {
            "settings": stage.settings,
            "inputs": outside,
            "stages": {need: marks[need] for need in stage.needs},
        }

    def _model(self, model: str, revision: str | None) -> str:
        """What a model is: the content of a folder, the revision of a Hub id."""
        folder = Path(model)
        if not folder.is_dir():
            return f"{model}@{revision or 'main'}"
        paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)} - {folder / RECORD})
        return fingerprint([[path.name, self.sums.one(path)] for path in paths])

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Hold the work folder, which a command that a killed run left over still holds."""
        descriptors = [os.open(self.work / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (LOCK, STAGE_LOCK)]
        try:
            for descriptor in descriptors:
                self._lock(descriptor)
            os.close(descriptors.pop())  # the stages' own
            yield descriptors[0]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        for _ in range(10 * PATIENCE_S):
            with suppress(BlockingIOError):
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise FusionError(f"another run, or a stage of one that was stopped, is at work in `{self.work}`")


def _run(command: list[str], work: Path, lock: int) -> int:
    """Run a command to its end; its exit code.

    One of this program's own is forked off a process that has imported what all of them need, once for the whole
    run: starting each anew would take longer than many a small stage.
    """
    if command[: len(OWN)] == OWN:
        context = get_context("forkserver")
        context.set_forkserver_preload(["fusion_trainer.warm"])
        process = context.Process(target=_enter, args=(command[len(OWN) :], os.getpid(), work / STAGE_LOCK))
        process.start()
        process.join()
        return process.exitcode or 0
    environment = {**os.environ, ENDS_WITH: str(os.getpid())}
    return subprocess.run(command, env=environment, pass_fds=(lock,), check=False).returncode


def _enter(arguments: list[str], parent: int, lock: Path) -> None:
    from fusion_trainer.warm import enter

    enter(arguments, parent, lock)


class _Sums:
    """SHA-256 of files, read again only when size or time of a file have changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = _read(path)

    def one(self, path: Path) -> str:
        found = path.stat()
        stamp = [found.st_size, found.st_mtime_ns]
        known = self.known.get(str(path.absolute()))
        if known is None or known[:2] != stamp:
            known = [*stamp, sha256_of(path)]
            self.known[str(path.absolute())] = known
        return str(known[2])

    def of(self, folder: Path) -> dict[str, str]:
        """Of everything that is the result of a stage."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
        names = [path.relative_to(folder) for path in paths]
        kept = [name for name in names if not name.parts[0].startswith(PARTS_OF_THE_WAY)]
        return {name.as_posix(): self.one(folder / name) for name in kept}

    def changed(self, folder: Path, files: dict[str, str]) -> str | None:
        """The first file that is not as it was."""
        for name, wanted in files.items():
            if not (folder / name).is_file() or self.one(folder / name) != wanted:
                return name
        return None if files else "."

    def keep(self) -> None:
        with written_to(self.path.parent):
            write_json(self.path, self.known)


def _begun(stage: Stage) -> Path:
    return stage.output.with_name(f".{stage.output.name}.begun.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of the settings, inputs and stages is new."""
    told = []
    for what in ("settings", "inputs", "stages"):
        old, new = _flat(before.get(what, {})), _flat(now[what])
        for key in sorted({**old, **new}):
            if old.get(key) == new.get(key):
                continue
            told.append(
                f"{key} {_shown(old.get(key))} → {_shown(new.get(key))}" if what == "settings" else f"{key} is new"
            )
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "") or "the program's rules"


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
