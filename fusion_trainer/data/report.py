"""The counts that ``prepare`` prints and keeps."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Report", "left_out_by_kind"]

COUNTERS = ("dropped", "left_out", "unused")


@dataclass
class Report:
    """Counts of what was kept, cut and left out. Tokens are counted with the pivot's tokenizer.

    Attributes:
        dropped: Conversations left out, by reason.
        cut_turns: Answers cut because their exchange alone is longer than ``max_length``.
        cut_tokens: Tokens lost by that.
        open_turns: Turns left out because no answer follows them.
        folded: Blocks whose system text is put before the first user turn: the template has no system turn.
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
        """The inverse of ``as_dict``."""
        lengths = Counter({int(bound): number for bound, number in plain["lengths"].items()})
        return cls(**{**plain, **{name: Counter(plain[name]) for name in COUNTERS}, "lengths": lengths})

    def as_dict(self) -> dict[str, Any]:
        plain = {**vars(self), **{name: dict(sorted(getattr(self, name).items())) for name in COUNTERS}}
        return {**plain, "lengths": {str(bound): number for bound, number in sorted(self.lengths.items())}}

    def count_block(self, tokens: int, supervised: int) -> None:
        self.blocks += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.lengths[1 << (tokens - 1).bit_length()] += 1

    def __str__(self) -> str:
        columns = [
            ("conversations", self.conversations, f"of which kept {self.kept:,}"),
            ("turns", self.turns, f"without an answer after them, left out {self.open_turns:,}"),
            ("blocks", self.blocks, ""),
            ("tokens", self.tokens, ""),
            ("supervised tokens", self.supervised_tokens, ""),
            ("answers cut", self.cut_turns, f"by {self.cut_tokens:,} tokens"),
            *(("dropped", number, reason) for reason, number in sorted(self.dropped.items())),
        ]
        if self.folded:
            what = "put before the first user turn, because the template refuses them"
            columns.append(("system turns", self.folded, what))
        for kind, size, turns in left_out_by_kind(self.left_out):
            what = f"bytes of {kind} in {turns:,} turns, left out by the template"
            columns.append(("not rendered", size, what))
        lines = [f"{name:<18} {number:>12,}  {what}".rstrip() for name, number, what in columns]
        if self.unused:
            keys = ", ".join(f"{key} ({number:,})" for key, number in self.unused.most_common())
            lines.append(f"keys not used      {keys}")
        lines.append("length of a block in tokens:")
        most = max(self.lengths.values(), default=1)
        for bound, number in sorted(self.lengths.items()):
            lines.append(f"  ≤ {bound:<7,} {number:>9,}  {'█' * max(1, round(40 * number / most))}")
        return "\n".join(lines)


def left_out_by_kind(left_out: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Each kind of text that a template leaves out, its bytes and its turns, from ``Rendered.left_out``."""
    kinds = sorted(key for key in left_out if f"{key}, turns" in left_out)
    return [(kind, left_out[kind], left_out[f"{kind}, turns"]) for kind in kinds]
