"""A tiny run really learns: from a source with a skill the pivot lacks it gets more of the skill than by CLM.

The skill is to answer a colour with words drawn from a distribution of that colour's own. Many answers are right,
the one in the data is one of them: gold tokens alone teach that one, the source's distributions teach all of them.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_fusion
import tiny_sources
import tiny_tokenizers
import torch

from fusion_trainer.alignment.align import align
from fusion_trainer.config import AlignConfig, TrainConfig
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.training.train import train

pytestmark = pytest.mark.slow

COLOURS = ["red", "green", "blue", "white", "black", "pink", "brown", "gold"]
THINGS = ["fox", "dog", "cat", "owl", "bear", "wolf", "frog", "fish", "bird", "ant"]
WORDS = 8
ROLES = ("user", "assistant")
SEEDS, WEIGHTS = (1, 2, 3), (1.0, 0.9, 0.5)
TEXT = [" ".join([*COLOURS, *THINGS]), "GPT4 Correct User: GPT4 Correct Assistant: user assistant"] * 20
Chat = list[tuple[str, str]]


def likelihoods(colour: str) -> list[float]:
    """Of the words that answer a colour: a few are likely, all are possible."""
    return [3.0 ** -random.Random(f"{colour} {thing}").uniform(0, 4) for thing in THINGS]


def skilled(number: int, rng: random.Random) -> list[Chat]:
    """Conversations of the skill."""
    colours = [rng.choice(COLOURS) for _ in range(number)]
    return [[(colour, " ".join(rng.choices(THINGS, likelihoods(colour), k=WORDS)))] for colour in colours]


def unskilled(number: int, rng: random.Random) -> list[Chat]:
    """What the pivot knows: to say a thing again and again."""
    return [[(thing, " ".join([thing] * WORDS))] for thing in rng.choices(THINGS, k=number)]


def taught(
    folder: Path, layout: str, kind: str, speaks: dict[str, Any], chats: Sequence[Chat], **own: Any
) -> Path:
    """A model that was trained on conversations in its own template, with a tokenizer of its own."""
    tokenizer = tiny_tokenizers.train(kind, TEXT, 400, speaks["special"])
    tokenizer.chat_template = speaks.get("template")
    tokenizer.save_pretrained(folder)
    model = tiny_sources.new_source(layout, len(tokenizer), initializer_range=0.05, **own).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    texts = [rendered(tokenizer, chat) for chat in chats]
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


def rendered(tokenizer: Any, chat: Chat) -> str:
    """In the tokenizer's chat template, or else as OpenChat."""
    if tokenizer.chat_template is None:
        return tiny_sources.openchat(chat)[0]
    turns = [{"role": role, "content": text} for pair in chat for role, text in zip(ROLES, pair, strict=True)]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("masters"), random.Random(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    openchat, chatml = tiny_fusion.OPENCHAT, tiny_fusion.CHATML
    pivot, source = {**small, "num_key_value_heads": 1}, {**small, "num_hidden_layers": 2}
    taught(folder / "pivot", "llama", "sentencepiece_bpe", openchat, unskilled(1500, rng), **pivot)
    taught(folder / "source", "gpt_neox", "byte_level_bpe", chatml, skilled(8000, rng), **source)
    return folder


def held_out_losses(masters: Path, folder: Path, seed: int) -> dict[float, float]:
    """The loss on the held-out half of 96 conversations, by λ."""
    folder.mkdir()
    for name in ("pivot", "source"):
        (folder / name).symlink_to(masters / name)
    tiny_sources.write_sharegpt(folder / "chats.jsonl", skilled(96, random.Random(seed)))
    for name in ("pivot", "source"):
        tiny_fusion.extract_store(folder, name)
    stores = {name: folder / "stores" / name for name in ("pivot", "source")}
    align(
        AlignConfig(
            source_store=stores["source"], pivot_store=stores["pivot"], output=folder / "aligned", workers=1
        )
    )
    pivot, source = (
        torch.tensor([float(row.gold_logprob.mean()) for row in RepresentationStore(stores[name])])
        for name in stores
    )
    assert (source > pivot).all(), "the pivot has the skill"
    assert (source - pivot).mean() > 0.5
    found = {}
    for weight in WEIGHTS:
        training = {
            **tiny_fusion.QUIET,
            "output_dir": str(folder / f"target-{weight}"),
            "num_train_epochs": 12,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1000,
            "seed": seed,
        }
        target = train(
            TrainConfig(
                pivot=str(folder / "pivot"),
                pivot_store=stores["pivot"],
                aligned_stores=[folder / "aligned"],
                clm_weight=weight,
                held_out=0.5,
                training=training,
            )
        )
        found[weight] = json.loads((target / "fusion.json").read_text())["results"]["eval_clm"]
    return found


def test_fused_from_a_skilled_source_the_pivot_learns_more_than_from_the_gold_tokens(
    masters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same steps, for every seed of data and training."""
    losses = torch.tensor([list(held_out_losses(masters, tmp_path / str(s), s).values()) for s in SEEDS])
    gains = losses[:, :1] - losses[:, 1:]
    with capsys.disabled():
        print(f"\nheld-out loss of the skill, mean ± standard deviation over {len(SEEDS)} seeds:")
        for number, weight in enumerate(WEIGHTS):
            print(f"  λ = {weight}: {losses[:, number].mean():.3f} ± {losses[:, number].std():.3f}", end="")
            gain = gains[:, number - 1]
            print(f", less by {gain.mean():.3f} ± {gain.std():.3f}" if number else " (CLM alone)")
    assert (gains > 0).all(), gains
    assert (gains[:, 1] > gains[:, 0]).all(), gains
