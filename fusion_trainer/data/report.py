"""What became of the conversations while dialogues were prepared."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Report",
]

COUNTERS = ("dropped", "left_out", "unused")
"""Of a report."""


@dataclass
class Report:
    """What became of the data; all numbers of tokens are the pivot's.

    Attributes:
        dropped: Conversations left out, by reason.
        cut_turns: Answers cut because their exchange alone is longer than ``max_length``.
        cut_tokens: Tokens lost by that.
        open_turns: Turns left out because no answer follows them.
        folded: Blocks whose system text stands before the first user turn: the template has no system turn.
        left_out: What the template does not write: bytes by kind, and turns under ``<kind>, turns``.
        unused: Keys of the data that were not used.
        lengths: Blocks by length: upper bound (a power of two) → number.
    """

    conversations: int = 0
    kept: int = 0
    turns: int = 0
    open_turns: int = 0
    blocks: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_turns: int = 0
    cut_tokens: int = 0
    folded: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Report":
        lengths = Counter({int(bound): number for bound, number in plain["lengths"].items()})
        counters = {name: Counter(plain[name]) for name in COUNTERS}
        return cls(**{**plain, **counters, "lengths": lengths})

    def as_dict(self) -> dict[str, Any]:
        plain = {**vars(self), **{name: dict(sorted(getattr(self, name).items())) for name in COUNTERS}}
        return {**plain, "lengths": {str(bound): self.lengths[bound] for bound in sorted(self.lengths)}}

    def __str__(self) -> str:
        lines = [
            f"conversations      {self.conversations:>12,}  of which kept {self.kept:,}",
            f"turns              {self.turns:>12,}  without an answer after them, left out {self.open_turns:,}",
            f"blocks             {self.blocks:>12,}",
            f"tokens             {self.tokens:>12,}",
            f"supervised tokens  {self.supervised_tokens:>12,}",
            f"answers cut        {self.cut_turns:>12,}  by {self.cut_tokens:,} tokens",
            *(f"dropped            {number:>12,}  {reason}" for reason, number in sorted(self.dropped.items())),
            *self._template_lines(),
            *(
                [f"keys not used      {', '.join(f'{key} ({n:,})' for key, n in self.unused.most_common())}"]
                * bool(self.unused)
            ),
            "length of a block in tokens:",
        ]
        most = max(self.lengths.values(), default=1)
        for bound in sorted(self.lengths):
            bar = "█" * max(1, round(40 * self.lengths[bound] / most))
            lines.append(f"  ≤ {bound:<7,} {self.lengths[bound]:>9,}  {bar}")
        return "\n".join(lines)

    def _template_lines(self) -> Iterator[str]:
        if self.folded:
            yield f"system turns       {self.folded:>12,}  put before the first user turn: the template has none"
        for kind in sorted(self.left_out):
            if kind.endswith(", turns"):
                what = kind.removesuffix(", turns")
                size, turns = self.left_out[what], self.left_out[kind]
                lost = f"bytes of {what} in {turns:,} turns, left out by the template"
                yield f"not rendered       {size:>12,}  {lost}"
