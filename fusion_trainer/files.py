"""Files that appear whole or not at all, and fingerprints of what they hold."""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from fusion_trainer.errors import FusionError

__all__ = [
    "TEMPORARY",
    "fingerprint",
    "read_json",
    "read_mapping",
    "sha256_of",
    "sync_folder",
    "sync_tree",
    "whole_file",
    "write_json",
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
        FusionError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the disk's
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror
        raise FusionError(
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
        FusionError: It is not JSON: empty, cut off, or something else.
        OSError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise FusionError(f"`{path}` is not JSON ({size}: {error}); write or copy it again") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file that has to be an object.

    Raises:
        FusionError: It is not there, cannot be read, is not JSON, or is a list, a text or a number.
    """
    try:
        found = read_json(path)
    except OSError as error:
        raise FusionError(f"`{path}` cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        kind = JSON_NAMES[type(found)]
        raise FusionError(f"`{path}` holds a JSON {kind}, not an object; write or copy it again")
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
