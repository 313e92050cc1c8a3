"""A tiny fusion ready to be trained: a pivot, two sources of other kinds, their stores, and trainers for them.

Made by the real programs, from conversations whose answers differ much in length. The pivot speaks OpenChat; one
source is queried in its own template, ChatML, the other reads the pivot's text.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_sources
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainingArguments

from fusion_trainer.alignment.align import align
from fusion_trainer.config import AlignConfig, ExtractConfig, TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.templates import FOLDER
from fusion_trainer.representations.extract import extract
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from fusion_trainer.training.batches import Collator, FusionData, TokenFile, write_tokens
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.trainer import FusionTrainer

CHATS = tiny_sources.made_up_chats(20, seed=5, words=30, turns=2)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PIVOT = {"num_key_value_heads": 1, "max_position_embeddings": 512, **SMALL}
SOURCES = {"bytes": ("gpt_neox", "byte_level_bpe"), "unigram": ("mistral", "unigram")}
OPENCHAT = {"special": (tiny_sources.END_OF_TURN,)}
"""Of a model that speaks OpenChat where it is told to."""
CHATML = {
    "special": ("<|im_start|>", "<|im_end|>"),
    "template": (FOLDER / "chatml.jinja").read_text(encoding="utf-8"),
}
"""Of a model that speaks ChatML by itself."""
SPEAKS: dict[str, dict[str, Any]] = {"pivot": OPENCHAT, "bytes": CHATML, "unigram": {}}
SOURCE_TEMPLATES = {"unigram": "pivot"}
"""Of sources that are not queried in their own template."""
STORES = {"none": [], "pairwise": ["bytes"], "multi": ["bytes", "unigram"]}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}


@dataclass(frozen=True)
class World:
    """Folders ``pivot`` and ``<source>``, ``stores/<model>``, ``aligned/<source>``; for reading only."""

    folder: Path

    @functools.cached_property
    def dialogues(self) -> Dialogues:
        return Dialogues(next((self.folder / "stores").glob("dialogues-*")))

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self.folder / "pivot", "pivot", False)

    @functools.cached_property
    def tokens(self) -> Path:
        return write_tokens(self.dialogues, self.tokenizer)

    def stores(self, kind: str = "pairwise") -> list[RepresentationStore]:
        """The pivot's own store and the aligned ones; none at all for ``none``."""
        aligned = [self.folder / "aligned" / name for name in STORES[kind]]
        own = [self.folder / "stores" / "pivot"] if aligned else []
        return [RepresentationStore(folder) for folder in (*own, *aligned)]

    def settings(self, output: Path, kind: str = "pairwise", **changed: Any) -> dict[str, Any]:
        """Of a ``TrainConfig``; ``training`` in ``changed`` is added to short runs that write no checkpoints."""
        training = {"output_dir": str(output), **QUIET, **STEPS, **changed.pop("training", {})}
        stores = {
            "pivot_store": str(self.folder / "stores" / "pivot") if STORES[kind] else None,
            "aligned_stores": [str(self.folder / "aligned" / name) for name in STORES[kind]],
            "dialogues": str(self.dialogues.folder),
        }
        found = {"pivot": str(self.folder / "pivot"), **stores, "clm_weight": 0.5, **changed, "training": training}
        return {name: value for name, value in found.items() if value is not None}

    def config(self, output: Path, kind: str = "pairwise", **changed: Any) -> TrainConfig:
        return TrainConfig(**self.settings(output, kind, **changed))

    def data(
        self, kind: str = "pairwise", groups: Sequence[Sequence[int]] | None = None, rule: Rule | None = None
    ) -> FusionData:
        every = [[block] for block in range(len(self.dialogues))]
        return FusionData(self.tokens, self.stores(kind), rule or Rule(), every if groups is None else groups)

    def model(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "pivot")

    def trainer(
        self,
        output: Path,
        data: Any = None,
        *,
        held_out: Any = None,
        model: Any = None,
        collator: Collator | None = None,
        models: Sequence[str] = ("pivot", "bytes"),
        clm_weight: float = 0.5,
        schedule: Any = "constant",
        **arguments: Any,
    ) -> FusionTrainer:
        """A trainer of the pivot on ``data``, or on all rows pairwise."""
        return FusionTrainer(
            self.model() if model is None else model,
            TrainingArguments(
                **{"output_dir": str(output), **QUIET, **STEPS, "remove_unused_columns": False, **arguments}
            ),
            self.data() if data is None else data,
            held_out,
            collator or Collator(0),
            clm_weight=clm_weight,
            schedule=schedule,
            models=models,
            name_block=lambda block: f"block {block}: {self.dialogues[block].conversation}",
        )

    @property
    def supervised(self) -> list[int]:
        """Supervised tokens of each block."""
        file = TokenFile(self.tokens)
        return [len(file[block].positions) for block in range(len(self.dialogues))]


def make(folder: Path) -> World:
    """The world, by ``extract`` and ``align``; some seconds."""
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    tiny_sources.save_source(folder / "pivot", "llama", "sentencepiece_bpe", **SPEAKS["pivot"], **PIVOT)
    for number, (name, (layout, kind)) in enumerate(SOURCES.items()):
        tiny_sources.save_source(folder / name, layout, kind, seed=number + 1, **SPEAKS[name])
    for name in ("pivot", *SOURCES):
        extract_store(folder, name)
    for name in SOURCES:
        align(
            AlignConfig(
                source_store=folder / "stores" / name,
                pivot_store=folder / "stores" / "pivot",
                output=folder / "aligned" / name,
                workers=1,
            )
        )
    return World(folder)


def extract_store(folder: Path, name: str, **changed: Any) -> RepresentationStore:
    settings = {
        "data": [str(folder / "chats.jsonl")],
        "pivot": str(folder / "pivot"),
        "template": "openchat",
        "source_template": SOURCE_TEMPLATES.get(name, "own"),
        "model": str(folder / name),
        "output": folder / "stores" / name,
    }
    return extract(ExtractConfig(**{**settings, **changed}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint's safetensors file."""
    return load_file(folder / "model.safetensors")


def moved(model: Any, start: Any) -> dict[str, torch.Tensor]:
    """How far training has moved each weight."""
    before = dict(start.named_parameters())
    return {name: (weight - before[name]).detach() for name, weight in model.named_parameters()}


def far_apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two updates, as a share of the first's."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (difference / sum(float(update.double().square().sum()) for update in one.values())) ** 0.5
