"""The one file that touches mergekit's internals: its planning, and the entry of a run.

mergekit calls a method once per output tensor and names only that tensor, so a unit that spans tensors has to
be measured before its first tensor is merged. After mergekit has planned, every ``ExecuteMergeMethodTask`` of
``varm`` is exchanged for a ``MergeTensor`` that also depends on the statistics of its unit:

    MeasureTensor ─┐
    MeasureTensor ─┼─► MeasureUnit ─► MergeTensor ─► SaveTensor … FinalizeModel ─► WriteWeights
    MeasureTensor ─┘        gathered tensors ──┘

A ``MeasureTensor`` loads, reduces and drops its tensors itself and returns K numbers. It must not depend on
the gather tasks it shares with the merge: the executor would keep every tensor of the unit until its merge.
The measuring tasks of a unit are labelled to run just before the unit's first load, so that a layer's files
are still in the page cache when it is merged. All tasks here hash by identity: mergekit's hash whole trees,
and a unit's tree inside each of its N tensors' trees would make planning O(N²).
"""

import functools
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.merge_methods import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from pydantic import BaseModel

from varm_merge import method, recipe
from varm_merge.errors import VarmError
from varm_merge.report import FILE_NAME, UnitRecord, WeightLog, natural_order
from varm_merge.weights import SPANNING, Granularity, Settings, UnitStatistics, block_of, unit_of

__all__ = ["PlannedTensor", "attach", "planned_tensors"]

SUPPORTED_MERGEKIT = ">=0.1.5,<0.2"
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

    def arguments(self) -> dict[str, Task[Any]]:
        source = self.merge.gather_tensors
        return {"tokenizer": source.tokenizer_task} if isinstance(source, PermutedVocabulary) else {}

    def group_label(self) -> str:
        return self.label

    def priority(self) -> int:
        return MEASURE_PRIORITY - self.rank

    def execute(self, tokenizer: Any = None) -> UnitStatistics:
        device = torch.get_default_device() if self.device is None else torch.device(self.device)
        group = _group(self.merge, tokenizer, device)
        return UnitStatistics() if group is None else method.tensor_statistics(group, self.settings)


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

    def arguments(self) -> dict[str, Task[Any]]:
        measured = {} if self.measure is None else {"statistics": self.measure}
        return {**super().arguments(), **measured}

    def execute(
        self, tensors: dict[Any, torch.Tensor], statistics: UnitStatistics | None = None, **_kwargs: Any
    ) -> torch.Tensor | None:
        self._refuse_lost(tensors)
        unit = method.Unit(self.unit, self.granularity, statistics, self.log)
        parameters = ImmutableMap({**dict(self.parameters.items()), method.UNIT: unit})
        bound = self.model_copy(update={"parameters": parameters})
        result: torch.Tensor | None = ExecuteMergeMethodTask.execute(bound, tensors)
        return result

    def _refuse_lost(self, tensors: Mapping[Any, torch.Tensor | None]) -> None:
        """mergekit's executor for several GPUs can recompute a task from inputs whose values it dropped."""
        may_lack = self.output_weight.optional or isinstance(self.gather_tensors, TensorDictWrapper)
        for model in () if may_lack else self.model_order:
            if tensors.get(model) is None:
                raise VarmError(
                    f"mergekit lost `{self.output_weight.name}` of {model}, which can happen with --multi-gpu. "
                    "Run it again, or without --multi-gpu."
                )


class WriteWeights(_ByIdentity, Task[None], arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """Leaves ``varm_weights.json`` beside the finished weights."""

    finalize: FinalizeModel
    log: WeightLog
    out_path: str

    def arguments(self) -> dict[str, Task[Any]]:
        return {"finalized": self.finalize}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **_kwargs: Any) -> None:
        self.log.write(Path(self.out_path))


def attach(module: ModuleType) -> None:
    """Attach to a module of mergekit that has just been imported; a second time does nothing.

    Where the module is not as this file knows it, every use of ``varm`` is refused with a sentence that says
    which versions of mergekit work.
    """
    if getattr(module, "_varm_merge_attached", False):
        return
    short_name = module.__name__.removeprefix("mergekit.").removeprefix("scripts.")
    try:
        _ATTACH[short_name](module)
    except (AttributeError, TypeError) as error:
        method.refuse(
            f"this varm-merge works with mergekit {SUPPORTED_MERGEKIT}, and {module.__name__} of the installed "
            f"mergekit {version('mergekit')} is built differently ({error}). Install a supported version: "
            f'pip install "mergekit{SUPPORTED_MERGEKIT}"'
        )
    module._varm_merge_attached = True  # type: ignore[attr-defined]


def _attach_to_planning(plan: ModuleType) -> None:
    planner_class = plan.MergePlanner
    _expect(planner_class._plan, "self")
    _expect(planner_class.plan_to_disk, "self", "out_path")
    _expect(planner_class._out_module_arch, "self", "module")
    _expect_fields(planner_class.__annotations__, "config", "options", "_tensors")
    _expect_task_fields()
    plan_tensors, plan_to_disk = planner_class._plan, planner_class.plan_to_disk

    @functools.wraps(plan_tensors)
    def _plan(self: Any) -> None:
        if self.config.merge_method != method.METHOD_NAME:
            plan_tensors(self)
            return
        content = _content(self.config)
        plan_tensors(self)
        names = [weight.name for weight, _ in self._tensors]
        _refuse_idle_filters(self.config, [*names, *_architecture_names(self)])
        pivot = self.config.base_model
        self._varm_log = WeightLog(None if pivot is None else str(pivot), content)
        device = None if self.options.multi_gpu else self.options.device
        merges = _with_units([task for _, task in self._tensors], dict(_blocks(self)), device, self._varm_log)
        self._tensors = [(weight, merge) for (weight, _), merge in zip(self._tensors, merges, strict=True)]

    @functools.wraps(plan_to_disk)
    def _plan_to_disk(self: Any, out_path: str) -> list[Task[Any]]:
        tasks: list[Task[Any]] = plan_to_disk(self, out_path)
        if self.config.merge_method == method.METHOD_NAME:
            tasks.append(_write_weights(tasks, self._varm_log, out_path))
        return tasks

    planner_class._plan = _plan
    planner_class.plan_to_disk = _plan_to_disk


def _attach_to_run(merge: ModuleType) -> None:
    run_merge = merge.run_merge
    _expect(run_merge, "merge_config", "out_path", "options", "config_source")

    @functools.wraps(run_merge)
    def _run_merge(
        merge_config: MergeConfiguration, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        if merge_config.merge_method != method.METHOD_NAME:
            run_merge(merge_config, out_path, options, config_source)
            return
        text = config_source if config_source is not None else yaml.safe_dump(_content(merge_config))
        recipe.refuse(recipe.check(text, cache_dir=options.transformers_cache))
        with _no_remains(out_path):
            run_merge(merge_config, out_path, options, config_source)

    merge.run_merge = _run_merge  # type: ignore[attr-defined]


def _attach_to_command(script: ModuleType) -> None:
    command = script.main
    callback: Callable[..., Any] = command.callback
    argument = next(name for name in ("config_file", "config_path") if name in {p.name for p in command.params})
    kind = recipe.KINDS[script.__name__.rpartition(".")[2]]

    @functools.wraps(callback)
    def checked(**arguments: Any) -> Any:
        path = Path(arguments[argument])
        if not path.is_file():
            return callback(**arguments)
        text = path.read_text(encoding="utf-8")
        recipe.refuse(recipe.check(text, kind=kind, cache_dir=arguments.get("transformers_cache")), path)
        with _no_remains(arguments["out_path"]) if kind == "raw" and recipe.uses_varm(text) else nullcontext():
            return callback(**arguments)

    command.callback = checked


def _attach_to_raw_command(script: ModuleType) -> None:
    plan_flat_merge = script.plan_flat_merge
    _expect(plan_flat_merge, "config", "out_path", "tensor_union", "tensor_intersection", "options")
    _expect_task_fields()

    @functools.wraps(plan_flat_merge)
    def _plan_flat_merge(config: Any, out_path: str, *args: Any, **kwargs: Any) -> list[Task[Any]]:
        tasks: list[Task[Any]] = plan_flat_merge(config, out_path, *args, **kwargs)
        if config.merge_method != method.METHOD_NAME:
            return tasks
        bound = inspect.signature(plan_flat_merge).bind(config, out_path, *args, **kwargs)
        if len(tasks) < 2:  # nothing but the end of the run: the files have no tensor in common
            return tasks
        saves = sorted((task for task in tasks if isinstance(task, SaveTensor)), key=lambda save: save.tensor_name)
        names = [save.tensor_name for save in saves]
        _refuse_idle_filters(config, names)
        log = WeightLog(config.base_model, _content(config))
        blocks = {name: block_of(name) for name in names}
        merges = _with_units([save.tensor_task for save in saves], blocks, bound.arguments["options"].device, log)
        saves = [save.model_copy(update={"tensor_task": merge}) for save, merge in zip(saves, merges, strict=True)]
        finalize = FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=saves[0].writer_task)
        return [*saves, finalize, _write_weights([finalize], log, out_path)]

    script.plan_flat_merge = _plan_flat_merge  # type: ignore[attr-defined]
    _attach_to_command(script)


_ATTACH: dict[str, Callable[[ModuleType], None]] = {
    "plan": _attach_to_planning,
    "merge": _attach_to_run,
    "run_yaml": _attach_to_command,
    "multimerge": _attach_to_command,
    "merge_raw_pytorch": _attach_to_raw_command,
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output model before it is merged; ``block`` is None outside all transformer blocks."""

    name: str
    block: str | None
    settings: Settings
    load: Callable[[], TensorGroup | None]


def planned_tensors(config: MergeConfiguration, options: MergeOptions) -> list[PlannedTensor]:
    """Every tensor that a ``varm`` recipe merges, to be loaded one by one as the merge itself would.

    Raises:
        VarmError: The units contradict each other, or mergekit is another than this file knows.
    """
    import mergekit.merge as merge
    import mergekit.plan as plan

    if (reason := merge_methods.get(method.METHOD_NAME).refusal) is not None:
        raise VarmError(reason)
    try:
        _expect(merge._model_out_config, "trust_remote_code")
        _expect_fields(vars(merge), "get_architecture_info")
        _expect_fields(plan.MergePlanner.__annotations__, "_tokenizer_task")
    except (AttributeError, TypeError) as error:
        raise VarmError(
            f"varm-merge inspect works with mergekit {SUPPORTED_MERGEKIT}, and the installed one is built "
            f'differently ({error}). Install a supported version: pip install "mergekit{SUPPORTED_MERGEKIT}"'
        ) from error
    architecture = merge.get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    out_config = merge._model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    planner = plan.MergePlanner(config, architecture, options=options, out_model_config=out_config)
    planner._plan()
    blocks = dict(_blocks(planner))
    tokenizer = planner._tokenizer_task.execute() if planner._tokenizer_task else None
    tasks = {task.output_weight.name: task for _, task in planner._tensors}
    device = torch.device(options.device or "cpu")
    return [
        PlannedTensor(
            name,
            blocks.get(name),
            Settings(**dict(task.parameters.items())),
            functools.partial(_group, task, tokenizer, device),
        )
        for name, task in sorted(tasks.items(), key=lambda item: natural_order(item[0]))
    ]


def _group(merge: ExecuteMergeMethodTask, tokenizer: Any, device: torch.device) -> TensorGroup | None:
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


def _with_units(
    tasks: Sequence[ExecuteMergeMethodTask],
    blocks: Mapping[str, str | None],
    device: str | None,
    log: WeightLog,
) -> list[MergeTensor]:
    """Exchange mergekit's task of each output tensor for one that knows the tensor's unit.

    ``blocks`` maps the names of tensors inside transformer blocks to their block. Raises ``VarmError`` where
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
            raise VarmError(message)
        measure = None
        if granularity in SPANNING and len(members) > 1:
            ordered = sorted(
                (_first_label(tasks[i].gather_tensors), tasks[i].output_weight.name, i) for i in members
            )
            label = ordered[0][0]
            parts = [
                MeasureTensor(merge=tasks[i], settings=settings[i], label=label, rank=rank, device=device)
                for rank, (_, _, i) in enumerate(ordered)
            ]
            measure = MeasureUnit(unit=unit, settings=settings[members[0]], parts=tuple(parts), log=log)
        for i in members:
            fields = {name: getattr(tasks[i], name) for name in ExecuteMergeMethodTask.model_fields}
            merges[tasks[i].output_weight.name] = MergeTensor(
                **fields, unit=unit, granularity=granularity, measure=measure, log=log
            )
    return [merges[task.output_weight.name] for task in planned]


def _blocks(planner: Any) -> Iterator[tuple[str, str]]:
    """(tensor, its transformer block) for every tensor inside a block of the output model, by its architecture."""
    taken: set[str] = set()
    for module, definition in planner.config.modules.items():
        architecture = planner._out_module_arch(module)
        first_sources = (output_slice.sources[0] for output_slice in definition.slices)
        layers = sum(source.layer_range[1] - source.layer_range[0] for source in first_sources)
        for index in range(layers):
            names = [weight.name for weight in architecture.layer_weights(index=index)]
            candidates = [
                *filter(None, [block_of(names[0]), _common_path(names)]),
                f"{module}.layers.{index}",
            ]
            block = next(
                (c for c in candidates[:-1] if c not in taken and all(name.startswith(f"{c}.") for name in names)),
                candidates[-1],
            )
            taken.add(block)
            yield from ((name, block) for name in names)


def _architecture_names(planner: Any) -> Iterator[str]:
    """Every name a tensor of the output model could have, also of optional tensors that no input has."""
    for module in planner.config.modules:
        for weight in planner._out_module_arch(module).all_weights():
            yield from (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


def _common_path(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


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


def _write_weights(tasks: Sequence[Task[Any]], log: WeightLog, out_path: str) -> WriteWeights:
    (Path(out_path) / FILE_NAME).unlink(missing_ok=True)  # of an earlier merge that this one overwrites
    finalize = next(task for task in tasks if isinstance(task, FinalizeModel))
    return WriteWeights(finalize=finalize, log=log, out_path=out_path)


@contextmanager
def _no_remains(out_path: str) -> Iterator[None]:
    """Remove the output folder of a merge that fails, if this run made it: its shards can be of no use.

    Weights that are finished (``varm_weights.json`` is written right after them) stay, whatever fails later.
    """
    folder = Path(out_path)
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there and not (folder / FILE_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _content(value: Any) -> Any:
    """A recipe's settings as plain data, without those left at their defaults.

    ``model_dump`` does not serve: mergekit's serialiser of a model path with a space in it calls itself.
    """
    if isinstance(value, ModelReference) and value.override_architecture is None:
        return str(value)
    if isinstance(value, BaseModel):
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
        return {name: _content(setting) for name, setting in value if setting != defaults[name]}
    if isinstance(value, Mapping):
        return {str(key): _content(item) for key, item in value.items()}
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def _refuse_idle_filters(config: Any, tensors: Sequence[str]) -> None:
    """A filter that matches no tensor would silently leave its value unused."""
    modules = (getattr(config, "modules", None) or {}).values()
    slices = [output_slice for module in modules for output_slice in module.slices or ()]
    problems = [
        f"`{name}` has a filter `{condition.filter}` that matches no tensor of the output model"
        for scope in (config, *modules, *slices)
        for name, setting in (scope.parameters or {}).items()
        for condition in (setting if isinstance(setting, list) else [setting])
        if isinstance(condition, ConditionalParameter)
        and condition.filter not in (None, "*")
        and not any(condition.filter in tensor for tensor in tensors)
    ]
    if problems:
        raise VarmError("; ".join(dict.fromkeys(problems)) + f". Its tensors are named like `{tensors[0]}`.")


def _expect(function: Callable[..., Any], *parameters: str) -> None:
    missing = set(parameters) - set(inspect.signature(function).parameters)
    if missing:
        raise AttributeError(f"{function.__qualname__} takes no {', '.join(sorted(missing))}")


def _expect_fields(present: Iterable[str], *names: str) -> None:
    missing = set(names) - set(present)
    if missing:
        raise AttributeError(f"no {', '.join(sorted(missing))}")


def _expect_task_fields() -> None:
    _expect_fields(
        ExecuteMergeMethodTask.model_fields,
        *("method_name", "gather_tensors", "model_order", "base_model", "output_weight", "parameters"),
    )
    _expect_fields(SaveTensor.model_fields, "tensor_name", "tensor_task", "writer_task")
    _expect_fields(FinalizeModel.model_fields, "tensor_save_tasks", "writer_task")
    _expect_fields(PermutedVocabulary.model_fields, "tokenizer_task", "gather_tensors")
