"""``varm_weights.json``: for every unit and target of a merge, the statistic and the weight.

The file is written once, after the weights, under a temporary name that is synced and renamed: a folder with
a ``varm_weights.json`` holds the whole of it.
"""

import hashlib
import json
import textwrap
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varm_common.files import whole_file
from varm_common.versions import versions

__all__ = ["FILE_NAME", "UnitRecord", "WeightLog", "natural_order", "recipe_fingerprint"]

FILE_NAME = "varm_weights.json"
FORMAT = 1


@dataclass(frozen=True)
class UnitRecord:
    """One unit: its tensors, how many elements they have together, and each target's numbers.

    At ``parameter`` granularity every element is a unit of its own; the record then stands for one tensor and
    holds the means over its elements.
    """

    unit: str
    granularity: str
    tensors: Sequence[str]
    elements: int
    statistics: Mapping[Hashable, float]
    weights: Mapping[Hashable, float]

    def as_json(self) -> dict[str, Any]:
        moved = any(value > 0 for value in self.statistics.values())
        return {
            "unit": self.unit,
            "granularity": self.granularity,
            "tensors": list(self.tensors),
            "elements": self.elements,
            "moved": moved,
            **({} if moved else {"note": "no target moved; the pivot is kept"}),
            "targets": {
                str(target): {"statistic": self.statistics[target], "weight": weight}
                for target, weight in self.weights.items()
            },
        }


class WeightLog:
    """Collects the units of one run, from any thread; what it writes does not depend on the order they came in."""

    def __init__(self, base_model: str | None, recipe: Mapping[str, Any]) -> None:
        self.base_model, self.recipe = base_model, recipe
        self._records: dict[tuple[str, str], UnitRecord] = {}
        self._lock = threading.Lock()

    def add(self, record: UnitRecord) -> None:
        with self._lock:
            self._records[record.unit, record.tensors[0]] = (
                record  # a task that an executor runs again adds nothing
            )

    def as_json(self) -> dict[str, Any]:
        records = self._sorted()
        return {**self._head(records), "units": [record.as_json() for record in records]}

    def _sorted(self) -> list[UnitRecord]:
        return sorted(
            self._records.values(), key=lambda one: (natural_order(one.tensors[0]), natural_order(one.unit))
        )

    def _head(self, records: Sequence[UnitRecord]) -> dict[str, Any]:
        targets = dict.fromkeys(str(target) for record in records for target in record.weights)
        return {
            "format": FORMAT,
            "method": "varm",
            "versions": versions(),
            "recipe": {"sha256": recipe_fingerprint(self.recipe), "content": self.recipe},
            "base_model": self.base_model,
            "targets": list(targets),
        }

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``, one unit at a time, so that it is there whole or not at all."""
        records = self._sorted()
        head = json.dumps({**self._head(records), "units": []}, indent=1).removesuffix("]\n}")
        with whole_file(folder / FILE_NAME) as file:
            file.write(head.encode())
            for number, record in enumerate(records):
                unit = textwrap.indent(json.dumps(record.as_json(), indent=1), "  ")
                file.write(f"{',' if number else ''}\n{unit}".encode())
            file.write(b"\n ]\n}" if records else b"]\n}")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def recipe_fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe's content: comments, order of keys and spelling of YAML do not change it."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
