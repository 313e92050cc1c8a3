"""One process's share of an extraction: blocks are tokenised, the model is queried, shards are written.

While a shard is computed, the next one is tokenised and the last one written. While a batch is computed, the last
one is copied to the host. The finished part of a shard is saved regularly, so a killed run loses little.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.representations.split_model import context_length
from fusion_trainer.representations.store import Representation, id_dtype
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.representations.topk_model import TopKModel
from fusion_trainer.text.tokenizer import supervised_positions
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import fingerprint, written_to
from varm_common.models import load_causal_lm
from varm_common.saved_arrays import load_arrays, save_arrays

__all__ = ["Extraction", "batches"]

PARTIAL = "fusion-trainer part of a shard"
SAVED_EVERY = 240.0
"""Seconds between two saves of the finished part of a shard."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
COLUMNS = ("ids", "logprobs", "tail", "gold_logprob")
LEAST = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class Row:
    """A block as the model reads it: ids [tokens] as far as its context, and positions at which it is queried."""

    block: Block
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    cut_tokens: int
    answers: list[list[int]]

    def stored(self, columns: dict[str, Any], first: int) -> Representation:
        """The row of the store; its positions are those from ``first`` on in ``columns`` of distributions."""
        here = slice(first, first + len(self.positions))
        own = {name: column[here] for name, column in columns.items()}
        return Representation(conversation=self.block.conversation, block=self.block.block, **own)


@dataclass(frozen=True)
class Pending:
    """A batch's distributions on their way to the host, and the numbers of its rows."""

    numbers: Sequence[int]
    parts: dict[str, Tensor]
    copied: torch.cuda.Event | None


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, longest first, each group at most ``batch_tokens`` when padded to its longest row.

    A row that is longer than that is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Extraction:
    """The loaded model, and the store that is written.

    Raises:
        UserError: The model cannot be loaded.
    """

    def __init__(
        self,
        config: ExtractConfig,
        dialogues: Dialogues,
        reader: Reader,
        folder: Path,
        device: torch.device,
        writer: StoreWriter,
    ) -> None:
        self.config = config
        self.dialogues = dialogues
        self.reader = reader
        self.writer = writer
        model = load_causal_lm(
            folder,
            config.model,
            dtype=config.dtype,
            attention=config.attention,
            device=device,
            device_map=config.device_map,
            tensor_parallel=config.tensor_parallel,
            load_in=config.load_in,
            trust_remote_code=config.trust_remote_code,
        )
        if len(gpus := {*(getattr(model, "hf_device_map", None) or {}).values()}) > 1 and not is_quiet():
            note = f"{config.model} is spread over {len(gpus)} devices, which take turns"
            click.echo(f"{note}; with --tensor-parallel they work at the same time", err=True)
        self.context = context_length(model)
        with _out_of_memory(f"{config.model} leaves no GPU memory for a batch; try --device-map auto"):
            self.model = TopKModel(model, reader.tokenizer.vocabulary)
        self.tokens_read = 0
        self.id_dtype: Any = id_dtype(writer.identity["vocabulary"])

    def run(self, shards: Sequence[int], silent: bool) -> None:
        """Compute and write the shards. The bar counts the pivot's tokens, and shows the model's own rate."""
        lengths, starts = self.dialogues.lengths, self.writer.first_rows
        total = sum(int(lengths[starts[shard] : starts[shard + 1]].sum()) for shard in shards)
        name = self.config.model[-40:]
        bar = tqdm(total=total, unit="tok", unit_scale=True, disable=silent or is_quiet(), desc=name)
        with bar, ThreadPoolExecutor(1, "tokeniser") as ahead:
            reading = ahead.submit(self._read, shards[0])
            for shard, following in zip(shards, [*shards[1:], None], strict=True):
                rows, counts = reading.result()
                if following is not None:
                    reading = ahead.submit(self._read, following)
                done = self._query(shard, rows, bar)
                facts: dict[str, Any] = {
                    "batch_tokens": self.config.batch_tokens,
                    "positions": sum(map(len, done)),
                    "tokens": sum(len(row.ids) for row in rows),
                    "cut_tokens": sum(row.cut_tokens for row in rows),
                    **dict(sorted(counts.items())),
                }
                self.writer.write(shard, done, facts, [row.answers for row in rows])
            self.writer.wait()

    def _read(self, shard: int) -> tuple[list[Row], Counter[str]]:
        """Render and tokenise the blocks of a shard; tokens beyond the model's context are cut off and counted."""
        blocks = [self.dialogues[number] for number in range(*self.writer.first_rows[shard : shard + 2])]
        reader = replace(self.reader, counts=Counter())
        readings = [reader.read(block) for block in blocks]
        tokenised = reader.tokenizer.encode([reading.text for reading in readings])
        rows: list[Row] = []
        for block, reading, tokens in zip(blocks, readings, tokenised, strict=True):
            ids = tokens.ids[: self.context]
            if len(ids) and int(ids.max()) >= self.model.rows:
                raise UserError(
                    f"{block.source}: token {int(ids.max())} of the tokenizer of {self.config.model} has no row "
                    f"in the model, which has {self.model.rows}: the tokenizer does not belong to these weights"
                )
            positions = supervised_positions(tokens, reading.spans)
            answers = [
                [answer.turn, answer.pieces[0][0], answer.pieces[-1][1], answer.end]
                for answer in reading.answers
                if answer.pieces
            ]
            rows.append(Row(block, ids, positions[positions < len(ids) - 1], len(tokens) - len(ids), answers))
        return rows, reader.counts

    def _query(self, shard: int, rows: Sequence[Row], bar: Any) -> list[Representation]:
        """The distributions of every row of a shard."""
        queried = [number for number, row in enumerate(rows) if len(row.positions)]
        partial = self.writer.path(shard).with_suffix(".partial")
        done = _load_partial(partial, rows)
        pending: Pending | None = None
        saved_at = time.monotonic()
        for group in batches([len(rows[number].ids) for number in queried], self.config.batch_tokens):
            numbers = [queried[place] for place in group]
            if not done.keys() >= set(numbers):
                following = self._query_batch(rows, numbers)
                self.tokens_read += sum(len(rows[number].ids) for number in numbers)
                if pending is not None:
                    done |= self._received(pending, rows)
                pending = following
                if time.monotonic() - saved_at > SAVED_EVERY and not self.writer.silent:
                    with written_to(self.writer.folder):
                        _save_partial(partial, rows, done)
                    saved_at = time.monotonic()
            own_rate = self.tokens_read / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{bar.format_sizeof(own_rate)}tok/s of the model's own", refresh=False)
            bar.update(sum(rows[number].block.tokens for number in numbers))
        if pending is not None:
            done |= self._received(pending, rows)
        k = self.config.top_k
        columns = [np.zeros((0, k), self.id_dtype), np.zeros((0, k), np.float16), *2 * [np.zeros(0, np.float16)]]
        empty = dict(zip(COLUMNS, columns, strict=True))
        return [done[number] if number in done else row.stored(empty, 0) for number, row in enumerate(rows)]

    def _query_batch(self, rows: Sequence[Row], numbers: Sequence[int]) -> Pending:
        batch = [rows[number] for number in numbers]
        length = max(len(row.ids) for row in batch)
        ids_BL = np.zeros((len(batch), length), np.int64)
        mask_BL = np.zeros((len(batch), length), np.int64)
        for place, row in enumerate(batch):
            ids_BL[place, : len(row.ids)] = row.ids
            mask_BL[place, : len(row.ids)] = 1
        positions_S = np.concatenate(
            [place * length + row.positions.astype(np.int64) for place, row in enumerate(batch)]
        )
        gold_S = ids_BL.ravel()[positions_S + 1]
        alone = " and, because the batch is a single block, --max-length" if len(batch) == 1 else ""
        message = (
            f"out of memory on {self.model.device} with a batch of {len(batch)} × {length} tokens; lower "
            f"--batch-tokens (now {self.config.batch_tokens}){alone}, and run the same command again"
        )
        with _out_of_memory(message):
            top = self.model.distributions(
                self._on_device(ids_BL),
                None if mask_BL.all() else self._on_device(mask_BL),
                self._on_device(positions_S),
                self._on_device(gold_S),
                self.config.top_k,
            )
            columns = {
                "ids": top.ids_CK.to(torch.int32),
                "logprobs": top.logprobs_CK.clamp(min=LEAST).to(torch.float16),
                "tail": top.tail_C.to(torch.float16),
                "gold_logprob": top.gold_logprob_C.clamp(min=LEAST).to(torch.float16),
            }
            host = {name: column.to("cpu", non_blocking=True) for name, column in columns.items()}
            if top.tail_C.device.type != "cuda":
                return Pending(numbers, host, None)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(top.tail_C.device))
            return Pending(numbers, host, copied)

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.model.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    def _received(self, pending: Pending, rows: Sequence[Row]) -> dict[int, Representation]:
        """The distributions of a batch, by the number of their row."""
        if pending.copied is not None:
            pending.copied.synchronize()
        columns: dict[str, NDArray[Any]] = {name: part.numpy() for name, part in pending.parts.items()}
        columns["ids"] = columns["ids"].astype(self.id_dtype)
        finite = np.isfinite(columns["logprobs"]).all(1)
        finite &= np.isfinite(columns["tail"]) & np.isfinite(columns["gold_logprob"])
        received: dict[int, Representation] = {}
        start = 0
        for number in pending.numbers:
            row = rows[number]
            stop = start + len(row.positions)
            if not finite[start:stop].all():
                raise UserError(self._not_finite(row, int(row.positions[np.argmin(finite[start:stop])])))
            received[number] = row.stored(columns, start)
            start = stop
        return received

    def _not_finite(self, row: Row, position: int) -> str:
        message = (
            f"{self.config.model} gives NaN or infinite logits, first at token position {position} of "
            f"conversation {row.block.conversation!r}, block {row.block.block} ({row.block.source})"
        )
        for name, weight in self.model.model.named_parameters():
            if weight.is_meta:
                continue
            wrong = ~torch.isfinite(weight.detach().flatten())
            if wrong.any():
                place = np.unravel_index(int(wrong.to(torch.uint8).argmax()), weight.shape)
                return f"{message}. Its weights are not finite: {name}, first at {[int(i) for i in place]}"
        return f"{message}. Its weights are finite; a wider --dtype may help"


@contextmanager
def _out_of_memory(message: str) -> Iterator[None]:
    """Raise a UserError with this message if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not named and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise UserError(message) from error


def _partial_identity(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": fingerprint([[row.ids.tolist(), row.positions.tolist()] for row in rows])}


def _save_partial(path: Path, rows: Sequence[Row], done: dict[int, Representation]) -> None:
    """Save the finished rows of a shard."""
    if done:
        arrays = {name: np.concatenate([getattr(row, name) for row in done.values()]) for name in COLUMNS}
        described = {"identity": _partial_identity(rows)}
        save_arrays(path, PARTIAL, described, {**arrays, "done": np.array([*done], np.int64)})


def _load_partial(path: Path, rows: Sequence[Row]) -> dict[int, Representation]:
    """The finished rows of a shard by their numbers; none if the file is missing, damaged or of other rows."""
    if not path.is_file():
        return {}
    try:
        _, arrays = load_arrays(path, PARTIAL, _partial_identity(rows))
    except UserError:
        return {}
    done: dict[int, Representation] = {}
    start = 0
    for number in arrays.pop("done").tolist():
        done[number] = rows[number].stored(arrays, start)
        start += len(done[number])
    return done
