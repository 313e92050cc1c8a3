"""Attaches ``varm`` to mergekit's planning, runs and commands.

``attach`` is called for each module of mergekit that has just been imported. It makes the lasting replacements in
mergekit; ``mergekit_io`` makes those that last as long as a run.
"""

import functools
import logging
import operator
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, SaveTensor
from mergekit.options import MergeOptions

from varm_common.errors import UserError
from varm_merge.merging import method, output_model, planning, staging
from varm_merge.merging.experts import layout_of_model, layout_of_names
from varm_merge.merging.mergekit_io import as_merged, swapped
from varm_merge.merging.method import METHOD_NAME, DtypeError
from varm_merge.merging.planning import recipe_content, refuse_idle_filters, run_state
from varm_merge.merging.tasks import tasks_with_units
from varm_merge.merging.weight_log import WeightLog
from varm_merge.merging.weights import block_of
from varm_merge.recipes import recipe_file
from varm_merge.recipes.check import KINDS, check
from varm_merge.recipes.locate import TOKENIZER_FILES
from varm_merge.recipes.problems import Looked, refuse

__all__ = ["attach"]

LOG = logging.getLogger("varm")
SUPPORTED_MERGEKIT = ">=0.1.5,<0.2"
RELIED_ON = {
    "mergekit.plan": ("MergePlanner._out_module_arch", "MergePlanner._tokenizer_task"),
    "mergekit.merge": ("get_architecture_info", "_update_config_vocab", "_copy_tagalong_files"),
}
"""Internals of each module that are used later; those that are replaced at once need not be listed."""


def attach(module: ModuleType) -> None:
    """Attach to a module of mergekit that has just been imported; a second time does nothing.

    Where mergekit is not built as expected, every use of ``varm`` is refused with the versions that work.
    """
    if getattr(module, "_varm_merge_attached", False):
        return
    try:
        for name in RELIED_ON.get(module.__name__, ()):
            operator.attrgetter(name)(module)
        _ATTACH[module.__name__](module)
    except (AttributeError, TypeError) as error:
        method.refuse(
            f"this varm-merge works with mergekit {SUPPORTED_MERGEKIT}, and {module.__name__} of the installed "
            f"mergekit {version('mergekit')} is built differently ({error}). Install a supported version: "
            f'pip install "mergekit{SUPPORTED_MERGEKIT}"'
        )
    module._varm_merge_attached = True  # type: ignore[attr-defined]


# Planning


def _attach_to_planning(plan: ModuleType) -> None:
    planner_class = plan.MergePlanner
    plan_tensors = planner_class._plan

    @functools.wraps(plan_tensors)
    def _plan(self: Any) -> None:
        if self.config.merge_method != METHOD_NAME:
            plan_tensors(self)
            return
        content = recipe_content(self.config)  # before mergekit rewrites it
        plan_tensors(self)
        known = [*(weight.name for weight, _ in self._tensors), *planning.architecture_names(self)]
        refuse_idle_filters(self.config, known, planning.input_names(self))
        output_model.untie(self.out_model_config, planning.configs_of_heads(self))
        run_state.log = WeightLog(self.config.base_model and str(self.config.base_model), content)
        tasks, blocks = [task for _, task in self._tensors], planning.planned_blocks(self)
        layout, out_dtype = layout_of_model(self.out_model_config), self.config.out_dtype
        merges = tasks_with_units(tasks, blocks, self.options, run_state.log, layout, out_dtype)
        self._tensors = [(weight, merge) for (weight, _), merge in zip(self._tensors, merges, strict=True)]

    planner_class._plan = _plan


def _attach_to_raw_command(script: ModuleType) -> None:
    plan_flat_merge = script.plan_flat_merge

    @functools.wraps(plan_flat_merge)
    def _plan_flat_merge(
        config: Any, out_path: str, tensor_union: bool, tensor_intersection: bool, options: MergeOptions
    ) -> list[Task[Any]]:
        tasks = plan_flat_merge(config, out_path, tensor_union, tensor_intersection, options)
        saves = sorted((task for task in tasks if isinstance(task, SaveTensor)), key=lambda save: save.tensor_name)
        if config.merge_method != METHOD_NAME or not saves:
            return list(tasks)
        names = [save.tensor_name for save in saves]
        refuse_idle_filters(config, names)
        run_state.log = WeightLog(config.base_model, recipe_content(config))
        blocks, layout = {name: block_of(name) for name in names}, layout_of_names(names)
        options = options.model_copy(update={"multi_gpu": False})  # of no effect in this command
        merges = tasks_with_units([save.tensor_task for save in saves], blocks, options, run_state.log, layout)
        saves = [save.model_copy(update={"tensor_task": merge}) for save, merge in zip(saves, merges, strict=True)]
        return [*saves, FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=saves[0].writer_task)]

    script.plan_flat_merge = _plan_flat_merge  # type: ignore[attr-defined]
    _attach_to_command(script)


# Runs


def _attach_to_run(merge: ModuleType) -> None:
    run_merge, model_out_config = merge.run_merge, merge._model_out_config

    @functools.wraps(run_merge)
    def _run_merge(
        merge_config: MergeConfiguration, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        if merge_config.merge_method != METHOD_NAME and not run_state.by_name:
            run_merge(merge_config, out_path, options, config_source)
            return
        text = config_source if config_source is not None else yaml.safe_dump(recipe_content(merge_config))
        with _located(text), as_merged(options):
            _refuse_or_remark(text, options, Path(out_path))
            if options.copy_tokenizer and not merge_config.chat_template and _lacks_tokenizer(merge_config):
                options = options.model_copy(update={"copy_tokenizer": False})
            with _staged(Path(out_path), options) as place:
                run_merge(recipe_file.one_spelling(merge_config), str(place), options, config_source)
                overruled = {staging.TEMPLATE} if merge_config.chat_template else set()
                merge._copy_tagalong_files(merge_config, str(place), {*staging.COPIED} - overruled, options)
                staging.copy_code(merge_config, place)

    @functools.wraps(model_out_config)
    def _out_config(config: MergeConfiguration, arch_info: Any, trust_remote_code: bool = False) -> Any:
        result = model_out_config(config, arch_info, trust_remote_code=trust_remote_code)
        if config.merge_method == METHOD_NAME and config.base_model:
            own = config.base_model.config(trust_remote_code=trust_remote_code)
            output_model.follow_slices(result, config, arch_info, own)
        return result

    merge.run_merge = _run_merge  # type: ignore[attr-defined]
    merge._model_out_config = _out_config  # type: ignore[attr-defined]


def _refuse_or_remark(text: str, options: MergeOptions, out: Path) -> None:
    """Check the recipe of a run; nothing that the check reads is kept during the merge."""
    looked, by_name, path = Looked(), run_state.by_name, run_state.path
    refuse(check(text, every=by_name, looked=looked, options=options, by_name=by_name, path=path, out=out), path)
    for remark in looked.remarks:
        LOG.warning("line %d: %s", remark.line, remark.message)


def _lacks_tokenizer(config: MergeConfiguration) -> bool:
    """Whether the model whose tokenizer mergekit would copy has none; mergekit would log a traceback."""
    reference = config.base_model or config.referenced_models()[0]
    folder = Path(reference.model.path)
    if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    LOG.warning("`%s` has no tokenizer: none is copied beside the merge", folder)
    return True


@contextmanager
def _staged(out: Path, options: MergeOptions) -> Iterator[Path]:
    """The folder to write a merge to; it gets the weight log, and its files are moved to ``out`` at the end."""
    with staging.staged(out, options) as place, swapped(run_state, "log", None):
        yield place
        if run_state.log is not None:
            run_state.log.write(place)


@contextmanager
def _located(text: str) -> Iterator[None]:
    """Add the recipe's line to an error about its ``dtype`` or ``out_dtype``."""
    try:
        yield
    except DtypeError as error:
        where = f"{run_state.path or 'the recipe'}, line {recipe_file.line_of(text, error.key)}"
        raise UserError(f"{where}: {error.message}") from error


# Commands


def _attach_to_command(script: ModuleType) -> None:
    command = script.main
    callback: Callable[..., Any] = command.callback
    argument = next(name for name in ("config_file", "config_path") if name in {p.name for p in command.params})
    kind = KINDS[script.__name__.rpartition(".")[2]]

    @functools.wraps(callback)
    def checked(**arguments: Any) -> Any:
        path = Path(arguments[argument])
        if path.is_dir() or not path.exists():
            raise UserError(f"there is no recipe `{path}`")
        if not path.is_file():
            return callback(**arguments)
        text = recipe_file.read(path)
        options = MergeOptions(**{name: arguments[name] for name in MergeOptions.model_fields.keys() & arguments})
        raw, is_varm = kind == "raw", recipe_file.uses_varm(text)
        out = Path(arguments["out_path"]) if raw else None
        refuse(check(text, kind=kind, models=raw, options=options, out=out), path)
        if is_varm and options.multi_gpu and not raw and torch.accelerator.current_accelerator() is None:
            raise UserError("--multi-gpu needs a GPU, and torch finds none: leave the flag out")
        with ExitStack() as stack:
            arguments[argument] = stack.enter_context(_as_utf8(path, text))
            stack.enter_context(swapped(run_state, "path", path))
            if out is not None and is_varm:
                stack.enter_context(_located(text))
                arguments["out_path"] = str(stack.enter_context(_staged(out, options)))
            try:
                return callback(**arguments)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if not is_varm and not run_state.by_name:
                    raise
                if options.verbosity:
                    traceback.print_exc()
                raise UserError(f"{path} was not merged: {_explained(error)}") from error

    command.callback = checked


def _explained(error: Exception) -> str:
    """An error of mergekit or of a library that it calls, for the user."""
    if isinstance(error, OSError) and error.strerror:
        where = f"`{error.filename}`: " if error.filename else ""
        return f"{where}{error.strerror}. Fix this and run the same command again"
    if "Circular reference" in str(error):  # mergekit's serialiser of a model path calls itself
        return "mergekit-multi does not take a path with a space or a quote in it: rename that folder"
    reason = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {reason[:1000]} (-v shows where)"


@contextmanager
def _as_utf8(path: Path, text: str) -> Iterator[str]:
    """The path of a recipe in UTF-8, which is all that mergekit reads; if need be, of a copy."""
    with tempfile.TemporaryDirectory(prefix="varm-merge-") as folder:
        if path.read_bytes() != text.encode():
            path = Path(folder) / path.name
            path.write_text(text, encoding="utf-8")
        yield str(path)


_ATTACH: dict[str, Callable[[ModuleType], None]] = {
    "mergekit.plan": _attach_to_planning,
    "mergekit.merge": _attach_to_run,
    "mergekit.scripts.run_yaml": _attach_to_command,
    "mergekit.scripts.multimerge": _attach_to_command,
    "mergekit.scripts.merge_raw_pytorch": _attach_to_raw_command,
}
