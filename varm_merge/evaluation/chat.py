"""What goes into a chat model and what comes out, on this machine or at an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Answer", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's message, and how to sample the answer."""

    messages: Sequence[dict[str, str]]
    temperature: float
    seed: str


@dataclass(frozen=True)
class Answer:
    """A model's answer; ``end`` says why it ended: ``stop``, ``length``, ``context`` or ``no room``."""

    text: str
    end: str
