"""The one file that touches mergekit's internals: its planning, and the entry of a run.

mergekit calls a method once per output tensor and names only that tensor, so a unit that spans tensors has to
be measured before its first tensor is merged. After mergekit has planned, every ``ExecuteMergeMethodTask`` of
``varm`` is exchanged for a ``MergeTensor`` that also depends on the statistics of its unit:

    MeasureTensor ─┐
    MeasureTensor ─┼─► MeasureUnit ─► MergeTensor ─► SaveTensor … FinalizeMerge
    MeasureTensor ─┘        gathered tensors ──┘

A ``MeasureTensor`` loads, reduces and drops its tensors itself and returns K numbers. It must not depend on
the gather tasks it shares with the merge: the executor would keep every tensor of the unit until its merge.
The measuring tasks of a unit are labelled to run just before the unit's first load, so that a layer's files
are still in the page cache when it is merged. All tasks here hash by identity: mergekit's hash whole trees,
and a unit's tree inside each of its N tensors' trees would make planning O(N²).
"""

import functools
import inspect
import logging
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
import yaml
from mergekit import card, merge_methods
from mergekit.architecture import WeightInfo, conversion
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from pydantic import BaseModel

from varm_merge import adapters, method, outcome, recipe, staging
from varm_merge.errors import VarmError
from varm_merge.experts import Layout, layout_of
from varm_merge.method import DtypeError, NonFiniteError
from varm_merge.presence import TOKENIZER_FILES
from varm_merge.report import UnitRecord, WeightLog, natural_order
from varm_merge.weights import SPANNING, Granularity, Settings, UnitStatistics, block_of, unit_of

__all__ = [
    "Plan",
    "PlannedTensor",
    "as_merged",
    "attach",
    "by_name",
    "fast_conversion",
    "new_plan",
    "planned_tensors",
    "swapped",
    "whole_numbers_kept",
]

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
        group = _group(self.merge, tokenizer, device)
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
                raise VarmError(
                    f"mergekit lost `{self.output_weight.name}` of {model}, which can happen with --multi-gpu. "
                    "Run it again, or without --multi-gpu."
                )


class FinalizeMerge(_ByIdentity, FinalizeModel, arbitrary_types_allowed=True):  # type: ignore[misc,call-arg]
    """mergekit's last task; it also leaves ``varm_weights.json``."""

    log: WeightLog

    def execute(self, writer: Any, **_kwargs: Any) -> None:
        super().execute(writer)
        self.log.write(Path(writer.out_path))


def _finalized(tasks: Sequence[Task[Any]], log: WeightLog) -> list[Task[Any]]:
    """The tasks with mergekit's last one exchanged for ``FinalizeMerge``."""
    return [
        FinalizeMerge(tensor_save_tasks=task.tensor_save_tasks, writer_task=task.writer_task, log=log)
        if isinstance(task, FinalizeModel)
        else task
        for task in tasks
    ]


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
        layout = _layout(self.out_model_config)
        tasks = [task for _, task in self._tensors]
        merges = _with_units(tasks, _planned_blocks(self), device, self._varm_log, layout)
        self._tensors = [
            (weight, merge.model_copy(update={"saved_dtype": weight.force_dtype or self.config.out_dtype}))
            for (weight, _), merge in zip(self._tensors, merges, strict=True)
        ]

    @functools.wraps(plan_to_disk)
    def _plan_to_disk(self: Any, out_path: str) -> list[Task[Any]]:
        tasks: list[Task[Any]] = plan_to_disk(self, out_path)
        is_varm = self.config.merge_method == method.METHOD_NAME
        return _finalized(tasks, self._varm_log) if is_varm else tasks

    planner_class._plan = _plan
    planner_class.plan_to_disk = _plan_to_disk


def _attach_to_run(merge: ModuleType) -> None:
    run_merge, model_out_config = merge.run_merge, merge._model_out_config
    _expect(run_merge, "merge_config", "out_path", "options", "config_source")
    _expect(model_out_config, "config", "arch_info", "trust_remote_code")
    _expect(LoadTensor._load_converted_tensor, "loader")
    _expect_fields(vars(conversion), "_iter_transform_matches", "_expanded_target_keys")

    @functools.wraps(run_merge)
    def _run_merge(
        merge_config: MergeConfiguration, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        by_name = _state.by_name
        if merge_config.merge_method != method.METHOD_NAME and not by_name:
            run_merge(merge_config, out_path, options, config_source)
            return
        text = config_source if config_source is not None else yaml.safe_dump(_content(merge_config))
        with _located(text), as_merged(options):
            _refuse_or_remark(text, options, Path(out_path))
            if (
                options.copy_tokenizer
                and not merge_config.chat_template
                and (folder := _without_tokenizer(merge_config))
            ):
                LOG.warning("`%s` has no tokenizer: none is copied beside the merge", folder)
                options = options.model_copy(update={"copy_tokenizer": False})
            with staging.staged(Path(out_path), options) as place:
                run_merge(recipe.one_spelling(merge_config), str(place), options, config_source)
                staging.copy_code(merge_config, place)

    @functools.wraps(model_out_config)
    def _out_config(config: MergeConfiguration, arch_info: Any, trust_remote_code: bool = False) -> Any:
        result = model_out_config(config, arch_info, trust_remote_code=trust_remote_code)
        if config.merge_method == method.METHOD_NAME and config.base_model:
            own = config.base_model.config(trust_remote_code=trust_remote_code)
            outcome.follow_slices(result, config, arch_info, own)
        return result

    merge.run_merge = _run_merge  # type: ignore[attr-defined]
    merge._model_out_config = _out_config  # type: ignore[attr-defined]


def _refuse_or_remark(text: str, options: MergeOptions, out: Path) -> None:
    """Check the recipe of a run; nothing that the check reads is kept during the merge."""
    looked, by_name, path = recipe.Looked(), _state.by_name, _state.path
    problems = recipe.check(
        text, every=by_name, looked=looked, options=options, by_name=by_name, path=path, out=out
    )
    recipe.refuse(problems, path)
    for remark in looked.remarks:
        LOG.warning("line %d: %s", remark.line, remark.message)


def _without_tokenizer(config: MergeConfiguration) -> Path | None:
    """The local model whose tokenizer mergekit would copy, if it has none: mergekit would log a traceback."""
    reference = config.base_model or config.referenced_models()[0]
    folder = Path(reference.model.path)
    lacks = folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES)
    return folder if lacks else None


class _State(threading.local):
    """Of the run in this thread: the recipe's file, and whether tensors are merged by their names."""

    path: Path | None = None
    by_name: bool = False


_state = _State()
LOG = logging.getLogger("varm")


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
        with ExitStack() as stack:
            text = recipe.read(path)
            arguments[argument] = stack.enter_context(_as_utf8(path, text))
            options = arguments.get("merge_options")
            raw = kind == "raw"
            out = Path(arguments["out_path"]) if raw else None
            recipe.refuse(recipe.check(text, kind=kind, models=raw, options=options, out=out), path)
            is_varm = recipe.uses_varm(text)
            if out is not None and is_varm:
                stack.enter_context(_located(text))
                arguments["out_path"] = str(stack.enter_context(staging.staged(out, options)))
            stack.enter_context(swapped(_state, "path", path))
            try:
                return callback(**arguments)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if not is_varm and not _state.by_name:
                    raise
                if getattr(options, "verbosity", 0):
                    traceback.print_exc()
                raise VarmError(f"{path} was not merged: {_told(error)}") from error

    command.callback = checked


def _told(error: Exception) -> str:
    """An error of mergekit or of what it calls, for the user."""
    if isinstance(error, OSError) and error.strerror:
        where = f"`{error.filename}`: " if error.filename else ""
        return f"{where}{error.strerror}. Once that is mended, run the same command again"
    reason = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {reason[:1000]} (-v shows where)"


@contextmanager
def _as_utf8(path: Path, text: str) -> Iterator[str]:
    """The path of a recipe in UTF-8, which is all that mergekit reads: of a copy, if need be."""
    try:
        if path.read_bytes().decode() == text:
            yield str(path)
            return
    except UnicodeDecodeError:
        pass
    with tempfile.TemporaryDirectory(prefix="varm-merge-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        yield str(copy)


@contextmanager
def _located(text: str) -> Iterator[None]:
    """Add the recipe's line to an error about its ``dtype`` or ``out_dtype``."""
    try:
        yield
    except DtypeError as error:
        where = f"{_state.path or 'the recipe'}, line {recipe.line_of(text, error.key)}"
        raise VarmError(f"{where}: {error.message}") from error


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
        tasks = [save.tensor_task for save in saves]
        layout = layout_of(
            "gpt_oss" if any(name.endswith(".experts.gate_up_proj_bias") for name in names) else None
        )
        merges = _with_units(tasks, blocks, bound.arguments["options"].device, log, layout)
        saves = [save.model_copy(update={"tensor_task": merge}) for save, merge in zip(saves, merges, strict=True)]
        finalize = FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=saves[0].writer_task)
        return _finalized([*saves, finalize], log)

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
    layout: Layout
    load: Callable[[], TensorGroup | None]


@dataclass(frozen=True)
class Plan:
    """mergekit's plan of a merge.

    Attributes:
        config: The recipe, as mergekit has rewritten it.
        out_config: The config of the output model.
        tensors: Each output tensor and the task that merges it.
        blocks: The transformer block of each tensor inside one.
        tokenizer: The ``TokenizerInfo`` of the output model; None if the recipe has no ``tokenizer``.
    """

    config: MergeConfiguration
    out_config: Any
    tensors: list[tuple[WeightInfo, ExecuteMergeMethodTask]]
    blocks: Mapping[str, str | None]
    tokenizer: Any

    @property
    def architecture(self) -> str:
        """The class of the output model."""
        return str((getattr(self.out_config, "architectures", None) or ["model"])[0])


def new_plan(config: MergeConfiguration, options: MergeOptions, *, dry: bool = False) -> Plan:
    """Let mergekit plan a merge; no weight is read.

    Args:
        config: The recipe; mergekit rewrites it.
        options: Of the run.
        dry: Whether the plan's tensors are to be loaded without data, to torch's ``meta`` device.

    Raises:
        VarmError: The units contradict each other, or mergekit is another than this file knows.
        Exception: Whatever mergekit has against the recipe.
    """
    import mergekit.merge as merge
    import mergekit.plan as plan

    if (reason := merge_methods.get(method.METHOD_NAME).refusal) is not None:
        raise VarmError(reason)
    try:
        _expect(merge._update_config_vocab, "config", "arch_info", "tokenizer", "pad_to_multiple_of")
        _expect_fields(vars(merge), "get_architecture_info")
        _expect_fields(plan.MergePlanner.__annotations__, "_tokenizer_task")
    except (AttributeError, TypeError) as error:
        raise VarmError(
            f"varm-merge works with mergekit {SUPPORTED_MERGEKIT}, and the installed one is built "
            f'differently ({error}). Install a supported version: pip install "mergekit{SUPPORTED_MERGEKIT}"'
        ) from error
    LoaderCache().setup(options=options)
    architecture = merge.get_architecture_info(config, options)
    out_config = merge._model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    if dry:  # only now: mergekit remembers the architecture that it inferred for a run with these options
        options = options.model_copy(update={"device": "meta", "read_to_gpu": True, "multi_gpu": False})
    planner = plan.MergePlanner(config, architecture, options=options, out_model_config=out_config)
    planner._plan()
    tokenizer = planner._tokenizer_task.execute() if planner._tokenizer_task else None
    if tokenizer is not None:
        multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
        merge._update_config_vocab(out_config, architecture, tokenizer.tokenizer, pad_to_multiple_of=multiple)
    tensors = list({weight.name: (weight, task) for weight, task in planner._tensors}.values())
    return Plan(planner.config, out_config, tensors, _planned_blocks(planner), tokenizer)


def planned_tensors(config: MergeConfiguration, options: MergeOptions) -> list[PlannedTensor]:
    """Every tensor that a ``varm`` recipe merges, to be loaded one by one as the merge itself would.

    Raises:
        VarmError: The units contradict each other, or mergekit is another than this file knows.
    """
    plan = new_plan(config, options)
    device = torch.device(options.device or "cpu")
    layout = _layout(plan.out_config)
    return [
        PlannedTensor(
            weight.name,
            plan.blocks.get(weight.name),
            Settings(**dict(task.parameters.items())),
            layout,
            functools.partial(_group, task, plan.tokenizer, device),
        )
        for weight, task in sorted(plan.tensors, key=lambda one: natural_order(one[0].name))
    ]


@contextmanager
def by_name() -> Iterator[None]:
    """Merge the base model's tensors by their names, whatever mergekit's definition of its architecture says."""
    import mergekit.merge as merge

    _expect_fields(vars(merge), "get_architecture_info")
    with swapped(merge, "get_architecture_info", _names_as_architecture), swapped(_state, "by_name", True):
        yield


def _names_as_architecture(config: MergeConfiguration, options: MergeOptions) -> Any:
    """An architecture without layers, of the tensors that the base model has; a target may lack some of them."""
    from mergekit.architecture import auto
    from mergekit.architecture import json_definitions as definitions
    from mergekit.architecture.base import ModelArchitecture, ModuleDefinition

    LoaderCache().setup(options=options)
    references = config.referenced_models()
    base = config.base_model or config.models[0].model
    names = {model: LoaderCache().get(model).index.tensor_paths for model in references}
    axes: Mapping[str, int] = {}
    if config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings:
        axes = auto.get_transformers_info(base, options)[2] or {}
    weights = [
        WeightInfo(
            name=name,
            optional=not all(name in own for own in names.values()),
            vocabulary_axis=axes.get(name),
        )
        for name in sorted(names[base], key=natural_order)
    ]
    definition = definitions.JsonModuleArchDef(
        model_type="",
        architectures=[],
        pre_weights=weights,
        layer_templates=definitions.JsonLayerTemplates(weights=[]),
        post_weights=[],
        override_num_layers=0,
    )
    module = ModuleDefinition(architecture=definitions.JsonModuleArchitecture(definition=definition))
    return ModelArchitecture(modules={"default": module}, architectures=[], model_type="", tagalong_files=TAGALONG)


TAGALONG = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
]
"""Files of the base model that belong to the merged one, beside its config and tokenizer."""


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside the block."""
    own = vars(owner).get(name, _NOTHING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


_NOTHING = object()


@contextmanager
def as_merged(options: MergeOptions) -> Iterator[None]:
    """Load, merge and save in the block as a run of ``varm`` does."""
    is_hf = card.is_hf

    def on_the_hub(
        path: str,
    ) -> bool:  # mergekit would ask the Hub whether it has a folder like `models/mine`, too
        return not Path(path).exists() and bool(is_hf(path))

    with (
        fast_conversion(),
        whole_numbers_kept(),
        adapters.stamped(options),
        swapped(LoaderCache, "loaders", {}),  # of an earlier run in this process, whose files may have changed
        swapped(card, "is_hf", on_the_hub),
    ):
        yield


@contextmanager
def whole_numbers_kept() -> Iterator[None]:
    """Leave buffers of whole numbers as they are: ``dtype`` and ``out_dtype`` are of weights.

    mergekit would round the counter of a batch norm to float16, and find that it differs between the models.
    """
    load, save, merge = LoadTensor.execute, SaveTensor.execute, ExecuteMergeMethodTask.execute

    def loaded(self: LoadTensor) -> torch.Tensor | None:
        raw: torch.Tensor | None = load(self.model_copy(update={"dtype": None}) if self.dtype else self)
        if raw is None or not self.dtype or not raw.is_floating_point():
            return raw
        return raw.to(dtype_from_name(self.dtype))

    def merged(
        self: ExecuteMergeMethodTask, tensors: dict[Any, torch.Tensor], **others: Any
    ) -> torch.Tensor | None:
        if self.output_weight.name.endswith(".num_batches_tracked") and self.base_model in tensors:
            return tensors[self.base_model].clone()
        result: torch.Tensor | None = merge(self, tensors, **others)
        return result

    def saved(self: SaveTensor, writer: Any, tensor: torch.Tensor | None) -> None:
        whole = tensor is not None and self.dtype and not tensor.is_floating_point()
        save(self.model_copy(update={"dtype": None}) if whole else self, writer, tensor)

    with (
        swapped(LoadTensor, "execute", loaded),
        swapped(SaveTensor, "execute", saved),
        swapped(ExecuteMergeMethodTask, "execute", merged),
    ):
        yield


@contextmanager
def fast_conversion() -> Iterator[None]:
    """Find the tensors that a converted tensor is made of once for each checkpoint.

    mergekit goes over all names of a checkpoint for every tensor that it converts (packs of experts), and again
    whenever one is loaded a second time. The conversion itself stays mergekit's.
    """

    shared: dict[
        tuple[str | None, frozenset[str]], dict[str, tuple[str, ...]]
    ] = {}  # checkpoints with the same names

    def load_converted(self: LoadTensor, loader: Any) -> torch.Tensor | None:
        if (known := vars(loader).get("_varm_conversion")) is None:
            model_type = self.model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
            names = frozenset(loader.index.tensor_paths)
            if (model_type, names) not in shared:
                shared[model_type, names] = _conversion_sources(model_type, names)
            known = loader._varm_conversion = model_type, names, shared[model_type, names]
        model_type, names, sources = known
        device = self.device or "cpu"
        for target in (self.tensor, *(self.aliases or ())):
            tensors = {
                name: functools.partial(_read, loader, name, device)
                for name in sources.get(target, {target} & names)
            }
            tensor = conversion.convert_checkpoint_tensors(model_type, tensors, target) if tensors else None
            if tensor is not None:
                converted: torch.Tensor = tensor.to(device)
                return converted
        return None

    with swapped(LoadTensor, "_load_converted_tensor", load_converted):
        yield


def _read(loader: Any, name: str, device: str) -> torch.Tensor:
    """A tensor of a checkpoint. mergekit's loader goes over all names of a shard for each tensor that it reads."""
    file = loader.index.tensor_paths[name]
    opened, shard = vars(loader).get("_varm_shard", (None, None))
    if opened != file or shard is None:
        tensor: torch.Tensor = loader.get_tensor(name, device=device)
        loader._varm_shard = file, getattr(loader, "current_shard", None)
        return tensor
    read: torch.Tensor = shard.get_tensor(name).to(device)
    return read


def _conversion_sources(model_type: str | None, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors that each name of the model's layout can be made of, but those of the same name."""
    sources = {name: {name} for name in names}
    for transform in conversion.get_checkpoint_conversion_mapping(model_type) or [] if model_type else []:
        made: dict[str, set[str]] = {}
        for match in conversion._iter_transform_matches(transform, sources):
            targets = {match.renamed_key}
            if not isinstance(transform, conversion.WeightRenaming):
                targets = conversion._expanded_target_keys(match.renamed_key, transform.target_patterns)
            for target in targets:
                made.setdefault(target, set()).update(sources[match.source_key])
        for target, own in made.items():
            sources[target] = sources.get(target, set()) | own
    return {target: tuple(own) for target, own in sources.items() if own != {target}}


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
    layout: Layout,
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


def _layout(config: Any) -> Layout:
    """How the output model's tensors pack their experts."""
    text = config.get_text_config()
    return layout_of(getattr(text, "model_type", None), getattr(text, "hidden_size", None))


def _planned_blocks(planner: Any) -> dict[str, str | None]:
    """The transformer block of every tensor: by the architecture, or by its name where that has no layers."""
    if _state.by_name:
        return {weight.name: block_of(weight.name) for weight, _ in planner._tensors}
    return dict(_blocks(planner))


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
