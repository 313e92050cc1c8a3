"""The folder of a comparison: its lock, the results of finished steps, and the hashes of files."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from varm_common.errors import UserError
from varm_common.files import write_whole

__all__ = ["RECIPE", "Hashes", "Steps", "demand_folder", "is_a_merge", "locked", "model_files", "remove"]

MARKER = ".varm-merge-compare"
MARK = "A comparison by varm-merge compare lies in this folder: it writes, replaces and removes files here.\n"
"""The content of the marker file, which is also the lock. Only a folder with this marker is written to."""
MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".tiktoken", ".py"}
"""Suffixes of weights, configs, tokenizers and code; not of the README."""
BLOCK_BYTES = 1 << 20
RECIPE = "mergekit_config.yml"
"""The recipe in the folder of a merged model."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder that of a comparison, and keep other processes from comparing into it.

    Raises:
        UserError: Another process compares into it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / MARKER).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"`{folder}` cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another `varm-merge compare` works in `{folder}`; wait for it, or give another --out"
            raise UserError(message) from error
        if not _is_marked(folder):
            file.truncate(0)
            file.write(MARK)
            file.flush()
        yield


def demand_folder(folder: Path) -> None:
    """Refuse a folder that holds the user's own files.

    Raises:
        UserError: It holds files, and no marker of a comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`{folder}` is a file; --out is the folder of the report")
    if folder.is_dir() and not _is_marked(folder) and any(file.name != MARKER for file in folder.iterdir()):
        raise UserError(f"`{folder}` is not empty and holds no comparison; give another --out")


def _is_marked(folder: Path) -> bool:
    try:
        return (folder / MARKER).read_text(encoding="utf-8") == MARK
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
        write_whole(self.path(kind, name), text + "\n")

    def _saved(self, kind: str, name: str) -> dict[str, Any]:
        """``about`` and ``result``; empty if there is no such file or it is damaged."""
        try:
            saved = json.loads(self.path(kind, name).read_text(encoding="utf-8"))
            return saved if isinstance(saved["about"], dict) and isinstance(saved["result"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


class Hashes:
    """SHA-256 of files, stored in the file ``path``. A file of the same size and time is not read again."""

    def __init__(self, path: Path, quiet: bool = True) -> None:
        self.path, self.quiet = path, quiet
        self.read: set[Path] = set()
        """The files that this process has read."""
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, TypeError):
            self._known = dict(json.loads(path.read_text(encoding="utf-8")))

    def fingerprint(self, files: Iterable[Path]) -> str:
        """SHA-256 over the names and contents of files.

        Raises:
            UserError: One cannot be read.
        """
        hashes, before = [], dict(self._known)
        try:
            for file in sorted(files):
                status, key = file.stat(), str(file.resolve())
                stamp = [status.st_size, status.st_mtime_ns]
                if self._known.get(key, [])[:2] != stamp:
                    self._known[key] = [*stamp, self._sha256(file)]
                hashes.append([file.name, self._known[key][2]])
        except OSError as error:
            raise UserError(f"`{error.filename}` cannot be read: {error.strerror}") from error
        if self._known != before:
            write_whole(self.path, json.dumps(self._known, indent=1))
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def read_once(self, files: Iterable[Path]) -> None:
        """Read the files that this process has not read yet, so that they are in the page cache."""
        for file in files:
            if file.resolve() not in self.read:
                self._sha256(file)

    def _sha256(self, file: Path) -> str:
        digest = hashlib.sha256()
        bar = {"desc": f"read {file.name}", "leave": False, "delay": 1, "disable": self.quiet}
        with file.open("rb") as raw, tqdm.wrapattr(raw, "read", total=file.stat().st_size, **bar) as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
        self.read.add(file.resolve())
        return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model: weights, config, tokenizer, code."""
    return sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES and file.is_file())


def is_a_merge(folder: Path) -> bool:
    """Whether a comparison may replace or remove a folder: it is a merge with its recipe, empty, or not there."""
    return not folder.exists() or (folder.is_dir() and ((folder / RECIPE).is_file() or not any(folder.iterdir())))


def remove(folder: Path) -> None:
    """Remove a merge. It is renamed first: half of a removed merge would be taken for the user's own folder."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _as_json(inputs: Mapping[str, Any]) -> Any:
    """As it is after it was stored: tuples are lists."""
    return json.loads(json.dumps(inputs))
