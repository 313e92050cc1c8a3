"""Write the target: reserve its disk space, check what was trained, make its files appear together."""

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoConfig, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

from fusion_trainer.training.inputs import Inputs, fixed_settings, load_pivot
from fusion_trainer.training.rounding import rounding
from fusion_trainer.training.trainer import WRITING, FusionTrainer, last_checkpoint, when_run_again
from varm_common.checkpoints import read_header
from varm_common.errors import UserError, some
from varm_common.files import TEMPORARY, locked, sync_folder, sync_tree, write_json, written_to
from varm_common.models import TOKENIZER_FILES
from varm_common.record import Record
from varm_common.stored_tensors import stored_tensor

__all__ = ["FUSION", "PLAN", "demand_free", "exclusive", "finish_training", "reserve_space"]

FUSION, PLAN = "fusion.json", "training.json"
"""The record of a finished target, and of an unfinished one."""
RESULT = "target" + TEMPORARY
"""The folder in which the target is written before its files get their names."""
LOCK = "lock" + TEMPORARY
SPARE = 1 << 16
"""Bytes for the target's other files and for half-filled blocks."""


def demand_free(output: Path, identity: dict[str, Any]) -> None:
    """Check that the output folder does not exist, is empty, or holds a part of this training.

    Raises:
        UserError: It holds something else. Nothing in it was touched.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"`{output}` is a file; output_dir names the target's folder")
    known = next((path for name in (FUSION, PLAN) if (path := output / name).is_file()), None)
    content = sorted(path.name for path in output.iterdir() if path.suffix != TEMPORARY)
    if known is None and content:
        raise UserError(f"`{output}` holds other files ({some(content)}); give a new output_dir")
    if known is not None:
        is_trained = known.name == FUSION or last_checkpoint(output) is not None
        # before training starts, all settings may differ
        compared = fixed_settings if is_trained else lambda _: {}
        Record(known, identity, "Give another output_dir, or remove that folder", compared).read()


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Keep other trainings out of the output folder, which is created, and remove half-written files from it.

    Raises:
        UserError: Another training uses it, or it cannot be written.
    """
    with written_to(output):
        output.mkdir(parents=True, exist_ok=True)
    busy = f"another training run is writing to `{output}`; give another output_dir, or wait"
    with locked(output / LOCK, busy):
        for name in (WRITING, RESULT):
            shutil.rmtree(output / name, ignore_errors=True)
        try:
            yield
        finally:
            with suppress(OSError):
                (output / LOCK).unlink(missing_ok=True)


def reserve_space(inputs: Inputs) -> IO[bytes]:
    """Hold disk space for the target, by a file without a name, until it is closed or the process ends.

    Raises:
        UserError: There is too little. Better to know before the training than after it.
    """
    sizes = [math.prod(shape) for shape, _ in read_header(inputs.folder).tensors.values()]
    others = sum(path.stat().st_size for pattern in TOKENIZER_FILES for path in inputs.folder.glob(pattern))
    needed = sum(sizes) * getattr(torch, inputs.output_dtype).itemsize + others + SPARE
    with written_to(inputs.output):
        file = tempfile.TemporaryFile(dir=inputs.output)  # noqa: SIM115  the caller closes it
    try:
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
    return file


def finish_training(inputs: Inputs, trainer: FusionTrainer, about: dict[str, Any]) -> None:
    """Write the target. Its files get their names once all are on the disk, ``fusion.json`` last.

    Raises:
        UserError: No weight differs from the pivot's, or the disk refuses.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # gathered from all processes; with adapters only theirs
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if inputs.arguments.should_save:
        with written_to(inputs.output, when_run_again(inputs.output)):
            making = inputs.output / RESULT
            try:
                trained = _write_target(inputs, trainer, weights, making)
            except BaseException as error:
                shutil.rmtree(making, ignore_errors=True)
                if refused := re.search(r"\(os error (\d+)\)", str(error)):  # from safetensors or tokenizers
                    raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from error
                raise
            if kept := rounding(inputs.folder, making, trained):
                about = {**about, "rounding": kept}
            _publish(making, inputs.output, about)
    trainer.accelerator.wait_for_everyone()


def _publish(making: Path, output: Path, about: dict[str, Any]) -> None:
    for path in sorted(making.iterdir()):
        if path.is_dir():  # it cannot replace another folder
            shutil.rmtree(output / path.name, ignore_errors=True)
        path.replace(output / path.name)
    making.rmdir()
    sync_folder(output)
    write_json(output / FUSION, about)
    (output / PLAN).unlink(missing_ok=True)


def _write_target(
    inputs: Inputs, trainer: FusionTrainer, weights: dict[str, torch.Tensor], making: Path
) -> dict[str, torch.Tensor]:
    """Write the target's files to ``making``. Returns its weights before they were rounded to its dtype."""
    dtype = getattr(torch, inputs.output_dtype)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}  # of torch_compile
    if inputs.config.lora is not None:
        from peft import PeftModel

        model.save_pretrained(making / "adapter", state_dict=weights)
        pivot = load_pivot(inputs, "float32", None)
        set_seed(inputs.arguments.seed)  # some adapters change the pivot at random when they are added
        model = PeftModel.from_pretrained(pivot, making / "adapter").merge_and_unload()
        weights = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # each is there once, by another name
    rounded = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items() if k not in tied}
    _demand_moved(inputs, rounded)
    config = model.config.get_text_config()
    own = AutoConfig.from_pretrained(inputs.folder, trust_remote_code=inputs.config.trust_remote_code)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the Trainer has set those of the tokenizer
        setattr(config, name, getattr(own.get_text_config(), name, None))
    model.config.use_cache = True
    model.save_pretrained(making, state_dict=rounded)
    model.config.dtype = dtype  # the written one, not the trained one
    model.config.save_pretrained(making)
    inputs.tokenizer.tokenizer.save_pretrained(making)
    if (generation := inputs.folder / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(generation, making / generation.name)
    sync_tree(making)
    return weights


def _demand_moved(inputs: Inputs, written: Mapping[str, torch.Tensor]) -> None:
    """Check that a tensor of the target differs from the pivot's. The first that differs is enough."""
    dtype = "float32" if inputs.config.lora is not None else inputs.config.dtype  # adapters are merged in float32
    pivot = read_header(inputs.folder)
    for name, end in written.items():
        if name not in pivot.files:  # it has another name in the pivot's files, so nothing is certain
            return
        start = stored_tensor(pivot.files[name], name)
        start = start if dtype == "auto" else start.to(getattr(torch, dtype))
        if not torch.equal(start.to(end.dtype), end.cpu()):
            return
    raise UserError(
        "nothing was trained: every weight of the target would equal the pivot's, so no target is written. "
        "Look at the learning rate and the gradients in the logs, at output_dtype, and at what is trainable"
    )
