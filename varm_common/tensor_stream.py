"""Tensors and messages through a pipe, one after the other, so that no more than one tensor is in it at a time.

Each frame is its size in 8 bytes and its content: a safetensors file with one tensor, or a JSON message. A message
ends the tensors that were sent before it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["messages", "send_message", "send_tensor"]

TENSOR, MESSAGE = b"T", b"M"


def send_tensor(pipe: IO[bytes], name: str, tensor: "Tensor") -> None:
    """Send a tensor of any device and dtype."""
    from safetensors.torch import save

    _send(pipe, TENSOR, save({name: tensor.detach().cpu().contiguous()}))


def send_message(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    """Send a message, and flush the pipe."""
    _send(pipe, MESSAGE, json.dumps(message).encode())
    pipe.flush()


def messages(pipe: IO[bytes], device: Any = "cpu") -> Iterator[tuple[dict[str, Any], dict[str, "Tensor"]]]:
    """Each message with the tensors that were sent before it, on a device; ends where the sender ends.

    Raises:
        EOFError: The pipe ends within a frame.
    """
    from safetensors.torch import load

    tensors: dict[str, Tensor] = {}
    while head := pipe.read(9):
        content = pipe.read(size := int.from_bytes(head[1:], "little"))
        if len(head) < 9 or len(content) < size:
            raise EOFError("the sender has ended within a tensor")
        if head[:1] == TENSOR:
            tensors |= {name: tensor.to(device) for name, tensor in load(content).items()}
        else:
            received, tensors = tensors, {}
            yield json.loads(content), received
            del received


def _send(pipe: IO[bytes], kind: bytes, content: bytes) -> None:
    pipe.write(kind + len(content).to_bytes(8, "little"))
    pipe.write(content)
