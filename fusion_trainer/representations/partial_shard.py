"""Rows of a shard that is not finished, kept every few minutes so that a killed extraction loses little."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.representations.store import Supervised
from fusion_trainer.representations.topk import TopK
from varm_common.errors import UserError
from varm_common.files import fingerprint
from varm_common.saved_arrays import keep, kept_of

__all__ = [
    "Answer",
    "Partial",
    "Row",
]

PARTIAL = "fusion-trainer part of a shard"


@dataclass(frozen=True)
class Row:
    """A block as the model reads it: ids [tokens], the positions it is queried at, and where its answers are."""

    conversation: str
    block: int
    source: str
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    cut_tokens: int
    pivot_tokens: int
    answers: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What a batch gave, on its way from the device: rows of the shard and their distributions, in order."""

    numbers: list[int]
    found: TopK
    copied: Any

    def arrays(self) -> list[NDArray[Any]]:
        if self.copied is not None:
            self.copied.synchronize()
        parts = (self.found.ids_CK, self.found.logprobs_CK, self.found.tail_C, self.found.gold_logprob_C)
        return [part.numpy() for part in parts]


@dataclass(frozen=True)
class Partial:
    """The rows of a shard that are done, on the disk until the shard is written."""

    path: Path
    rows: Sequence[Row]

    @property
    def identity(self) -> dict[str, Any]:
        return {"rows": fingerprint([[row.ids.tolist(), row.positions.tolist()] for row in self.rows])}

    def write(self, found: Sequence[Supervised | None]) -> None:
        done = [number for number, row in enumerate(found) if row is not None]
        if not done:
            return
        arrays = {
            name: np.concatenate([getattr(found[number], name) for number in done])
            for name in ("ids", "logprobs", "tail", "gold_logprob")
        }
        keep(self.path, PARTIAL, {"identity": self.identity}, {**arrays, "done": np.array(done, np.int64)})

    def read(self) -> list[Supervised | None]:
        found: list[Supervised | None] = [None] * len(self.rows)
        if not self.path.is_file():
            return found
        try:
            _, arrays = kept_of(self.path, PARTIAL, self.identity)
        except UserError:
            return found  # damaged, or of other rows: done anew
        start = 0
        for number in arrays.pop("done").tolist():
            stop = start + len(self.rows[number].positions)
            found[number] = Supervised(**{name: array[start:stop] for name, array in arrays.items()})
            start = stop
        return found
