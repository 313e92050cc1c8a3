"""The prepared data: a folder with the blocks that all models share.

A row of ``blocks.arrow`` is a block: its text as the pivot reads it, where the answers are in it, and the turns
themselves, which a source renders with its own template. The contents of the answers in these turns are what the
pivot's template kept of them, so that every model reads the same bytes. The n-th row of every store belongs to
the n-th block.

    blocks.arrow    Arrow IPC file; a row is a block (``SCHEMA``)
    manifest.json   where the blocks come from, their fingerprint, the report
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fusion_trainer.data.blocks import NOT_IN_FINGERPRINT, SCHEMA, Block
from fusion_trainer.data.report import Report
from varm_common import files
from varm_common.errors import UserError

__all__ = ["VERSION", "Dialogues", "write_dialogues"]

FORMAT = "fusion-trainer dialogues"
VERSION = 2
ROWS_PER_BATCH = 1024


class Maker(Protocol):
    """Makes blocks. Its report and the ids that end an answer are known when all blocks are made."""

    report: Report

    @property
    def ends(self) -> list[int]: ...


def write_dialogues(folder: Path, blocks: Iterable[Block], maker: Maker, request: dict[str, Any]) -> None:
    """Write the blocks and their manifest; the folder appears whole or not at all.

    Args:
        folder: Where; it must not exist yet.
        blocks: The blocks that ``maker`` makes.
        maker: Its report and ends go into the manifest.
        request: Fingerprints of what the blocks are made from.
    """
    unfinished = files.temporary_name(folder)
    with files.written_to(folder):
        files.remove_abandoned(folder.parent, folder.name)
        unfinished.mkdir(parents=True)
        try:
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": _write_blocks(unfinished / "blocks.arrow", blocks),
                "request": request,
                "sha256": files.sha256_of(unfinished / "blocks.arrow"),
                "ends": maker.ends,
                "report": maker.report.as_dict(),
            }
            files.write_json(unfinished / "manifest.json", manifest)
            try:
                unfinished.replace(folder)
            except OSError:
                if not (folder / "manifest.json").is_file():  # otherwise another process has just made the same
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        files.sync_folder(folder.parent)


def _write_blocks(path: Path, blocks: Iterable[Block]) -> str:
    """Write ``blocks.arrow``, and return the fingerprint of its rows."""
    digest = hashlib.sha256()
    with files.atomic_file(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        iterator = iter(blocks)
        while rows := [block.as_row() for block in islice(iterator, ROWS_PER_BATCH)]:
            for row in rows:
                content = {name: value for name, value in row.items() if name not in NOT_IN_FINGERPRINT}
                digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode())
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return digest.hexdigest()


class Dialogues:
    """A prepared folder, memory-mapped. Its blocks are compared with the manifest's hash when first read."""

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"`{folder}` holds no dialogues: no manifest.json in it")
        self.folder = folder
        self.manifest = files.read_mapping(manifest)
        if (self.manifest.get("format"), self.manifest.get("version")) != (FORMAT, VERSION):
            raise UserError(f"`{folder}` is not a folder of {FORMAT}, version {VERSION}")

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        path = self.folder / "blocks.arrow"
        try:
            if files.sha256_of(path) != self.manifest["sha256"]:
                raise ValueError("the bytes of blocks.arrow are not those that were written")
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"the dialogues in `{self.folder}` are damaged: {error}; remove that folder and run the same "
                "command again"
            ) from error

    @classmethod
    def beside(cls, store: Path, data: str) -> "Dialogues | None":
        """The dialogues with the fingerprint ``data`` in a folder beside a store; None if there are none."""
        folder = store.resolve().parent
        for manifest in sorted((*folder.glob("*/manifest.json"), *folder.parent.glob("*/manifest.json"))):
            with suppress(UserError):
                dialogues = cls(manifest.parent)
                if dialogues.fingerprint == data:
                    return dialogues
        return None

    @property
    def report(self) -> Report:
        return Report.from_dict(self.manifest["report"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all conversation ids, texts, answers and turns, in order."""
        return str(self.manifest["fingerprint"])

    @property
    def ends(self) -> list[int]:
        """The pivot's ids that end an answer in its template; that of an earlier answer first."""
        return [int(token) for token in self.manifest["ends"]]

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [blocks]: tokens of the pivot, with BOS."""
        columns = [batch.column("tokens").to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.empty(0, np.int32)

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        row = self._batches[number // ROWS_PER_BATCH].slice(number % ROWS_PER_BATCH, 1).to_pylist()[0]
        return Block.from_row(row)
