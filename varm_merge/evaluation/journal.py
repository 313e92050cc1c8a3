"""What a killed run has made is there for the next one, and a file is whole when it has its name.

While an output is being made, ``OUTPUT.partial`` grows by whole lines, each on the disk before the next is begun;
OUTPUT itself appears when the last one is there. ``OUTPUT.settings.json`` says what they are the answers of: the
same command goes on, another one refuses.
"""

import json
import os
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from varm_merge.errors import VarmError
from varm_merge.files import write_whole

__all__ = ["Journal", "Lines", "rows_in"]

ROW_BEGINS = (b"{", b"[")


@contextmanager
def _written_to(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VarmError(f"`{path}` cannot be written: {error.strerror or error}") from error


class Lines:
    """A file of JSON lines that grows by whole ones, written by one process at a time.

    Args:
        path: Of the file; a line that a killed run has left half written is removed when the next is added.

    Attributes:
        rows: What was in it.
        torn: The bytes of a line left half written.

    Raises:
        VarmError: It holds something else, another process writes it, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _written_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made = not os.path.lexists(path)
            self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self.rows = self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no Unix
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VarmError(f"`{self.path}` is being written by another process") from error

    def _read(self) -> list[Any]:
        self._file.seek(0)
        content = self._file.read()
        rows, size = _parsed(self.path, content)
        self.torn = len(content) - size
        self._unended = size > 0 and content[size - 1 : size] != b"\n"
        return rows

    def mend(self) -> None:
        """Remove a line left half written, and end the last one: the file is known to be of this program."""
        with _written_to(self.path):
            if self.torn:
                self._file.truncate(self.path.stat().st_size - self.torn)
                self.torn = 0
            if self._unended:
                self._file.write(b"\n")
                self._unended = False

    def add(self, row: Any) -> None:
        """Append a line; it is on the disk when this returns."""
        self.mend()
        line = memoryview(json.dumps(row).encode() + b"\n")
        with _written_to(self.path):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; one that this process has made and left empty is removed."""
        with _written_to(self.path):
            self._file.close()
            if self._made and self.path.exists() and not self.path.stat().st_size:
                self.path.unlink()


def rows_in(path: Path) -> list[Any]:
    """The rows of a file that grows by lines, without a line left half written; none if it is not there.

    Raises:
        VarmError: It cannot be read, or has other lines than JSON.
    """
    try:
        return _parsed(path, path.read_bytes())[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VarmError(f"`{path}` cannot be read: {error.strerror}") from error


def _parsed(path: Path, content: bytes) -> tuple[list[Any], int]:
    """The rows, and the bytes that they take; a last line without an end counts if it is whole.

    Raises:
        VarmError: A line is no JSON, and is not the beginning of a row at the end either.
    """
    *lines, last = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise VarmError(f"`{path}`, line {number}: no JSON: {error}") from error
    try:
        return [*rows, json.loads(last)], len(content)
    except ValueError as error:
        if not last.strip():
            return rows, len(content)
        if not last.startswith(ROW_BEGINS):
            raise VarmError(f"`{path}`, line {len(lines) + 1}: no JSON: {error}") from error
        return rows, len(content) - len(last)


class Journal:
    """The records of one output, by their keys.

    Args:
        output: The file that is to appear.
        about: What it is made of and how; JSON.

    Attributes:
        records: By key; those of earlier runs are there.
        began: When the first run began, in seconds since 1970; what is written in every record.
        finished: Whether the output is there, made of the same.

    Raises:
        VarmError: The output, or what is there of it, is of something else.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        self.output = output
        self.records: dict[Hashable, Any] = {}
        self._settings = output.with_name(f"{output.name}.settings.json")
        self._partial = output.with_name(f"{output.name}.partial")
        self.finished = output.exists()
        self._lines = None if self.finished else Lines(self._partial)
        try:
            self.began = self._agreed(about)
        except BaseException:
            self._close()
            raise
        if self._lines is not None:
            self.records = {_key(key): record for key, record in self._lines.rows}

    def _agreed(self, about: Mapping[str, Any]) -> float:
        """When the records that are there were begun; they are of what ``about`` says."""
        foreign = self._lines is not None and self._lines.torn and not self._settings.exists()
        if self._lines is not None and not self._lines.rows and not foreign:
            began = time.time()  # or a run that has made nothing
            if os.path.lexists(self._settings) and not _is_settings(self._settings):
                raise VarmError(f"`{self._settings}` is there, and is not of this program; give another --output")
            write_whole(self._settings, json.dumps({"began": began, **about}, indent=1, ensure_ascii=False) + "\n")
            return began
        if not self._settings.exists():
            there = self.output if self.finished else self._partial
            raise VarmError(f"`{there}` is there, without {self._settings.name}; give another --output")
        try:
            found = json.loads(self._settings.read_text(encoding="utf-8"))
            began = float(found.pop("began"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise VarmError(f"`{self._settings}` cannot be read: {error!r}; remove it to begin anew") from error
        changed = list(_changes(found, json.loads(json.dumps(about))))
        if changed:
            raise VarmError(
                f"`{self.output}` was begun with other settings:\n  "
                + "\n  ".join(changed)
                + f"\nGive another --output, or remove `{self._settings}` and what is beside it to begin anew."
            )
        return began

    def __enter__(self) -> "Journal":
        return self

    def add(self, key: Hashable, record: Any) -> None:
        """Keep a record; it is on the disk when this returns."""
        assert self._lines is not None
        self._lines.add([key, record])
        self.records[key] = record

    def finish(self, content: str) -> None:
        """Write the output."""
        write_whole(self.output, content)
        self._partial.unlink(missing_ok=True)
        self.finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self.finished and not self.records:
            self._settings.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def _key(key: Any) -> Hashable:
    return tuple(key) if isinstance(key, list) else key


def _is_settings(path: Path) -> bool:
    """Whether a run has written them, of whatever."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(found, dict)
        and isinstance(found.get("began"), float)
        and str(found.get("format")).startswith("varm-merge ")
    )


def _changes(found: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*found, *asked)):
        then, now = found.get(name), asked.get(name)
        if then != now:
            yield f"{name}: {_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 70 else f"{text[:12]}…"
