"""Measures how time and memory of each stage grow with the data: sizes n, 4n and 16n, each command a process.

\b
  python benchmarks/growth.py --save                  1,000, 4,000 and 16,000 conversations, about an hour
  python benchmarks/growth.py --conversations 20 --layers 2      a trial of everything, some minutes

Conversations and models are those of examples/make_sharegpt.py. The models are so small that the stages' own work
counts: reading, rendering, tokenising, pairing, writing. Planning a merge is measured with Mixtrals of n, 4n and
16n layers, which have many small tensors; nothing is merged.

A time is a + b·n^x, where a is the start of the program. Three sizes give x: 4^x = (t₁₆ − t₄) / (t₄ − t₁). Memory
is the peak of RssAnon of the command and its processes; it is flat if 16n needs at most 1.1 times as much as 4n.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import yaml
from checkpoints import checkpoints, mixtral_config, recipe, tensor_count
from measure import machine, measured, publish, sections, table

from varm_common.process_usage import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_sharegpt import conversations, texts, write_models

SIZES = (1, 4, 16)
EXPONENT_BUDGET = 1.05  # of the time
MEMORY_BUDGET = 1.1  # 16n / 4n
TOKENS_OF = 1000  # conversations, on which the tokenizers are trained
EXPERTS = 8
FUSION = [sys.executable, "-m", "fusion_trainer"]
MERGE = [sys.executable, "-c", "from varm_merge.cli import main; main()"]

Command = list[str]


def data(path: Path, number: int) -> Path:
    """A JSON array of conversations."""
    with path.open("w", encoding="utf-8") as file:
        for place, row in enumerate(islice(conversations(seed=0), number)):
            file.write(("," if place else "[") + json.dumps(row, ensure_ascii=False) + "\n")
        file.write("]")
    return path


def stages(folder: Path, models: Path, number: int) -> Iterator[tuple[str, Command]]:
    """The commands in their order; each finds the results of those before it."""
    pivot, dialogues = str(models / "pivot"), str(folder / "dialogues")
    stores = {name: str(folder / name) for name in ("pivot", "source")}
    common = ["--data", str(data(folder / "chats.json", number)), "--pivot", pivot, "--dialogues", dialogues]
    yield "prepare", [*FUSION, "prepare", *common]
    for name, store in stores.items():
        yield f"extract {name}", [*FUSION, "extract", *common, "--model", str(models / name), "--output", store]
    sides = ["--source-store", stores["source"], "--pivot-store", stores["pivot"], "--dialogues", dialogues]
    for positions in ("boundary", "dtw"):
        output = str(folder / positions)
        aligned = ["--output", output, "--positions", positions, "--maps", f"{output}-maps"]
        yield f"align {positions}", [*FUSION, "align", *sides, *aligned]
    training = {"output_dir": str(folder / "target"), "max_steps": 1, "per_device_train_batch_size": 1}
    training |= {"save_strategy": "no", "report_to": "none"}
    train = {"pivot": pivot, "pivot_store": stores["pivot"], "aligned_stores": [str(folder / "boundary")]}
    train |= {"dialogues": dialogues, "training": training}
    yield "train, one step", [*FUSION, "train", written(folder / "train.yaml", yaml.safe_dump(train))]
    pipeline = {
        "work": str(folder / "work"),
        "pivot": pivot,
        "data": str(folder / "chats.json"),
        "sources": [{"name": name, "model": str(models / name)} for name in ("source", "unigram", "small")],
        "train": {"training": {"max_steps": 1}},
        "merges": {"varm": {"merge_method": "varm"}},
    }
    yield "run --dry-run", [*FUSION, "run", written(folder / "run.yaml", yaml.safe_dump(pipeline)), "--dry-run"]


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def planning(work: Path, layers: int) -> Iterator[tuple[str, Command]]:
    """Plans of a merge of two targets: what `check` computes from the headers."""
    folder = checkpoints(work, mixtral_config(layers, EXPERTS), seed=0)
    for granularity in ("matrix", "layer", "model"):
        path = written(folder / f"{granularity}.yaml", recipe(folder, "float32", granularity=granularity))
        yield f"merge planning, {granularity}", [*MERGE, "check", path]


def exponent(seconds: list[float]) -> float:
    """x of a + b·n^x through three points; NaN if the time does not grow."""
    first, second = seconds[1] - seconds[0], seconds[2] - seconds[1]
    return math.log(second / first, SIZES[1] / SIZES[0]) if min(first, second) > 0 else math.nan


def judged(runs: list[Run]) -> tuple[str, ...]:
    cpu, memory = [run.cpu_s for run in runs], [run.anonymous_mib for run in runs]
    power, growth = exponent(cpu), memory[2] / memory[1]
    met = not power > EXPONENT_BUDGET and growth <= MEMORY_BUDGET
    return (
        " · ".join(f"{run.wall_s:.1f}" for run in runs),
        " · ".join(f"{seconds:.1f}" for seconds in cpu),
        f"{power:.2f}",
        " · ".join(f"{mib:,.0f}" for mib in memory),
        f"{growth:.2f}",
        "met" if met else "NOT met",
    )


def measurements(work: Path, number: int, layers: int) -> tuple[str, str]:
    """The tables of the stages and of the plans."""
    models = work / "models"
    write_models(models, list(texts(islice(conversations(seed=1), TOKENS_OF))), seed=0)
    stage_runs: dict[str, list[Run]] = {}
    plan_runs: dict[str, list[Run]] = {}
    for size in SIZES:
        folder = work / str(size)
        folder.mkdir()
        commands = (stages(folder, models, number * size), planning(work / "merges", layers * size))
        for runs, named in zip((stage_runs, plan_runs), commands, strict=True):
            for name, command in named:
                runs.setdefault(name, []).append(run := measured(command))
                click.echo(f"{size}n: {name}: {run.cpu_s:.1f} s CPU, {run.anonymous_mib:,.0f} MiB", err=True)
    return growth_table(stage_runs), growth_table(plan_runs)


def growth_table(runs: dict[str, list[Run]]) -> str:
    header = ("", "wall, s", "CPU, s", "exponent of the CPU time", "peak memory, MiB", "16n / 4n", "budgets")
    return table(header, [(name, *judged(of_sizes)) for name, of_sizes in runs.items()])


@click.command(help=__doc__)
@click.option("--conversations", "number", type=click.IntRange(min=4), default=1000, show_default=True, help="n.")
@click.option("--layers", type=click.IntRange(min=1), default=8, show_default=True, help="n of the plans.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-growth.md.")
def main(number: int, layers: int, save: bool) -> None:
    with tempfile.TemporaryDirectory() as work:
        of_stages, of_plans = measurements(Path(work), number, layers)
    tensors = ", ".join(f"{tensor_count(mixtral_config(layers * size, EXPERTS)):,}" for size in SIZES)
    counts = ", ".join(f"{number * size:,}" for size in SIZES)
    command = f"    python benchmarks/growth.py --conversations {number} --layers {layers}"
    budgets = f"Budgets: exponent ≤ {EXPONENT_BUDGET}, memory of 16n ≤ {MEMORY_BUDGET} × that of 4n."
    about = f"{budgets} Exponents are those of the CPU time, without the start of a program."
    body = sections([(f"{counts} conversations", of_stages), (f"Plans of {tensors} tensors", of_plans)])
    publish("growth", "Growth", command, machine(), about, body, save=save)


if __name__ == "__main__":
    main()
