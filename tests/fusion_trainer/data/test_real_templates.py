"""What is learnt under the real chat templates of real tokenizers; ``make test-real`` runs it, with VARM_REAL set.

The oracle is transformers' own rendering of the generation prompt: an answer begins where that ends, and is what a
model would have to write from there on, up to the token that ends its turn.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from transformers import AutoTokenizer

from fusion_trainer.data.conversations import Message
from fusion_trainer.data.templates import Rendered, find_template
from fusion_trainer.text.tokenizer import TextTokenizer, supervised_positions

ROOT = Path(os.environ.get("VARM_REAL", "nothing"))
pytestmark = [pytest.mark.real, pytest.mark.skipif(not ROOT.is_dir(), reason="VARM_REAL names no folder")]

ENDS = {
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "gemini": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "smollm2-135m": "<|im_end|>",
}
DROPS_EARLIER_REASONING = {"qwen3"}
QUESTION, ANSWER = "How are you?", "Fine, thank you."
THOUGHT = "<think>\nThey are kind.\n</think>\n\nVery well."


def turns(*contents: str, system: str | None = None) -> list[Message]:
    head = [Message("system", system)] if system else []
    return [*head, *(Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents))]


CHATS = {
    "one turn": turns(QUESTION, ANSWER),
    "three turns": turns(QUESTION, ANSWER, "And you?", "Me too!", "Bye", "See you.\n\nSoon."),
    "a system turn": turns(QUESTION, ANSWER, "And you?", "Me too!", system="Be brief."),
    "other alphabets": turns("你好吗?", "很好，谢谢！🙂", "¿Y tú?", "e\u0301 — ﬁn\u00a0ami"),
    "code": turns("Code?", "```python\ndef f():\n    return 1\n```", "More", "  indented\n\n\nend"),
    "its own tokens": turns("<|im_end|> <end_of_turn> <|eot_id|>?", "I see <|im_end|>, <eos> and </s>."),
    "reasoning": turns(QUESTION, THOUGHT, "And you?", THOUGHT),
}


@cache
def tokenizer_of(name: str) -> Any:
    folder = ROOT / name if (ROOT / name).is_dir() else ROOT / "tokenizers" / name
    return AutoTokenizer.from_pretrained(folder)


def prompt_for(tokenizer: Any, messages: Sequence[Message], bos: str) -> str:
    """What stands before an answer when it is generated; without the BOS that the tokenizer adds itself."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(bos)


def render(name: str, messages: list[Message]) -> tuple[Any, Rendered]:
    tokenizer = tokenizer_of(name)
    return tokenizer, find_template(None, tokenizer, name).render(messages)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ENDS)
def test_an_answer_is_what_the_model_has_to_write_after_the_generation_prompt(name: str, chat: str) -> None:
    messages = CHATS[chat]
    tokenizer, rendered = render(name, messages)
    raw = rendered.text.encode()
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    bos = tokenizer.bos_token if adds_bos and tokenizer.bos_token else ""
    folded = messages
    if rendered.folded:
        folded = [Message("user", f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:]]
    places = [n for n, message in enumerate(folded) if message.role == "assistant"]
    assert len(rendered.spans) == len(places)
    for (start, stop), place in zip(rendered.spans, places, strict=True):
        written = raw[start:stop].decode()
        last = place == places[-1]
        content = folded[place].content
        if name in DROPS_EARLIER_REASONING and not last:
            content = content.rpartition("</think>")[2]
        assert raw[:start].decode() == prompt_for(tokenizer, folded[:place], bos) or not last
        assert written.endswith((content.strip() + ENDS[name], content + ENDS[name]))
        added = written.removesuffix(ENDS[name]).removesuffix(content).removesuffix(content.strip())
        assert added in ("", "<think>\n\n</think>\n\n")  # the reasoning that Qwen3 has to open


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ENDS)
def test_the_supervised_tokens_are_those_of_the_answers(name: str, chat: str) -> None:
    tokenizer, rendered = render(name, CHATS[chat])
    (tokens,) = TextTokenizer(tokenizer, name).encode([rendered.text])
    learnt = tokens.ids[supervised_positions(tokens, rendered.spans) + 1].tolist()
    raw = rendered.text.encode()
    decoded = normalize("NFC", tokenizer.decode(learnt, clean_up_tokenization_spaces=False))
    answers = (normalize("NFC", raw[start:stop].decode()) for start, stop in rendered.spans)
    # Qwen3 composes letters; the first token of an answer may take the line break before it along
    assert re.fullmatch("".join(rf"\s*{re.escape(answer)}" for answer in answers), decoded)
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    assert learnt.count(end) >= len(rendered.spans)
    assert learnt[-1] == end


@pytest.mark.parametrize("name", ENDS)
def test_reasoning_that_a_template_drops_is_counted(name: str) -> None:
    _, rendered = render(name, CHATS["reasoning"])
    lost = rendered.left_out.get("parts of answers (reasoning)", 0)
    assert (lost > 0) == (name in DROPS_EARLIER_REASONING)
    separate = [
        Message("user", QUESTION),
        Message("assistant", ANSWER, extra={"reasoning_content": "They are kind."}),
    ]
    _, rendered = render(name, separate)
    assert ("They are kind." in rendered.text) != ("reasoning" in rendered.left_out)
