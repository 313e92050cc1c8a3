"""mergekit's own plan of a merge, made and judged without reading a weight.

Architectures, planner and tasks are mergekit's. Only the loaders are replaced: they know the headers of the weight
files and give tensors without data (torch's ``meta`` device). So every task gathers its inputs, converts their
names and checks their shapes as in the real run; the merge method itself is not called. Finally transformers loads
the planned tensors, again without data, and reports what the finished merge would lack.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary

from varm_common.console import no_logs
from varm_common.errors import UserError
from varm_merge.merging import mergekit_io, output_model, planning
from varm_merge.merging.loading import Unloadable, numberless, patterns
from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes.header_loader import Loaders, headers_only
from varm_merge.recipes.headers import Model
from varm_merge.recipes.plan_losses import Finding, only_some, other_layouts, untied

__all__ = ["DryPlan", "dry_plan"]

Tensors = dict[ModelReference, torch.Tensor]


@dataclass
class DryPlan:
    """The plan of a merge, made without weights.

    Attributes:
        problems: Why it would fail.
        remarks: What the user should know.
        lost: Tensors that the base model has and loads, and that the merge would lack.
        faults: Why the finished merge would not load as it is.
        architecture: The class of the output model.
        outputs: Shape and bytes of an element of every tensor that it would write.
    """

    problems: list[Finding] = field(default_factory=list)
    remarks: list[Finding] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    architecture: str = ""
    outputs: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)


def dry_plan(
    recipe: MergeConfiguration,
    options: MergeOptions,
    models: Mapping[ModelReference, Model],
    *,
    by_name: bool = False,
) -> DryPlan:
    """Plan the merge and judge every planned tensor.

    Args:
        recipe: With one spelling for each model.
        options: Of the run.
        models: The header of each referenced model, the base model's first; for an adapter, the header of the
            model that it adapts.
        by_name: Whether the base model's tensors are merged by their names.
    """
    result = DryPlan()
    if not options.lora_merge_cache:
        advice = "is an adapter: give --lora-merge-cache FOLDER, where mergekit keeps the merged model"
        result.problems = [Finding(f"`{model}` {advice}", model) for model in models if model.lora is not None]
        if result.problems:
            return result
    with ExitStack() as stack:
        loaders = stack.enter_context(headers_only(models))
        stack.enter_context(no_logs())  # the real run will log it
        if by_name:
            stack.enter_context(planning.by_name())
        if by_name or recipe.merge_method == METHOD_NAME:
            stack.enter_context(mergekit_io.whole_numbers_kept())
        try:
            plan = planning.new_plan(deepcopy(recipe), options, dry=True)  # mergekit changes the recipe
        except Exception as error:  # whatever mergekit raises would end the run
            result.problems = _explained(error, models)
            return result
        result.architecture = plan.architecture
        outputs = _outputs(plan, loaders, result)
        if by_name:
            layouts = list(other_layouts(loaders, options))
            refused = {finding.model for finding in layouts}
            result.problems += layouts
            result.remarks = [remark for remark in result.remarks if remark.model not in refused]
        if not result.problems:
            result.remarks += [*only_some(loaders), *untied(plan.out_config, loaders, options)]
            _judge_output(recipe, plan, outputs, loaders, options, result)
    out_dtype = dtype_from_name(recipe.out_dtype)
    for name, tensor in outputs.items():
        dtype = out_dtype if out_dtype is not None and tensor.is_floating_point() else tensor.dtype
        result.outputs[name] = tuple(tensor.shape), dtype.itemsize
    return result


# Each planned tensor


def _outputs(plan: planning.Plan, loaders: Loaders, result: DryPlan) -> dict[str, torch.Tensor]:
    """Every tensor of the merge, without data. Tensors that cannot be merged are added as problems."""
    outputs: dict[str, torch.Tensor] = {}
    lacking: dict[ModelReference, list[str]] = defaultdict(list)
    errors: dict[str, list[Finding]] = defaultdict(list)  # that differ in the number of a layer only
    for weight, task in plan.tensors:
        tensors: Tensors = {}
        failed = False
        for load in getattr(task.gather_tensors, "gather_tensors", task.gather_tensors).arguments().values():
            try:
                tensor = load.execute()
            except Exception as error:  # whatever it is, it would end the run
                failed = True
                if "required but not present" in str(error):
                    lacking[load.model].append(weight.name)
                else:
                    message = f"`{weight.name}` of {load.model}: {_one_line(error)}"
                    errors[numberless(message)].append(Finding(message, load.model))
                continue
            if tensor is None:
                loaders[load.model].lacking.append(weight.name)
            else:
                tensors[load.model] = tensor
        if failed:
            continue
        try:
            tensors = _with_one_vocabulary(task.gather_tensors, plan.tokenizer, tensors)
            error_of_shape = _other_shape(weight, task.base_model, tensors)
            output = None if error_of_shape else _merged(task, tensors)
        except Exception as error:  # the same
            error_of_shape, output = Finding(_one_line(error)), None
        if error_of_shape:
            errors[numberless(error_of_shape.message)].append(error_of_shape)
        if output is not None:
            outputs[weight.name] = output
    for model, names in lacking.items():
        message = f"`{model}` has no {patterns(names)}, which mergekit requires for {plan.architecture}"
        result.problems.append(Finding(message, model))
    for first, *others in errors.values():
        more = f" ({len(others) + 1} tensors like this one)" if others else ""
        result.problems.append(Finding(first.message + more, first.model))
    for model, loader in loaders.items():
        if merged := [name for name in loader.lacking if name in outputs]:
            message = f"`{model}` has no {patterns(merged)}: merged from the other models only"
            result.remarks.append(Finding(message, model))
    return outputs


def _merged(task: ExecuteMergeMethodTask, tensors: Tensors) -> torch.Tensor | None:
    try:
        return ExecuteMergeMethodTask.execute(task, tensors)  # type: ignore[no-any-return]
    except NotImplementedError:
        if all(tensor.is_floating_point() for tensor in tensors.values()):
            raise
        return next(iter(tensors.values()))  # a buffer of a model on the Hub, whose values are not known


def _other_shape(weight: Any, base_model: ModelReference | None, tensors: Tensors) -> Finding | None:
    """The first model whose tensor has another shape than the base model's, or than the first model's."""
    base = base_model if base_model in tensors else next(iter(tensors), None)
    for model, tensor in tensors.items():
        if tensor.shape != tensors[base].shape:
            shapes = f"{[*tensor.shape]} in {model} and {[*tensors[base].shape]} in {base}"
            message = f"`{weight.name}` has the shape {shapes}"
            if weight.vocabulary_axis is not None and tensor.shape[1:] == tensors[base].shape[1:]:
                message += ": `tokenizer: {source: base}` brings their tokens into one order"
            return Finding(message, model)
    return None


class _SomeTokens(dict[str, int]):
    """A part of a vocabulary that reports the size of the whole."""

    size = 0

    def __len__(self) -> int:
        return self.size


def _with_one_vocabulary(task: Any, info: Any, tensors: Tensors) -> Any:
    """The tensors after mergekit's ``task`` has brought their rows into one order, if it is a task that does so.

    mergekit copies row by row, which takes seconds for a large vocabulary. It gets only the tokens that can go
    wrong: those under ``tokenizer: tokens``, those that a model lacks, and the last row of each model.
    """
    if not isinstance(task, PermutedVocabulary):
        return task.execute(tensors) if hasattr(task, "gather_tensors") else tensors
    vocabulary, rows = info.tokenizer.get_vocab(), [info.permutations[model] for model in tensors]
    for model, row in zip(tensors, rows, strict=True):
        if beyond := {id_: token for token, id_ in vocabulary.items() if id_ not in row}:
            where = f"the tokenizer of `{model}` has the token `{beyond[min(beyond)]}` beyond its embeddings"
            raise UserError(f"{where}: remove the token, or give the model more rows (resize_token_embeddings)")
    last = {max(vocabulary.values(), key=row.__getitem__) for row in rows if vocabulary}
    chosen = _SomeTokens(
        (token, id_)
        for token, id_ in vocabulary.items()
        if token in dict(task.tokens or {}) or id_ in last or any(row[id_] < 0 for row in rows)
    )
    chosen.size = len(vocabulary)
    tokenizer = SimpleNamespace(get_vocab=lambda: chosen)
    part = SimpleNamespace(
        tokenizer=tokenizer, permutations=info.permutations, original_vocabs=info.original_vocabs
    )
    try:
        return task.execute(part, tensors)
    except NotImplementedError as error:
        needed = "needs a `source`: a model, or `{kind: zero}`"
        raise UserError(f"a token under `tokenizer: tokens` that no model has {needed}") from error


# The whole merge


def _judge_output(
    recipe: MergeConfiguration,
    plan: planning.Plan,
    outputs: Mapping[str, torch.Tensor],
    loaders: Loaders,
    options: MergeOptions,
    result: DryPlan,
) -> None:
    """Whether the finished merge would load, with all that the base model has."""
    base, loader = next(iter(loaders.items()))
    try:
        out_config = output_model.saved(plan.out_config)
    except ValueError as error:
        result.problems.append(Finding(f"the config of the merge cannot be saved: {error}"))
        return
    except Unloadable as error:
        result.faults.append(f"the config of the merge could not be read again: {error}")
        return
    names, unread = loader.model.tensors, loader.unused()
    is_sliced = bool(output_model.layers_taken(recipe))
    same_shapes = all(tuple(tensor.shape) == names[name][0] for name, tensor in outputs.items() if name in names)
    complete = not unread or names.keys() <= outputs.keys()
    if plan.tokenizer is None and not is_sliced and same_shapes and complete:
        return  # everything that the base model has is in an output: its class need not be imported
    own = {name: loader.get_tensor(name) for name in names}
    own_config = base.config(trust_remote_code=options.trust_remote_code)
    code = base.model if options.trust_remote_code else None
    unread_names = None if is_sliced else unread
    result.lost, result.faults = output_model.judge(out_config, outputs, own_config, own, unread_names, code)


def _explained(error: Exception, models: Mapping[ModelReference, Model]) -> list[Finding]:
    """Why mergekit makes no plan."""
    message, findings = _one_line(error), []
    base, base_header = next(iter(models.items()))
    for model, header in models.items():
        names, base_names = _classes(model, header), _classes(base, base_header)
        if "--allow-crimes" in message and names != base_names:
            advice = "mergekit merges models of one architecture (--allow-crimes tries it anyway)"
            findings.append(Finding(f"{model} is a {names[0]}, {base} a {base_names[0]}: {advice}", model))
        elif "same number of layers" in message and header.layers != base_header.layers:
            depths = f"{model} has {header.layers} layers, {base} {base_header.layers}"
            findings.append(Finding(f"{depths}: merge them by `slices`", model))
        elif len(names) != 1 or not names[0]:
            count = len(names) if names[0] else "no"
            advice = "and mergekit needs one: name the class there"
            findings.append(Finding(f"the config of `{model}` names {count} `architectures`, {advice}", model))
    if not isinstance(error, UserError):
        message = f"mergekit cannot plan this merge: {message}"
    return findings or [Finding(message, next((model for model in models if str(model) in message), None))]


def _classes(model: ModelReference, header: Model) -> list[str | None]:
    if model.override_architecture:
        return [model.override_architecture]
    return header.config.get("architectures") or [None]


def _one_line(error: Exception) -> str:
    """An error's message on one line, without the configs that it quotes."""
    text = " ".join(re.sub(r"\{.*\}", "", str(error), flags=re.DOTALL).split())[:500] or type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AssertionError | TypeError) else text
