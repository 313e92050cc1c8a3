"""The engine that runs a model with transformers in this process.

While a batch is computed, the last one is copied to the host.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_trainer.config import ExtractConfig
from fusion_trainer.representations.engine import Distributions, Query
from fusion_trainer.representations.split_model import context_length
from fusion_trainer.representations.topk_model import TopKModel
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.models import load_causal_lm

__all__ = ["TransformersEngine"]

LOADING = ("dtype", "attention", "device_map", "tensor_parallel", "load_in", "trust_remote_code")
"""Settings that say how the model is loaded."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
LEAST = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class OnItsWay:
    """A batch's distributions on their way to the host."""

    parts: dict[str, Tensor]
    copied: torch.cuda.Event | None

    def done(self) -> bool:
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]

    def result(self) -> Distributions:
        if self.copied is not None:
            self.copied.synchronize()
        return Distributions(**{name: part.numpy() for name, part in self.parts.items()})


class TransformersEngine:
    """A model of transformers, loaded.

    Raises:
        UserError: The model cannot be loaded.
    """

    ahead = 1

    def __init__(self, config: ExtractConfig, folder: Path, known: frozenset[int], device: torch.device) -> None:
        self.batch_tokens = config.batch_tokens
        settings = {name: getattr(config, name) for name in LOADING}
        model = load_causal_lm(folder, config.model, device=device, **settings)
        if len(gpus := {*(getattr(model, "hf_device_map", None) or {}).values()}) > 1 and not is_quiet():
            note = f"{config.model} is spread over {len(gpus)} devices, which take turns"
            click.echo(f"{note}; with --tensor-parallel they work at the same time", err=True)
        self.context = context_length(model)
        with _out_of_memory(f"{config.model} leaves no GPU memory for a batch; try --device-map auto"):
            self.model = TopKModel(model, known)
        self.rows: int | None = self.model.rows
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        packages = ("torch", "transformers", "tokenizers", "varm-merge")
        self.made_with = {"device": device_name, **{package: version(package) for package in packages}}

    def start(self, batch: Sequence[Query], k: int) -> OnItsWay:
        length = max(len(query.ids) for query in batch)
        ids_BL, mask_BL = np.zeros((2, len(batch), length), np.int64)
        for place, query in enumerate(batch):
            ids_BL[place, : len(query.ids)] = query.ids
            mask_BL[place, : len(query.ids)] = 1
        places = [place * length + query.positions.astype(np.int64) for place, query in enumerate(batch)]
        positions_S = np.concatenate(places)
        gold_S = ids_BL.ravel()[positions_S + 1]
        alone = " and, because the batch is a single block, --max-length" if len(batch) == 1 else ""
        message = (
            f"out of memory on {self.model.device} with a batch of {len(batch)} × {length} tokens; lower "
            f"--batch-tokens (now {self.batch_tokens}){alone}, and run the same command again"
        )
        with _out_of_memory(message):
            mask = None if mask_BL.all() else self._on_device(mask_BL)
            ids, positions, gold = map(self._on_device, (ids_BL, positions_S, gold_S))
            top = self.model.distributions(ids, mask, positions, gold, k)
            columns = {
                "ids": top.ids_CK.to(torch.int32),
                "logprobs": top.logprobs_CK.clamp(min=LEAST).to(torch.float16),
                "tail": top.tail_C.to(torch.float16),
                "gold_logprob": top.gold_logprob_C.clamp(min=LEAST).to(torch.float16),
            }
            host = {name: column.to("cpu", non_blocking=True) for name, column in columns.items()}
            if top.tail_C.device.type != "cuda":
                return OnItsWay(host, None)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(top.tail_C.device))
            return OnItsWay(host, copied)

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.model.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    def why_not_finite(self) -> str:
        for name, weight in self.model.model.named_parameters():
            if weight.is_meta:
                continue
            wrong = ~torch.isfinite(weight.detach().flatten())
            if wrong.any():
                place = np.unravel_index(int(wrong.to(torch.uint8).argmax()), weight.shape)
                return f"Its weights are not finite: {name}, first at {[int(i) for i in place]}"
        return "Its weights are finite; a wider --dtype may help"

    def close(self) -> None:
        pass


@contextmanager
def _out_of_memory(message: str) -> Iterator[None]:
    """Raise a UserError with this message if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not named and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise UserError(message) from error
