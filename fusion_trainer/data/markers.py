"""The text that a chat template writes around answers: the generation prompt, and the marker that ends an answer.

Both are found by rendering two exchanges of made-up words, so no list of known markers is needed.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fusion_trainer.data.conversations import Message

__all__ = ["Markers", "TemplateError", "common_start"]

PROBES = USER, ANSWER, USER_AGAIN, LAST_ANSWER = [f"\ue000{number}\ue000" for number in range(4)]
EXCHANGES = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(PROBES)]
SYSTEM: list[Message] = [Message("system", "\ue0009\ue000")]
ACCEPTED_BY_MOST: tuple[tuple[list[Message], int], ...] = (([], 4), (SYSTEM, 4), ([], 2), (SYSTEM, 2))
"""Conversations to try in this order: some templates demand a system turn, or accept one exchange only."""


class TemplateError(Exception):
    """Why a template refuses a conversation."""


class Markers:
    """The added tokens of a tokenizer, and what one template writes around answers.

    Attributes:
        special: The tokens that are marked as special.
        take_space_after: The tokens that swallow the white space after them.
        prompt: The generation prompt.
        between: The marker after an answer that another turn follows.
        last: The marker after the last answer.
    """

    def __init__(self, tokenizer: Any, apply: Callable[..., str]) -> None:
        tokens = tokenizer.added_tokens_decoder
        self.ids = {token.content: number for number, token in tokens.items()}
        self.special = {token.content for token in tokens.values() if token.special}
        self.take_space_after = {token.content for token in tokens.values() if token.rstrip}
        self._ends = _possible_ends({name for name in self.ids if name.strip()}, tokenizer)
        any_end = f"(?:{'|'.join(map(re.escape, self._ends)) or '(?!)'})"
        self._any_end = re.compile(any_end)
        self._end_ahead = re.compile(rf"\s*{any_end}")
        self._only_ends = re.compile(rf"{any_end}+\s*")
        self._eos = tokenizer.eos_token or "\0"
        self.prompt, self.between, self.last = "", "", ""
        self._probe(apply, tokenizer.bos_token or "")

    @property
    def end_ids(self) -> list[int]:
        """Ids of the single tokens that end an answer, that of an earlier answer first."""
        tokens = [tokens[-1] for tokens in map(self.tokens_in, (self.between, self.last)) if tokens]
        return list(dict.fromkeys(self.ids[token] for token in tokens))

    def tokens_in(self, text: str) -> list[str]:
        """The tokens in a text that may end an answer."""
        return self._any_end.findall(text)

    def token_at_end_of(self, text: str) -> str:
        """The special token that a text ends with, or EOS and the tokens after it; empty if there is none."""
        eos, after = text.rstrip().rpartition(self._eos)[1:]
        if eos and self._only_ends.fullmatch(after):
            return eos + after
        return next((end for end in self._ends if end in self.special and text.rstrip().endswith(end)), "")

    def token_ahead(self, text: str, closing: str = "") -> str | None:
        """The token that a text begins with and that may end an answer, with the white space before it.

        Args:
            text: What follows an answer.
            closing: What follows the last answer. If that is nothing but several tokens, they are one marker. EOS
                ends it: Command R7B always writes the header of the next answer.
        """
        ahead = self._end_ahead.match(text)
        if not ahead or ahead[0].strip() in self.prompt:
            return None
        marker = closing.strip()
        marker = marker[: marker.rfind(self._eos) + len(self._eos)] if self._eos in marker else marker
        if self._only_ends.fullmatch(closing) and text.strip().startswith(marker):
            return text[: text.find(marker) + len(marker)]
        return ahead[0]

    def _probe(self, apply: Callable[..., str], bos: str) -> None:
        for system, turns in ACCEPTED_BY_MOST:
            with suppress(TemplateError):
                text = apply([*system, *EXCHANGES[:turns]])
                question = apply([*system, EXCHANGES[0]])
                with_prompt = apply([*system, EXCHANGES[0]], prompt=True)
                break
        else:
            return
        if with_prompt.startswith(question):
            self.prompt = with_prompt.removeprefix(question)
        after_answer = text.partition(ANSWER)[2]
        if turns == 2:
            self.last = self.token_ahead(after_answer) or ""
        elif all(probe in text for probe in PROBES[:3]):
            header = text.partition(USER)[0].removeprefix(bos)
            before_last, _, closing = text.partition(LAST_ANSWER)
            self.between = self._marker_between(after_answer.partition(USER_AGAIN)[0], closing, header)
            self.last = self._marker_of_last(before_last, closing)

    def _marker_between(self, between: str, closing: str, header: str) -> str:
        """The marker in the text between an answer and the next turn of the user."""
        if (marker := self.token_ahead(between, closing)) is not None:
            return marker
        if header.strip() and between.endswith(header):
            return between.removesuffix(header).rstrip()
        return common_start(between, closing).rstrip()

    def _marker_of_last(self, before: str, closing: str) -> str:
        """The marker in the text after the last answer, which may also be the header of the next answer."""
        if (marker := self.token_ahead(closing, closing)) is not None:
            return marker
        if self.between and closing.startswith(self.between):
            return self.between
        is_header = common_start(closing[::-1], before[::-1]).strip()
        return "" if is_header else closing.rstrip()


def _possible_ends(names: set[str], tokenizer: Any) -> list[str]:
    """The added tokens that may end an answer, longest first: not BOS, nor the tags of a pair (``<a></a>``)."""
    tags = {tag for name in names if (closing := f"</{name[1:]}") in names for tag in (name, closing)}
    ends = (names - tags - {tokenizer.bos_token}) | (names & {tokenizer.eos_token})
    return sorted(ends, key=len, reverse=True)


def common_start(text: str, other: str) -> str:
    """The characters that two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return text[: next((place for place, (a, b) in pairs if a != b), min(len(text), len(other)))]
