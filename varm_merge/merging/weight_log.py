"""``varm_weights.json``: for every unit and target of a merge, the statistic and the weight."""

import hashlib
import json
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_common.files import atomic_file
from varm_common.versions import versions
from varm_merge.merging.weights import UnitStatistics

__all__ = ["FILE_NAME", "UnitRecord", "WeightLog", "natural_order", "recipe_fingerprint", "scaled", "with_prior"]

FILE_NAME = "varm_weights.json"
FORMAT = 1


@dataclass(frozen=True)
class UnitRecord:
    """One unit: its tensors, and each target's numbers.

    At ``parameter`` granularity every element is a unit of its own; the record then stands for one tensor and
    holds the means over its elements. ``scales`` are the recipe's ``lambda``, one for each tensor, and ``priors``
    its ``weight`` of each target.
    """

    unit: str
    granularity: str
    tensors: Sequence[str]
    statistics: UnitStatistics
    weights: Mapping[Hashable, float]
    scales: Sequence[float] = ()
    priors: Mapping[Any, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        means: dict[Hashable, float] = self.statistics.means()
        moved, weighted = any(value > 0 for value in means.values()), any(self.weights.values())
        reason = "no target moved" if weighted else "all weights are 0"
        note = {} if moved and weighted else {"note": f"{reason}; the pivot is kept"}
        head = {"unit": self.unit, "granularity": self.granularity, "tensors": list(self.tensors)}
        elements = max(self.statistics.elements.values())
        targets = {
            str(target): {"statistic": means[target], "weight": weight, **with_prior(self.priors, target)}
            for target, weight in self.weights.items()
        }
        return {**head, "elements": elements, "moved": moved, **note, **scaled(self.scales), "targets": targets}


def scaled(scales: Sequence[float]) -> dict[str, list[float]]:
    """The ``lambda`` of each tensor of a unit, where one is not 1."""
    return {"lambda": list(scales)} if any(scale != 1 for scale in scales) else {}


def with_prior(priors: Mapping[Any, float], target: Hashable) -> dict[str, float]:
    """The ``prior`` of a target in a unit, where it is not 1."""
    prior = priors.get(target, 1.0)
    return {} if prior == 1 else {"prior": prior}


class WeightLog:
    """Collects the units of one run, from any thread; the file does not depend on the order in which they come."""

    def __init__(self, base_model: str | None, recipe: Mapping[str, Any]) -> None:
        self.base_model, self.recipe = base_model, recipe
        self._records: dict[tuple[str, str], UnitRecord] = {}
        self._lock = threading.Lock()

    def add(self, record: UnitRecord) -> None:
        """Add a unit; a task that an executor runs again adds nothing."""
        with self._lock:
            self._records[record.unit, record.tensors[0]] = record

    def as_json(self) -> dict[str, Any]:
        records = sorted(
            self._records.values(),
            key=lambda record: (natural_order(record.tensors[0]), natural_order(record.unit)),
        )
        targets = dict.fromkeys(str(target) for record in records for target in record.weights)
        return {
            "format": FORMAT,
            "method": "varm",
            "versions": versions(),
            "recipe": {"sha256": recipe_fingerprint(self.recipe), "content": self.recipe},
            "base_model": self.base_model,
            "targets": list(targets),
            "units": [record.as_json() for record in records],
        }

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``, whole or not at all."""
        with atomic_file(folder / FILE_NAME) as file:
            file.writelines(part.encode() for part in json.JSONEncoder(indent=1).iterencode(self.as_json()))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def recipe_fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe's content: comments, order of keys and spelling of YAML do not change it."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
