"""``merge_method: varm``: the registered merge method and its parameters.

``merge_state_dicts`` gives the method all tensors in one call, and the method forms its units over them. A
``mergekit-yaml`` run gives it one tensor at a time. ``tasks`` then passes the ``Unit`` of that tensor, with
statistics that were measured before.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod, ParameterScope, TensorGroup
from mergekit.merge_methods.base import ParameterSpec
from pydantic import Field

from varm_common.errors import UserError
from varm_merge.merging import tensor_math
from varm_merge.merging.experts import PLAIN, Layout, layout_of_names, matrices
from varm_merge.merging.tensor_math import Selection
from varm_merge.merging.weight_log import UnitRecord, WeightLog
from varm_merge.merging.weights import (
    RECIPE_NAMES,
    SPANNING,
    Granularity,
    Normalization,
    Settings,
    Statistic,
    UnitStatistics,
    block_of,
    units_of,
)

__all__ = [
    "METHOD_NAME",
    "UNIT",
    "DtypeError",
    "NonFiniteError",
    "Unit",
    "VarmMethod",
    "merge_part",
    "parts_of",
    "refuse",
    "refuse_overflow",
    "selection_of",
    "tensor_statistics",
]

METHOD_NAME = "varm"
UNIT = "unit"
"""Key of a tensor's ``Unit`` among the parameters of a call."""

_FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _parameter(name: str, value_type: Any, description: str) -> ParameterSpec:
    default = getattr(Settings, RECIPE_NAMES.get(name, name))
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default=default, description=description)


SPEC = merge_methods.MergeMethodSpec(
    name=METHOD_NAME,
    pretty_name="VaRM",
    reference_url="https://arxiv.org/abs/2402.16107",
    parameters=(
        _parameter("granularity", Granularity, "which tensors share one weight per target"),
        _parameter("statistic", Statistic, "what is averaged over a unit: Δ² or |Δ|"),
        _parameter("normalization", Normalization, "how statistics become weights"),
        _parameter("temperature", Annotated[_FiniteFloat, Field(gt=0)], "of the softmax"),
        _parameter("select_topk", Annotated[_FiniteFloat, Field(gt=0, le=1)], "fraction of elements kept (SCE)"),
        _parameter("erase_minority", bool, "drop deltas against the summed delta's sign (SCE)"),
        _parameter("keep_pivot", bool, "copy the tensor from the pivot"),
        _parameter("lambda", _FiniteFloat, "scale of the merged task vector"),
        ParameterSpec(
            "weight",
            Annotated[_FiniteFloat, Field(ge=0)],
            ParameterScope.NON_BASE,
            default=1.0,
            description="factor of a target's merge weight before these are made to sum to 1",
        ),
    ),
    contract=merge_methods.InputContract(base=merge_methods.BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    optional_tensor_policy=merge_methods.OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)


@dataclass
class Unit:
    """The unit of the tensor that is merged.

    Attributes:
        name: Its name.
        granularity: Its granularity.
        statistics: Of the whole unit; None where the unit is this tensor, which is then measured by the method.
        log: Records the weights of a unit of one tensor.
        layout: How the tensor packs experts.
    """

    name: str
    granularity: Granularity
    statistics: UnitStatistics | None = None
    log: WeightLog | None = None
    layout: Layout = PLAIN


class NonFiniteError(UserError):
    """The tensor of ``model`` has NaN or Inf."""

    def __init__(self, message: str, model: Hashable) -> None:
        super().__init__(message)
        self.model = model


class DtypeError(UserError):
    """A value does not fit into the dtype that the recipe gives under ``key``: ``dtype`` or ``out_dtype``."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class VarmMethod(MergeMethod):  # type: ignore[misc]
    """Variation Ratio Merge (FusionChat, arXiv 2402.16107, section 3.3) and SCE (FuseChat, EMNLP 2025)."""

    spec = SPEC
    refusal: str | None = None
    """Why this installation cannot merge, where mergekit's internals are not the expected ones."""

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs of one group; raises ``UserError`` for what mergekit's contract refuses."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise UserError(_explain_inputs(input_ids, base_id, group_name) or str(error)) from None

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: merge_methods.BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Called by mergekit; ``parameters`` of a group are those of ``SPEC``, and ``UNIT`` where it is known."""
        units = [own.pop(UNIT, None) for own in parameters]
        settings = [Settings.of(own) for own in parameters]
        with torch.no_grad():
            if None in units:
                units = _form_units(groups, settings, input_dtypes)
            return tuple(
                _merge(_narrowed(group, dtype), own, unit, dtype, out_dtype or dtype)
                for group, own, unit, dtype in zip(groups, settings, units, input_dtypes, strict=True)
            )


def refuse(reason: str) -> None:
    """Make every further use of ``varm`` in this process end with ``reason``."""
    merge_methods.get(METHOD_NAME).refusal = reason


# Merging one tensor


def _merge(
    group: TensorGroup, settings: Settings, unit: Unit, dtype: torch.dtype, out_dtype: torch.dtype
) -> torch.Tensor:
    """Merge one tensor, and record its weights where it is a unit of its own."""
    pivot, name = group.base.tensor, str(group.metadata.name)
    out = torch.empty(pivot.shape, dtype=out_dtype, device=pivot.device)
    if settings.keep_pivot:
        if not bool(torch.isfinite(pivot).all()):
            raise _nonfinite(group)
        refuse_overflow(name, out.copy_(pivot), dtype)
        return out
    parts = parts_of(group, settings, unit.layout)
    merged = [merge_part(part, settings, unit, cut(out)) for _, part, cut in parts]
    if unit.log is not None and unit.statistics is None:
        names = [part_name for part_name, _, _ in parts] if len(parts) > 1 else [unit.name]
        if unit.granularity == "parameter":  # one record for the tensor
            names, merged = [unit.name], [_pooled(merged)]
        scales, priors = [settings.scale], settings.priors
        for unit_name, (statistics, weights) in zip(names, merged, strict=True):
            unit.log.add(UnitRecord(unit_name, unit.granularity, [name], statistics, weights, scales, priors))
    refuse_overflow(name, out, dtype)
    return out


Merged = tuple[UnitStatistics, dict[Hashable, float]]
"""The statistics of a tensor, or of a part of it, and the weights of its targets."""


def merge_part(group: TensorGroup, settings: Settings, unit: Unit, place: torch.Tensor) -> Merged:
    """Merge a tensor, or one expert's matrix, into ``place``; its statistics and weights."""
    pivot, ids = group.base.tensor, [target.id for target in group.non_base]
    targets = [target.tensor for target in group.non_base]
    selection, scale = selection_of(group, settings), settings.scale
    out = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
    steps: dict[str, Any] = {"selection": selection, "erase_minority": settings.erase_minority, "scale": scale}
    priors = settings.priors_of(ids)
    if unit.granularity == "parameter" and any(priors):
        rule = tensor_math.ElementWeights(*settings.weighting, tuple(priors))
        statistic_sums, weight_sums = tensor_math.blend_elements(pivot, targets, rule, out, **steps)
        statistics = _checked(group, statistic_sums)
        weights = {target: total / max(out.numel(), 1) for target, total in zip(ids, weight_sums, strict=True)}
    else:
        statistics = unit.statistics or _part_statistics(group, settings, selection)
        weights = statistics.weights(settings, ids)
        if not any(statistics.sums.values()) or not any(priors):
            out.copy_(pivot)
        elif selection is None and not settings.erase_minority:
            tensor_math.blend(pivot, targets, list(weights.values()), out, scale=scale)
        else:
            tensor_math.blend_elements(pivot, targets, list(weights.values()), out, **steps)
    if out is not place:
        place.copy_(out)
    return statistics, weights


Part = tuple[str, TensorGroup, Callable[[torch.Tensor], torch.Tensor]]
"""Name, inputs, and a view on the part's place in the tensor."""


def parts_of(group: TensorGroup, settings: Settings, layout: Layout) -> list[Part]:
    """The matrices of a tensor that packs experts, where they matter; otherwise the tensor itself.

    They matter at ``matrix`` granularity, and to the selection, which is made within one matrix.
    """
    name = group.metadata.name
    matter = settings.granularity == "matrix" or settings.select_topk < 1
    cuts = matrices(name, group.base.tensor.shape, layout) if matter else []
    parts = [(part_name, _mapped(group, cut), cut) for part_name, cut in cuts]
    return parts or [(str(name), group, lambda tensor: tensor)]


def _mapped(group: TensorGroup, function: Callable[[torch.Tensor], torch.Tensor]) -> TensorGroup:
    return replace(group, entries=tuple(replace(entry, tensor=function(entry.tensor)) for entry in group.entries))


def _narrowed(group: TensorGroup, dtype: torch.dtype) -> TensorGroup:
    """Cast the inputs that an explicit ``dtype`` rounds; widening happens chunk by chunk and is exact."""
    if all(torch.promote_types(entry.tensor.dtype, dtype) == dtype for entry in group.entries):
        return group
    return _mapped(group, lambda tensor: tensor.to(dtype))


def _pooled(merged: Sequence[Merged]) -> Merged:
    """The statistics and mean weights of a tensor at ``parameter`` granularity, from those of its parts."""
    if len(merged) == 1:
        return merged[0]
    statistics, weights = UnitStatistics(), dict.fromkeys(merged[0][1], 0.0)
    for part_statistics, _ in merged:
        statistics.merge(part_statistics)
    for part_statistics, part_weights in merged:
        for target, weight in part_weights.items():
            weights[target] += weight * part_statistics.elements[target] / max(statistics.elements[target], 1)
    return statistics, weights


def refuse_overflow(name: str, written: torch.Tensor, computed: torch.dtype) -> None:
    """Raise ``DtypeError`` where a finite result did not fit into the dtype that is ``written``."""
    largest = torch.finfo(written.dtype).max
    if largest < torch.finfo(computed).max and not bool(torch.isfinite(written).all()):
        dtype = str(written.dtype).removeprefix("torch.")
        raise DtypeError(
            f"the merged tensor `{name}` has values beyond {largest:g}, the largest of "
            f"`out_dtype: {dtype}`; write it in bfloat16 or float32",
            "out_dtype",
        )


# Statistics


def tensor_statistics(group: TensorGroup, settings: Settings, layout: Layout = PLAIN) -> UnitStatistics:
    """Σ Δ² (or Σ |Δ|) of one tensor, by target.

    Raises:
        UserError: An input holds NaN or Inf; the message names model and tensor.
    """
    statistics = UnitStatistics()
    for _, part, _ in parts_of(group, settings, layout):
        statistics.merge(_part_statistics(part, settings, selection_of(part, settings)))
    return statistics


def _part_statistics(group: TensorGroup, settings: Settings, selection: Selection | None) -> UnitStatistics:
    targets = [target.tensor for target in group.non_base]
    return _checked(group, tensor_math.delta_sums(group.base.tensor, targets, settings.statistic, selection))


def _checked(group: TensorGroup, sums: Sequence[float]) -> UnitStatistics:
    if not all(math.isfinite(value) for value in sums):
        raise _nonfinite(group)
    ids, elements = [target.id for target in group.non_base], group.base.tensor.numel()
    return UnitStatistics(dict(zip(ids, sums, strict=True)), dict.fromkeys(ids, elements))


def _nonfinite(group: TensorGroup) -> UserError:
    for entry in group.entries:
        for chunk in entry.tensor.reshape(-1).split(tensor_math.ACCELERATOR_CHUNK):
            if not bool(torch.isfinite(chunk).all()):
                kind = "NaN" if bool(torch.isnan(chunk).any()) else "Inf"
                return NonFiniteError(
                    f"{kind} in tensor `{group.metadata.name}` of {'the pivot' if entry.is_base else 'target'} "
                    f"{entry.id}. Its checkpoint is damaged or its training diverged; varm does not merge it.",
                    entry.id,
                )
    return UserError(
        f"the deltas of tensor `{group.metadata.name}` are too large for float64 statistics; "
        "the checkpoints do not share a pivot."
    )


def selection_of(group: TensorGroup, settings: Settings) -> Selection | None:
    """SCE's selection of elements; None where all are kept, as with one target, which has no variance."""
    if settings.select_topk >= 1 or len(group.non_base) < 2:
        return None
    targets = [target.tensor for target in group.non_base]
    return tensor_math.select(group.base.tensor, targets, settings.select_topk)


# Units of merge_state_dicts


def _form_units(
    groups: Sequence[TensorGroup], settings: Sequence[Settings], dtypes: Sequence[torch.dtype]
) -> list[Unit]:
    """The unit of each tensor of one call, measured where it can span tensors."""
    names = [group.metadata.name for group in groups]
    layout = layout_of_names([str(name) for name in names])
    spanning = {name: own for name, own in zip(names, settings, strict=True) if own.granularity in SPANNING}
    if spanning and (len(groups) == 1 or None in spanning):
        name, own = next(iter(spanning.items()))
        raise UserError(
            f"granularity `{own.granularity}` needs all tensors of the unit in one call, and varm was given "
            f"{'a tensor without a name' if None in spanning else f'only `{name}`'}. Merge with "
            "merge_state_dicts, or with mergekit-yaml (if this was mergekit-yaml, run `varm-merge doctor`), "
            "or use granularity `matrix`."
        )
    units: dict[str, Unit] = {}
    blocks = {name: block_of(name) for name in spanning}
    for (granularity, unit_name), members in units_of(spanning, blocks).items():
        units |= dict.fromkeys(members, Unit(unit_name, granularity, UnitStatistics(), layout=layout))
    for group, own, dtype in zip(groups, settings, dtypes, strict=True):
        if (unit := units.get(group.metadata.name)) and unit.statistics:
            unit.statistics.merge(tensor_statistics(_narrowed(group, dtype), own, layout))
    return [
        units.get(name) or Unit(str(name), own.granularity, layout=layout)
        for name, own in zip(names, settings, strict=True)
    ]


def _explain_inputs(input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None) -> str | None:
    where = f" of `{group_name}`" if group_name else ""
    if base_id is None:
        return f"varm needs a base_model{where}: the pivot that the targets were fine-tuned from."
    if base_id not in input_ids:
        return f"the pivot {base_id} has no tensor `{group_name}`, so the targets have no deltas there."
    if list(input_ids) == [base_id]:
        return f"varm needs at least one target{where} beside the base_model {base_id}."
    return None


if METHOD_NAME not in {known.spec.name for known in merge_methods.registered_methods()}:
    merge_methods.register(VarmMethod())
