"""Checks a recipe together with its models: their headers, lineage, tokenizers, and mergekit's plan."""

import importlib.resources
from pathlib import Path
from types import SimpleNamespace

import jinja2
import mergekit.merge
from mergekit._data import chat_templates
from mergekit.common import ModelPath, ModelReference
from transformers.utils.chat_template_utils import render_jinja_template

from varm_merge.merging import adapters
from varm_merge.merging.lineage import FUSION, Place, base_models_named, foreign_targets
from varm_merge.merging.loading import patterns
from varm_merge.merging.method import SPEC
from varm_merge.recipes import by_name, headers
from varm_merge.recipes.dry_plan import dry_plan
from varm_merge.recipes.locate import near, why_misread
from varm_merge.recipes.recipe import Recipe
from varm_merge.recipes.recipe_file import model_names, tokenizers

__all__ = ["check_models"]


def check_models(recipe: Recipe) -> None:
    """Add every problem of the recipe's models. A step that needs sound results of the one before is left out."""
    _models(recipe)
    _tokenizers(recipe)
    steps = (_headers, _chat_template, _plan, _pivots, _token_ids, _cards)
    for step in steps if recipe.kind != "raw" else ():
        if not recipe.problems:
            step(recipe)


# Files


def _models(recipe: Recipe) -> None:
    """Every model is there."""
    seen: set[str] = set()
    for path, name in model_names(recipe.document):
        if path[0] in ("tokenizer", "tokenizer_source") or name in seen:
            continue
        if recipe.kind != "raw" and (reason := why_misread(name)):
            recipe.add(path, reason)
            seen.add(name)
            continue
        try:
            reference = recipe.reference(name)
        except (RuntimeError, ValueError):
            continue  # a problem of the structure
        for part in (reference.model, reference.lora):
            if part is not None and str(part) not in seen and part.path not in recipe.names:
                seen.add(str(part))
                if message := _why_missing(recipe, part, part is reference.lora):
                    recipe.add(path, message)


def _why_missing(recipe: Recipe, part: ModelPath, is_adapter: bool) -> str | None:
    folder, cache_dir = Path(part.path), recipe.options.transformers_cache
    if recipe.kind == "raw":
        return None if folder.is_file() else f"no checkpoint file `{folder}`{near(part.path)}"
    if not is_adapter:
        return recipe.hub.why_missing(part.path, part.revision, "config.json", cache_dir)
    message = recipe.hub.why_missing(part.path, part.revision, "adapter_config.json", cache_dir)
    if message or not folder.is_dir() or any((folder / name).is_file() for name in adapters.WEIGHTS):
        return message
    return f"the adapter `{folder}` has no {adapters.WEIGHTS[0]}"


def _tokenizers(recipe: Recipe) -> None:
    """Tokenizers are there, and single tokens come from models that are merged."""
    merged = {model for family in recipe.families for model in (family.base, *family.models)}
    for path, source, is_whole in tokenizers(recipe.document):
        try:
            reference = recipe.reference(source)
        except (RuntimeError, ValueError):
            continue  # a problem of the structure
        if not is_whole:
            if merged and reference not in merged:
                recipe.add(path, f"`{reference}` is not among the models, so it has no row for a token")
        elif message := _why_no_tokenizer(recipe, reference):
            recipe.add(path, message)


def _why_no_tokenizer(recipe: Recipe, reference: ModelReference) -> str | None:
    model = reference.model
    if model.path in recipe.names:
        return None
    return recipe.hub.why_no_tokenizer(model.path, model.revision, recipe.options.transformers_cache)


def _headers(recipe: Recipe) -> None:
    """Read the headers of all models, the base model's first."""
    references = [family.base for family in recipe.families] + recipe.config.referenced_models()
    for reference in dict.fromkeys(references):
        if reference.model.path in recipe.names:
            continue
        where, place = recipe.place_of(reference), recipe.place(reference)
        merged_adapter = None
        if reference.lora is not None:
            if message := adapters.why_unfit(reference, recipe.options):
                recipe.add(where, message)
                continue
            cache = recipe.options.lora_merge_cache
            if cache and (folder := adapters.merged_adapter(reference, cache)).is_dir():
                place, merged_adapter = Place(str(folder)), folder
        try:
            model = headers.read_model(place, recipe.hub)
        except ValueError as error:
            recipe.add(where, f"{error}{'; remove that folder' if merged_adapter else ''}")
            continue
        recipe.looked.models[reference] = model
        recipe.looked.lines[reference] = recipe.lines.get(where, 1)
        cache_dir = recipe.options.transformers_cache
        stale = adapters.why_stale(reference, merged_adapter, cache_dir) if merged_adapter else None
        for message in filter(None, (stale, headers.why_quantised(model), headers.why_whole(model))):
            recipe.add_if_varm(where, message)
        for message in model.remarks:
            recipe.remark(where, f"{message} (`{model.name}`)")
        base = next(iter(recipe.looked.models.values()))
        if not recipe.config.dtype and (message := headers.other_dtypes(base, model)):
            recipe.remark(where, message)


def _chat_template(recipe: Recipe) -> None:
    """The chat template is valid, and there is a tokenizer to write it into."""
    config = recipe.config
    if not config.chat_template:
        return
    has_tokenizer = bool(config.tokenizer or config.tokenizer_source)
    reference = config.base_model or config.referenced_models()[0]
    where = ("chat_template",)
    tokenizer = SimpleNamespace(chat_template="")
    try:
        if config.chat_template != "auto":
            mergekit.merge._set_chat_template(tokenizer, config)
            render_jinja_template([], chat_template=tokenizer.chat_template)  # of no conversation: only compiled
    except RuntimeError:
        files = [Path(file.name) for file in importlib.resources.files(chat_templates).iterdir()]
        known = ", ".join(sorted(file.stem for file in files if file.suffix == ".jinja"))
        message = f"`chat_template` is `{config.chat_template}`, neither Jinja nor one of auto, {known}"
        # without a tokenizer of its own the merge gets a copy of the base model's, and mergekit does not raise
        (recipe.add if has_tokenizer else recipe.add_if_varm)(where, message)
    except jinja2.TemplateSyntaxError as error:
        message = f"`chat_template` is not valid Jinja: {error.message} (line {error.lineno} of the template)"
        recipe.add_if_varm(where, message)
    else:
        if not has_tokenizer and (reason := _why_no_tokenizer(recipe, reference)):
            recipe.add_if_varm(where, f"there is no tokenizer to write the `chat_template` into: {reason}")


# The merge


def _plan(recipe: Recipe) -> None:
    """Let mergekit plan the merge, and judge its plan."""
    models = recipe.looked.models
    if recipe.names or not all(model.tensors for model in models.values()):
        return  # a model is the result of another recipe, or pickled on the Hub: its header is not known yet
    plan = dry_plan(recipe.config, recipe.options, models, by_name=recipe.by_name)
    for finding in plan.problems:
        recipe.add(recipe.place_of(finding.model), finding.message)
    for finding in plan.remarks:
        recipe.remark(recipe.place_of(finding.model), finding.message)
    for message in plan.faults:
        keys = ("slices", "modules", "tokenizer", "tokenizer_source", "merge_method")
        recipe.add_if_varm((next(key for key in keys if key in recipe.document),), message)
    if plan.lost:
        message = f"mergekit's definition of {plan.architecture} leaves out {patterns(plan.lost)} of"
        result = "the merge would load with random weights there"
        recipe.add_if_varm(("merge_method",), f"{message} `{next(iter(models))}`; {result}")
    is_mixed = any("--allow-crimes" in problem.message for problem in plan.problems)  # several architectures
    may_help = bool(plan.lost or plan.problems) and not recipe.by_name and not is_mixed
    if may_help and not any(by_name.obstacles(recipe.document)):
        other = dry_plan(recipe.config, recipe.options, models, by_name=True)
        if not (other.problems or other.faults or other.remarks):
            advice = by_name.next_step(recipe.document, models, recipe.path, recipe.out)
            recipe.add_if_varm(("merge_method",), advice)
    if not plan.problems:
        recipe.looked.estimate = headers.estimate(list(models.values()), plan.outputs)
        recipe.looked.has_base = recipe.families[0].has_base


def _pivots(recipe: Recipe) -> None:
    """Targets that name their pivot must name this one, unless the base model is one of two models to merge."""
    if recipe.spec.contract.max_inputs == 2:
        return
    for path, pivot, models, has_base in recipe.families:
        if not has_base or pivot.model.path in recipe.names:
            continue
        targets = [i for i, m in enumerate(models) if m.model.path not in recipe.names and m != pivot]
        places = [recipe.place(models[index]) for index in targets]
        try:
            for number, name in foreign_targets(recipe.place(pivot), places):
                recipe.add(
                    (*path, targets[number]),
                    f"`{places[number].path}` was fine-tuned from `{name}` (its {FUSION}), whose weights are not "
                    f"those of the base_model `{pivot.model.path}`; make that pivot the base_model, or remove "
                    f"{FUSION} from the target if you know they fit",
                )
        except (ValueError, OSError) as error:
            recipe.add(path, f"cannot check whether the targets come from `{pivot.model.path}`: {error}")


def _token_ids(recipe: Recipe) -> None:
    """Remark on models whose ids mean other tokens."""
    if recipe.document.get("tokenizer") or recipe.document.get("tokenizer_source"):
        return
    for path, base, models, _ in recipe.families:
        for index, reference in enumerate(models):
            if number := headers.other_tokens(base.model.path, reference.model.path):
                ids = "id stands" if number == 1 else "ids stand"
                recipe.remark(
                    (*path, index),
                    f"{number} {ids} for other tokens in {reference} than in {base}: the embeddings of different "
                    "tokens would be merged; set `tokenizer:` to give all models the same order of tokens",
                )


def _cards(recipe: Recipe) -> None:
    """Remark on targets without a fusion.json whose cards name another base model.

    No problem: a card may name the base of the base, or the pivot by another name; weights are not compared.
    """
    for path, pivot, models, has_base in recipe.families:
        for index, model in enumerate(models if has_base and recipe.spec is SPEC else ()):
            place = recipe.place(model)
            if model == pivot or model.model.path in recipe.names or place.file(FUSION) is not None:
                continue
            named = base_models_named(place)
            if named and _last_part(pivot.model.path) not in map(_last_part, named):
                bases = ", ".join(f"`{name}`" for name in named)
                recipe.remark(
                    (*path, index),
                    f"the card of `{model}` names {bases} as its base model, but the base_model is `{pivot}`: "
                    "varm needs the model that the target was fine-tuned from",
                )


def _last_part(name: str) -> str:
    """A model's name without its owner or folder, which differ between copies."""
    return name.rstrip("/").rpartition("/")[2].lower()
