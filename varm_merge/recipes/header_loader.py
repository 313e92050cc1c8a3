"""Stands in for mergekit's loaders: it knows the headers of weight files and gives tensors without data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import MergeMethod
from safetensors import safe_open

from varm_common.checkpoints import DTYPES
from varm_merge.merging.mergekit_io import fast_conversion, swapped
from varm_merge.recipes.headers import Model, is_buffer

__all__ = ["HeaderLoader", "Loaders", "headers_only"]

TORCH_DTYPES = {stored: getattr(torch, name) for name, stored in DTYPES.items()}


class HeaderLoader:
    """Stands in for mergekit's loader of one checkpoint.

    Attributes:
        model: The header.
        used: Names of the tensors that were loaded.
        lacking: Names of planned optional tensors that the checkpoint does not have.
    """

    def __init__(self, model: Model) -> None:
        paths = dict.fromkeys(model.tensors, "")
        self.index = ShardedTensorIndex(base_path="", is_safetensors=True, tensor_paths=paths, shards=[])
        self.model = model
        self.used: set[str] = set()
        self.lacking: list[str] = []

    def get_tensor(self, key: str, **_options: Any) -> torch.Tensor:
        self.used.add(key)
        shape, stored = self.model.tensors[key]
        dtype = TORCH_DTYPES.get(stored, torch.uint8)
        file = self.model.files.get(key)
        if not dtype.is_floating_point and file is not None and file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:  # a buffer: mergekit compares its values between the models
                return opened.get_tensor(key)  # type: ignore[no-any-return]
        return torch.empty(shape, dtype=dtype, device="meta")

    def flush(self) -> None:
        """Part of mergekit's interface; nothing is open."""

    def unused(self) -> list[str]:
        """Names of the checkpoint's weights that were not loaded."""
        return [name for name in self.model.tensors if name not in self.used and not is_buffer(name)]


Loaders = Mapping[ModelReference, HeaderLoader]


@contextmanager
def headers_only(models: Mapping[ModelReference, Model]) -> Iterator[Loaders]:
    """Let mergekit load from headers inside the block; yields the loader of each model."""
    loaders = {reference: HeaderLoader(model) for reference, model in models.items()}

    def lazy_loader(self: ModelReference, **_options: Any) -> HeaderLoader:
        if self.lora is not None:
            raise RuntimeError(
                f"mergekit has no definition of this architecture, and cannot take one from the adapter `{self}`: "
                "merge the adapter into its model first"
            )
        return loaders[self]

    def first_input(_method: MergeMethod, groups: Sequence[Any], *_parameters: Any, **_options: Any) -> Any:
        return tuple(group.entries[0].tensor for group in groups)  # an output has the shape of its inputs

    with (
        swapped(LoaderCache, "loaders", dict(loaders)),
        swapped(ModelReference, "lazy_loader", lazy_loader),
        swapped(MergeMethod, "_execute_resolved", first_input),
        fast_conversion(),
    ):
        yield loaders
