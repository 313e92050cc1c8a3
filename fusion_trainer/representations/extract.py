"""Dialogues and a model → its store of top-k distributions (paper, section 3.2).

The dialogues alone decide how rows are divided into shards, and the tokens of a shard alone how its rows are
divided into batches of similar length. So the bytes of the store do not depend on how many processes share the
work, or on where an earlier run was interrupted."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.prepare import prepare
from fusion_trainer.data.readers import DIALOGUES, Reader, end_ids, own_end, reader_with_own_end, source_reader
from fusion_trainer.data.templates import PIVOT_OWN_END
from fusion_trainer.representations.engines import engine_identity, open_engine, unused_settings
from fusion_trainer.representations.extraction import Extraction
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.store_writer import StoreWriter, demand_free
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from varm_common.errors import UserError
from varm_common.models import config_fingerprint, local_folder, weight_files, weights_fingerprint

__all__ = ["extract", "shard_starts", "store_identity"]

PATIENCE = timedelta(days=1)
"""How long processes wait for each other; the launcher ends them if one fails."""


def shard_starts(lengths: NDArray[np.int32], shard_tokens: int) -> list[int]:
    """The first row of each shard of about ``shard_tokens`` tokens, and the number of rows."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = [0]
    while starts[-1] < len(lengths):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, before + shard_tokens, "right"))))
    return starts


def extract(config: ExtractConfig) -> RepresentationStore:
    """Make the store that ``config`` describes; what is already there is kept.

    Under ``accelerate launch`` the processes share the shards.

    Raises:
        UserError: Something is wrong with the data, the model, the disk or the memory.
    """
    import torch
    from accelerate import PartialState

    if problem := unused_settings(config):
        raise UserError(problem)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    _demand_processes(config, state.num_processes)
    code = config.trust_remote_code
    folder, commit = local_folder(config.model, config.revision, weights=not config.server_url, code=code)
    tokenizer = load_tokenizer(folder, config.model, code)
    if config.top_k > len(tokenizer.vocabulary):
        raise UserError(f"--top-k {config.top_k} is more than the {len(tokenizer.vocabulary)} tokens there are")
    demand_free(config.output)
    with state.main_process_first():
        dialogues = prepare(config, config.output.parent, quiet=not state.is_main_process, repeat=False)
    reader = _reader(config, dialogues, tokenizer, folder)
    identity = store_identity(config, dialogues, reader, folder, commit) if state.is_main_process else None
    starts = shard_starts(dialogues.lengths, config.shard_tokens)
    writer = StoreWriter(config.output, identity, starts)
    if state.is_main_process:
        writer.begin()
    state.wait_for_everyone()
    writer.join()
    missing = [] if writer.finished else writer.missing()
    state.wait_for_everyone()
    writer.silent = config.tensor_parallel is not None and not state.is_main_process
    if mine := missing if config.tensor_parallel else missing[state.process_index :: state.num_processes]:
        try:
            engine = open_engine(config, folder, tokenizer.vocabulary, state.device)
            if state.is_main_process:
                writer.also_made_with(engine.made_with)
            Extraction(config, dialogues, reader, engine, writer).run(mine, silent=not state.is_main_process)
        except BaseException:
            if state.num_processes == 1:  # another process may still be writing
                writer.abandon()
            raise
    state.wait_for_everyone()
    if state.is_main_process and not writer.finished:
        writer.finish()
    state.wait_for_everyone()
    return RepresentationStore(config.output)


def _demand_processes(config: ExtractConfig, processes: int) -> None:
    """Check that as many processes run as the settings are for."""
    wanted = config.tensor_parallel
    if config.device_map and processes > 1:
        raise UserError("--device-map spreads one model over all GPUs: run it as one process, not with several")
    if config.engine == "vllm" and not config.server_url and processes > 1:
        raise UserError(
            "vLLM uses several GPUs by itself: run --engine vllm as one process, with --engine-options "
            "tensor_parallel_size=N, or give a --server-url"
        )
    if wanted and (config.device_map or config.load_in):
        raise UserError("--tensor-parallel places the weights itself; leave out --device-map and --load-in")
    if wanted not in (None, processes):
        raise UserError(
            f"--tensor-parallel {wanted} needs {wanted} processes, and there {'is' if processes == 1 else 'are'} "
            f"{processes}: start it with `torchrun --nproc-per-node {wanted} -m fusion_trainer extract …`"
        )


def _reader(config: ExtractConfig, dialogues: Dialogues, tokenizer: TextTokenizer, folder: Path) -> Reader:
    """How the model reads the dialogues: the pivot as they are, a source as the config says."""
    pivot, _ = local_folder(config.pivot, config.pivot_revision, weights=False, code=config.trust_remote_code)
    if folder.resolve() == pivot.resolve():
        return Reader(tokenizer, DIALOGUES)
    if config.source_template == PIVOT_OWN_END:
        pivots = load_tokenizer(pivot, config.pivot, config.trust_remote_code)
        return reader_with_own_end(tokenizer, own_end(tokenizer), pivots, dialogues.ends)
    return source_reader(config.source_template, tokenizer, chats=dialogues.report.turns > 0)


def store_identity(
    config: ExtractConfig, dialogues: Dialogues, reader: Reader, folder: Path, commit: str | None
) -> dict[str, Any]:
    """Everything that the content of the store depends on."""
    tokenizer = reader.tokenizer
    return {
        "model": config.model,
        "revision": commit,
        "weights": _weights(config, folder, commit),
        "config": config_fingerprint(folder, config.trust_remote_code),
        "tokenizer": tokenizer.sha256,
        "template": dialogues.manifest["request"]["template"],
        "data": dialogues.fingerprint,
        **reader.identity,
        "ends": end_ids(reader, folder),
        "top_k": config.top_k,
        "vocabulary": max(tokenizer.vocabulary) + 1,
        **engine_identity(config, folder),
        "shard_tokens": config.shard_tokens,
    }


def _weights(config: ExtractConfig, folder: Path, commit: str | None) -> str | None:
    """The hash of the weights. None if only a server has them: then the commit names them, if there is one."""
    if config.server_url and (commit or not weight_files(folder, config.model)):
        return None
    return weights_fingerprint(folder, config.model)
