"""Files that appear whole or not at all, and fingerprints of what they hold."""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from varm_common.errors import UserError

__all__ = [
    "TEMPORARY",
    "demand_place",
    "fingerprint",
    "read_json",
    "read_mapping",
    "sha256_of",
    "sync_folder",
    "sync_tree",
    "whole_file",
    "write_json",
    "write_whole",
    "written_to",
]

TEMPORARY = ".tmp"
"""Suffix of a file that is being written; nothing that reads a folder looks at such files."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only once its content is on the disk.

    Raises:
        OSError: The disk is full, or the folder cannot be written; nothing is left behind.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that tells which process of which machine is writing."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}{TEMPORARY}")


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove what dead processes of this machine were writing in ``folder``, by names that begin with ``name``."""
    for path in folder.glob(f"{name}*.{platform.node()}.*{TEMPORARY}"):
        process = path.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def written_to(folder: Path, then: str = "it goes on where it stopped") -> Iterator[None]:
    """What the disk refuses inside the block becomes a sentence for the user.

    Args:
        folder: Where the block writes.
        then: What the same command does when it is run again.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the disk's
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror
        raise UserError(
            f"`{folder}` cannot be written: {what}. Once that is mended run the same command again: {then}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring everything in a folder to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented UTF-8 JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: It is not JSON: empty, cut off, or something else.
        OSError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"`{path}` is not JSON ({size}: {error}); write or copy it again") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file that has to be an object.

    Raises:
        UserError: It is not there, cannot be read, is not JSON, or is a list, a text or a number.
    """
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        kind = JSON_NAMES[type(found)]
        raise UserError(f"`{path}` holds a JSON {kind}, not an object; write or copy it again")
    return found


JSON_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest.hexdigest()


def fingerprint(content: Any) -> str:
    """The SHA-256 of a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it, rename it; its folder is made.

    A link stays one, and what it leads to is written. A device or a pipe is written to as it is.

    Args:
        path: Of the file.
        content: A text is written as UTF-8; a file name in it may hold bytes that are no text.

    Raises:
        UserError: It cannot be written; what was there is as it was.
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
        raise UserError(f"`{path}` cannot be written: {error.strerror or error}") from error


def demand_place(path: Path) -> None:
    """Find out that a file cannot be written before hours of work for it.

    Raises:
        UserError: Its folder is not there, or takes no file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        return
    if path.is_dir():
        raise UserError(f"`{path}` cannot be written: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"`{path}` cannot be written: there is no folder `{path.parent}`")
    trial = folder / f".{path.name}.{os.getpid()}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {error.strerror or error}") from error
