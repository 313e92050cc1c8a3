"""Runs the stages of a pipeline that are not up to date.

A stage that was interrupted resumes if nothing it depends on has changed. Any other stage that is not up to date
loses its folder and runs again, and the reason is printed. Files that no stage has written are never removed: the
run stops instead.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fusion_trainer.pipeline.checksums import Checksums
from fusion_trainer.pipeline.processes import run_command
from fusion_trainer.pipeline.stage import BEGUN, MODEL_FILES, RECORD, Stage
from fusion_trainer.pipeline.state import State, begun_path, files_written, record_of, state_of
from varm_common.errors import UserError, listed
from varm_common.files import atomic_file, fingerprint, locked, remove_abandoned, write_json, written_to

__all__ = ["Runner"]

LOCK = "lock"
OWN_FILES = ("sums.json", "report.md", "report.json")
"""Files that a run writes besides those of its stages."""
WITH_TIMES = {"fusion.json", "README.md", "mergekit_config.yml"}
"""Files with dates or paths: later stages do not run again if only these change."""
PATIENCE_S = 15.0
"""How long a run waits for a stage that a killed run has left behind."""


class Runner:
    """The stages of one work folder.

    Args:
        work: The folder.
        stages: All stages, each after those it needs.
    """

    def __init__(self, work: Path, stages: Sequence[Stage]) -> None:
        self.work, self.stages = work, list(stages)
        self.checksums = Checksums(work / "sums.json")

    def states(self, stages: Sequence[Stage]) -> list[State]:
        """The state of each of ``stages``.

        Raises:
            UserError: A stage would write where there are files that no stage has written.
        """
        states = [state for state in self._walk() if state.stage in stages]
        foreign = [f"`{each.foreign}`, where {each.stage.title} would write" for each in states if each.foreign]
        if not (self.work / LOCK).is_file():  # nothing was ever run here
            own = [self.work / name for name in OWN_FILES]
            own += [path for stage in self.stages for path in stage.inputs]
            foreign += [f"`{path}`" for path in own if path.exists()]
        _refuse(foreign)
        return states

    def run(self, stages: Sequence[Stage]) -> list[str]:
        """Run those of ``stages`` that are not up to date, and return their titles.

        Raises:
            UserError: A stage failed, its folder has files that no stage has written, or another run uses the work
                folder.
        """
        self.states(stages)
        with written_to(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        run = []
        busy = f"`{self.work}` is in use by another run, or by a stage of a killed run"
        with locked(self.work / LOCK, busy, PATIENCE_S) as lock:  # a stage that it runs holds the lock, too
            self._prepare(stages)
            chosen = (state for state in self._walk() if state.stage in stages)
            for number, state in enumerate(chosen, 1):
                click.echo(f"[{number}/{len(stages)}] {state.stage.title}: {state.reason}", err=True)
                if state.made:
                    _remove_begun(state.stage)
                else:
                    self._make(state, lock)
                    run.append(state.stage.title)
            self.checksums.save()
        return run

    def _walk(self) -> Iterator[State]:
        """The state of every stage, found only when its turn comes: earlier stages may have run by then."""
        results: dict[str, str] = {}
        for stage in self.stages:
            inputs = {
                role: self.checksums.identity(model, MODEL_FILES, f"{model}@{revision or 'main'}")
                for role, (model, revision) in stage.models.items()
            }
            inputs |= {place: self.checksums.identity(file, ["**/*"], file) for place, file in stage.files.items()}
            needs = {need: results[need] for need in stage.needs}
            depends = {"settings": dict(stage.settings), "inputs": inputs, "stages": needs}
            state = state_of(stage, depends, self.checksums)
            yield state
            results[stage.title] = _result(stage, state.fingerprint)

    def _prepare(self, stages: Sequence[Stage]) -> None:
        """Remove what a killed run was writing, and write the files that the commands read."""
        written = {path.parent for stage in self.stages for path in (stage.output, *stage.inputs)}
        for folder in (self.work, *written, *(stage.output for stage in self.stages)):
            remove_abandoned(folder)
        inputs: dict[Path, str] = {path: text for stage in stages for path, text in stage.inputs.items()}
        for path, text in inputs.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                with written_to(path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(path) as file:
                        file.write(text.encode())

    def _make(self, state: State, lock: int | None) -> None:
        stage = state.stage
        if state.foreign:  # it was put there after the run started
            _refuse([f"`{state.foreign}`, where {stage.title} would write"])
        self.checksums.save()
        record: dict[str, Any] = {"fingerprint": state.fingerprint, "depends": state.depends}
        with written_to(stage.output.parent):
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            if not state.resumes:
                _remove(stage.output)
            write_json(begun_path(stage), record)
            if stage.kind == "merge":
                stage.output.mkdir(exist_ok=True)
                (stage.output / BEGUN).touch()
        if code := run_command(stage.command, lock):
            ended = f"with exit code {code}" if code > 0 else f"by signal {-code}"
            next_step = "Fix the problem and run the same command again"
            raise UserError(f"{stage.title} ended {ended}; see its output above. {next_step}")
        files = {name.as_posix(): self.checksums.sha256(stage.output / name) for name in files_written(stage)}
        if not files:
            raise UserError(f"{stage.title} wrote no result to `{stage.output}`")
        with written_to(stage.output):
            write_json(stage.output / RECORD, {"stage": stage.title, **record, "files": files})
            _remove_begun(stage)


def _result(stage: Stage, mark: str) -> str:
    """The fingerprint of a stage's result, for the stages that need it."""
    record = record_of(stage)
    files: Mapping[str, str] = record["files"] if record.get("fingerprint") == mark else {}
    lasting = {name: sha256 for name, sha256 in files.items() if Path(name).name not in WITH_TIMES}
    return fingerprint([mark, lasting])


def _refuse(foreign: Sequence[str]) -> None:
    if foreign:
        advice = "Move them away, or set another `work`."
        raise UserError(f"these files were not written by this pipeline:{listed(foreign)}\n{advice}")


def _remove_begun(stage: Stage) -> None:
    for path in (stage.output / BEGUN, begun_path(stage)):
        path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that half of it never stays under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    _delete(removed)  # left by an interrupted run
    if folder.exists():
        folder.replace(removed)
        _delete(removed)


def _delete(folder: Path) -> None:
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        folder.unlink()
