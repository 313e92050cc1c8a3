"""Align three sources with three kinds of tokenizer to one pivot, by each vocabulary map: what was mapped.

\b
  python examples/alignment_report.py                          400 conversations, some minutes; prints the report
  python examples/alignment_report.py --conversations 60 --save

Everything is made by examples/make_sharegpt.py and run through `fusion-trainer extract` and `fusion-trainer
align`. The models are untrained and their distributions nearly flat: what a map does to their top k says how it
treats the vocabulary, not likely words. `--save` writes benchmarks/results/YYYY-MM-DD-alignment-report.md.
"""

import re
import subprocess
import sys
import tempfile
from datetime import date
from itertools import product
from pathlib import Path

import click
from make_sharegpt import MODELS, ROOT

SOURCES = MODELS[1:]
MAPS = ("exact", "min_edit_distance", "statistics", "prefix")
POSITIONS = ("boundary", "dtw")
HEADER = ("source", "positions", "map", "paired", "vocabulary mapped", "top-k mass mapped", "without image")

ABOUT = """\
`source` is byte-level BPE, `unigram` Unigram with byte fallback, `small` SentencePiece BPE of a
smaller vocabulary; the pivot is SentencePiece BPE. Each is queried in its own template: ChatML,
Vicuna's, and OpenChat's, which is the pivot's. Paired: positions of the pivot that got
the source's distribution. Top-k mass mapped: of what the source's store holds. Without image: mass
of a paired position, of 100 %, on ids without image; the models are untrained, so most is tail.
"""


def run(*command: object) -> str:
    """The output of a fusion-trainer command; its message and the end of the script if it fails."""
    program = [sys.executable, "-m", "fusion_trainer", *map(str, command)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def row(world: Path, source: str, positions: str, method: str) -> tuple[str, ...]:
    """Align one source in one way; a line of the table."""
    output = run(
        "align", "--source-store", world / "stores" / source, "--pivot-store", world / "stores" / "pivot",
        "--output", world / f"{source}-{positions}-{method}", "--maps", world / f"maps-{positions}",
        "--positions", positions, "--map", method,
    )  # fmt: skip
    paired = re.search(r"^paired .* (\S+%)$", output, re.M)
    vocabulary = re.search(r"^vocabulary mapped .*\((\S+)\)", output, re.M)
    probability = re.search(r"^probability mapped +(\S+)", output, re.M)
    without = re.search(r"of ids without an image (\S+?),", output)
    shares = [match[1] for match in (paired, vocabulary, probability, without) if match]
    assert len(shares) == 4, output
    return source, positions, method, *shares


@click.command(help=__doc__)
@click.option("--conversations", default=400, show_default=True)
@click.option("--save", is_flag=True)
def main(conversations: int, save: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        made = ["examples/make_sharegpt.py", "--conversations", str(conversations), "--models", folder]
        subprocess.run([sys.executable, *made, "--out", f"{folder}/chats.jsonl"], check=True, cwd=ROOT)
        for model in MODELS:
            run(
                "extract", "--data", world / "chats.jsonl", "--pivot", world / "pivot", "--model", world / model,
                "--output", world / "stores" / model,
            )  # fmt: skip
            click.echo(f"extracted {model}", err=True)
        rows = [row(world, *which) for which in product(SOURCES, POSITIONS, MAPS)]
    lines = [HEADER, tuple("-" * len(name) for name in HEADER), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    command = f"    python examples/alignment_report.py --conversations {conversations}"
    report = f"# Alignment report, {date.today()}\n\n{command}\n\n{ABOUT}\n{table}\n"
    click.echo(report)
    if save:
        path = ROOT / "benchmarks" / "results" / f"{date.today()}-alignment-report.md"
        path.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
