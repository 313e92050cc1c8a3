"""Run a comparison step by step. The result of each step is stored, and a step that fails stops no other."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil

from varm_common.errors import UserError
from varm_common.files import sha256_of
from varm_common.process_usage import MEMORY, CommandError, machine, measured
from varm_common.tables import short_names, size
from varm_common.versions import versions
from varm_merge.comparison.cache import Steps, is_a_merge, model_files, put, remove, state_of
from varm_merge.comparison.distances import distances, moved_layers
from varm_merge.comparison.inputs import model_folder, model_state, states
from varm_merge.comparison.recipes import Entry, Family
from varm_merge.comparison.scores import Scorers, differences, environment, text_config
from varm_merge.comparison.settings import Row, Settings
from varm_merge.comparison.suites import Task
from varm_merge.comparison.task_models import demand_template, short_contexts
from varm_merge.comparison.tasks import Tasks
from varm_merge.merging.weight_log import recipe_fingerprint

__all__ = ["compare"]

FORMAT, VERSION = "varm-merge comparison", 1
ROOM = 1.02
"""Disk space for a merged model, with its other files, per byte of its weights."""
UNSAFE = "code that the models write runs on this machine, with your rights and without a sandbox; use a container"
TASK = "task "
"""The kind of a step that scores a task begins so."""

Step = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]
"""Kind, what the result depends on, and the function that computes it."""


def compare(entries: Sequence[Entry], family: Family, settings: Settings, command: str) -> dict[str, Any]:
    """Do every step that was not done before, and return the report.

    Args:
        entries: The recipes, checked.
        family: The pivot and all targets.
        settings: How they are compared.
        command: The command line, for the report.

    Returns:
        JSON: ``rows`` for the pivot, the targets and the recipes, each with its ``problems``.

    Raises:
        UserError: The comparison cannot start.
    """
    if settings.tasks:
        settings.tasks.demand()
    return _Comparison(entries, family, settings, command).run()


class _Comparison:
    def __init__(self, entries: Sequence[Entry], family: Family, settings: Settings, command: str) -> None:
        self.settings, self.command, self.out = settings, command, settings.out
        self.models, self.logs = self.out / "models", self.out / "logs"
        self.steps = Steps(self.out / "steps")
        with_tasks = settings.tasks is not None
        self.scorers = Scorers(self.out / "work", settings.device, settings.trust_remote_code, with_tasks)
        names = short_names(family.models, [entry.name for entry in entries])
        roles = ["pivot", *["target"] * len(family.targets)]
        self.inputs = list(map(self._input_row, family.models, names, roles))
        self.merges = [self._merge_row(entry) for entry in entries]
        self.task_files: dict[str, Any] = {}
        if settings.tasks:
            settings.tasks.servers.demand_names([row.name for row in (*self.inputs, *self.merges)])

    def run(self) -> dict[str, Any]:
        self.logs.mkdir(parents=True, exist_ok=True)
        for abandoned in self.models.glob(".*.tmp"):
            shutil.rmtree(abandoned)
        mergeable = [row for row in self.merges if not row.problems]
        self._demand_scores(mergeable)
        self._prepare_merges(mergeable)
        for group in [mergeable] if self.settings.keep else [[row] for row in mergeable]:
            for times in range(1, self.settings.repeat + 1):
                for row in group:
                    self._merge(row, times)
            for row in group:
                self._measure_merge(row)
        for row in self.inputs:
            self._measure(row)
        return self._report()

    # The rows

    def _input_row(self, model: str, name: str, role: str) -> Row:
        row = Row(name, role, Path(model))
        try:
            row.folder = model_folder(model, self.settings.cache_dir)
            row.fingerprint = model_state(model, self.settings.cache_dir)
        except UserError as error:
            row.problems.append(str(error))
        return row

    def _merge_row(self, entry: Entry) -> Row:
        row = Row(entry.name, "merge", self.models / entry.name, entry, problems=list(entry.problems))
        if not row.problems:
            try:
                row.inputs = self._merge_inputs(entry)
            except UserError as error:
                row.problems.append(str(error))
        if row.problems:
            self._print(f"{row.name}: cannot be merged: {'; '.join(row.problems)}")
        return row

    def _merge_inputs(self, entry: Entry) -> dict[str, Any]:
        inputs = states(entry, self.settings.cache_dir)
        options = self.settings.merge_options()
        recipe = recipe_fingerprint(entry.content)
        return {"recipe": recipe, "inputs": inputs, "options": options, "versions": versions()}

    # Before the first merge

    def _demand_scores(self, mergeable: Sequence[Row]) -> None:
        """Find out before the merges which scores would fail for every model, unless all models have theirs."""
        held_out, tasks = self.settings.held_out, self.settings.tasks
        log = self.logs / "evaluation.txt"
        for row in mergeable:
            self._runs(row)
        rows = [row for row in self.inputs if row.fingerprint] + list(mergeable)
        missing = {kind for row in rows for kind in self._missing(row)}
        option = "--held-out"
        try:
            if held_out and "held-out" in missing:
                self.scorers.prepare(held_out, self.inputs[0].folder, self._text_inputs(), log)
            option = "--tasks"
            if tasks and missing - {"distances", "held-out"}:
                self.task_files = self._known_tasks(tasks, log)
                models = {row.name: row.folder for row in self.inputs if row.fingerprint}
                demand_template(tasks, models.values(), [row.entry.content for row in self.merges if row.entry])
                for note in short_contexts(tasks, models):
                    self._print(note)
                if tasks.served:
                    self._demand_servers(tasks, rows)
        except CommandError as error:
            raise UserError(f"{option}: {_reason(error)} ({log})") from error

    def _known_tasks(self, tasks: Tasks, log: Path) -> dict[str, Any]:
        """What the harness knows of the tasks, by label. Those that run code are named in a warning."""
        inputs = {task.label: tasks.inputs(task) for task in tasks.tasks}
        about = {"tasks": inputs, "allow_code": tasks.allow_code}
        known = self.steps.load("known", "tasks", about)
        folders = [folder for task in (known or {}).values() for folder in task["folders"]]
        if known is None or not all(Path(folder).is_dir() for folder in folders):
            known = self.scorers.check_tasks(tasks, log)
            self.steps.save("known", "tasks", about, known)
        if code := [label for label, task in known.items() if task["runs_code"]]:
            click.secho(f"! {', '.join(code)}: {UNSAFE}", fg="yellow", err=True)
        return known

    def _demand_servers(self, tasks: Tasks, rows: Sequence[Row]) -> None:
        """Check the servers of the models that need no merge, and name the models that have none."""
        if without := [row.name for row in rows if tasks.servers.url(row.name) is None]:
            self._print(f"no --server-url, so no tasks: {', '.join(without)}")
        for row in rows:
            ready = row.role != "merge" or not self._is_due(row, self.settings.repeat)
            if ready and any(kind.startswith(TASK) for kind in self._missing(row)):
                tasks.servers.served_name(row.name, row.folder)

    def _prepare_merges(self, mergeable: Sequence[Row]) -> None:
        """Check that the disk has room, and read the inputs once, so that every merge finds them in memory."""
        due = [row for row in mergeable if self._is_due(row, self.settings.repeat)]
        if not due:
            return
        sizes = [row.entry.bytes for row in due if row.entry and not row.folder.exists()]
        needed = ROOM * (sum(sizes) if self.settings.keep else max(sizes, default=0))
        free = psutil.disk_usage(str(self.out)).free
        if needed > free:
            lack = f"the merged models take about {size(needed)}, `{self.out}` has {size(free)} free"
            advice = ", or --no-keep: one model at a time" if self.settings.keep else ""
            raise UserError(f"{lack}; give an --out with more room{advice}")
        if sizes:
            self._print(f"{len(due)} to merge; the models take about {size(needed)} in {self.models}")
        self._print("reading the inputs")
        for file in self._input_files():
            sha256_of(file)

    # Merging

    def _runs(self, row: Row) -> dict[str, Any]:
        """The ``runs`` of a merge so far, the content of its ``model`` and the ``state`` of its files."""
        record = self.steps.load("merge", row.file, row.inputs) or {"runs": [], "model": "", "state": ""}
        row.fingerprint = record["model"]
        return record

    def _is_due(self, row: Row, times: int) -> bool:
        """Whether a recipe has run less often, or its model is gone and still needed."""
        record = self._runs(row)
        if len(record["runs"]) < times:
            return True
        if _is_there(row, record):
            return False
        return self.settings.keep or bool(self._missing(row))

    def _merge(self, row: Row, times: int) -> None:
        if row.problems or not self._is_due(row, times):
            return
        assert row.entry
        if changed := self.steps.changed("merge", row.file, row.inputs):
            self._print(f"{row.name}: merged again, because of other {' and '.join(changed)}")
        if not is_a_merge(row.folder):
            self._fail(row, f"`{row.folder}` holds no merged model; move it away, or give another --out")
            return
        log, record = self.logs / f"{row.name}.txt", self._runs(row)
        temporary = self.models / f".{row.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        command = [*_mergekit(), str(row.entry.path), str(temporary), *self.settings.merge_options()]
        self._print(f"{row.name}: merging")
        try:
            with log.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"$ {shlex.join(command)}\n")
            run = measured(command, log=log, environment=environment(None))
            if not _is_there(row, record):
                record |= put(temporary, row.folder, row.entry.text)
                row.is_new = True
        except (CommandError, OSError) as error:
            self._fail(row, f"mergekit-yaml: {_reason(error)} ({log})")
            return
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        numbers = {name: None if math.isnan(value) else value for name, value in asdict(run).items()}
        self.steps.save("merge", row.file, row.inputs, {**record, "runs": [*record["runs"], numbers]})
        self._print(f"{row.name}: merged in {run.wall_s:.1f} s, {run.anonymous_mib:.0f} MiB")

    def _fail(self, row: Row, problem: str) -> None:
        row.problems.append(problem)
        self._print(f"{row.name}: failed: {problem}")

    # Measuring

    def _measure_merge(self, row: Row) -> None:
        """Measure a merged model. Without --keep it is removed then, unless something failed."""
        if row.problems:
            return
        record = self._runs(row)
        row.fingerprint, row.results["runs"] = record["model"], record["runs"]
        self._measure(row)
        if self.settings.keep:
            row.results["bytes"] = sum(file.stat().st_size for file in row.folder.iterdir())
        elif row.problems:
            self._print(f"{row.name}: kept in {row.folder}, because it could not be measured completely")
        elif is_a_merge(row.folder):
            remove(row.folder)

    def _measure(self, row: Row) -> None:
        """Distances and scores of a model; a model with damaged weights is not scored."""
        for kind, inputs, compute in self._steps(row) if row.fingerprint else ():
            result = self.steps.load(kind, row.file, inputs)
            if result is None:
                self._print(f"{row.name}: {kind}")
                try:
                    result = compute()
                except (CommandError, OSError, ValueError) as error:
                    if kind == "distances":
                        row.problems.append(str(error))
                        return
                    row.problems.append(f"{kind}: {_reason(error)} ({self._log(row)})")
                    continue
                self.steps.save(kind, row.file, inputs, result)
            row.results[kind] = result

    def _missing(self, row: Row) -> list[str]:
        """The kinds of the steps that a model has no result of."""
        return [kind for kind, inputs, _ in self._steps(row) if self.steps.load(kind, row.file, inputs) is None]

    def _steps(self, row: Row) -> Iterator[Step]:
        """All that a model is measured by."""
        settings = self.settings
        recipe = recipe_fingerprint(row.entry.content) if row.entry else ""
        inputs = {other.name: other.fingerprint for other in self.inputs}
        model: dict[str, Any] = {"model": row.fingerprint}
        about = {**model, "recipe": recipe, "inputs": inputs, "varm-merge": version("varm-merge")}
        yield "distances", about, partial(self._distances, row)
        about = {**model, "device": settings.device, "versions": versions()}
        if settings.held_out:
            yield "held-out", {**about, **self._text_inputs()}, partial(self._score_held_out, row)
        tasks = settings.tasks
        for task in tasks.tasks if tasks and (not tasks.served or tasks.servers.url(row.name)) else ():
            assert tasks
            yield f"{TASK}{task.label}", {**about, **tasks.inputs(task)}, partial(self._score_task, row, task)

    def _log(self, row: Row) -> Path:
        return self.logs / f"{row.file}-evaluation.txt"

    def _text_inputs(self) -> dict[str, Any]:
        assert self.settings.held_out
        return {"pivot": self.inputs[0].fingerprint, **self.settings.held_out.inputs()}

    def _distances(self, row: Row) -> dict[str, Any]:
        pivot, *targets = self.inputs
        layers = text_config(pivot.folder).get("num_hidden_layers")
        if row.entry and (reason := moved_layers(row.entry.content, layers)):
            return {"not_comparable": reason}
        if unread := [other for other in self.inputs if not other.fingerprint]:
            return {"not_comparable": unread[0].problems[0]}
        folders = {target.name: target.folder for target in targets}
        return distances(row.folder, pivot.folder, folders, self.settings.quiet)

    def _score_held_out(self, row: Row) -> dict[str, Any]:
        assert self.settings.held_out
        pivot, log = self.inputs[0].folder, self._log(row)
        dialogues = self.scorers.prepare(self.settings.held_out, pivot, self._text_inputs(), log)
        return self.scorers.held_out(row.folder, dialogues, log)

    def _score_task(self, row: Row, task: Task) -> dict[str, Any]:
        tasks = self.settings.tasks
        assert tasks
        if tasks.served and row.is_new:
            raise UserError(f"merged just now: start its server with `{row.folder}`, and run this command again")
        self.task_files = self.task_files or self._known_tasks(tasks, self._log(row))
        folders = self.task_files[task.label]["folders"]
        return self.scorers.task(tasks, task, folders, row.name, row.folder, self._log(row))

    # The report

    def _input_files(self) -> list[Path]:
        return [file for row in self.inputs if row.fingerprint for file in model_files(row.folder)]

    def _report(self) -> dict[str, Any]:
        settings = self.settings
        rows = [*self.inputs, *self.merges]
        return {
            "format": FORMAT,
            "version": VERSION,
            "command": self.command,
            "machine": machine(),
            "versions": versions(),
            "memory": MEMORY,
            "repeat": settings.repeat,
            "mergekit_options": settings.merge_options(),
            "input_bytes": sum(file.stat().st_size for file in self._input_files()),
            "memory_bytes": psutil.virtual_memory().total,
            "held_out": asdict(settings.held_out) if settings.held_out else None,
            "tasks": [task.label for task in settings.tasks.tasks] if settings.tasks else [],
            "rows": [_described(row, rows) for row in rows],
        }

    def _print(self, message: str) -> None:
        if not self.settings.quiet:
            click.echo(message, err=True)


def _is_there(row: Row, record: Mapping[str, Any]) -> bool:
    """Whether the model of a merge is there as it was written."""
    return row.folder.is_dir() and state_of(model_files(row.folder)) == record.get("state")


def _described(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row of ``report.json``."""
    recipe: dict[str, Any] = {}
    if entry := row.entry:
        recipe = {"method": entry.method, "settings": entry.settings}
        recipe |= {"recipe": {"path": str(entry.path), "text": entry.text}}
    tasks = {kind: result for kind, result in row.results.items() if kind.startswith(TASK)}
    own = row.results.get("held-out")
    scored = [other for other in rows if "held-out" in other.results and other is not row]
    others = {other.name: other.results["held-out"] for other in scored}
    return {
        "name": row.name,
        "role": row.role,
        "model": str(row.folder) if row.role != "merge" or row.folder.is_dir() else None,
        **recipe,
        "problems": row.problems,
        "runs": row.results.get("runs", []),
        "bytes": row.results.get("bytes"),
        "distances": row.results.get("distances"),
        "held_out": own
        and {
            group: {**scores, "against": {name: differences(own, other, group) for name, other in others.items()}}
            for group, scores in own["groups"].items()
        },
        "tasks": {kind.removeprefix(TASK): result["measures"] for kind, result in tasks.items()},
    }


def _mergekit() -> list[str]:
    """The stock program of this environment, or ours where start-up hooks are switched off."""
    if os.environ.get("VARM_MERGE_AUTOLOAD") == "0":
        return [sys.executable, "-c", "from varm_merge.cli import main; main()", "yaml"]
    program = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which("mergekit-yaml")
    if program is None:
        raise UserError("no mergekit-yaml beside this Python; see `varm-merge doctor`")
    return [program]


def _reason(error: Exception) -> str:
    """The error in the last lines of a program, or its last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    return " ".join(line.strip() for line in lines[errors[-1] :]).removeprefix("Error: ") if errors else lines[-1]
