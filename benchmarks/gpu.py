"""Measures a merge, an extraction and a training step on a GPU.

\b
  python benchmarks/gpu.py --save                         a merge of 1.1B, and a Qwen2 of 1.5B in bfloat16
  python benchmarks/gpu.py --model llama-7b --save        on a GPU of 80 GB or more
  python benchmarks/gpu.py --model tiny --merge-parameters 2e6 --tokens 2048     a trial, also without a GPU

A merge must write the same bytes with --cuda as on the CPU. Extraction and training are compared in one process
with the bare forward pass and the plain CLM step of transformers, as by extract.py and train.py. MFU is the share
of the GPU's peak in bfloat16. FLOPs are 2 · weights · tokens forward; in a step 6 · weights · tokens, plus
attention. Without a GPU everything runs on the CPU, in float32, and --cuda is left out.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import click
import extract
import torch
import train
import transformers
from checkpoints import checkpoints, llama_config, parameter_count, recipe
from measure import judged, machine, measured, publish, sections, spread, table, verdict

from varm_common.files import sha256_of

TIME_LIMIT_S = 600
GRANULARITIES = ("matrix", "layer", "parameter")
EXTRACTED = ("tiny", "qwen2-1.5b")
"""Layouts that extract.py has as well."""

Section = tuple[str, str]


def merges(work: Path, parameters: float) -> Section:
    """Merges on the CPU and on the GPU, and whether they write the same bytes."""
    config = llama_config(parameters)
    models, rows = checkpoints(work, config, seed=0), []
    program = str(Path(sys.executable).parent / "mergekit-yaml")
    for granularity in GRANULARITIES:
        path = work / f"{granularity}.yaml"
        path.write_text(recipe(models, "bfloat16", granularity=granularity, select_topk=0.8), encoding="utf-8")
        runs, written = [], []
        for place in ([], ["--cuda"]) if train.ON_GPU else ([], []):
            out = work / f"{granularity}-{len(runs)}"
            runs.append(measured([program, str(path), str(out), "--quiet", "--no-copy-tokenizer", *place]))
            written.append([sha256_of(file) for file in sorted(out.glob("*.safetensors"))])
        walls = [run.wall_s for run in runs]
        same = "equal" if written[0] == written[1] else "DIFFERENT"
        times = (f"{walls[0]:.1f}", f"{walls[1]:.1f}", f"{walls[1] / walls[0]:.2f}")
        rows.append((granularity, *times, f"{runs[1].anonymous_mib:,.0f}", same))
    header = ("granularity", "CPU, s", "GPU, s", "GPU / CPU", "host memory with the GPU, MiB", "bytes")
    return f"Merging two targets of {parameter_count(config):,} parameters", table(header, rows)


def extractions(work: Path, layout: str, tokens: int, rounds: int) -> Section:
    """An extraction against the bare forward pass: tokens/s, MFU, memory."""
    extraction = extract.loaded(work, layout, tokens, batch_tokens=max(1024, tokens // 16))
    store, batches = extract.recorded(extraction, extraction.config.output)
    legs = extract.legs_of(extraction, batches, work)
    spent = extract.seconds_of(legs, rounds)
    model, read = extraction.engine.model.model, store.manifest["tokens"]
    weights, rows = model.num_parameters(exclude_embeddings=not model.config.tie_word_embeddings), []
    for leg, seconds in spent.items():
        walls = [each.wall for each in seconds]
        ratios = [own / bare.wall for own, bare in zip(walls, spent[extract.BARE], strict=True)]
        limits = judged(ratios, extract.TIME_BUDGET if leg == extract.EXTRACTION else None)
        numbers = (spread([read / wall for wall in walls], 0), mfu(2.0 * weights * read / median(walls)))
        rows.append((leg, *numbers, peak_gib(legs[leg]), spread(ratios, 3), *limits))
    header = ("", "tokens/s", "MFU", "GPU memory, GiB", "/ bare forward", "budget", "verdict")
    return f"Extraction, {layout}, {model.dtype}, {read:,} tokens", table(header, rows)


def steps(work: Path, layout: str, rounds: int) -> Section:
    """Training steps with the fusion loss against the plain CLM step."""
    shape = next(reversed(train.SHAPES))
    setting = train.random_setting(work / "train", layout, shape, 10 if train.ON_GPU else 1)
    runs = train.measure_rounds(setting, [train.PLAIN, train.OURS], rounds)
    batches, rows = runs[train.PLAIN][0].batches, []
    tokens, work_done = sum(batch.tokens for batch in batches), train.flops(layout, batches)
    peaks = {leg: train.peak_mib(partial(setting.run, leg)) for leg in runs}
    for leg, own in runs.items():
        walls = [each.wall for each in own]
        ratios = [wall / plain.wall for wall, plain in zip(walls, runs[train.PLAIN], strict=True)]
        limits = judged(ratios, train.TIME_BUDGET if leg == train.OURS else None)
        numbers = (spread([tokens / wall for wall in walls], 0), mfu(work_done / median(walls)))
        rows.append((leg, *numbers, f"{peaks[leg] / 1024:.2f}", spread(ratios, 3), *limits))
    header = ("", "tokens/s", "MFU", "memory, GiB", f"/ {train.PLAIN}", "budget", "verdict")
    return f"Training, {layout}, {shape}", table(header, rows)


def mfu(flops: float) -> str:
    peak = train.peak_flops()
    return f"{flops / peak:.3f}" if peak else ""


def peak_gib(job: Callable[[], object]) -> str:
    """Of the GPU's memory, in one more run."""
    return f"{train.peak_mib(job) / 1024:.2f}" if train.ON_GPU else ""


def measurements(work: Path, layout: str, merged: float, tokens: int, rounds: int) -> Iterator[Section]:
    start = time.monotonic()
    yield merges(work / "merges", merged)
    if layout in EXTRACTED:
        yield extractions(work / "extract", layout, tokens, rounds)
    yield steps(work / "steps", layout, rounds)
    yield "vLLM", "Installed, and not measured by this script." if find_spec("vllm") else "Not installed here."
    taken = time.monotonic() - start
    yield "Time", f"{taken:.0f} s (≤ {TIME_LIMIT_S} s: {verdict([taken], TIME_LIMIT_S)})."


@click.command(help=__doc__)
@click.option("--model", type=click.Choice([*EXTRACTED, "llama-7b"]), help="Default: qwen2-1.5b, tiny on a CPU.")
@click.option("--merge-parameters", "merged", type=float, default=1.1e9, show_default=True)
@click.option("--tokens", type=int, default=262_144, show_default=True, help="Of the extraction.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-gpu.md.")
def main(model: str | None, merged: float, tokens: int, rounds: int, save: bool) -> None:
    transformers.utils.logging.set_verbosity_error()
    model = model or ("qwen2-1.5b" if train.ON_GPU else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("merges", "extract", "steps"):
            Path(folder, name).mkdir()
        body = sections(measurements(Path(folder), model, merged, tokens, rounds))
    device = torch.cuda.get_device_name() if train.ON_GPU else "no GPU: a trial"
    options = f"--model {model} --merge-parameters {merged:g} --tokens {tokens} --rounds {rounds}"
    command = f"    python benchmarks/gpu.py {options}"
    publish("gpu", "GPU benchmark", command, f"{device}; {machine()}", body, save=save)


if __name__ == "__main__":
    main()
