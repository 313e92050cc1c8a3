"""What a planned merge would lack: other layouts, tensors of only some models, heads that are tied."""

import re
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from varm_merge.merging import planning
from varm_merge.merging.loading import patterns
from varm_merge.recipes.header_loader import Loaders
from varm_merge.recipes.headers import is_buffer

__all__ = [
    "DryPlan",
    "Finding",
    "only_some",
    "other_layouts",
    "untied",
]


@dataclass(frozen=True)
class Finding:
    """A sentence about a plan, and the model of the recipe that it is about, if it is about one."""

    message: str
    model: ModelReference | None = None


@dataclass
class DryPlan:
    """What a merge would do.

    Attributes:
        problems: Why it would fail.
        remarks: What one should know.
        mixed: Whether the models are of several architectures, which mergekit refuses.
        lost: Tensors that the base model has and loads, and that the merge would lack.
        faults: Why the finished merge would not load as it is.
        architecture: The class of the output model.
        outputs: Shape and bytes of an element of every tensor that it would write.
    """

    problems: list[Finding] = field(default_factory=list)
    remarks: list[Finding] = field(default_factory=list)
    mixed: bool = False
    lost: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    architecture: str = ""
    outputs: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)


def other_layouts(loaders: Loaders, options: MergeOptions, found: DryPlan) -> None:
    """Refuse models that keep the base model's tensors under other names: merged by names they are left out."""
    base, *others = loaders
    known = loaders[base].model.tensors
    for model in others:
        loader = loaders[model]
        lacking = [name for name in loader.lacking if not is_buffer(name)]
        extra = [name for name in loader.model.tensors if name not in loader.used and name not in known]
        shared = {_place(name) for name in lacking} & {_place(name) for name in extra}
        heads = [name for name in lacking if name.endswith(HEADS)]
        if shared:
            here, there = ([name for name in names if _place(name) in shared] for names in (lacking, extra))
            message = (
                f"`{model}` has not {patterns(here)} of {base}, and in their place {patterns(there)}: a merge "
                "by names needs one layout. Load each model with transformers and save it again"
            )
        elif heads and _ties(model.config(trust_remote_code=options.trust_remote_code)):
            message = (
                f"`{model}` ties its head to the embeddings, and {base} has {patterns(heads)}: save that model "
                "with `tie_word_embeddings` false and a head of its own"
            )
        elif len(lacking) > len(known) / 2:
            message = (
                f"`{model}` has only {len(known) - len(lacking)} of the {len(known)} tensors of {base} by name: a "
                "merge by names needs one layout. Save both from the same class of transformers"
            )
        else:
            continue
        found.problems.append(Finding(message, model))
        found.remarks = [remark for remark in found.remarks if remark.model != model]


def _place(name: str) -> str:
    """Where in the model a tensor is, however its layout names and packs what lies there."""
    if (experts := re.match(r"(.*?\.\d+)\..*experts", name)) is not None:
        return f"{experts[1]}.experts"
    return name.rsplit(".", 2)[0] if re.search(r"\.\d+\.", name) else name


def only_some(loaders: Loaders, found: DryPlan) -> None:
    """Remark on tensors that a model has, the base has not, and nothing reads."""
    base = next(iter(loaders))
    for model, loader in loaders.items():
        known = loaders[base].model.tensors
        extra = [
            name
            for name in loader.model.tensors
            if name not in loader.used and name not in known and not is_buffer(name)
        ]
        if model != base and extra:
            message = f"only `{model}` has {patterns(extra)}, not {base}: they are not in the merge"
            found.remarks.append(Finding(message, model))


def untied(plan: planning.Plan, loaders: Loaders, options: MergeOptions, found: DryPlan) -> None:
    """Remark on models with a head of their own where the merge, as the base, ties it to the embeddings."""
    if not _ties(plan.out_config):
        return
    for model, loader in loaders.items():
        heads = [name for name in loader.model.tensors if name.endswith(HEADS)]
        if heads and not _ties(model.config(trust_remote_code=options.trust_remote_code)):
            message = (
                f"`{model}` has a head of its own, {patterns(heads)}, and the merge ties it to the embeddings"
            )
            found.remarks.append(Finding(f"{message} as the base does: that head is lost", model))


HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def _ties(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
