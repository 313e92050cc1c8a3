"""``FusionTrainer`` in this process: what a step learns, logs, evaluates, keeps and refuses."""

import errno
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import torch
from tiny_fusion import CHATS, World, far_apart, moved, weights
from transformers import Trainer, TrainingArguments

from fusion_trainer.training.batches import Collator, Example, TokenRow
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.trainer import WRITING, last_checkpoint
from varm_common.errors import UserError

IN_ORDER = {"train_sampling_strategy": "sequential"}
GRADIENTS = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, **IN_ORDER}
"""Updates are the gradients themselves."""
LENGTHS = [0, 2, 1, 11, 4, 6, 17, 12]
"""Blocks of 47, 169, 13, 23, 65, 169, 19 and 137 supervised tokens."""


@dataclass
class Recorded(Collator):
    """Keeps the batches it has made."""

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __call__(self, items: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
        self.batches.append(super().__call__(items))
        return self.batches[-1]


def trained(world: World, output: Path, *given: Any, **changed: Any) -> dict[str, torch.Tensor]:
    """How far the weights have moved."""
    trainer = world.trainer(output, *given, **changed)
    trainer.train()
    return moved(trainer.model, world.model())


def logged(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


@dataclass
class Dense:
    """Both terms of a batch and their gradients in the logits, float64 and dense."""

    clm: torch.Tensor
    fusion: torch.Tensor
    ratio: float

    @staticmethod
    @torch.no_grad()
    def of(model: Any, *batches: dict[str, torch.Tensor]) -> "Dense":
        terms, squares = [], torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model.double()(**inputs).logits.flatten(0, 1)[batch["positions"]]
            fused = torch.zeros_like(logits).scatter_add(
                1, batch["fused_ids"], batch["fused_probabilities"].double()
            )
            gold = torch.nn.functional.one_hot(batch["gold"], logits.shape[1])
            terms.append(torch.stack([-(target * logits.log_softmax(1)).sum(1) for target in (gold, fused)]))
            student = logits.softmax(1)
            for number, target in enumerate((gold, fused)):
                squares[number] += (student * target.sum(1, keepdim=True) - target).square().sum()
        return Dense(*torch.cat(terms, 1), ratio=float(squares[1] / squares[0]) ** 0.5)


# The loss, over all tokens of an update


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulated"), [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulated_batches_teach_what_one_batch_does(
    optim: str, batch: int, accumulated: int, fusion: World, tmp_path: Path
) -> None:
    """Their numbers of supervised tokens differ up to ninefold: a mean of means would be another loss."""
    data = fusion.data(groups=[[block] for block in LENGTHS])
    settings = {
        **GRADIENTS,
        "optim": optim,
        "learning_rate": 0.1 if optim == "sgd" else 1e-3,
        "adam_epsilon": 1e-4,
    }
    at_once, in_parts = (
        trained(
            fusion, tmp_path, data, **settings, per_device_train_batch_size=size, gradient_accumulation_steps=n
        )
        for size, n in ((8, 1), (batch, accumulated))
    )
    assert far_apart(at_once, in_parts) < 1e-4


def test_the_last_update_of_an_epoch_is_over_the_tokens_that_are_left(fusion: World, tmp_path: Path) -> None:
    """Of three batches in twos, the last is alone."""
    data = fusion.data(groups=[[block] for block in LENGTHS[:6]])
    last = fusion.data(groups=[[block] for block in LENGTHS[4:6]])
    settings = {**GRADIENTS, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    both = fusion.trainer(tmp_path, data, **settings, gradient_accumulation_steps=2, max_steps=2)
    both.train()
    first = fusion.trainer(tmp_path, data, **settings, gradient_accumulation_steps=2, max_steps=1)
    first.train()
    then = fusion.trainer(tmp_path, last, model=first.model, **settings, max_steps=1)
    then.train()
    start = fusion.model()
    assert far_apart(moved(both.model, start), moved(then.model, start)) < 1e-5


@pytest.mark.parametrize("kind", ["none", "pairwise"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_at_weight_1_it_is_transformers_own_training_on_labels(
    kind: str, accumulated: int, fusion: World, tmp_path: Path
) -> None:
    """With clipping, warm-up, decay and AdamW."""
    settings = {
        "max_steps": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-5,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": accumulated,
    }
    ours = fusion.trainer(tmp_path, fusion.data(kind), clm_weight=1.0, **settings)
    ours.train()

    def plain(items: Any) -> dict[str, torch.Tensor]:
        return {name: Collator(0)(items)[name] for name in ("input_ids", "attention_mask", "labels")}

    arguments = TrainingArguments(**{**ours.args.to_dict(), "output_dir": str(tmp_path)})
    theirs = Trainer(fusion.model(), arguments, data_collator=plain, train_dataset=fusion.data())
    theirs.train()
    start = fusion.model()
    assert far_apart(moved(theirs.model, start), moved(ours.model, start)) < 1e-4
    np.testing.assert_allclose(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-5)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(theirs, "grad_norm"), rtol=1e-4)


def test_packed_rows_teach_what_rows_apart_do(fusion: World, tmp_path: Path) -> None:
    apart = fusion.data(groups=[[block] for block in LENGTHS])
    packed = fusion.data(groups=[LENGTHS[:3], LENGTHS[3:4], LENGTHS[4:6], LENGTHS[6:]])
    settings = {**GRADIENTS, "max_steps": 4, "lr_scheduler_type": "constant"}
    expected = trained(fusion, tmp_path, apart, **settings, per_device_train_batch_size=8)
    for flat in (False, True):
        collator = Collator(0, packed=True, flat=flat)
        found = trained(fusion, tmp_path, packed, collator=collator, **settings, per_device_train_batch_size=4)
        assert far_apart(expected, found) < 1e-5


def test_checkpointed_gradients_are_the_same_to_the_bit(fusion: World, tmp_path: Path) -> None:
    kept, again = (trained(fusion, tmp_path, gradient_checkpointing=on) for on in (False, True))
    assert far_apart(kept, again) == 0


def test_bf16_autocast_learns_nearly_the_same(fusion: World, tmp_path: Path) -> None:
    settings = {**GRADIENTS, "gradient_checkpointing": True, "max_steps": 4}
    exact, rounded = (fusion.trainer(tmp_path, **settings, bf16=on) for on in (False, True))
    for trainer in (exact, rounded):
        trainer.train()
        assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    start = fusion.model()
    assert 0 < far_apart(moved(exact.model, start), moved(rounded.model, start)) < 0.05
    assert logged(rounded, "loss") != logged(exact, "loss")
    np.testing.assert_allclose(logged(rounded, "loss"), logged(exact, "loss"), rtol=0.02)


# Logs

STILL = {
    "learning_rate": 0.0,
    "max_steps": 4,
    "logging_steps": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 5,
}


def batches_by_log(collator: Recorded) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Two steps of two batches each."""
    for start in (0, 4):
        yield collator.batches[start : start + 4]


def test_the_logs_show_both_terms_and_their_gradients(fusion: World, tmp_path: Path) -> None:
    """Of a model that stays as it is; the gradients' norms of the step that is logged."""
    collator = Recorded(0)
    trainer = fusion.trainer(tmp_path, collator=collator, clm_weight=0.7, **STILL)
    trainer.train()
    for number, batches in enumerate(batches_by_log(collator)):
        dense = Dense.of(fusion.model(), *batches)
        found = {key: logged(trainer, key)[number] for key in ("clm", "fusion", "clm_weight", "supervised_tokens")}
        assert found == {
            "clm": pytest.approx(float(dense.clm.mean()), rel=1e-5),
            "fusion": pytest.approx(float(dense.fusion.mean()), rel=1e-5),
            "clm_weight": pytest.approx(0.7),
            "supervised_tokens": len(dense.clm),
        }
        of_last_step = Dense.of(fusion.model(), *batches[2:]).ratio
        assert logged(trainer, "gradient_norm_ratio")[number] == pytest.approx(of_last_step, rel=1e-5)
        steps = [Dense.of(fusion.model(), *batches[start : start + 2]) for start in (0, 2)]
        losses = [float((0.7 * step.clm + 0.3 * step.fusion).mean()) for step in steps]
        assert logged(trainer, "loss")[number] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_logs_show_how_often_each_model_won(fusion: World, tmp_path: Path) -> None:
    collator, names = Recorded(0), ("pivot", "bytes", "unigram")
    trainer = fusion.trainer(tmp_path, fusion.data("multi"), collator=collator, models=names, **STILL)
    trainer.train()
    stores = fusion.stores("multi")
    for number, batches in enumerate(batches_by_log(collator)):
        won = dict.fromkeys(names, 0)
        for block in (int(block) for batch in batches for block in batch["blocks"]):
            rows = [store[block] for store in stores[1:]]  # each against the pivot over the bytes of both
            read = [0.0, *(float(row.ce_per_byte) - float(row.pivot_ce_per_byte) for row in rows)]
            won[names[int(np.argmin(read))]] += fusion.supervised[block]
        total = sum(won.values())
        for name in names:
            assert logged(trainer, f"share/{name}")[number] == pytest.approx(won[name] / total, abs=1e-6)
        assert max(won.values()) < total


def test_a_decaying_weight_ends_near_1(fusion: World, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 5}
    trainer = fusion.trainer(tmp_path, clm_weight=0.6, schedule="hard_and_decay", **settings)
    trainer.train()
    expected = [0.6 + 0.4 * step / 5 for step in range(5)]
    np.testing.assert_allclose(logged(trainer, "clm_weight"), expected, rtol=1e-6)


def test_a_soft_weight_follows_the_confidence_of_what_is_fused(fusion: World, tmp_path: Path) -> None:
    """1 − exp(−CE) by token; the loss is weighed position by position."""
    collator = Recorded(0)
    data = fusion.data(rule=Rule(compare="token", unit="token"))
    trainer = fusion.trainer(tmp_path, data, collator=collator, schedule="soft", **STILL)
    trainer.train()
    own, aligned = fusion.stores()
    for number, batches in enumerate(batches_by_log(collator)):
        golds = [
            np.maximum(own[int(b)].gold_logprob, aligned[int(b)].gold_logprob)
            for batch in batches
            for b in batch["blocks"]
        ]
        weight = 1 - np.exp(np.concatenate(golds).astype(np.float64))
        assert logged(trainer, "clm_weight")[number] == pytest.approx(weight.mean(), rel=1e-4)
        dense = Dense.of(fusion.model(), *batches)
        first = len(torch.cat([batch["gold"] for batch in batches[:2]]))
        loss = weight * dense.clm.numpy() + (1 - weight) * dense.fusion.numpy()
        expected = (loss[:first].mean() + loss[first:].mean()) / 2
        assert logged(trainer, "loss")[number] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "soft"])
def test_where_nothing_is_fused_the_gold_token_alone_is_learned(
    schedule: str, fusion: World, tmp_path: Path
) -> None:
    """As beyond a model's context."""

    class HalfFused(Silent):
        def __getitem__(self, number: int) -> list[Example]:
            (one,) = self.data[number]
            return [replace(one, fused=None)] if number in self.silent else [one]

    collator = Recorded(0)
    data = HalfFused(fusion.data(), range(0, 20, 2))
    trainer = fusion.trainer(tmp_path, data, collator=collator, schedule=schedule, **{**STILL, "max_steps": 2})
    trainer.train()
    (batches,) = [collator.batches[:4]]
    weight = torch.cat(
        [
            torch.where(batch["blocks"][batch["of_item"]] % 2 == 0, 1.0, 1 - batch["confidence"])
            if schedule == "soft"
            else torch.where(batch["blocks"][batch["of_item"]] % 2 == 0, 1.0, 0.5)
            for batch in batches
        ]
    ).double()
    dense = Dense.of(fusion.model(), *batches)
    assert logged(trainer, "clm_weight") == [pytest.approx(float(weight.mean()), rel=1e-5)]
    loss, first = weight * dense.clm + (1 - weight) * dense.fusion, sum(len(b["gold"]) for b in batches[:2])
    assert logged(trainer, "loss") == [
        pytest.approx(float(loss[:first].mean() + loss[first:].mean()) / 2, rel=1e-5)
    ]


def test_clm_alone_logs_no_fusion(fusion: World, tmp_path: Path) -> None:
    trainer = fusion.trainer(tmp_path, fusion.data("none"), clm_weight=1.0, models=())
    trainer.train()
    assert logged(trainer, "fusion") == logged(trainer, "gradient_norm_ratio") == [0.0] * 3
    assert logged(trainer, "clm_weight") == [1.0] * 3
    np.testing.assert_allclose(logged(trainer, "clm"), logged(trainer, "loss"), rtol=1e-6)


def test_tensorboard_shows_all_of_it(fusion: World, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    held_out = fusion.data(groups=[[0], [1]])
    trainer = fusion.trainer(
        tmp_path, held_out=held_out, report_to="tensorboard", eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    shown = events.EventAccumulator(str(file))
    shown.Reload()
    for key in ("loss", "clm", "fusion", "clm_weight", "gradient_norm_ratio", "share/pivot", "share/bytes"):
        values = [event.value for event in shown.Scalars(f"train/{key}")]
        np.testing.assert_allclose(values, logged(trainer, key), rtol=1e-6)
    for key in ("loss", "clm", "fusion", "perplexity_per_byte"):
        values = [event.value for event in shown.Scalars(f"eval/{key}")]
        np.testing.assert_allclose(values, logged(trainer, f"eval_{key}"), rtol=1e-6)


# Evaluation


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_evaluation_is_per_token_and_per_byte_over_all_rows_once(
    grouped: bool, batch: int, fusion: World, tmp_path: Path
) -> None:
    """Seven rows: no batch size divides them."""
    blocks = [3, 2, 19, 6, 1, 12, 17]
    groups = [[3, 2], [19], [6, 1, 12], [17]] if grouped else [[block] for block in blocks]
    trainer = fusion.trainer(
        tmp_path,
        held_out=fusion.data(groups=groups),
        collator=Collator(0, packed=grouped),
        per_device_eval_batch_size=batch,
    )
    found = trainer.evaluate()
    rows = [Collator(0)([[fusion.data().example(block)]]) for block in blocks]
    dense = Dense.of(fusion.model(), *rows)
    spans = [span for block in blocks for span in tiny_sources.openchat(CHATS[block])[1]]
    size = sum(stop - start for start, stop in spans)
    assert found["eval_clm"] == pytest.approx(float(dense.clm.mean()), rel=1e-5)
    assert found["eval_fusion"] == pytest.approx(float(dense.fusion.mean()), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(float((dense.clm + dense.fusion).mean() / 2), rel=1e-5)
    assert found["eval_perplexity_per_byte"] == pytest.approx(math.exp(float(dense.clm.sum()) / size), rel=1e-5)


def test_evaluation_leaves_the_training_as_it_is(fusion: World, tmp_path: Path) -> None:
    often = {"held_out": fusion.data(groups=[[0], [1]]), "eval_strategy": "steps", "eval_steps": 1}
    without, with_it = (trained(fusion, tmp_path, **settings) for settings in ({}, often))
    assert far_apart(without, with_it) == 0


# The order of the data


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_row_is_learned_from_once_an_epoch(epochs: int, fusion: World, tmp_path: Path) -> None:
    for strategy in ("random", "group_by_length", "sequential"):
        collator = Recorded(0)
        fusion.trainer(
            tmp_path,
            collator=collator,
            max_steps=-1,
            num_train_epochs=epochs,
            train_sampling_strategy=strategy,
        ).train()
        order = [int(block) for batch in collator.batches for block in batch["blocks"]]
        by_epoch = [order[start : start + len(CHATS)] for start in range(0, len(order), len(CHATS))]
        assert len(by_epoch) == epochs
        assert all(sorted(one) == list(range(len(CHATS))) for one in by_epoch)
        if strategy != "sequential":
            assert len({tuple(one) for one in by_epoch}) == epochs


def test_grouped_by_length_rows_of_a_batch_are_of_like_lengths(fusion: World, tmp_path: Path) -> None:
    padding, data = {}, fusion.data(groups=[[block] for block in range(len(CHATS))] * 10)
    for strategy in ("random", "group_by_length"):
        batches = list(fusion.trainer(tmp_path, data, train_sampling_strategy=strategy).get_train_dataloader())
        assert sorted(int(b) for batch in batches for b in batch["blocks"]) == sorted(list(range(len(CHATS))) * 10)
        padding[strategy] = sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)
    assert padding["group_by_length"] < padding["random"] / 5


# Batches with nothing to learn


class Silent:
    """Data in which some rows have no supervised token."""

    def __init__(self, data: Any, silent: Sequence[int]) -> None:
        self.data, self.silent = data, silent

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> list[Example]:
        (one,) = self.data[number]
        if number not in self.silent:
            return [one]
        empty, fused = np.zeros(0, np.int32), one.fused
        names = ("ids", "probabilities", "tail", "shares", "confidence")
        return [
            Example(
                one.block,
                TokenRow(one.tokens.ids, empty, empty, 0),
                replace(fused, **{name: getattr(fused, name)[:0] for name in names}) if fused else None,
            )
        ]


@pytest.mark.parametrize("kind", ["none", "pairwise"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_batches_without_a_supervised_token_teach_nothing(
    kind: str, accumulated: int, fusion: World, tmp_path: Path
) -> None:
    """The first two batches of two rows; accumulated by twos they are a whole update."""
    trainer = fusion.trainer(
        tmp_path,
        Silent(fusion.data(kind), range(4)),
        **{**GRADIENTS, "logging_steps": 1, "max_steps": 2 if accumulated == 2 else 4},
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
    )
    trainer.train()
    pivot = weights(fusion.folder / "pivot")
    for step in range(1, 5 // accumulated):
        found = weights(tmp_path / f"checkpoint-{step}")
        same = all(torch.equal(found[name], pivot[name]) for name in pivot)
        assert same == (step * accumulated <= 2)
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert logged(trainer, "loss")[0] == 0
    assert logged(trainer, "supervised_tokens")[0] == 0
    assert all(math.isfinite(value) for log in trainer.state.log_history for value in log.values())


def test_a_silent_batch_among_accumulated_ones_changes_nothing(fusion: World, tmp_path: Path) -> None:
    settings = {**GRADIENTS, "max_steps": 1, "per_device_train_batch_size": 2}
    with_them = trained(fusion, tmp_path, Silent(fusion.data(), [2, 3]), **settings, gradient_accumulation_steps=3)
    groups = [[0], [1], [4], [5]]
    without = trained(fusion, tmp_path, fusion.data(groups=groups), **settings, gradient_accumulation_steps=2)
    assert far_apart(without, with_them) < 1e-6


def test_a_batch_of_fillers_alone_teaches_and_logs_nothing(fusion: World, tmp_path: Path) -> None:
    """As a process gets one, whose batch the end of an epoch does not fill: not even models have shares in it."""
    data = fusion.data()

    class Filled(Silent):
        def __getitem__(self, number: int) -> list[Example]:
            return data[None if number in self.silent else number]

    assert sum(len(one.tokens.positions) for one in data[None]) == 0
    settings = {**GRADIENTS, "max_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 2}
    trainer = fusion.trainer(tmp_path, Filled(data, range(4, 8)), **settings)
    trainer.train()
    one = fusion.trainer(tmp_path, **{**settings, "max_steps": 1, "logging_steps": 1})
    one.train()
    start = fusion.model()
    assert far_apart(moved(one.model, start), moved(trainer.model, start)) == 0
    for key in ("clm", "fusion", "supervised_tokens", "share/pivot", "share/bytes"):
        assert logged(trainer, key) == logged(one, key)


def test_silent_rows_are_evaluated_as_nothing(fusion: World, tmp_path: Path) -> None:
    groups = [[3], [2], [7]]
    one, other = (
        fusion.trainer(tmp_path, held_out=data, per_device_eval_batch_size=1).evaluate()
        for data in (fusion.data(groups=groups[:2]), Silent(fusion.data(groups=groups), [2]))
    )
    for key in ("eval_loss", "eval_clm", "eval_fusion", "eval_perplexity_per_byte"):
        assert one[key] == pytest.approx(other[key], rel=1e-12)


# A loss that is not finite


class Poisoned:
    """Data in which one block has learned NaN."""

    def __init__(self, data: Any, block: int) -> None:
        self.data, self.block = data, block

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> list[Example]:
        return [
            replace(one, fused=replace(one.fused, probabilities=one.fused.probabilities * np.float32(np.nan)))
            if one.block == self.block
            else one
            for one in self.data[number]
        ]


def stopped(trainer: Any) -> str:
    with pytest.raises(UserError) as error:
        trainer.train()
    return str(error.value)


def test_a_nan_of_a_row_stops_the_training_and_names_it(fusion: World, tmp_path: Path) -> None:
    message = stopped(fusion.trainer(tmp_path, Poisoned(fusion.data(), 6), **IN_ORDER))
    assert "the loss is NaN or infinite in step 2" in message
    assert "weights are finite: look at these rows" in message
    assert "\n  block 6: chat-6" in message
    assert message.count("\n  block") == 1


def test_a_nan_in_a_packed_row_names_its_conversations(fusion: World, tmp_path: Path) -> None:
    groups = [[0, 3], [4, 6, 7], [8]]
    message = stopped(
        fusion.trainer(
            tmp_path, Poisoned(fusion.data(groups=groups), 6), collator=Collator(0, packed=True), **IN_ORDER
        )
    )
    named = [line.strip() for line in message.splitlines() if line.startswith("  block")]
    assert [f"block {block}: chat-{block}" for block in (4, 6, 7)] == named


def test_a_nan_of_the_weights_stops_and_the_checkpoint_before_is_as_it_was(fusion: World, tmp_path: Path) -> None:
    class Poison:
        """The optimizer's second step is poisoned, after which the first checkpoint is the last whole one."""

        def __init__(self, trainer: Any) -> None:
            step = trainer.compute_loss

            def compute_loss(model: Any, *given: Any, **named: Any) -> Any:
                if trainer.state.global_step == 1:
                    with torch.no_grad():
                        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
                return step(model, *given, **named)

            trainer.compute_loss = compute_loss

    trainer = fusion.trainer(tmp_path, save_strategy="steps", save_steps=1, **IN_ORDER)
    Poison(trainer)
    message = stopped(trainer)
    assert "in step 2" in message
    assert "weights are not finite; a smaller learning_rate" in message
    assert "Nothing of this step was kept" in message
    assert [line.strip() for line in message.splitlines() if line.startswith("  block")] == [
        f"block {block}: chat-{block}" for block in (4, 5, 6, 7)
    ]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "checkpoint-1").values())


@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(
    clipped: float, fusion: World, tmp_path: Path
) -> None:
    """In the last step, after which no loss would tell; the loss itself is finite."""
    trainer = fusion.trainer(
        tmp_path, **IN_ORDER, max_grad_norm=clipped, max_steps=2, gradient_accumulation_steps=2
    )

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient if trainer.state.global_step == 0 else gradient * torch.inf

    trainer.model.lm_head.weight.register_hook(overflow)
    message = stopped(trainer)
    assert "the gradients' norm is NaN or infinite in step 2" in message
    assert [line.strip() for line in message.splitlines() if line.startswith("  block")] == [
        f"block {block}: chat-{block}" for block in range(8, 16)
    ]
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


# Checkpoints

OFTEN = {"save_strategy": "steps", "save_steps": 1}


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(
    fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full once its weights are written and its optimizer's state is not."""
    trainer = fusion.trainer(tmp_path, **OFTEN)
    kept, write = {}, trainer._save_rng_state

    def full(folder: str) -> None:
        if trainer.state.global_step == 3:
            kept.update({path: path.read_bytes() for path in tmp_path.rglob("checkpoint-[12]/*")})
            assert (Path(folder) / "model.safetensors").is_file()
            assert Path(folder).parent.name == WRITING
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    message = stopped(trainer)
    assert f"the checkpoint `{tmp_path / 'checkpoint-3'}` cannot be written: " in message
    assert "No space left on device" in message
    assert f"run the same command again: it resumes from `{tmp_path / 'checkpoint-2'}`" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert len(kept) > 10
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_save_total_limit_keeps_the_last_checkpoint_and_the_best(fusion: World, tmp_path: Path) -> None:
    """The best is that with the highest loss, which is the first: learning is fast, but not so fast."""
    trainer = fusion.trainer(
        tmp_path,
        **OFTEN,
        held_out=fusion.data(groups=[[0], [1]]),
        max_steps=5,
        lr_scheduler_type="constant",
        learning_rate=0.5,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="clm",
        greater_is_better=True,
    )
    trainer.train()
    best = 1 + int(np.argmax(logged(trainer, "eval_clm")))
    assert best == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-5"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert all(
        torch.equal(weight, trainer.model.state_dict()[name])
        for name, weight in weights(tmp_path / "checkpoint-1").items()
    )


# What is refused


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not part of the fusion loss"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: false"),
        ({"train_sampling_strategy": "batch_rebalance"}, "use group_by_length"),
        ({"prediction_loss_only": True}, "prediction_loss_only would leave out the metrics"),
        ({"push_to_hub": True}, "push_to_hub: upload the finished target"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would restart"),
        ({"ignore_data_skip": True}, "ignore_data_skip would train on rows that were seen"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics would average over batches"),
        ({"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval would round the weights"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches: false"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches and even_batches stay as they are"),
        ({"metric_for_best_model": "accuracy"}, "there is no accuracy; there are loss, clm, fusion, perplexity"),
    ],
)
def test_arguments_that_would_change_the_loss_are_refused(
    arguments: dict[str, Any], part: str, fusion: World, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="these training arguments cannot be used") as error:
        fusion.trainer(tmp_path, **arguments)
    assert part in str(error.value)


def test_all_arguments_that_cannot_be_used_are_reported_at_once(fusion: World, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        fusion.trainer(tmp_path, label_smoothing_factor=0.1, prediction_loss_only=True)
    assert str(error.value).count("\n  ") == 2


def test_a_model_that_mixes_packed_conversations_up_is_refused(fusion: World, tmp_path: Path) -> None:
    mpt = tiny_sources.new_source("mpt", 700)
    with pytest.raises(UserError, match="MptForCausalLM does not keep packed conversations apart"):
        fusion.trainer(tmp_path, model=mpt, collator=Collator(0, packed=True))
    fusion.trainer(tmp_path, model=mpt).train()


def test_a_model_whose_head_asks_for_more_than_hidden_states_is_refused(fusion: World, tmp_path: Path) -> None:
    class Biased(type(fusion.model())):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **others: Any) -> Any:
            output = super().forward(input_ids=input_ids, **others)
            output.logits = output.logits + input_ids[..., None]
            return output

    model = fusion.model()
    model.__class__ = Biased
    with pytest.raises(UserError, match="Biased does not give its logits from its layers' output alone"):
        fusion.trainer(tmp_path, model=model)
