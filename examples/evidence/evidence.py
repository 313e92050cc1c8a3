"""Which fusion, and which merge? Two tables: fusions by their settings, and merges as published and tuned.

\b
  python examples/evidence/evidence.py small     three seeds of the world of `make demo`, over 90 minutes
  python examples/evidence/evidence.py real      the models of `make real`, in its folder, 2 hours for each pivot
  python examples/evidence/evidence.py small --seed 1 --seed 2 --save

Fusions: the papers' way, and each loss of `fusion-trainer train`; a target for each source, and Multi, the target
of all sources; against CLM alone. Merges: each method with the pipeline's settings, and with the values that
`varm-merge tune` finds. The small world has two further cases in which the targets differ much: trained for
different times, and trained in different parts of the model.

A third of the held-out questions (small world), or the part for choosing (real models), chooses the tuned values.
The rest is reported: the loss over all bytes, the mean of the skills' losses, and exact answers. A difference is
paired: both models are scored on the same conversations, and its standard error is over conversations. If the
command is interrupted, run it again: finished stages are kept. `--save` writes
benchmarks/results/YYYY-MM-DD-evidence-WORLD.{md,json}.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import click
import yaml

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "real_fusion")]

import demo  # noqa: E402
import real  # noqa: E402

from varm_common.tables import markdown  # noqa: E402

RESULTS = EXAMPLES.parent / "benchmarks" / "results"
BIN = Path(sys.executable).parent
PAPERS = "papers-"
"""Before the name of a source that is aligned in the papers' way."""

FUSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "papers": ("the papers' way", {"unit": "token"}),
    "default": ("the default", {}),
    "bucket": ("`tail: bucket`", {"tail": "bucket"}),
    "reverse": ("`divergence: reverse_kl`", {"tail": "bucket", "divergence": "reverse_kl"}),
    "js": ("`divergence: js`", {"tail": "bucket", "divergence": "js"}),
    "alm": ("ALM alone", {"alm_weight": 1.0}),
    "both": ("ALM and top k", {"alm_weight": 0.5}),
}
TUNED: dict[str, tuple[str, list[str]]] = {
    "task_arithmetic": ("task arithmetic", ["lambda=0:6"]),
    "ties": ("TIES", ["lambda=0:6"]),
    "dare": ("DARE", ["lambda=0:6"]),
    "sce": ("SCE", ["select_topk"]),
    "varm": ("VaRM", ["lambda=0:6"]),
    "varm_parameter": ("VaRM parameter", ["lambda=0:6"]),
    "varm_depth": ("VaRM, λ by depth", ["lambda:depth=0:6"]),
    "varm_targets": ("VaRM, a weight for each target", ["weight:target"]),
    "clm": ("CLM alone, scaled", ["lambda=0:6"]),
}
"""What `varm-merge tune` searches, by merge."""
STARTS = {"varm_depth": "varm", "varm_targets": "varm", "clm": "varm"}
"""The merge whose recipe a search begins with, if its name is another."""
AS_PUBLISHED = {
    "linear": "linear",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "sce": "SCE",
    "varm": "VaRM",
    "varm_layer": "VaRM layer",
    "varm_parameter": "VaRM parameter",
}

Conversations = real.Conversations
Run = dict[str, Conversations]
"""The scores of one seed: by model, the sums of every conversation."""


@dataclass(frozen=True)
class World:
    """Where one seed's fusion runs, and what is fused.

    Attributes:
        name: Of the seed, or of the pivot.
        settings: The pipeline's, with the targets and merges of this experiment.
        sources: The names of the sources, without those of the papers' way.
        cases: The targets of each case of merges; a merge of a case is named `CASE-METHOD`.
        choosing: The conversations that choose.
        threads: Of torch.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    sources: list[str]
    cases: dict[str, list[str]]
    choosing: Path
    threads: int

    @property
    def work(self) -> Path:
        return Path(self.settings["work"])

    def call(self, *command: str | Path) -> None:
        """Run a program; its output goes to `log-NAME.txt`."""
        log = self.folder / f"log-{self.name}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("a") as file:
            done = subprocess.run(
                list(map(str, command)), cwd=EXAMPLES.parent, env=environment, stdout=file, stderr=file
            )
        if done.returncode:
            raise click.ClickException(
                f"`{Path(command[0]).name} {command[1]}` ended with {done.returncode}: {log}"
            )


def targets_of(sources: Sequence[str], common: Mapping[str, Any]) -> dict[str, Any]:
    """A target of each source and, if there are several, one of all, for every kind of fusion; and CLM."""
    targets: dict[str, Any] = {"clm": {"clm_weight": 1.0}}
    for fusion, (_, own) in FUSIONS.items():
        named = [PAPERS * (fusion == "papers") + source for source in sources]
        kinds = dict(zip(sources, ([one] for one in named), strict=True))
        if len(named) > 1:
            kinds["multi"] = named
        targets |= {f"{fusion}-{kind}": {"sources": given, **common, **own} for kind, given in kinds.items()}
    return targets


def small_world(folder: Path, seed: int) -> World:
    """The pipeline of the demo with more targets, and three cases of merges."""
    folder.mkdir(parents=True, exist_ok=True)
    demo.make_world(folder, seed)
    text = demo.PIPELINE.read_text("utf-8").replace(f"{demo.OUT.name}/", f"{os.path.relpath(folder, demo.ROOT)}/")
    settings = yaml.safe_load(text)
    settings["train"]["training"]["seed"] = seed
    settings["align"]["chunks"] = True
    names = [*demo.THREE]
    papers = {"positions": "dtw", "map": "min_edit_distance", "chunks": False}
    settings["sources"] += [
        {**source, "name": PAPERS + name, "align": papers}
        for name, source in zip(names, settings["sources"], strict=True)
    ]
    targets = targets_of(names, {})
    for name, epochs in zip(names, (2, 10, 40), strict=True):
        targets[f"time-{name}"] = {"sources": [name], "training": {"num_train_epochs": epochs}}
    layers = {
        "letters": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "numbers": ["gate_proj", "up_proj"],
        "almanac": ["down_proj"],
    }
    for name in names:
        lora = {"r": 32, "lora_alpha": 64, "target_modules": layers[name]}
        targets[f"parts-{name}"] = {"sources": [name], "lora": lora}
    cases = {case: [f"{case}-{name}" for name in names] for case in ("default", "time", "parts")}
    kept = {name: settings["merges"][name] for name in AS_PUBLISHED}
    settings["merges"] = {
        f"{case}-{name}": {**recipe, "targets": merged}
        for case, merged in cases.items()
        for name, recipe in kept.items()
    }
    settings["targets"] = targets
    return World(f"seed-{seed}", folder, settings, names, cases, choosing_third(settings), 1)


def choosing_third(settings: Mapping[str, Any]) -> Path:
    """Every third held-out conversation, in a file of its own."""
    held_out = Path(EXAMPLES.parent, settings["evaluate"]["data"])
    rows = held_out.read_text("utf-8").splitlines(keepends=True)
    chosen = held_out.with_name("choosing.jsonl")
    write_if_new(chosen, "".join(rows[::3]))
    return chosen


def write_if_new(path: Path, text: str) -> None:
    """Leave the time of a file alone that has the text already: a search is repeated if its inputs are newer."""
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def real_world(out: Path, pivot: str, seed: int) -> World:
    """The pipeline of `make real` with further targets, in its own folder: stages that it has made are used."""
    written = real.written_pipeline(out, pivot, seed)
    folder, settings = written.parent, yaml.safe_load(written.read_text("utf-8"))
    (source,) = [source for source in settings["sources"] if source["name"] == "own"]
    papers = {"positions": "dtw", "map": "min_edit_distance", "chunks": False}
    settings["sources"].append({**source, "name": PAPERS + "own", "template": "pivot", "align": papers})
    fused = {"default-own" if name == "own-0.5" else name: own for name, own in settings["targets"].items()}
    merged = [name for name in fused if name != "clm"]
    settings["targets"] = targets_of(["own"], {"clm_weight": 0.5}) | fused
    settings["merges"] = {f"real-{name}": {**settings["merges"][name], "targets": merged} for name in AS_PUBLISHED}
    choosing = folder / "data" / "choosing.jsonl"
    rows = (folder / "data" / "held_out.jsonl").read_text("utf-8").splitlines(keepends=True)
    write_if_new(choosing, "".join(row for row in rows if json.loads(row)["id"].startswith(real.CHOOSING)))
    return World(
        f"{pivot}-seed-{seed}", folder, settings, ["own"], {"real": merged}, choosing, os.cpu_count() or 1
    )


# Runs


def run(world: World, evaluations: int) -> Run:
    """Fuse, merge, tune and score, as far as it is not done."""
    pipeline = world.folder / f"evidence-{world.name}.yaml"
    pipeline.write_text(yaml.safe_dump(world.settings, sort_keys=False), "utf-8")
    world.call(BIN / "fusion-trainer", "run", pipeline)
    merges = [tune(world, case, name, evaluations) for case in world.cases for name in TUNED]
    missing = [merge for merge in merges if not (merge / "scores.json").is_file()]
    if missing:
        pairs = [
            word for merge in missing for word in ("--model", merge / "model", "--output", merge / "scores.json")
        ]
        dialogues = world.work / "held_out"
        world.call(BIN / "fusion-trainer", "evaluate", "--dialogues", dialogues, "--dtype", "float32", *pairs)
    files = {path.parent.name: path for path in world.work.glob("scores/*/scores.json")}
    files |= {f"tuned-{merge.name}": merge / "scores.json" for merge in merges}
    return {name: json.loads(path.read_text("utf-8"))["conversations"] for name, path in files.items()}


def tune(world: World, case: str, name: str, evaluations: int) -> Path:
    """The folder of a tuned merge: `tuned.json`, `recipe.yaml` and the model."""
    out = world.work / "tuned" / f"{case}-{name}"
    recipe = world.work / "recipes" / f"{case}-{STARTS.get(name, name)}.yaml"
    targets = world.cases[case]
    if name == "clm":  # whether a merge gains more than one target does that is scaled in the same way
        recipe, targets = recipe_of_one(recipe, world.work / "targets" / "clm"), ["clm"]
    searched = [word for parameter in TUNED[name][1] for word in ("--parameter", parameter)]
    several = any(":target" in word or ":depth" in word for word in searched)
    limit = ["--evaluations", str(evaluations * (2 if several else 1))]
    command = [recipe, "--held-out", world.choosing, "--out", out, "--report-share", "0.05", *searched, *limit]
    template = world.settings.get("prepare", {}).get("template")
    command += ["--template", template] if template else []
    inputs = [world.choosing, *(world.work / "targets" / target / "fusion.json" for target in targets)]
    if not is_tuned(out / "tuned.json", command, inputs):
        shutil.rmtree(out / "model", ignore_errors=True)
        (out / "scores.json").unlink(missing_ok=True)
        world.call(BIN / "varm-merge", "tune", *command)
    if not (out / "model" / "config.json").is_file():
        world.call(BIN / "mergekit-yaml", out / "recipe.yaml", out / "model", "--random-seed", "0")
    return out


def recipe_of_one(recipe: Path, target: Path) -> Path:
    """A recipe with one target instead of its own."""
    content = {**yaml.safe_load(recipe.read_text("utf-8")), "models": [{"model": str(target.resolve())}]}
    path = recipe.with_name(f"{recipe.stem}-{target.name}.yaml")
    write_if_new(path, yaml.safe_dump(content, sort_keys=False))
    return path


def is_tuned(tuned: Path, command: Sequence[str | Path], inputs: Iterable[Path]) -> bool:
    """Whether this command has tuned a merge of these inputs."""
    if not tuned.is_file() or any(path.stat().st_mtime > tuned.stat().st_mtime for path in inputs):
        return False
    words = json.loads(tuned.read_text("utf-8"))["command"].split()
    return words[2:] == [str(word) for word in command]


# Tables


def averaged(run: Run, models: Sequence[str]) -> Conversations:
    """The mean of several models in every conversation, as one model."""
    first = run[models[0]]
    return {
        name: {**row, **{key: mean(run[model][name][key] for model in models) for key in ("nats", "matched")}}
        for name, row in first.items()
    }


def best_target(world: World, run: Run, case: str, chooses: Callable[[str], bool]) -> Conversations:
    """The target of a case with the lowest loss on the conversations that choose."""
    models = [f"target-{name}" for name in world.cases[case]]
    return run[min(models, key=lambda model: real.ratio(part(run[model], chooses), anything))]


def anything(_: str) -> bool:
    return True


def part(conversations: Conversations, keep: Callable[[str], bool]) -> Conversations:
    """The conversations whose name is kept."""
    return {name: row for name, row in conversations.items() if keep(name)}


HEAD = ["nats per byte", "mean of the skills", "exact, %"]


def columns(runs: Sequence[Run], model: str, *others: str) -> list[str]:
    """Loss, the mean of the skills' losses, exact answers, and the loss minus that of others."""
    by_skill = [mean(real.ratio(run[model], skill.__eq__) for skill in skills(run[model])) for run in runs]
    exact = [100 * real.ratio(run[model], real.is_question, "matched", "rows") for run in runs]
    against = [real.shown(real.paired(runs, model, other, anything)) if other != model else "" for other in others]
    return [real.loss(runs, model, anything), real.spread(by_skill, 4), real.spread(exact, 1), *against]


def skills(conversations: Conversations) -> list[str]:
    return sorted({row["group"] for row in conversations.values()})


def fusions(worlds: Sequence[World], runs: Sequence[Run]) -> str:
    """Table 1. The mean of the pairwise targets is made a model of its own."""
    names, several = worlds[0].sources, len(worlds[0].sources) > 1
    rows = [["pivot", "", *columns(runs, "pivot", "target-clm", "pivot")]]
    rows += [[f"source {name}", "", *columns(runs, f"source-{name}", "target-clm", "pivot")] for name in names]
    rows.append(["CLM", "", *columns(runs, "target-clm", "target-clm", "pivot")])
    for fusion, (title, _) in FUSIONS.items():
        for own in runs:
            own[fusion] = averaged(own, [f"target-{fusion}-{name}" for name in names])
        rows.append([title, "one source", *columns(runs, fusion, "target-clm", "pivot")])
        if several:
            rows.append([title, "Multi", *columns(runs, f"target-{fusion}-multi", "target-clm", "pivot")])
    return markdown(["fusion", "sources", *HEAD, "− CLM", "− pivot"], rows)


def merges(worlds: Sequence[World], runs: Sequence[Run], case: str) -> str:
    """Table 2 of one case."""
    head = ["merge", "settings", *HEAD, "− linear", "− best target", "− pivot", "found"]
    others = (f"merge-{case}-linear", f"best-{case}", "pivot")
    rows = [["the pivot", "", *columns(runs, "pivot", *others), ""]]
    rows += [
        [f"target {name}", "", *columns(runs, f"target-{name}", *others), ""] for name in worlds[0].cases[case]
    ]
    rows.append(["the best target", "chosen for each seed", *columns(runs, f"best-{case}", *others), ""])
    for name, title in AS_PUBLISHED.items():
        rows.append([title, "as in the pipeline", *columns(runs, f"merge-{case}-{name}", *others), ""])
    for name, (title, _) in TUNED.items():
        found = "; ".join(found_values(world, case, name) for world in worlds)
        rows.append([title, "tuned", *columns(runs, f"tuned-{case}-{name}", *others), found])
    return markdown(head, rows)


def found_values(world: World, case: str, name: str) -> str:
    tuned = json.loads((world.work / "tuned" / f"{case}-{name}" / "tuned.json").read_text("utf-8"))
    return " ".join(f"{number['found']:.2g}" for number in tuned["numbers"])


CASES = {
    "default": "Targets of the default fusion",
    "time": "Targets that were trained for different times (2, 10 and 40 epochs)",
    "parts": "Targets that were trained in different parts with LoRA: attention, the MLP's inputs, its output",
    "real": "Targets of `make real`: λ 0.9 and 0.5, in the source's template and on the pivot's text",
}


def questions(runs: Sequence[Run], case: str) -> str:
    """What the tables answer, each by a paired difference."""
    pairs = [
        ("Does a tuned merge beat the best target?", f"tuned-{case}-varm", f"best-{case}"),
        ("Does it beat CLM alone, scaled alike?", f"tuned-{case}-varm", f"tuned-{case}-clm"),
        ("Does it beat the pivot?", f"tuned-{case}-varm", "pivot"),
        ("Does VaRM beat linear as it is?", f"merge-{case}-varm", f"merge-{case}-linear"),
        ("Does VaRM beat linear once both are scaled?", f"tuned-{case}-varm", f"tuned-{case}-task_arithmetic"),
        ("Does λ by depth beat one λ?", f"tuned-{case}-varm_depth", f"tuned-{case}-varm"),
        ("Do weights of targets beat none?", f"tuned-{case}-varm_targets", f"merge-{case}-varm"),
    ]
    return compared(runs, pairs)


def fusion_questions(runs: Sequence[Run], kind: str) -> str:
    pairs = [
        (f"Does {title} beat CLM?", f"target-{fusion}-{kind}", "target-clm")
        for fusion, (title, _) in FUSIONS.items()
    ]
    pairs += [
        (f"Does {title} beat the default?", f"target-{fusion}-{kind}", f"target-default-{kind}")
        for fusion, (title, _) in FUSIONS.items()
        if fusion != "default"
    ]
    return compared(runs, pairs)


def compared(runs: Sequence[Run], pairs: Sequence[tuple[str, str, str]]) -> str:
    """A row for each question: the difference in loss and in exact answers."""
    rows = []
    for question, model, other in pairs:
        loss = real.paired(runs, model, other, anything)
        points, error = (100 * one for one in real.paired(runs, model, other, real.is_question, "matched", "rows"))
        difference = [f"{model} − {other}", real.shown(loss), real.verdict(loss), f"{points:+.1f} ± {error:.1f}"]
        rows.append([question, *difference])
    return markdown(["question", "compared", "nats per byte", "the first is", "exact answers, points"], rows)


def report(command: str, worlds: Sequence[World], runs: Sequence[Run]) -> str:
    """The report of worlds that differ in their seed only."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "mergekit"))
    number = len(next(iter(runs[0].values())))
    parts = [
        f"# Fusions and merges, compared: {', '.join(world.name for world in worlds)}",
        f"`{command}`, {date.today()}; {platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, {packages}. {number} held-out conversations report; others choose. "
        "Mean ± standard deviation over the seeds. Loss: over the bytes of all answers, and the mean of the "
        "skills' losses. A difference of losses over all bytes has its standard error over conversations; up to "
        "two standard errors are noise. Lower is better.",
        "## Fusions",
        fusion_questions(runs, "multi" if len(worlds[0].sources) > 1 else worlds[0].sources[0]),
        fusions(worlds, runs),
    ]
    for case in worlds[0].cases:
        parts += [f"## Merges. {CASES[case]}", questions(runs, case), merges(worlds, runs, case)]
    return "\n\n".join(parts) + "\n"


def reported(world: World, run: Run) -> Run:
    """The run without the conversations that choose, and with the best target of each case."""
    ids = {json.loads(row)["id"] for row in world.choosing.read_text("utf-8").splitlines()}
    known = {name for name in next(iter(run.values())) if name_of(name) in ids}
    if len(known) != len(ids):
        raise click.ClickException(f"{len(known)} of {len(ids)} conversations that choose were scored")
    with_best = {
        **run,
        **{f"best-{case}": best_target(world, run, case, known.__contains__) for case in world.cases},
    }
    return {model: part(rows, lambda name: name not in known) for model, rows in with_best.items()}


def name_of(conversation: str) -> str:
    """The id of a conversation, which its name may begin with a file for."""
    return re.sub(r"^.*held_out\.jsonl[: ]+", "", conversation)


@click.command(help=__doc__)
@click.argument("world", type=click.Choice(["small", "real"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: evidence_out; real_out")
@click.option("--seed", "seeds", type=int, multiple=True, help="May be given several times.")
@click.option("--pivot", "pivots", type=click.Choice([*real.DIRECTIONS]), multiple=True, help="Default: both")
@click.option("--evaluations", default=12, show_default=True, help="Merges that `varm-merge tune` tries.")
@click.option("--save", is_flag=True, help="Keep the results in benchmarks/results.")
def main(
    world: str, out: Path | None, seeds: tuple[int, ...], pivots: tuple[str, ...], evaluations: int, save: bool
) -> None:
    command = " ".join(["python examples/evidence/evidence.py", *sys.argv[1:]])
    if world == "small":
        out = (out or EXAMPLES.parent / "evidence_out").resolve()
        groups = [[partial(small_world, out / f"seed-{seed}", seed) for seed in seeds or (1, 2, 3)]]
    else:
        out = (out or real.OUT).resolve()
        groups = [
            [partial(real_world, out, pivot, seed) for seed in seeds or (0,)]
            for pivot in pivots or real.DIRECTIONS
        ]
    texts, content = [], {}
    for group in groups:
        worlds, runs = all_runs(group, evaluations, 2 if world == "small" else 1)
        texts.append(report(command, worlds, runs))
        for one, own in zip(worlds, runs, strict=True):
            content[one.name] = {model: real.sums_by_group(rows) for model, rows in own.items()}
    text = "\n".join(texts)
    paths = [out / f"evidence-{world}"] + [RESULTS / f"{date.today()}-evidence-{world}"] * save
    for path in paths:
        path.with_suffix(".md").write_text(text, "utf-8")
        path.with_suffix(".json").write_text(json.dumps(content) + "\n", "utf-8")
    click.echo(text)


def all_runs(
    group: Iterable[Callable[[], World]], evaluations: int, at_a_time: int
) -> tuple[list[World], list[Run]]:
    """Worlds, and their runs without the conversations that choose."""
    worlds = [make() for make in group]
    with ThreadPoolExecutor(at_a_time) as pool:
        runs = list(pool.map(lambda world: run(world, evaluations), worlds))
    return worlds, [reported(world, own) for world, own in zip(worlds, runs, strict=True)]


if __name__ == "__main__":
    main()
