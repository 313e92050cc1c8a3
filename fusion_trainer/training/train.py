"""A target: the pivot fine-tuned on distributions fused of its own and its sources'.

What a training is of (pivot, stores, settings) is written first, so that it only ever goes on as what it was; then
come checkpoints, and last the target with ``fusion.json``, which tells a merge what pivot it was trained from."""

import fcntl
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors import safe_open
from transformers import TrainingArguments

from fusion_trainer.config import TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import ALIGNED, RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from fusion_trainer.training.batches import Collator, FusionData, TokenFile, pack, write_tokens
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.inputs import (
    FORMAT,
    FUSION,
    PLAN,
    UNUSABLE,
    VERSION,
    Inputs,
    described_arguments,
    first_word,
    loaded,
    place_of_setting,
    reason_of,
    with_adapters,
)
from fusion_trainer.training.target import REMOVE, demand_free, finish_training, reserved_space
from fusion_trainer.training.trainer import FusionTrainer, argument_problems, last_checkpoint
from varm_common import checkpoints
from varm_common.errors import UserError, listed
from varm_common.files import (
    read_mapping,
    sha256_of,
    write_json,
    written_to,
)
from varm_common.models import (
    config_fingerprint,
    local_folder,
    resolved_dtype,
    weight_files,
    weights_fingerprint,
)

__all__ = [
    "train",
]


def train(config: TrainConfig) -> Path:
    """Train the target that ``config`` asks for, or what of it is still missing.

    Returns:
        Its folder.

    Raises:
        UserError: The stores do not fit the pivot or each other, an argument cannot be used, the loss is not
            finite, no weight was changed, the disk is full, or another training is at work in the folder.
    """
    inputs = _open(config)
    identity = _identity(inputs)
    with ExitStack() as held:
        with inputs.arguments.main_process_first(desc="prepare the output folder"):
            if inputs.arguments.should_save:
                with written_to(inputs.output):
                    held.enter_context(_alone(inputs.output))
                demand_free(inputs.output, identity)
            tokens = write_tokens(inputs.dialogues, inputs.tokenizer)
        finished, last = _begun(inputs)
        if finished:
            PartialState().destroy_process_group()
        else:
            _train(inputs, identity, tokens, last)
    return inputs.output


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`{folder}` is a file; output_dir names the target's folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another training is at work in `{folder}`; give another output_dir, or wait") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _begun(inputs: Inputs) -> tuple[bool, str | None]:
    """Whether the target is made already, and the checkpoint to go on from: the same in all processes.

    Raises:
        UserError: They see different ones, or the user wants none of those there are.
    """
    asked = inputs.config.training.get("resume_from_checkpoint")
    last = str(found) if (found := last_checkpoint(inputs.output)) else None
    if asked is False and last:
        raise UserError(f"resume_from_checkpoint is false, and there is `{last}`; remove it to begin again")
    if isinstance(asked, str) and not Path(asked).is_dir():
        place = place_of_setting(inputs.config, "training.resume_from_checkpoint")
        raise UserError(f"{place}resume_from_checkpoint: there is no checkpoint `{asked}`")
    here = (inputs.output / FUSION).is_file(), asked if isinstance(asked, str) else last
    seen = gather_object([here])
    if any(one != here for one in seen):
        told = listed([f"process {rank}: {one[1] or 'none'}" for rank, one in enumerate(seen)])
        raise UserError(
            f"the processes see different checkpoints in `{inputs.output}`:{told}\n"
            "output_dir has to be one folder that all machines share"
        )
    return here


def _train(inputs: Inputs, identity: dict[str, Any], tokens: Path, last: str | None) -> None:
    with ExitStack() as held:
        reserved = held.enter_context(reserved_space(inputs)) if inputs.arguments.should_save else None
        trainer = _trainer(inputs, tokens)
        if inputs.arguments.should_save:  # not before all settings are known to be sound
            with written_to(inputs.output):
                write_json(inputs.output / PLAN, identity)
        if last is not None:
            _demand_whole(Path(last))
        _learn(inputs.config, trainer, last)
        measured = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if reserved is not None:
            reserved.close()
        finish_training(inputs, trainer, {**identity, "results": measured})
        trainer.end()


def _learn(config: TrainConfig, trainer: FusionTrainer, last: str | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=last)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory: {error}\nTry gradient_checkpointing, a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, lora, or FSDP on several GPUs"
        ) from error
    except UserError:
        raise
    except UNUSABLE as error:
        if trainer.has_begun and not isinstance(error, OSError):
            raise  # no setting's fault
        if trainer.has_begun:
            raise UserError(f"the training stopped: {reason_of(error)}. Run the same command again") from error
        if last is not None:
            raise UserError(f"the training cannot go on from `{last}`: {reason_of(error)}. {REMOVE}") from error
        raise _unusable(config, error) from error


def _demand_whole(checkpoint: Path) -> None:
    """A training resumes from a checkpoint that can be read, with its optimizer, or it would end elsewhere."""
    try:
        read_mapping(checkpoint / "trainer_state.json")
        for path in checkpoint.glob("*.safetensors"):
            list(checkpoints.file_tensors(path))
    except ValueError as error:
        raise UserError(f"the training cannot go on from `{checkpoint}`: {error}. {REMOVE}") from error
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        raise UserError(
            f"`{checkpoint}` has no state of the optimizer (save_only_model): the training cannot go on from it; "
            "remove it, and the training goes on from the one before or begins again"
        )


def _open(config: TrainConfig) -> Inputs:
    public = {name: value for name, value in config.training.items() if not name.endswith("_token")}
    try:  # transformers pickles its arguments into every checkpoint
        arguments = TrainingArguments(
            **{**_defaults(), **public, "remove_unused_columns": False, "label_names": ["labels"]}
        )
    except UNUSABLE as error:
        raise _unusable(config, error) from error
    _demand_processes(arguments)
    if problems := [*argument_problems(arguments), *_problems(config, arguments)]:
        told = listed([f"{place_of_setting(config, f'training.{first_word(text)}')}{text}" for text in problems])
        raise UserError(f"these training arguments cannot be used:{told}")
    folder, revision = local_folder(config.pivot, config.pivot_revision, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.pivot, config.trust_remote_code)
    stores = _stores(config, tokenizer)
    dtype = _output_dtype(config, folder)
    return Inputs(config, arguments, folder, revision, tokenizer, _dialogues(config, stores), stores, dtype)


def _problems(config: TrainConfig, arguments: TrainingArguments) -> Iterator[str]:
    """Arguments that do not go with the rest of the config or with the machine, or train nothing."""
    if config.training.get("output_dir") is None:
        yield "`training` names no output_dir, the folder of the target"
    if config.load_in and config.lora is None:
        yield f"`load_in: {config.load_in}` needs `lora`: quantised weights themselves cannot be trained"
    for name in ("eval_strategy", "eval_on_start"):
        if getattr(arguments, name) not in ("no", False) and not config.held_out:
            yield f"`{name}` needs rows to evaluate on; set `held_out`, for instance to 0.02"
    if arguments.fp16 and arguments.device.type == "cpu":
        yield "fp16 needs a GPU; on a CPU leave it out, or set bf16"
    if not 0 < arguments.learning_rate < math.inf:
        yield f"learning_rate: {arguments.learning_rate} trains nothing; set it above 0"
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        yield f"max_steps: {arguments.max_steps} trains nothing; set it above 0, or leave it out"
    if arguments.max_steps == -1 and not 0 < arguments.num_train_epochs < math.inf:
        yield f"num_train_epochs: {arguments.num_train_epochs} cannot be trained; set a number"


def _unusable(config: TrainConfig, error: Exception) -> UserError:
    """An error of transformers or torch about the arguments, with the line of the one that it is about."""
    reason = reason_of(error)
    plain = reason.lower().replace("_", " ")
    named = [name for name in config.training if re.search(rf"\b{name.lower().replace('_', ' ')}\b", plain)]
    texts = {name: value for name, value in config.training.items() if isinstance(value, str) and len(value) > 2}
    valued = [name for name, text in texts.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reason)]
    name = next(iter(named or valued), None)
    place = place_of_setting(config, f"training.{name}" if name else "training")
    return UserError(f"{place}the training arguments cannot be used: {f'`{name}`: ' if name else ''}{reason}")


def _output_dtype(config: TrainConfig, folder: Path) -> str:
    """The dtype of the target: the one asked for, that of the pivot's config, or of its first weights."""
    if config.output_dtype != "auto":
        return config.output_dtype
    name = resolved_dtype(folder, "auto", config.trust_remote_code)
    if name == "auto":
        with safe_open(weight_files(folder)[0], "pt") as file:
            name = str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _defaults() -> dict[str, Any]:
    fast = torch.accelerator.is_available()
    return {"report_to": "none", "dataloader_pin_memory": fast, "use_cpu": not fast}


def _demand_processes(arguments: TrainingArguments) -> None:
    """See that as many processes work together as were started, and that FSDP is used where it was asked for."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and arguments.world_size == 1:
        raise UserError(
            f"{started} processes were started, but each trains alone; on CPU set `use_cpu: true` in `training`"
        )
    state = arguments.distributed_state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or bool(arguments.fsdp)
    if wanted and state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate passes FSDP over on CPU, without a word


def _stores(config: TrainConfig, tokenizer: TextTokenizer) -> list[RepresentationStore]:
    """The pivot's own store, if it takes part, and the aligned ones."""
    if config.clm_weight == 1 and config.clm_weight_schedule != "soft":
        return []
    aligned = [RepresentationStore(folder) for folder in config.aligned_stores]
    if not aligned:
        raise UserError("`aligned_stores` names no store to fuse; for CLM alone set `clm_weight: 1`")
    if len({folder.resolve() for folder in config.aligned_stores}) < len(aligned):
        raise UserError("`aligned_stores` names a store twice")
    for store in aligned:
        if store.identity.get("kind") != ALIGNED:
            raise UserError(
                f"the store `{store.folder}` is not aligned to the pivot; run `fusion-trainer align` and give "
                "what it makes"
            )
    if config.pivot_store is None:
        raise UserError("`pivot_store` is not set: the pivot's own distributions take part in the fusion")
    own = [RepresentationStore(config.pivot_store)]
    common = {name: aligned[0].identity[name] for name in ("data", "top_k")}
    for store in [*own, *aligned]:
        store.demand(tokenizer=tokenizer.sha256, **common)
    for store in own:
        manifest = sha256_of(store.folder / "manifest.json")
        for other in aligned:
            other.demand(pivot_store=manifest)
    return [store.check() for store in (*own, *aligned)]


def _dialogues(config: TrainConfig, stores: Sequence[RepresentationStore]) -> Dialogues:
    if config.dialogues is not None:
        found = Dialogues(config.dialogues)
        for store in stores:
            store.demand(data=found.fingerprint)
        return found
    named = [*config.aligned_stores, *([config.pivot_store] if config.pivot_store else [])]
    known = stores or [RepresentationStore(folder) for folder in named]  # CLM alone still has their dialogues
    beside = (Dialogues.beside(store.folder, store.identity["data"]) for store in known)
    found_beside = next((one for one in beside if one is not None), None)
    if found_beside is None:
        raise UserError("no dialogues lie beside the stores; name them with `dialogues`")
    return found_beside


def _identity(inputs: Inputs) -> dict[str, Any]:
    """What the target is of; the same for every part of one training."""
    config, own = inputs.config, [s for s in inputs.stores if s.identity.get("kind") != ALIGNED]
    weights = weights_fingerprint(inputs.folder, config.pivot)
    computed = config_fingerprint(inputs.folder, config.trust_remote_code)
    for store in own:
        store.demand(weights=weights, config=computed)
    settings = config.model_dump(mode="json", exclude={"training", "pivot", "pivot_revision", "dialogues"})
    return {
        "format": FORMAT,
        "version": VERSION,
        "pivot": {
            "model": config.pivot,
            "revision": inputs.revision,
            "weights": weights,
            "config": computed,
            "tokenizer": inputs.tokenizer.sha256,
        },
        "dialogues": inputs.dialogues.fingerprint,
        "stores": [described_arguments(store) for store in inputs.stores],
        "config": {key: value for key, value in settings.items() if not key.endswith(("store", "stores"))},
        "training": {name: value for name, value in config.training.items() if not name.endswith("_token")},
        "mixed_precision": _mixed_precision(inputs.arguments),
        "processes": inputs.arguments.world_size,
        "versions": {
            name: version(name) for name in ("varm-merge", "transformers", "accelerate", "torch", "peft")
        },
    }


def _mixed_precision(arguments: TrainingArguments) -> str:
    """As the Trainer will set it, or accelerate's config."""
    asked = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else ""
    return asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _trainer(inputs: Inputs, tokens: Path) -> FusionTrainer:
    config, arguments = inputs.config, inputs.arguments
    file = TokenFile(tokens)
    lengths = file.lengths
    learned, held_out = _split(inputs.dialogues, config.held_out)
    for blocks, what in ((learned, "learn from"), (held_out, "evaluate on")):
        if (blocks or blocks is learned) and not any(len(file[block].positions) for block in blocks):
            raise UserError(f"no row has a token of an answer to {what}; see the report of `prepare`")
    rule = Rule(config.fusion, config.compare, config.unit, config.temperature, config.tail)

    def data(blocks: Sequence[int]) -> FusionData:
        if not config.packing:
            return FusionData(tokens, inputs.stores, rule, [[block] for block in blocks])
        rows = pack([int(lengths[block]) for block in blocks], int(lengths.max()))
        return FusionData(tokens, inputs.stores, rule, [[blocks[item] for item in row] for row in rows])

    model = loaded(inputs, config.dtype, config.load_in)
    if config.lora is not None:
        model = with_adapters(model, config)
    kernels = str(getattr(model.config, "_attn_implementation", ""))
    reader = inputs.tokenizer.tokenizer
    padding = next((i for i in (reader.pad_token_id, reader.eos_token_id) if i is not None), 0)
    dialogues = inputs.dialogues
    try:
        return FusionTrainer(
            model,
            arguments,
            data(learned),
            data(held_out) if held_out else None,
            Collator(padding, config.packing, config.packing and "flash" in kernels, config.tail == "bucket"),
            clm_weight=config.clm_weight,
            schedule=config.clm_weight_schedule,
            models=_names(inputs.stores),
            name_block=lambda block: f"block {block}: {dialogues[block].conversation} ({dialogues[block].source})",
            tokenizer=reader,
        )
    except UserError:
        raise
    except UNUSABLE as error:
        raise _unusable(config, error) from error


def _names(stores: Sequence[RepresentationStore]) -> list[str]:
    """Short names of the models fused, each once."""
    names: list[str] = []
    for store in stores:
        name = "pivot" if store.identity.get("kind") != ALIGNED else Path(store.identity["model"]).name
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _split(dialogues: Dialogues, share: float) -> tuple[list[int], list[int]]:
    """Blocks to learn from and blocks held out, by their conversations' names: the same for every target.

    Raises:
        UserError: One of the two would be empty.
    """
    if not share:
        return list(range(len(dialogues))), []
    parts: tuple[list[int], list[int]] = [], []
    for block in range(len(dialogues)):
        digest = hashlib.sha256(dialogues[block].conversation.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(block)
    if not all(parts):
        raise UserError(f"held_out: {share} leaves no rows to {'evaluate on' if parts[0] else 'learn from'}")
    return parts
