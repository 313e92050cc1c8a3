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
from pathlib import Path

import click
import numpy as np
from measure import machine, publish, table
from own_words import gold_shares, mean

from fusion_trainer.alignment.align import align
from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.alignment.sides import open_sides
from fusion_trainer.config import AlignConfig


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
        by_conversation: dict[str, list[tuple[float, float, float]]] = {}
        for plain, spread, read in zip(*stores, read_blocks(sides.pivot_reader, sides.dialogues), strict=True):
            golds = read.tokens.ids[read.positions[: len(plain)] + 1]
            new = np.asarray(spread.paired, bool) & ~np.asarray(plain.paired, bool)
            shares = [gold_shares(row, golds, len(sides.pivot.vocabulary))[1] for row in (plain, spread)]
            columns = [-np.log(share)[new] for share in shares] + [1 - spread.tail[new].astype(np.float64)]
            by_conversation.setdefault(plain.conversation, []).extend(zip(*columns, strict=True))
        own, learnt, named = np.array([np.mean(rows, 0) for rows in by_conversation.values() if rows]).T
        manifest = stores[1].manifest
        positions, paired, more = (manifest[name] for name in ("positions", "paired", "spread"))
    models = [Path(store.identity["model"]).name for store in (sides.source_store, sides.pivot_store)]
    row = {
        "positions": f"{positions:,}",
        "prefix": f"{paired / positions:.2%}",
        "with spread": f"{(paired + more) / positions:.2%}",
        "in a chunk": f"{manifest['chunk_positions'] / positions:.2%}",
        "probability that names an id": mean(named),
        "pivot's own, nats": mean(own),
        "the source's, nats": mean(learnt),
        "difference": mean(learnt - own),
    }
    about = f"{len(by_conversation)} conversations, {more:,} positions inside a token of the source"
    cells = table([*row], [[*row.values()]])
    publish("spread", "Beyond the first token", machine(), f"{' → '.join(models)}: {about}.", cells, save=save)


if __name__ == "__main__":
    main()
