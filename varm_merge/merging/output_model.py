"""The config of a finished merge, and whether transformers would load the merge with it.

mergekit sets the depth of the output config only where its definition of the architecture names the key, and never
the lists with one entry per layer (``layer_types``). For ``varm`` both follow the layers that the slices take.
The result is tried without data: the config is saved and read, and transformers loads the outputs.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.config import MergeConfiguration

from varm_merge.merging.loading import Loaded, Unloadable, loaded, numberless, patterns
from varm_merge.recipes.headers import is_buffer

__all__ = ["HEADS", "follow_slices", "is_tied", "judge", "layers_taken", "saved", "untie"]

NOT_BY_LAYER = ("architectures", "token_id", "token_ids")
"""Ends of the names of a config's lists that do not have one entry per layer."""
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Ends of the names of heads."""


# The config


def layers_taken(config: MergeConfiguration) -> dict[str | None, list[int]]:
    """The base model's layers in the order of the merge, by module; None stands for the only module."""
    slices: dict[str | None, Any] = {name: module.slices for name, module in (config.modules or {}).items()}
    if config.slices:
        slices[None] = config.slices
    taken: dict[str | None, list[int]] = {}
    for module, own in slices.items():
        for output_slice in own or ():
            base = output_slice.base_model or config.base_model
            sources = output_slice.sources
            source = next((source for source in sources if source.model == base), sources[0])
            taken.setdefault(module, []).extend(range(*source.layer_range))
    return taken


def follow_slices(out_config: Any, config: MergeConfiguration, architecture: Any, own_config: Any) -> None:
    """Give the output config the depth of the slices, and the entries of their layers in its lists by layer.

    Args:
        out_config: Changed in place.
        config: The recipe.
        architecture: mergekit's ``ModelArchitecture``.
        own_config: The base model's.
    """
    for module, layers in layers_taken(config).items():
        name = next(iter(architecture.modules)) if module is None else module
        key = architecture.modules[name].architecture.num_layers_config_key()
        if key is None and len(architecture.modules) > 1:
            continue  # it is not known which config is this module's
        part, own = out_config, own_config
        *path, key = key.split(".") if key else ("num_hidden_layers",)
        if not path and not hasattr(own, key):
            part, own = out_config.get_text_config(), own_config.get_text_config()
        for step in path:
            part, own = getattr(part, step), getattr(own, step)
        if (depth := getattr(own, key, None)) is None:
            continue
        setattr(part, key, len(layers))
        for entry, values in list(vars(own).items()):
            if isinstance(values, list | tuple) and len(values) == depth and not entry.endswith(NOT_BY_LAYER):
                setattr(part, entry, [values[layer] for layer in layers if layer < depth])


def is_tied(config: Any) -> bool:
    """Whether a model ties its head to its embeddings."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def untie(out_config: Any, configs: Iterable[Any]) -> None:
    """Untie the output config, in place, if a model of whose head the merge's is made has a head of its own."""
    if not all(map(is_tied, configs)):
        out_config.tie_word_embeddings = out_config.get_text_config().tie_word_embeddings = False


def saved(out_config: Any) -> Any:
    """The output config as it will be read from the merged folder.

    Raises:
        ValueError: It cannot be saved.
        Unloadable: It can be saved, but not be read again.
    """
    with tempfile.TemporaryDirectory(prefix="varm-merge-") as folder:
        try:
            out_config.save_pretrained(folder)
        except Exception as error:  # a config is checked by its class, which may raise anything
            raise ValueError(_one_line(error)) from error
        try:
            read = type(out_config).from_pretrained(folder)
        except Exception as error:
            raise Unloadable(_one_line(error)) from error
    for name, values in vars(out_config).items():
        if name.endswith("layers") and isinstance(values, list) and getattr(read, name, values) != values:
            raise Unloadable(f"its `{name}` would be {getattr(read, name)}, not {values}")
    return read


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


# Loading


def judge(
    out_config: Any,
    outputs: Mapping[str, torch.Tensor],
    own_config: Any,
    own: Mapping[str, torch.Tensor],
    unread: Sequence[str] | None,
    code: Any,
) -> tuple[list[str], list[str]]:
    """Load base model and merge without data, and compare.

    Args:
        out_config: The config of the merge.
        outputs: Its tensors.
        own_config: The base model's config.
        own: The base model's tensors.
        unread: Names of those that are in no output; None where the merge leaves out whole layers.
        code: mergekit's ``ModelPath`` of a base model whose own code may be run; None for none.

    Returns:
        Tensors that the base model has and loads, and that the merge would lack; and why the merge would not load
        as it is, a sentence each.
    """
    architecture = (getattr(out_config, "architectures", None) or ["model"])[0]
    written = {numberless(name) for name in outputs}
    try:
        before = loaded(own_config, own, code)
    except Unloadable:  # only names can be compared
        return [name for name in unread or own if numberless(name) not in written], []
    try:
        after = loaded(out_config, outputs, code)
    except Unloadable as error:
        return [], [f"transformers cannot make a {architecture} of the merge's config: {error}"]
    lost, faults = [], [*_other_shapes(before, after), *_unexpected(before, after, own, architecture)]
    random_before = {numberless(name) for name in before.missing}
    missing = sorted(name for name in after.missing if numberless(name) not in random_before)
    if missing and unread is None:
        lost = [name for name in missing if numberless(name) not in written]
        if lacking := [name for name in missing if numberless(name) in written]:
            faults.append(
                f"the merge would lack {patterns(lacking)}, which a {architecture} with its config has: they "
                "would get random values. Take slices with the base's number and kinds of layers"
            )
    elif missing:
        ignored = {numberless(name) for name in before.unexpected}
        lost = [name for name in unread or () if numberless(name) not in ignored] or missing
    return lost, faults


def _other_shapes(before: Loaded, after: Loaded) -> Iterator[str]:
    if wrong := {name: shapes for name, shapes in after.mismatched.items() if name not in before.mismatched}:
        name, (given, wanted) = next(iter(wrong.items()))
        more = f" ({len(wrong)} tensors are like this)" if len(wrong) > 1 else ""
        yield (
            f"`{name}` of the merge would have the shape {[*given]}, but its config needs {[*wanted]}{more}: "
            "transformers would not load it. Choose a base_model and a `tokenizer` with vocabularies of one size"
        )


def _unexpected(before: Loaded, after: Loaded, own: Iterable[str], architecture: str) -> Iterator[str]:
    read = {numberless(name) for name in own if name not in before.unexpected}
    ignored = {numberless(name) for name in before.unexpected} - read
    if extra := [name for name in after.unexpected if numberless(name) not in ignored and not is_buffer(name)]:
        yield (
            f"the merge would have {patterns(sorted(extra))} that no {architecture} with its config reads: "
            "transformers would drop them. Take slices with the base's number and kinds of layers"
        )
