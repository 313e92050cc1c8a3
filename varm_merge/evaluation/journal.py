"""Keeps finished records on the disk: they survive a crash, and an output appears only when it is complete.

``OUTPUT.partial`` grows by whole lines, each synced before the next begins. ``OUTPUT.settings.json`` describes how
they were made: the same command resumes, and a command with other settings is refused.
"""

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from varm_common.errors import UserError, demand_same
from varm_common.files import locked, write_file, written_to

__all__ = ["Journal", "Lines"]

Self = TypeVar("Self", bound="Lines")


class Lines:
    """A file of JSON lines that one process at a time appends to. Use it in a ``with`` block.

    An incomplete last line, as a killed run leaves it, is removed.

    Args:
        path: The file. It is created if needed, and removed again if it stays empty.
        check: Raises an error if the rows, or the content of the file, are not this program's. The file is
            changed only afterwards.

    Raises:
        UserError: The file holds something else, another process writes it, or the disk refuses.
    """

    def __init__(self, path: Path, check: Callable[[Sequence[Any], bytes], None]) -> None:
        self.path, self._held = path, ExitStack()
        with written_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._created = not os.path.lexists(path)
            self._held.enter_context(locked(path, f"`{path}` is being written by another process"))
            self._file = self._held.enter_context(path.open("a+b", buffering=0))
        try:
            self._file.seek(0)
            content = self._file.read()
            self.rows, torn = self._parsed(content.split(b"\n"))
            check(self.rows, content)
            with written_to(path.parent):
                self._file.truncate(len(content) - torn)
                if not torn and content and not content.endswith(b"\n"):
                    self._file.write(b"\n")
        except BaseException:
            self.close()
            raise

    def _parsed(self, lines: Sequence[bytes]) -> tuple[list[Any], int]:
        """The rows, and the length of an incomplete last line."""
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                if number == len(lines) and line.startswith((b"{", b"[")):
                    return rows, len(line)
                raise UserError(f"`{self.path}`, line {number}: not JSON: {error}") from error
        return rows, 0

    def add(self, row: Any) -> None:
        """Append a row; it is on the disk when this returns."""
        line = memoryview(json.dumps(row).encode() + b"\n")
        with written_to(self.path.parent):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let other processes write the file."""
        if self._created and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self._held.close()

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
        self.output, self.finished, self.began = output, output.exists(), time.time()
        self._settings = output.with_name(f"{output.name}.settings.json")
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        super().__init__(output.with_name(f"{output.name}.partial"), self._compare_settings)
        self.records: dict[Hashable, Any] = dict(self.rows)

    def _compare_settings(self, _: Sequence[Any], content: bytes) -> None:
        """Compare the settings with those of earlier runs."""
        if not os.path.lexists(self._settings):
            if self.finished or content:
                path = self.output if self.finished else self.path
                raise UserError(f"`{path}` exists without {self._settings.name}; give another --output")
            return
        try:
            earlier = json.loads(self._settings.read_text(encoding="utf-8"))
            self.began = float(earlier.pop("began"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"`{self._settings}` is not from this program; give another --output") from error
        remedy = f"Give another --output, or remove `{self._settings}` and the files beside it to start over."
        demand_same(f"`{self.output}` was started with other settings:", self._about, earlier, remedy)

    def keep(self, key: Hashable, record: Any) -> None:
        """Add a record; it is on the disk when this returns."""
        self._write_settings()
        self.add([key, record])
        self.records[key] = record

    def finish(self, content: str) -> None:
        """Write the output."""
        self._write_settings()
        write_file(self.output, content)
        self.path.unlink(missing_ok=True)
        self.finished = True

    def _write_settings(self) -> None:
        if not self._settings.exists():
            settings = {"began": self.began, **self._about}
            write_file(self._settings, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
