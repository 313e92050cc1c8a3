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
from typing import Any, TypeVar

from varm_common.errors import UserError, unlike
from varm_common.files import write_whole, written_to

__all__ = ["Journal", "Lines"]

Self = TypeVar("Self", bound="Lines")


class Lines:
    """A file of JSON lines that one process at a time appends to. Use it in a ``with`` block.

    A killed run may have left the last line incomplete. Only ``add`` and ``mend`` remove it, because the file may
    turn out to be another program's.

    Args:
        path: The file. It is created if needed, and removed again if it stays empty.

    Attributes:
        rows: The rows that were in the file.
        torn: The number of bytes of an incomplete last line.

    Raises:
        UserError: The file holds something else, another process writes it, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.torn = path, list[Any](), 0
        with written_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._created = not os.path.lexists(path)
            self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            self._parse(self._file.read().split(b"\n"))
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"`{path}` is being written by another process") from error
            raise

    def _parse(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                self.rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                if number < len(lines) or not line.startswith((b"{", b"[")):
                    raise UserError(f"`{self.path}`, line {number}: not JSON: {error}") from error
                self.torn = len(line)
        self._end = b"\n" if lines[-1] and not self.torn else b""

    def mend(self) -> None:
        """Remove an incomplete last line, and end a complete one."""
        with written_to(self.path.parent):
            self._file.truncate(os.fstat(self._file.fileno()).st_size - self.torn)
            self._file.write(self._end)
        self.torn, self._end = 0, b""

    def add(self, row: Any) -> None:
        """Append a row; it is on the disk when this returns."""
        self.mend()
        line = memoryview(json.dumps(row).encode() + b"\n")
        with written_to(self.path.parent):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let other processes write the file."""
        if self._created and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Journal(Lines):
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
        super().__init__(output.with_name(f"{output.name}.partial"))
        self.output, self.finished = output, output.exists()
        self._settings = output.with_name(f"{output.name}.settings.json")
        try:
            self.began = self._compare_settings(json.loads(json.dumps(about)))
            self.records: dict[Hashable, Any] = dict(self.rows)
        except BaseException:
            super().close()
            raise

    def _compare_settings(self, about: Mapping[str, Any]) -> float:
        """Write the settings, or compare them with those of earlier runs; returns when the first run began."""
        if not os.path.lexists(self._settings):
            if self.finished or self.rows or self.torn:
                path = self.output if self.finished else self.path
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

    def keep(self, key: Hashable, record: Any) -> None:
        """Add a record; it is on the disk when this returns."""
        self.add([key, record])
        self.records[key] = record

    def finish(self, content: str) -> None:
        """Write the output."""
        write_whole(self.output, content)
        self.path.unlink(missing_ok=True)
        self.finished = True

    def close(self) -> None:
        if not self.finished and not self.records:
            self._settings.unlink(missing_ok=True)
        super().close()
