"""Queries a model behind an OpenAI-compatible endpoint.

The openai client retries timeouts, lost connections and the statuses 408, 409, 429 and 5xx. Replies without text
are treated like a 5xx, unless they were cut. All tries keep to the rate limits and wait as long as ``Retry-After``
says. The key is read from the environment and removed from every message.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import Any
from urllib.parse import urlsplit

from varm_common.endpoints import checked_url, key_from, without_key
from varm_common.errors import UserError

__all__ = ["CUT", "Endpoint", "Failed", "Reply", "Usage", "estimated_tokens"]

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
NO_KEY = "none"
"""The key that is sent to an endpoint that needs none."""
NO_KEY_SENT = (
    f"\nNo key was sent: {OPENAI_KEY} is only used for {OPENAI_HOST}. Name the variable with this endpoint's key "
    "with --judge-key-env, or with --key-env for answers."
)
NEW_LIMIT = "max_completion_tokens"
"""OpenAI's newer models take this in place of ``max_tokens``, and say so."""
BROKEN_REPLY = 599
"""The status that a reply without text is given."""
CUT = ("length", "content_filter")
"""What cuts a reply. If the model was still reasoning, it has no text; another try would end the same way."""
LONGEST_WAIT_SECONDS = 120
"""The client does not retry a request when the server wants it to wait longer."""
BYTES_PER_TOKEN = 4
"""For estimates; tokenizers differ."""
Messages = Sequence[Mapping[str, str]]


class Failed(ValueError):  # noqa: N818  the outcome of a request
    """One request has no answer; other requests may have one."""


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and the whole choice as the endpoint sent it."""

    text: str
    choice: dict[str, Any]
    total_tokens: int
    seconds: float


@dataclass
class Usage:
    """Requests and tokens: an upper estimate before, what the endpoint counted after (or left ``uncounted``)."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0


def estimated_tokens(messages: Messages) -> int:
    """Estimate the tokens of a prompt, one for every four bytes."""
    return sum(len(message["content"].encode(errors="replace")) // BYTES_PER_TOKEN + 4 for message in messages)


class Endpoint:
    """A model behind ``/chat/completions``; ``used`` is what the endpoint has counted.

    The arguments are the options of ``varm-merge evaluate judge``; ``key_variable`` names an environment variable.

    Raises:
        UserError: The URL is invalid, or the key or the openai package is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 120,
        max_retries: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("endpoints need the openai package: pip install openai") from error
        parts = urlsplit(checked_url(url, "the endpoint's URL"))
        if key_variable is None and (parts.scheme, parts.hostname) == ("https", OPENAI_HOST):
            key_variable = OPENAI_KEY
        self.url, self.model, self.used = url, model, Usage()
        self._key = key_from(key_variable, url)
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_start = 0.0
        self._limit = "max_tokens"
        self._lock = threading.Lock()
        http = openai.DefaultHttpxClient(event_hooks={"request": [self._wait], "response": [self._classify]})
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key or NO_KEY, timeout=timeout, max_retries=max_retries, http_client=http
        )

    def _wait(self, request: Any) -> None:
        """Delay a try until the rate limits allow it."""
        body = json.loads(request.content)
        tokens = estimated_tokens(body["messages"]) + (body.get("max_tokens") or body.get(NEW_LIMIT) or 0)
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next_start:
                    self._next_start = now + max(self._seconds_per_request, tokens * self._seconds_per_token)
                    return
                delay = self._next_start - now
            time.sleep(delay)

    def _classify(self, response: Any) -> None:
        """Retry a reply without text, but not when the account has no money; let all wait for ``Retry-After``."""
        response.read()
        if response.is_success:
            try:
                choice = response.json()["choices"][0]
                has_text = isinstance(choice["message"]["content"], str) or choice["finish_reason"] in CUT
            except (ValueError, LookupError, TypeError):
                has_text = False
            if not has_text:
                response.status_code = BROKEN_REPLY
        elif "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"
        wait = _retry_after_seconds(response.headers.get("retry-after", ""))
        if wait <= LONGEST_WAIT_SECONDS:
            with self._lock:
                self._next_start = max(self._next_start, time.monotonic() + wait)

    def ask(self, messages: Messages, max_tokens: int, **settings: Any) -> Reply:
        """Get an answer.

        Raises:
            Failed: This request has no answer.
            UserError: The endpoint will take no request: wrong key, model or URL.
        """
        import openai

        began, limit = time.monotonic(), self._limit
        try:
            reply = self._client.chat.completions.create(
                model=self.model, messages=list(messages), **{limit: max_tokens}, **settings
            )
        except openai.APIStatusError as error:
            message = error.body.get("message", error.body) if isinstance(error.body, dict) else error.message
            reason = f"{error.status_code} {without_key(str(message), self._key)}"
            if error.status_code == 400 and NEW_LIMIT in reason and limit != NEW_LIMIT:
                self._limit = NEW_LIMIT
                return self.ask(messages, max_tokens, **settings)
            if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
                hint = NO_KEY_SENT if error.status_code == 401 and not self._key else ""
                raise UserError(f"{self.url} accepts no request for `{self.model}`: {reason}{hint}") from None
            if error.status_code == BROKEN_REPLY:  # OpenRouter, for one, sends errors with status 200
                sent = f": {reason.partition(' ')[2]}" if isinstance(error.body, dict) else ""
                reason = f"the replies have no text{sent}"
            raise Failed(reason) from None
        except openai.APIError as error:
            raise Failed(without_key(str(error), self._key)) from None
        choice, usage = reply.choices[0].model_dump(), reply.usage
        with self._lock:
            self.used.requests += 1
            self.used.prompt_tokens += (usage and usage.prompt_tokens) or 0
            self.used.completion_tokens += (usage and usage.completion_tokens) or 0
            self.used.uncounted += usage is None
        total = (usage and usage.total_tokens) or 0
        return Reply(choice["message"]["content"] or "", choice, total, time.monotonic() - began)


def _retry_after_seconds(header: str) -> float:
    """Seconds to wait by ``Retry-After``, a number or a date (RFC 9110, section 10.2.3); 0 without one."""
    try:
        return float(header)
    except ValueError:
        date = parsedate_tz(header)
        return mktime_tz(date) - time.time() if date else 0.0
