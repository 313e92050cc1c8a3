"""Train a target: the pivot, fine-tuned on the fused distributions of itself and its sources.

The record of a training (pivot, stores, settings) is written first, so that it is never resumed as another one.
Then come checkpoints, and at last the target with ``fusion.json``, which tells a merge which pivot it was
trained from.
"""

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments, set_seed

from fusion_trainer.config import TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.training.batches import Collator, FusionData, TokenFile, pack, write_tokens
from fusion_trainer.training.divergences import divergence_named
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.inputs import Inputs, identity_of, load_pivot, open_inputs, place_of_setting, unusable
from fusion_trainer.training.target import FUSION, PLAN, demand_free, exclusive, finish_training, reserve_space
from fusion_trainer.training.trainer import FusionTrainer, last_checkpoint
from varm_common.checkpoints import file_tensors
from varm_common.errors import UserError, listed, reason_of
from varm_common.files import read_mapping, write_json, written_to

__all__ = ["train"]

CAUSED_BY_ARGUMENTS = (ValueError, TypeError, ImportError, OSError)
"""What the libraries raise about an argument while a training starts. Any other error keeps its traceback."""
REMOVE = "Remove that folder: the training resumes from the checkpoint before it, or begins again"


def train(config: TrainConfig) -> Path:
    """Train the target, resume its training, or find it finished.

    Returns:
        Its folder.

    Raises:
        UserError: The stores do not fit the pivot or each other, an argument cannot be used, the loss is not
            finite, no weight was changed, the disk is full, or another training uses the folder.
    """
    inputs = open_inputs(config)
    identity = identity_of(inputs)
    with ExitStack() as held:
        with inputs.arguments.main_process_first(desc="prepare the output folder"):
            if inputs.arguments.should_save:
                demand_free(inputs.output, identity)
                held.enter_context(exclusive(inputs.output))
            tokens = write_tokens(inputs.dialogues, inputs.tokenizer)
        is_finished, last = _progress(inputs)
        if is_finished:
            PartialState().destroy_process_group()
        else:
            _train(inputs, identity, tokens, last)
    return inputs.output


def _progress(inputs: Inputs) -> tuple[bool, str | None]:
    """Whether the target is finished, and the checkpoint to resume from; the same in all processes."""
    wanted = inputs.config.training.get("resume_from_checkpoint")
    last = str(checkpoint) if (checkpoint := last_checkpoint(inputs.output)) else None
    if wanted is False and last:
        raise UserError(
            f"resume_from_checkpoint is false, but the checkpoint `{last}` exists; remove it to start over"
        )
    if isinstance(wanted, str):
        if not Path(wanted).is_dir():
            place = place_of_setting(inputs.config, "training.resume_from_checkpoint")
            raise UserError(f"{place}resume_from_checkpoint: there is no checkpoint `{wanted}`")
        last = wanted
    here = (inputs.output / FUSION).is_file(), last
    everywhere = gather_object([here])
    if any(other != here for other in everywhere):
        lines = [f"process {rank}: {seen[1] or 'none'}" for rank, seen in enumerate(everywhere)]
        raise UserError(
            f"the processes see different checkpoints in `{inputs.output}`:{listed(lines)}\n"
            "output_dir has to be one folder that all machines share"
        )
    return here


def _train(inputs: Inputs, identity: dict[str, Any], tokens: Path, last: str | None) -> None:
    with ExitStack() as held:
        if inputs.arguments.should_save:
            held.enter_context(reserve_space(inputs))
        trainer = _trainer(inputs, tokens)
        if inputs.arguments.should_save:  # not before all settings are known to work
            with written_to(inputs.output):
                write_json(inputs.output / PLAN, identity)
        if last is not None:
            _demand_whole(Path(last))
        _learn(inputs.config, trainer, last)
        results = trainer.evaluate() if trainer.eval_dataset is not None else {}
        held.close()  # frees the reserved space
        finish_training(inputs, trainer, {**identity, "results": results})
        trainer.end()


def _demand_whole(checkpoint: Path) -> None:
    """Check that a checkpoint can be read and has its optimizer, without which the result would differ."""
    try:
        read_mapping(checkpoint / "trainer_state.json")
        for path in checkpoint.glob("*.safetensors"):
            list(file_tensors(path))
    except ValueError as error:
        raise UserError(f"the training cannot resume from `{checkpoint}`: {error}. {REMOVE}") from error
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        raise UserError(
            f"the training cannot resume from `{checkpoint}`: it has no state of the optimizer (save_only_model). "
            f"{REMOVE}"
        )


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
    except Exception as error:
        if trainer.has_begun and not isinstance(error, OSError):
            raise  # no setting causes this
        if trainer.has_begun:
            raise UserError(f"the training stopped: {reason_of(error)}. Run the same command again") from error
        if last is not None:
            raise UserError(f"the training cannot resume from `{last}`: {reason_of(error)}. {REMOVE}") from error
        if not isinstance(error, CAUSED_BY_ARGUMENTS):
            raise
        raise unusable(config, error) from error


def _trainer(inputs: Inputs, tokens: Path) -> FusionTrainer:
    config, dialogues = inputs.config, inputs.dialogues
    file = TokenFile(tokens)
    learned, held_out = _split(dialogues, config.held_out)
    for blocks, purpose in ((learned, "learn from"), (held_out, "evaluate on")):
        if (blocks or blocks is learned) and not any(len(file[block].positions) for block in blocks):
            raise UserError(f"no row has a token of an answer to {purpose}; see the report of `prepare`")
    rule = Rule(config.fusion, config.compare, config.unit, config.temperature, config.tail)

    def data(blocks: Sequence[int]) -> FusionData:
        groups = [[block] for block in blocks]
        if config.packing:
            rows = pack([int(file.lengths[block]) for block in blocks], int(file.lengths.max()))
            groups = [[blocks[item] for item in row] for row in rows]
        return FusionData(tokens, inputs.stores, rule, groups, chunks=config.alm_weight > 0)

    model = load_pivot(inputs, config.dtype, config.load_in)
    if config.lora is not None:
        model = _with_adapters(model, config)
    flat = config.packing and "flash" in str(getattr(model.config, "_attn_implementation", ""))
    try:
        return FusionTrainer(
            model,
            inputs.arguments,
            data(learned),
            data(held_out) if held_out else None,
            Collator(0, config.packing, flat, config.tail == "bucket"),
            clm_weight=config.clm_weight,
            divergence=divergence_named(config.divergence, config.js_beta),
            alm_weight=config.alm_weight,
            alm_temperature=config.alm_temperature,
            schedule=config.clm_weight_schedule,
            models=_names(inputs.stores),
            longest=int(file.lengths.max()),
            name_block=lambda block: f"block {block}: {dialogues[block].conversation} ({dialogues[block].source})",
            tokenizer=inputs.tokenizer.tokenizer,
        )
    except UserError:
        raise
    except (*CAUSED_BY_ARGUMENTS, RuntimeError) as error:  # RuntimeError: a program of report_to is missing
        raise unusable(config, error) from error


def _with_adapters(model: Any, config: TrainConfig) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in:
        # on CPUs bitsandbytes repacks evaluated weights, which ends their gradients
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=bool(config.training.get("gradient_checkpointing"))
        )
    set_seed(config.training.get("seed", TrainingArguments.seed))  # new adapters are random
    cannot = f"{place_of_setting(config, 'lora')}`lora` cannot be used"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*merging LoRA weights won't be possible")
            adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **(config.lora or {})}))
    except Exception as error:  # only peft's code has run
        raise UserError(f"{cannot}: {reason_of(error)}") from error
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, other = (_trained_in(model.get_submodule(name.rpartition(".")[0])) for name in pair)
        if one != other:
            raise UserError(
                f"{cannot}: the pivot has one tensor for `{pair[0]}` and `{pair[1]}`, and these adapters would "
                "make two of it. Leave both out of `target_modules`; to train them, name one in `modules_to_save` "
                "and set `ensure_weight_tying: true`"
            )
    return adapted


def _trained_in(module: Any) -> dict[str, int]:
    """Where the trained parameters of a module are in memory."""
    return {name: weight.data_ptr() for name, weight in module.named_parameters() if weight.requires_grad}


def _names(stores: Sequence[RepresentationStore]) -> list[str]:
    """Short names of the fused models, all different."""
    names: list[str] = []
    for store in stores:
        name = Path(store.identity["model"]).name if store.aligned else "pivot"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _split(dialogues: Dialogues, share: float) -> tuple[list[int], list[int]]:
    """Blocks to learn from and blocks held out, by the hash of the conversation's name: equal for every target."""
    if not share:
        return list(range(len(dialogues))), []
    parts: tuple[list[int], list[int]] = [], []
    for block in range(len(dialogues)):
        digest = hashlib.sha256(dialogues[block].conversation.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(block)
    if not all(parts):
        raise UserError(f"held_out: {share} leaves no rows to {'evaluate on' if parts[0] else 'learn from'}")
    return parts
