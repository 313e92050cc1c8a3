"""Losses of a planned merge: other layouts, tensors that only some models have, heads that become tied."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from varm_merge.merging.loading import patterns
from varm_merge.merging.output_model import HEADS, is_tied
from varm_merge.recipes.header_loader import Loaders
from varm_merge.recipes.headers import is_buffer

__all__ = ["Finding", "only_some", "other_layouts", "untied"]


@dataclass(frozen=True)
class Finding:
    """A sentence about a plan, and the model of the recipe that it is about, if it is about one."""

    message: str
    model: ModelReference | None = None


def other_layouts(loaders: Loaders, options: MergeOptions) -> Iterator[Finding]:
    """Models with other names for the base model's tensors, which a merge by names would leave out."""
    base, *others = loaders
    known = loaders[base].model.tensors
    for model in others:
        lacking = [name for name in loaders[model].lacking if not is_buffer(name)]
        extra = [name for name in loaders[model].unused() if name not in known]
        shared = {_layer_part(name) for name in lacking} & {_layer_part(name) for name in extra}
        heads = [name for name in lacking if name.endswith(HEADS)]
        has_none = bool(heads) and is_tied(model.config(trust_remote_code=options.trust_remote_code))
        if shared or has_none or len(lacking) > len(known) / 2:
            instead = f", and in their place {patterns(extra)}" if extra else ""
            yield Finding(
                f"`{model}` has no {patterns(lacking)} of {base}{instead}: a merge by names needs one layout. "
                "Save both models with the same class of transformers and the same `tie_word_embeddings`",
                model,
            )


def _layer_part(name: str) -> str:
    """The part of the model that a tensor belongs to, however its layout names and packs that part's tensors."""
    if (experts := re.match(r"(.*?\.\d+)\..*experts", name)) is not None:
        return f"{experts[1]}.experts"
    return name.rsplit(".", 2)[0] if re.search(r"\.\d+\.", name) else name


def only_some(loaders: Loaders) -> Iterator[Finding]:
    """Tensors that a model has, the base model does not have, and the merge does not read."""
    base, *others = loaders
    for model in others:
        if extra := [name for name in loaders[model].unused() if name not in loaders[base].model.tensors]:
            message = f"`{model}` has {patterns(extra)}, which {base} does not have"
            yield Finding(f"{message}: they are left out of the merge", model)


def untied(out_config: Any, loaders: Loaders, options: MergeOptions) -> Iterator[Finding]:
    """Models with a head of their own where the merge's config ties it to the embeddings."""
    if not is_tied(out_config):
        return
    for model, loader in loaders.items():
        heads = [name for name in loader.model.tensors if name.endswith(HEADS)]
        if heads and not is_tied(model.config(trust_remote_code=options.trust_remote_code)):
            yield Finding(
                f"`{model}` has a head of its own, {patterns(heads)}, but the merge's config ties the head to the "
                "embeddings, as the base model's does: programs that obey it lose the head of this model",
                model,
            )
