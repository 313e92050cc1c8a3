"""The store: one model's distributions at every supervised position of the dialogues.

    manifest.json       what the store was made from; written last, so a store without it is unfinished
    shard-00000.arrow   Arrow IPC file with one record batch, columns as in ``store_writer.schema``; memory-mapped
    …

A row is a block of the dialogues, in their order. A position is in it if the next token is the assistant's, and
its distribution predicts that token. An aligned store has the same format, in the pivot's ids and positions, and
more columns (see ``Representation``). ``docs/formats.md`` describes every field.

Each shard appears only when it is complete and depends only on its blocks. So an interrupted extraction resumes,
and the finished store has the same bytes as one that was never interrupted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from varm_common.errors import UserError, demand_same
from varm_common.files import read_json, sha256_of

__all__ = ["Representation", "RepresentationStore", "Supervised", "id_dtype", "plan_in", "wrong_size"]

FORMAT = "fusion-trainer representations"
VERSION = 2
MANIFEST, PLAN = "manifest.json", "extraction.json"
ALIGNED = "aligned"
"""The ``kind`` in the identity of an aligned store."""
ALIGNED_VERSION = 3
"""The ``version`` in the identity of an aligned store: raised whenever its columns or their meaning change."""
WITH_CHUNKS = 4
"""The ``version`` of an aligned store that also has the columns of chunks."""
LEAST = float(np.finfo(np.float16).min)
SLACK = 2e-3
"""How far Σ exp(logprobs) + tail may lie from 1: float16 keeps 11 bits of a logarithm."""
CROSS_ENTROPIES = ("ce_per_token", "ce_per_byte", "pivot_ce_per_token", "pivot_ce_per_byte")


@dataclass(frozen=True)
class Representation:
    """One row: a model's distributions at the supervised positions of one block.

    The arrays of a row that is read from a store are views of the mapped file.

    Attributes:
        ids: [positions, k], uint16 for vocabularies up to 65,536, else uint32; in descending order of probability.
        logprobs: float16 [positions, k], natural logarithms.
        tail: float16 [positions], the probability outside the k; NaN if it is not known: then the k sum to 1.
        gold_logprob: float16 [positions], log-probability of the token that really follows; NaN if not known.
        conversation: The conversation's id.
        block: The number of the block in its conversation.
        paired: uint8 [positions], 1 if the distribution is the source's, 0 if it is the pivot's own. This and what
            follows is None in a store that is not aligned.
        gold_bytes: uint16 [positions], at least 1: bytes of text that the token of ``gold_logprob`` covers. This
            is the source's next token where paired (if there are several, their weighted mean, rounded), and the
            pivot's elsewhere and at the ends of answers.
        ce_per_token: The source's mean cross-entropy on its own gold tokens, in nats (the papers' unit), over the
            bytes that both models predict; NaN if there are none.
        ce_per_byte: The same in nats per byte, comparable between tokenizers.
        pivot_ce_per_token: The pivot's over the same bytes.
        pivot_ce_per_byte: The same per byte.
        chunk_size: uint16 [positions], at the first position of a chunk its number of positions; else 0. The next
            tokens of these positions are a text that the source reads as whole tokens, too. None in a store
            without chunks.
        chunk_logprob: float16 [positions], at the first position of a chunk the log-probability that the source
            gives to its text; else 0.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    logprobs: NDArray[np.float16]
    tail: NDArray[np.float16]
    gold_logprob: NDArray[np.float16]
    conversation: str = ""
    block: int = 0
    paired: NDArray[np.uint8] | None = None
    gold_bytes: NDArray[np.uint16] | None = None
    ce_per_token: float | None = None
    ce_per_byte: float | None = None
    pivot_ce_per_token: float | None = None
    pivot_ce_per_byte: float | None = None
    chunk_size: NDArray[np.uint16] | None = None
    chunk_logprob: NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.tail)


Supervised = Representation
"""Earlier name of a row that is not aligned."""


def id_dtype(vocabulary: int) -> type[np.uint16] | type[np.uint32]:
    """The type that holds an id of a vocabulary of this size."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def plan_in(path: Path) -> dict[str, Any]:
    """``identity`` and ``made_with`` of a manifest or plan.

    Raises:
        UserError: The file is not a store's.
    """
    try:
        content = read_json(path)
        return {"identity": dict(content["identity"]), "made_with": list(content["made_with"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`{path.parent}` is not a store: its {path.name} has another format; give a new folder"
        ) from error


def wrong_size(folder: Path, shard: dict[str, Any]) -> str | None:
    """The problem, if a shard's file is missing or does not have the size in the manifest."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != shard["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {shard['bytes']}"
    return None


class Shard:
    """One mapped file, its columns as numpy arrays: those with an entry per position, and per row.

    The positions of row n are those from ``offsets[n]`` to ``offsets[n + 1]``.
    """

    def __init__(self, path: Path, k: int) -> None:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        positions = batch.column("positions")
        struct = positions.values
        self.offsets = positions.offsets.to_numpy()
        self.blocks = batch.column("block").to_numpy()
        self.conversations = batch.column("conversation")
        self.of_positions: dict[str, NDArray[Any]] = {
            field.name: struct.field(field.name).values.to_numpy().reshape(-1, k)
            if pa.types.is_fixed_size_list(field.type)
            else struct.field(field.name).to_numpy()
            for field in struct.type
        }
        names = [name for name in CROSS_ENTROPIES if name in batch.schema.names]
        self.of_rows = {name: batch.column(name).to_numpy() for name in names}

    def __getitem__(self, row: int) -> Representation:
        start, stop = self.offsets[row : row + 2].tolist()
        columns: dict[str, Any] = {name: column[start:stop] for name, column in self.of_positions.items()}
        columns |= {name: float(column[row]) for name, column in self.of_rows.items()}
        return Representation(conversation=self.conversations[row].as_py(), block=int(self.blocks[row]), **columns)


class RepresentationStore:
    """A finished store, memory-mapped; row n is block n of the dialogues.

    A shard is compared with the manifest's hash when it is first read, unless all are ``checked`` already.

    Raises:
        UserError: There is no finished store, or a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path | str, checked: bool = False) -> None:
        self.folder = Path(folder)
        self.checked = checked
        self.manifest = self._manifest()
        self.k: int = self.identity["top_k"]
        self._first_rows = np.array([shard["first_row"] for shard in self.manifest["shards"]])
        self._open: dict[int, Shard] = {}
        problems = [problem for shard in self.manifest["shards"] if (problem := wrong_size(self.folder, shard))]
        if problems:
            raise UserError(
                f"the store `{self.folder}` is damaged: {'; '.join(problems)}.\nRun the command that wrote it "
                "again: it writes only what is missing."
            )

    def __reduce__(self) -> tuple[type["RepresentationStore"], tuple[Path, bool]]:
        return type(self), (self.folder, self.checked)

    @property
    def identity(self) -> dict[str, Any]:
        """Inputs of the store: model, tokenizer, template and data by hash, k, dtype, versions."""
        return dict(self.manifest["identity"])

    @property
    def aligned(self) -> bool:
        """Whether the store holds a source's distributions in the pivot's positions and ids."""
        return bool(self.identity.get("kind") == ALIGNED)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Columns that are NaN where the value is not known; only those of an imported store can be."""
        columns = self.identity.get("unknown", ())
        return tuple(column for column in columns if self.manifest.get(f"unknown_{column}", 1))

    @property
    def has_chunks(self) -> bool:
        """Whether it is aligned and has the source's likelihoods of chunks."""
        return self.aligned and bool(self.identity.get("version") == WITH_CHUNKS)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the manifest, which has those of the shards."""
        return sha256_of(self.folder / MANIFEST)

    @cached_property
    def bytes(self) -> int:
        """Size of all shards and the manifest."""
        shards = sum(shard["bytes"] for shard in self.manifest["shards"])
        return int(shards) + (self.folder / MANIFEST).stat().st_size

    def check(self) -> "RepresentationStore":
        """This store, after all shards were compared with the manifest's hashes.

        Raises:
            UserError: The content of some has changed.
        """
        if not self.checked:
            self._demand_intact(self.manifest["shards"])
            self.checked = True
        return self

    def _demand_intact(self, shards: Iterable[dict[str, Any]]) -> None:
        damaged = [shard["file"] for shard in shards if sha256_of(self.folder / shard["file"]) != shard["sha256"]]
        if damaged:
            raise UserError(
                f"the store `{self.folder}` is damaged: the SHA-256 in its manifest does not match that of "
                f"{', '.join(damaged)}.\nRemove what is damaged and run the command that wrote the store again: "
                "it writes only what is missing."
            )

    def demand(self, **wanted: object) -> "RepresentationStore":
        """This store, if its identity has these values.

        Raises:
            UserError: It has others; the message shows both.
        """
        actual = {key: self.identity.get(key) for key in wanted}
        demand_same(f"the store `{self.folder}` does not match what is needed:", wanted, actual)
        return self

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getitem__(self, row: int) -> Representation:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} rows")
        number = int(self._first_rows.searchsorted(row, "right")) - 1
        return self.shard(number)[row - int(self._first_rows[number])]

    def __iter__(self) -> Iterator[Representation]:
        return (self[row] for row in range(len(self)))

    def shard(self, number: int) -> Shard:
        """A shard, mapped; it is compared with its hash when it is first read."""
        if number not in self._open:
            described = self.manifest["shards"][number]
            if not self.checked:
                self._demand_intact([described])
            self._open[number] = Shard(self.folder / described["file"], self.k)
        return self._open[number]

    def distributions(self) -> Iterator[tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float16]]]:
        """For each shard, the ids and log-probabilities of all positions, [positions, k] each."""
        for number in range(len(self.manifest["shards"])):
            columns = self.shard(number).of_positions
            yield columns["ids"], columns["logprobs"]

    def problems(self) -> Iterator[str]:
        """Everything wrong with the shards: hashes, and numbers that cannot be."""
        for described in self.manifest["shards"]:
            path = self.folder / described["file"]
            if sha256_of(path) != described["sha256"]:
                yield f"{path.name}: its SHA-256 does not match the manifest; remove it and write the store again"
            try:
                shard = Shard(path, self.k)
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                yield f"{path.name}: not a readable shard: {error}"
                continue
            yield from (f"{path.name}: {problem}" for problem in self._wrong_content(shard, described))

    def _wrong_content(self, shard: Shard, described: dict[str, Any]) -> Iterator[str]:
        columns = shard.of_positions
        ids = columns["ids"]
        logprobs, tail, gold = (columns[name].astype(np.float32) for name in ("logprobs", "tail", "gold_logprob"))
        counts = {"rows": len(shard.blocks), "positions": len(tail)}
        for key, count in counts.items():
            if count != described[key]:
                yield f"{count} {key}, not {described[key]}"
        if counts["rows"] + 1 != len(shard.offsets) or shard.offsets[-1] != len(tail):
            yield "its rows do not cover its positions"
            return
        if "tail" in self.unknown:
            tail = np.where(np.isnan(tail), np.clip(1 - np.exp(logprobs).sum(1), 0, 1), tail)
        if "gold_logprob" in self.unknown:
            gold = np.where(np.isnan(gold), 0, gold)
        total = np.exp(logprobs).sum(1) + tail
        if self.aligned:  # there, an id may have no probability
            logprobs = np.where(np.isneginf(logprobs), LEAST, logprobs)
        checks = {
            "NaN or infinite": ~(np.isfinite(logprobs).all(1) & np.isfinite(tail) & np.isfinite(gold)),
            "an id outside the vocabulary": (ids >= self.identity["vocabulary"]).any(1),
            "an id twice": (np.diff(np.sort(ids, 1), axis=1) == 0).any(1),
            "a log-probability above 0": (logprobs > 0).any(1) | (gold > 0),
            "log-probabilities that rise": (np.diff(logprobs, axis=1) > 0).any(1),
            "a tail outside [0, 1]": (tail < 0) | (tail > 1),
            "a total mass that is not 1": np.abs(total - 1) > SLACK * (1 + self.k / 10),
        }
        if self.aligned:
            checks["`paired` neither 0 nor 1"] = columns["paired"] > 1
            checks["a token of no bytes"] = columns["gold_bytes"] == 0
        if self.has_chunks:
            checks |= _wrong_chunks(shard)
        for what, wrong in checks.items():
            if wrong.any():
                position = int(np.argmax(wrong))
                row = int(shard.offsets.searchsorted(position, "right")) - 1
                where = f"first in conversation {shard.conversations[row].as_py()!r}, block {shard.blocks[row]}"
                yield f"{what} at {int(wrong.sum())} positions, {where}, position {position - shard.offsets[row]}"

    def _manifest(self) -> dict[str, Any]:
        if not (self.folder / MANIFEST).is_file():
            if not (self.folder / PLAN).is_file():
                raise UserError(f"no store `{self.folder}`: there is no {MANIFEST} in it")
            identity = plan_in(self.folder / PLAN)["identity"]
            made = "alignment" if identity.get("kind") == ALIGNED else "extraction"
            work = "import" if "published" in identity else made
            raise UserError(f"the store `{self.folder}` is not finished; run its {work} again: it resumes")
        manifest = read_json(self.folder / MANIFEST)
        described = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
        if described != (FORMAT, VERSION):
            raise UserError(f"`{self.folder}` is not a store of {FORMAT}, version {VERSION}: found {described}")
        identity = manifest["identity"]
        if identity.get("kind") == ALIGNED and identity.get("version") not in (ALIGNED_VERSION, WITH_CHUNKS):
            raise UserError(
                f"the aligned store `{self.folder}` is of version {identity.get('version', 1)}, not "
                f"{ALIGNED_VERSION}, and lacks columns that are needed now; align its source again, into a new "
                "folder"
            )
        return dict(manifest)


def _wrong_chunks(shard: Shard) -> dict[str, NDArray[np.bool_]]:
    """Which positions have a chunk that cannot be, by what is wrong with it."""
    sizes, logprobs = (shard.of_positions[name] for name in ("chunk_size", "chunk_logprob"))
    starts = np.flatnonzero(sizes)
    stops = starts + sizes[starts]
    limits = shard.offsets[shard.offsets.searchsorted(starts, "right")]
    limits = np.minimum(limits, np.append(starts[1:], len(sizes)))
    overlapping = np.zeros(len(sizes), bool)
    overlapping[starts] = stops > limits
    unlikely = ~np.isfinite(logprobs) | (logprobs > 0) | ((sizes == 0) & (logprobs != 0))
    return {
        "a chunk that reaches into another or out of its row": overlapping,
        "a wrong likelihood of a chunk": unlikely,
    }
