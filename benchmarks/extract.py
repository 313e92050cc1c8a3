"""Measures an extraction: its time against the bare forward pass, the size of a store, the time to read a row.

\b
  python benchmarks/extract.py                              a Llama of 110M and a Gemma of 270M, half an hour;
                                                            on a GPU a Qwen2 with 1.5B
  python benchmarks/extract.py --model tiny --rounds 2      a trial of everything, one or two minutes on two cores
  python benchmarks/extract.py --rounds 9 --save

The models have random weights, which does not change their speed. The dialogues and the tokenizer are those of
examples/make_sharegpt.py. The tokenizer is filled up to the vocabulary of the model with tokens that no text
needs, so that almost all rows of the head stand for a token, as in a real checkpoint.

An extraction is what the program does after the model is loaded: tokens, batches, distributions, shards, manifest.
The references get the same batches, recorded in the warm-up and already on the device:

- `bare forward`: transformers' logits at every position, padding included;
- `layers + head`: the layers, and the head at the supervised positions only, as in the extraction. This one is
  stricter: the difference is the cost of the distributions and the store.

All run in one process, in an order that rotates from round to round; ratios are taken within a round.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import torch
import transformers
from accelerate import PartialState
from layouts import LARGE, LAYOUTS
from measure import judged, machine, measure_rounds, publish, sections, spread, table
from torch import Tensor
from transformers import AutoModelForCausalLM

from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.prepare import prepare
from fusion_trainer.data.readers import DIALOGUES, Reader
from fusion_trainer.representations.extract import shard_starts, store_identity
from fusion_trainer.representations.extraction import Extraction
from fusion_trainer.representations.store import Representation, RepresentationStore, id_dtype
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.representations.topk import top_k
from fusion_trainer.representations.topk_model import TopKModel
from fusion_trainer.representations.transformers_engine import TransformersEngine
from fusion_trainer.text.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_sharegpt import byte_level_bpe, conversations, texts, write_jsonl

# The project's budgets
TIME_BUDGET = 1.05  # wall, extraction / bare forward
BYTES_BUDGETS = {np.uint16: 45, np.uint32: 65}  # per supervised token, by what holds an id
ROW_BUDGET_US = 50

K = 10
BARE, HEAD, EXTRACTION = "bare forward", "layers + head", "extraction"
CHARACTERS_PER_TOKEN = 3.0
TRAINED_ON, TRAINED_TOKENS = 1000, 8000  # conversations; more tokens than that are filled in
READ_SHARDS, ROWS_PER_SHARD, READS = 64, 64, 20_000
SIZE_TOKENS = 32_768  # in the stores whose size is reported
CHUNK_SHAPES = ((256, 32_000), (256, 152_064), (256, 262_144))  # chunks of an extraction on CPU


class Seconds(NamedTuple):
    """Elapsed time, and CPU time of all threads of this process."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s, CPU {self.cpu:.2f} s"


@dataclass(frozen=True)
class Batch:
    """The input of the model in an extraction, on the device."""

    ids_BL: Tensor
    mask_BL: Tensor | None
    positions_S: Tensor


def write_model(folder: Path, layout: str, lines: list[str], device: torch.device) -> None:
    """A random checkpoint, and a tokenizer of as many tokens as its layout has."""
    config, tokens = LAYOUTS[layout]
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    with device:
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    byte_level_bpe(lines, TRAINED_TOKENS).save_pretrained(folder)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text("utf-8"))
    vocabulary = state["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in state["added_tokens"]}
    vocabulary |= {f"never-{number}": number for number in range(len(vocabulary), tokens)}
    path.write_text(json.dumps(state, ensure_ascii=False), "utf-8")


def loaded(work: Path, layout: str, tokens: int, batch_tokens: int) -> Extraction:
    """What the program prepares before the first shard: about ``tokens`` tokens of dialogues, model, writer."""
    device = PartialState().device
    rows, characters = [], 0
    for row in conversations(seed=0):
        rows.append(row)
        characters += sum(map(len, texts([row])))
        if characters > CHARACTERS_PER_TOKEN * tokens:
            break
    folder, data = work / layout, work / f"{tokens}.jsonl"
    write_jsonl(data, rows)
    lines = [line for row in islice(conversations(seed=1), TRAINED_ON) for line in texts([row])]
    write_model(folder, layout, lines, device)
    inputs = {"data": [str(data)], "pivot": str(folder), "model": str(folder), "template": "chatml"}
    sizes = {"batch_tokens": batch_tokens, "shard_tokens": max(2 * batch_tokens, tokens // 4)}
    config = ExtractConfig(**inputs, **sizes, output=work / f"{layout}-store", top_k=K)
    dialogues = prepare(config, work, quiet=True)
    tokenizer = load_tokenizer(folder, layout)
    assert len(tokenizer.vocabulary) == LAYOUTS[layout][1]
    reader = Reader(tokenizer, DIALOGUES)
    identity = store_identity(config, dialogues, reader, folder, None)
    writer = StoreWriter(config.output, identity, shard_starts(dialogues.lengths, config.shard_tokens))
    engine = TransformersEngine(config, folder, tokenizer.vocabulary, device)
    return Extraction(config, dialogues, reader, engine, writer)


# Time


def run(extraction: Extraction, output: Path) -> RepresentationStore:
    """One whole extraction into a new folder."""
    writer = extraction.writer
    writer.folder = output
    writer.begin()
    extraction.run(writer.missing(), silent=True)
    writer.finish()
    return RepresentationStore(output)


def recorded(extraction: Extraction, output: Path) -> tuple[RepresentationStore, list[Batch]]:
    """An extraction that is not timed, and its batches."""
    batches: list[Batch] = []
    distributions = extraction.engine.model.distributions

    def recording(ids_BL: Tensor, mask_BL: Tensor | None, positions_S: Tensor, *others: Any) -> Any:
        batches.append(Batch(ids_BL, mask_BL, positions_S))
        return distributions(ids_BL, mask_BL, positions_S, *others)

    with patch.object(extraction.engine.model, "distributions", recording):
        return run(extraction, output), batches


def bare_forward(model: TopKModel, batches: list[Batch]) -> None:
    for batch in batches:
        model.bare_forward(batch.ids_BL, batch.mask_BL)


@torch.inference_mode()
def layers_and_head(model: TopKModel, batches: list[Batch]) -> None:
    for batch in batches:
        hidden_SH = model.split.hidden(input_ids=batch.ids_BL, attention_mask=batch.mask_BL).flatten(0, 1)
        hidden_SH = hidden_SH.index_select(0, batch.positions_S)
        for hidden_CH in torch.split(hidden_SH, model.chunk):
            model.split.head(hidden_CH)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> Seconds:
    synchronise()
    start, start_cpu = time.perf_counter(), time.process_time()
    function()
    synchronise()
    return Seconds(time.perf_counter() - start, time.process_time() - start_cpu)


def legs_of(extraction: Extraction, batches: list[Batch], work: Path) -> dict[str, Callable[[], object]]:
    """What is compared; each extraction gets a new folder in ``work``."""
    outputs = (work / f"round-{number}" for number in count())
    return {
        BARE: lambda: bare_forward(extraction.engine.model, batches),
        HEAD: lambda: layers_and_head(extraction.engine.model, batches),
        EXTRACTION: lambda: run(extraction, next(outputs)),
    }


def seconds_of(legs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
    return measure_rounds({leg: partial(seconds, work) for leg, work in legs.items()}, rounds, str)


def measure_top_k(shape: tuple[int, int], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds for one chunk: with ``top_k``, and with log_softmax, topk, gather and sum over all of it."""
    device, reserve = PartialState().device, torch.Generator().manual_seed(0)
    logits_CV = torch.randn(shape, generator=reserve).to(device)
    gold_C = torch.randint(shape[1], shape[:1], generator=reserve).to(device)

    def dense() -> None:
        logprobs_CV = logits_CV.log_softmax(-1)
        best = logprobs_CV.topk(K)
        best.values.exp().sum(-1).neg().add(1)
        logprobs_CV.gather(1, gold_C[:, None])

    ours_ms, dense_ms = [], []
    for number in range(2 + 3 * rounds):
        copy_CV = logits_CV.clone()  # top_k overwrites
        ours = 1e3 * seconds(partial(top_k, copy_CV, gold_C, K)).wall
        theirs = 1e3 * seconds(dense).wall
        if number >= 2:  # warm-up
            ours_ms.append(ours)
            dense_ms.append(theirs)
    return ours_ms, dense_ms


# Store


def write_store(
    folder: Path, identity: dict[str, Any], starts: Sequence[int], shards: Iterable[list[Representation]]
) -> RepresentationStore:
    """A store of these shards, by the program's own writer."""
    writer = StoreWriter(folder, identity, starts)
    writer.begin()
    for shard, rows in enumerate(shards):
        writer.write(shard, rows, {"positions": sum(map(len, rows))})
    writer.wait()
    writer.finish()
    return RepresentationStore(folder)


def readable_store(folder: Path, like: RepresentationStore) -> RepresentationStore:
    """A store of many shards with random content and rows as long as those of ``like``."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([len(row) for row in like], READ_SHARDS * ROWS_PER_SHARD)
    identity = {"top_k": K, "vocabulary": like.identity["vocabulary"]}
    kind = id_dtype(identity["vocabulary"])

    def row(number: int) -> Representation:
        length = lengths[number]
        return Representation(
            rng.integers(identity["vocabulary"], size=(length, K)).astype(kind),
            -rng.random((length, K)).astype(np.float16),
            rng.random(length).astype(np.float16),
            -rng.random(length).astype(np.float16),
            f"conversation {number}",
        )

    starts = range(0, len(lengths) + 1, ROWS_PER_SHARD)
    return write_store(folder, identity, starts, ([*map(row, range(*ends))] for ends in pairwise(starts)))


def measure_reading(store: RepresentationStore) -> dict[str, list[float]]:
    """Microseconds: to open the store, to map a shard, to get a row, to get a row and touch its data."""
    opening = [1e6 * seconds(partial(RepresentationStore, store.folder)).wall for _ in range(20)]
    fresh = RepresentationStore(store.folder)
    mapping = [1e6 * seconds(partial(fresh.__getitem__, row)).wall for row in range(0, len(fresh), ROWS_PER_SHARD)]
    for row in fresh:
        sum(part.sum(dtype=np.float64) for part in (row.ids, row.logprobs, row.tail, row.gold_logprob))
    rows = np.random.default_rng(1).integers(len(fresh), size=(2, READS)).tolist()
    getting, touching = [], []
    for row in rows[0]:
        start = time.perf_counter_ns()
        fresh[row]
        getting.append((time.perf_counter_ns() - start) / 1e3)
    for row in rows[1]:
        start = time.perf_counter_ns()
        fresh[row].gold_logprob.sum()
        touching.append((time.perf_counter_ns() - start) / 1e3)
    return {
        "open the store": opening,
        "first row of a shard": mapping,
        "a random row": getting,
        "a random row, and the sum of its gold_logprob": touching,
    }


# Report


def time_tables(spent: dict[str, list[Seconds]], tokens: int) -> tuple[str, str]:
    """Of the legs, and of their ratios within a round."""
    legs = []
    for leg, rounds in spent.items():
        walls, cpus = zip(*rounds, strict=True)
        legs.append((leg, spread(walls), spread(cpus), spread([tokens / wall for wall in walls], 0)))
    rows = []
    for reference, budget in ((BARE, TIME_BUDGET), (HEAD, None)):
        pairs = list(zip(spent[EXTRACTION], spent[reference], strict=True))
        wall, cpu = [ours.wall / theirs.wall for ours, theirs in pairs], [o.cpu / t.cpu for o, t in pairs]
        each = " ".join(f"{ratio:.3f}" for ratio in wall)
        limits = judged(wall, budget)
        rows.append((f"{EXTRACTION} / {reference}", spread(wall, 3), each, spread(cpu, 3), *limits))
    header = ("pair", "wall ratio", "round by round", "CPU ratio", "budget, wall", "verdict")
    return table(("leg", "wall, s", "CPU, s", "tokens/s"), legs), table(header, rows)


def top_k_table(rounds: int) -> str:
    rows = []
    for shape in CHUNK_SHAPES:
        ours_ms, dense_ms = measure_top_k(shape, rounds)
        ratios = [a / b for a, b in zip(ours_ms, dense_ms, strict=True)]
        rows.append((f"{list(shape)}", spread(ours_ms), spread(dense_ms), spread(ratios)))
    return table(("float32 logits", "top_k, ms", "log_softmax + topk, ms", "ratio"), rows)


def size_table(stores: list[RepresentationStore]) -> str:
    rows = []
    for store in stores:
        positions, vocabulary = store.manifest["positions"], store.identity["vocabulary"]
        each, budget = store.bytes / positions, BYTES_BUDGETS[id_dtype(vocabulary)]
        counts = (f"{vocabulary:,}", f"{len(store.manifest['shards'])}", f"{len(store):,}", f"{positions:,}")
        rows.append((*counts, f"{each:.2f}", *judged([each], budget)))
    header = ("vocabulary", "shards", "rows", "supervised tokens", "bytes per supervised token")
    return table((*header, "budget", "verdict"), rows)


def reading_table(times_us: dict[str, list[float]]) -> str:
    rows = []
    for what, times in times_us.items():
        limits = judged(times, ROW_BUDGET_US if "random" in what else None, " µs")
        rows.append((what, f"{median(times):.1f}", f"{np.percentile(times, 99):.1f}", *limits))
    return table(("what", "median, µs", "99th percentile, µs", "budget, median", "verdict"), rows)


def timed(
    work: Path, layout: str, rounds: int, tokens: int, batch_tokens: int
) -> tuple[str, dict[str, list[Seconds]], RepresentationStore, int]:
    """What was measured, seconds of each leg, the store, and the tokens with padding."""
    extraction = loaded(work, layout, tokens, batch_tokens)
    store, batches = recorded(extraction, extraction.config.output)
    spent = seconds_of(legs_of(extraction, batches, work / f"{layout}-rounds"), rounds)
    padded = sum(batch.ids_BL.numel() for batch in batches)
    read, supervised = store.manifest["tokens"], store.manifest["positions"]
    model = extraction.engine.model
    parameters = sum(weight.numel() for weight in model.model.parameters())
    setting = (
        f"{layout}: {parameters:,} parameters in {model.model.dtype}, on {model.device}; "
        f"{len(store):,} blocks of {read:,} tokens ({supervised / read:.0%} supervised) in {len(batches)} batches "
        f"of at most {batch_tokens:,} ({1 - read / padded:.1%} padding); rounds after one warm-up: {rounds}. "
        "Cells: median [min – max]; budgets are judged by the median."
    )
    return setting, spent, store, padded


def measurements(
    work: Path, layout: str, rounds: int, tokens: int, batch_tokens: int
) -> tuple[str, dict[str, Any]]:
    """The report's body, in Markdown, and the raw numbers."""
    setting, spent, store, padded = timed(work, layout, rounds, tokens, batch_tokens)
    read = store.manifest["tokens"]
    large = LARGE.get(layout, "gemma3-270m")
    large_setting, large_spent, large_store, _ = timed(work, large, rounds, tokens // 4, batch_tokens // 2)
    legs, in_rounds = time_tables(spent, read)
    large_legs, large_rounds = time_tables(large_spent, large_store.manifest["tokens"])
    narrow = [loaded(work, name, SIZE_TOKENS, SIZE_TOKENS // 8) for name in LAYOUTS if name.startswith("narrow")]
    stores = [run(extraction, extraction.config.output) for extraction in narrow]
    reading = measure_reading(readable_store(work / "reading", stores[0]))
    many = f"{READ_SHARDS * ROWS_PER_SHARD:,} rows in {READ_SHARDS} shards"
    parts = [
        ("Legs", legs),
        ("Time within a round", in_rounds),
        ("Legs with a vocabulary of 262k", f"{large_setting}\n\n{large_legs}"),
        ("Time within a round with a vocabulary of 262k", large_rounds),
        ("top_k of a chunk alone", top_k_table(rounds)),
        ("Store, manifest and schemas counted", size_table(stores)),
        ("Reading", f"{READS:,} reads of {many}, page cache warm.\n\n{reading_table(reading)}"),
    ]
    return f"{setting}\n\n{sections(parts)}", {"wall_and_cpu_s": spent, "tokens": read, "padded": padded}


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(LAYOUTS)[:3]), help="Default: llama-110m, qwen2-1.5b on a GPU.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds that count.")
@click.option("--tokens", type=int, help="Tokens in a leg, about. Default: 16384, 524288 on a GPU.")
@click.option("--batch-tokens", type=int, help="Most tokens in a batch. Default: 4096, 16384 on a GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-extract.md.")
def main(
    model: str | None, rounds: int, tokens: int | None, batch_tokens: int | None, out: Path | None, save: bool
) -> None:
    on_gpu = PartialState().device.type == "cuda"
    model = model or ("qwen2-1.5b" if on_gpu else "llama-110m")
    tokens = tokens or (524_288 if on_gpu else 16_384)
    batch_tokens = batch_tokens or (16_384 if on_gpu else 4096)
    with tempfile.TemporaryDirectory() as work:
        body, numbers = measurements(Path(work), model, rounds, tokens, batch_tokens)
    options = f"--model {model} --rounds {rounds} --tokens {tokens} --batch-tokens {batch_tokens}"
    command = f"python benchmarks/extract.py {options}"
    text = publish("extract", "Extraction benchmark", f"    {command}", machine(), body, save=save)
    if out is not None:
        Path(f"{out}.json").write_text(json.dumps({"command": command, "machine": machine(), **numbers}, indent=2))
        Path(f"{out}.md").write_text(text)


if __name__ == "__main__":
    main()
