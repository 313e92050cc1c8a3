"""How a run of ``varm`` loads, converts and saves tensors: what is replaced in mergekit meanwhile."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit import card
from mergekit.architecture.conversion import (
    WeightRenaming,
    _expanded_target_keys,
    _iter_transform_matches,
    convert_checkpoint_tensors,
    get_checkpoint_conversion_mapping,
)
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from varm_merge.merging import adapters

__all__ = ["as_merged", "fast_conversion", "swapped", "whole_numbers_kept"]


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside the block."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def as_merged(options: MergeOptions) -> Iterator[None]:
    """Load, merge and save in the block as a run of ``varm`` does."""
    is_on_the_hub = card.is_hf
    with (
        fast_conversion(),
        whole_numbers_kept(),
        adapters_stamped(options),
        swapped(LoaderCache, "loaders", {}),  # not those of an earlier run: its files may have changed
        # the Hub is not queried for a folder like `models/mine`
        swapped(card, "is_hf", lambda path: not Path(path).exists() and bool(is_on_the_hub(path))),
    ):
        yield


@contextmanager
def whole_numbers_kept() -> Iterator[None]:
    """Leave integer buffers as they are: ``dtype`` and ``out_dtype`` apply to weights.

    mergekit would round the counter of a batch norm to float16, and find that it differs between the models.
    """
    load, save, merge = LoadTensor.execute, SaveTensor.execute, ExecuteMergeMethodTask.execute

    def load_exactly(self: LoadTensor) -> torch.Tensor | None:
        tensor: torch.Tensor | None = load(self.model_copy(update={"dtype": None}) if self.dtype else self)
        if tensor is None or not self.dtype or not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype_from_name(self.dtype))

    def merge_but_counters(
        self: ExecuteMergeMethodTask, tensors: dict[Any, torch.Tensor], **others: Any
    ) -> torch.Tensor | None:
        if self.output_weight.name.endswith(".num_batches_tracked") and self.base_model in tensors:
            return tensors[self.base_model].clone()
        return merge(self, tensors, **others)  # type: ignore[no-any-return]

    def save_exactly(self: SaveTensor, writer: Any, tensor: torch.Tensor | None) -> None:
        is_integer = tensor is not None and self.dtype and not tensor.is_floating_point()
        save(self.model_copy(update={"dtype": None}) if is_integer else self, writer, tensor)

    with (
        swapped(LoadTensor, "execute", load_exactly),
        swapped(SaveTensor, "execute", save_exactly),
        swapped(ExecuteMergeMethodTask, "execute", merge_but_counters),
    ):
        yield


@contextmanager
def adapters_stamped(options: MergeOptions) -> Iterator[None]:
    """Record beside every model that is made from an adapter in the block which files it was made from."""
    merged = ModelReference.merged

    def merge(self: ModelReference, cache_dir: str | None = None, **settings: Any) -> ModelReference:
        folder = adapters.merged_adapter(self, cache_dir) if self.lora is not None and cache_dir else None
        is_new = folder is not None and not folder.exists()
        result: ModelReference = merged(self, cache_dir=cache_dir, **settings)
        if folder is not None and is_new:
            adapters.stamp(self, folder, options.transformers_cache)
        return result

    with swapped(ModelReference, "merged", merge):
        yield


@contextmanager
def fast_conversion() -> Iterator[None]:
    """Find the sources of converted tensors (packs of experts) once for each checkpoint.

    mergekit goes over all names of a checkpoint for each tensor that it converts. The conversion stays mergekit's.
    """
    sources_of = functools.cache(_conversion_sources)  # checkpoints with the same names share an entry

    def load_converted(self: LoadTensor, loader: Any) -> torch.Tensor | None:
        if "_varm_conversion" not in vars(loader):
            model_type = self.model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
            loader._varm_conversion = model_type, sources_of(model_type, frozenset(loader.index.tensor_paths))
        model_type, sources = loader._varm_conversion
        device = self.device or "cpu"
        for target in (self.tensor, *(self.aliases or ())):
            if names := sources.get(target):
                tensors = {name: functools.partial(_read, loader, name, device) for name in names}
                if (tensor := convert_checkpoint_tensors(model_type, tensors, target)) is not None:
                    return tensor.to(device)  # type: ignore[no-any-return]
        return None

    with swapped(LoadTensor, "_load_converted_tensor", load_converted):
        yield


def _read(loader: Any, name: str, device: str) -> torch.Tensor:
    """A tensor of a checkpoint. mergekit's loader goes over all names of a shard for each tensor that it reads."""
    file = loader.index.tensor_paths[name]
    opened, shard = vars(loader).get("_varm_shard", (None, None))
    if opened == file and shard is not None:
        return shard.get_tensor(name).to(device)  # type: ignore[no-any-return]
    tensor: torch.Tensor = loader.get_tensor(name, device=device)
    loader._varm_shard = file, getattr(loader, "current_shard", None)
    return tensor


def _conversion_sources(model_type: str | None, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each name of the model's layout that a checkpoint lacks: the tensors it can be made from."""
    sources = {name: {name} for name in names}
    for transform in get_checkpoint_conversion_mapping(model_type) or [] if model_type else []:
        made: dict[str, set[str]] = {}
        for match in _iter_transform_matches(transform, sources):
            targets = {match.renamed_key}
            if not isinstance(transform, WeightRenaming):
                targets = _expanded_target_keys(match.renamed_key, transform.target_patterns)
            for target in targets:
                made.setdefault(target, set()).update(sources[match.source_key])
        for target, own in made.items():
            sources[target] = sources.get(target, set()) | own
    return {target: tuple(own) for target, own in sources.items() if own != {target}}
