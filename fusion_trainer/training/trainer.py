"""``transformers.Trainer`` with the fusion loss; everything else works as its users know it.

It changes the loss (``loss``), which is a mean over all supervised tokens of an accumulated batch in all
processes; the logs, which show both terms; the evaluation, which is per token and per byte; the order of the
rows; and the checkpoints, which appear only when they are complete.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from fusion_trainer.representations.split_model import SplitModel, context_length
from fusion_trainer.training.batches import Collator, FusionData
from fusion_trainer.training.divergences import Divergence
from fusion_trainer.training.likelihoods import Chunks
from fusion_trainer.training.loss import Targets, give_fusion_loss
from varm_common.errors import UserError, listed
from varm_common.files import TEMPORARY, sync_folder, sync_tree

__all__ = ["FusionTrainer", "Schedule", "argument_problems", "last_checkpoint", "when_run_again"]

Schedule = Literal["constant", "hard_and_decay", "soft"]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
WRITING = f"checkpoint{TEMPORARY}"
"""The folder in which a checkpoint is written before it gets its name."""
PROBE_TOKENS = 8
METRICS = ("loss", "clm", "fusion", "perplexity_per_byte")
"""Results of an evaluation, logged with the prefix ``eval_``."""
STRATEGIES = ("group_by_length", "random", "sequential")


class FusionTrainer(Trainer):  # type: ignore[misc]
    """Trains a causal language model on λ·CLM + (1 − λ)·fusion.

    Args:
        model: A model of transformers, with or without peft adapters. Its forward is changed to return the loss.
        clm_weight: λ.
        divergence: Of the fusion term; None for forward KL. Any other needs a collator with ``tail``.
        alm_weight: Share of likelihood matching in the fusion term; needs data with chunks.
        alm_temperature: Its τ.
        schedule: ``constant``; ``hard_and_decay``: from λ linearly to 1 (FuseLLM's published options, in which the
            fusion term fades out); ``soft``: 1 − exp(−CE) of the fused distribution, position by position.
        models: Names of the fused models, for the logs.
        longest: Tokens of the longest block.
        name_block: The name of a block in messages.
        tokenizer: Saved with each checkpoint.

    Raises:
        UserError: An argument of transformers would change what is trained, or the model cannot be split.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: FusionData,
        eval_dataset: FusionData | None,
        collator: Collator,
        *,
        clm_weight: float = 0.9,
        divergence: Divergence | None = None,
        alm_weight: float = 0.0,
        alm_temperature: float = 100.0,
        schedule: Schedule = "constant",
        models: Sequence[str] = (),
        longest: int = 1,
        name_block: Callable[[int], str] = str,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        if problems := argument_problems(args):
            raise UserError(f"these training arguments cannot be used:{listed(problems)}")
        _teach(model.get_base_model() if hasattr(model, "get_base_model") else model, collator.packed, longest)
        own = {"processing_class": tokenizer, "compute_metrics": self._metrics}
        super().__init__(model, args, collator, train_dataset, eval_dataset, **own, **others)
        self.model_accepts_loss_kwargs = True  # transformers then counts the tokens of the whole accumulated batch
        self.loss_is_scaled_for_ga = True
        self.clm_weight, self.divergence, self.schedule = clm_weight, divergence, schedule
        self.alm_weight, self.alm_temperature = alm_weight, alm_temperature
        self.fused_models, self.name_block = list(models), name_block
        self.has_begun = False
        self._sums: dict[str, Tensor] = {}
        self._blocks_of_update: list[int] = []
        self._writing = False

    # The loss

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, divided by the supervised tokens of this update in all batches and processes.

        Raises:
            UserError: It is NaN or infinite.
        """
        norms = bool(model.training) and (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0
        count = torch.as_tensor(len(inputs["gold"]) if num_items_in_batch is None else num_items_in_batch)
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes  # gradients are averaged
        targets = self._targets(inputs, processes / count.clamp(min=1), norms)
        outputs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, targets=targets)
        loss = outputs["loss"].float()
        assert targets.loss is not None
        loss = loss + (targets.loss - loss.detach())  # mixed precision may have rounded what the model returns
        if model.training:
            if not torch.isfinite(loss):
                raise UserError(self._not_finite(inputs, targets))
            self._blocks_of_update += inputs["blocks"].tolist()
            self._add_to_sums(inputs, targets)
            self.has_begun = True
        return (loss, outputs) if return_outputs else loss

    def _targets(self, inputs: Mapping[str, Tensor], scale: Tensor | float, norms: bool = False) -> Targets:
        return Targets(
            positions=inputs["positions"],
            gold=inputs["gold"],
            ids=inputs["fused_ids"],
            probabilities=inputs["fused_probabilities"],
            tail=inputs.get("fused_tail"),
            clm_weight=self._clm_weights(inputs),
            divergence=self.divergence,
            chunks=Chunks.of(inputs),
            alm_weight=self.alm_weight,
            alm_temperature=self.alm_temperature,
            scale=scale,
            norms=norms,
        )

    def _clm_weights(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """λ at each position; 1 where nothing is fused."""
        if self.schedule == "soft":
            weights = 1 - inputs["confidence"]
        else:
            done = self.state.global_step / max(1, self.state.max_steps) if self.schedule != "constant" else 0.0
            weights = torch.full_like(inputs["confidence"], self.clm_weight + (1 - self.clm_weight) * done)
        if not inputs["fused_ids"].shape[1]:
            return torch.ones_like(weights)
        return torch.where(inputs["fused_probabilities"].any(1), weights, 1.0)

    def _not_finite(self, inputs: Mapping[str, Tensor], targets: Targets) -> str:
        assert targets.terms is not None
        wrong = ~torch.isfinite(targets.weighted(targets.terms))
        items = inputs["of_item"][wrong] if wrong.any() else inputs["item_of_block"]
        blocks = inputs["blocks"][torch.isin(inputs["item_of_block"], items)].tolist()
        return self._stopped("loss", blocks)

    def _stopped(self, what: str, blocks: Sequence[int]) -> str:
        """Why the training stops."""
        state = "weights are not finite" if self._is_broken() else "weights are finite: look at these rows"
        return (
            f"the {what} is NaN or infinite in step {self.state.global_step + 1} (the model's {state}; a smaller "
            f"learning_rate or max_grad_norm may help). Nothing of this step was kept. The batch's rows:"
            f"{listed([self.name_block(block) for block in blocks if block >= 0])}"
        )

    def _is_broken(self) -> bool:
        """Whether weights of this process are not finite. Other processes may not be here to ask."""
        weights = (
            getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters()
        )
        return any(not bool(torch.isfinite(weight).all()) for weight in weights)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of an update's gradients, before the update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        blocks, self._blocks_of_update = self._blocks_of_update, []
        # a loss scaler skips such an update itself
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise UserError(self._stopped("gradients' norm", blocks))
        return norm

    # Logs

    def _add_to_sums(self, inputs: Mapping[str, Tensor], targets: Targets) -> None:
        """Add a batch to the sums over positions since the last log."""
        terms = targets.terms
        assert terms is not None
        shares = torch.zeros(len(self.fused_models), device=targets.gold.device)  # also where nothing is fused
        shares[: inputs["shares"].shape[1]] = inputs["shares"].sum(0)[: len(shares)]
        positions = torch.full((), float(len(targets.gold)), device=targets.gold.device)
        sums = {"positions": positions, "clm_weight": targets.clm_weight.sum(), "shares": shares}
        sums |= {"clm": terms.clm.sum(), "fusion": terms.fusion.sum(), "squares": terms.squares.sum(0)}
        if self.alm_weight:  # in every process, also where a batch has no chunk
            sums["alm"] = sums["clm"].new_zeros(()) if terms.alm is None else terms.alm.sum()
        for name, number in sums.items():
            self._sums[name] = self._sums[name] + number.double() if name in self._sums else number.double()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with both terms and the models' shares since the last log."""
        if "loss" in logs and self._sums:
            sums = {name: number.tolist() for name, number in self.accelerator.reduce(self._sums, "sum").items()}
            self._sums = {}
            positions = max(1.0, sums["positions"])
            means = ("clm", "fusion", "clm_weight", "alm")
            logs |= {name: sums[name] / positions for name in means if name in sums}
            logs["supervised_tokens"] = sums["positions"]
            clm_square, fusion_square = sums["squares"]
            if clm_square:
                logs["gradient_norm_ratio"] = (fusion_square / clm_square) ** 0.5
            for name, share in zip(self.fused_models, sums["shares"], strict=True):
                logs[f"share/{name}"] = share / positions
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(self, model: Any, inputs: Mapping[str, Any], *_: Any, **__: Any) -> tuple[Any, ...]:
        """Sums over each item of a batch, so that items that only fill up the last batch can be left out."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            targets = self._targets(inputs, 1.0)
            model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, targets=targets)
        terms = targets.terms
        assert terms is not None
        loss = targets.weighted(terms)
        alm = torch.zeros_like(loss) if terms.alm is None else terms.alm
        columns = torch.stack([loss, terms.clm, terms.fusion, torch.ones_like(loss), alm], 1).double()
        sums = columns.new_zeros(len(inputs["bytes"]), 5).index_add_(0, inputs["of_item"], columns)
        return None, sums, inputs["bytes"]

    def _metrics(self, sums: EvalPrediction) -> dict[str, float]:
        """Mean losses per supervised token, and CLM's perplexity per byte."""
        loss, clm, fusion, tokens, alm = torch.as_tensor(sums.predictions).double().sum(0).tolist()
        size = float(torch.as_tensor(sums.label_ids).sum())
        metrics = {"loss": loss / tokens, "clm": clm / tokens, "fusion": fusion / tokens}
        if self.alm_weight:
            metrics["alm"] = alm / tokens
        metrics["perplexity_per_byte"] = float(torch.tensor(clm / size, dtype=torch.float64).exp())
        if not all(map(math.isfinite, metrics.values())):
            state = "not finite" if self._is_broken() else "finite: look at the held-out rows"
            raise UserError(
                f"the loss on the held-out rows is NaN or infinite after step {self.state.global_step} (the "
                f"model's weights are {state})"
            )
        return metrics

    # Order of the rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int | None]:
        data = train_dataset if train_dataset is not None else self.train_dataset
        return _Order(data, self.args, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return SequentialSampler(eval_dataset)

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        """One epoch; none after the last step, where transformers would train one step more when it resumes."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **named)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of the checkpoints, or the one in which a checkpoint is being written."""
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, WRITING) if self._writing else folder  # noqa: PTH118

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name, and rename it once all of it is on the disk."""
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._writing = True
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
            raise UserError(
                f"the checkpoint `{folder / name}` cannot be written: {error}.\nFix that and run the same command "
                f"again: {when_run_again(folder)}"
            ) from error
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        if self.args.should_save:
            self.state.save_to_json(str(folder / WRITING / name / "trainer_state.json"))
            sync_tree(folder / WRITING / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / WRITING / name).rename(folder / name)
            (folder / WRITING).rmdir()
            sync_folder(folder)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()


class _Order(Sampler[int | None]):
    """The items of an epoch, in an order that depends only on seed and epoch: the same in all processes.

    Each process takes whole batches. ``None``, an item without supervised positions, fills up the last of them.
    """

    def __init__(self, data: FusionData, args: TrainingArguments, epoch: Callable[[], int]) -> None:
        self.data, self.args, self.epoch = data, args, epoch
        shared = args.world_size > 1 and not args.dataloader_drop_last
        self.filler = -len(data) % (args.train_batch_size * args.world_size) if shared else 0

    def __len__(self) -> int:
        return len(self.data) + self.filler

    def __iter__(self) -> Iterator[int | None]:
        args, order = self.args, list(range(len(self.data)))
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(seed + self.epoch())
        if args.train_sampling_strategy == "group_by_length":
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            order = get_length_grouped_indices(self.data.lengths, size, generator=generator)
        elif args.train_sampling_strategy != "sequential":
            order = torch.randperm(len(order), generator=generator).tolist()
        return iter([*order, *[None] * self.filler])


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a training's folder."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(last) if last else None


def when_run_again(folder: Path) -> str:
    """The last part of an error message: the effect of running the same command again."""
    last = last_checkpoint(folder)
    return f"it resumes from `{last}`" if last else "it trains again, since there is no checkpoint (save_strategy)"


def _teach(model: Any, packed: bool, longest: int) -> None:
    """Give a model the fusion loss, once it is known to work with it."""
    split = SplitModel(model)
    if not is_deepspeed_zero3_enabled() and split.device.type != "meta":  # weights that can be used now
        training, kernels = model.training, str(getattr(model.config, "_attn_implementation", ""))
        needs_gpu = "flash" in kernels and split.device.type == "cpu"
        model.eval()
        if needs_gpu:
            model.set_attn_implementation("eager")
        _demand_usable(split, packed, longest)
        if needs_gpu:
            model.set_attn_implementation(kernels)
        model.train(training)
    give_fusion_loss(model)


def _demand_usable(split: SplitModel, packed: bool, longest: int) -> None:
    name = type(split.model).__name__
    if not split.trial()[1]:
        raise UserError(
            f"{name} does not give its logits from its layers' output alone; such models cannot be trained here"
        )
    if packed and not _keeps_apart(split):
        raise UserError(
            f"{name} does not keep packed conversations apart (its attention does not look at position_ids); "
            "leave `packing` off, or try another `attention`"
        )
    if not _has_position(split, longest - 1):
        raise UserError(
            f"{name} has no position for all {longest} tokens of the longest block (its context is "
            f"{context_length(split.model)}); prepare the dialogues with a smaller max_length"
        )


@torch.no_grad()
def _has_position(split: SplitModel, position: int) -> bool:
    """Whether the model can read a token there: models that learn positions have a number of them."""
    ids_BL = torch.zeros(1, 1, dtype=torch.long, device=split.device)
    try:
        split.hidden(input_ids=ids_BL, position_ids=ids_BL + position)
    except (IndexError, RuntimeError):
        return False
    except TypeError:  # it takes no position_ids
        return True
    return True


@torch.no_grad()
def _keeps_apart(split: SplitModel) -> bool:
    """Whether the second of two packed texts is read as if it stood alone."""
    rows = split.model.get_input_embeddings().weight.shape[0]
    ids_BL = torch.arange(2 * PROBE_TOKENS, device=split.device)[None] % rows
    places_BL = torch.arange(PROBE_TOKENS, device=split.device).repeat(2)[None]
    together = split.hidden(input_ids=ids_BL, position_ids=places_BL)[0, PROBE_TOKENS:]
    alone = split.hidden(input_ids=ids_BL[:, PROBE_TOKENS:], position_ids=places_BL[:, :PROBE_TOKENS])[0]
    scale = float(alone.float().abs().max().clamp(min=1e-6))
    return torch.allclose(together.float(), alone.float(), rtol=0.0, atol=1e-2 * scale)


def argument_problems(args: TrainingArguments) -> list[str]:
    """Arguments that would change what is trained, or do nothing: a sentence on each, its name first."""
    accelerator: Any = args.accelerator_config
    uneven = accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    by_process = not args.average_tokens_across_devices
    full_eval = args.bf16_full_eval or args.fp16_full_eval
    no_best = args.load_best_model_at_end and args.eval_strategy == "no"
    apart = not args.eval_do_concat_batches
    order, to_hub = args.train_sampling_strategy, args.push_to_hub
    checks = {
        "one process sees several GPUs: start with `accelerate launch -m fusion_trainer train …`": args.n_gpu > 1,
        "label_smoothing_factor is not part of the fusion loss; leave it at 0": args.label_smoothing_factor,
        "average_tokens_across_devices: false would weigh tokens by process; leave it true": by_process,
        "prediction_loss_only would leave out the metrics; leave it false": args.prediction_loss_only,
        "use_liger_kernel would replace the fusion loss by its own; leave it false": args.use_liger_kernel,
        "auto_find_batch_size would restart with other batches; set the batch size": args.auto_find_batch_size,
        "ignore_data_skip would train on rows that were seen before; leave it false": args.ignore_data_skip,
        "batch_eval_metrics would average over batches instead of tokens; leave it false": args.batch_eval_metrics,
        "bf16_full_eval and fp16_full_eval would round the weights before they are written": full_eval,
        "eval_do_concat_batches: false would keep the sums of batches apart; leave it true": apart,
        "accelerator_config: split_batches, dispatch_batches and even_batches stay as they are": uneven,
        f"metric_for_best_model: there is no {best}; there are {', '.join(METRICS)}": best not in METRICS,
        "push_to_hub: upload the finished target, `hf upload NAME OUTPUT_DIR --exclude 'checkpoint-*'`": to_hub,
        f"train_sampling_strategy: use {', '.join(STRATEGIES)}": order not in STRATEGIES,
        "load_best_model_at_end finds no best model without eval_strategy": no_best,
    }
    return [problem for problem, is_wrong in checks.items() if is_wrong]
