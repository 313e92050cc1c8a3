"""The folder of a comparison or search: its lock, the results of finished steps, and the models in it."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varm_common.errors import UserError
from varm_common.files import fingerprint, locked, sha256_of, sync_tree, write_file, written_to

__all__ = ["Steps", "demand_folder", "exclusive", "is_a_merge", "model_files", "put", "remove", "state_of"]

NOUNS = {"compare": "comparison", "tune": "search"}
"""What lies in the folder of a command."""
MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".tiktoken", ".py"}
"""Suffixes of weights, configs, tokenizers and code; not of the README."""
RECIPE = "mergekit_config.yml"
"""The recipe in the folder of a merged model."""


@contextmanager
def exclusive(folder: Path, command: str = "compare") -> Iterator[None]:
    """Make a folder that of a command, and keep other processes from writing into it.

    Raises:
        UserError: Another process writes into it, or it cannot be written.
    """
    marker = folder / _marker(command)
    with written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        marker.open("a").close()
    busy = f"another `varm-merge {command}` is running in `{folder}`; wait for it, or give another --out"
    with locked(marker, busy):
        if not _is_marked(folder, command):
            with written_to(folder):
                marker.write_text(_mark(command), encoding="utf-8")  # in place: another file has another lock
        yield


def demand_folder(folder: Path, command: str = "compare") -> None:
    """Refuse a folder that holds the user's own files.

    Raises:
        UserError: It holds files, and no marker of the command.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`{folder}` is a file; --out is the folder of the report")
    own = _is_marked(folder, command)
    if folder.is_dir() and not own and any(file.name != _marker(command) for file in folder.iterdir()):
        raise UserError(f"`{folder}` is not empty and holds no {NOUNS[command]}; give another --out")


def _marker(command: str) -> str:
    """The name of the marker file, which is also the lock. Only a folder with its marker is written to."""
    return f".varm-merge-{command}"


def _mark(command: str) -> str:
    text = f"A {NOUNS[command]} by varm-merge {command} lies in this folder"
    return f"{text}: it writes, replaces and removes files here.\n"


def _is_marked(folder: Path, command: str) -> bool:
    try:
        return (folder / _marker(command)).read_text(encoding="utf-8") == _mark(command)
    except (OSError, UnicodeDecodeError):
        return False


class Steps:
    """The results of finished steps, by kind (``merge``, ``distances``, …) and model.

    Each is stored with a description of its inputs, and counts only as long as its inputs are the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, name: str) -> Path:
        return self.folder / kind.replace("/", "-") / f"{name.replace('/', '-')}.json"

    def load(self, kind: str, name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a step; None if it was not done with these inputs."""
        saved = self._saved(kind, name)
        return saved["result"] if saved and saved["about"] == _as_json(inputs) else None

    def changed(self, kind: str, name: str, inputs: Mapping[str, Any]) -> list[str]:
        """Which inputs differ from those of the last time; none if the step was never done."""
        before = self._saved(kind, name).get("about")
        return [key for key, value in _as_json(inputs).items() if before.get(key) != value] if before else []

    def save(self, kind: str, name: str, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        text = json.dumps({"about": inputs, "result": result}, indent=1, allow_nan=False)
        write_file(self.path(kind, name), text + "\n")

    def _saved(self, kind: str, name: str) -> dict[str, Any]:
        """``about`` and ``result``; empty if there is no such file or it is damaged."""
        try:
            saved = json.loads(self.path(kind, name).read_text(encoding="utf-8"))
            return saved if isinstance(saved["about"], dict) and isinstance(saved["result"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def state_of(files: Iterable[Path]) -> str:
    """A fingerprint of files by name, size and time: it changes when one of them is written.

    Raises:
        UserError: One cannot be read.
    """
    try:
        states = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in sorted(files)]
    except OSError as error:
        raise UserError(f"`{error.filename}` cannot be read: {error.strerror}") from error
    return fingerprint(states)


def model_files(folder: Path) -> list[Path]:
    """The files of a model: weights, config, tokenizer, code."""
    return sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES and file.is_file())


def is_a_merge(folder: Path) -> bool:
    """Whether a comparison may replace or remove a folder: it is a merge with its recipe, empty, or not there."""
    return not folder.exists() or (folder.is_dir() and ((folder / RECIPE).is_file() or not any(folder.iterdir())))


def put(merged: Path, folder: Path, recipe: str) -> dict[str, str]:
    """Add its recipe to a merge, and move it to its folder in place of an earlier merge.

    Returns:
        Fingerprints of its files: the ``model`` by name and content, the ``state`` by name, size and time.
    """
    (merged / RECIPE).write_text(recipe, encoding="utf-8")
    sync_tree(merged)
    remove(folder)
    merged.rename(folder)
    files = model_files(folder)
    return {"model": fingerprint([(file.name, sha256_of(file)) for file in files]), "state": state_of(files)}


def remove(folder: Path) -> None:
    """Remove a merge. It is renamed first: half of a removed merge would be taken for the user's own folder."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _as_json(inputs: Mapping[str, Any]) -> Any:
    """As it is after it was stored: tuples are lists."""
    return json.loads(json.dumps(inputs))
