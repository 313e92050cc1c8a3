"""A target: the pivot fine-tuned on distributions fused of its own and its sources'.

What a training is of (pivot, stores, settings) is written first, so that it only ever goes on as what it was; then
come checkpoints, and last the target with ``fusion.json``, which tells a merge what pivot it was trained from.
"""

import errno
import fcntl
import hashlib
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, TrainingArguments, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

from fusion_trainer.batches import Collator, FusionData, TokenFile, pack, write_tokens
from fusion_trainer.config import NOT_OF_THE_RESULT, TrainConfig
from fusion_trainer.dialogues import Dialogues
from fusion_trainer.errors import FusionError, listed, unlike
from fusion_trainer.files import (
    TEMPORARY,
    read_json,
    read_mapping,
    sha256_of,
    sync_folder,
    sync_tree,
    write_json,
    written_to,
)
from fusion_trainer.fusion import Rule
from fusion_trainer.models import (
    TOKENIZER_FILES,
    config_fingerprint,
    load_causal_lm,
    local_folder,
    resolved_dtype,
    weight_files,
    weights_fingerprint,
)
from fusion_trainer.representations.store import ALIGNED, RepresentationStore
from fusion_trainer.rounding import rounding
from fusion_trainer.tokens import TextTokenizer, load_tokenizer
from fusion_trainer.trainer import WRITING, FusionTrainer, argument_problems, last_checkpoint
from varm_common import checkpoints

__all__ = ["FUSION", "PLAN", "train"]

FUSION, PLAN = "fusion.json", "training.json"
FORMAT, VERSION = "fusion-trainer target", 1
RESULT = "target" + TEMPORARY
"""The folder in which the target is written before its files take their names."""
UNUSABLE = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What transformers and torch raise for arguments and checkpoints that they cannot use."""


@dataclass
class Inputs:
    """What a training is made of."""

    config: TrainConfig
    arguments: TrainingArguments
    folder: Path
    revision: str | None
    tokenizer: TextTokenizer
    dialogues: Dialogues
    stores: list[RepresentationStore]
    output_dtype: str

    @property
    def output(self) -> Path:
        return Path(self.arguments.output_dir)


def train(config: TrainConfig) -> Path:
    """Train the target that ``config`` asks for, or what of it is still missing.

    Returns:
        Its folder.

    Raises:
        FusionError: The stores do not fit the pivot or each other, an argument cannot be used, the loss is not
            finite, no weight was changed, the disk is full, or another training is at work in the folder.
    """
    inputs = _open(config)
    identity = _identity(inputs)
    with ExitStack() as held:
        with inputs.arguments.main_process_first(desc="prepare the output folder"):
            if inputs.arguments.should_save:
                with written_to(inputs.output):
                    held.enter_context(_alone(inputs.output))
                _demand_free(inputs.output, identity)
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
        raise FusionError(f"`{folder}` is a file; output_dir names the target's folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FusionError(
            f"another training is at work in `{folder}`; give another output_dir, or wait"
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _begun(inputs: Inputs) -> tuple[bool, str | None]:
    """Whether the target is made already, and the checkpoint to go on from: the same in all processes.

    Raises:
        FusionError: They see different ones, or the user wants none of those there are.
    """
    asked = inputs.config.training.get("resume_from_checkpoint")
    last = str(found) if (found := last_checkpoint(inputs.output)) else None
    if asked is False and last:
        raise FusionError(f"resume_from_checkpoint is false, and there is `{last}`; remove it to begin again")
    if isinstance(asked, str) and not Path(asked).is_dir():
        place = _place(inputs.config, "training.resume_from_checkpoint")
        raise FusionError(f"{place}resume_from_checkpoint: there is no checkpoint `{asked}`")
    here = (inputs.output / FUSION).is_file(), asked if isinstance(asked, str) else last
    seen = gather_object([here])
    if any(one != here for one in seen):
        told = listed([f"process {rank}: {one[1] or 'none'}" for rank, one in enumerate(seen)])
        raise FusionError(
            f"the processes see different checkpoints in `{inputs.output}`:{told}\n"
            "output_dir has to be one folder that all machines share"
        )
    return here


def _train(inputs: Inputs, identity: dict[str, Any], tokens: Path, last: str | None) -> None:
    with ExitStack() as held:
        reserved = held.enter_context(_reserved(inputs)) if inputs.arguments.should_save else None
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
        _finish(inputs, trainer, {**identity, "results": measured})
        trainer.end()


def _learn(config: TrainConfig, trainer: FusionTrainer, last: str | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=last)
    except torch.OutOfMemoryError as error:
        raise FusionError(
            f"out of memory: {error}\nTry gradient_checkpointing, a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, lora, or FSDP on several GPUs"
        ) from error
    except FusionError:
        raise
    except UNUSABLE as error:
        if trainer.has_begun and not isinstance(error, OSError):
            raise  # no setting's fault
        if trainer.has_begun:
            raise FusionError(f"the training stopped: {_reason(error)}. Run the same command again") from error
        if last is not None:
            raise FusionError(f"the training cannot go on from `{last}`: {_reason(error)}. {REMOVE}") from error
        raise _unusable(config, error) from error


SPARE = 1 << 16
"""Bytes of the target's other files, and of half-filled blocks."""
REMOVE = "Remove that folder: the training resumes from the checkpoint before it, or begins again"


@contextmanager
def _reserved(inputs: Inputs) -> Iterator[IO[bytes]]:
    """Disk space for the target, held by a file without a name until it is closed or the process ends.

    Raises:
        FusionError: There is too little: better known before the training than after it.
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
                raise FusionError(
                    f"`{inputs.output}` cannot be written: the target takes about {needed:,} bytes, and {free:,} "
                    f"are free ({error.strerror}). Make room or give another output_dir, then run the same "
                    "command again"
                ) from error
        yield file


def _demand_whole(checkpoint: Path) -> None:
    """A training resumes from a checkpoint that can be read, with its optimizer, or it would end elsewhere."""
    try:
        read_mapping(checkpoint / "trainer_state.json")
        for path in checkpoint.glob("*.safetensors"):
            list(checkpoints.file_tensors(path))
    except ValueError as error:
        raise FusionError(f"the training cannot go on from `{checkpoint}`: {error}. {REMOVE}") from error
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        raise FusionError(
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
        told = listed([f"{_place(config, f'training.{_first_word(text)}')}{text}" for text in problems])
        raise FusionError(f"these training arguments cannot be used:{told}")
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


def _unusable(config: TrainConfig, error: Exception) -> FusionError:
    """An error of transformers or torch about the arguments, with the line of the one that it is about."""
    reason = _reason(error)
    plain = reason.lower().replace("_", " ")
    named = [name for name in config.training if re.search(rf"\b{name.lower().replace('_', ' ')}\b", plain)]
    texts = {name: value for name, value in config.training.items() if isinstance(value, str) and len(value) > 2}
    valued = [name for name, text in texts.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reason)]
    name = next(iter(named or valued), None)
    place = _place(config, f"training.{name}" if name else "training")
    return FusionError(f"{place}the training arguments cannot be used: {f'`{name}`: ' if name else ''}{reason}")


def _first_word(text: str) -> str:
    word: str = re.findall(r"\w+", text)[0]
    return word


def _place(config: TrainConfig, name: str) -> str:
    """File and line at which a setting stands, to begin a sentence with; empty if it comes from no file."""
    places: Mapping[str, str] = getattr(config, "_places", {})
    found = places.get(name) or places.get(name.partition(".")[0])
    return f"{found}: " if found else ""


def _reason(error: Exception) -> str:
    """The error on one line; its kind as well, where its message may be a bare key or value."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


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
        raise FusionError(
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
        raise FusionError("`aligned_stores` names no store to fuse; for CLM alone set `clm_weight: 1`")
    if len({folder.resolve() for folder in config.aligned_stores}) < len(aligned):
        raise FusionError("`aligned_stores` names a store twice")
    for store in aligned:
        if store.identity.get("kind") != ALIGNED:
            raise FusionError(
                f"the store `{store.folder}` is not aligned to the pivot; run `fusion-trainer align` and give "
                "what it makes"
            )
    if config.pivot_store is None:
        raise FusionError("`pivot_store` is not set: the pivot's own distributions take part in the fusion")
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
        raise FusionError("no dialogues lie beside the stores; name them with `dialogues`")
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
        "stores": [_described(store) for store in inputs.stores],
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


def _described(store: RepresentationStore) -> dict[str, Any]:
    names = ("kind", "model", "revision", "positions", "map", "top_k")
    of_store = {name: store.identity[name] for name in names if store.identity.get(name) is not None}
    return {**of_store, "folder": str(store.folder), "sha256": sha256_of(store.folder / "manifest.json")}


def _fixed(identity: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the parts of a training, flat; an update's rows may be divided otherwise."""
    training = {k: v for k, v in identity["training"].items() if k not in NOT_OF_THE_RESULT}
    training |= {"mixed precision": identity.get("mixed_precision")}
    division = ("per_device_train_batch_size", "gradient_accumulation_steps")
    of_process = math.prod(training.pop(name, getattr(TrainingArguments, name)) for name in division)
    training["rows of an update"] = identity["processes"] * of_process
    pivot = {f"pivot's {key}": identity["pivot"][key] for key in ("weights", "config", "tokenizer")}
    stores = {f"store {number}": store["sha256"] for number, store in enumerate(identity["stores"])}
    both = {**identity["config"], **training}
    return {"dialogues": identity["dialogues"], **pivot, **stores, **both}


def _demand_free(output: Path, identity: dict[str, Any]) -> None:
    """See that the output folder holds nothing, or a part of this training; what was half-written is removed.

    Raises:
        FusionError: It holds something else.
    """
    with written_to(output):
        for name in (WRITING, RESULT):
            shutil.rmtree(output / name, ignore_errors=True)
        known = next((output / name for name in (FUSION, PLAN) if (output / name).is_file()), None)
        content = sorted(path.name for path in output.iterdir() if path.suffix != TEMPORARY)
        if known is None and content:
            raise FusionError(f"`{output}` holds something else ({', '.join(content[:3])}); give a new output_dir")
        if known is not None:
            _demand_same(output, identity, read_json(known), known.name == FUSION or bool(last_checkpoint(output)))


def _demand_same(output: Path, identity: dict[str, Any], found: Any, trained: bool) -> None:
    """``trained``: there is something that was trained with the settings found."""
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise FusionError(f"`{output}` holds something else; give a new output_dir")
    if not trained:
        return
    try:
        fixed = _fixed(found)
    except (AttributeError, LookupError, TypeError) as error:
        raise FusionError(
            f"the description of the training in `{output}` is damaged ({_reason(error)}); remove that folder, or "
            "give another output_dir"
        ) from error
    if difference := unlike(f"`{output}` is another training:", _fixed(identity), fixed):
        raise FusionError(f"{difference}\nGive another output_dir, or remove that folder.")


def _trainer(inputs: Inputs, tokens: Path) -> FusionTrainer:
    config, arguments = inputs.config, inputs.arguments
    file = TokenFile(tokens)
    lengths = file.lengths
    learned, held_out = _split(inputs.dialogues, config.held_out)
    for blocks, what in ((learned, "learn from"), (held_out, "evaluate on")):
        if (blocks or blocks is learned) and not any(len(file[block].positions) for block in blocks):
            raise FusionError(f"no row has a token of an answer to {what}; see the report of `prepare`")
    rule = Rule(config.fusion, config.compare, config.unit, config.temperature, config.tail)

    def data(blocks: Sequence[int]) -> FusionData:
        if not config.packing:
            return FusionData(tokens, inputs.stores, rule, [[block] for block in blocks])
        rows = pack([int(lengths[block]) for block in blocks], int(lengths.max()))
        return FusionData(tokens, inputs.stores, rule, [[blocks[item] for item in row] for row in rows])

    model = _loaded(inputs, config.dtype, config.load_in)
    if config.lora is not None:
        model = _with_adapters(model, config)
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
    except FusionError:
        raise
    except UNUSABLE as error:
        raise _unusable(config, error) from error


def _loaded(inputs: Inputs, dtype: str, load_in: str | None) -> Any:
    """The pivot, with generation settings that can be saved: transformers reads some that it refuses to write."""
    model = load_causal_lm(
        inputs.folder,
        inputs.config.pivot,
        dtype=dtype,
        attention=inputs.config.attention,
        device=inputs.arguments.device if load_in else torch.device("cpu"),  # else the Trainer places it
        device_map=None,
        load_in=load_in,
        trust_remote_code=inputs.config.trust_remote_code,
    )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


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
        FusionError: One of the two would be empty.
    """
    if not share:
        return list(range(len(dialogues))), []
    parts: tuple[list[int], list[int]] = [], []
    for block in range(len(dialogues)):
        digest = hashlib.sha256(dialogues[block].conversation.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(block)
    if not all(parts):
        raise FusionError(f"held_out: {share} leaves no rows to {'evaluate on' if parts[0] else 'learn from'}")
    return parts


def _with_adapters(model: Any, config: TrainConfig) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in:
        for module in model.modules():  # bitsandbytes repacks for CPUs what is once evaluated: no gradients then
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=bool(config.training.get("gradient_checkpointing"))
        )
    set_seed(config.training.get("seed", TrainingArguments.seed))  # new adapters are random
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **(config.lora or {})}))
    except UNUSABLE as error:
        raise FusionError(f"{_place(config, 'lora')}`lora` cannot be used: {_reason(error)}") from error


# The target


def _finish(inputs: Inputs, trainer: FusionTrainer, about: dict[str, Any]) -> None:
    """Write the target: its files take their names once all are on the disk, ``fusion.json`` last.

    Raises:
        FusionError: No weight differs from the pivot's, or the disk refuses.
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
        FusionError: None does.
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
        raise FusionError(
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

    model = _loaded(inputs, "float32", None)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
