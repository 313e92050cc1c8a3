"""What a pipeline is going to do, with estimates; and what came of it, as tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_trainer.dialogues import Dialogues
from fusion_trainer.errors import FusionError
from fusion_trainer.files import read_json, whole_file, write_json
from fusion_trainer.pipeline import PipelineConfig
from fusion_trainer.stages import Plan, Stage

__all__ = ["overview", "report"]

CHARACTERS_PER_TOKEN = 4.0
SUPERVISED = 0.6
"""Share of the tokens, before the data has been prepared."""
BYTES_PER_POSITION = 24
"""Of a store, beside 4 bytes for each entry kept (6 in a large vocabulary)."""


def overview(plan: Plan, stages: Sequence[Stage], config: PipelineConfig) -> str:
    """A line per stage: how it stands, and what it takes."""
    size = _size(config)
    lines = [size["told"]]
    for stage, standing in plan.standings(stages):
        mark = "✓" if standing.made else "·"
        about = "" if standing.made else _estimate(stage, size)
        lines.append(f"{mark} {stage.title:32} {standing.reason}{f'  ({about})' if about else ''}")
    return "\n".join(lines)


def _size(config: PipelineConfig) -> dict[str, Any]:
    """Blocks, tokens and supervised tokens: counted if the data is prepared, else estimated."""
    try:
        report = Dialogues(config.work / "dialogues").report
        found: dict[str, Any] = {
            "blocks": report.blocks,
            "tokens": report.tokens,
            "supervised": report.supervised_tokens,
        }
        word = "counted"
    except FusionError:
        size = sum(Path(data).stat().st_size for data in config.data if Path(data).is_file())
        if not size:
            return {"told": "the data's size is known once it is prepared (--until prepare)"}
        tokens = round(size / CHARACTERS_PER_TOKEN)
        found = {"blocks": math.ceil(tokens / config.prepare.get("max_length", 2048))}
        found |= {"tokens": tokens, "supervised": round(SUPERVISED * tokens)}
        word = "estimated"
    told = "{blocks:,} blocks, {tokens:,} tokens, {supervised:,} of them supervised".format(**found)
    return {**found, "told": f"data: {told} ({word})"}


def _estimate(stage: Stage, size: dict[str, Any]) -> str:
    if "tokens" not in size:
        return ""
    if stage.kind in ("extract", "align"):
        entries = stage.settings.get("top_k", 10)
        stored = size["supervised"] * (BYTES_PER_POSITION - 20 + 4 * entries)
        return f"about {size['tokens']:,} tokens, {stored / 1e6:,.1f} MB"
    if stage.kind == "train":
        training = stage.settings["training"]
        if training.get("max_steps", -1) > 0:
            return f"{training['max_steps']:,} steps"
        at_once = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        steps = math.ceil(size["blocks"] / at_once) * training.get("num_train_epochs", 3)
        return f"about {math.ceil(steps):,} steps, divided by the number of processes"
    return ""


def report(work: Path) -> str:
    """The scores of all models as a Markdown table, written beside them; empty if there are none."""
    found = {path.parent.name: read_json(path) for path in sorted((work / "scores").glob("*/scores.json"))}
    if not found:
        return ""
    order = ("pivot", "source", "target", "merge")
    names = sorted(found, key=lambda name: (order.index(name.split("-")[0]), name))
    groups = list(dict.fromkeys(group for name in names for group in found[name]["groups"]))
    tables = []
    for title, key, form in (
        ("Loss, nats per byte", "nats_per_byte", ".4f"),
        ("Exact match", "exact_match", ".1%"),
    ):
        head = ["model", *groups]
        rows = [[name, *(_cell(found[name], group, key, form) for group in groups)] for name in names]
        lines = [head, ["---"] * len(head), *rows]
        tables.append(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    text = "\n\n".join(tables) + "\n"
    write_json(work / "report.json", {name: found[name]["groups"] for name in names})
    with whole_file(work / "report.md") as file:
        file.write(text.encode())
    return text


def _cell(scores: dict[str, Any], group: str, key: str, form: str) -> str:
    of = scores["groups"].get(group)
    return format(of[key], form) if of else "–"
