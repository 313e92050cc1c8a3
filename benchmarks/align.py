"""Measures the time of an alignment: positions of one text, and a vocabulary map by edit distance.

\b
  python benchmarks/align.py                 a pair of 2048 tokens, 32k × 32k tokens: some minutes
  python benchmarks/align.py --vocabulary 2000 --rounds 3
  python benchmarks/align.py --save

The text is from examples/make_sharegpt.py, read by a SentencePiece-style and a byte-level tokenizer that are
trained on it. Boundary pairing and time warping get the same pair, in turn. For comparison, the papers' recurrence
runs once as two plain loops in Python. The vocabularies of the map have 32,000 made-up words each, as long as
tokens usually are; half of the words are in both.
"""

import random
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import click
from measure import judged, machine, publish, spread, table
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fusion_trainer.alignment.pairing import Read, position_pairs
from fusion_trainer.alignment.positions import CONTAINED, Pairs, warping_path
from fusion_trainer.alignment.vocabulary import Vocabularies, min_edit_distance
from fusion_trainer.data.answers import places, whole_text
from fusion_trainer.text.tokenizer import TextTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_sharegpt import byte_level_bpe, conversations, sentencepiece_bpe, texts

TOKENS = 2048
BUDGETS_MS = {"boundary": 1, "dtw": 60}
MAP_BUDGET_S = 60
SYLLABLES = "ba ce di fo gu har len mis tor vun a e i o s t ing er ion ent re un th st ly"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=15, show_default=True, help="How often the pair is aligned.")
@click.option("--vocabulary", default=32000, show_default=True, help="Tokens on each side of the map.")
@click.option("--naive/--no-naive", default=True, show_default=True, help="Run the two loops in Python, once.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-align.md.")
def main(rounds: int, vocabulary: int, naive: bool, save: bool) -> None:
    """Time boundary pairing, time warping and the edit-distance map."""
    command = f"    python benchmarks/align.py --rounds {rounds} --vocabulary {vocabulary}"
    publish("align", "Alignment benchmark", command, machine(), *report(rounds, vocabulary, naive), save=save)


def report(rounds: int, vocabulary: int, naive: bool) -> tuple[str, str, str]:
    pivot, source, text = one_pair()
    of_pivot, of_source = pivot.encode([text])[0], source.encode([text])[0]
    theirs = [pivot.words[token] for token in of_pivot.ids.tolist()]
    ours = [source.words[token] for token in of_source.ids.tolist()]
    raw = text.encode()
    answers = (whole_text(len(raw)),)

    def paired() -> Pairs:
        reads = [Read(tokens, answers, (), places(tokens, raw, answers)) for tokens in (of_pivot, of_source)]
        return position_pairs(*reads, (pivot, source), None)

    times: dict[str, list[float]] = {"tokenise both, byte ends": [], "boundary": [], "dtw": []}
    for _ in range(rounds + 1):
        timed(times["tokenise both, byte ends"], lambda: (pivot.encode([text]), source.encode([text])))
        timed(times["boundary"], paired)
        timed(times["dtw"], lambda: warping_path(theirs, ours))
    counted = {what: taken[1:] for what, taken in times.items()}
    rows = [(what, spread(ms), *judged(ms, BUDGETS_MS.get(what), " ms")) for what, ms in counted.items()]
    if naive:
        once: list[float] = []
        timed(once, lambda: by_two_loops(theirs, ours))
        rows.append(("dtw by two loops in Python, once", f"{once[0]:.0f}", "", ""))
    in_map = map_seconds(vocabulary)
    mapped = (f"MinED, {vocabulary:,} × {vocabulary:,}", f"{in_map:.1f}", *judged([in_map], MAP_BUDGET_S, " s"))
    setting = (
        f"One text of {len(of_pivot):,} tokens of the pivot and {len(of_source):,} of the source, "
        f"{len(paired()):,} common boundaries; {rounds} rounds after a warm-up. Each cell: median [min – max]; "
        "budgets are judged by the median."
    )
    limits = ("budget", "verdict")
    return setting, table(("what", "ms", *limits), rows), table(("map", "s", *limits), [mapped])


def timed(into: list[float], work: Callable[[], object]) -> None:
    """Append the milliseconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    into.append((time.perf_counter() - start) * 1e3)


def one_pair() -> tuple[TextTokenizer, TextTokenizer, str]:
    """A SentencePiece-style pivot, a byte-level source, and a text of ``TOKENS`` tokens of the pivot."""
    lines = list(texts(islice(conversations(0), 400)))
    pivot = TextTokenizer(sentencepiece_bpe(lines, 6000), "pivot")
    source = TextTokenizer(byte_level_bpe(lines, 3000), "source")
    text = "\n".join(texts(islice(conversations(1), 40)))
    cut = int(pivot.encode([text])[0].ends[TOKENS - 1])
    return pivot, source, text.encode()[:cut].decode(errors="ignore")


def by_two_loops(pivot: list[str], source: list[str]) -> list[list[int]]:
    """The recurrence as the papers state it."""
    table: list[list[int]] = []
    for i, ours in enumerate(pivot):
        row: list[int] = []
        for j, theirs in enumerate(source):
            weight = CONTAINED["fusechat"] if ours in theirs or theirs in ours else 10
            before = [table[i - 1][j]] if i else []
            before += [row[j - 1]] if j else []
            before += [table[i - 1][j - 1]] if i and j else []
            row.append(weight * Levenshtein.distance(ours, theirs) + min(before, default=0))
        table.append(row)
    return table


def map_seconds(size: int) -> float:
    source, pivot = (made_up(size, seed) for seed in (1, 2))
    start = time.perf_counter()
    min_edit_distance(Vocabularies(source, pivot))
    return time.perf_counter() - start


def made_up(size: int, seed: int) -> TextTokenizer:
    """A tokenizer of made-up words; the first half is the same whatever the seed."""
    chosen: dict[str, int] = {}
    for half in (0, seed):
        random_word = random.Random(half)
        while len(chosen) < (size if half else size // 2):
            parts = random_word.choices(SYLLABLES.split(), k=random_word.randint(1, 5))
            chosen.setdefault(random_word.choice(["▁", ""]) + "".join(parts), len(chosen))
    tokenizer = Tokenizer(BPE(chosen, []))
    tokenizer.decoder = decoders.Metaspace()
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), f"words {seed}")


if __name__ == "__main__":
    main()
