"""A toy fusion for ``fusion-trainer run``: a pivot, sources of other architectures and tokenizers, its file.

The pivot speaks OpenChat. Of the sources one is queried in its own template, ChatML, one reads the pivot's text,
and the third is queried in a template that the file names.
"""

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_fusion
import tiny_sources
import yaml
from click.testing import CliRunner

import varm_merge.cli

ROOT = Path(__file__).parents[1]
GROUPED = tiny_fusion.PIVOT
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pivot": ("llama", "sentencepiece_bpe", GROUPED),
    "neox": ("gpt_neox", "byte_level_bpe", tiny_fusion.SMALL),
    "mistral": ("mistral", "unigram", {**GROUPED, "head_dim": 8}),
    "mixtral": ("mixtral", "byte_level_bpe", {**GROUPED, "head_dim": 8}),
}
SPEAKS: dict[str, dict[str, Any]] = {
    "pivot": tiny_fusion.OPENCHAT,
    "neox": tiny_fusion.CHATML,
    "mistral": {},
    "mixtral": {},
}
BYTES: dict[str, Any] = {"name": "bytes", "model": "./neox"}
MISTRAL: dict[str, Any] = {"model": "./mistral", "template": "pivot"}
MERGES: dict[str, Any] = {
    "varm": {"merge_method": "varm", "dtype": "float32"},
    "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
    "slerp": {
        "merge_method": "slerp",
        "targets": ["bytes", "mistral"],
        "parameters": {"t": 0.5},
        "dtype": "float32",
    },
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.6}, "dtype": "float32"},
}
PIPELINE: dict[str, Any] = {
    "work": "work",
    "pivot": "./pivot",
    "data": "chats.jsonl",
    "sources": [BYTES, MISTRAL],
    "prepare": {"template": "openchat", "max_length": 256},
    "extract": {"top_k": 4, "shard_tokens": 300},
    "align": {"workers": 1},
    "train": {
        "clm_weight": 0.9,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    },
    "merges": MERGES,
    "evaluate": {"data": "held_out.jsonl"},
}
ADDED = {"name": "third", "model": "./mixtral", "template": "vicuna", "dtype": "float32"}
CHATS = tiny_sources.made_up_chats(12, seed=7, words=8, turns=2)
TITLES = [
    "prepare dialogues",
    *(f"extract {name}" for name in ("pivot", "bytes", "mistral")),
    *(f"{kind} {name}" for kind in ("align", "train") for name in ("bytes", "mistral")),
    *(f"merge {name}" for name in MERGES),
    "prepare held_out",
    *(
        f"evaluate {name}"
        for name in ("pivot", "source-bytes", "source-mistral", "target-bytes", "target-mistral")
    ),
    *(f"evaluate merge-{name}" for name in MERGES),
]


def changed(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings with some deep in them replaced, ``train__training__seed=3``; None leaves one out."""
    copy = json.loads(json.dumps(settings))
    for path, value in changes.items():
        *way, name = path.split("__")
        place = copy
        for step in way:
            place = place.setdefault(step, {})
        place[name] = value
        if value is None:
            del place[name]
    return copy


def write(folder: Path, settings: Mapping[str, Any] = PIPELINE, **changes: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(changed(settings, **changes), sort_keys=False))
    return path


TRAINED = {
    title for title in TITLES if title.startswith(("train", "merge")) or "target-" in title or "merge-" in title
}
MERGED = {title for title in TITLES if "merge" in title and "slerp" not in title}
"""What depends on all pairwise targets; slerp is between two that are named."""
SLERP = {"merge slerp", "evaluate merge-slerp"}


@functools.cache
def _checked(recipes: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.yaml" for number in range(len(recipes))]
        for path, text in zip(paths, recipes, strict=True):
            path.write_text(text)
        arguments = ["check", "--offline", "--json", *map(str, paths)]
        return CliRunner().invoke(varm_merge.cli.main, arguments).stdout


def check_in_process(command: Sequence[str]) -> str:
    """``varm-merge check --offline --json``, in place of ``output_of``: a process takes seconds to start."""
    assert command[:4] == ["varm-merge", "check", "--offline", "--json"]
    return _checked(tuple(Path(path).read_text() for path in command[4:]))


def make(folder: Path) -> Path:
    """Models, chats and held-out chats."""
    for number, (name, (layout, kind, settings)) in enumerate(MODELS.items()):
        tiny_sources.save_source(folder / name, layout, kind, seed=number, **SPEAKS[name], **settings)
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    held_out = tiny_sources.made_up_chats(6, seed=8, words=6, turns=1)
    tiny_sources.write_sharegpt(folder / "held_out.jsonl", held_out)
    path = folder / "held_out.jsonl"
    path.write_text(path.read_text().replace("chat-0", "sorting/0").replace("chat-3", "sorting/3"))
    return folder
