"""A comparison, step by step: each is done once and kept, and none that fails stops the others."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil
from mergekit.common import ModelReference

from varm_common.checkpoints import weight_files
from varm_common.errors import UserError
from varm_common.process_usage import MEMORY, CommandError, machine, measured
from varm_common.tables import size
from varm_common.versions import versions
from varm_merge.comparison.cache import RECIPE, Contents, Steps, is_a_merge, model_files, remove
from varm_merge.comparison.distances import distances, moved_layers
from varm_merge.comparison.recipes import Entry, Family, short_names
from varm_merge.comparison.scores import HeldOut, Scorers, differences, environment
from varm_merge.comparison.settings import (
    FORMAT,
    MODELS,
    PLAIN,
    SPARE,
    VERSION,
    Row,
    Settings,
    layers_of,
    mergekit_command,
    reason_of,
    size_of_folder,
    with_header,
)
from varm_merge.merging.lineage import Place
from varm_merge.merging.weight_log import recipe_fingerprint

__all__ = [
    "compare",
]


def compare(entries: Sequence[Entry], family: Family, settings: Settings, command: str) -> dict[str, Any]:
    """Do all that was not done before; what came of all of it.

    Args:
        entries: The recipes, checked.
        family: The pivot and all targets.
        settings: How.
        command: By which it was asked for.

    Returns:
        JSON: ``rows`` for the pivot, the targets and the recipes, each with its ``problems``.

    Raises:
        UserError: Nothing could be begun.
    """
    if settings.tasks:
        settings.tasks.demand()
    return _Comparison(entries, family, settings, command).run()


class _Comparison:
    def __init__(self, entries: Sequence[Entry], family: Family, settings: Settings, command: str) -> None:
        self.settings, self.command, self.out = settings, command, settings.out
        self._known: dict[str, str] = {}
        self.steps = Steps(self.out / "steps")
        self.contents = Contents(self.out / "steps" / "contents.json")
        self.inputs, self.merges, self.models = list(family.models), list(entries), self.out / MODELS
        self.scorers = Scorers(self.out / "work", settings.device, settings.trust_remote_code)
        self.rows: list[Row] = []

    def run(self) -> dict[str, Any]:
        for abandoned in self.models.glob(".*.tmp"):
            shutil.rmtree(abandoned)
        self.rows = [*self._input_rows(), *(self._merge_row(entry) for entry in self.merges)]
        sound = [row for row in self._merged() if not row.problems]
        try:
            self._demand_evaluations(sound)
            self._before(sound)
            for group in [sound] if self.settings.keep else [[row] for row in sound]:
                for times in range(1, self.settings.repeat + 1):
                    for row in group:
                        self._merge(row, times)
                for row in group:
                    self._measure(row)
            for row in self._read():
                self._distances(row)
                self._evaluate(row)
        finally:
            self.scorers.close()
        return self._report()

    # The rows

    def _input_rows(self) -> Iterator[Row]:
        names = short_names(self.inputs, [entry.name for entry in self.merges])
        for number, (model, name) in enumerate(zip(self.inputs, names, strict=True)):
            row = Row(name, "target" if number else "pivot", Path(model))
            try:
                row.folder = self._folder(model)
                row.fingerprint = self._fingerprint(model)
            except UserError as error:
                row.problems.append(str(error))
            yield row

    def _folder(self, model: str) -> Path:
        """The files of a model, downloaded if need be."""
        reference = ModelReference.model_validate(model)
        if reference.lora is not None:
            raise UserError(f"{model} is an adapter on a model: merged, but not measured by itself")
        place = Place(reference.model.path, reference.model.revision, self.settings.cache_dir)
        folder = place.folder()
        if folder is not None and weight_files(folder).names:
            return folder
        if folder is not None and folder == Path(place.path):
            raise UserError(f"the folder `{folder}` has no weights")
        try:
            return Path(reference.local_path(self.settings.cache_dir))
        except Exception as error:  # whatever the HTTP client raises
            raise UserError(f"`{model}` cannot be had: {error}") from error

    def _fingerprint(self, model: str) -> str:
        """Of a model's files; of an adapter, those of the adapter and of what it adapts."""
        if model not in self._known:
            reference = ModelReference.model_validate(model)
            folders = [self._folder(str(ModelReference(model=reference.model)))]
            if reference.lora and (adapter := Path(reference.lora.path)).is_dir():
                folders.append(adapter)
            files = [file for folder in folders for file in model_files(folder)]
            self._known[model] = self.contents.fingerprint(files, self.settings.quiet)
        return self._known[model]

    def _tokenizer(self, model: str) -> str:
        """Of the files of a folder whose weights are not read; of the Hub's, its name."""
        folder = Path(ModelReference.model_validate(model).model.path)
        return self.contents.fingerprint(model_files(folder)) if folder.is_dir() else model

    def _merge_row(self, entry: Entry) -> Row:
        row = Row(entry.name, "merge", self.models / entry.name, entry, problems=list(entry.problems))
        if row.problems:
            self._tell(f"{row.name}: cannot be merged: {'; '.join(row.problems)}")
        return row

    def _read(self) -> list[Row]:
        """The pivot and the targets."""
        return self.rows[: len(self.inputs)]

    def _merged(self) -> list[Row]:
        return self.rows[len(self.inputs) :]

    def _demand_evaluations(self, rows: Sequence[Row]) -> None:
        """Find out before the merges what would fail for every model; not again once all are scored."""
        held_out, tasks = self.settings.held_out, self.settings.tasks
        log = self.out / "logs" / "evaluation.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        for row in rows:
            row.fingerprint = self._record(row)["model"]
        asked = [row for row in self._read() if row.fingerprint] + list(rows)
        missing = {kind for row in asked for kind, _, found in self._measurements(row) if found is None}
        known = {name: tasks.about(self.contents, name) for name in tasks.names} if tasks else {}
        record = ("known", "tasks", known)
        try:
            option = "--held-out"
            if held_out and "held-out" in missing:
                self.scorers.prepare(held_out, self.rows[0].folder, self._about_text(held_out), log)
            option = "--tasks"
            if tasks and missing.difference(["distances", "held-out"]) and not self.steps.found(*record):
                self.scorers.demand(tasks, log)
                self.steps.save(*record, {"names": tasks.names})
        except CommandError as error:
            raise UserError(f"{option}: {reason_of(str(error))} ({log})") from error

    def _before(self, rows: Sequence[Row]) -> None:
        """See that the disk has room, and read the inputs once, if anything is to be merged."""
        due = [row for row in rows if self._is_due(row, self.settings.repeat)]
        sizes = [row.entry.bytes for row in due if row.entry and not row.folder.exists()]
        needed = SPARE * (sum(sizes) if self.settings.keep else max(sizes, default=0))
        free = psutil.disk_usage(str(self.out)).free
        if needed > free:
            advice = ", or --no-keep: one model at a time" if self.settings.keep else ""
            raise UserError(
                f"the merged models take about {size(needed)}, `{self.out}` has {size(free)} free; "
                f"give an --out with more room{advice}"
            )
        if due and sizes:
            self._tell(f"{len(due)} to merge; the models take about {size(needed)} in {self.models}")
        if due:
            files = [file for row in self._read() if row.fingerprint for file in row.folder.iterdir()]
            self.contents.warm(
                (file for file in files if file.suffix in (".safetensors", ".bin")), self.settings.quiet
            )

    # Merging

    def _about_merge(self, row: Row) -> dict[str, Any]:
        assert row.entry
        inputs = {model: self._fingerprint(model) for model in row.entry.models}
        inputs |= {model: self._tokenizer(model) for model in row.entry.tokenizers}
        content, options = recipe_fingerprint(row.entry.content), self._options()
        return {"recipe": content, "inputs": inputs, "options": options, "versions": versions()}

    def _options(self) -> list[str]:
        settings = self.settings
        cache = ["--transformers-cache", settings.cache_dir] if settings.cache_dir else []
        trust = ["--trust-remote-code"] if settings.trust_remote_code else []
        device = ["--cuda"] if settings.device == "cuda" else []
        return [*PLAIN, "--random-seed", str(settings.seed), *device, *cache, *trust, *settings.mergekit]

    def _record(self, row: Row) -> dict[str, Any]:
        """The runs of a merge so far, and the fingerprint of what it wrote."""
        return self.steps.found("merge", row.file, self._about_merge(row)) or {"runs": [], "model": ""}

    def _is_there(self, row: Row, record: Mapping[str, Any]) -> bool:
        return row.folder.is_dir() and self.contents.fingerprint(model_files(row.folder)) == record["model"]

    def _is_due(self, row: Row, times: int) -> bool:
        record = self._record(row)
        if len(record["runs"]) < times:
            return True
        if self._is_there(row, record):
            return False
        row.fingerprint = record["model"]
        return self.settings.keep or not all(found for _, _, found in self._measurements(row))

    def _merge(self, row: Row, times: int) -> None:
        """Merge until there are so many runs, and the model is there if anybody needs it."""
        assert row.entry
        about = self._about_merge(row)
        if changed := self.steps.changed("merge", row.file, about):
            self._tell(f"{row.name}: merged again, for other {' and '.join(changed)}")
        log = self.out / "logs" / f"{row.name}.txt"
        if self._is_due(row, times) and not is_a_merge(row.folder):
            row.problems.append(f"`{row.folder}` holds no merged model; move it away, or give another --out")
            self._tell(f"{row.name}: failed: {row.problems[-1]}")
        while not row.problems and self._is_due(row, times):
            record = self._record(row)
            self._tell(f"{row.name}: merging")
            temporary = self.models / f".{row.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            command = [*mergekit_command(), str(row.entry.path), str(temporary), *self._options()]
            try:
                run = measured(with_header(command, log), log=log, environment=environment(None))
                if not self._is_there(row, record):
                    (temporary / RECIPE).write_text(row.entry.text, encoding="utf-8")
                    record["model"] = self._put(temporary, row.folder)
            except (CommandError, OSError) as error:
                row.problems.append(f"mergekit-yaml: {reason_of(str(error))} ({log})")
                self._tell(f"{row.name}: failed: {reason_of(str(error))}")
                return
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            numbers = {name: None if math.isnan(value) else value for name, value in asdict(run).items()}
            self.steps.save("merge", row.file, about, {**record, "runs": [*record["runs"], numbers]})
            self._tell(f"{row.name}: merged in {run.wall_s:.1f} s, {run.anonymous_mib:.0f} MiB")

    def _put(self, temporary: Path, folder: Path) -> str:
        """Give a whole model its name; its fingerprint."""
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        remove(folder)
        temporary.rename(folder)
        return self.contents.fingerprint(model_files(folder))

    # Measuring

    def _measure(self, row: Row) -> None:
        """Distances and scores of a merged model, which goes after unless it is kept or something failed."""
        record = self._record(row)
        if row.problems:
            return
        row.fingerprint = record["model"]
        row.found["runs"] = record["runs"]
        self._distances(row)
        self._evaluate(row)
        if self.settings.keep:
            row.found["bytes"] = sum(file.stat().st_size for file in row.folder.iterdir())
        elif row.problems:
            self._tell(f"{row.name}: kept in {row.folder}, for it was not measured wholly")
        elif is_a_merge(row.folder):
            remove(row.folder)

    def _measurements(self, row: Row) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
        """Kind, what it depends on, and the result if it is there, of all that a merged model is asked."""
        for kind, about in (("distances", self._about_distances(row)), *self._abouts(row)):
            yield kind, about, self.steps.found(kind, row.file, about)

    def _about_distances(self, row: Row) -> dict[str, Any]:
        inputs = {one.name: one.fingerprint for one in self._read()}
        recipe = recipe_fingerprint(row.entry.content) if row.entry else ""
        return {"model": row.fingerprint, "recipe": recipe, "inputs": inputs, "varm-merge": version("varm-merge")}

    def _abouts(self, row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind, and what it depends on, of each evaluation."""
        same = {"model": row.fingerprint, "device": self.settings.device, "versions": versions()}
        if self.settings.held_out:
            yield "held-out", {**same, **self._about_text(self.settings.held_out)}
        for task in self.settings.tasks.names if self.settings.tasks else ():
            assert self.settings.tasks
            yield f"task {task}", {**same, **self.settings.tasks.about(self.contents, task)}

    def _about_text(self, held_out: HeldOut) -> dict[str, Any]:
        return {"pivot": self.rows[0].fingerprint if self.rows else "", **held_out.about(self.contents)}

    def _distances(self, row: Row) -> None:
        if not row.fingerprint:
            return
        about = self._about_distances(row)
        found = self.steps.found("distances", row.file, about)
        if found is None:
            found = self._measured_distances(row)
            if found is None:
                return
            self.steps.save("distances", row.file, about, found)
        row.found["distances"] = found

    def _measured_distances(self, row: Row) -> dict[str, Any] | None:
        pivot, *targets = self._read()
        if row.entry and (reason := moved_layers(row.entry.content, layers_of(pivot.folder))):
            return {"not_comparable": reason}
        if unread := [one for one in (pivot, *targets) if not one.fingerprint]:
            return {"not_comparable": unread[0].problems[0]}
        self._tell(f"{row.name}: distances")
        try:
            return distances(
                row.folder, pivot.folder, {one.name: one.folder for one in targets}, self.settings.quiet
            )
        except UserError as error:
            row.problems.append(str(error))
            return None

    def _evaluate(self, row: Row) -> None:
        """Held-out loss and tasks, what of it was not done before; not of a model with damaged weights."""
        if not row.fingerprint or row.problems or not (self.settings.held_out or self.settings.tasks):
            return
        log = self.out / "logs" / f"{row.file}-evaluation.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        for kind, about in self._abouts(row):
            found = self.steps.found(kind, row.file, about)
            if found is None:
                self._tell(f"{row.name}: {kind}")
                try:
                    found = self._scored(row, kind, log)
                except (CommandError, OSError, ValueError) as error:
                    row.problems.append(f"{kind}: {reason_of(str(error))} ({log})")
                    continue
                self.steps.save(kind, row.file, about, found)
            row.found[kind] = found

    def _scored(self, row: Row, kind: str, log: Path) -> dict[str, Any]:
        settings = self.settings
        if kind == "held-out":
            assert settings.held_out
            text = self._about_text(settings.held_out)
            dialogues = self.scorers.prepare(settings.held_out, self.rows[0].folder, text, log)
            return self.scorers.held_out(row.folder, dialogues, log)
        assert settings.tasks
        return self.scorers.task(settings.tasks, kind.removeprefix("task "), row.folder, log)

    # What came of it

    def _report(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "format": FORMAT,
            "version": VERSION,
            "command": self.command,
            "machine": machine(),
            "versions": versions(),
            "memory": MEMORY,
            "repeat": settings.repeat,
            "mergekit_options": self._options(),
            "input_bytes": sum(size_of_folder(row.folder) for row in self._read() if row.fingerprint),
            "memory_bytes": psutil.virtual_memory().total,
            "held_out": asdict(settings.held_out) if settings.held_out else None,
            "tasks": list(settings.tasks.names) if settings.tasks else [],
            "rows": [self._described(row) for row in self.rows],
        }

    def _described(self, row: Row) -> dict[str, Any]:
        recipe = {}
        if row.entry:
            recipe = {
                "method": row.entry.method,
                "settings": row.entry.settings,
                "recipe": {"path": str(row.entry.path), "text": row.entry.text},
            }
        tasks = {
            kind.removeprefix("task "): found for kind, found in row.found.items() if kind.startswith("task ")
        }
        return {
            "name": row.name,
            "role": row.role,
            "model": str(row.folder) if row.role != "merge" or row.folder.is_dir() else None,
            **recipe,
            "problems": row.problems,
            "runs": row.found.get("runs", []),
            "bytes": row.found.get("bytes"),
            "distances": row.found.get("distances"),
            "held_out": self._held_out(row),
            "tasks": {name: found["measures"] for name, found in tasks.items()},
        }

    def _held_out(self, row: Row) -> dict[str, Any] | None:
        """The scores by group, each with its differences to those of the other models, by their names."""
        if (own := row.found.get("held-out")) is None:
            return None
        others = {one.name: found for one in self.rows if one is not row and (found := one.found.get("held-out"))}
        return {
            group: {**of, "against": {name: differences(own, found, group) for name, found in others.items()}}
            for group, of in own["groups"].items()
        }

    def _tell(self, message: str) -> None:
        if not self.settings.quiet:
            click.echo(message, err=True)
