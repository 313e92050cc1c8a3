"""What a source's own chat template is worth: real models, both ways round, against the papers' way.

\b
  python benchmarks/own_words.py --one MODEL --other MODEL --save
  python benchmarks/own_words.py --one smollm2-135m --other gemma3-270m --conversations 20

Both folders need weights, a tokenizer and a chat template. The conversations are questions of everyday knowledge
with short answers, written for this benchmark (`benchmarks/data/questions.tsv`); neither model has written them.

For each direction the pivot is queried once, and the source three times: in its own template with the defaults
(`own`), on the pivot's text with the defaults (`pivot`), and on the pivot's text as FuseChat's release does it
(`published`: time warping and statistics). Reported are

* the source's cross-entropy on the content of the answers, nats per byte, and the pivot's: the same bytes in all
  ways;
* the share of conversations in which MinCE takes the source, per byte and per token;
* the share of the pivot's supervised positions that are paired, and of the source's probability that is mapped;
* the cross-entropy of what the pivot learns from on the pivot's next token, at the paired positions, nats; a token
  outside the top k gets an even share of the tail;
* of the ends of answers: how many are paired, and the probability that the pivot's end-of-turn token gets there.

Errors are standard errors over conversations; differences are paired.
"""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from measure import machine, publish, table

from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.data.answers import END
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader, reader_of_store
from fusion_trainer.representations.store import Representation, RepresentationStore
from fusion_trainer.text.tokenizer import load_tokenizer

QUESTIONS = Path(__file__).parent / "data" / "questions.tsv"
SYSTEM = "Answer in a few plain sentences."
PUBLISHED = ["--positions", "dtw", "--dtw-cost", "fusechat_v2", "--map", "statistics_published"]
WAYS = {
    "own": (["--source-template", "own"], []),
    "pivot": (["--source-template", "pivot"], []),
    "published": (["--source-template", "pivot"], PUBLISHED),
}
K = 10


def conversations(number: int, seed: int) -> list[dict[str, object]]:
    """Every seventh has a system turn, every sixth two exchanges."""
    drawn = [line.split("\t") for line in QUESTIONS.read_text().splitlines()]
    random.Random(seed).shuffle(drawn)
    rows: list[dict[str, object]] = []
    for row in range(number):
        turns = [{"role": "system", "content": SYSTEM}] if row % 7 == 0 else []
        for _ in range(2 if row % 6 == 0 else 1):
            question, answer = drawn.pop()
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"chat-{row}", "messages": turns})
    return rows


@dataclass
class Scores:
    """Of one way. Arrays have a number for each conversation; ``losses`` −log p by its paired positions."""

    source: np.ndarray
    pivot: np.ndarray
    by_byte: np.ndarray
    by_token: np.ndarray
    paired: float
    mapped: float
    learnt: np.ndarray
    losses: list[dict[int, float]]
    ends: int
    ends_paired: int
    end_mass: float


def program(*arguments: object) -> None:
    command = [sys.executable, "-m", "fusion_trainer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def on_content(model: Path, store: RepresentationStore, dialogues: Dialogues) -> np.ndarray:
    """A model's cross-entropy on the content of each conversation's answers, nats per byte."""
    reader = reader_of_store(store.identity, load_tokenizer(model, model.name))
    values = []
    for row, read in zip(store, read_blocks(reader, dialogues), strict=True):
        content = read.places.begins[read.positions] >= 0
        size = sum(stop - start for answer in read.answers for start, stop, _ in answer.pieces)
        values.append(-float(row.gold_logprob.astype(np.float64)[content].sum()) / size)
    return np.array(values)


def gold_shares(row: Representation, golds: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the next token at each position: in the top k, and with its share of the tail."""
    known = (np.exp(row.logprobs.astype(np.float64)) * (row.ids == golds[:, None])).sum(1)
    rest = np.maximum(row.tail.astype(np.float64), 1e-4) / (vocabulary - row.ids.shape[1])
    return known, np.where(known > 0, known, rest)


def score(folder: Path, pivot: Path, source: Path, asked: str, aligned: Path) -> Scores:
    tokenizer = load_tokenizer(pivot, "pivot")
    dialogues = Dialogues(next(folder.glob("dialogues-*")))
    store = RepresentationStore(aligned)
    reads = read_blocks(Reader(tokenizer, DIALOGUES), dialogues)
    losses: list[dict[int, float]] = []
    by_byte, by_token = [], []
    ends = ends_paired = 0
    end_mass = 0.0
    for row, read in zip(store, reads, strict=True):
        known, shares = gold_shares(row, read.tokens.ids[read.positions + 1], len(tokenizer.vocabulary))
        paired = np.asarray(row.paired, bool)
        losses.append({int(place): -float(np.log(shares[place])) for place in np.flatnonzero(paired)})
        at_end = read.places.place[read.positions] == END
        ends, ends_paired = ends + int(at_end.sum()), ends_paired + int((at_end & paired).sum())
        end_mass += float(known[at_end & paired].sum())
        by_byte.append(row.ce_per_byte < row.pivot_ce_per_byte)
        by_token.append(row.ce_per_token < row.pivot_ce_per_token)
    means = np.array([np.mean([*row.values()]) if row else np.nan for row in losses])
    contents = [
        on_content(model, RepresentationStore(folder / name), dialogues)
        for model, name in ((source, asked), (pivot, "the-pivot"))
    ]
    paired, mass = store.manifest["paired"], store.manifest["mass_ppm"] / 1e6
    shares = (paired / store.manifest["positions"], mass / max(1, paired))
    at_ends = (ends, ends_paired, end_mass / max(1, ends_paired))
    return Scores(*contents, np.array(by_byte, float), np.array(by_token, float), *shares, means, losses, *at_ends)


def mean(values: np.ndarray, digits: int = 3) -> str:
    """Mean ± standard error."""
    finite = values[np.isfinite(values)]
    return f"{finite.mean():.{digits}f} ± {finite.std(ddof=1) / len(finite) ** 0.5:.{digits}f}"


def common(one: list[dict[int, float]], other: list[dict[int, float]]) -> np.ndarray:
    """Per conversation the mean difference at positions that both ways pair."""
    means = []
    for first, second in zip(one, other, strict=True):
        both = sorted(first.keys() & second.keys())
        means.append(np.mean([first[place] - second[place] for place in both]) if both else np.nan)
    return np.array(means)


def cells(scores: Scores) -> tuple[str, ...]:
    return (
        f"{mean(scores.source)} ({mean(scores.pivot)})",
        f"{scores.by_byte.mean():.0%} / {scores.by_token.mean():.0%}",
        f"{scores.paired:.1%}",
        f"{scores.mapped:.1%}",
        mean(scores.learnt),
        f"{scores.ends_paired} of {scores.ends}",
        f"{scores.end_mass:.2f}" if scores.ends_paired else "–",
    )


@click.command(help=__doc__)
@click.option("--one", required=True, type=click.Path(exists=True, path_type=Path), help="A model's folder.")
@click.option("--other", required=True, type=click.Path(exists=True, path_type=Path), help="Another model's.")
@click.option("--conversations", "number", default=90, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keep the stores here, and reuse them.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-own-words.md.")
def main(one: Path, other: Path, number: int, seed: int, work_dir: Path | None, save: bool) -> None:
    work = work_dir or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    data = work / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations(number, seed)))
    rows, differences = [], []
    for pivot, source in ((one, other), (other, one)):
        folder = work / f"{pivot.name}-from-{source.name}"
        common_options = ["--data", data, "--pivot", pivot, "--dtype", "float32", "--top-k", K]
        program("extract", *common_options, "--model", pivot, "--output", folder / "the-pivot")
        scores = {}
        for way, (asked, laid) in WAYS.items():
            program("extract", *common_options, "--model", source, "--output", folder / asked[1], *asked)
            stores = ["--source-store", folder / asked[1], "--pivot-store", folder / "the-pivot"]
            program("align", *stores, "--output", folder / f"aligned-{way}", "--workers", 1, *laid)
            scores[way] = score(folder, pivot, source, asked[1], folder / f"aligned-{way}")
            rows.append([f"{source.name} → {pivot.name}", way, *cells(scores[way])])
        for way in ("pivot", "published"):
            ours, theirs = scores["own"], scores[way]
            learnt = (mean(ours.learnt - theirs.learnt), mean(common(ours.losses, theirs.losses)))
            pair = (f"{source.name} → {pivot.name}", f"own − {way}")
            differences.append([*pair, mean(ours.source - theirs.source, 4), *learnt])
    head = ["source → pivot", "way", "source (pivot), nats/byte", "MinCE takes the source, byte / token", "paired"]
    head += ["mass mapped", "cross-entropy of what is learnt", "ends paired", "the end's probability"]
    between = ["source → pivot", "difference", "source, nats/byte", "what is learnt, each way's pairs"]
    between += ["the same, at positions that both pair"]
    command = f"`python benchmarks/own_words.py --conversations {number} --seed {seed}`, float32, k = {K}."
    tables = (table(head, rows), table(between, differences))
    publish("own-words", "A source's own words", machine(), command, *tables, save=save)


if __name__ == "__main__":
    main()
