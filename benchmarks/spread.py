"""What `align --spread` adds to the map `prefix`, on the stores of two models.

\b
  python benchmarks/own_words.py --one MODEL --other MODEL --work-dir WORK
  python benchmarks/spread.py --source-store WORK/…/own --pivot-store WORK/…/the-pivot --save

The stores are aligned twice. Reported are, of the pivot's positions, how many learn from the source; and over the
positions that only `spread` gives to the source: how much of its probability names an id of the pivot, and the
cross-entropy on the pivot's next token of the pivot's own distribution (with which `prefix` fills them) and of the
source's, in nats. A token outside the top k gets an even share of the tail. Errors are standard errors over
conversations; differences are paired.
"""

import tempfile
from datetime import date
from pathlib import Path

import click
import numpy as np
from measure import machine, table
from numpy.typing import NDArray

from fusion_trainer.alignment.align import align
from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.alignment.sides import open_sides
from fusion_trainer.config import AlignConfig
from fusion_trainer.representations.store import Representation


def losses(row: Representation, golds: NDArray[np.int32], vocabulary: int) -> NDArray[np.float64]:
    """−log p of the next token at each position."""
    known = (np.exp(row.logprobs.astype(np.float64)) * (row.ids == golds[:, None])).sum(1)
    rest = np.maximum(row.tail.astype(np.float64), 1e-4) / (vocabulary - row.ids.shape[1])
    return -np.log(np.where(known > 0, known, rest))


def mean(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


@click.command(help=__doc__)
@click.option("--source-store", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--pivot-store", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dialogues", type=click.Path(exists=True, path_type=Path))
@click.option("--save", is_flag=True, help="Write benchmarks/results/YYYY-MM-DD-spread.md.")
def main(source_store: Path, pivot_store: Path, dialogues: Path | None, save: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        common = {"source_store": source_store, "pivot_store": pivot_store, "dialogues": dialogues, "workers": 1}
        stores = [
            align(AlignConfig(**common, output=Path(folder) / str(spread), spread=spread, chunks=True))[0]
            for spread in (False, True)
        ]
        sides = open_sides(AlignConfig(**common, output=Path(folder)))
        blocks = [sides.dialogues[number] for number in range(len(sides.dialogues))]
        found: dict[str, list[tuple[float, float, float]]] = {}
        for plain, spread, read in zip(*stores, read_blocks(sides.pivot_reader, blocks), strict=True):
            golds = read.tokens.ids[read.positions[: len(plain)] + 1]
            new = np.asarray(spread.paired, bool) & ~np.asarray(plain.paired, bool)
            each = [losses(row, golds, len(sides.pivot.vocabulary))[new] for row in (plain, spread)]
            named = 1 - spread.tail[new].astype(np.float64)
            found.setdefault(plain.conversation, []).extend(zip(*each, named, strict=True))
        columns = np.array([np.mean(rows, 0) for rows in found.values() if rows]).T
        manifest = stores[1].manifest
        positions, paired, more = (manifest[name] for name in ("positions", "paired", "spread"))
    models = [Path(store.identity["model"]).name for store in (sides.source_store, sides.pivot_store)]
    header = [
        "positions",
        "prefix",
        "with spread",
        "in a chunk",
        "probability that names an id",
        "pivot's own, nats",
    ]
    header += ["the source's, nats", "difference"]
    cells = [f"{positions:,}", f"{paired / positions:.2%}", f"{(paired + more) / positions:.2%}"]
    cells += [
        f"{manifest['chunk_positions'] / positions:.2%}",
        mean(columns[2]),
        mean(columns[0]),
        mean(columns[1]),
    ]
    cells.append(mean(columns[1] - columns[0]))
    title = f"# Beyond the first token, {date.today()}\n\n{machine()}"
    about = f"{len(found)} conversations, {more:,} positions inside a token of the source"
    text = f"{title}\n\n{' → '.join(models)}: {about}.\n\n"
    text += table(header, [cells]) + "\n"
    click.echo(text)
    if save:
        (Path(__file__).parent / "results" / f"{date.today()}-spread.md").write_text(text)


if __name__ == "__main__":
    main()
