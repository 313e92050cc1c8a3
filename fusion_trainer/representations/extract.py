"""Dialogues and a model → its store of top-k distributions (paper, section 3.2).

The rows are cut into shards by the dialogues alone, and a shard's rows into batches of similar length by the
model's tokens alone. So what is computed together does not depend on how many processes share the work or on
where an earlier run was stopped, and neither do the bytes of the store. The next shard is tokenised, and the last
one written, while a shard is computed."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.prepare import prepare
from fusion_trainer.data.readers import DIALOGUES, Reader, end_ids, source_reader
from fusion_trainer.representations.partial_shard import Answer, Partial, Row
from fusion_trainer.representations.store import RepresentationStore, Supervised, id_dtype
from fusion_trainer.representations.store_writer import StoreWriter, demand_free
from fusion_trainer.representations.topk import TopK
from fusion_trainer.representations.topk_model import AskedModel
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer, supervised_positions
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import written_to
from varm_common.models import (
    config_fingerprint,
    load_causal_lm,
    local_folder,
    resolved_dtype,
    weights_fingerprint,
)

__all__ = [
    "Row",
    "batches",
    "extract",
    "shard_starts",
]

CONTEXT_SETTINGS = ("max_position_embeddings", "max_seq_len", "n_positions")
PATIENCE = timedelta(days=1)
"""How long processes wait for each other; the launcher ends them if one fails."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
LEAST = torch.finfo(torch.float16).min
KEPT_EVERY = 240.0
"""Seconds after which the part of a shard that is done is written."""


def shard_starts(lengths: NDArray[np.int32], shard_tokens: int) -> list[int]:
    """The first row of each shard of about ``shard_tokens`` tokens, and the number of rows."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = [0]
    while starts[-1] < len(lengths):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, before + shard_tokens, "right"))))
    return starts


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, longest first, each group at most ``batch_tokens`` when padded to its longest row.

    A row that is longer than that alone is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def extract(config: ExtractConfig) -> RepresentationStore:
    """Make the store that ``config`` asks for, or what of it is still missing.

    Under ``accelerate launch`` the processes share the shards.

    Raises:
        UserError: Anything a user can mend: the data, the model, the disk, the memory.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if config.device_map and state.num_processes > 1:
        raise UserError("--device-map spreads one model over all GPUs: run it as one process, not with several")
    folder, commit = local_folder(config.model, config.revision, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.model, config.trust_remote_code)
    if config.top_k > len(tokenizer.vocabulary):
        raise UserError(f"--top-k {config.top_k} is more than the {len(tokenizer.vocabulary)} tokens there are")
    demand_free(config.output)
    with state.main_process_first():
        dialogues = prepare(config, config.output.parent, quiet=not state.is_main_process)
    reader = _reader(config, dialogues, tokenizer, folder)
    identity = None
    if state.is_main_process:
        identity = _identity(config, dialogues, reader, folder, commit)
    starts = shard_starts(dialogues.lengths, config.shard_tokens)
    writer = StoreWriter(config.output, identity, starts, _environment(state.device))
    if state.is_main_process:
        writer.begin()
    state.wait_for_everyone()
    writer.join()
    mine = [shard for shard in writer.missing() if not writer.finished][state.process_index :: state.num_processes]
    state.wait_for_everyone()
    if mine:
        try:
            extraction = _Extraction(config, dialogues, reader, folder, state.device, writer)
            extraction.run(mine, silent=not state.is_main_process)
        except BaseException:
            if state.num_processes == 1:  # another may be writing
                writer.abandon()
            raise
    state.wait_for_everyone()
    if state.is_main_process and not writer.finished:
        writer.finish()
    state.wait_for_everyone()
    return RepresentationStore(config.output)


def _reader(config: ExtractConfig, dialogues: Dialogues, tokenizer: TextTokenizer, folder: Path) -> Reader:
    """How the model reads the dialogues: the pivot as they are, a source as the config says."""
    pivot, _ = local_folder(config.pivot, config.pivot_revision, weights=False, code=config.trust_remote_code)
    if folder.resolve() == pivot.resolve():
        return Reader(tokenizer, DIALOGUES)
    return source_reader(config.source_template, tokenizer, chats=dialogues.report.turns > 0)


def _identity(
    config: ExtractConfig,
    dialogues: Dialogues,
    reader: Reader,
    folder: Path,
    commit: str | None,
) -> dict[str, Any]:
    """What the store is of."""
    tokenizer = reader.tokenizer
    vocabulary = max(tokenizer.vocabulary) + 1
    return {
        "model": config.model,
        "revision": commit,
        "weights": weights_fingerprint(folder, config.model),
        "config": config_fingerprint(folder, config.trust_remote_code),
        "tokenizer": tokenizer.sha256,
        "template": dialogues.manifest["request"]["template"],
        "data": dialogues.fingerprint,
        **reader.identity,
        "ends": end_ids(reader, folder),
        "top_k": config.top_k,
        "vocabulary": vocabulary,
        "dtype": resolved_dtype(folder, config.dtype, config.trust_remote_code),
        "attention": config.attention,
        "load_in": config.load_in,
        "shard_tokens": config.shard_tokens,
    }


def _environment(device: torch.device) -> dict[str, str]:
    """What the store is made with: it decides rounding, not what the store is of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = ("torch", "transformers", "tokenizers", "varm-merge")
    return {"device": name, **{package: version(package) for package in packages}}


class _Extraction:
    """One process's share of the work."""

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
            load_in=config.load_in,
            trust_remote_code=config.trust_remote_code,
        )
        settings = model.config.get_text_config()
        limits = [getattr(settings, name, None) for name in CONTEXT_SETTINGS]
        self.context: int | None = next((limit for limit in limits if limit), None)
        try:
            self.model = AskedModel(model, reader.tokenizer.vocabulary)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(f"{config.model} leaves no memory to run in; try --device-map auto") from error
        self.id_dtype = id_dtype(writer.identity["vocabulary"])

    def run(self, shards: Sequence[int], silent: bool) -> None:
        """Compute and write the shards, with a progress bar over the dialogues' tokens."""
        lengths, starts = self.dialogues.lengths, self.writer.first_rows
        share = sum(int(lengths[starts[shard] : starts[shard + 1]].sum()) for shard in shards)
        bar = tqdm(
            total=share, unit="tok", unit_scale=True, disable=silent or is_quiet(), desc=self.config.model[-40:]
        )
        with bar, ThreadPoolExecutor(1, "tokeniser") as ahead:
            reading = ahead.submit(self._read, shards[0])
            for shard, following in zip(shards, [*shards[1:], None], strict=True):
                rows, counts = reading.result()
                if following is not None:
                    reading = ahead.submit(self._read, following)
                found = self._ask(shard, rows, bar)
                facts: dict[str, Any] = {
                    "batch_tokens": self.config.batch_tokens,
                    "positions": sum(len(one) for one in found),
                    "tokens": sum(len(row.ids) for row in rows),
                    "cut_tokens": sum(row.cut_tokens for row in rows),
                    **{name: counts[name] for name in sorted(counts)},
                }
                names = [(row.conversation, row.block) for row in rows]
                self.writer.write(shard, names, found, facts, [row.answers for row in rows])
            self.writer.wait()

    def _read(self, shard: int) -> tuple[list[Row], Counter[str]]:
        """Render and tokenise the blocks of a shard; what exceeds the model's context is cut and counted."""
        first, last = self.writer.first_rows[shard : shard + 2]
        blocks = [self.dialogues[number] for number in range(first, last)]
        rows: list[Row] = []
        reader = replace(self.reader, counts=Counter())
        readings = [reader.read(block) for block in blocks]
        encoded = reader.tokenizer.encode([reading.text for reading in readings])
        for block, reading, tokens in zip(blocks, readings, encoded, strict=True):
            positions = supervised_positions(tokens, reading.spans)
            ids = tokens.ids[: self.context]
            if len(ids) and int(ids.max()) >= self.model.rows:
                raise UserError(
                    f"{block.source}: token {int(ids.max())} of the tokenizer of {self.config.model} has no row "
                    f"in the model, which has {self.model.rows}: tokenizer and weights do not belong together"
                )
            positions = positions[positions < len(ids) - 1]
            cut = len(tokens) - len(ids)
            answers = [
                [answer.turn, answer.pieces[0][0], answer.pieces[-1][1], answer.end]
                for answer in reading.answers
                if answer.pieces
            ]
            whose = block.conversation, block.block, block.source
            rows.append(Row(*whose, ids, positions, cut, block.tokens, answers))
        return rows, reader.counts

    def _ask(self, shard: int, rows: Sequence[Row], bar: Any) -> list[Supervised]:
        """The distributions of every row; a batch is copied to the host while the next is computed.

        What is done is kept every ``KEPT_EVERY`` seconds, so that a run that is killed loses no more than that.
        """
        asked = [number for number, row in enumerate(rows) if len(row.positions)]
        groups = batches([len(rows[number].ids) for number in asked], self.config.batch_tokens)
        partial = Partial(self.writer.path(shard).with_suffix(".partial"), rows)
        found = partial.read()
        waiting: Answer | None = None
        kept_at = time.monotonic()
        for numbers in ([asked[place] for place in group] for group in groups):
            if any(found[number] is None for number in numbers):
                answer = self._ask_batch(rows, numbers)
                if waiting is not None:
                    self._keep(waiting, rows, found)
                waiting = answer
                if time.monotonic() - kept_at > KEPT_EVERY:
                    with written_to(self.writer.folder):
                        partial.write(found)
                    kept_at = time.monotonic()
            bar.update(sum(rows[number].pivot_tokens for number in numbers))
        if waiting is not None:
            self._keep(waiting, rows, found)
        nothing = self._empty()
        return [nothing if one is None else one for one in found]

    def _empty(self) -> Supervised:
        """A row at which nothing is queried."""
        k, none = self.config.top_k, np.zeros(0, np.float16)
        return Supervised(np.zeros((0, k), self.id_dtype), np.zeros((0, k), np.float16), none, none)

    def _ask_batch(self, rows: Sequence[Row], numbers: list[int]) -> Answer:
        batch = [rows[number] for number in numbers]
        length = max(len(row.ids) for row in batch)
        ids_BL = np.zeros((len(batch), length), np.int64)
        mask_BL = np.zeros((len(batch), length), np.int64)
        for place, row in enumerate(batch):
            ids_BL[place, : len(row.ids)] = row.ids
            mask_BL[place, : len(row.ids)] = 1
        positions_S = np.concatenate([place * length + row.positions for place, row in enumerate(batch)])
        gold_S = ids_BL.ravel()[positions_S + 1]
        mask = None if mask_BL.all() else self._on_device(mask_BL)
        try:
            found = self.model.distributions(
                self._on_device(ids_BL),
                mask,
                self._on_device(positions_S.astype(np.int64)),
                self._on_device(gold_S),
                self.config.top_k,
            )
            return _to_host(numbers, found)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory on {self.model.device} with a batch of {len(batch)} × {length} tokens; lower "
                f"--batch-tokens (now {self.config.batch_tokens})"
                + ("" if len(batch) > 1 else ", and as it is one block alone, --max-length")
                + ", and run the same command again"
            ) from error

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.model.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    def _keep(self, answer: Answer, rows: Sequence[Row], found: list[Supervised | None]) -> None:
        """Hand a batch's distributions to their rows."""
        ids, logprobs, tail, gold = answer.arrays()
        finite = _finite(logprobs, tail, gold)
        start = 0
        for number in answer.numbers:
            row = rows[number]
            stop = start + len(row.positions)
            if not finite[start:stop].all():
                raise UserError(self._not_finite(*self._first_not_finite(rows, row)))
            here = slice(start, stop)
            found[number] = Supervised(ids[here].astype(self.id_dtype), logprobs[here], tail[here], gold[here])
            start = stop

    def _first_not_finite(self, rows: Sequence[Row], met: Row) -> tuple[Row, int]:
        """The first row of the shard, and position in it, without finite logits; the rows are asked one by one."""
        for number, row in enumerate(rows):
            finite = _finite(*self._ask_batch(rows, [number]).arrays()[1:])
            if not finite.all():
                return row, int(np.argmin(finite))
        return met, 0

    def _not_finite(self, row: Row, which: int) -> str:
        position = int(row.positions[which])
        message = (
            f"{self.config.model} gives NaN or infinite logits, first at token position {position} of "
            f"conversation {row.conversation!r}, block {row.block} ({row.source})"
        )
        for name, weight in self.model.model.named_parameters():
            if weight.is_meta:
                continue
            wrong = ~torch.isfinite(weight.detach().flatten())
            if wrong.any():
                place = np.unravel_index(int(wrong.to(torch.uint8).argmax()), weight.shape)
                return f"{message}. Its weights are not finite: {name}, first at {[int(i) for i in place]}"
        return f"{message}. Its weights are finite; a wider --dtype may help"


def _finite(
    logprobs: NDArray[np.float16], tail: NDArray[np.float16], gold: NDArray[np.float16]
) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.isfinite(logprobs).all(1) & np.isfinite(tail) & np.isfinite(gold)
    return finite


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or any(words in str(error) for words in OUT_OF_MEMORY)


def _to_host(numbers: list[int], found: TopK) -> Answer:
    """Start copying to the host, in the types the store keeps."""
    half = torch.float16
    parts = (
        found.ids_CK.to(torch.int32),
        found.logprobs_CK.clamp(min=LEAST).to(half),
        found.tail_C.to(half),
        found.gold_logprob_C.clamp(min=LEAST).to(half),
    )
    if found.tail_C.device.type != "cuda":
        return Answer(numbers, TopK(*(part.cpu() for part in parts)), None)
    copies = TopK(*(part.to("cpu", non_blocking=True) for part in parts))
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(found.tail_C.device))
    return Answer(numbers, copies, event)
