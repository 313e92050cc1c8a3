"""From squared deltas to merge weights: settings, units, and equation 7 of the FusionChat paper.

No mergekit and no tensors here. A *unit* is the set of tensors that share one weight per target. Its statistic is
pooled over all elements of the unit, so it can be summed up tensor by tensor in any order.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

__all__ = [
    "Granularity",
    "Normalization",
    "Settings",
    "Statistic",
    "UnitStatistics",
    "block_of",
    "normalize",
    "submodule_of",
    "unit_of",
]

Granularity = Literal["model", "layer", "module", "matrix", "parameter"]
Statistic = Literal["square", "abs"]
Normalization = Literal["sum", "softmax"]
TargetT = TypeVar("TargetT", bound=Hashable)

SPANNING: frozenset[Granularity] = frozenset({"model", "layer", "module"})
"""Granularities whose units can hold more than one tensor."""


@dataclass(frozen=True)
class Settings:
    """The parameters of ``varm`` for one tensor, after mergekit's filters were resolved.

    A tensor with ``keep_pivot`` is not merged. It is a unit of its own, without weights.
    """

    granularity: Granularity = "matrix"
    statistic: Statistic = "square"
    normalization: Normalization = "sum"
    temperature: float = 1.0
    select_topk: float = 1.0
    erase_minority: bool = False
    keep_pivot: bool = False

    def __post_init__(self) -> None:
        if self.keep_pivot:
            object.__setattr__(self, "granularity", "matrix")
        assert self.granularity in get_args(Granularity)
        assert self.temperature > 0
        assert 0 < self.select_topk <= 1

    @property
    def weighting(self) -> tuple[Statistic, Normalization, float]:
        """The settings that every tensor of one unit must share."""
        return self.statistic, self.normalization, self.temperature


@dataclass
class UnitStatistics:
    """Sums of |Δ|² (or |Δ|) and element counts by target, pooled over the tensors of one unit.

    ``sums`` are float64; a target that lacks one of the unit's (optional) tensors is averaged over the
    elements it has.
    """

    sums: dict[Hashable, float] = field(default_factory=dict)
    elements: dict[Hashable, int] = field(default_factory=dict)

    def add(self, sums: Mapping[Hashable, float], elements: int) -> None:
        """Pool one more tensor of ``elements`` elements into the unit."""
        for target, value in sums.items():
            self.sums[target] = self.sums.get(target, 0.0) + value
            self.elements[target] = self.elements.get(target, 0) + elements

    def merge(self, other: "UnitStatistics") -> None:
        """Pool the tensors of ``other`` into the unit."""
        for target, value in other.sums.items():
            self.add({target: value}, other.elements[target])

    def means(self, targets: Sequence[TargetT] | None = None) -> dict[TargetT, float]:
        """E_m[Δ²] (or E_m[|Δ|]) of each target; 0 for a unit without elements."""
        chosen = list(self.sums) if targets is None else targets
        return {target: self.sums[target] / max(self.elements[target], 1) for target in chosen}  # type: ignore[misc]

    def weights(self, settings: Settings, targets: Sequence[TargetT] | None = None) -> dict[TargetT, float]:
        """W_{j,m} of each target (of ``targets``, where an optional tensor is not in all of them)."""
        means = self.means(targets)
        weights = normalize(list(means.values()), settings.normalization, settings.temperature)
        return dict(zip(means, weights, strict=True))


def normalize(statistics: Sequence[float], normalization: Normalization, temperature: float) -> list[float]:
    """Weights of the K targets of one unit, from their K statistics; they sum to 1.

    ``sum``: W_j = s_j / Σ_i s_i (FusionChat, equation 7). ``softmax``: over s_j / (mean_i(s_i) · temperature),
    so that neither depends on the scale of the deltas. A unit in which no target moved gets uniform weights.
    There is no absolute threshold: the statistics are divided by the largest before anything else.
    """
    largest = max(statistics)
    if largest == 0:
        return [1 / len(statistics)] * len(statistics)
    scaled = [value / largest for value in statistics]
    total = math.fsum(scaled)
    if normalization == "sum":
        return [value / total for value in scaled]
    mean = total / len(scaled)
    exponents = [(value - 1) / mean / temperature for value in scaled]
    exponentials = [math.exp(exponent) for exponent in exponents]
    denominator = math.fsum(exponentials)
    return [value / denominator for value in exponentials]


def block_of(tensor: str) -> str | None:
    """The transformer block of a tensor (``model.layers.3``) by its name alone, or None outside all blocks.

    The block ends at the first component that is a number, as in mergekit.
    """
    parts = tensor.split(".")
    for depth, part in enumerate(parts[:-1]):
        if part.isdigit() and depth > 0:
            return ".".join(parts[: depth + 1])
    return None


def submodule_of(tensor: str, block: str) -> str:
    """The sub-module of ``block`` that holds ``tensor``: ``…layers.3.self_attn``, ``…layers.3.input_layernorm``.

    A number is not a sub-module but part of the path to one, as in T5's ``block.0.layer.1.DenseReluDense``.
    """
    path = tensor.removeprefix(f"{block}.").split(".")
    depth = 1
    while depth + 1 < len(path) and path[depth].isdigit():
        depth += 2
    return f"{block}.{'.'.join(path[:depth])}"


def unit_of(tensor: str, granularity: Granularity, block: str | None) -> str:
    """The name of the unit that ``tensor`` belongs to; ``block`` is None outside all transformer blocks."""
    if granularity == "model":
        return "model"
    if block is None or granularity in ("matrix", "parameter"):
        return tensor
    return block if granularity == "layer" else submodule_of(tensor, block)
