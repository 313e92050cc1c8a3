"""The store: one model's distributions at every supervised position of the dialogues.

    manifest.json       what the store is of; written last, so that a store without it is unfinished
    shard-00000.arrow   Arrow IPC file of one record batch, columns as in ``schema``; memory-mappable
    …

A row is a block of the dialogues, in their order. Its ``positions`` are the supervised ones, in the order of the
text: position p of the tokenised block is there when the token after p is the assistant's
(``tokens.supervised_positions``), and its distribution predicts that token. At k = 10 a position takes 44 bytes
(64 where ids need 32 bits), a row some 40 more.

``answers`` says where each answer's content and its end lie in the text that the model has read: its turn, the
first byte of the content, the byte after it, and the byte after the marker of its end.

An aligned store has the same format, in the pivot's ids and positions, and four columns more: which positions are
the source's (``paired``), how many bytes the token of ``gold_logprob`` covers (``gold_bytes``: the two tokenizers'
tokens differ in length), and the source's cross-entropy in the conversation per token and per byte.

Each shard appears whole or not at all and depends only on its blocks, so an interrupted extraction goes on
where it was, and the finished store has the same bytes as one that was never interrupted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from varm_common.errors import UserError, unlike
from varm_common.files import read_json, sha256_of

__all__ = [
    "ALIGNED",
    "ALIGNED_VERSION",
    "ANSWERS",
    "CROSS_ENTROPIES",
    "FACTS",
    "FORMAT",
    "MANIFEST",
    "NAMES",
    "OWN_FACTS",
    "PLAN",
    "VERSION",
    "Aligned",
    "Representation",
    "RepresentationStore",
    "Supervised",
    "id_dtype",
    "plan_in",
    "schema",
    "shard_facts",
    "wrong_size",
]

FORMAT = "fusion-trainer representations"
VERSION = 2
MANIFEST, PLAN = "manifest.json", "extraction.json"
ALIGNED = "aligned"
"""What the identity of an aligned store says under ``kind``."""
ALIGNED_VERSION = 3
"""And under ``version``: raised with its columns, and with what they mean."""
FACTS = b"fusion_trainer"
"""Key of a shard's own facts in its schema's metadata."""
OWN_FACTS = ("positions", "batch_tokens")
"""Facts of a shard that the manifest names for each."""
ALIGNED_COLUMNS = (("paired", pa.uint8()), ("gold_bytes", pa.uint16()))
CROSS_ENTROPIES = ("ce_per_token", "ce_per_byte", "pivot_ce_per_token", "pivot_ce_per_byte")
ANSWERS = pa.list_(pa.list_(pa.int32(), 4))
NAMES = ("model", "pivot", "pivot_revision", "jinja", "jinja_with_tools")
"""Of an identity: a folder that has moved is the same by its hashes, and so is a template."""
LEAST = float(np.finfo(np.float16).min)
SLACK = 2e-3
"""How far Σ exp(logprobs) + tail may lie from 1: float16 keeps 11 bits of a logarithm."""


@dataclass(frozen=True)
class Supervised:
    """The distributions of one block's supervised positions.

    Attributes:
        ids: [positions, k], uint16 for vocabularies up to 65 536, else uint32; descending in probability.
        logprobs: float16 [positions, k], natural logarithms.
        tail: float16 [positions], the probability outside the k.
        gold_logprob: float16 [positions], of the token that really follows.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    logprobs: NDArray[np.float16]
    tail: NDArray[np.float16]
    gold_logprob: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.tail)


@dataclass(frozen=True)
class Aligned(Supervised):
    """A row of an aligned store.

    Attributes:
        paired: uint8 [positions], 1 where the distribution is the source's and 0 where it is the pivot's own.
        gold_bytes: uint16 [positions], at least 1: how many bytes of text the token of ``gold_logprob`` covers.
            That is the source's next token where paired (of several the mean by their weights, rounded), the
            pivot's elsewhere and at the ends of answers.
        ce_per_token: The source's mean cross-entropy on its own gold tokens, nats (the papers' unit), over the
            bytes that both models have predicted; NaN where there are none.
        ce_per_byte: The same in nats per byte, comparable between tokenizers.
        pivot_ce_per_token: The pivot's over the same bytes.
        pivot_ce_per_byte: The same per byte.
    """

    paired: NDArray[np.uint8]
    gold_bytes: NDArray[np.uint16]
    ce_per_token: float
    ce_per_byte: float
    pivot_ce_per_token: float
    pivot_ce_per_byte: float


@dataclass(frozen=True)
class Representation(Supervised):
    """A row of a store: views of the mapped file, not copies.

    Attributes:
        conversation: The conversation's id.
        block: Which of its blocks.
        paired: As in ``Aligned``; None in a store that is not aligned, as are the next five.
        gold_bytes: As in ``Aligned``.
        ce_per_token: As in ``Aligned``.
        ce_per_byte: As in ``Aligned``.
        pivot_ce_per_token: As in ``Aligned``.
        pivot_ce_per_byte: As in ``Aligned``.
    """

    conversation: str
    block: int
    paired: NDArray[np.uint8] | None = None
    gold_bytes: NDArray[np.uint16] | None = None
    ce_per_token: float | None = None
    ce_per_byte: float | None = None
    pivot_ce_per_token: float | None = None
    pivot_ce_per_byte: float | None = None


def id_dtype(vocabulary: int) -> type[np.uint16] | type[np.uint32]:
    """What holds an id of a vocabulary of this size."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def schema(k: int, vocabulary: int, aligned: bool = False) -> pa.Schema:
    """The columns of a shard."""
    id_type = pa.uint16() if id_dtype(vocabulary) is np.uint16 else pa.uint32()
    fields = [
        pa.field("ids", pa.list_(pa.field("item", id_type, nullable=False), k), nullable=False),
        pa.field("logprobs", pa.list_(pa.field("item", pa.float16(), nullable=False), k), nullable=False),
        pa.field("tail", pa.float16(), nullable=False),
        pa.field("gold_logprob", pa.float16(), nullable=False),
        *(pa.field(name, kind, nullable=False) for name, kind in (ALIGNED_COLUMNS if aligned else ())),
    ]
    return pa.schema(
        [
            pa.field("conversation", pa.string(), nullable=False),
            pa.field("block", pa.int32(), nullable=False),
            *(
                [pa.field(name, pa.float32(), nullable=False) for name in CROSS_ENTROPIES]
                if aligned
                else [pa.field("answers", ANSWERS, nullable=False)]
            ),
            pa.field("positions", pa.list_(pa.field("item", pa.struct(fields), nullable=False)), nullable=False),
        ]
    )


def plan_in(path: Path) -> dict[str, Any]:
    """What a manifest or plan says the store is of, and made with.

    Raises:
        UserError: It is none.
    """
    try:
        found = read_json(path)
        return {"identity": dict(found["identity"]), "made_with": list(found["made_with"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`{path.parent}` holds something else: its {path.name} is no store's; give a new folder"
        ) from error


def wrong_size(folder: Path, shard: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a shard's file: missing, or of another size."""
    path = folder / shard["file"]
    if not path.is_file():
        yield f"{path.name} is missing"
    elif path.stat().st_size != shard["bytes"]:
        yield f"{path.name} has {path.stat().st_size} bytes, not {shard['bytes']}"


def shard_facts(path: Path) -> dict[str, int]:
    """What a shard says about itself, in the metadata of its schema."""
    with pa.memory_map(str(path)) as source:
        return dict(json.loads(pa.ipc.open_file(source).schema.metadata[FACTS]))


class _Shard:
    """One mapped file, its columns as numpy arrays."""

    def __init__(self, path: Path, k: int) -> None:
        with pa.memory_map(str(path)) as source:
            self.batch = pa.ipc.open_file(source).get_batch(0)
        positions = self.batch.column("positions")
        struct = positions.values
        self.offsets = positions.offsets.to_numpy()
        self.blocks = self.batch.column("block").to_numpy()
        self.conversations = self.batch.column("conversation")
        self.ids = struct.field("ids").values.to_numpy().reshape(-1, k)
        self.logprobs = struct.field("logprobs").values.to_numpy().reshape(-1, k)
        self.tail = struct.field("tail").to_numpy()
        self.gold_logprob = struct.field("gold_logprob").to_numpy()
        self.aligned = "ce_per_token" in self.batch.schema.names
        if self.aligned:
            self.of_positions = [struct.field(name).to_numpy() for name, _ in ALIGNED_COLUMNS]
            self.cross_entropies = [self.batch.column(name).to_numpy() for name in CROSS_ENTROPIES]

    def __getitem__(self, row: int) -> Representation:
        start, stop = self.offsets[row : row + 2].tolist()
        more = self._more(row, slice(start, stop)) if self.aligned else ()
        return Representation(
            self.ids[start:stop],
            self.logprobs[start:stop],
            self.tail[start:stop],
            self.gold_logprob[start:stop],
            self.conversations[row].as_py(),
            int(self.blocks[row]),
            *more,
        )

    def _more(self, row: int, here: slice) -> tuple[Any, ...]:
        return *(column[here] for column in self.of_positions), *(float(ce[row]) for ce in self.cross_entropies)


class RepresentationStore:
    """A finished store, memory-mapped; rows by number, as the blocks of the dialogues.

    A shard is held against the manifest's hash when it is first read.

    Args:
        folder: Where it is.
        checked: Whether all shards were held against their hashes already.

    Raises:
        UserError: No finished store is there, or a shard is missing or has not the size the manifest names.
    """

    def __init__(self, folder: Path | str, checked: bool = False) -> None:
        self.folder = Path(folder)
        self.checked = checked
        self.manifest = self._manifest()
        self.k: int = self.identity["top_k"]
        self._first_rows = np.array([shard["first_row"] for shard in self.manifest["shards"]])
        self._open: dict[int, _Shard] = {}
        problems = [problem for shard in self.manifest["shards"] for problem in wrong_size(self.folder, shard)]
        if problems:
            raise UserError(
                f"the store `{self.folder}` is damaged: {'; '.join(problems)}.\nRun the command that made it "
                "again: it makes only what is missing."
            )

    def __reduce__(self) -> tuple[type["RepresentationStore"], tuple[Path, bool]]:
        return type(self), (self.folder, self.checked)

    def check(self) -> "RepresentationStore":
        """This store, once all its shards were held against the manifest's hashes.

        Raises:
            UserError: The bytes of some are others.
        """
        if not self.checked:
            damaged = [shard["file"] for shard in self.manifest["shards"] if not self._intact(shard)]
            if damaged:
                raise self._damaged(damaged)
            self.checked = True
        return self

    def _intact(self, shard: dict[str, Any]) -> bool:
        return sha256_of(self.folder / shard["file"]) == str(shard["sha256"])

    def _damaged(self, files: Sequence[str]) -> UserError:
        return UserError(
            f"the store `{self.folder}` is damaged: {', '.join(files)} does not have the SHA-256 of the manifest."
            "\nRemove what is damaged and run the command that made the store: it makes only what is missing."
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the store is of: model, tokenizer, template and data by hash, k, dtype, versions."""
        return dict(self.manifest["identity"])

    def demand(self, **wanted: object) -> "RepresentationStore":
        """This store, if its identity has the values named.

        Raises:
            UserError: It has others; both stand side by side in the message.
        """
        found = {key: self.identity.get(key) for key in wanted}
        if difference := unlike(f"the store `{self.folder}` does not fit:", wanted, found):
            raise UserError(difference)
        return self

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getitem__(self, row: int) -> Representation:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} rows")
        number = int(self._first_rows.searchsorted(row, "right")) - 1
        shard = self._open.get(number) or self._map(number)
        return shard[row - int(self._first_rows[number])]

    def distributions(self) -> Iterator[tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float16]]]:
        """Shard by shard the ids and log-probabilities of all positions, [positions, k] each."""
        for number in range(len(self.manifest["shards"])):
            shard = self._open.get(number) or self._map(number)
            yield shard.ids, shard.logprobs

    def __iter__(self) -> Iterator[Representation]:
        return (self[row] for row in range(len(self)))

    def _map(self, number: int) -> _Shard:
        described = self.manifest["shards"][number]
        if not self.checked and not self._intact(described):
            raise self._damaged([described["file"]])
        self._open[number] = _Shard(self.folder / self.manifest["shards"][number]["file"], self.k)
        return self._open[number]

    def _manifest(self) -> dict[str, Any]:
        if not (self.folder / MANIFEST).is_file():
            if not (self.folder / PLAN).is_file():
                raise UserError(f"no store `{self.folder}`: there is no {MANIFEST} in it")
            aligned = plan_in(self.folder / PLAN)["identity"].get("kind") == ALIGNED
            work = "alignment" if aligned else "extraction"
            raise UserError(
                f"the store `{self.folder}` is not finished; run its {work} again: it goes on where it stopped"
            )
        try:
            manifest = read_json(self.folder / MANIFEST)
        except ValueError as error:
            raise UserError(f"`{self.folder / MANIFEST}` is not JSON: {error}") from error
        described = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
        if described != (FORMAT, VERSION):
            raise UserError(f"`{self.folder}` is not a store of {FORMAT}, version {VERSION}: found {described}")
        identity = manifest["identity"]
        if identity.get("kind") == ALIGNED and identity.get("version") != ALIGNED_VERSION:
            raise UserError(
                f"the aligned store `{self.folder}` is of version {identity.get('version', 1)}, not "
                f"{ALIGNED_VERSION}, and lacks what is needed now; align its source again, into a new folder"
            )
        return dict(manifest)

    @cached_property
    def bytes(self) -> int:
        """Of all shards and the manifest."""
        shards = sum(shard["bytes"] for shard in self.manifest["shards"])
        return int(shards) + (self.folder / MANIFEST).stat().st_size

    def problems(self) -> Iterator[str]:
        """Everything wrong with the content, shard by shard: checksums, NaN, ranges."""
        for number, described in enumerate(self.manifest["shards"]):
            name = described["file"]
            if not self._intact(described):
                yield f"{name}: its SHA-256 is not the manifest's; remove it and run its command again"
            try:
                shard = self._open.get(number) or _Shard(self.folder / name, self.k)
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                yield f"{name}: not a readable shard: {error}"
                continue
            yield from (f"{name}: {problem}" for problem in self._wrong_content(shard, described))

    def _wrong_content(self, shard: _Shard, described: dict[str, Any]) -> Iterator[str]:
        counts = {"rows": len(shard.blocks), "positions": len(shard.tail)}
        for key, found in counts.items():
            if found != described[key]:
                yield f"{found} {key}, not {described[key]}"
        if counts["rows"] + 1 != len(shard.offsets) or shard.offsets[-1] != len(shard.tail):
            yield "its rows do not cover its positions"
            return

        logprobs, tail, gold = (a.astype(np.float32) for a in (shard.logprobs, shard.tail, shard.gold_logprob))
        total = np.exp(logprobs).sum(1) + tail
        if shard.aligned:  # an id without probability only fills a place
            logprobs = np.where(np.isneginf(logprobs), LEAST, logprobs)
        checks = {
            "NaN or infinite": ~(np.isfinite(logprobs).all(1) & np.isfinite(tail) & np.isfinite(gold)),
            "an id outside the vocabulary": (shard.ids >= self.identity["vocabulary"]).any(1),
            "an id twice": (np.diff(np.sort(shard.ids, 1), axis=1) == 0).any(1),
            "a log-probability above 0": (logprobs > 0).any(1) | (gold > 0),
            "log-probabilities that rise": (np.diff(logprobs, axis=1) > 0).any(1),
            "a tail outside [0, 1]": (tail < 0) | (tail > 1),
            "a total mass that is not 1": np.abs(total - 1) > SLACK * (1 + self.k / 10),
        }
        if shard.aligned:
            paired, gold_bytes = shard.of_positions
            checks |= {"`paired` neither 0 nor 1": paired > 1, "a token of no bytes": gold_bytes == 0}
        for what, wrong in checks.items():
            if wrong.any():
                position = int(np.argmax(wrong))
                row = int(shard.offsets.searchsorted(position, "right")) - 1
                where = f"first in conversation {shard.conversations[row].as_py()!r}, block {shard.blocks[row]}"
                yield f"{what} at {int(wrong.sum())} positions, {where}, position {position - shard.offsets[row]}"
