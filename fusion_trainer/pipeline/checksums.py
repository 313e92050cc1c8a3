"""SHA-256 of files and folders, which are read again only when their size or time has changed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion_trainer.pipeline.stage import RECORD
from varm_common.errors import UserError
from varm_common.files import HashCache, fingerprint, read_mapping

__all__ = ["Checksums", "read_object"]


class Checksums(HashCache):
    """The SHA-256 of what stages read and write."""

    def identity(self, name: str, patterns: Iterable[str], otherwise: str) -> str:
        """The checksum of a file, or of a folder's files that match ``patterns``; ``otherwise`` of neither."""
        path = Path(name)
        if not path.is_dir():
            return self.sha256(path) if path.is_file() else otherwise
        files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()} - {path / RECORD}
        return fingerprint([[file.relative_to(path).as_posix(), self.sha256(file)] for file in sorted(files)])

    def changed(self, folder: Path, files: Mapping[str, str]) -> str | None:
        """The first of ``files`` that is missing or has another checksum."""
        for name, wanted in files.items():
            if not (folder / name).is_file() or self.sha256(folder / name) != wanted:
                return name
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        return read_mapping(path)
    except UserError:
        return {}
