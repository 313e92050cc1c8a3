"""Time and memory of `varm` against mergekit's own methods, on random checkpoints.

\b
  python benchmarks/merge.py                            1.1e9 parameters (TinyLlama's shape), all methods
  python benchmarks/merge.py --params 5e7 --rounds 2    the CPU-sized one: some minutes on two cores
  python benchmarks/merge.py --methods task_arithmetic,varm-matrix --rounds 9 --save
  python benchmarks/merge.py --experts 32 --methods task_arithmetic,varm-matrix,varm-layer,varm-module,varm-model
                                                        a Mixtral of 32 layers × 32 experts: 3,299 small tensors

Each measurement is one run of the stock `mergekit-yaml` in a process of its own: start-up and planning
count, as they do for a user. A round runs every method once, in an order that rotates from round to round,
and a ratio is taken between two runs of the same round, so that a slow minute of the machine falls on both.
A warm-up round is not counted.

Memory is the peak of RssAnon, sampled every 10 ms: mapped files are left out, because how much of a
checkpoint stays mapped is the page cache's business, not the method's. mergekit keeps an output shard in
memory until it is full (5 GB by default, which would hide everything else), so all methods write the same
small shards. The budget is what task_arithmetic takes, and 4 KiB for each tensor: with models as small as those of
--experts nearly all memory is imports, and names, shapes and weights by tensor count.

The checkpoints have Llama's layout. With --experts they have Mixtral's, small matrices stored expert by expert:
there the time goes into the names of the tensors, which mergekit converts to those of transformers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click
import yaml
from checkpoints import MODELS, Config, checkpoints, llama_config, mixtral_config, parameter_count, tensor_count
from measure import judged, machine, measure_rounds, measured, publish, sections, spread, table, verdict

from varm_common.process_usage import CommandError, Run

Runs = dict[str, list[Run]]

GRANULARITIES = ("matrix", "layer", "module", "model", "parameter")
# method: mergekit's name for it, its global parameters, the parameters of each target
METHODS: dict[str, tuple[str, dict[str, str], dict[str, float]]] = {
    "linear": ("linear", {}, {"weight": 0.5}),
    "task_arithmetic": ("task_arithmetic", {}, {"weight": 0.5}),
    "sce": ("sce", {}, {}),
    "ties": ("ties", {}, {"weight": 0.5, "density": 0.5}),
    **{f"varm-{name}": ("varm", {"granularity": name}, {}) for name in GRANULARITIES},
}
REFERENCE = "task_arithmetic"
BARE = "mergekit-yaml --help"  # measured in every round beside the methods: what all of them pay before they merge
# The project's budgets. Time: method, compared with, largest ratio of wall times.
TIME_BUDGETS = (
    ("varm-matrix", REFERENCE, 1.0),
    *((f"varm-{name}", "varm-matrix", 1.4) for name in ("layer", "module", "model")),
    ("varm-parameter", "varm-matrix", 1.2),
)
# Peak anonymous memory: MiB a method may take beyond the reference.
MEMORY_BUDGETS_MIB = {f"varm-{name}": 64 if name in ("layer", "module", "model") else 0 for name in GRANULARITIES}
# KiB for each tensor of a model: the check of a recipe reads names and shapes, varm_weights.json holds weights.
BOOKKEEPING_KIB = 4
STARTUP_BUDGET_MS = 1.0
LIMITS = ("budget", "verdict")
STARTUP_ROUNDS = 30
HOOK = "_varm_merge_autoload"
TIMED_HOOK = f"""
import os, sys, time
sys.path.append(sys.argv[1])
start = time.perf_counter()
import {HOOK}
{HOOK}.start()
print((time.perf_counter() - start) * 1e3)
"""


@dataclass(frozen=True)
class Startup:
    """Milliseconds: `python -c pass` as it is and with the hook switched off, and what the hook does alone."""

    on_ms: list[float] = field(default_factory=list)
    off_ms: list[float] = field(default_factory=list)
    hook_ms: list[float] = field(default_factory=list)


def recipe(method: str, models: Path) -> str:
    name, shared, each = METHODS[method]
    targets = [{"model": str(models / target), "parameters": each} for target in MODELS[1:]]
    pivot = {} if name == "linear" else {"base_model": str(models / MODELS[0])}
    settings = {"merge_method": name, "parameters": shared, "dtype": "bfloat16"}
    return yaml.safe_dump({**pivot, "models": targets, **settings})


def merge(method: str, models: Path, work: Path, out_shard_size: str) -> Run:
    """Merge into a fresh folder, which is deleted after; only the merge is timed."""
    program = Path(sys.executable).parent / "mergekit-yaml"
    if not program.exists():
        raise click.ClickException("no mergekit-yaml beside this Python: pip install -e '.[dev]'")
    if method == BARE:
        return measured([str(program), "--help"])
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = Path(folder, "recipe.yaml")
        config.write_text(recipe(method, models))
        options = ["--quiet", "--no-copy-tokenizer", "--out-shard-size", out_shard_size]
        try:
            return measured([str(program), str(config), str(Path(folder, "merged")), *options])
        except CommandError as error:
            hint = "\nIs this project installed here? pip install -e '.[dev]'" if method.startswith("varm") else ""
            raise click.ClickException(f"{method}: {error}{hint}") from None


def measure_startup() -> Startup:
    """Pairs of empty Pythons, and the hook's import and start in Pythons that read no start-up files."""
    on = {name: value for name, value in os.environ.items() if name != "VARM_MERGE_AUTOLOAD"}
    off = {**on, "VARM_MERGE_AUTOLOAD": "0"}
    spec, result = find_spec(HOOK), Startup()
    for _ in range(STARTUP_ROUNDS):
        for env, times_ms in ((on, result.on_ms), (off, result.off_ms)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], env=env, check=True)
            times_ms.append((time.perf_counter() - start) * 1e3)
        if spec is not None and spec.origin is not None:
            alone = [sys.executable, "-S", "-c", TIMED_HOOK, str(Path(spec.origin).parent)]
            printed = subprocess.run(alone, env=on, check=True, stdout=subprocess.PIPE, text=True)
            result.hook_ms.append(float(printed.stdout))
    return result


def report(runs: Runs, startup: Startup, tensors: int) -> str:
    """The tables, in Markdown, for models of so many tensors."""

    def pairs(method: str, other: str, value: Callable[[Run], float]) -> list[tuple[float, float]]:
        return [(value(a), value(b)) for a, b in zip(runs[method], runs[other], strict=True)]

    absolute, times, memory = [], [], []
    for method, results in runs.items():
        seconds = [spread([run.wall_s for run in results]), spread([run.cpu_s for run in results])]
        absolute.append((method, *seconds, spread([run.anonymous_mib for run in results], 0)))
    for method, other, limit in TIME_BUDGETS:
        if method in runs and other in runs:
            wall = [a / b for a, b in pairs(method, other, lambda run: run.wall_s)]
            cpu = [a / b for a, b in pairs(method, other, lambda run: run.cpu_s)]
            times.append((f"{method} / {other}", spread(wall), spread(cpu), *judged(wall, limit)))
    for method, extra_mib in MEMORY_BUDGETS_MIB.items():
        if method in runs and REFERENCE in runs:
            peaks_mib = pairs(method, REFERENCE, lambda run: run.anonymous_mib)
            ratios, more_mib = [a / b for a, b in peaks_mib], [a - b for a, b in peaks_mib]
            allowed_mib = extra_mib + tensors * BOOKKEEPING_KIB / 1024
            limits = (f"≤ {allowed_mib:.1f} MiB more", verdict(more_mib, allowed_mib))
            memory.append((f"{method} / {REFERENCE}", spread(ratios), spread(more_mib, 1), *limits))
    differences = [on - off for on, off in zip(startup.on_ms, startup.off_ms, strict=True)]
    hook = ("not installed", f"≤ {STARTUP_BUDGET_MS} ms", "not measured")
    if startup.hook_ms:
        hook = (spread(startup.hook_ms, 3), *judged(startup.hook_ms, STARTUP_BUDGET_MS, " ms"))
    starts = [
        ("python -c pass", spread(startup.on_ms, 1), "", ""),
        ("the same, VARM_MERGE_AUTOLOAD=0", spread(startup.off_ms, 1), "", ""),
        ("difference within a pair", spread(differences, 1), "", ""),
        ("import and start of the hook", *hook),
    ]
    tables = {
        "Merges": (("run", "wall, s", "CPU, s", "peak anonymous memory, MiB"), absolute),
        "Time within a round": (("pair", "wall ratio", "CPU ratio", "budget, wall", "verdict"), times),
        "Peak anonymous memory within a round": (("pair", "ratio", "difference, MiB", *LIMITS), memory),
        "Start-up of an empty Python": (("what", "ms", *LIMITS), starts),
    }
    return sections((title, table(header, rows)) for title, (header, rows) in tables.items() if rows)


def described(config: Config) -> str:
    blocks = f"{config.num_hidden_layers} blocks of width {config.hidden_size}"
    experts = getattr(config, "num_local_experts", 0)
    layout = f"{blocks}, each of {experts} experts stored one by one" if experts else blocks
    return (
        f"A pivot and two targets of {parameter_count(config):,} parameters in bfloat16 "
        f"({config.model_type}: {layout}; {tensor_count(config):,} tensors)"
    )


def chosen(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    methods = value.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise click.BadParameter(f"{', '.join(unknown)}. There are {', '.join(METHODS)}.")
    return methods


@click.command(help=__doc__)
@click.option("--params", type=float, default=1.1e9, show_default=True, help="Parameters of the Llama checkpoint.")
@click.option(
    "--experts", default=0, show_default=True, help="Experts in each layer of a Mixtral checkpoint; 0: Llama."
)
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the Mixtral checkpoint.  [default: EXPERTS]")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds that count.")
@click.option("--methods", default=",".join(METHODS), callback=chosen, help="A comma-separated subset.")
@click.option("--out-shard-size", default="200M", show_default=True, help="mergekit's option; bytes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the checkpoints.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keep the checkpoints here, and reuse them.")
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-merge.md, or …-merge-experts.md.")
def main(
    params: float,
    experts: int,
    layers: int | None,
    rounds: int,
    methods: list[str],
    out_shard_size: str,
    seed: int,
    work_dir: Path | None,
    out: Path | None,
    save: bool,
) -> None:
    if experts < 0 or experts == 1:
        raise click.UsageError("--experts is 0 (Llama) or at least 2: a token of a Mixtral goes to two experts.")
    if layers is not None and not experts:
        raise click.UsageError("--layers needs --experts; a Llama's layers follow from --params.")
    layers = layers or experts
    config = mixtral_config(layers, experts) if experts else llama_config(params)
    startup = measure_startup()
    with nullcontext(work_dir) if work_dir else tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = checkpoints(work, config, seed)
        legs = {method: partial(merge, method, models, work, out_shard_size) for method in (BARE, *methods)}
        runs = measure_rounds(legs, rounds, lambda run: f"{run.wall_s:.2f} s, {run.anonymous_mib:.0f} MiB")
    checkpoint = f"--experts {experts} --layers {layers}" if experts else f"--params {params:g}"
    options = f"{checkpoint} --rounds {rounds} --out-shard-size {out_shard_size} --seed {seed}"
    command = f"python benchmarks/merge.py {options} --methods {','.join(methods)}"
    setting = (
        f"{described(config)}, output shards of {out_shard_size} bytes, rounds after one warm-up: {rounds}. "
        "Each cell: median [min – max]; budgets are judged by the median."
    )
    tables = report(runs, startup, tensor_count(config))
    name = "merge-experts" if experts else "merge"
    text = publish(name, "Merge benchmark", f"    {command}", machine(), setting, tables, save=save)
    if out is not None:
        data = {"command": command, "machine": machine(), "setting": setting, "startup": asdict(startup)}
        data["runs"] = {method: [asdict(run) for run in results] for method, results in runs.items()}
        Path(f"{out}.json").write_text(json.dumps(data, indent=2))
        Path(f"{out}.md").write_text(text)


if __name__ == "__main__":
    main()
