"""From squared deltas to merge weights: settings, units, and equation 7 of the FusionChat paper.

No mergekit and no tensors here. A *unit* is the set of tensors that share one weight per target. Its statistic is
pooled over all elements of the unit, so it can be summed up tensor by tensor in any order.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from varm_common.errors import UserError

__all__ = [
    "Granularity",
    "Normalization",
    "Settings",
    "Statistic",
    "UnitStatistics",
    "block_of",
    "conflict",
    "normalize",
    "relative",
    "submodule_of",
    "unit_of",
    "units_of",
]

Granularity = Literal["model", "layer", "module", "matrix", "parameter"]
Statistic = Literal["square", "abs"]
Normalization = Literal["sum", "softmax"]
TargetT = TypeVar("TargetT", bound=Hashable)

SPANNING: frozenset[Granularity] = frozenset({"model", "layer", "module"})
"""Granularities whose units can hold more than one tensor."""
RECIPE_NAMES = {"lambda": "scale", "weight": "priors"}
"""Parameters that have another name in ``Settings``: ``lambda`` is a keyword, and a weight is also a result."""


@dataclass(frozen=True)
class Settings:
    """The parameters of ``varm`` for one tensor, after mergekit's filters were resolved.

    A tensor with ``keep_pivot`` is not merged. It is a unit of its own, without weights. ``scale`` is the recipe's
    ``lambda``: of the merged task vector. ``priors`` are the recipe's ``weight``: the factor of each target's
    merge weight before these are made to sum to 1; 1 for a target that is not in it.
    """

    granularity: Granularity = "matrix"
    statistic: Statistic = "square"
    normalization: Normalization = "sum"
    temperature: float = 1.0
    select_topk: float = 1.0
    erase_minority: bool = False
    keep_pivot: bool = False
    scale: float = 1.0
    priors: Mapping[Any, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Settings":
        """The settings by the names that recipes use: ``lambda`` and, by target, ``weight``."""
        return cls(**{RECIPE_NAMES.get(name, name): value for name, value in parameters.items()})

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

    def priors_of(self, targets: Iterable[Hashable]) -> list[float]:
        """The prior of each of ``targets``."""
        return [self.priors.get(target, 1.0) for target in targets]


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
        priors = settings.priors_of(means)
        weights = normalize(list(means.values()), settings.normalization, settings.temperature, priors)
        return dict(zip(means, weights, strict=True))


def normalize(
    statistics: Sequence[float],
    normalization: Normalization,
    temperature: float,
    priors: Sequence[float] | None = None,
) -> list[float]:
    """Weights of the K targets of one unit, from their K statistics and priors; they sum to 1.

    ``sum``: W_j ∝ p_j · s_j (FusionChat, equation 7, where every p_j is 1). ``softmax``: W_j ∝ p_j ·
    exp(s_j / (mean_i(s_i) · temperature)). Neither depends on the scale of the deltas, nor on that of the priors.
    Where no target with a prior above 0 moved, W_j ∝ p_j. Where all priors are 0, so are the weights.
    There is no absolute threshold: statistics and priors are divided by the largest before anything else.
    """
    largest, factors = max(statistics), relative(priors or [1.0] * len(statistics))
    if largest == 0 or not any(factors):
        shares = [1.0] * len(statistics)
    else:
        shares = [value / largest for value in statistics]
        if normalization == "softmax":
            mean = math.fsum(shares) / len(shares)
            shares = [math.exp((value - 1) / mean / temperature) for value in shares]
    parts = [share * factor for share, factor in zip(shares, factors, strict=True)]
    if not any(parts):
        parts = factors
    total = math.fsum(parts) or 1.0
    return [part / total for part in parts]


def relative(priors: Sequence[float]) -> list[float]:
    """Priors divided by the largest; exactly 1 where all are equal and above 0."""
    largest = max(priors, default=0.0) or 1.0
    return [prior / largest for prior in priors]


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


def units_of(
    settings: Mapping[str, Settings], blocks: Mapping[str, str | None]
) -> dict[tuple[Granularity, str], list[str]]:
    """The tensors of each unit, by its granularity and name.

    Args:
        settings: Of each tensor.
        blocks: The transformer block of each tensor inside one.

    Raises:
        UserError: The tensors of one unit have settings that contradict each other.
    """
    units: dict[tuple[Granularity, str], list[str]] = {}
    for name, own in settings.items():
        unit = unit_of(name, own.granularity, blocks.get(name))
        units.setdefault((own.granularity, unit), []).append(name)
    for (_, unit), names in units.items():
        if message := conflict(unit, {name: settings[name] for name in names}):
            raise UserError(message)
    return units


def conflict(unit: str, settings_by_tensor: Mapping[str, Settings]) -> str | None:
    """Why the tensors of one unit cannot share weights, or None where they can."""
    (first_name, first), *others = settings_by_tensor.items()
    own = _shared(first)
    for name, settings in others:
        for option, value in _shared(settings).items():
            if own.setdefault(option, value) != value:
                return (
                    f"unit `{unit}` ({settings.granularity} granularity) cannot have two values of {option}: "
                    f"{own[option]} for {first_name}, {value} for {name}. Give all tensors of the unit the same "
                    "value, or use a finer granularity for some of them."
                )
    return None


def _shared(settings: Settings) -> dict[str, Any]:
    """What all tensors of a unit must share; the priors only of targets that both of two tensors have."""
    options = {f"`{name}`": getattr(settings, name) for name in ("statistic", "normalization", "temperature")}
    return {**options, **{f"`weight` of {target}": prior for target, prior in settings.priors.items()}}
