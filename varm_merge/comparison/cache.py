"""What a comparison has done, in files that appear whole, each with the fingerprint of all that it depends on."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from varm_common.errors import UserError
from varm_common.files import write_whole

__all__ = ["RECIPE", "Contents", "Steps", "demand_folder", "is_a_merge", "locked", "model_files", "remove"]

MARKER = ".varm-merge-compare"
MARK = "A comparison by varm-merge compare lies in this folder: it writes, replaces and removes files here.\n"
"""What the marker says, by which a comparison knows its folder again; it is the lock as well."""

MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".tiktoken", ".py"}
"""Suffixes of the files that make a model what it is; not its README."""
BLOCK_BYTES = 1 << 20
RECIPE = "mergekit_config.yml"
"""Of a merged model, in its folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from writing into a report's folder; the kernel lets go of it when this process ends.

    Raises:
        UserError: Another process compares into it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / MARKER).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"`{folder}` cannot be written: {error.strerror or error}") from error
    with file:
        if sys.platform != "win32":
            import fcntl

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
    """Refuse a folder in which something else lies.

    Raises:
        UserError: It holds files, and no marker that says that they are a comparison's.
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
    """Results by kind (``merge``, ``distances``, …) and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, name: str) -> Path:
        return self.folder / kind.replace("/", "-") / f"{name.replace('/', '-')}.json"

    def found(self, kind: str, name: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a step that was done with what it depends on being ``about``; None if it was not."""
        saved = self._saved(kind, name)
        return saved["result"] if saved and saved["about"] == _plain(about) else None

    def changed(self, kind: str, name: str, about: Mapping[str, Any]) -> list[str]:
        """What was different when the step was done last; nothing if it never was."""
        saved, wanted = self._saved(kind, name), _plain(about)
        return [key for key in wanted if saved["about"].get(key) != wanted[key]] if saved else []

    def save(self, kind: str, name: str, about: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        text = json.dumps({"about": about, "result": result}, indent=1, allow_nan=False)
        write_whole(self.path(kind, name), text + "\n")

    def _saved(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            saved = json.loads(self.path(kind, name).read_text(encoding="utf-8"))
            return saved if isinstance(saved["about"], dict) and isinstance(saved["result"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Contents:
    """SHA-256 of files, read once: a file of the size and time that it had is taken to be the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self.read: set[Path] = set()
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            self._known = found if isinstance(found, dict) else {}

    def fingerprint(self, files: Iterable[Path], quiet: bool = True) -> str:
        """Of some files, by name and content.

        Raises:
            UserError: One cannot be read.
        """
        sums, before = [], dict(self._known)
        try:
            for file in sorted(files):
                status = file.stat()
                stamp, place = [status.st_size, status.st_mtime_ns], str(file.resolve())
                known = self._known.get(place)
                if not isinstance(known, list) or known[:2] != stamp:
                    known = self._known[place] = [*stamp, self._sum(file, quiet)]
                sums.append([file.name, known[2]])
        except OSError as error:
            raise UserError(f"`{error.filename}` cannot be read: {error.strerror}") from error
        if self._known != before:
            write_whole(self._path, json.dumps(self._known, indent=1))
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def warm(self, files: Iterable[Path], quiet: bool) -> None:
        """Read those that were not read before by this process, so that they lie in the page cache."""
        for file in files:
            if file.resolve() not in self.read:
                self._sum(file, quiet)

    def _sum(self, file: Path, quiet: bool) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as opened, _bar(file, quiet) as bar:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
                bar.update(len(block))
        self.read.add(file.resolve())
        return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model: weights, config, tokenizer, code."""
    return sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES and file.is_file())


def is_a_merge(folder: Path) -> bool:
    """Whether a folder is one of ours to replace or remove: a merge with its recipe, empty, or not there."""
    return not folder.exists() or (folder.is_dir() and ((folder / RECIPE).is_file() or not any(folder.iterdir())))


def remove(folder: Path) -> None:
    """Remove a merge; under another name first, so that one that was removed in half is not taken for a user's."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _bar(file: Path, quiet: bool) -> Any:
    return tqdm(
        total=file.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=f"read {file.name}",
        leave=False,
        delay=1,
        disable=quiet,
    )


def _plain(about: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(about))
