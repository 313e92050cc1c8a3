"""Files that appear only when they are complete, JSON, SHA-256, and a lock."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from varm_common.errors import UserError

__all__ = [
    "TEMPORARY",
    "HashCache",
    "atomic_file",
    "demand_place",
    "fingerprint",
    "json_entry",
    "locked",
    "read_json",
    "read_mapping",
    "read_text",
    "remove_abandoned",
    "sha256_of",
    "sync_folder",
    "sync_tree",
    "temporary_name",
    "write_file",
    "write_json",
    "written_to",
]

TEMPORARY = ".tmp"
"""Suffix of a file that is being written. Code that reads a folder ignores such files."""
LOCK_POLL_S = 0.1
"""How often a process that waits for a lock tries again."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name only when all of its content is on the disk.

    A link stays a link: the file that it leads to is replaced. A device or a pipe is written to directly.

    Raises:
        OSError: The disk is full, or the folder cannot be written. The earlier file is unchanged.
    """
    place = path.resolve()
    if place.exists() and not place.is_file():
        with place.open("wb") as file:
            yield file
        return
    temporary = temporary_name(place)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(place.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file by ``atomic_file``; its folder is created if needed.

    Args:
        path: The file.
        content: Text is written as UTF-8. A file name in it may hold bytes that are not UTF-8.

    Raises:
        UserError: It cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"`{path}` cannot be written: {error.strerror or error}")


def demand_place(path: Path) -> None:
    """Check that a file can be written, before hours of work for it.

    Raises:
        UserError: Its folder does not exist, or takes no file.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise UserError(f"`{path}` cannot be written: it is a folder")
    if not folder.is_dir():
        raise UserError(f"`{path}` cannot be written: there is no folder `{path.parent}`")
    if path.exists() and not path.is_file():  # a device or a pipe
        return
    try:
        trial = temporary_name(folder / f".{path.name}")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _not_writable(path, error) from error


@contextmanager
def written_to(folder: Path, then: str = "it resumes where it stopped") -> Iterator[None]:
    """Turn a disk error inside the block into a ``UserError``.

    Args:
        folder: The folder that the block writes to.
        then: What the same command does when it is run again.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the disk
            raise
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        remedy = f"Fix that and run the same command again: {then}"
        raise UserError(f"`{folder}` cannot be written: {reason}. {remedy}") from error


@contextmanager
def locked(path: Path, busy: str, patience_s: float = 0.0) -> Iterator[int | None]:
    """Hold a lock on the file ``path``, so that one process at a time runs the block.

    A killed process frees its lock, unless a child process holds it too. Where no file can be created or locked (a
    read-only folder, a file system without locks), the block runs without a lock.

    Args:
        path: The file. It is created if needed, its content is not changed, and it stays when the block ends.
        busy: The error message when another process holds the lock.
        patience_s: How long to wait for the other process.

    Yields:
        The file's descriptor, None if there is none. A child process that inherits it holds the lock too.

    Raises:
        UserError: Another process holds the lock.
    """
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if descriptor is not None and not _is_free(descriptor, patience_s):
            raise UserError(busy)
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_free(descriptor: int, patience_s: float) -> bool:
    """Lock a file; false if another process holds the lock."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(LOCK_POLL_S)
        except OSError:  # this file system has no locks
            return True
        else:
            return True


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that holds the machine and the process that write it."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}{TEMPORARY}")


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove the temporary files of dead processes of this machine whose names begin with ``name``."""
    for path in folder.glob(f"{name}*.{platform.node()}.*{TEMPORARY}"):
        process = path.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if not process.isdecimal() or psutil.pid_exists(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and everything in it survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)  # a file is synced the same way


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented UTF-8 JSON by ``atomic_file``."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, without a byte order mark.

    Raises:
        UserError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error


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
    """The content of a JSON file that holds an object.

    Raises:
        UserError: It does not exist, cannot be read, is not JSON, or is not an object.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"`{path}` is not a JSON object but `{str(content)[:20]}`; write or copy it again")
    return content


def json_entry(path: Path, key: str) -> Any:
    """An entry of the object in a JSON file; None if it cannot be read, is no object, or has no such entry."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def fingerprint(content: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class HashCache:
    """SHA-256 of files. A file is read again only when its size, times or inode have changed.

    Args:
        path: The JSON file in which ``save`` keeps the sums.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list[Any]] = {}
        with suppress(UserError):
            self._known = read_mapping(path)

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file's content, in hexadecimal."""
        status, name = path.stat(), str(path.absolute())
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(name)
        if not isinstance(known, list) or known[:-1] != stamp:
            known = self._known[name] = [*stamp, sha256_of(path)]
        return str(known[-1])

    def save(self) -> None:
        """Write the sums.

        Raises:
            UserError: The disk is full, or the folder cannot be written.
        """
        with written_to(self.path.parent):
            write_json(self.path, self._known)
