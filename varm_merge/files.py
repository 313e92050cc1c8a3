"""Files that appear whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from varm_merge.errors import VarmError

__all__ = ["demand_place", "write_whole"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it, rename it; its folder is made.

    A link stays one, and what it leads to is written. A device or a pipe is written to as it is.

    Args:
        path: Of the file.
        content: A text is written as UTF-8; a file name in it may hold bytes that are no text.

    Raises:
        VarmError: It cannot be written; what was there is as it was.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    place = path.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise VarmError(f"`{path}` cannot be written: {error.strerror or error}") from error


def demand_place(path: Path) -> None:
    """Find out that a file cannot be written before hours of work for it.

    Raises:
        VarmError: Its folder is not there, or takes no file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        return
    if path.is_dir():
        raise VarmError(f"`{path}` cannot be written: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise VarmError(f"`{path}` cannot be written: there is no folder `{path.parent}`")
    trial = folder / f".{path.name}.{os.getpid()}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise VarmError(f"`{path}` cannot be written: {error.strerror or error}") from error
