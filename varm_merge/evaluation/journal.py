"""Keeps finished records on the disk: they survive a crash, and an output appears only when it is complete.

``OUTPUT.partial`` grows by whole lines, each synced before the next begins. ``OUTPUT.settings.json`` describes how
they were made: the same command resumes, and a command with other settings is refused.
"""

import fcntl
import json
import os
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from varm_common.errors import UserError, unlike
from varm_common.files import write_whole, written_to

__all__ = ["Journal", "Lines"]


class Lines:
    """A file of JSON lines that one process at a time appends to. Use it in a ``with`` block.

    Args:
        path: The file. It is created if needed, and removed again if it stays empty.

    Attributes:
        rows: The rows that were in the file.
        torn: The number of bytes of a last line that a killed run left incomplete.

    Raises:
        UserError: The file holds something else, another process writes it, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with written_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._created = not os.path.lexists(path)
            self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self._file.seek(0)
            self.rows, self.torn = self._parsed(self._file.read())
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"`{self.path}` is being written by another process") from error

    def _parsed(self, content: bytes) -> tuple[list[Any], int]:
        rows = []
        lines = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                if number == len(lines) and line.startswith((b"{", b"[")):
                    return rows, len(line)
                raise UserError(f"`{self.path}`, line {number}: not JSON: {error}") from error
        return rows, 0

    def mend(self) -> None:
        """Remove an incomplete last line, and end a complete one, once the file is known to be this program's."""
        with written_to(self.path.parent):
            size = self.path.stat().st_size - self.torn
            self._file.truncate(size)
            self.torn = 0
            self._file.seek(max(size - 1, 0))
            if self._file.read(1) not in (b"\n", b""):
                self._file.write(b"\n")

    def add(self, row: Any) -> None:
        """Append a row; it is on the disk when this returns."""
        line = memoryview(json.dumps(row).encode() + b"\n")
        self.mend()
        with written_to(self.path.parent):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._created and self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()


class Journal:
    """The records of one output. Use it in a ``with`` block.

    Args:
        output: The file to write in the end.
        about: What the records depend on; JSON.

    Attributes:
        records: The records by key, those of earlier runs included.
        began: When the first run began, in seconds since 1970.
        finished: Whether the output is complete.

    Raises:
        UserError: The output, or its unfinished part, was made with other settings or by another program.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        self.output = output
        self.records: dict[Hashable, Any] = {}
        self._settings = output.with_name(f"{output.name}.settings.json")
        self._partial = output.with_name(f"{output.name}.partial")
        self.finished = output.exists()
        self._lines = None if self.finished else Lines(self._partial)
        try:
            self.began = self._agree(json.loads(json.dumps(about)))
        except BaseException:
            self._close()
            raise
        self.records = dict(self._lines.rows) if self._lines else {}

    def _agree(self, about: Mapping[str, Any]) -> float:
        """Write the settings, or compare them with those of earlier runs; returns when the first run began."""
        if not os.path.lexists(self._settings):
            if self._lines is None or self._lines.rows or self._lines.torn:
                path = self.output if self.finished else self._partial
                raise UserError(f"`{path}` exists without {self._settings.name}; give another --output")
            began = time.time()
            write_whole(self._settings, json.dumps({"began": began, **about}, indent=1, ensure_ascii=False) + "\n")
            return began
        try:
            earlier = json.loads(self._settings.read_text(encoding="utf-8"))
            began = float(earlier.pop("began"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"`{self._settings}` is not from this program; give another --output") from error
        if difference := unlike(f"`{self.output}` was begun with other settings:", about, earlier):
            raise UserError(
                f"{difference}\nGive another --output, or remove `{self._settings}` and the files beside it to "
                "start over."
            )
        return began

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

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self.finished and not self.records:
            self._settings.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.__exit__()
