"""Tasks of mergekit's graph that know a tensor's unit.

mergekit calls a method once per output tensor and passes only that tensor. A unit that spans tensors has to be
measured before its first tensor is merged. So each ``ExecuteMergeMethodTask`` of ``varm`` is replaced by a
``MergeTensor`` that also depends on the statistics of its unit:

    MeasureUnit ───► MergeTensor ─► SaveTensor
    gathered tensors ──┘

A ``MeasureUnit`` loads, reduces and drops one tensor after the other and returns K numbers. It does not depend on
the gather tasks of the merge: the executor would keep every tensor of the unit until its merge. It is scheduled
just before the first load of its unit, so that a layer's files are still in the page cache when it is merged.
Both tasks hash by identity. mergekit's own tasks hash whole trees, and a unit inside each of its N tensors' trees
would make planning O(N²)."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from mergekit.common import ImmutableMap, dtype_from_name
from mergekit.graph import Task
from mergekit.merge_methods import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from tqdm import tqdm

from varm_common.errors import UserError
from varm_merge.merging import method
from varm_merge.merging.experts import Layout
from varm_merge.merging.method import DtypeError, NonFiniteError, Unit
from varm_merge.merging.weight_log import UnitRecord, WeightLog, natural_order
from varm_merge.merging.weights import SPANNING, Settings, UnitStatistics, units_of

__all__ = ["MeasureUnit", "MergeTensor", "settings_of", "tasks_with_units", "tensor_group"]

MEASURE_PRIORITY = 1_000_000
"""Above the priorities of mergekit's own tasks with the same label."""


class _ByIdentity:
    """Planning makes each of these tasks once, so identity is equality, and O(1)."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class MeasureUnit(_ByIdentity, Task[UnitStatistics], arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """Σ Δ² by target of a unit that spans tensors, over what will be merged: after casts and vocabulary changes.

    ``device`` None means the default device of the thread that runs the task (one per GPU).
    """

    unit: Unit
    merges: tuple[ExecuteMergeMethodTask, ...]
    label: str
    device: str | None
    show_progress: bool

    def arguments(self) -> dict[str, Task[Any]]:
        for merge in self.merges:
            if isinstance(merge.gather_tensors, PermutedVocabulary):
                return {"tokenizer": merge.gather_tensors.tokenizer_task}
        return {}

    def group_label(self) -> str:
        return self.label

    def priority(self) -> int:
        return MEASURE_PRIORITY

    def execute(self, tokenizer: Any = None) -> UnitStatistics:
        unit, statistics, scales = self.unit, UnitStatistics(), {}
        for merge in tqdm(self.merges, desc=f"measure {unit.name}", disable=not self.show_progress):
            tensor_statistics = self._measure(merge, tokenizer)
            statistics.merge(tensor_statistics)
            if tensor_statistics.sums:
                scales[merge.output_weight.name] = settings_of(merge).scale
        if scales and unit.log is not None:
            names, settings = sorted(scales, key=natural_order), settings_of(self.merges[0])
            weights: dict[Hashable, float] = statistics.weights(settings)
            lambdas = [scales[name] for name in names]
            record = UnitRecord(unit.name, unit.granularity, names, statistics, weights, lambdas, settings.priors)
            unit.log.add(record)
        return statistics

    def _measure(self, merge: ExecuteMergeMethodTask, tokenizer: Any) -> UnitStatistics:
        device = torch.get_default_device() if self.device is None else torch.device(self.device)
        if (group := tensor_group(merge, tokenizer, device)) is None:
            return UnitStatistics()
        with _dtype_blamed(merge):
            return method.tensor_statistics(group, settings_of(merge), self.unit.layout)


class MergeTensor(_ByIdentity, ExecuteMergeMethodTask, arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """mergekit's task for one output tensor, with the tensor's unit.

    ``saved_dtype`` is the dtype that the tensor is written in, where mergekit's next task casts it.
    """

    unit: Unit
    measure: MeasureUnit | None
    saved_dtype: str | None

    def arguments(self) -> dict[str, Task[Any]]:
        measured = {} if self.measure is None else {"statistics": self.measure}
        return {**super().arguments(), **measured}

    def execute(
        self, tensors: dict[Any, torch.Tensor], statistics: UnitStatistics | None = None, **_kwargs: Any
    ) -> torch.Tensor | None:
        self._refuse_lost(tensors)
        name = self.output_weight.name
        unit = replace(self.unit, statistics=statistics)
        parameters = ImmutableMap({**dict(self.parameters.items()), method.UNIT: unit})
        bound = self.model_copy(update={"parameters": parameters})
        with _dtype_blamed(self):
            result: torch.Tensor | None = ExecuteMergeMethodTask.execute(bound, tensors)
            if result is None or not result.is_floating_point():
                return result
            inputs = [model for model, tensor in tensors.items() if tensor is not None]
            if len(inputs) == 1 and not bool(torch.isfinite(result).all()):  # copied, not measured
                raise NonFiniteError(f"Inf or NaN in tensor `{name}` of {inputs[0]}.", inputs[0])
        if self.saved_dtype is not None:
            dtype = dtype_from_name(self.saved_dtype)
            if torch.finfo(dtype).max < torch.finfo(result.dtype).max:
                method.refuse_overflow(name, result.to(dtype), result.dtype)
        return result

    def _refuse_lost(self, tensors: Mapping[Any, torch.Tensor | None]) -> None:
        """mergekit's executor for several GPUs can run a task again whose inputs it has dropped."""
        may_lack = self.output_weight.optional or isinstance(self.gather_tensors, TensorDictWrapper)
        for model in () if may_lack else self.model_order:
            if tensors.get(model) is None:
                raise UserError(
                    f"mergekit lost `{self.output_weight.name}` of {model}, which can happen with --multi-gpu. "
                    "Run it again, or without --multi-gpu."
                )


@contextmanager
def _dtype_blamed(task: ExecuteMergeMethodTask) -> Iterator[None]:
    """Raise ``DtypeError`` for an Inf that the recipe's ``dtype`` has made of a finite value of the checkpoint."""
    try:
        yield
    except NonFiniteError as error:
        source = task.gather_tensors
        for load in getattr(source, "gather_tensors", source).arguments().values():
            if load.dtype and str(load.model) == str(error.model):
                stored = load.model_copy(update={"dtype": None}).execute()
                if stored is not None and bool(torch.isfinite(stored).all()):
                    raise DtypeError(
                        f"`{task.output_weight.name}` of {error.model} has values up to {stored.abs().max():g}, "
                        f"which do not fit into `dtype: {load.dtype}`; merge in bfloat16 or float32",
                        "dtype",
                    ) from error
        raise


def settings_of(task: ExecuteMergeMethodTask) -> Settings:
    """The parameters of ``varm`` for one output tensor."""
    weights = {model: own["weight"] for model, own in task.input_parameters.items() if "weight" in own}
    return Settings.of({**dict(task.parameters.items()), "weight": weights})


def tensor_group(merge: ExecuteMergeMethodTask, tokenizer: Any, device: torch.device) -> TensorGroup | None:
    """Load pivot and targets of one output tensor; None where the tensor is not averaged but copied or refused."""
    tensors = _evaluate(merge.gather_tensors, tokenizer)
    models = [model for model in merge.model_order if tensors.get(model) is not None]
    pivot = merge.base_model
    if pivot not in models or len(models) < 2 or not all(tensors[m].is_floating_point() for m in models):
        return None
    group = TensorGroup.from_tensors(
        [tensors[model].to(device) for model in models],
        ids=models,
        base_index=models.index(pivot),
        name=merge.output_weight.name,
        vocabulary_axis=merge.output_weight.vocabulary_axis,
    )
    group.validate_tensors()
    return group


def _evaluate(task: Task[Any], tokenizer: Any) -> Any:
    """Run a task and all that it depends on at once, keeping nothing."""
    if isinstance(task, BuildTokenizer):
        return tokenizer
    return task.execute(**{name: _evaluate(part, tokenizer) for name, part in task.arguments().items()})


def tasks_with_units(
    tasks: Sequence[ExecuteMergeMethodTask],
    blocks: Mapping[str, str | None],
    options: MergeOptions,
    log: WeightLog,
    layout: Layout,
    out_dtype: str | None = None,
) -> list[MergeTensor]:
    """The task of each output tensor, replaced by one that knows the tensor's unit.

    Args:
        tasks: mergekit's. Some architectures plan a tensor in two modules; it is one tensor of the output model.
        blocks: The transformer block of each tensor inside one.
        options: Of the run.
        log: Where the weights are recorded.
        layout: How the tensors pack experts.
        out_dtype: The dtype that mergekit casts the merged tensors to.

    Raises:
        UserError: The tensors of one unit were given settings that contradict each other.
    """
    by_name = {task.output_weight.name: task for task in tasks}
    settings = {name: settings_of(task) for name, task in by_name.items()}
    merges: dict[str, MergeTensor] = {}
    for (granularity, unit_name), names in units_of(settings, blocks).items():
        unit = Unit(unit_name, granularity, log=log, layout=layout)
        measure = None
        if granularity in SPANNING and len(names) > 1:
            labels = {name: _first_label(by_name[name].gather_tensors) for name in names}
            measure = MeasureUnit(
                unit=unit,
                merges=tuple(by_name[name] for name in sorted(names, key=lambda name: (labels[name], name))),
                label=min(labels.values()),
                device=None if options.multi_gpu else options.device,
                show_progress=granularity == "model" and not options.quiet,
            )
        for name in names:
            fields = {field: getattr(by_name[name], field) for field in ExecuteMergeMethodTask.model_fields}
            saved_dtype = by_name[name].output_weight.force_dtype or out_dtype
            merges[name] = MergeTensor(**fields, unit=unit, measure=measure, saved_dtype=saved_dtype)
    return [merges[task.output_weight.name] for task in tasks]


def _first_label(task: Task[Any]) -> str:
    """The smallest scheduling label among the loads that a task needs."""
    arguments = task.arguments().values()
    if not arguments:
        return task.group_label() or ""
    return min(_first_label(argument) for argument in arguments if not isinstance(argument, BuildTokenizer))
