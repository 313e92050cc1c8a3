"""mergekit's own plan of a merge, made and judged without reading a weight.

The plan is mergekit's: its architectures, its planner, its tasks. Only the loaders are replaced: they know the
headers of the weight files and give tensors without data (torch's ``meta`` device). So every task can gather its
inputs, convert their names and check their shapes as in the real run; the method itself is not called. What the
finished merge would lack is told by transformers, which loads the plan's outputs, again without data."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary

from varm_common.errors import UserError
from varm_merge.merging import mergekit_io, planning
from varm_merge.merging import output_model as outcome
from varm_merge.merging.loading import Unloadable, numberless, patterns
from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes.header_loader import Loaders, headers_only
from varm_merge.recipes.headers import Model, is_buffer
from varm_merge.recipes.plan_losses import DryPlan, Finding, only_some, other_layouts, untied

__all__ = [
    "dry_plan",
]


def dry_plan(
    config: MergeConfiguration,
    options: MergeOptions,
    models: Mapping[ModelReference, Model],
    *,
    by_name: bool = False,
) -> DryPlan:
    """Plan the merge and judge every planned tensor.

    Args:
        config: The recipe, with one spelling for each model.
        options: Of the run.
        models: The header of each referenced model, the base's first; an adapter's entry is that of the model it
            adapts.
        by_name: Whether the base model's tensors are merged by their names.
    """
    found = DryPlan()
    recipe, config = config, deepcopy(config)  # mergekit rewrites it as it plans
    for model in models:
        if model.lora is not None and not options.lora_merge_cache:
            message = "is an adapter: give --lora-merge-cache FOLDER, where mergekit keeps the merged model"
            found.problems.append(Finding(f"`{model}` {message}", model))
    if found.problems:
        return found
    with ExitStack() as stack:
        loaders = stack.enter_context(headers_only(models))
        if by_name:
            stack.enter_context(planning.by_name())
        if by_name or config.merge_method == METHOD_NAME:
            stack.enter_context(mergekit_io.whole_numbers_kept())
        try:
            with _quiet_logs():
                plan = planning.new_plan(config, options, dry=True)
        except Exception as error:  # of whatever kind: it would end the run
            found.mixed = "--allow-crimes" in str(error)
            found.problems.extend(_explained(error, models))
            return found
        found.architecture = plan.architecture
        outputs = _judge(plan, loaders, found)
        if by_name:
            other_layouts(loaders, options, found)
        if not found.problems:
            only_some(loaders, found)
            untied(plan, loaders, options, found)
            _outcome(recipe, plan, outputs, loaders, options, found)
    saved = dtype_from_name(config.out_dtype)
    for name, tensor in outputs.items():
        dtype = saved if saved is not None and tensor.is_floating_point() else tensor.dtype
        found.outputs[name] = tuple(tensor.shape), dtype.itemsize
    return found


def _judge(plan: planning.Plan, loaders: Loaders, found: DryPlan) -> dict[str, torch.Tensor]:
    """Gather and check every planned tensor; the outputs, without data."""
    outputs: dict[str, torch.Tensor] = {}
    lacking: dict[ModelReference, list[str]] = {}
    errors: dict[str, tuple[ModelReference | None, list[str]]] = {}

    def fails(message: str, model: ModelReference | None = None) -> None:
        errors.setdefault(numberless(message), (model, []))[1].append(message.replace("\n", " "))

    for weight, task in plan.tensors:
        source = task.gather_tensors
        tensors: dict[ModelReference, torch.Tensor] = {}
        for load in getattr(source, "gather_tensors", source).arguments().values():
            try:
                tensor = load.execute()
            except Exception as error:  # of whatever kind: it would end the run
                if "required but not present" in str(error):
                    lacking.setdefault(load.model, []).append(weight.name)
                else:
                    fails(f"`{weight.name}` of {load.model}: {_first_line(error)}", load.model)
                continue
            if tensor is None:
                loaders[load.model].lacking.append(weight.name)
            else:
                tensors[load.model] = tensor
        if any(weight.name in names[-1:] for names in lacking.values()):
            continue
        try:
            if isinstance(source, PermutedVocabulary):
                tensors = _permuted(source, plan.tokenizer, tensors)
            elif source is not getattr(source, "gather_tensors", source):
                with _quiet_logs():
                    tensors = source.execute(tensors)
            if differs := _other_shapes(weight, task, tensors):
                fails(*differs)
                continue
            output = _merged(task, tensors)
        except Exception as error:  # of whatever kind: it would end the run
            fails(_first_line(error))
            continue
        if output is not None:
            outputs[weight.name] = output
    for model, names in lacking.items():
        message = f"`{model}` has no {patterns(names)}, which mergekit needs of a {plan.architecture}"
        found.problems.append(Finding(message, model))
    for model, messages in errors.values():
        more = f" ({len(messages)} tensors like this one)" if messages[1:] else ""
        found.problems.append(Finding(messages[0] + more, model))
    for model, loader in loaders.items():
        merged = [name for name in loader.lacking if name in outputs]
        if merged:
            message = f"`{model}` has no {patterns(merged)}: merged of the other models alone"
            found.remarks.append(Finding(message, model))
    return outputs


def _merged(task: ExecuteMergeMethodTask, tensors: dict[ModelReference, torch.Tensor]) -> torch.Tensor | None:
    output: torch.Tensor | None
    try:
        output = ExecuteMergeMethodTask.execute(task, tensors)
    except NotImplementedError:
        if all(tensor.is_floating_point() for tensor in tensors.values()):
            raise
        output = next(iter(tensors.values()))  # buffers of a model on the Hub, whose values are not known
    return output


def _other_shapes(
    weight: Any, task: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, torch.Tensor]
) -> tuple[str, ModelReference] | None:
    """Which model has a tensor of another shape than the base, or than the first."""
    if not tensors:
        return None
    base = task.base_model if task.base_model in tensors else next(iter(tensors))
    for model, tensor in tensors.items():
        if tensor.shape != tensors[base].shape:
            shapes = f"{[*tensor.shape]} in {model} and {[*tensors[base].shape]} in {base}"
            message = f"`{weight.name}` has the shape {shapes}"
            if weight.vocabulary_axis is not None and tensor.shape[1:] == tensors[base].shape[1:]:
                message += ": `tokenizer: {source: base}` brings their tokens into one order"
            return message, model
    return None


def _permuted(
    source: PermutedVocabulary, tokenizer: Any, tensors: dict[ModelReference, torch.Tensor]
) -> dict[ModelReference, torch.Tensor]:
    """What ``PermutedVocabulary`` would make of the tensors; it is called for the tokens that can go wrong."""
    vocabulary = tokenizer.tokenizer.get_vocab()
    rows = {id_: {model: tokenizer.permutations[model][id_] for model in tensors} for id_ in vocabulary.values()}
    highest = {max(rows, key=lambda id_: rows[id_][model]) for model in tensors} if rows else set()
    named = dict(source.tokens.items()) if source.tokens else {}
    chosen = {
        token: id_
        for token, id_ in vocabulary.items()
        if token in named or id_ in highest or any(row < 0 for row in rows[id_].values())
    }
    order = {id_: number for number, id_ in enumerate(chosen.values())}
    reduced = SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: {token: order[id_] for token, id_ in chosen.items()}),
        permutations={
            model: {order[id_]: tokenizer.permutations[model][id_] for id_ in chosen.values()} for model in tensors
        },
        original_vocabs=tokenizer.original_vocabs,
    )
    with _quiet_logs():
        try:
            source.execute(reduced, tensors)
        except NotImplementedError as error:
            told = (
                "a token under `tokenizer: tokens` that no model has needs a `source`: a model, or `{kind: zero}`"
            )
            raise UserError(told) from error
    size, step = len(vocabulary), source.pad_to_multiple_of or 1
    size += -size % step
    made = {}
    for model, tensor in tensors.items():
        shape = list(tensor.shape)
        shape[source.vocabulary_axis] = size
        made[model] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return made


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """mergekit logs what it does not know of a model, and what it does with each token; the real run will."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _explained(error: Exception, models: Mapping[ModelReference, Model]) -> Iterator[Finding]:
    """Why mergekit makes no plan."""
    names = {
        model: [model.override_architecture]
        if model.override_architecture
        else (header.config.get("architectures") or [None])
        for model, header in models.items()
    }
    base, *others = models
    if "--allow-crimes" in str(error):
        for other in others:
            if names[other] != names[base]:
                yield Finding(
                    f"{other} is a {names[other][0]}, {base} a {names[base][0]}: mergekit merges models of one "
                    "architecture (--allow-crimes tries it all the same)",
                    other,
                )
        return
    depths = {model: header.layers for model, header in models.items()}
    if "same number of layers" in str(error) and len({*depths.values()}) > 1:
        for other in others:
            if depths[other] != depths[base]:
                message = f"{other} has {depths[other]} layers, {base} {depths[base]}: merge `slices` of them"
                yield Finding(message, other)
        return
    unclear = [model for model, architectures in names.items() if len(architectures) != 1 or not architectures[0]]
    for model in unclear:
        told = f"{len(names[model])} `architectures`" if names[model][0] else "no `architectures`"
        yield Finding(f"the config of `{model}` names {told}, and mergekit needs one: name the class there", model)
    if not unclear:
        message = _first_line(error)
        if not isinstance(error, UserError):
            message = f"mergekit cannot plan this merge: {message}"
        yield Finding(message, next((model for model in models if str(model) in message), None))


def _outcome(
    recipe: MergeConfiguration,
    plan: planning.Plan,
    outputs: Mapping[str, torch.Tensor],
    loaders: Loaders,
    options: MergeOptions,
    found: DryPlan,
) -> None:
    """Whether the finished merge would load, with all that the base model has."""
    base, loader = next(iter(loaders.items()))
    try:
        out_config = outcome.saved(plan.out_config)
    except ValueError as error:
        found.problems.append(Finding(f"the config of the merge cannot be saved: {error}"))
        return
    except Unloadable as error:
        found.faults.append(f"the config of the merge could not be read again: {error}")
        return
    names = loader.model.tensors
    unread = [name for name in names if name not in loader.used and not is_buffer(name)]
    sliced = bool(outcome.layers_taken(recipe))
    as_base = plan.tokenizer is None and not sliced
    same_shapes = all(tuple(tensor.shape) == names[name][0] for name, tensor in outputs.items() if name in names)
    if as_base and same_shapes and (names.keys() <= outputs.keys() or not unread):
        return  # whatever the base model has is in an output, perhaps packed: its class need not be imported
    own = {name: loader.get_tensor(name) for name in names}
    own_config = base.config(trust_remote_code=options.trust_remote_code)
    code = base.model if options.trust_remote_code else None
    verdict = outcome.judge(out_config, outputs, own_config, own, None if sliced else unread, code)
    found.lost, found.faults = verdict.lost, verdict.faults


def _first_line(error: Exception) -> str:
    """An error's message on one line, without the configs that it quotes."""
    text = " ".join(re.sub(r"\{.*\}", "", str(error), flags=re.DOTALL).split())[:500] or type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AssertionError | TypeError) else text
