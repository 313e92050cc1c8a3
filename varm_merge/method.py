"""``merge_method: varm``: the registered merge method and its parameters.

Through ``merge_state_dicts`` the method gets all tensors in one call and forms its units over them. In a
``mergekit-yaml`` run it gets one tensor at a time; ``planner`` then hands it the statistics of the tensor's
unit, gathered by a pass of their own.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
)
from mergekit.merge_methods.base import ParameterSpec
from pydantic import Field

from varm_merge import tensor_math
from varm_merge.errors import VarmError
from varm_merge.report import UnitRecord, WeightLog
from varm_merge.weights import (
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
    "Unit",
    "VarmMethod",
    "conflict",
    "refuse",
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


class VarmMethod(GroupMergeMethod):  # type: ignore[misc]
    """Variation Ratio Merge (FusionChat, arXiv 2402.16107, section 3.3) and SCE (FuseChat, ICLR 2025)."""

    spec = SPEC
    refusal: str | None = None
    """Why this installation cannot merge, set where mergekit's internals are not those ``planner`` knows."""

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs of one group; raises ``VarmError`` for what mergekit's contract refuses."""
        if self.refusal is not None:
            raise VarmError(self.refusal)
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except VarmError:
            raise
        except ValueError as error:
            raise VarmError(_explain_inputs(input_ids, base_id, group_name) or str(error)) from None

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
        group, unit, settings = _narrowed(self.group, self.dtype), self.unit, self.settings
        pivot = group.base
        assert pivot is not None
        assert unit is not None
        ids = [target.id for target in group.non_base]
        tensors = [target.tensor for target in group.non_base]
        out = torch.empty(pivot.tensor.shape, dtype=out_dtype or self.dtype, device=pivot.tensor.device)
        selection = selection_of(group, settings)
        blend_elements = partial(
            tensor_math.blend_elements,
            pivot.tensor,
            tensors,
            out=out,
            selection=selection,
            erase_minority=settings.erase_minority,
        )
        if unit.granularity == "parameter":
            statistic_sums, weight_sums = blend_elements(tensor_math.ElementWeights(*settings.weighting))
            statistics = _checked(group, statistic_sums)
            weights = {target: total / max(out.numel(), 1) for target, total in zip(ids, weight_sums, strict=True)}
        else:
            statistics = unit.statistics or tensor_statistics(group, settings, selection)
            weights = statistics.weights(settings, ids)
            if not any(statistics.sums.values()):
                out.copy_(pivot.tensor)
            elif selection is None and not settings.erase_minority:
                tensor_math.blend(tensors, list(weights.values()), out)
            else:
                blend_elements(list(weights.values()))
        if unit.log is not None and unit.statistics is None:
            name = str(group.metadata.name)
            unit.log.add(UnitRecord(unit.name, unit.granularity, [name], out.numel(), statistics.means(), weights))
        return out


def tensor_statistics(
    group: TensorGroup, settings: Settings, selection: tensor_math.Selection | None = None
) -> UnitStatistics:
    """Σ Δ² (or Σ |Δ|) of one tensor, by target.

    Raises ``VarmError`` naming model and tensor where an input holds NaN or Inf.
    """
    assert group.base is not None
    if selection is None:
        selection = selection_of(group, settings)
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
    for call in calls:
        name, granularity = call.group.metadata.name, call.settings.granularity
        if granularity not in SPANNING:
            call.unit = Unit(str(name), granularity)
            continue
        if len(calls) == 1 or name is None:
            raise VarmError(
                f"granularity `{granularity}` needs all tensors of the unit in one call, and varm was given "
                f"{'a tensor without a name' if name is None else f'only `{name}`'}. Merge with "
                "merge_state_dicts, or with mergekit-yaml (if this was mergekit-yaml, run `varm-merge doctor`), "
                "or use granularity `matrix`."
            )
        unit_name = unit_of(name, granularity, block_of(name))
        call.unit = units.setdefault((granularity, unit_name), Unit(unit_name, granularity, UnitStatistics()))
        call.unit.settings_by_tensor[name] = call.settings
    for unit in units.values():
        if message := conflict(unit.name, unit.settings_by_tensor):
            raise VarmError(message)
    for call in calls:
        if call.unit is not None and call.unit.statistics is not None:
            group = _narrowed(call.group, call.dtype)
            call.unit.statistics.merge(tensor_statistics(group, call.settings))


def _checked(group: TensorGroup, sums: Sequence[float]) -> UnitStatistics:
    if not all(math.isfinite(value) for value in sums):
        raise VarmError(_explain_nonfinite(group))
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


def _explain_nonfinite(group: TensorGroup) -> str:
    for entry in group.entries:
        for chunk in entry.tensor.reshape(-1).split(tensor_math.ACCELERATOR_CHUNK):
            if not bool(torch.isfinite(chunk).all()):
                kind = "NaN" if bool(torch.isnan(chunk).any()) else "Inf"
                return (
                    f"{kind} in tensor `{group.metadata.name}` of {'the pivot' if entry.is_base else 'target'} "
                    f"{entry.id}. Its checkpoint is damaged or its training diverged; varm does not merge it."
                )
    return (
        f"the deltas of tensor `{group.metadata.name}` are too large for float64 statistics; "
        "the checkpoints do not share a pivot."
    )


register()
