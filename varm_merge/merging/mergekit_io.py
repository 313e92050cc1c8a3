"""How tensors of checkpoints are loaded, converted and saved during a merge."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit import card
from mergekit.architecture import conversion
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from varm_merge.merging import adapters

__all__ = [
    "SUPPORTED_MERGEKIT",
    "as_merged",
    "expect",
    "expect_fields",
    "fast_conversion",
    "swapped",
    "whole_numbers_kept",
]

SUPPORTED_MERGEKIT = ">=0.1.5,<0.2"


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


def expect(function: Callable[..., Any], *parameters: str) -> None:
    """See that a function of mergekit has these parameters; AttributeError if not."""
    missing = set(parameters) - set(inspect.signature(function).parameters)
    if missing:
        raise AttributeError(f"{function.__qualname__} takes no {', '.join(sorted(missing))}")


def expect_fields(present: Iterable[str], *names: str) -> None:
    """See that a class or module of mergekit has these names; AttributeError if not."""
    missing = set(names) - set(present)
    if missing:
        raise AttributeError(f"no {', '.join(sorted(missing))}")
