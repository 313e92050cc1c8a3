"""Writes a store shard by shard.

A shard appears when it is complete. Any number of processes, on any number of machines, may write one store."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_trainer.representations import store
from fusion_trainer.representations.store import CROSS_ENTROPIES, MANIFEST, PLAN, Representation
from varm_common import files
from varm_common.errors import UserError, demand_same, some

__all__ = ["StoreWriter", "demand_free"]

ANSWERS = pa.list_(pa.list_(pa.int32(), 4))
FACTS = b"fusion_trainer"
"""Key of a shard's own facts in the metadata of its schema."""
NAMES = ("model", "pivot", "pivot_revision", "jinja", "jinja_with_tools")
"""Parts of an identity that may differ: a folder that has moved has the same hashes, and so has a template."""
SHARD_FACTS = ("positions", "batch_tokens")
"""Facts that the manifest repeats for each shard."""
Answers = Sequence[Sequence[Sequence[int]]]
Rows = Sequence[Representation]


def schema(k: int, vocabulary: int, aligned: bool = False, chunks: bool = False) -> pa.Schema:
    """The columns of a shard; ``chunks`` of an aligned one that has them."""
    id_type = pa.uint16() if store.id_dtype(vocabulary) is np.uint16 else pa.uint32()
    position = {
        "ids": pa.list_(pa.field("item", id_type, nullable=False), k),
        "logprobs": pa.list_(pa.field("item", pa.float16(), nullable=False), k),
        "tail": pa.float16(),
        "gold_logprob": pa.float16(),
        **({"paired": pa.uint8(), "gold_bytes": pa.uint16()} if aligned else {}),
        **({"chunk_size": pa.uint16(), "chunk_logprob": pa.float16()} if chunks else {}),
    }
    struct = pa.struct([pa.field(name, kind, nullable=False) for name, kind in position.items()])
    row = {
        "conversation": pa.string(),
        "block": pa.int32(),
        **(dict.fromkeys(CROSS_ENTROPIES, pa.float32()) if aligned else {"answers": ANSWERS}),
        "positions": pa.list_(pa.field("item", struct, nullable=False)),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in row.items()])


class StoreWriter:
    """Writes the shards of one store in a background thread, and at the end the manifest.

    Args:
        folder: The store; created if it is not there.
        identity: What the store is made from; None in a process that joins one that has begun the store.
        first_rows: The first block of every shard, and the number of blocks.
        made_with: Device and versions. A store may be finished with others than it was begun with; the manifest
            names all.

    Attributes:
        silent: Another process that computes the same shards writes them.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any] | None,
        first_rows: Sequence[int],
        made_with: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.identity = identity or {}
        self.made_with = [made_with] if made_with else []
        self.first_rows = list(first_rows)
        self.silent = False
        self._thread = ThreadPoolExecutor(1, "store-writer")
        self._last: Future[None] | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def begin(self) -> None:
        """Claim the folder, in one process: check what is there and remove what is incomplete or damaged.

        Raises:
            UserError: The folder holds something else, or a store with another identity.
        """
        for name in demand_free(self.folder):
            plan = store.plan_in(self.folder / name)
            identity = plan["identity"]
            wanted = {**self.identity, **{name: identity.get(name) for name in NAMES if name in self.identity}}
            title = f"`{self.folder}` is a store with other settings:"
            demand_same(title, wanted, identity, "Give another --output, or remove that folder.")
            self.identity = identity
            new = [environment for environment in self.made_with if environment not in plan["made_with"]]
            self.made_with = [*plan["made_with"], *new]
        with files.written_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove_abandoned(self.folder)
            shards = files.read_json(self.folder / MANIFEST)["shards"] if self.finished else []
            damaged = [self.folder / shard["file"] for shard in shards if store.wrong_size(self.folder, shard)]
            if self.finished and not damaged:
                (self.folder / PLAN).unlink(missing_ok=True)
                return
            files.write_json(self.folder / PLAN, {"identity": self.identity, "made_with": self.made_with})
            for path in (self.folder / MANIFEST, *damaged):
                path.unlink(missing_ok=True)

    def join(self) -> None:
        """Take over the identity from the process that has begun the store."""
        plan = store.plan_in(self.folder / (MANIFEST if self.finished else PLAN))
        self.identity, self.made_with = plan["identity"], plan["made_with"]

    def also_made_with(self, environment: dict[str, str]) -> None:
        """Add to the devices and versions that the manifest names, in the process that has begun the store."""
        if environment not in self.made_with:
            self.made_with = [*self.made_with, environment]
            with files.written_to(self.folder):
                files.write_json(self.folder / PLAN, {"identity": self.identity, "made_with": self.made_with})

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [shard for shard in range(len(self.first_rows) - 1) if not self.path(shard).is_file()]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.arrow"

    def write(self, shard: int, rows: Rows, facts: dict[str, int], answers: Answers | None = None) -> None:
        """Write a shard in the background, after the one before it.

        The manifest sums up ``facts`` over the shards. ``answers`` are the places of each row's answers, which an
        aligned store does not have.

        Raises:
            UserError: The shard before this could not be written.
        """
        if self.silent:
            return
        self.wait()
        self._last = self._thread.submit(self._write, shard, rows, facts, answers)

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            UserError: It could not be written.
        """
        last, self._last = self._last, None
        if last is not None:
            with files.written_to(self.folder):
                last.result()

    def _write(self, shard: int, rows: Rows, facts: dict[str, int], answers: Answers | None) -> None:
        aligned = self.identity.get("kind") == store.ALIGNED
        chunks = aligned and self.identity["version"] == store.WITH_CHUNKS
        columns = schema(self.identity["top_k"], self.identity["vocabulary"], aligned, chunks)
        positions = columns.field("positions").type
        parts = []
        for field in positions.value_type:
            joined = np.concatenate([getattr(row, field.name) for row in rows])
            flat = pa.array(joined.ravel())
            parts.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type) if joined.ndim == 2 else flat)
        struct = pa.StructArray.from_arrays(parts, fields=list(positions.value_type))
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
        of_rows: dict[str, Sequence[Any]] = {
            field.name: [getattr(row, field.name, []) for row in rows]
            for field in columns
            if field.name != "positions"
        }
        if answers is not None and not aligned:
            of_rows["answers"] = answers
        arrays = [pa.array(column, columns.field(name).type) for name, column in of_rows.items()]
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), struct, type=positions))
        facts = {"shard": shard, "first_row": self.first_rows[shard], **facts}
        columns = columns.with_metadata({FACTS: json.dumps(facts).encode()})
        with files.atomic_file(self.path(shard)) as file, pa.ipc.new_file(file, columns) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=columns))
        self.path(shard).with_suffix(".partial").unlink(missing_ok=True)

    def abandon(self) -> None:
        """After a failure: remove the folder if it holds no shard."""
        with suppress(UserError):
            self.wait()
        if not any(self.folder.glob("shard-*")) and not self.finished:
            (self.folder / PLAN).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def finish(self) -> None:
        """Write the manifest, in one process, once every shard is there."""
        shards, sums = [], dict[str, int]()
        for shard in range(len(self.first_rows) - 1):
            path = self.path(shard)
            with pa.memory_map(str(path)) as source:
                facts = json.loads(pa.ipc.open_file(source).schema.metadata[FACTS])
            first, last = self.first_rows[shard : shard + 2]
            described = {"file": path.name, "first_row": first, "rows": last - first, "bytes": path.stat().st_size}
            own = {key: facts[key] for key in SHARD_FACTS if key in facts}
            shards.append({**described, **own, "sha256": files.sha256_of(path)})
            for key in facts.keys() - {"shard", "first_row", "batch_tokens"}:
                sums[key] = sums.get(key, 0) + facts[key]
        manifest = {"format": store.FORMAT, "version": store.VERSION, "identity": self.identity}
        manifest |= {"made_with": self.made_with, "rows": self.first_rows[-1], **dict(sorted(sums.items()))}
        with files.written_to(self.folder):
            for path in (*self.folder.glob(f"*{files.TEMPORARY}"), *self.folder.glob("*.partial")):
                path.unlink(missing_ok=True)
            files.write_json(self.folder / MANIFEST, {**manifest, "shards": shards})
            (self.folder / PLAN).unlink(missing_ok=True)


def demand_free(folder: Path) -> list[str]:
    """Check that a store may be written to a folder; which of manifest and plan are there already.

    Raises:
        UserError: The folder holds something else.
    """
    with files.written_to(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"`{folder}` is a file; --output names the store's folder")
        content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = [name for name in (MANIFEST, PLAN) if name in content]
    if content and not known and not all(name.endswith(files.TEMPORARY) for name in content):
        raise UserError(f"`{folder}` holds other files ({some(sorted(content))}); give a new folder")
    return known
