"""Attaches ``varm`` to mergekit's planning, runs and commands.

``attach`` is called for each module of mergekit that has just been imported. It checks what it relies on; where
mergekit is built differently, every use of ``varm`` is refused with the supported versions."""

import functools
import inspect
import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import yaml
from mergekit.architecture import conversion
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, LoadTensor, SaveTensor
from mergekit.options import MergeOptions

from varm_common.errors import UserError
from varm_merge.merging import method, staging
from varm_merge.merging import output_model as outcome
from varm_merge.merging.experts import layout_of
from varm_merge.merging.mergekit_io import SUPPORTED_MERGEKIT, as_merged, expect, expect_fields, swapped
from varm_merge.merging.method import DtypeError
from varm_merge.merging.planning import (
    architecture_names,
    planned_blocks,
    recipe_content,
    refuse_idle_filters,
    run_state,
)
from varm_merge.merging.tasks import expect_task_fields, expert_layout, tasks_with_units, with_weight_log
from varm_merge.merging.weight_log import WeightLog
from varm_merge.merging.weights import block_of
from varm_merge.recipes import recipe_file
from varm_merge.recipes.check import KINDS, check
from varm_merge.recipes.locate import TOKENIZER_FILES
from varm_merge.recipes.problems import Looked, refuse

__all__ = [
    "attach",
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
    expect(planner_class._plan, "self")
    expect(planner_class.plan_to_disk, "self", "out_path")
    expect(planner_class._out_module_arch, "self", "module")
    expect_fields(planner_class.__annotations__, "config", "options", "_tensors")
    expect_task_fields()
    plan_tensors, plan_to_disk = planner_class._plan, planner_class.plan_to_disk

    @functools.wraps(plan_tensors)
    def _plan(self: Any) -> None:
        if self.config.merge_method != method.METHOD_NAME:
            plan_tensors(self)
            return
        content = recipe_content(self.config)
        plan_tensors(self)
        names = [weight.name for weight, _ in self._tensors]
        refuse_idle_filters(self.config, [*names, *architecture_names(self)])
        pivot = self.config.base_model
        self._varm_log = WeightLog(None if pivot is None else str(pivot), content)
        device = None if self.options.multi_gpu else self.options.device
        layout = expert_layout(self.out_model_config)
        tasks = [task for _, task in self._tensors]
        merges = tasks_with_units(tasks, planned_blocks(self), device, self._varm_log, layout)
        self._tensors = [
            (weight, merge.model_copy(update={"saved_dtype": weight.force_dtype or self.config.out_dtype}))
            for (weight, _), merge in zip(self._tensors, merges, strict=True)
        ]

    @functools.wraps(plan_to_disk)
    def _plan_to_disk(self: Any, out_path: str) -> list[Task[Any]]:
        tasks: list[Task[Any]] = plan_to_disk(self, out_path)
        is_varm = self.config.merge_method == method.METHOD_NAME
        return with_weight_log(tasks, self._varm_log) if is_varm else tasks

    planner_class._plan = _plan
    planner_class.plan_to_disk = _plan_to_disk


def _attach_to_run(merge: ModuleType) -> None:
    run_merge, model_out_config = merge.run_merge, merge._model_out_config
    expect(run_merge, "merge_config", "out_path", "options", "config_source")
    expect(model_out_config, "config", "arch_info", "trust_remote_code")
    expect(LoadTensor._load_converted_tensor, "loader")
    expect_fields(vars(conversion), "_iter_transform_matches", "_expanded_target_keys")

    @functools.wraps(run_merge)
    def _run_merge(
        merge_config: MergeConfiguration, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        by_name = run_state.by_name
        if merge_config.merge_method != method.METHOD_NAME and not by_name:
            run_merge(merge_config, out_path, options, config_source)
            return
        text = config_source if config_source is not None else yaml.safe_dump(recipe_content(merge_config))
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
                run_merge(recipe_file.one_spelling(merge_config), str(place), options, config_source)
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
    looked, by_name, path = Looked(), run_state.by_name, run_state.path
    problems = check(text, every=by_name, looked=looked, options=options, by_name=by_name, path=path, out=out)
    refuse(problems, path)
    for remark in looked.remarks:
        LOG.warning("line %d: %s", remark.line, remark.message)


def _without_tokenizer(config: MergeConfiguration) -> Path | None:
    """The local model whose tokenizer mergekit would copy, if it has none: mergekit would log a traceback."""
    reference = config.base_model or config.referenced_models()[0]
    folder = Path(reference.model.path)
    lacks = folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES)
    return folder if lacks else None


LOG = logging.getLogger("varm")


def _attach_to_command(script: ModuleType) -> None:
    command = script.main
    callback: Callable[..., Any] = command.callback
    argument = next(name for name in ("config_file", "config_path") if name in {p.name for p in command.params})
    kind = KINDS[script.__name__.rpartition(".")[2]]

    @functools.wraps(callback)
    def checked(**arguments: Any) -> Any:
        path = Path(arguments[argument])
        if not path.is_file():
            return callback(**arguments)
        with ExitStack() as stack:
            text = recipe_file.read(path)
            arguments[argument] = stack.enter_context(_as_utf8(path, text))
            options = arguments.get("merge_options")
            raw = kind == "raw"
            out = Path(arguments["out_path"]) if raw else None
            refuse(check(text, kind=kind, models=raw, options=options, out=out), path)
            is_varm = recipe_file.uses_varm(text)
            if out is not None and is_varm:
                stack.enter_context(_located(text))
                arguments["out_path"] = str(stack.enter_context(staging.staged(out, options)))
            stack.enter_context(swapped(run_state, "path", path))
            try:
                return callback(**arguments)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if not is_varm and not run_state.by_name:
                    raise
                if getattr(options, "verbosity", 0):
                    traceback.print_exc()
                raise UserError(f"{path} was not merged: {_told(error)}") from error

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
        where = f"{run_state.path or 'the recipe'}, line {recipe_file.line_of(text, error.key)}"
        raise UserError(f"{where}: {error.message}") from error


def _attach_to_raw_command(script: ModuleType) -> None:
    plan_flat_merge = script.plan_flat_merge
    expect(plan_flat_merge, "config", "out_path", "tensor_union", "tensor_intersection", "options")
    expect_task_fields()

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
        refuse_idle_filters(config, names)
        log = WeightLog(config.base_model, recipe_content(config))
        blocks = {name: block_of(name) for name in names}
        tasks = [save.tensor_task for save in saves]
        layout = layout_of(
            "gpt_oss" if any(name.endswith(".experts.gate_up_proj_bias") for name in names) else None
        )
        merges = tasks_with_units(tasks, blocks, bound.arguments["options"].device, log, layout)
        saves = [save.model_copy(update={"tensor_task": merge}) for save, merge in zip(saves, merges, strict=True)]
        finalize = FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=saves[0].writer_task)
        return with_weight_log([*saves, finalize], log)

    script.plan_flat_merge = _plan_flat_merge  # type: ignore[attr-defined]
    _attach_to_command(script)


_ATTACH: dict[str, Callable[[ModuleType], None]] = {
    "plan": _attach_to_planning,
    "merge": _attach_to_run,
    "run_yaml": _attach_to_command,
    "multimerge": _attach_to_command,
    "merge_raw_pytorch": _attach_to_raw_command,
}
