"""Tensors that are on a GPU for the code under test, on a machine without one.

Every operation runs twice. Under torch's FakeTensorMode, on `cuda` tensors without data, it fails as on a GPU if
its tensors are on different devices. On the CPU it computes the values. So code that reads a value (`item`,
`nonzero`) runs on, and its result can be compared with the same code on the CPU.

A copy to the host that does not wait (`non_blocking=True`) holds garbage until an event recorded after it has been
waited for, as it may on a GPU.

    with pretend_gpu():
        on_gpu(torch.ones(2), "cuda:1") + torch.ones(2)  # FakeTensorDeviceMismatchError
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["GpuTensor", "module_on_gpu", "on_gpu", "pretend_gpu"]

aten = torch.ops.aten
CPU = torch.device("cpu")
DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
"""Operations that wait for everything before them, and return a number."""


class GpuTensor(Tensor):
    """A tensor whose ``device`` is a GPU; its ``values`` are on the CPU.

    Below Python its device is `meta`: with `cuda`, indexing and backward passes would ask for a driver.
    """

    values: Tensor
    place: torch.device
    is_cuda, is_cpu, is_meta = True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, place: torch.device) -> "GpuTensor":
        layout = values.shape, values.stride(), values.storage_offset()
        with torch.inference_mode(False):  # else no view of it could be taken outside inference mode
            made: GpuTensor = Tensor._make_wrapper_subclass(cls, *layout, dtype=values.dtype, device="meta")
        made.values, made.place = values, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.values}, {self.place})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} on a GPU tensor outside pretend_gpu(), or in another thread")


class _Requests(TorchFunctionMode):
    """Functions that name a device: those that make tensors on a GPU, and copies to one."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.to and not (len(args) > 1 and isinstance(args[1], Tensor)):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == "cuda":
                return _moved(args[0], _indexed(device), dtype, non_blocking)
        elif function is Tensor.to and isinstance(args[1], GpuTensor):
            return _moved(args[0], args[1].place, args[1].dtype, bool(kwargs.get("non_blocking")))
        elif function is Tensor.backward:  # may call the model again
            loss = args[0]
            with self:
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(
                    (loss,),
                    (torch.ones_like(loss),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        elif function is Tensor.cuda:
            return _moved(args[0], torch.device("cuda:0"), None, False)
        elif function in _device_constructors() and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == "cuda":
                return GpuTensor(function(*args, **{**kwargs, "device": "cpu"}), _indexed(device))
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """All operations on tensors of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.place = torch.device("cuda:0")
        self.known: dict[Any, list[torch.device]] = {}

    def complete(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """The copies have arrived on the host."""
        for target, values in copies:
            target.copy_(values)
        self.copies = [copy for copy in self.copies if all(copy is not done for done in copies)]

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # requests are understood above
            return self._run(function, args, dict(kwargs or {}))

    def _run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        on_gpus = [item for item in tree_leaves((args, kwargs)) if isinstance(item, GpuTensor)]
        asked = kwargs.get("device")
        if not on_gpus and (asked is None or asked.type == "cpu"):
            return function(*args, **kwargs)
        self.place = on_gpus[0].place if on_gpus else self.place
        if asked is not None and asked.type == "meta":  # the device of a tensor, seen from below Python
            kwargs["device"] = self.place
        places = self._places(function, args, kwargs)
        own = {**kwargs, "device": CPU} if "device" in kwargs else kwargs
        real_args, real_kwargs = tree_map_only(GpuTensor, lambda one: one.values, (args, own))
        result = function(*real_args, **real_kwargs)
        if function in READS:
            self.complete(self.copies)
            return result
        result = tree_map_only(Tensor, lambda values: _placed(values, next(places)), result)
        if on_gpus and isinstance(result, Tensor) and not isinstance(result, GpuTensor):
            names = [argument.name for argument in function._schema.arguments]
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            self._copied_to_host(result, waits=not named.get("non_blocking"))
            return args[0] if function is aten.copy_.default else result
        return return_and_correct_aliasing(function, args, kwargs, result)

    def _places(self, function: Any, args: Any, kwargs: Any) -> Iterator[torch.device]:
        """The device of each tensor that an operation returns."""
        leaves = tree_leaves((args, kwargs))
        inputs = [item for item in leaves if isinstance(item, Tensor)]
        masks = any(one.dtype == torch.bool for one in inputs) or function is not aten.index.Tensor
        needs_values = function in READS or (DEPENDS_ON_VALUES.intersection(function.tags) and masks)
        if needs_values or any(isinstance(item, torch._C.Generator) for item in leaves):
            devices = {one.device for one in inputs}
            assert len(devices) == 1, f"{function} of tensors on {devices}"
            return repeat(*devices)
        key = function, tuple((one.device, one.dim() == 0, one.dtype) for one in inputs), kwargs.get("device")
        if key not in self.known:
            with self.fake:
                fake_args, fake_kwargs = tree_map_only(Tensor, _without_data, (args, kwargs))
                result = function(*fake_args, **fake_kwargs)
            self.known[key] = [one.device for one in tree_leaves(result) if isinstance(one, Tensor)]
        places = self.known[key]
        return repeat(places[0]) if len({*places}) == 1 else iter(places)

    def _copied_to_host(self, result: Tensor, waits: bool) -> None:
        if waits:
            self.complete(self.copies)
            return
        self.copies.append((result, result.clone()))
        result.fill_(torch.nan if result.is_floating_point() else 77)


class _GeneratorOnCpu(torch._C.Generator):  # type: ignore[name-defined]
    def __new__(cls, _device: Any = None) -> "_GeneratorOnCpu":
        return super().__new__(cls)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0)


def _moved(one: Tensor, device: torch.device, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
    if one.device == device and dtype in (None, one.dtype):
        return one
    moved: Tensor = aten._to_copy.default(one, dtype=dtype, device=device, non_blocking=non_blocking)
    return moved


def _placed(values: Tensor, device: torch.device) -> Tensor:
    return values if device.type == "cpu" else GpuTensor(values, device)


def _without_data(one: Tensor) -> Tensor:
    return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device)


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Tensors can be on `cuda` devices, in this thread. Models must be made before."""
    operations = _Operations()

    class Event:
        """torch.cuda.Event: once it is waited for, the copies that were queued before it are complete."""

        def record(self, _stream: Any = None) -> None:
            self.before = [*operations.copies]

        def synchronize(self) -> None:
            operations.complete(self.before)

    with (
        patch.object(torch.cuda, "Event", Event),
        patch.object(torch.cuda, "current_stream", lambda _device=None: None),
        patch.object(Tensor, "pin_memory", Tensor.clone),
        patch.object(torch, "Generator", _GeneratorOnCpu),
        operations,
        _Requests(),
    ):
        yield


def on_gpu(values: Tensor, device: str = "cuda:0") -> Tensor:
    """A copy of a tensor on a GPU."""
    return GpuTensor(values.detach().clone(), torch.device(device))


def module_on_gpu(module: nn.Module, device: str = "cuda:0") -> nn.Module:
    """``module.to(device)``, in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(on_gpu(weight, device), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer, device)
    return module
