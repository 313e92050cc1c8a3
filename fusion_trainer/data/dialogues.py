"""Conversations → blocks of text of at most ``max_length`` tokens of the pivot, in a folder all models share.

The folder is the common ground of every model: each block's text as the pivot reads it, where the answers are in
it, and the turns themselves, which a source renders with its own template. The answers in these turns are what the
pivot's template kept of them, so that every model reads the same bytes. The n-th row of every store stands for the
n-th block.

A long dialogue is split between turns (paper, appendix A): each block is rendered on its own, with the system
turn at its head, and holds as many exchanges as fit. Only an exchange that is too long alone is cut, and counted.

    blocks.arrow    Arrow IPC file; a row is a block (``SCHEMA``)
    manifest.json   where the blocks come from, their fingerprint, the report"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fusion_trainer.data.blocks import NOT_OF_THE_CONTENT, SCHEMA, Block, Preparation
from fusion_trainer.data.report import Report
from varm_common.errors import UserError
from varm_common.files import (
    read_json,
    remove_abandoned,
    sha256_of,
    sync_folder,
    temporary_name,
    whole_file,
    write_json,
    written_to,
)

__all__ = [
    "Dialogues",
    "write_dialogues",
]

FORMAT = "fusion-trainer dialogues"
VERSION = 2
ROWS_PER_BATCH = 1024


def write_dialogues(
    folder: Path, blocks: Iterable[Block], preparation: Preparation, request: dict[str, Any]
) -> None:
    """Write the blocks and their manifest; the folder appears whole or not at all.

    Args:
        folder: Where; nothing may be there yet.
        blocks: What ``preparation`` makes.
        preparation: Its report goes into the manifest.
        request: What the blocks were asked to be made of, by fingerprints.
    """
    making = temporary_name(folder)
    with written_to(folder):
        _write(making, folder, blocks, preparation, request)


def _write(
    making: Path, folder: Path, blocks: Iterable[Block], preparation: Preparation, request: dict[str, Any]
) -> None:
    remove_abandoned(folder.parent, folder.name)
    made_parents = [parent for parent in folder.parents if not parent.exists()]
    making.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        with whole_file(making / "blocks.arrow") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            iterator = iter(blocks)
            while some := list(islice(iterator, ROWS_PER_BATCH)):
                for block in some:
                    row = {name: value for name, value in block.as_row().items() if name not in NOT_OF_THE_CONTENT}
                    digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
                writer.write_batch(pa.RecordBatch.from_pylist([block.as_row() for block in some], SCHEMA))
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": digest.hexdigest(), "request": request}
        template = preparation.template
        ends = template.end_ids if template and preparation.report.turns else []
        described = {**manifest, "sha256": sha256_of(making / "blocks.arrow"), "ends": ends}
        write_json(making / "manifest.json", {**described, "report": preparation.report.as_dict()})
        _give_name(making, folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()
        raise
    sync_folder(folder.parent)


def _give_name(making: Path, folder: Path) -> None:
    """Rename; if another process has made the same meanwhile, keep that."""
    try:
        making.replace(folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        shutil.rmtree(making)


class Dialogues:
    """A prepared folder, memory-mapped. Its blocks are held against the manifest's hash when first read."""

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"`{folder}` holds no dialogues: no manifest.json in it")
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = dict(read_json(manifest))
            described = self.manifest.get("format"), self.manifest.get("version")
            if described != (FORMAT, VERSION):
                raise UserError(f"`{folder}` is not a folder of {FORMAT}, version {VERSION}")
        except UserError:
            raise
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"the dialogues in `{folder}` are damaged: {error}; remove that folder") from error

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        path = self.folder / "blocks.arrow"
        try:
            if sha256_of(path) != self.manifest["sha256"]:
                raise ValueError("the bytes of blocks.arrow are not those that were written")
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"the dialogues in `{self.folder}` are damaged: {error}; remove that folder and run the same "
                "command again"
            ) from error

    @classmethod
    def beside(cls, store: Path, data: str) -> "Dialogues | None":
        """The folder beside a store whose fingerprint is ``data``."""
        folder = store.resolve().parent
        for manifest in sorted((*folder.glob("*/manifest.json"), *folder.parent.glob("*/manifest.json"))):
            try:
                found = cls(manifest.parent)
            except (UserError, ValueError):
                continue
            if found.fingerprint == data:
                return found
        return None

    @property
    def report(self) -> Report:
        return Report.from_dict(self.manifest["report"])

    @property
    def fingerprint(self) -> str:
        """Of all conversation ids, texts, answers and turns, in order."""
        return str(self.manifest["fingerprint"])

    @property
    def ends(self) -> list[int]:
        """Ids of the pivot that end an answer in its template; that of an earlier answer first."""
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
