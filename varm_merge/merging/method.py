"""``merge_method: varm``: the registered merge method and its parameters.

Through ``merge_state_dicts`` the method gets all tensors in one call and forms its units over them. In a
``mergekit-yaml`` run it gets one tensor at a time; ``planner`` then hands it the statistics of the tensor's
unit, gathered by a pass of their own.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.merge_methods.base import ParameterSpec
from pydantic import Field

from varm_common.errors import UserError
from varm_merge.merging import tensor_math
from varm_merge.merging.experts import PLAIN, Layout, layout_of, matrices
from varm_merge.merging.weight_log import UnitRecord, WeightLog
from varm_merge.merging.weights import (
    SPANNING,
    Granularity,
    Normalization,
    Settings,
    Statistic,
    UnitStatistics,
    block_of,
    unit_of,
)

__all__ = [
    "METHOD_NAME",
    "UNIT",
    "DtypeError",
    "NonFiniteError",
    "Unit",
    "VarmMethod",
    "conflict",
    "parts_of",
    "refuse",
    "refuse_overflow",
    "register",
    "selection_of",
    "tensor_statistics",
]

METHOD_NAME = "varm"
UNIT = "unit"
"""Key under which ``planner`` adds a tensor's ``Unit`` to the parameters of a call."""

_FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _parameter(name: str, value_type: Any, description: str) -> ParameterSpec:
    default = Settings.__dataclass_fields__[name].default
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default=default, description=description)


SPEC = MergeMethodSpec(
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
    ),
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)


@dataclass
class Unit:
    """What a call needs to know of the unit its tensor belongs to.

    ``statistics`` is None where the unit is this tensor alone: the method then measures it itself.
    """

    name: str
    granularity: Granularity
    statistics: UnitStatistics | None = None
    log: WeightLog | None = None
    settings_by_tensor: dict[str, Settings] = field(default_factory=dict)
    layout: Layout = PLAIN


class NonFiniteError(UserError):
    """An input has NaN or Inf.

    Attributes:
        model: Whose tensor it is.
    """

    def __init__(self, message: str, model: Hashable) -> None:
        super().__init__(message)
        self.model = model


class DtypeError(UserError):
    """A value does not fit into a dtype of the recipe.

    Attributes:
        key: ``dtype`` or ``out_dtype``.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class VarmMethod(GroupMergeMethod):  # type: ignore[misc]
    """Variation Ratio Merge (FusionChat, arXiv 2402.16107, section 3.3) and SCE (FuseChat, EMNLP 2025)."""

    spec = SPEC
    refusal: str | None = None
    """Why this installation cannot merge, set where mergekit's internals are not those ``planner`` knows."""

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs of one group; raises ``UserError`` for what mergekit's contract refuses."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(_explain_inputs(input_ids, base_id, group_name) or str(error)) from None

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor; ``parameters`` are those of ``SPEC``, and ``UNIT``."""
        (result,) = self._execute((group,), [parameters], BatchOptions(), input_dtypes=[None])
        return result

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        calls = [
            _Call.of(group, call_parameters, dtype)
            for group, call_parameters, dtype in zip(groups, parameters, input_dtypes, strict=True)
        ]
        with torch.no_grad():
            _form_units([call for call in calls if call.unit is None])
            return tuple(call.merge(out_dtype) for call in calls)


@dataclass
class _Call:
    """One tensor on its way through the method."""

    group: TensorGroup
    settings: Settings
    unit: Unit | None
    dtype: torch.dtype

    @classmethod
    def of(cls, group: TensorGroup, parameters: Mapping[str, Any], dtype: torch.dtype | None) -> "_Call":
        named = {spec.name: parameters[spec.name] for spec in SPEC.parameters if spec.name in parameters}
        dtype = dtype or _promoted(group.entries)
        return cls(group, Settings(**named), parameters.get(UNIT), dtype)

    def merge(self, out_dtype: torch.dtype | None) -> torch.Tensor:
        group, unit = _narrowed(self.group, self.dtype), self.unit
        pivot = group.base
        assert pivot is not None
        assert unit is not None
        name = str(group.metadata.name)
        out = torch.empty(pivot.tensor.shape, dtype=out_dtype or self.dtype, device=pivot.tensor.device)
        parts = parts_of(group, self.settings, unit.layout)
        merged = [self._merge_part(part, cut(out)) for _, part, cut in parts]
        if unit.log is not None and unit.statistics is None:
            if unit.granularity == "parameter":  # one record for the tensor
                merged, parts = [_pooled(merged, parts)], [(unit.name, group, _whole)]
            for (part_name, part, _), (statistics, weights) in zip(parts, merged, strict=True):
                unit_name = part_name if len(parts) > 1 else unit.name
                elements = part.entries[0].tensor.numel()
                means: dict[Hashable, float] = statistics.means()
                unit.log.add(UnitRecord(unit_name, unit.granularity, [name], elements, means, weights))
        refuse_overflow(name, out, self.dtype)
        return out

    def _merge_part(self, group: TensorGroup, place: torch.Tensor) -> tuple[UnitStatistics, dict[Hashable, float]]:
        """Merge a tensor, or one expert's matrix, into ``place``; its statistics and weights."""
        unit, settings, pivot = self.unit, self.settings, group.base
        assert pivot is not None
        assert unit is not None
        ids = [target.id for target in group.non_base]
        tensors = [target.tensor for target in group.non_base]
        selection = selection_of(group, settings)
        out = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)

        def blend_elements(
            weights: Sequence[float] | tensor_math.ElementWeights,
        ) -> tuple[list[float], list[float]]:
            return tensor_math.blend_elements(
                pivot.tensor,
                tensors,
                weights,
                out,
                selection=selection,
                erase_minority=settings.erase_minority,
            )

        if unit.granularity == "parameter":
            statistic_sums, weight_sums = blend_elements(tensor_math.ElementWeights(*settings.weighting))
            statistics = _checked(group, statistic_sums)
            weights = {target: total / max(out.numel(), 1) for target, total in zip(ids, weight_sums, strict=True)}
        else:
            statistics = unit.statistics or _part_statistics(group, settings, selection)
            weights = statistics.weights(settings, ids)
            if not any(statistics.sums.values()):
                out.copy_(pivot.tensor)
            elif selection is None and not settings.erase_minority:
                tensor_math.blend(tensors, list(weights.values()), out)
            else:
                blend_elements(list(weights.values()))
        if out is not place:
            place.copy_(out)
        return statistics, weights


Part = tuple[str, TensorGroup, Callable[[torch.Tensor], torch.Tensor]]
"""Name, inputs, and place in the tensor."""


def parts_of(group: TensorGroup, settings: Settings, layout: Layout) -> list[Part]:
    """The matrices that a tensor consists of where it packs experts and that matters; else the tensor itself.

    It matters at ``matrix`` granularity, and to the selection, which is made within one matrix.
    """
    name, shape = group.metadata.name, group.entries[0].tensor.shape
    if settings.granularity != "matrix" and settings.select_topk >= 1:
        return [(str(name), group, _whole)]
    cuts = matrices(name, shape, layout)
    if not cuts:
        return [(str(name), group, _whole)]
    return [(part_name, _cut(group, cut), cut) for part_name, cut in cuts]


def _cut(group: TensorGroup, cut: Callable[[torch.Tensor], torch.Tensor]) -> TensorGroup:
    entries = [TensorEntry(entry.id, cut(entry.tensor), entry.is_base) for entry in group.entries]
    return TensorGroup(tuple(entries), TensorMetadata(name=group.metadata.name))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _pooled(
    merged: Sequence[tuple[UnitStatistics, dict[Hashable, float]]], parts: Sequence[Part]
) -> tuple[UnitStatistics, dict[Hashable, float]]:
    """The statistics and mean weights of a tensor at ``parameter`` granularity, from those of its parts."""
    if len(merged) == 1:
        return merged[0]
    statistics, weights = UnitStatistics(), dict.fromkeys(merged[0][1], 0.0)
    sizes = [part.entries[0].tensor.numel() for _, part, _ in parts]
    for (own, own_weights), size in zip(merged, sizes, strict=True):
        statistics.merge(own)
        for target, weight in own_weights.items():
            weights[target] += weight * size / max(sum(sizes), 1)
    return statistics, weights


def refuse_overflow(name: str, written: torch.Tensor, computed: torch.dtype) -> None:
    """Raise ``DtypeError`` where a finite result did not fit into the dtype that is ``written``."""
    if not written.is_floating_point() or torch.finfo(written.dtype).max >= torch.finfo(computed).max:
        return
    if not bool(torch.isfinite(written).all()):
        dtype = str(written.dtype).removeprefix("torch.")
        raise DtypeError(
            f"the merged tensor `{name}` has values beyond {torch.finfo(written.dtype).max:g}, the largest of "
            f"`out_dtype: {dtype}`; write it in bfloat16 or float32",
            "out_dtype",
        )


def tensor_statistics(group: TensorGroup, settings: Settings, layout: Layout = PLAIN) -> UnitStatistics:
    """Σ Δ² (or Σ |Δ|) of one tensor, by target.

    Raises ``UserError`` naming model and tensor where an input holds NaN or Inf.
    """
    statistics = UnitStatistics()
    for _, part, _ in parts_of(group, settings, layout):
        statistics.merge(_part_statistics(part, settings, selection_of(part, settings)))
    return statistics


def _part_statistics(
    group: TensorGroup, settings: Settings, selection: tensor_math.Selection | None
) -> UnitStatistics:
    assert group.base is not None
    targets = [target.tensor for target in group.non_base]
    return _checked(group, tensor_math.delta_sums(group.base.tensor, targets, settings.statistic, selection))


def conflict(unit: str, settings_by_tensor: Mapping[str, Settings]) -> str | None:
    """Why the tensors of one unit cannot share weights, or None where they can."""
    first, *others = settings_by_tensor.items()
    for name, settings in others:
        for option in ("statistic", "normalization", "temperature"):
            one, other = getattr(first[1], option), getattr(settings, option)
            if one != other:
                return (
                    f"unit `{unit}` ({settings.granularity} granularity) cannot have two values of `{option}`: "
                    f"{one} for {first[0]}, {other} for {name}. Give all tensors of the unit the same value, "
                    "or use a finer granularity for some of them."
                )
    return None


def register() -> None:
    """Make ``varm`` known to mergekit; a second call does nothing."""
    if METHOD_NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(VarmMethod())


def refuse(reason: str) -> None:
    """Make every further use of ``varm`` in this process end with ``reason``."""
    register()
    merge_methods.get(METHOD_NAME).refusal = reason


def _form_units(calls: Sequence[_Call]) -> None:
    """Give each tensor of one call of the method its unit, formed over the tensors that were given."""
    units: dict[tuple[str, str], Unit] = {}
    names = [str(call.group.metadata.name) for call in calls]
    layout = layout_of("gpt_oss" if any(name.endswith(".experts.gate_up_proj_bias") for name in names) else None)
    for call in calls:
        name, granularity = call.group.metadata.name, call.settings.granularity
        if granularity not in SPANNING:
            call.unit = Unit(str(name), granularity, layout=layout)
            continue
        if len(calls) == 1 or name is None:
            raise UserError(
                f"granularity `{granularity}` needs all tensors of the unit in one call, and varm was given "
                f"{'a tensor without a name' if name is None else f'only `{name}`'}. Merge with "
                "merge_state_dicts, or with mergekit-yaml (if this was mergekit-yaml, run `varm-merge doctor`), "
                "or use granularity `matrix`."
            )
        unit_name = unit_of(name, granularity, block_of(name))
        unit = Unit(unit_name, granularity, UnitStatistics(), layout=layout)
        call.unit = units.setdefault((granularity, unit_name), unit)
        call.unit.settings_by_tensor[name] = call.settings
    for unit in units.values():
        if message := conflict(unit.name, unit.settings_by_tensor):
            raise UserError(message)
    for call in calls:
        if call.unit is not None and call.unit.statistics is not None:
            group = _narrowed(call.group, call.dtype)
            call.unit.statistics.merge(tensor_statistics(group, call.settings, layout))


def _checked(group: TensorGroup, sums: Sequence[float]) -> UnitStatistics:
    if not all(math.isfinite(value) for value in sums):
        raise _nonfinite(group)
    statistics = UnitStatistics()
    statistics.add(
        {target.id: value for target, value in zip(group.non_base, sums, strict=True)},
        group.entries[0].tensor.numel(),
    )
    return statistics


def selection_of(group: TensorGroup, settings: Settings) -> tensor_math.Selection | None:
    if settings.select_topk >= 1 or len(group.non_base) < 2:  # nothing varies across one target
        return None
    assert group.base is not None
    return tensor_math.select(
        group.base.tensor, [target.tensor for target in group.non_base], settings.select_topk
    )


def _promoted(entries: Sequence[TensorEntry]) -> torch.dtype:
    dtype: torch.dtype = entries[0].tensor.dtype
    for entry in entries[1:]:
        dtype = torch.promote_types(dtype, entry.tensor.dtype)
    return dtype


def _narrowed(group: TensorGroup, dtype: torch.dtype) -> TensorGroup:
    """Cast the inputs that an explicit ``dtype`` rounds; widening happens chunk by chunk and is exact."""
    if all(torch.promote_types(entry.tensor.dtype, dtype) == dtype for entry in group.entries):
        return group
    entries = [TensorEntry(entry.id, entry.tensor.to(dtype), entry.is_base) for entry in group.entries]
    return TensorGroup(tuple(entries), group.metadata)


def _explain_inputs(input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None) -> str | None:
    where = f" of `{group_name}`" if group_name else ""
    if base_id is None:
        return f"varm needs a base_model{where}: the pivot that the targets were fine-tuned from."
    if base_id not in input_ids:
        return f"the pivot {base_id} has no tensor `{group_name}`, so the targets have no deltas there."
    if list(input_ids) == [base_id]:
        return f"varm needs at least one target{where} beside the base_model {base_id}."
    return None


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


register()
