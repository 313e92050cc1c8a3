"""What a pipeline is going to do, with estimates; and what came of it, as tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.pipeline.builder import PipelineConfig
from fusion_trainer.pipeline.stage import Plan, Stage
from varm_common.files import read_json, whole_file, write_json, written_to

__all__ = ["overview", "report", "standings"]

CHARACTERS_PER_TOKEN = 4.0
SUPERVISED = 0.6
"""Share of the tokens, before the data has been prepared."""
BYTES_PER_POSITION = 24
"""Of a store, beside 4 bytes for each entry kept (6 in a large vocabulary)."""


def overview(plan: Plan, stages: Sequence[Stage], config: PipelineConfig) -> str:
    """A line per stage: how it stands, and what it takes."""
    standings = plan.standings(stages)
    prepared = any(stage.title == "prepare dialogues" and standing.made for stage, standing in standings)
    size = _size(config, prepared)
    lines = [size["told"]]
    for stage, standing in standings:
        mark = "✓" if standing.made else "·"
        about = "" if standing.made else _estimate(stage, size, config)
        lines.append(f"{mark} {stage.title:32} {standing.reason}{f'  ({about})' if about else ''}")
    return "\n".join(lines)


def standings(plan: Plan, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The same for a program: each stage's kind, name, folder and command, whether it is made, and why not."""
    return [
        {
            "kind": stage.kind,
            "name": stage.name,
            "output": str(stage.output),
            "command": stage.command,
            "made": standing.made,
            "reason": standing.reason,
        }
        for stage, standing in plan.standings(stages)
    ]


def _size(config: PipelineConfig, prepared: bool) -> dict[str, Any]:
    """Blocks, tokens and supervised tokens: counted if the data is prepared, else estimated."""
    if prepared:
        report = Dialogues(config.work / "dialogues").report
        found: dict[str, Any] = {
            "blocks": report.blocks,
            "tokens": report.tokens,
            "supervised": report.supervised_tokens,
        }
        word = "counted"
    else:
        size = sum(Path(data).stat().st_size for data in config.data if Path(data).is_file())
        if not size:
            return {"told": "the data's size is known once it is prepared (--until prepare)"}
        tokens = round(size / CHARACTERS_PER_TOKEN)
        found = {"blocks": math.ceil(tokens / config.prepare.get("max_length", 2048))}
        found |= {"tokens": tokens, "supervised": round(SUPERVISED * tokens)}
        word = "estimated"
    told = "{blocks:,} blocks, {tokens:,} tokens, {supervised:,} of them supervised".format(**found)
    return {**found, "told": f"data: {told} ({word})"}


def _estimate(stage: Stage, size: dict[str, Any], config: PipelineConfig) -> str:
    if "tokens" not in size:
        return ""
    if stage.kind in ("extract", "align"):
        entries = stage.settings.get("top_k", config.extract.get("top_k", 10))
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


def report(plan: Plan) -> str:
    """The scores that are up to date as Markdown tables, written beside them; empty if there are none."""
    scores = [stage for stage in plan.stages if stage.kind == "evaluate"]
    made = [stage for stage, standing in plan.standings(scores) if standing.made]
    found = {stage.name: read_json(stage.output / "scores.json") for stage in made}
    if not found:
        return ""
    groups = list(dict.fromkeys(group for scored in found.values() for group in scored["groups"]))
    tables = []
    for title, key, form in (
        ("Loss, nats per byte", "nats_per_byte", ".4f"),
        ("Exact match", "exact_match", ".1%"),
    ):
        head = ["model", *groups]
        rows = [[name, *(_cell(scored, group, key, form) for group in groups)] for name, scored in found.items()]
        lines = [head, ["---"] * len(head), *rows]
        tables.append(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    text = "\n\n".join(tables) + "\n"
    with written_to(plan.work):
        write_json(plan.work / "report.json", {name: scored["groups"] for name, scored in found.items()})
        with whole_file(plan.work / "report.md") as file:
            file.write(text.encode())
    return text


def _cell(scores: dict[str, Any], group: str, key: str, form: str) -> str:
    of = scores["groups"].get(group)
    return format(of[key], form) if of else "–"
