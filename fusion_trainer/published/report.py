"""The report of an import: what was carried over, and what could not be."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fusion_trainer.data.conversations import kinds_of_problems
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore
from varm_common.errors import listed

__all__ = ["import_report"]

NEEDED_BY = {"tail": "`tail: bucket`", "gold_logprob": "`compare: token`"}
"""The settings of a training that need a column."""


def import_report(
    store: RepresentationStore, dialogues: Dialogues, rows: int, problems: Sequence[tuple[str, str]]
) -> str:
    """A few lines about an imported store.

    Args:
        store: The store.
        dialogues: Its dialogues.
        rows: Number of rows in the data.
        problems: Place and reason of each row that this run left out.
    """
    counts: Mapping[str, int] = defaultdict(int, store.manifest)
    columns: list[tuple[str, int, str]] = [
        ("rows", rows, ""),
        ("blocks", len(dialogues), f"of which without a row {counts['without_row']:,}"),
        ("bad rows", counts["bad_rows"], "found while the store was written"),
        ("positions", counts["positions"], ""),
        ("  tail not known", counts["unknown_tail"], "the next token is not among the k, or has no cross-entropy"),
        ("  next not known", counts["unknown_gold_logprob"], "the next token has no cross-entropy"),
        ("ids left out", counts["foreign_ids"], "no tokens of the tokenizer"),
        ("tokens cut", counts["cut_tokens"], "the row ends before its block"),
    ]
    if store.aligned:
        gold = store.identity["unpaired"] == "gold"
        instead = "probability 1 for the next token" if gold else "the pivot's distribution"
        share = counts["ends_ppm"] / 1e6 / max(1, counts["ends_paired"])
        per_token = f"of {counts['compared']:,} blocks per byte; per token {counts['better_by_token']:,}"
        columns += [
            ("aligned", counts["paired"], ""),
            ("not aligned", counts["no_partner"], f"they have {instead}"),
            ("ends of answers", counts["ends_paired"], f"the pivot's end token has {share:.2%} there"),
            ("source better", counts["better_by_byte"], per_token),
        ]
    lines = [f"{name:<18} {number:>12,}  {what}".rstrip() for name, number, what in columns]
    lines += [f"`{name}` is not known everywhere: `train` cannot use {NEEDED_BY[name]}" for name in store.unknown]
    if problems:
        lines.append(f"left out:{listed(kinds_of_problems(problems))}")
    return "\n".join(lines)
