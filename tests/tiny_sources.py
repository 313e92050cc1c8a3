"""Tiny random causal language models with a trained tokenizer beside them, and chats for them to read.

Weights are wide, so that distributions are far from uniform and no two tokens are equally likely.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

END_OF_TURN = "<|end_of_turn|>"
CONTEXT = 1024
TEXT = """sort the numbers please hello answer is fox dog add return 1 2 3 quick brown jumps over lazy assistant
user thank you fine def two spaces café Grüße 日本語 你好 🙂 🚀 (a, b): it's"""
WORDS = TEXT.split()

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}

LAYOUTS: dict[str, Callable[..., PretrainedConfig]] = {
    "cohere": lambda **own: transformers.CohereConfig(**{**GROUPED, "logit_scale": 0.25, **own}),
    "gemma": lambda **own: transformers.GemmaConfig(**{**HEADS, "tie_word_embeddings": True, **own}),
    "gemma2": lambda **own: transformers.Gemma2Config(
        **{**HEADS, "final_logit_softcapping": 2.0, "sliding_window": 16, "tie_word_embeddings": True, **own}
    ),
    "gpt_neox": lambda **own: transformers.GPTNeoXConfig(**{**DECODER, **own}),
    "granite": lambda **own: transformers.GraniteConfig(**{**GROUPED, "logits_scaling": 3.0, **own}),
    "llama": lambda **own: transformers.LlamaConfig(**{**GROUPED, **own}),
    "mistral": lambda **own: transformers.MistralConfig(**{**HEADS, **own}),
    "mixtral": lambda **own: transformers.MixtralConfig(**{**HEADS, "num_local_experts": 3, **own}),
    "mpt": lambda **own: transformers.MptConfig(
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": CONTEXT, **own},
        initializer_range=0.3,
    ),
    "qwen2": lambda **own: transformers.Qwen2Config(**{**GROUPED, "tie_word_embeddings": True, **own}),
}


def new_source(layout: str, vocabulary: int, seed: int = 0, **own: Any) -> PreTrainedModel:
    """A model of ``layout`` with random weights, the same at every call; ``own`` are settings of its config."""
    torch.manual_seed(seed)
    config = LAYOUTS[layout](vocab_size=vocabulary, **own)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_source(
    folder: Path,
    layout: str,
    kind: str,
    *,
    special: Sequence[str] = (),
    padded: int = 0,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    **own: Any,
) -> Path:
    """Save a model and its tokenizer as a checkpoint folder.

    Args:
        folder: Where.
        layout: One of ``LAYOUTS``.
        kind: One of ``tiny_tokenizers.KINDS``.
        special: Tokens that only this tokenizer has.
        padded: Rows of the model beyond the tokenizer's ids.
        template: The tokenizer's chat template.
        dtype: Of the saved weights.
        own: Settings of the model's config.
    """
    tokenizer = tiny_tokenizers.train(kind, special=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    new_source(layout, len(tokenizer) + padded, **own).to(dtype).save_pretrained(folder)
    return folder


def made_up_chats(number: int, seed: int = 0, words: int = 30, turns: int = 3) -> list[list[tuple[str, str]]]:
    """Conversations as (question, answer) pairs: up to ``turns`` pairs of up to ``words`` words a side."""
    rng = random.Random(seed)

    def said() -> str:
        return rng.choice((" ", "  ", "\n")).join(rng.choices(WORDS, k=rng.randint(1, words)))

    return [[(said(), said()) for _ in range(rng.randint(1, turns))] for _ in range(number)]


def write_sharegpt(path: Path, chats: Sequence[Sequence[tuple[str, str]]]) -> Path:
    """A ShareGPT file, one conversation a line, with the ids ``chat-0``, ``chat-1``, …"""
    with path.open("w", encoding="utf-8") as file:
        for number, chat in enumerate(chats):
            turns = [
                {"from": who, "value": text}
                for pair in chat
                for who, text in zip(("human", "gpt"), pair, strict=True)
            ]
            row = {"id": f"chat-{number}", "conversations": turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def openchat(chat: Sequence[tuple[str, str]], ends: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as OpenChat writes it, and the assistant's bytes, with the ``ends`` of turn."""
    text, spans = b"", []
    for question, answer in chat:
        text += f"GPT4 Correct User: {question}{END_OF_TURN}GPT4 Correct Assistant: ".encode()
        start, text = len(text), text + answer.encode()
        spans.append((start, len(text) + (len(END_OF_TURN) if ends else 0)))
        text += END_OF_TURN.encode()
    return text.decode(), spans
