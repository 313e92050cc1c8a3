"""Fuse and merge a small world: three sources of other architectures and tokenizers into one Llama, and compare.

\b
  python examples/demo.py                  five minutes on two cores; writes demo_out/
  python examples/demo.py --full --save    half an hour: three worlds, each also at the papers' λ and without wrong
                                           answers; writes benchmarks/results/YYYY-MM-DD-demo-full.{md,json,png}
  python examples/demo.py --out DIR --seed 7

`small_world/world.py` makes the chats and trains the four models; `fusion-trainer run` does all the rest, as
`small_world/pipeline.yaml` says; here the scores become the papers' tables. Table 1 compares pivot, sources,
targets and merges; Table 2 VaRM's granularities. If interrupted, run the same command again.

All scores are on questions that no model was trained on. Torch gets one thread: matrices this small gain nothing
from a second one, and the numbers do not depend on how many cores there are.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import click
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "examples" / "small_world" / "world.py"
PIPELINE = ROOT / "examples" / "small_world" / "pipeline.yaml"
OUT = ROOT / "demo_out"  # the folder in the pipeline's paths
RESULTS = ROOT / "benchmarks" / "results"

TABLE_1 = {
    "pivot": "pivot (Llama)",
    "source-letters": "source letters (GPT-NeoX)",
    "source-numbers": "source numbers (Mistral)",
    "source-almanac": "source almanac (Mixtral)",
    "target-clm": "CLM",
    "target-multi": "Multi",
    "target-letters": "target letters",
    "target-numbers": "target numbers",
    "target-almanac": "target almanac",
    "merge-linear": "linear",
    "merge-slerp": "SLERP",
    "merge-task_arithmetic": "task arithmetic",
    "merge-ties": "TIES",
    "merge-dare": "DARE",
    "merge-sce": "SCE",
    "merge-varm": "VaRM",
}
TABLE_2 = {
    "merge-varm_model": "model",
    "merge-varm_layer": "layer",
    "merge-varm_module": "module",
    "merge-varm": "matrix",
    "merge-varm_parameter": "parameter",
}
AVERAGE = "average"
MEASURES = {"exact_match": "Answers wholly right, %", "nats_per_byte": "Held-out loss, nats per byte"}
SEED, SEEDS = 0, (1, 2, 3)
THREE = ("letters", "numbers", "almanac")
VARIANTS = {"λ = 0.9": {"clm_weight": 0.9}, "no wrong answers": {"data": "corrected.jsonl"}}
"""What else ``--full`` tries in each world, with no merges but these two."""
MERGES = ("linear", "varm")
COMPARED = {
    "CLM": ["target-clm"],
    "pairwise targets": [f"target-{name}" for name in THREE],
    "Multi": ["target-multi"],
    "linear": ["merge-linear"],
    "VaRM": ["merge-varm"],
}

Scores = dict[str, dict[str, dict[str, float]]]
"""Model → skill → measure → value."""


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, help="Default: demo_out")
@click.option(
    "--seed", "seeds", type=int, multiple=True, help="Of world and training; may be given several times."
)
@click.option("--full", is_flag=True, help="Three seeds of a larger world.")
@click.option("--save", is_flag=True, help="Keep the results in benchmarks/results.")
def main(out: Path, seeds: tuple[int, ...], full: bool, save: bool) -> None:
    started = time.perf_counter()
    out, seeds = out.resolve(), seeds or (SEEDS if full else (SEED,))
    scores: dict[str, list[Scores]] = {}
    folders = [out / f"seed-{seed}" if len(seeds) > 1 else out for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        make_world(folder, seed)
        for variant, changes in {"": {}, **(VARIANTS if full else {})}.items():
            scores.setdefault(variant, []).append(fused(folder, seed, variant, **changes))
    text = report(scores, folders, seeds, full)
    write(out / "results", text, seeds, scores)
    if save:
        write(RESULTS / f"{date.today()}-demo{'-full' if full else ''}", text, seeds, scores)
    spent = time.perf_counter() - started
    click.echo(f"\n{text}\n{os.path.relpath(out / 'results.md')}, .json, .png; {spent:.0f} s")


# The fusion


def make_world(folder: Path, seed: int) -> None:
    """Chats and models, if they are not there."""
    done = folder / "world.json"
    rules = hashlib.sha256(WORLD.read_bytes() + WORLD.with_name("chat.jinja").read_bytes()).hexdigest()
    if not done.is_file() or json.loads(done.read_text()) != {"seed": seed, "rules": rules}:
        done.unlink(missing_ok=True)
        call([sys.executable, WORLD, folder / "world", "--seed", str(seed)])
        done.write_text(json.dumps({"seed": seed, "rules": rules}))


def fused(folder: Path, seed: int, variant: str, **changes: Any) -> Scores:
    """Run the pipeline on a world, as far as that was not done before; the scores of all models."""
    text = PIPELINE.read_text("utf-8").replace(f"{OUT.name}/", f"{os.path.relpath(folder, ROOT)}/")
    settings = yaml.safe_load(text)
    settings["train"]["training"]["seed"] = seed
    pipeline = folder / "pipeline.yaml"
    if variant:
        pipeline = folder / f"pipeline-{'-'.join(re.findall('[a-z0-9]+', variant))}.yaml"
        settings["work"] += pipeline.stem.removeprefix("pipeline")
        settings["merges"] = {name: settings["merges"][name] for name in MERGES}
    for name, value in changes.items():
        if name == "data":
            settings["data"] = str(Path(settings["data"]).with_name(value))
        else:
            settings["train"][name] = value
    pipeline.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    call([Path(sys.executable).parent / "fusion-trainer", "run", pipeline])
    scores: Scores = json.loads((ROOT / settings["work"] / "report.json").read_text())
    return scores


def call(command: Sequence[str | Path]) -> None:
    shown = [os.path.relpath(word, ROOT) if Path(word).is_absolute() else str(word) for word in command]
    click.echo(f"$ {' '.join(shown)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise click.ClickException(f"`{' '.join(shown)}` ended with exit code {done.returncode}")


# Results


def skills(scores: Scores) -> list[str]:
    return [name for name in scores["pivot"] if name != "all"]


def values(worlds: Sequence[Scores], model: str, column: str, measure: str) -> list[float]:
    """Of a model in each world; the average is that of the skills."""
    scale = 100 if measure == "exact_match" else 1
    columns = skills(worlds[0]) if column == AVERAGE else [column]
    return [scale * mean(scores[model][skill][measure] for skill in columns) for scores in worlds]


def cell(numbers: Sequence[float], measure: str) -> str:
    digits = 1 if measure == "exact_match" else 3
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def grid(corner: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table in Markdown; each row has a title and its cells."""
    head = [corner, *columns]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([title, *cells] for title, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(worlds: Sequence[Scores], rows: Mapping[str, str], measure: str) -> str:
    columns = [*skills(worlds[0]), AVERAGE]

    def cells(model: str) -> list[str]:
        return [cell(values(worlds, model, column, measure), measure) for column in columns]

    return grid("", columns, [(title, cells(model)) for model, title in rows.items()])


def differences(worlds: Sequence[Scores]) -> str:
    """World by world, so that what the worlds differ in is not part of the spread."""
    pairs = [(f"target-{name}", "target-clm") for name in (*THREE, "multi")]
    pairs += [("merge-varm", name) for name in ("target-clm", "target-multi", "merge-linear", "merge-sce")]

    def difference(first: str, second: str, measure: str) -> str:
        both = zip(*(values(worlds, model, AVERAGE, measure) for model in (first, second)), strict=True)
        return cell([mine - theirs for mine, theirs in both], measure)

    rows = [
        (f"{TABLE_1[first]} − {TABLE_1[second]}", [difference(first, second, measure) for measure in MEASURES])
        for first, second in pairs
    ]
    return grid("average", MEASURES.values(), rows)


def variants(scores: Mapping[str, Sequence[Scores]]) -> str:
    """The averages of the main models in each variant."""

    def averages(worlds: Sequence[Scores], models: Sequence[str], measure: str) -> str:
        each = [values(worlds, model, AVERAGE, measure) for model in models]
        return cell([mean(of_world) for of_world in zip(*each, strict=True)], measure)

    parts = []
    for measure, title in MEASURES.items():
        rows = [
            (variant or "as above", [averages(worlds, models, measure) for models in COMPARED.values()])
            for variant, worlds in scores.items()
        ]
        parts.append(f"{title}\n\n{grid('', COMPARED, rows)}")
    return "\n\n".join(parts)


def weights(folders: Sequence[Path]) -> str:
    """Of the targets in VaRM's merges: the least, the median and the greatest of all units and worlds."""
    rows = []
    for merge, title in TABLE_2.items():
        given: dict[str, list[float]] = {name: [] for name in THREE}
        for folder in folders:
            merged = folder / "fusion" / "merges" / merge.removeprefix("merge-")
            for unit in json.loads((merged / "varm_weights.json").read_text())["units"]:
                for target, numbers in unit["targets"].items():
                    given[Path(target).name].append(numbers["weight"])
        cells = [f"{median(own):.2f} [{min(own):.2f} – {max(own):.2f}]" for own in given.values()]
        rows.append((title, cells))
    return grid("", THREE, rows)


def report(
    scores: Mapping[str, Sequence[Scores]], folders: Sequence[Path], seeds: Sequence[int], full: bool
) -> str:
    main_ones = scores[""]
    command = "python examples/demo.py" + (" --full" if full else "")
    about = f"`{command}`, {date.today()}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    about += "; mean ± standard deviation over the seeds" if len(seeds) > 1 else ""
    about += f"; {main_ones[0]['pivot']['all']['rows']} held-out questions. "
    about += f"{platform.machine()}, {os.cpu_count()} cores; "
    about += ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "mergekit"))
    parts = ["# A small world, fused and merged", about]
    parts.append("## Table 1: pivot, sources, targets, merges of the three pairwise targets")
    parts += [f"{title}\n\n{table(main_ones, TABLE_1, measure)}" for measure, title in MEASURES.items()]
    parts.append("## Table 2: VaRM by granularity")
    parts += [f"{title}\n\n{table(main_ones, TABLE_2, measure)}" for measure, title in MEASURES.items()]
    parts.append(f"## Differences\n\n{differences(main_ones)}")
    about = "Median [least – greatest] over the units; of `parameter`, where each element has its own, over the "
    about += "means of matrices. Equal weights, 0.33 each, are `linear`."
    parts.append(f"## The weights that VaRM gave\n\n{about}\n\n{weights(folders)}")
    if len(scores) > 1:
        parts.append(f"## Why: averages at another λ, and on chats without wrong answers\n\n{variants(scores)}")
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str, seeds: Sequence[int], scores: Mapping[str, Sequence[Scores]]) -> None:
    path.with_suffix(".md").write_text(text, "utf-8")
    content = {variant or "as above": dict(zip(seeds, own, strict=True)) for variant, own in scores.items()}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(path.with_suffix(".png"), scores[""])


def draw(path: Path, worlds: Sequence[Scores]) -> None:
    """Both tables as heat maps: rows are models, columns skills."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {**TABLE_1, **{name: f"VaRM, {title}" for name, title in TABLE_2.items()}}
    columns = [*skills(worlds[0]), AVERAGE]
    figure, both = pyplot.subplots(1, 2, figsize=(14, 8.5), layout="constrained", sharey=True)
    for axes, (measure, title), colours in zip(both, MEASURES.items(), ("YlGn", "YlOrRd"), strict=True):
        means = [[mean(values(worlds, model, column, measure)) for column in columns] for model in rows]
        axes.imshow(means, cmap=colours, aspect="auto", vmin=0, vmax=None if measure == "nats_per_byte" else 100)
        limit = max(map(max, means))
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                shown = f"{value:.0f}" if measure == "exact_match" else f"{value:.2f}"
                axes.text(x, y, shown, ha="center", va="center", color="white" if value > 0.7 * limit else "black")
        axes.set_title(title)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows.values())
        axes.axvline(len(columns) - 1.5, color="white", linewidth=4)
        for border in (0.5, 3.5, 8.5, len(TABLE_1) - 0.5):
            axes.axhline(border, color="white", linewidth=4)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
