"""Stages that are made once: each folder carries the fingerprint of all that it depends on.

Beside what a stage has made lies ``stage.json``: what it depends on (settings, models and data by content, the
stages before it), and the SHA-256 of its files. A stage whose fingerprint is as wanted and whose files are as they
were made is left alone. One that was begun with the same fingerprint goes on. Any other is removed and made again,
with the reason told. What no stage has made is never removed: the run refuses to begin.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fusion_trainer.pipeline.processes import run_command
from varm_common.errors import UserError, listed
from varm_common.files import (
    TEMPORARY,
    fingerprint,
    read_json,
    remove_abandoned,
    sha256_of,
    whole_file,
    write_json,
    written_to,
)

__all__ = ["KINDS", "Plan", "Stage", "Standing"]

KINDS = ("prepare", "extract", "align", "train", "merge", "evaluate")
RULES = 2
"""Raised when stages that were made before must not be taken for what is made now."""
RECORD, LOCK, BEGUN = "stage.json", "lock", "begun"
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py")
FIRST = {
    "prepare": {"manifest.json"},
    "extract": {"extraction.json", "manifest.json"},
    "align": {"extraction.json", "manifest.json"},
    "train": {"training.json", "fusion.json"},
    "merge": {BEGUN},
    "evaluate": {"scores.json"},
}
"""What the folder of a stage holds one of, as soon as it holds anything."""
OF_A_STORE = ("manifest.json", "extraction.json", "shard-*.arrow")
OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "adapter/*")
MAKES = {
    "prepare": ("manifest.json", "blocks.arrow"),
    "extract": OF_A_STORE,
    "align": OF_A_STORE,
    "train": OF_A_MODEL,
    "merge": (*OF_A_MODEL, "*.md", "*.yml"),
    "evaluate": ("scores.json",),
}
"""The files that a stage makes; anything else in its folder is somebody's."""
LATER = {"prepare": ("tokens-*.arrow",), "merge": (BEGUN,)}
"""What else may lie in the folder of a stage that is made: what others keep there."""
TELLS_THE_TIME = {"fusion.json", "README.md", "mergekit_config.yml"}
"""Files that may differ though nothing that was made does."""
OWN_FILES = ("sums.json", "report.md", "report.json")
"""What a run writes beside the stages."""
PARTS_OF_THE_WAY = re.compile(r"checkpoint-\d+|runs")
"""Folders that a training leaves beside its result."""
PATIENCE_S = 15.0
"""How long a stage of a run that was killed may take to end."""


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
        models: Models it reads from outside, with their revisions, by what they are to it.
        files: Data it reads from outside, by its place in the pipeline's file.
    """

    kind: str
    name: str
    output: Path
    command: list[str]
    inputs: Mapping[Path, str]
    settings: Mapping[str, Any]
    needs: Sequence[str]
    models: Mapping[str, tuple[str, str | None]]
    files: Mapping[str, str]

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
    foreign: Path | None = None
    """What lies in the way and no stage has made."""


class Plan:
    """The stages of one work folder, in the order they run.

    Args:
        work: The folder.
        stages: All of them, each after those it needs.
    """

    def __init__(self, work: Path, stages: Sequence[Stage]) -> None:
        self.work, self.stages = work, list(stages)
        self.sums = _Sums(work / "sums.json")

    def standings(self, stages: Sequence[Stage]) -> list[tuple[Stage, Standing]]:
        """How each stage stands.

        Raises:
            UserError: Where stages are to be made lies something else.
        """
        found = []
        for stage, standing in self._walk():
            if stage in stages:
                found.append((stage, standing))
        foreign = [f"`{one.foreign}`, in the way of {stage.title}" for stage, one in found if one.foreign]
        if not (self.work / LOCK).is_file():  # no run was ever here
            own = [self.work / name for name in OWN_FILES]
            own += [path for stage in self.stages for path in stage.inputs]
            foreign += [f"`{path}`" for path in own if path.exists()]
        if foreign:
            raise UserError(f"this pipeline has not made:{listed(foreign)}\nMove it away, or give another `work`.")
        return found

    def run(self, stages: Sequence[Stage]) -> list[str]:
        """Make what is not made; the titles of what was.

        Raises:
            UserError: A stage failed, something else lies in the way, or another run is at work.
        """
        made = []
        self.standings(stages)  # nothing is begun if something lies in the way
        with written_to(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        with self._alone() as lock:
            self._clear()
            chosen = (one for one in self._walk() if one[0] in stages)
            for number, (stage, standing) in enumerate(chosen, 1):
                click.echo(f"[{number}/{len(stages)}] {stage.title}: {standing.reason}", err=True)
                if standing.made:
                    _no_longer_begun(stage)  # of a run that was killed just then
                else:
                    self._make(stage, standing, lock)
                    made.append(stage.title)
            self.sums.keep()
        return made

    def _walk(self) -> Iterator[tuple[Stage, Standing]]:
        """Each stage as it stands when its turn has come: what it depends on may have been made meanwhile."""
        marks: dict[str, str] = {}
        for stage in self.stages:
            depends = self._depends(stage, marks)
            mark = fingerprint([RULES, stage.kind, depends])
            yield stage, self._standing(stage, depends, mark)
            record = _made(stage)
            of_these = record["files"] if record.get("fingerprint") == mark else {}
            lasting = {name: sum_ for name, sum_ in of_these.items() if Path(name).name not in TELLS_THE_TIME}
            marks[stage.title] = fingerprint([mark, lasting])

    def _clear(self) -> None:
        """Remove what a run was writing when it was killed."""
        written = {path.parent for stage in self.stages for path in (stage.output, *stage.inputs)}
        for folder in (self.work, *written, *(stage.output for stage in self.stages)):
            remove_abandoned(folder)

    def _make(self, stage: Stage, standing: Standing, lock: int) -> None:
        begun = _begun(stage)
        self.sums.keep()  # of a stage that is stopped nothing is read again
        with written_to(stage.output.parent):
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            if not standing.keep:
                _remove(stage.output)
            write_json(begun, {"fingerprint": standing.fingerprint, "depends": standing.depends})
            if stage.kind == "merge":  # mergekit itself does not tell whose a folder is
                stage.output.mkdir(exist_ok=True)
                (stage.output / BEGUN).touch()
            for path, text in stage.inputs.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as file:
                    file.write(text.encode())
        if code := run_command(stage.command, lock):
            ended = f"with exit code {code}" if code > 0 else f"by signal {-code}"
            raise UserError(
                f"{stage.title} ended {ended}; what it said stands above. Once that is mended run the same "
                "command again: it goes on from here"
            )
        names = [name for name in _names(stage.output) if _is_one(name, MAKES[stage.kind])]
        files = {name.as_posix(): self.sums.one(stage.output / name) for name in names if name != Path(RECORD)}
        if not files:
            raise UserError(f"{stage.title} has left nothing in `{stage.output}`")
        record = {"stage": stage.title, "fingerprint": standing.fingerprint, "depends": standing.depends}
        with written_to(stage.output):
            write_json(stage.output / RECORD, {**record, "files": files})
            _no_longer_begun(stage)

    def _standing(self, stage: Stage, depends: dict[str, Any], mark: str) -> Standing:
        record, begun = _made(stage), _read(_begun(stage))
        if record.get("fingerprint") == mark:
            changed = self.sums.changed(stage.output, record["files"])
            if changed is None:
                return Standing(depends, mark, True, "up to date")
            reason = f"`{stage.output / changed}` is not as it was made; made again"
        elif begun.get("fingerprint") == mark:
            reason = "goes on"
            if stage.kind != "merge":  # mergekit begins anew
                return Standing(depends, mark, False, reason, keep=True)
        elif before := record or begun:
            reason = f"made again: {_difference(before.get('depends', {}), depends)}"
        else:
            reason = "not made yet"
        return Standing(depends, mark, False, reason, foreign=_foreign(stage, record, begun))

    def _depends(self, stage: Stage, marks: Mapping[str, str]) -> dict[str, Any]:
        models = {name: self._model(*model) for name, model in stage.models.items()}
        files = {name: self.sums.content(Path(file)) or file for name, file in stage.files.items()}
        return {
            "settings": dict(stage.settings),
            "inputs": {**models, **files},
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
        with written_to(self.work):
            descriptor = os.open(self.work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        last = time.monotonic() + PATIENCE_S
        while time.monotonic() < last:
            with suppress(BlockingIOError):
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise UserError(f"another run, or a stage of one that was stopped, is at work in `{self.work}`")


class _Sums:
    """SHA-256 of files, read again only when size or time of a file have changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = _read(path)

    def one(self, path: Path) -> str:
        found = path.stat()
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self.known.get(str(path.absolute()))
        if known is None or known[:-1] != stamp:
            known = [*stamp, sha256_of(path)]
            self.known[str(path.absolute())] = known
        return str(known[-1])

    def content(self, path: Path) -> str | None:
        """Of a file, or of all files in a folder; None if there is neither."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return fingerprint([[file.relative_to(path).as_posix(), self.one(file)] for file in files])
        return self.one(path) if path.is_file() else None

    def changed(self, folder: Path, files: Mapping[str, str]) -> str | None:
        """The first file that is not as it was."""
        for name, wanted in files.items():
            if not (folder / name).is_file() or self.one(folder / name) != wanted:
                return name
        return None

    def keep(self) -> None:
        with written_to(self.path.parent):
            write_json(self.path, self.known)


def _begun(stage: Stage) -> Path:
    return stage.output.with_name(f".{stage.output.name}.{BEGUN}.json")


def _no_longer_begun(stage: Stage) -> None:
    for path in (stage.output / BEGUN, _begun(stage)):
        path.unlink(missing_ok=True)


def _made(stage: Stage) -> dict[str, Any]:
    """What a stage has written when it was made; nothing if the file is another's."""
    record = _read(stage.output / RECORD)
    return record if record.get("stage") == stage.title and isinstance(record.get("files"), dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(folder: Path) -> list[Path]:
    """All files below a folder, as paths in it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())


def _is_passing(name: Path, kind: str) -> bool:
    """Whether a file is no part of a stage's result: its record, checkpoints, logs, what was being written."""
    of_training = kind == "train" and len(name.parts) > 1 and PARTS_OF_THE_WAY.fullmatch(name.parts[0])
    return bool(of_training) or name == Path(RECORD) or any(part.endswith(TEMPORARY) for part in name.parts)


def _foreign(stage: Stage, record: Mapping[str, Any], begun: Mapping[str, Any]) -> Path | None:
    """Something in the place of a stage that it has not made."""
    if not stage.output.is_dir():
        return stage.output if stage.output.exists() else None
    names = _names(stage.output)
    if record or begun:
        names = [name for name in names if not _is_passing(name, stage.kind)]
    if record:
        later = LATER.get(stage.kind, ())
        strange = [name for name in names if name.as_posix() not in record["files"] and not _is_one(name, later)]
    else:
        is_ours = begun and FIRST[stage.kind] & {name.as_posix() for name in names}
        known = (*MAKES[stage.kind], BEGUN) if is_ours else ()
        strange = [name for name in names if not _is_one(name, known)]
    return stage.output / strange[0] if strange else None


def _is_one(name: Path, patterns: Sequence[str]) -> bool:
    return any(len(name.parts) == len(Path(one).parts) and name.match(one) for one in patterns)


def _remove(folder: Path) -> None:
    """Remove a folder: it loses its name first, so that a removal that is stopped leaves no half of it there."""
    going = folder.with_name(f".{folder.name}.removed")
    _delete(going)  # of a run that was stopped
    if folder.exists():
        folder.replace(going)
        _delete(going)


def _delete(folder: Path) -> None:
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        folder.unlink()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of the settings, inputs and stages is not as it was."""
    told = []
    for what in ("settings", "inputs", "stages"):
        old, new = _flat(before.get(what, {})), _flat(now[what])
        for key in sorted({**old, **new}):
            if old.get(key) == new.get(key):
                continue
            if what == "settings":
                told.append(f"{key} {_shown(old.get(key))} → {_shown(new.get(key))}")
            else:
                told.append(
                    f"{key} {'is new' if key not in old else 'is gone' if key not in new else 'has changed'}"
                )
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "") or "the program's rules"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
