"""Tasks of mergekit's graph that know a tensor's unit.

mergekit calls a method once per output tensor and names only that tensor, so a unit that spans tensors has to
be measured before its first tensor is merged. Every ``ExecuteMergeMethodTask`` of ``varm`` is exchanged for a
``MergeTensor`` that also depends on the statistics of its unit:

    MeasureTensor ─┐
    MeasureTensor ─┼─► MeasureUnit ─► MergeTensor ─► SaveTensor … FinalizeMerge
    MeasureTensor ─┘        gathered tensors ──┘

A ``MeasureTensor`` loads, reduces and drops its tensors itself and returns K numbers. It must not depend on
the gather tasks it shares with the merge: the executor would keep every tensor of the unit until its merge.
The measuring tasks of a unit are labelled to run just before the unit's first load, so that a layer's files
are still in the page cache when it is merged. All tasks here hash by identity: mergekit's hash whole trees,
and a unit's tree inside each of its N tensors' trees would make planning O(N²)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ImmutableMap, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, SaveTensor
from mergekit.merge_methods import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary

from varm_common.errors import UserError
from varm_merge.merging import method
from varm_merge.merging.experts import Layout, layout_of
from varm_merge.merging.mergekit_io import expect_fields
from varm_merge.merging.method import DtypeError, NonFiniteError
from varm_merge.merging.weight_log import UnitRecord, WeightLog, natural_order
from varm_merge.merging.weights import SPANNING, Granularity, Settings, UnitStatistics, unit_of

__all__ = [
    "expect_task_fields",
    "expert_layout",
    "tasks_with_units",
    "tensor_group",
    "with_weight_log",
]

MEASURE_PRIORITY = 1_000_000
"""Above the priorities of mergekit's own tasks, which share labels with the measuring ones."""


class _ByIdentity:
    """Planning makes each of these tasks once, so identity is equality, and O(1)."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class MeasureTensor(_ByIdentity, Task[UnitStatistics], arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """Σ Δ² of one output tensor by target, over what will be merged: after casts and vocabulary changes.

    ``device`` None means the default device of the thread that runs the task (one per GPU).
    """

    merge: ExecuteMergeMethodTask
    settings: Settings
    label: str
    rank: int
    device: str | None
    layout: Layout

    def arguments(self) -> dict[str, Task[Any]]:
        source = self.merge.gather_tensors
        return {"tokenizer": source.tokenizer_task} if isinstance(source, PermutedVocabulary) else {}

    def group_label(self) -> str:
        return self.label

    def priority(self) -> int:
        return MEASURE_PRIORITY - self.rank

    def execute(self, tokenizer: Any = None) -> UnitStatistics:
        device = torch.get_default_device() if self.device is None else torch.device(self.device)
        group = tensor_group(self.merge, tokenizer, device)
        if group is None:
            return UnitStatistics()
        with _dtype_blamed(self.merge):
            return method.tensor_statistics(group, self.settings, self.layout)


class MeasureUnit(_ByIdentity, Task[UnitStatistics], arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """The pooled statistics of a unit that spans tensors."""

    unit: str
    settings: Settings
    parts: tuple[MeasureTensor, ...]
    log: WeightLog

    def arguments(self) -> dict[str, Task[Any]]:
        return {str(part.rank): part for part in self.parts}

    def group_label(self) -> str:
        return self.parts[0].label

    def priority(self) -> int:
        return MEASURE_PRIORITY - len(self.parts)

    def execute(self, **measured: UnitStatistics) -> UnitStatistics:
        statistics = UnitStatistics()
        names = []
        for part in self.parts:
            part_statistics = measured[str(part.rank)]
            statistics.merge(part_statistics)
            if part_statistics.sums:
                names.append(part.merge.output_weight.name)
        if names:
            self.log.add(
                UnitRecord(
                    self.unit,
                    self.settings.granularity,
                    sorted(names, key=natural_order),
                    max(statistics.elements.values()),
                    statistics.means(),
                    statistics.weights(self.settings),
                )
            )
        return statistics


class MergeTensor(_ByIdentity, ExecuteMergeMethodTask, arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """mergekit's task for one output tensor, with what ``varm`` must know of the tensor's unit."""

    unit: str
    granularity: Granularity
    measure: MeasureUnit | None
    log: WeightLog
    layout: Layout
    saved_dtype: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        measured = {} if self.measure is None else {"statistics": self.measure}
        return {**super().arguments(), **measured}

    def execute(
        self, tensors: dict[Any, torch.Tensor], statistics: UnitStatistics | None = None, **_kwargs: Any
    ) -> torch.Tensor | None:
        self._refuse_lost(tensors)
        unit = method.Unit(self.unit, self.granularity, statistics, self.log, layout=self.layout)
        parameters = ImmutableMap({**dict(self.parameters.items()), method.UNIT: unit})
        bound = self.model_copy(update={"parameters": parameters})
        with _dtype_blamed(self):
            result: torch.Tensor | None = ExecuteMergeMethodTask.execute(bound, tensors)
            alone = [model for model, tensor in tensors.items() if tensor is not None]
            if len(alone) == 1 and result is not None and not bool(torch.isfinite(result).all()):
                raise NonFiniteError(f"Inf or NaN in tensor `{self.output_weight.name}` of {alone[0]}.", alone[0])
        if result is not None and self.saved_dtype is not None and result.is_floating_point():
            dtype = dtype_from_name(self.saved_dtype)
            if torch.finfo(dtype).max < torch.finfo(result.dtype).max:
                method.refuse_overflow(self.output_weight.name, result.to(dtype), result.dtype)
        return result

    def _refuse_lost(self, tensors: Mapping[Any, torch.Tensor | None]) -> None:
        """mergekit's executor for several GPUs can recompute a task from inputs whose values it dropped."""
        may_lack = self.output_weight.optional or isinstance(self.gather_tensors, TensorDictWrapper)
        for model in () if may_lack else self.model_order:
            if tensors.get(model) is None:
                raise UserError(
                    f"mergekit lost `{self.output_weight.name}` of {model}, which can happen with --multi-gpu. "
                    "Run it again, or without --multi-gpu."
                )


class FinalizeMerge(_ByIdentity, FinalizeModel, arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """mergekit's last task; it also leaves ``varm_weights.json``."""

    log: WeightLog

    def execute(self, writer: Any, **_kwargs: Any) -> None:
        super().execute(writer)
        self.log.write(Path(writer.out_path))


def with_weight_log(tasks: Sequence[Task[Any]], log: WeightLog) -> list[Task[Any]]:
    """The tasks with mergekit's last one exchanged for ``FinalizeMerge``."""
    return [
        FinalizeMerge(tensor_save_tasks=task.tensor_save_tasks, writer_task=task.writer_task, log=log)
        if isinstance(task, FinalizeModel)
        else task
        for task in tasks
    ]


@contextmanager
def _dtype_blamed(task: ExecuteMergeMethodTask) -> Iterator[None]:
    """Tell an Inf that the recipe's ``dtype`` has made from one of the checkpoint."""
    try:
        yield
    except NonFiniteError as error:
        source = task.gather_tensors
        loads = getattr(source, "gather_tensors", source).arguments().values()
        for load in loads:
            if load.dtype and str(load.model) == str(error.model):
                raw = load.model_copy(update={"dtype": None}).execute()
                if raw is not None and bool(torch.isfinite(raw).all()):
                    largest = f"{raw.abs().max():g}"
                    raise DtypeError(
                        f"`{task.output_weight.name}` of {error.model} has values up to {largest}, which do "
                        f"not fit into `dtype: {load.dtype}`; merge in bfloat16 or float32",
                        "dtype",
                    ) from error
        raise


def tensor_group(merge: ExecuteMergeMethodTask, tokenizer: Any, device: torch.device) -> TensorGroup | None:
    """Pivot and targets of one output tensor; None where it is passed through, copied or refused, not averaged."""
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


def tasks_with_units(
    tasks: Sequence[ExecuteMergeMethodTask],
    blocks: Mapping[str, str | None],
    device: str | None,
    log: WeightLog,
    layout: Layout,
) -> list[MergeTensor]:
    """Exchange mergekit's task of each output tensor for one that knows the tensor's unit.

    ``blocks`` maps the names of tensors inside transformer blocks to their block. Raises ``UserError`` where
    the tensors of one unit were given settings that contradict each other.
    """
    # some architectures plan a tensor in two modules; it is one tensor of the output model
    planned, tasks = tasks, list({task.output_weight.name: task for task in tasks}.values())
    settings = [Settings(**dict(task.parameters.items())) for task in tasks]
    units: dict[tuple[str, str], list[int]] = {}
    for index, (task, chosen) in enumerate(zip(tasks, settings, strict=True)):
        name = task.output_weight.name
        units.setdefault((chosen.granularity, unit_of(name, chosen.granularity, blocks.get(name))), []).append(
            index
        )
    merges: dict[str, MergeTensor] = {}
    for (granularity, unit), members in units.items():
        if message := method.conflict(unit, {tasks[i].output_weight.name: settings[i] for i in members}):
            raise UserError(message)
        measure = None
        if granularity in SPANNING and len(members) > 1:
            ordered = sorted(
                (_first_label(tasks[i].gather_tensors), tasks[i].output_weight.name, i) for i in members
            )
            label = ordered[0][0]
            parts = [
                MeasureTensor(
                    merge=tasks[i], settings=settings[i], label=label, rank=rank, device=device, layout=layout
                )
                for rank, (_, _, i) in enumerate(ordered)
            ]
            measure = MeasureUnit(unit=unit, settings=settings[members[0]], parts=tuple(parts), log=log)
        for i in members:
            fields = {name: getattr(tasks[i], name) for name in ExecuteMergeMethodTask.model_fields}
            merges[tasks[i].output_weight.name] = MergeTensor(
                **fields, unit=unit, granularity=granularity, measure=measure, log=log, layout=layout
            )
    return [merges[task.output_weight.name] for task in planned]


def expert_layout(config: Any) -> Layout:
    """How the output model's tensors pack their experts."""
    text = config.get_text_config()
    return layout_of(getattr(text, "model_type", None), getattr(text, "hidden_size", None))


def _first_label(task: Task[Any]) -> str:
    """The smallest scheduling label among the loads that a task needs."""
    arguments = task.arguments().values()
    if not arguments:
        return task.group_label() or ""
    return min(_first_label(argument) for argument in arguments if not isinstance(argument, BuildTokenizer))


def _evaluate(task: Task[Any], tokenizer: Any) -> Any:
    """Run a task and all it depends on here and now, keeping nothing."""
    if isinstance(task, BuildTokenizer):
        return tokenizer
    return task.execute(**{name: _evaluate(part, tokenizer) for name, part in task.arguments().items()})


def expect_task_fields() -> None:
    """See that mergekit's tasks have the fields that are used here; AttributeError if not."""
    expect_fields(
        ExecuteMergeMethodTask.model_fields,
        *("method_name", "gather_tensors", "model_order", "base_model", "output_weight", "parameters"),
    )
    expect_fields(SaveTensor.model_fields, "tensor_name", "tensor_task", "writer_task")
    expect_fields(FinalizeModel.model_fields, "tensor_save_tasks", "writer_task")
    expect_fields(PermutedVocabulary.model_fields, "tokenizer_task", "gather_tensors")
