"""The target: reserved disk space, the checks of what was trained, and the folder that is written."""

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from transformers.utils import GENERATION_CONFIG_NAME

from fusion_trainer.training.inputs import FUSION, PLAN, RESULT, Inputs, demand_same, loaded
from fusion_trainer.training.rounding import rounding
from fusion_trainer.training.trainer import WRITING, FusionTrainer, last_checkpoint
from varm_common import checkpoints
from varm_common.errors import UserError
from varm_common.files import (
    TEMPORARY,
    read_json,
    sync_folder,
    sync_tree,
    write_json,
    written_to,
)
from varm_common.models import (
    TOKENIZER_FILES,
    weight_files,
)

__all__ = [
    "REMOVE",
    "demand_free",
    "finish_training",
    "reserved_space",
]

SPARE = 1 << 16
"""Bytes of the target's other files, and of half-filled blocks."""
REMOVE = "Remove that folder: the training resumes from the checkpoint before it, or begins again"


@contextmanager
def reserved_space(inputs: Inputs) -> Iterator[IO[bytes]]:
    """Disk space for the target, held by a file without a name until it is closed or the process ends.

    Raises:
        UserError: There is too little: better known before the training than after it.
    """
    folder, tensors = inputs.folder, checkpoints.read_header(inputs.folder).tensors.values()
    others = sum(path.stat().st_size for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    item = getattr(torch, inputs.output_dtype).itemsize
    needed = sum(math.prod(shape) for shape, _ in tensors) * item + others + SPARE
    with ExitStack() as held:
        try:
            file = held.enter_context(tempfile.TemporaryFile(dir=inputs.output))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                free = shutil.disk_usage(inputs.output).free
                raise UserError(
                    f"`{inputs.output}` cannot be written: the target takes about {needed:,} bytes, and {free:,} "
                    f"are free ({error.strerror}). Make room or give another output_dir, then run the same "
                    "command again"
                ) from error
        yield file


def demand_free(output: Path, identity: dict[str, Any]) -> None:
    """See that the output folder holds nothing, or a part of this training; what was half-written is removed.

    Raises:
        UserError: It holds something else.
    """
    with written_to(output):
        for name in (WRITING, RESULT):
            shutil.rmtree(output / name, ignore_errors=True)
        known = next((output / name for name in (FUSION, PLAN) if (output / name).is_file()), None)
        content = sorted(path.name for path in output.iterdir() if path.suffix != TEMPORARY)
        if known is None and content:
            raise UserError(f"`{output}` holds something else ({', '.join(content[:3])}); give a new output_dir")
        if known is not None:
            demand_same(output, identity, read_json(known), known.name == FUSION or bool(last_checkpoint(output)))


def finish_training(inputs: Inputs, trainer: FusionTrainer, about: dict[str, Any]) -> None:
    """Write the target: its files take their names once all are on the disk, ``fusion.json`` last.

    Raises:
        UserError: No weight differs from the pivot's, or the disk refuses.
    """
    weights = _trained_weights(trainer)
    if inputs.arguments.should_save:
        making = inputs.output / RESULT
        with written_to(inputs.output, _then(inputs.output)):
            try:
                trained = _write_target(inputs, trainer, weights, making)
            except BaseException as error:
                shutil.rmtree(making, ignore_errors=True)
                if refused := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors and tokenizers
                    raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from error
                raise
            if kept := rounding(inputs.folder, making, trained):
                about = {**about, "rounding": kept}
            for path in sorted(making.iterdir()):
                if path.is_dir():  # which cannot take the place of another
                    shutil.rmtree(inputs.output / path.name, ignore_errors=True)
                path.replace(inputs.output / path.name)
            making.rmdir()
            sync_folder(inputs.output)
            write_json(inputs.output / FUSION, about)
            (inputs.output / PLAN).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def _then(output: Path) -> str:
    last = last_checkpoint(output)
    return f"it resumes from `{last}`" if last else "it trains again, since there is no checkpoint (save_strategy)"


def _demand_moved(inputs: Inputs, written: Mapping[str, torch.Tensor]) -> None:
    """See that a tensor of the target differs from the pivot's; the first that does is enough.

    Raises:
        UserError: None does.
    """
    dtype = "float32" if inputs.config.lora is not None else inputs.config.dtype  # adapters are added in float32
    unseen = set(written)
    for path in weight_files(inputs.folder):
        with safe_open(path, "pt") as file:
            for name in unseen.intersection(file.keys()):
                start, end = file.get_tensor(name), written[name]
                start = start if dtype == "auto" else start.to(getattr(torch, dtype))
                if not torch.equal(start.to(end.dtype), end.cpu()):
                    return
                unseen.discard(name)
    if not unseen:  # else some have other names in the pivot's files, and nothing can be said
        raise UserError(
            "nothing was trained: every weight of the target would equal the pivot's, so no target is written. "
            "Look at the learning rate and the gradients in the logs, at output_dtype, and at what is trainable"
        )


def _trained_weights(trainer: FusionTrainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered from all processes; with adapters only theirs."""
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    gathered: dict[str, torch.Tensor] = accelerator.get_state_dict(trainer.model_wrapped)
    return gathered


def _write_target(
    inputs: Inputs, trainer: FusionTrainer, weights: dict[str, torch.Tensor], making: Path
) -> dict[str, torch.Tensor]:
    """Write the target's files to ``making``; its weights as they were before they were rounded to its dtype."""
    config = inputs.config
    dtype = getattr(torch, inputs.output_dtype)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is not None:
        model.save_pretrained(making / "adapter", state_dict=weights)
        model = _merged(inputs, making / "adapter")
        weights = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # each is there once, under another name
    rounded = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items() if k not in tied}
    _demand_moved(inputs, rounded)
    model.config.use_cache = True
    model.save_pretrained(making, state_dict=rounded)
    model.config.dtype = dtype  # that of what was written, not of what was trained
    model.config.save_pretrained(making)
    inputs.tokenizer.tokenizer.save_pretrained(making)
    if (generation := inputs.folder / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(generation, making / generation.name)
    sync_tree(making)
    return weights


def _merged(inputs: Inputs, adapter: Path) -> Any:
    """The pivot in float32 with the adapters added to its weights."""
    from peft import PeftModel

    model = loaded(inputs, "float32", None)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
