"""``transformers.Trainer`` with the fusion loss: everything its users know works as they know it.

Ours are the loss (``loss``), its normalisation over all supervised tokens of an accumulated batch on all
processes, the logs of both terms, the evaluation per token and per byte, and checkpoints that appear whole or not
at all.
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

from fusion_trainer.representations.split_model import SplitModel
from fusion_trainer.training.batches import Collator, FusionData
from fusion_trainer.training.loss import Targets, give_fusion_loss
from varm_common.errors import UserError, listed
from varm_common.files import TEMPORARY, sync_folder, sync_tree

__all__ = ["FusionTrainer", "Schedule", "argument_problems", "last_checkpoint"]

Schedule = Literal["constant", "hard_and_decay", "soft"]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
WRITING = f"checkpoint{TEMPORARY}"
"""The folder in which a checkpoint is written before it takes its name."""
PROBE_TOKENS = 8
METRICS = ("loss", "clm", "fusion", "perplexity_per_byte")
"""Of an evaluation, under ``eval_``."""
SUMS = ("positions", "clm", "fusion", "clm_weight", "measured", "clm_square", "fusion_square")
"""What is summed over the supervised positions between two logs; the models' shares follow."""


class FusionTrainer(Trainer):  # type: ignore[misc]
    """Trains a causal language model on λ·CLM + (1 − λ)·fusion.

    Args:
        model: Of transformers, with or without peft adapters; its forward is taught to return the loss.
        args: Of transformers.
        train_dataset: A ``FusionData``.
        eval_dataset: Held-out rows, likewise.
        collator: Makes the batches.
        clm_weight: λ.
        schedule: ``constant``; ``hard_and_decay``: from λ linearly to 1 (FuseLLM's published options, which weaken
            the fusion term as training goes on); ``soft``: 1 − exp(−CE) of what is fused, position by position.
        models: Names of the models fused, for the logs.
        name_block: What a block is called in a message.
        tokenizer: Saved with each checkpoint.

    Raises:
        UserError: An argument of transformers would change what is trained, or the model's logits cannot be
            taken apart.
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
        schedule: Schedule = "constant",
        models: Sequence[str] = (),
        name_block: Callable[[int], str] = str,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        if problems := argument_problems(args):
            raise UserError(f"these training arguments cannot be used:{listed(problems)}")
        _teach(model.get_base_model() if hasattr(model, "get_base_model") else model, collator.packed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
            compute_metrics=self._metrics,
            **others,
        )
        self.model_accepts_loss_kwargs = True  # so that tokens are counted over the whole accumulated batch
        self.loss_is_scaled_for_ga = True
        self.clm_weight, self.schedule = clm_weight, schedule
        self.fused_models, self.name_block = list(models), name_block
        self._sums: Tensor | None = None
        self._blocks_of_update: list[int] = []
        self.has_begun = False

    # The loss

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, over the number of supervised tokens that take part in this update everywhere.

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
            self._add(inputs, targets)
            self.has_begun = True
        return (loss, outputs) if return_outputs else loss

    def _targets(self, inputs: Mapping[str, Tensor], scale: Tensor | float, norms: bool = False) -> Targets:
        return Targets(
            inputs["positions"],
            inputs["gold"],
            inputs["fused_ids"],
            inputs["fused_probabilities"],
            inputs.get("fused_tail"),
            self._clm_weights(inputs),
            scale,
            norms,
        )

    def _clm_weights(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """λ at each position; 1 where nothing is fused."""
        if self.schedule == "soft":
            weights = 1 - inputs["confidence"]
        else:
            done = self.state.global_step / max(1, self.state.max_steps) if self.schedule != "constant" else 0.0
            weights = torch.full_like(inputs["confidence"], self.clm_weight + (1 - self.clm_weight) * done)
        said = (
            inputs["fused_probabilities"].any(1) if inputs["fused_ids"].shape[1] else torch.zeros_like(weights) > 0
        )
        return torch.where(said, weights, 1.0)

    def _not_finite(self, inputs: Mapping[str, Tensor], targets: Targets) -> str:
        assert targets.terms is not None
        wrong = ~torch.isfinite(targets.terms.clm + targets.terms.fusion)
        items = inputs["of_item"][wrong] if wrong.any() else inputs["item_of_block"]
        blocks = inputs["blocks"][torch.isin(inputs["item_of_block"], items)].tolist()
        return self._stopped("loss", blocks)

    def _stopped(self, what: str, blocks: Sequence[int]) -> str:
        """Why the training stops."""
        broken = self._weights_are_broken()
        state = "weights are not finite" if broken else "weights are finite: look at these rows"
        return (
            f"the {what} is NaN or infinite in step {self.state.global_step + 1} (the model's {state}; a smaller "
            f"learning_rate or max_grad_norm may help). Nothing of this step was kept. The batch's rows:"
            f"{listed([self.name_block(block) for block in blocks if block >= 0])}"
        )

    def _weights_are_broken(self) -> bool:
        """Of this process's shards: the others may be elsewhere, and would not answer."""
        shards = (
            getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters()
        )
        return any(not bool(torch.isfinite(shard).all()) for shard in shards)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of an update's gradients, before the update.

        Raises:
            UserError: It is NaN or infinite, and no loss scaler is there to leave such an update out.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        blocks, self._blocks_of_update = self._blocks_of_update, []
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise UserError(self._stopped("gradients' norm", blocks))
        return norm

    # Logs

    def _add(self, inputs: Mapping[str, Tensor], targets: Targets) -> None:
        positions, terms = len(targets.gold), targets.terms
        assert terms is not None
        measured = torch.full((), float(targets.norms), device=targets.gold.device)
        shares = measured.new_zeros(len(self.fused_models))  # in all processes as many, also if nothing was fused
        shares[: inputs["shares"].shape[1]] = inputs["shares"].sum(0)[: len(shares)]
        found = [
            torch.full_like(measured, float(positions)),
            terms.clm.sum(),
            terms.fusion.sum(),
            targets.clm_weight.sum(),
            measured,
            *terms.squares.sum(0),
            *shares,
        ]
        sums = torch.stack([number.double() for number in found])
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with both terms and what was fused since the last log."""
        if "loss" in logs and self._sums is not None:
            sums, self._sums = self.accelerator.reduce(self._sums, "sum"), None
            logs |= self._averages(sums.tolist())
        super().log(logs, start_time)

    def _averages(self, sums: Sequence[float]) -> dict[str, float]:
        of = dict(zip(SUMS, sums, strict=False))
        positions = max(1.0, of["positions"])
        found = {name: of[name] / positions for name in ("clm", "fusion", "clm_weight")}
        found["supervised_tokens"] = of["positions"]
        if of["measured"] and of["clm_square"]:
            found["gradient_norm_ratio"] = (of["fusion_square"] / of["clm_square"]) ** 0.5
        shares = zip(self.fused_models, sums[len(SUMS) :], strict=False)
        return {**found, **{f"share/{name}": share / positions for name, share in shares}}

    # Evaluation

    def prediction_step(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over each item of a batch, so that those that fill up the last batch can be left out."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            targets = self._targets(inputs, 1.0)
            model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, targets=targets)
        terms = targets.terms
        assert terms is not None
        loss = targets.clm_weight * terms.clm + (1 - targets.clm_weight) * terms.fusion
        columns = torch.stack([loss, terms.clm, terms.fusion, torch.ones_like(loss)], 1).double()
        sums = columns.new_zeros(len(inputs["bytes"]), 4).index_add_(0, inputs["of_item"], columns)
        return None, sums, inputs["bytes"]

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        """Mean losses per supervised token; the perplexity per byte is that of CLM.

        Raises:
            UserError: One of them is NaN or infinite.
        """
        loss, clm, fusion, tokens = torch.as_tensor(found.predictions).double().sum(0).tolist()
        size = float(torch.as_tensor(found.label_ids).sum())
        means = {"loss": loss / tokens, "clm": clm / tokens, "fusion": fusion / tokens}
        means["perplexity_per_byte"] = float(torch.tensor(clm / size, dtype=torch.float64).exp())
        if not all(map(math.isfinite, means.values())):
            state = "not finite" if self._weights_are_broken() else "finite: look at the held-out rows"
            raise UserError(
                f"the loss on the held-out rows is NaN or infinite after step {self.state.global_step} (the "
                f"model's weights are {state})"
            )
        return means

    # Order of the data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int | None]:
        data = train_dataset if train_dataset is not None else self.train_dataset
        return _Order(data, self.args, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return SequentialSampler(eval_dataset)

    # Resuming

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        """One epoch; none if the checkpoint is of the last step, after which transformers would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **named)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are; while one is written, where it is written."""
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, WRITING) if self._writing else folder  # noqa: PTH118

    _writing = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name, which it changes once all of it is on the disk.

        Raises:
            UserError: It could not be written; the checkpoints before it are as they were.
        """
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            shutil.rmtree(folder / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._writing = True
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
            raise UserError(self._not_written(folder, name, error)) from error
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        else:
            self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(str(folder / WRITING / name / "trainer_state.json"))
            sync_tree(folder / WRITING / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / WRITING / name).rename(folder / name)
            (folder / WRITING).rmdir()
            sync_folder(folder)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _not_written(self, folder: Path, name: str, error: Exception) -> str:
        last = last_checkpoint(folder)
        kept = f"`{last}` is whole" if last else "there is none"
        return (
            f"the checkpoint `{folder / name}` cannot be written: {error}.\nOf those before it {kept}; once this "
            "is mended run the same command again: it goes on from there"
        )


class _Order(Sampler[int | None]):
    """The items of an epoch, in an order that seed and epoch alone decide: the same in all processes.

    Each process takes whole batches; ``None``, an item of which nothing is learned, fills the last of them up.
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
    """The last whole checkpoint in a training's folder."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def _teach(model: Any, packed: bool) -> None:
    split = SplitModel(model)
    if not is_deepspeed_zero3_enabled() and split.device.type != "meta":  # weights that can be tried
        training, kernels = model.training, str(getattr(model.config, "_attn_implementation", ""))
        needs_gpu = "flash" in kernels and split.device.type == "cpu"
        model.eval()
        if needs_gpu:
            model.set_attn_implementation("eager")
        _try(split, packed)
        if needs_gpu:
            model.set_attn_implementation(kernels)
        model.train(training)
    give_fusion_loss(model)


def _try(split: SplitModel, packed: bool) -> None:
    name = type(split.model).__name__
    if not split.trial()[1]:
        raise UserError(
            f"{name} does not give its logits from its layers' output alone; models like it cannot be trained "
            "here yet"
        )
    if packed and not _keeps_apart(split):
        raise UserError(
            f"{name} does not keep packed conversations apart (its attention does not look at position_ids); "
            "leave `packing` off, or try another `attention`"
        )


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
    problems = []
    if args.n_gpu > 1:
        problems.append("one process sees several GPUs: start with `accelerate launch -m fusion_trainer train …`")
    if args.label_smoothing_factor:
        problems.append("label_smoothing_factor is not part of the fusion loss; leave it at 0")
    if not args.average_tokens_across_devices:
        problems.append("average_tokens_across_devices: false would weigh tokens by process; leave it true")
    if args.prediction_loss_only:
        problems.append("prediction_loss_only would leave out the metrics; leave it false")
    if args.use_liger_kernel:
        problems.append("use_liger_kernel has a loss of its own, which would take the place of this one")
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size would begin again with other batches; set the size that fits")
    if args.ignore_data_skip:
        problems.append("ignore_data_skip would go on with rows that were seen before; leave it false")
    if args.batch_eval_metrics:
        problems.append("batch_eval_metrics would average over batches instead of tokens; leave it false")
    accelerator: Any = args.accelerator_config
    if accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches:
        problems.append("accelerator_config: split_batches, dispatch_batches and even_batches stay as they are")
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in METRICS:
        problems.append(f"metric_for_best_model: there is no {best}; there are {', '.join(METRICS)}")
    if args.push_to_hub:
        problems.append(
            "push_to_hub: upload the finished target, `hf upload NAME OUTPUT_DIR --exclude 'checkpoint-*'`"
        )
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        problems.append("train_sampling_strategy: use group_by_length, random or sequential")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        problems.append("load_best_model_at_end finds no best model without eval_strategy")
    return problems
