"""The stages that a pipeline will run, with estimates, and the scores of its models as tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_trainer.pipeline.builder import PipelineConfig
from fusion_trainer.pipeline.runner import Runner
from fusion_trainer.pipeline.stage import Stage
from fusion_trainer.pipeline.state import State
from varm_common.files import read_json, write_file, write_json, written_to
from varm_common.tables import markdown

__all__ = ["as_records", "overview", "report"]

CHARACTERS_PER_TOKEN = 4.0
SUPERVISED = 0.6
"""Estimated share of the tokens, before the data is prepared."""
BYTES_PER_POSITION = 4
"""In a store, beside 4 bytes for each probability kept."""
TABLES = (("Loss, nats per byte", "nats_per_byte", ".4f"), ("Exact match", "exact_match", ".1%"))


def overview(states: Sequence[State], config: PipelineConfig) -> str:
    """One line per stage: its state, and an estimate of its work."""
    prepared = any(state.stage.title == "prepare dialogues" and state.made for state in states)
    sizes = _sizes(config, prepared)
    if sizes:
        numbers = "{blocks:,} blocks, {tokens:,} tokens, {supervised_tokens:,} of them supervised".format(**sizes)
        lines = [f"data: {numbers} ({'counted' if prepared else 'estimated'})"]
    else:
        lines = ["the size of the data is known after `--until prepare`"]
    for state in states:
        estimate = "" if state.made or not sizes else _estimate(state.stage, sizes, config)
        mark = "✓" if state.made else "·"
        lines.append(f"{mark} {state.stage.title:32} {state.reason}{f'  ({estimate})' if estimate else ''}")
    return "\n".join(lines)


def as_records(states: Sequence[State]) -> list[dict[str, Any]]:
    """The same for programs: kind, name, folder and command of each stage, whether it is made, and the reason."""
    return [
        {
            "kind": state.stage.kind,
            "name": state.stage.name,
            "output": str(state.stage.output),
            "command": state.stage.command,
            "made": state.made,
            "reason": state.reason,
        }
        for state in states
    ]


def _sizes(config: PipelineConfig, prepared: bool) -> dict[str, int]:
    """Blocks, tokens and supervised tokens: counted if the data is prepared, else estimated if it is in files."""
    if prepared:
        counted: dict[str, int] = read_json(config.work / "dialogues" / "manifest.json")["report"]
        return counted
    size = sum(Path(data).stat().st_size for data in config.data if Path(data).is_file())
    tokens = round(size / CHARACTERS_PER_TOKEN)
    blocks = math.ceil(tokens / config.prepare.get("max_length", 2048))
    return {"blocks": blocks, "tokens": tokens, "supervised_tokens": round(SUPERVISED * tokens)} if size else {}


def _estimate(stage: Stage, sizes: dict[str, int], config: PipelineConfig) -> str:
    if stage.kind in ("extract", "align"):
        kept = stage.settings.get("top_k", config.extract.get("top_k", 10))
        stored = sizes["supervised_tokens"] * (BYTES_PER_POSITION + 4 * kept)
        return f"about {sizes['tokens']:,} tokens, {stored / 1e6:,.1f} MB"
    if stage.kind == "train":
        training = stage.settings["training"]
        if training.get("max_steps", -1) > 0:
            return f"{training['max_steps']:,} steps"
        batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        steps = math.ceil(sizes["blocks"] / batch) * training.get("num_train_epochs", 3)
        return f"about {math.ceil(steps):,} steps, divided by the number of processes"
    return ""


def report(runner: Runner) -> str:
    """The scores that are up to date as Markdown tables, also written beside them; empty if there are none."""
    states = runner.states([stage for stage in runner.stages if stage.kind == "evaluate"])
    made = [state.stage for state in states if state.made]
    scores = {stage.name: read_json(stage.output / "scores.json")["groups"] for stage in made}
    if not scores:
        return ""
    groups = list(dict.fromkeys(group for scored in scores.values() for group in scored))
    tables = []
    for title, key, form in TABLES:
        rows = [
            [name, *(format(scored[group][key], form) if group in scored else "–" for group in groups)]
            for name, scored in scores.items()
        ]
        tables.append(f"### {title}\n\n{markdown(['model', *groups], rows)}")
    text = "\n\n".join(tables) + "\n"
    with written_to(runner.work):
        write_json(runner.work / "report.json", scores)
    write_file(runner.work / "report.md", text)
    return text
