"""mergekit's plan of a merge: output tensors, their tasks, their transformer blocks."""

import os.path
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ModelPath, ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from pydantic import BaseModel

from varm_common.errors import UserError
from varm_merge.merging.experts import Layout, layout_of_model
from varm_merge.merging.mergekit_io import swapped
from varm_merge.merging.method import METHOD_NAME, SPEC
from varm_merge.merging.output_model import HEADS
from varm_merge.merging.tasks import settings_of, tensor_group
from varm_merge.merging.weight_log import WeightLog, natural_order
from varm_merge.merging.weights import Settings, block_of

__all__ = [
    "Plan",
    "PlannedTensor",
    "architecture_names",
    "by_name",
    "configs_of_heads",
    "input_names",
    "new_plan",
    "planned_blocks",
    "planned_tensors",
    "recipe_content",
    "refuse_idle_filters",
    "run_state",
]


class _RunState(threading.local):
    """The run in this thread: the recipe's file, whether tensors are merged by their names, and the weight log."""

    path: Path | None = None
    by_name: bool = False
    log: WeightLog | None = None


run_state = _RunState()


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
        dry: Whether the plan's tensors will be loaded without data, to torch's ``meta`` device.

    Raises:
        UserError: The units contradict each other, or this version of mergekit is not supported.
        Exception: Any reason for which mergekit cannot plan the recipe.
    """
    import mergekit.merge as merge
    import mergekit.plan as plan

    if (reason := merge_methods.get(METHOD_NAME).refusal) is not None:
        raise UserError(reason)
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
    return Plan(planner.config, out_config, tensors, planned_blocks(planner), tokenizer)


def planned_tensors(config: MergeConfiguration, options: MergeOptions) -> list[PlannedTensor]:
    """Every tensor that a ``varm`` recipe merges, to be loaded one by one as the merge itself would.

    Raises:
        UserError: The units contradict each other, or this version of mergekit is not supported.
    """
    plan = new_plan(config, options)
    load = partial(tensor_group, tokenizer=plan.tokenizer, device=torch.device(options.device or "cpu"))
    layout = layout_of_model(plan.out_config)
    return [
        PlannedTensor(weight.name, plan.blocks.get(weight.name), settings_of(task), layout, partial(load, task))
        for weight, task in sorted(plan.tensors, key=lambda planned: natural_order(planned[0].name))
    ]


# Merging by names


@contextmanager
def by_name() -> Iterator[None]:
    """Merge the base model's tensors by their names, not by mergekit's definition of its architecture."""
    import mergekit.merge as merge

    with swapped(merge, "get_architecture_info", _names_as_architecture), swapped(run_state, "by_name", True):
        yield


def _names_as_architecture(config: MergeConfiguration, options: MergeOptions) -> Any:
    """An architecture without layers, of the tensors that the base model has; a target may lack some of them."""
    from mergekit.architecture import auto
    from mergekit.architecture import json_definitions as definitions
    from mergekit.architecture.base import ModelArchitecture, ModuleDefinition

    LoaderCache().setup(options=options)
    names = {model: LoaderCache().get(model).index.tensor_paths for model in config.referenced_models()}
    base = config.base_model or config.models[0].model
    axes: Mapping[str, int] = {}
    if config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings:
        axes = auto.get_transformers_info(base, options)[2] or {}
    shared = set.intersection(*map(set, names.values()))
    weights = [
        WeightInfo(name=name, optional=name not in shared, vocabulary_axis=axes.get(name))
        for name in sorted(names[base], key=natural_order)
    ]
    anonymous, no_layers = {"architectures": [], "model_type": ""}, definitions.JsonLayerTemplates(weights=[])
    definition = definitions.JsonModuleArchDef(
        **anonymous, pre_weights=weights, layer_templates=no_layers, post_weights=[], override_num_layers=0
    )
    module = ModuleDefinition(architecture=definitions.JsonModuleArchitecture(definition=definition))
    return ModelArchitecture(modules={"default": module}, **anonymous)


# Blocks and names


def planned_blocks(planner: Any) -> dict[str, str | None]:
    """The transformer block of every tensor: by the architecture, or by its name where that has no layers."""
    if run_state.by_name:
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
            shared = os.path.commonprefix([name.split(".")[:-1] for name in names])  # noqa: RUF071  of lists
            block = f"{module}.layers.{index}"
            for path in (block_of(names[0]), ".".join(shared)):
                if path and path not in taken and all(name.startswith(f"{path}.") for name in names):
                    block = path
                    break
            taken.add(block)
            yield from ((name, block) for name in names)


def architecture_names(planner: Any) -> Iterator[str]:
    """Every name a tensor of the output model could have, also of optional tensors that no input has."""
    for module in planner.config.modules:
        for weight in planner._out_module_arch(module).all_weights():
            yield from (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


def configs_of_heads(planner: Any) -> Iterator[Any]:
    """The configs of the models of whose heads the merge's is made; of an adapter, that of its merged model."""
    for weight, task in planner._tensors:
        for model in task.model_order if weight.name.endswith(HEADS) else ():
            folder = LoaderCache().get(model).index.base_path
            loaded = ModelReference(model=ModelPath(path=folder)) if folder else model  # no folder: headers only
            yield loaded.config(trust_remote_code=planner.options.trust_remote_code)


# The recipe


def recipe_content(value: Any) -> Any:
    """A recipe's settings as plain data, without those left at their defaults.

    Not by ``model_dump``: mergekit's serialiser of a model path with a space in it calls itself.
    """
    if isinstance(value, ModelReference) and value.override_architecture is None:
        return str(value)
    if isinstance(value, BaseModel):
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
        return {name: recipe_content(setting) for name, setting in value if setting != defaults[name]}
    if isinstance(value, Mapping):
        return {str(key): recipe_content(item) for key, item in value.items()}
    return [recipe_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def input_names(planner: Any) -> set[str]:
    """The names that the output tensors have in the models; with slices these are not those of the output."""
    sources = (task.gather_tensors for _, task in planner._tensors)
    gathered = (getattr(source, "gather_tensors", source) for source in sources)
    return {weight.name for gather in gathered for weight in dict(gather.weight_info.items()).values()}


def refuse_idle_filters(config: Any, tensors: Sequence[str], inputs: Iterable[str] = ()) -> None:
    """Refuse a filter that matches no tensor: its value would silently not be used.

    Args:
        config: The recipe, as mergekit has rewritten it.
        tensors: Names of the output tensors.
        inputs: Their names in the models, which mergekit compares with the filters of a target's parameters.
    """
    of_target = {parameter.name for parameter in SPEC.input_parameters}
    names = {True: {*tensors, *inputs}, False: {*tensors}}
    modules = (getattr(config, "modules", None) or {}).values()
    slices = [output_slice for module in modules for output_slice in module.slices or ()]
    sources = [source for output_slice in slices for source in output_slice.sources]
    problems = [
        f"`{name}` has a filter `{condition.filter}` that matches no tensor of the output model"
        for scope in (config, *modules, *slices, *sources, *(getattr(config, "models", None) or ()))
        for name, setting in (scope.parameters or {}).items()
        for condition in (setting if isinstance(setting, list) else [setting])
        if isinstance(condition, ConditionalParameter)
        and condition.filter not in (None, "*")
        and not any(condition.filter in tensor for tensor in names[name in of_target])
    ]
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)) + f". Its tensors are named like `{tensors[0]}`.")
