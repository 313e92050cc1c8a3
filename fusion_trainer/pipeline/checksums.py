"""SHA-256 of files and folders, which are read again only when their size or time has changed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion_trainer.pipeline.stage import RECORD
from varm_common.errors import UserError
from varm_common.files import fingerprint, read_json, sha256_of, write_json, written_to

__all__ = ["Checksums", "read_object"]


class Checksums:
    """The SHA-256 of files, remembered in a JSON file.

    Args:
        path: The file; it is written by ``save``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = read_object(path)

    def of_file(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self.known.get(str(path.absolute()))
        if known is None or known[:-1] != stamp:
            known = [*stamp, sha256_of(path)]
            self.known[str(path.absolute())] = known
        return str(known[-1])

    def identity(self, name: str, patterns: Iterable[str], otherwise: str) -> str:
        """The checksum of a file, or of a folder's files that match ``patterns``; ``otherwise`` of neither."""
        path = Path(name)
        if not path.is_dir():
            return self.of_file(path) if path.is_file() else otherwise
        files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()} - {path / RECORD}
        return fingerprint([[file.relative_to(path).as_posix(), self.of_file(file)] for file in sorted(files)])

    def changed(self, folder: Path, files: Mapping[str, str]) -> str | None:
        """The first of ``files`` that is missing or has another checksum."""
        for name, wanted in files.items():
            if not (folder / name).is_file() or self.of_file(folder / name) != wanted:
                return name
        return None

    def save(self) -> None:
        with written_to(self.path.parent):
            write_json(self.path, self.known)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        content = read_json(path)
    except (OSError, UserError):
        return {}
    return content if isinstance(content, dict) else {}
