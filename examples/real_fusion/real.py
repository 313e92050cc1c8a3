"""Fuse two real models in both directions, merge the targets, and compare: SmolLM2-135M-Instruct and Gemma 3 270M.

\b
  python examples/real_fusion/real.py              about 80 minutes on two cores; `make real`
  python examples/real_fusion/real.py --full       three seeds; `make real-full`
  python examples/real_fusion/real.py --save       also writes benchmarks/results/YYYY-MM-DD-real.{md,json,png}

The models come from Python packages (`models.py`). The data are made here or come with Python (`data.py`). Each
model is once the pivot and once the source, as `pipeline.yaml` says. The report has the papers' two tables: pivot,
source, targets and merges; and VaRM by granularity. If the command is interrupted, run it again: finished stages
are kept.

The loss is in nats per byte of the answers to held-out prompts. A difference is paired: both models are scored on
the same conversations, and its standard error is over conversations. With several seeds, a value is the mean ± the
standard deviation over the seeds.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import yaml
from data import make_data
from models import GEMMA3, SMOLLM2, make_models

from varm_common.standard_errors import difference
from varm_common.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = Path(__file__).with_name("pipeline.yaml")
OUT = ROOT / "real_out"
RESULTS = ROOT / "benchmarks" / "results"
SEED, SEEDS = 0, (0, 1, 2)
DIRECTIONS = {SMOLLM2: GEMMA3, GEMMA3: SMOLLM2}
"""The source of each pivot."""

SINGLE = {"pivot": "pivot", "source-own": "source", "target-clm": "CLM"}
FUSED = {
    f"target-{template}-{weight}": f"fused, {title}, λ {weight}"
    for template, title in (("own", "`template: own`"), ("pivot-text", "`template: pivot`"))
    for weight in ("0.9", "0.5")
}
MERGED = {
    "merge-linear": "linear",
    "merge-task_arithmetic": "task arithmetic",
    "merge-ties": "TIES",
    "merge-dare": "DARE",
    "merge-sce": "SCE",
    "merge-varm": "VaRM",
}
TABLE_1 = {**SINGLE, **FUSED, **MERGED}
TABLE_2 = {
    "merge-varm_model": "model",
    "merge-varm_layer": "layer",
    "merge-varm_module": "module",
    "merge-varm": "matrix",
    "merge-varm_parameter": "parameter",
}
CHOOSING, PROSE = "choosing-", "prose"

Conversations = dict[str, dict[str, Any]]
"""Sums by conversation, as `fusion-trainer evaluate` writes them: group, nats, bytes, rows, matched."""
Scores = dict[str, Conversations]
"""By model."""
Keep = Callable[[str], bool]
"""Whether a group counts."""


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, help="Default: real_out")
@click.option("--seed", "seeds", type=int, multiple=True, help="Of data and training; may be given several times.")
@click.option("--full", is_flag=True, help="Three seeds.")
@click.option("--save", is_flag=True, help="Keep the results in benchmarks/results.")
def main(out: Path, seeds: tuple[int, ...], full: bool, save: bool) -> None:
    started = time.perf_counter()
    out, seeds = out.resolve(), seeds or (SEEDS if full else (SEED,))
    scores: dict[str, list[Scores]] = {pivot: [] for pivot in DIRECTIONS}
    for seed in seeds:
        for pivot in DIRECTIONS:
            scores[pivot].append(fuse(written_pipeline(out, pivot, seed)))
    text = report(scores, seeds)
    write(out / "results", text, scores, seeds)
    if save:
        write(RESULTS / f"{date.today()}-real{'-full' if full else ''}", text, scores, seeds)
    spent = (time.perf_counter() - started) / 60
    click.echo(f"\n{text}\n{os.path.relpath(out / 'results.md')}, .json, .png; {spent:.0f} minutes")


def written_pipeline(out: Path, pivot: str, seed: int) -> Path:
    """The pipeline for one pivot; models and data are made if they are not there."""
    models, folder = make_models(out / "models"), out / f"seed-{seed}"
    data = folder / "data"
    if not (data / "held_out.jsonl").is_file():
        make_data(data, seed)
    settings = yaml.safe_load(PIPELINE.read_text("utf-8"))
    settings["work"], settings["pivot"] = str(folder / pivot), str(models[pivot])
    settings["data"] = [str(data / name) for name in ("chats.jsonl", "documents.jsonl")]
    settings["evaluate"]["data"] = str(data / "held_out.jsonl")
    for given in settings["sources"]:
        given["model"] = str(models[DIRECTIONS[pivot]])
    settings["train"]["training"]["seed"] = seed
    pipeline = folder / f"{pivot}.yaml"
    pipeline.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return pipeline


def fuse(pipeline: Path) -> Scores:
    """Run the pipeline, as far as it has not run. Returns the scores of all its models."""
    click.echo(f"$ fusion-trainer run {os.path.relpath(pipeline)}")
    done = subprocess.run([sys.executable, "-m", "fusion_trainer", "run", str(pipeline)])
    if done.returncode:
        raise click.ClickException(f"the pipeline {pipeline} ended with exit code {done.returncode}")
    return read_scores(pipeline.with_suffix(""))


def read_scores(work: Path) -> Scores:
    """The sums of every conversation, for every model of a pipeline."""
    files = (work / "scores" / model / "scores.json" for model in (*TABLE_1, *TABLE_2))
    return {file.parent.name: json.loads(file.read_text("utf-8"))["conversations"] for file in files}


# Numbers


def held_out(group: str) -> bool:
    return not group.startswith(CHOOSING)


def is_prose(group: str) -> bool:
    return group == PROSE


def is_question(group: str) -> bool:
    return held_out(group) and not is_prose(group)


def sums(conversations: Conversations, keep: Keep, top: str, bottom: str) -> tuple[list[float], list[float]]:
    """Numerators and denominators of a score, one of each for every conversation whose group counts."""
    kept = [row for _, row in sorted(conversations.items()) if keep(row["group"])]
    return [row[top] for row in kept], [row[bottom] for row in kept]


def ratio(conversations: Conversations, keep: Keep, top: str = "nats", bottom: str = "bytes") -> float:
    tops, bottoms = sums(conversations, keep, top, bottom)
    return sum(tops) / sum(bottoms)


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation over the seeds if there are several."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def loss(runs: Sequence[Scores], model: str, keep: Keep) -> str:
    return spread([ratio(run[model], keep) for run in runs], 4)


def paired(
    runs: Sequence[Scores], model: str, other: str, keep: Keep, top: str = "nats", bottom: str = "bytes"
) -> tuple[float, float]:
    """The difference, by default in nats per byte, and its standard error; the mean over the seeds of both."""
    pairs = [difference(*(sums(run[name], keep, top, bottom) for name in (model, other))) for run in runs]
    errors = [error or 0.0 for _, error in pairs]
    return mean(value for value, _ in pairs), sum(error**2 for error in errors) ** 0.5 / len(errors)


def shown(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f} ± {pair[1]:.4f}"


def verdict(pair: tuple[float, float]) -> str:
    """Lower loss is better; up to two standard errors are noise."""
    if abs(pair[0]) <= 2 * pair[1]:
        return "equal within noise"
    return "better" if pair[0] < 0 else "worse"


def exact(runs: Sequence[Scores], model: str) -> str:
    return spread([100 * ratio(run[model], is_question, "matched", "rows") for run in runs], 1)


def best(runs: Sequence[Scores], models: Mapping[str, str]) -> str:
    """The model with the lowest loss on the part for choosing."""
    return min(models, key=lambda model: mean(ratio(run[model], lambda g: not held_out(g)) for run in runs))


# Report


def findings(pivot: str, runs: Sequence[Scores]) -> list[str]:
    """What was asked, answered by held-out differences."""
    target, merge = best(runs, FUSED), best(runs, {**MERGED, **TABLE_2})
    titles = {**TABLE_1, **{name: f"VaRM {title}" for name, title in TABLE_2.items()}}
    questions = [
        ("Does fusion beat CLM?", target, "target-clm"),
        ("Does CLM beat the pivot?", "target-clm", "pivot"),
        ("Does a merge beat the best target?", merge, target),
        ("Does VaRM beat linear?", "merge-varm", "merge-linear"),
        ("Is the source's own template better, at λ 0.5?", "target-own-0.5", "target-pivot-text-0.5"),
    ]
    rows = []
    for question, model, other in questions:
        pair = paired(runs, model, other, held_out)
        rows.append([question, f"{titles[model]} − {titles[other]}", shown(pair), verdict(pair)])
    head = [f"pivot {pivot}", "compared", "nats per byte", "the first is"]
    return [markdown(head, rows)]


def table_1(runs: Sequence[Scores]) -> str:
    head = ["", "prose", "questions", "all", "all − CLM", "exact answers, %"]
    rows = []
    for model, title in TABLE_1.items():
        losses = [loss(runs, model, keep) for keep in (is_prose, is_question, held_out)]
        against = "" if model == "target-clm" else shown(paired(runs, model, "target-clm", held_out))
        rows.append([title, *losses, against, exact(runs, model)])
    return markdown(head, rows)


def table_2(runs: Sequence[Scores]) -> str:
    head = ["granularity", "prose", "questions", "all", "all − linear", "exact answers, %"]
    rows = []
    for model, title in TABLE_2.items():
        losses = [loss(runs, model, keep) for keep in (is_prose, is_question, held_out)]
        against = shown(paired(runs, model, "merge-linear", held_out))
        rows.append([title, *losses, against, exact(runs, model)])
    return markdown(head, rows)


def report(scores: Mapping[str, Sequence[Scores]], seeds: Sequence[int]) -> str:
    first = scores[SMOLLM2][0]["pivot"]
    counts = [sum(keep(row["group"]) for row in first.values()) for keep in (is_prose, is_question)]
    chosen_by = len(first) - sum(counts)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "mergekit"))
    parts = [
        "# Two real models, fused in both directions",
        f"`python examples/real_fusion/real.py`, {date.today()}; seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; {platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, {packages}. For each seed {counts[0]} held-out chats about topics of the "
        f"Python language and {counts[1]} held-out questions; {chosen_by} further ones to choose by.",
        "Data: `pydoc_data.topics` of this Python (PSF licence), and questions made by "
        "examples/small_world/world.py (Apache-2.0). Models: SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M "
        "(Gemma's terms of use), both from quantised files.",
    ]
    parts.append(
        "Target and merge are the best by the part for choosing; differences are on all held-out chats, with "
        "standard errors. A difference of up to two standard errors is noise."
    )
    for pivot, runs in scores.items():
        parts += findings(pivot, runs)
    for pivot, runs in scores.items():
        parts.append(f"## Pivot {pivot}, source {DIRECTIONS[pivot]}")
        parts.append(
            "Table 1: loss in nats per byte, lower is better; the difference from CLM with its standard error "
            "over conversations; exact answers to the questions."
        )
        parts.append(table_1(runs))
        parts.append("Table 2: VaRM by granularity; the difference from the linear merge.")
        parts.append(table_2(runs))
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str, scores: Mapping[str, Sequence[Scores]], seeds: Sequence[int]) -> None:
    """Write report, scores and picture."""
    path.with_suffix(".md").write_text(text, "utf-8")
    content = {
        pivot: {
            seed: {model: sums_by_group(conversations) for model, conversations in run.items()}
            for seed, run in zip(seeds, runs, strict=True)
        }
        for pivot, runs in scores.items()
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    draw(path.with_suffix(".png"), scores)


def sums_by_group(conversations: Conversations) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in conversations.values():
        total = groups.setdefault(row["group"], dict.fromkeys(("rows", "bytes", "nats", "matched"), 0))
        for name in total:
            total[name] += row[name]
    return groups


def draw(path: Path, scores: Mapping[str, Sequence[Scores]]) -> None:
    """Each model's difference from CLM on all held-out chats, with two standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: title.replace("`", "") for name, title in (FUSED | MERGED).items()}
    rows |= {name: f"VaRM, {title}" for name, title in TABLE_2.items() if name not in MERGED}
    figure, both = pyplot.subplots(1, len(scores), figsize=(11, 5.5), layout="constrained", sharey=True)
    for axes, (pivot, runs) in zip(both, scores.items(), strict=True):
        pairs = [paired(runs, model, "target-clm", held_out) for model in rows]
        for y, (model, (value, error)) in enumerate(zip(rows, pairs, strict=True)):
            colour = "#1f6f8b" if model in FUSED else "#c8553d"
            axes.errorbar(value, y, xerr=2 * error, fmt="o", color=colour, capsize=3)
        axes.axvline(0, color="#888", linewidth=1)
        axes.set_yticks(range(len(rows)), rows.values())
        axes.set_title(f"pivot {pivot}")
        axes.set_xlabel("nats per byte − CLM (lower is better), ± 2 standard errors")
        axes.grid(axis="x", color="#ddd")
    both[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
