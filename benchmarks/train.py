"""A training step with the fusion loss against the plain one of transformers; collating; the loss alone.

\b
  python benchmarks/train.py --save                 a Llama of 60M and a Gemma of 270M in float32, an hour on two
                                                    cores; on a GPU a Qwen2 of 1.5B in bfloat16
  python benchmarks/train.py --model tiny --rounds 1 --steps 1      a trial of everything, some 4 minutes
  python benchmarks/train.py --model llama-7b --save                on a GPU of 80 GB or more

Models and stores are random (train_data.py).

A leg is a real `trainer.train()` from the same random weights, on the same rows in the same order. The clock runs
from the end of its first step (which allocates the optimizer's state) to the end of its last: reading the stores,
fusing, collating, clipping and AdamW count. The plain leg is transformers' Trainer with the model's own loss of
`labels`; its collator is ours too, without stores, and passes only `input_ids`, `labels` and `attention_mask`
(packed: `position_ids`). All legs run in one process, in an order that rotates from round to round; a ratio is
taken within a round. Peak memory is that of two steps in their own process: RssAnon, sampled every 10 ms; on a GPU
`torch.cuda.max_memory_allocated`.
"""

import gc
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import extract
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from layouts import LARGE, gemma3, llama, qwen2
from measure import judged, machine, measured, publish, rotated, sections, spread, table
from torch import Tensor
from train_data import SOURCES, K, prepared
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Trainer, TrainingArguments

from fusion_trainer.training import loss
from fusion_trainer.training.batches import Collator, Example, FusionData, pack
from fusion_trainer.training.divergences import divergence_named
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.trainer import FusionTrainer

# The project's budgets
TIME_BUDGET = 1.05  # wall, our step / plain step
MEMORY_BUDGET = 1.0  # peak, ours / plain
COLLATE_BUDGET_MS = 20

PLAIN, OURS = "plain CLM", "MinCE, λ = 0.9"
TAIL = Rule("avg_ce", tail="bucket")
JS, ALM = "MinCE + tail, JS, λ = 0.9", "MinCE and ALM, λ = 0.9"
LEGS = {PLAIN: (None, 1.0), OURS: (Rule(), 0.9), "ours, λ = 1": (None, 1.0), "AvgCE + tail, λ = 0.9": (TAIL, 0.9)}
LEGS |= {JS: (Rule(tail="bucket"), 0.9), ALM: (Rule(), 0.9)}
SPECIAL = {JS: {"divergence": divergence_named("js")}, ALM: {"alm_weight": 0.5}}
COLLATED = {  # rule and number of sources
    "MinCE, pairwise": (Rule(), 1),
    f"MinCE, {SOURCES} sources": (Rule(), SOURCES),
    "AvgCE, pairwise": (Rule("avg_ce"), 1),
    f"AvgCE + tail, {SOURCES} sources": (TAIL, SOURCES),
}
COLLATED_BATCHES, COLLATED_BLOCKS = 200, 48
LOSSES = ("ours", "ours, norms measured", "ours, tail kept", "CLM of transformers", "dense target")
LOSS_SHAPE = (4096, 512, 32_000)  # positions, hidden size, vocabulary
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16, dense

UNTIED = {"vocab_size": 32_000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
LAYOUTS = {
    "tiny": llama(192, 4),
    "llama-60m": LlamaConfig(**UNTIED, **SMALL, dtype="float32"),  # more than a third of its work is the head
    "llama-110m": llama(768, 12),
    "qwen2-1.5b": qwen2(1536, 28, "bfloat16"),
    "llama-7b": LlamaConfig(**UNTIED, dtype="bfloat16"),
    "gemma3-270m": gemma3(640, 18, "bfloat16" if torch.cuda.is_available() else "float32"),
    "tiny-262k": gemma3(192, 2, "float32"),
}


class Shape(NamedTuple):
    """Rows of a batch, most tokens in one, and whether several blocks share a row."""

    rows: int
    length: int
    packed: bool

    def __str__(self) -> str:
        return f"{self.rows} × {self.length}, packed" if self.packed else f"{self.rows} × ≤ {self.length}, padded"


ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = {  # and the legs run on it
    Shape(8, 2048, False) if ON_GPU else Shape(4, 512, False): [*LEGS],
    Shape(8, 2048, True) if ON_GPU else Shape(2, 2048, True): [*LEGS] if ON_GPU else [PLAIN, OURS],
}


# A leg


class Batch(NamedTuple):
    """What it holds: tokens, supervised ones, places, Σ length² of its blocks, and the sum of its ids."""

    tokens: int
    supervised: int
    places: int
    squares: int
    checksum: int


@dataclass
class Recorder(Collator):
    """Collates, and notes what the batches hold; for the plain leg only what the model itself takes."""

    plain: bool = False
    batches: list[Batch] = field(default_factory=list)

    def __call__(self, items: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        ids, lengths = batch["input_ids"], [len(example.tokens.ids) for item in items for example in item]
        squares = sum(length**2 for length in lengths)
        self.batches.append(Batch(sum(lengths), len(batch["gold"]), ids.numel(), squares, int(ids.sum())))
        own = ("input_ids", "labels", "attention_mask", "position_ids")
        return {name: batch[name] for name in own if name in batch} if self.plain else batch


class Clock(transformers.TrainerCallback):
    """Wall and CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        extract.synchronise()
        self.ends.append((time.perf_counter(), time.process_time()))


class Steps(NamedTuple):
    """The steps of a leg that count, in seconds, and their batches; the mean loss is that of all steps."""

    wall: float
    cpu: float
    batches: list[Batch]
    loss: float


@dataclass
class Setting:
    """What is trained; can be pickled, so that a process of its own can run a leg."""

    layout: str
    shape: Shape
    data: FusionData
    steps: int

    def model(self) -> Any:
        torch.manual_seed(0)
        with DEVICE:
            return AutoModelForCausalLM.from_config(LAYOUTS[self.layout])

    def run(self, leg: str) -> Steps:
        (rule, weight), clock = LEGS[leg], Clock()
        tail = rule is not None and rule.tail == "bucket"
        recorder = Recorder(0, self.shape.packed, tail=tail, plain=leg == PLAIN)
        stores = self.data.stores[:2] if rule else []
        data = FusionData(self.data.tokens.path, stores, rule, self.data.groups, leg == ALM)
        given = {"model": self.model(), "train_dataset": data, "callbacks": [clock]}
        with tempfile.TemporaryDirectory() as nowhere:
            quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "output_dir": nowhere}
            columns = {"remove_unused_columns": False, "label_names": ["labels"]}
            size = {"max_steps": self.steps + 1, "per_device_train_batch_size": self.shape.rows}
            given["args"] = TrainingArguments(
                **quiet, **columns, **size, learning_rate=5e-6, dataloader_pin_memory=ON_GPU
            )
            if leg == PLAIN:
                trainer = Trainer(**given, data_collator=recorder)
            else:
                names = [str(number) for number in range(len(data.stores))]
                given |= {"eval_dataset": None, "collator": recorder, "clm_weight": weight, "models": names}
                given |= SPECIAL.get(leg, {})
                trainer = FusionTrainer(**given)
            trainer.remove_callback(PrinterCallback)
            mean_loss = trainer.train().training_loss
        wall, cpu = (last - first for first, last in zip(clock.ends[0], clock.ends[-1], strict=True))
        return Steps(wall, cpu, recorder.batches[1 : self.steps + 1], mean_loss)


def measure_rounds(setting: Setting, legs: list[str], rounds: int) -> dict[str, list[Steps]]:
    runs: dict[str, list[Steps]] = {leg: [] for leg in legs}
    for number in range(rounds):
        for leg in rotated(legs, number):
            runs[leg].append(steps := setting.run(leg))
            label = f"round {number + 1}: {setting.shape}: {leg}"
            click.echo(f"{label} {steps.wall:.2f} s, CPU {steps.cpu:.2f} s, loss {steps.loss:.4f}", err=True)
    plain = runs[PLAIN][0]
    for leg, own in runs.items():
        assert all(steps.batches == plain.batches for steps in own), f"{leg} saw other batches"
        assert LEGS[leg] != LEGS[PLAIN] or abs(own[0].loss / plain.loss - 1) < 1e-3, f"{leg}: {own[0].loss}"
    return runs


def peak_mib(job: Callable[[], object]) -> float:
    """Of a job in a process of its own, or on the GPU."""
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() / 2**20
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(pickle.dumps(job))
        return measured([sys.executable, __file__, "--alone", file.name]).anonymous_mib


def profile(setting: Setting, leg: str) -> dict[str, float]:
    """Seconds of each part of a leg's steps, the first one among them."""
    spent: dict[str, float] = {}

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            extract.synchronise()
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
            return result

        return call

    parts = [
        ("read and fuse", FusionData, "__getitem__"),
        ("collate", Collator, "__call__"),
        ("layers, forward", type(setting.model().base_model), "forward"),
        ("forward", Trainer if leg == PLAIN else FusionTrainer, "compute_loss"),
        ("backward", Accelerator, "backward"),
        ("AdamW", AcceleratedOptimizer, "step"),
        ("within both: hidden states → logits", loss.SplitModel, "head"),
    ]
    with ExitStack() as clocks:
        for part, owner, name in parts:
            clocks.enter_context(patch.object(owner, name, clocked(part, getattr(owner, name))))
        setting.run(leg)
    spent["head and loss, forward"] = spent.pop("forward") - spent["layers, forward"]
    return {part: spent[part] for part in sorted(spent, key=lambda part: part.startswith("within"))}


# Collating, and the loss alone


def measure_collating(data: FusionData, rule: Rule, sources: int) -> tuple[list[float], list[int]]:
    """Milliseconds and supervised positions of batches of 4 blocks."""
    full = [[block] for block, length in enumerate(data.tokens.lengths) if length > 2000]
    data = FusionData(data.tokens.path, data.stores[: 1 + sources], rule, full)
    collator, rng, times, positions = Collator(0, tail=rule.tail == "bucket"), np.random.default_rng(0), [], []
    for item in range(len(data)):
        collator([data[item]])  # warms up
    for _ in range(COLLATED_BATCHES):
        chosen = rng.choice(len(data), 4, replace=False).tolist()
        start = time.perf_counter()
        batch = collator([data[item] for item in chosen])
        times.append(1e3 * (time.perf_counter() - start))
        positions.append(len(batch["gold"]))
    return times, positions


@cache
def head_alone() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model without layers; token ids [1, S + 1]; fused ids and probabilities [S, K]."""
    size, hidden, _ = LOSS_SHAPE
    torch.manual_seed(0)
    with DEVICE:
        config = LlamaConfig(**{**UNTIED, **SMALL, "hidden_size": hidden, "num_hidden_layers": 0})
        model = AutoModelForCausalLM.from_config(config)
        ids_BL = torch.randint(1000, (1, size + 1))
        ids_SK = 1000 + torch.randint(1000, (size, 1)) + torch.arange(K)
        loss.give_fusion_loss(model)
        return model, ids_BL, ids_SK, torch.rand(size, K).softmax(1)


@cache
def dense_target() -> Tensor:
    _, _, ids_SK, shares_SK = head_alone()
    return torch.zeros(len(ids_SK), LOSS_SHAPE[2], device=DEVICE).scatter_(1, ids_SK, shares_SK)


def loss_step(kind: str) -> None:
    """Forward and backward of head and loss; of no kind: only the inputs are made."""
    model, ids_BL, ids_SK, shares_SK = head_alone()
    gold_S, weight_S = ids_BL[0, 1:], torch.full_like(shares_SK[:, 0], 0.9)
    if kind == "dense target":
        logs_SV = model(ids_BL, use_cache=False).logits[0, :-1].log_softmax(-1)
        (-0.9 * logs_SV.gather(1, gold_S[:, None]).sum() - 0.1 * (dense_target() * logs_SV).sum()).backward()
    elif kind == "CLM of transformers":
        model(ids_BL, labels=ids_BL, use_cache=False).loss.backward()
    elif kind:
        tail_S, places_S = 1 - weight_S if "tail" in kind else None, torch.arange(len(gold_S), device=DEVICE)
        fused = {"ids": ids_SK, "probabilities": shares_SK, "tail": tail_S, "clm_weight": weight_S}
        targets = loss.Targets(positions=places_S, gold=gold_S, **fused, norms="norms" in kind)
        model(input_ids=ids_BL, targets=targets)["loss"].backward()
    model.zero_grad()


# Report


def flops(layout: str, batches: Sequence[Batch]) -> float:
    """Of the model, forward and backward, at the tokens that are no padding; recomputation is not counted."""
    config = LAYOUTS[layout]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = model.num_parameters(exclude_embeddings=not config.tie_word_embeddings)
    attention = 6.0 * config.num_hidden_layers * config.hidden_size * sum(batch.squares for batch in batches)
    return 6.0 * weights * sum(batch.tokens for batch in batches) + attention


def peak_flops() -> float | None:
    """Of this GPU; None without one, or for one that is not listed."""
    name = torch.cuda.get_device_name() if ON_GPU else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def step_tables(setting: Setting, runs: dict[str, list[Steps]]) -> Iterator[tuple[str, str]]:
    batches, shape, count = runs[PLAIN][0].batches, setting.shape, setting.steps
    tokens, supervised, places = (sum(batch[n] for batch in batches) for n in range(3))
    work, peak = flops(setting.layout, batches) / 1e12, peak_flops()
    peaks = {leg: peak_mib(partial(replace(setting, steps=1).run, leg)) for leg in runs}
    legs, ratios, memory = [], [], []
    for leg, own in runs.items():
        rates = (spread([tokens / s.wall for s in own], 0), spread([work / s.wall for s in own], 3))
        mfu = (spread([work / s.wall / (peak / 1e12) for s in own], 3),) if peak else ()
        each = (spread([s.wall / count for s in own]), spread([s.cpu / count for s in own]))
        legs.append((leg, *each, *rates, *mfu, f"{own[0].loss:.4f}"))
        ratio, has_budget = peaks[leg] / peaks[PLAIN], leg in (OURS, JS, ALM)
        limits = judged([ratio], MEMORY_BUDGET if has_budget else None)
        memory.append((leg, f"{peaks[leg]:,.0f}", f"{ratio:.3f}", *limits))
        if leg != PLAIN:
            pairs = list(zip(own, runs[PLAIN], strict=True))
            wall, cpu = [o.wall / p.wall for o, p in pairs], [o.cpu / p.cpu for o, p in pairs]
            limits = judged(wall, TIME_BUDGET if has_budget else None)
            by_round = " ".join(f"{ratio:.3f}" for ratio in wall)
            ratios.append((f"{leg} / {PLAIN}", spread(wall, 3), by_round, spread(cpu, 3), *limits))
    about = f"{count} steps that count: {tokens:,} tokens, {supervised / tokens:.1%} of them supervised; of "
    about += f"{places:,} places {1 - tokens / places:.1%} are padding."
    speeds = ("tokens/s", "TFLOP/s", *(("MFU",) if peak else ()))
    header = ("leg", "wall of a step, s", "CPU, s", *speeds, "mean loss")
    yield f"Steps, {shape}", f"{about}\n\n{table(header, legs)}"
    header = ("pair", "wall ratio", "round by round", "CPU ratio", "budget, wall", "verdict")
    yield f"Time within a round, {shape}", table(header, ratios)
    yield f"Peak memory, {shape}", table(("leg", "peak, MiB", f"/ {PLAIN}", "budget", "verdict"), memory)


def profile_table(setting: Setting) -> str:
    plain, ours = (profile(setting, leg) for leg in (PLAIN, OURS))
    rows = [(part, f"{plain[part]:.3f}" if part in plain else "", f"{ours[part]:.3f}") for part in ours]
    return table(("part", f"{PLAIN}, s", f"{OURS}, s"), rows)


def collating_table(data: FusionData) -> str:
    rows = []
    for name, (rule, sources) in COLLATED.items():
        times, positions = measure_collating(data, rule, sources)
        numbers = (f"{median(positions):,.0f}", f"{median(times):.2f}", f"{np.percentile(times, 99):.2f}")
        rows.append((name, *numbers, *judged(times, COLLATE_BUDGET_MS, " ms")))
    return table(("what", "positions", "median, ms", "99th percentile, ms", "budget, median", "verdict"), rows)


def loss_table(rounds: int) -> str:
    times: dict[str, list[float]] = {kind: [] for kind in LOSSES}
    for number in range(rounds + 1):
        for kind in rotated(LOSSES, number):
            spent = extract.seconds(partial(loss_step, kind)).wall
            times[kind] += [spent] if number else []  # warm-up
    dense_target.cache_clear()
    peaks, rows = {kind: peak_mib(partial(loss_step, kind)) for kind in ("", *LOSSES)}, []
    for kind, own in times.items():
        ratios = [wall / dense for wall, dense in zip(own, times["dense target"], strict=True)]
        rows.append((kind, spread(own, 3), spread(ratios), f"{peaks[kind] - peaks['']:,.0f}"))
    return table(("head and loss, forward and backward", "s", "/ dense target", "peak beyond inputs, MiB"), rows)


def random_setting(work: Path, layout: str, shape: Shape, steps: int) -> Setting:
    rows = shape.rows * (steps + 2)  # a step that does not count, and a batch that is fetched ahead
    data = prepared(work, LAYOUTS[layout].vocab_size, shape.length, 2 * rows * shape.length)
    groups = pack([int(size) for size in data.tokens.lengths], shape.length) if shape.packed else data.groups
    return Setting(layout, shape, FusionData(data.tokens.path, data.stores, Rule(), groups[:rows]), steps)


def measurements(work: Path, layout: str, rounds: int, steps: int) -> str:
    """The report's body, in Markdown."""
    config, parts, setting = LAYOUTS[layout], list[tuple[str, str]](), None
    for shape, legs in SHAPES.items():
        setting = random_setting(work / str(shape), layout, shape, steps)
        parts += step_tables(setting, measure_rounds(setting, legs, rounds))
    large, shape = LARGE.get(layout, "gemma3-270m"), next(iter(SHAPES))
    other = random_setting(work / large, large, shape, steps)
    tables = step_tables(other, measure_rounds(other, [PLAIN, OURS], rounds))
    parts += [(f"{title}, {large} (vocabulary 262,144)", body) for title, body in tables]
    assert setting is not None
    title = f"Where the time of two steps goes, {setting.shape} (one run, clocked)"
    parts.append((title, profile_table(replace(setting, steps=1))))
    note = f"Reading, fusing and collating 4 blocks of plain text, all supervised: {COLLATED_BATCHES} batches, "
    note += "page cache warm. The published code needs 9.3 s and 1 GB for such a batch, [4, 2048, 32000] dense."
    text = prepared(work / "text", 32_000, 2048, COLLATED_BLOCKS * 2048, text=True)
    parts.append(("Collating 4 × 2048 positions", f"{note}\n\n{collating_table(text)}"))
    parts.append((f"The loss alone, {list(LOSS_SHAPE)} in float32", loss_table(rounds)))
    model, tied = setting.model(), "tied" if config.tie_word_embeddings else "untied"
    about = (
        f"{layout}: {model.num_parameters():,} parameters ({tied} embeddings, vocabulary {config.vocab_size:,}), "
        f"{model.dtype}, on {model.device}, {torch.get_num_threads()} threads; no gradient checkpointing; AdamW "
        "as transformers sets it, clipped at 1. FLOPs: 6 · weights · tokens (without padding and an untied input "
        "embedding) + 6 · layers · hidden size · Σ length² for causal attention. "
        f"Rounds: {rounds}. Cells: median [min – max]; budgets are judged by the median."
    )
    return f"{about}\n\n{sections(parts)}"


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(LAYOUTS)), help="Default: llama-60m, qwen2-1.5b on a GPU.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="That count in a leg. Default: 2, 20 on a GPU.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-train.md.")
@click.option("--alone", "job", type=click.Path(path_type=Path), hidden=True)
def main(model: str | None, rounds: int, steps: int | None, save: bool, job: Path | None) -> None:
    transformers.utils.logging.set_verbosity_error()
    if job is not None:
        pickle.loads(job.read_bytes())()
        return
    model, steps = model or ("qwen2-1.5b" if ON_GPU else "llama-60m"), steps or (20 if ON_GPU else 2)
    with tempfile.TemporaryDirectory() as work:
        body = measurements(Path(work), model, rounds, steps)
    command = f"    python benchmarks/train.py --model {model} --rounds {rounds} --steps {steps}"
    publish("train", "Training benchmark", command, machine(), body, save=save)


if __name__ == "__main__":
    main()
