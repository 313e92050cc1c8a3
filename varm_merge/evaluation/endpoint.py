"""A model behind an OpenAI-compatible endpoint, asked patiently.

Requests are paced so that the limits hold, retried where a later try may succeed, and counted as the endpoint
counts them. The key is read from the environment and cut out of everything that is said.
"""

import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from varm_merge.errors import VarmError

__all__ = ["DEFAULT_KEY", "OPENAI", "Endpoint", "Failed", "Judged", "Load", "Reply", "in_parallel"]

OPENAI, DEFAULT_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
NO_KEY = "none"
"""What is sent to an endpoint that wants no key."""
NO_KEY_SENT = (
    f"\nNo key was sent: {DEFAULT_KEY} is for api.openai.com alone. Name the variable with this endpoint's key by "
    "--judge-key-env, or by --key-env for answers."
)
NEW_LIMIT = "max_completion_tokens"
"""What OpenAI's newer models want in place of ``max_tokens``, which all others know; they say so."""
LONGEST_BACKOFF_SECONDS, LONGEST_WAIT_SECONDS = 60.0, 600.0
"""Between two tries; and what a server may ask for."""
BYTES_PER_TOKEN = 4
"""For estimates; tokenizers differ."""
Message = Mapping[str, str]


class Failed(ValueError):  # noqa: N818  what came of a request
    """A request to which there is no answer; others may have one."""


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and the whole choice as the endpoint sent it."""

    text: str
    choice: dict[str, Any]
    total_tokens: int
    seconds: float


@dataclass
class Load:
    """What is asked of an endpoint: before, an estimate with the most there can be; after, what it has counted."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Requests whose tokens the endpoint did not tell."""

    def add(self, messages: Sequence[Message], max_tokens: int) -> None:
        """A request that is to be made."""
        self.requests += 1
        self.prompt_tokens += estimated_tokens(messages)
        self.completion_tokens += max_tokens

    def price(self, price_in: float, price_out: float) -> float:
        """Dollars, at prices for a million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


@dataclass
class Judged:
    """What came of it: judgments that were there, new ones, those without rating, failures by request."""

    there: int
    asked: int
    unrated: int
    failed: dict[str, str]


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Of a prompt, a token for every four bytes."""
    return sum(
        len(message["content"].encode(errors="replace")) // BYTES_PER_TOKEN + BYTES_PER_TOKEN
        for message in messages
    )


class _Pace:
    """At most so many requests, and tokens, a minute, evenly spread; none while the server asks for patience."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + max(self._request, tokens * self._token)
                    return
                delay = self._next - now
            time.sleep(delay)

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
    """A model behind ``/chat/completions``.

    Args:
        url: Up to and without ``/chat/completions``.
        model: By its name there.
        key_variable: The environment variable that has the key; by default ``OPENAI_API_KEY`` for OpenAI, which
            alone is sent it, and none for others.
        timeout: Seconds for one try.
        max_retries: Tries after the first.
        requests_per_minute: At most; tries count.
        tokens_per_minute: At most, of the prompt's estimate and all that an answer may have.

    Attributes:
        used: What the endpoint has counted.

    Raises:
        VarmError: The URL is none.
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
        self.url, self.model, self.max_retries = _sound(url), model, max_retries
        self._key_variable, self._timeout = key_variable, timeout
        if key_variable is None and _is_openai(url):
            self._key_variable = DEFAULT_KEY
        self._key = os.environ.get(self._key_variable, "").strip() if self._key_variable else ""
        self._client: Any = None
        self._pace = _Pace(requests_per_minute, tokens_per_minute)
        self._lock = threading.Lock()
        self._limit = "max_tokens"
        self.used = Load()

    def open(self) -> None:
        """Get ready to ask; must be called before.

        Raises:
            VarmError: There is no key, or no client for the protocol.
        """
        try:
            import openai
        except ImportError as error:
            raise VarmError("endpoints need the openai package: pip install 'varm-merge[judge]'") from error
        if self._key_variable and not self._key:
            raise VarmError(f"{self.url} needs a key: set the environment variable {self._key_variable}")
        self._client = openai.OpenAI(
            base_url=self.url, api_key=self._key or NO_KEY, timeout=self._timeout, max_retries=0
        )

    def ask(self, messages: Sequence[Message], max_tokens: int, **settings: Any) -> Reply:
        """An answer; tried again after what may pass.

        Raises:
            Failed: None came, or the endpoint does not take this request.
            VarmError: The endpoint will take no request: wrong key, model or URL.
        """
        for tried in range(self.max_retries + 1):
            self._pace.wait(estimated_tokens(messages) + max_tokens)
            problem, wait = self._try(messages, max_tokens, settings)
            if isinstance(problem, Reply):
                return problem
            if tried == self.max_retries:
                break
            if wait is not None:
                if wait > LONGEST_WAIT_SECONDS:
                    raise Failed(f"{problem}; it asks for patience of {wait:.0f} s")
                self._pace.hold(wait)
            backoff = min(LONGEST_BACKOFF_SECONDS, 0.5 * 2**tried) * random.uniform(0.5, 1)
            time.sleep(max(backoff, wait or 0))
        raise Failed(f"{problem} ({self.max_retries + 1} tries)")

    def _try(
        self, messages: Sequence[Message], max_tokens: int, settings: Mapping[str, Any]
    ) -> tuple[Reply | str, float | None]:
        """A reply; or what went wrong, and the seconds that the server asks to wait."""
        import openai

        try:
            began, limit = time.monotonic(), self._limit
            reply = self._client.chat.completions.create(
                model=self.model, messages=list(messages), **{limit: max_tokens}, **settings
            )
            return self._read(reply, time.monotonic() - began), None
        except openai.APITimeoutError:
            return "no answer in time", None
        except openai.APIStatusError as error:
            told = f"{error.status_code} {self._told(error.body or error.message)}"
            if error.status_code == 400 and NEW_LIMIT in told and limit != NEW_LIMIT:
                self._limit = NEW_LIMIT
                return told, None
            if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
                hint = NO_KEY_SENT if error.status_code == 401 and not self._key else ""
                raise VarmError(f"{self.url} takes no request for `{self.model}`: {told}{hint}") from None
            if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                raise Failed(told) from None
            return told, _retry_after(error.response.headers)
        except (openai.APIError, ValueError, AttributeError, TypeError, LookupError) as error:
            return f"{type(error).__name__}: {self._told(error)}", None  # no connection, or a broken reply

    def _told(self, message: Any) -> str:
        """What went wrong, on a line, and without the key."""
        text = str(message.get("message", message) if isinstance(message, dict) else message)
        line = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return line if len(line) <= 200 else f"{line[:200]}…"

    def _read(self, reply: Any, seconds: float) -> Reply:
        choice = reply.choices[0].model_dump()
        text = choice["message"]["content"]
        used = reply.usage
        with self._lock:
            self.used.requests += 1
            self.used.prompt_tokens += (used and used.prompt_tokens) or 0
            self.used.completion_tokens += (used and used.completion_tokens) or 0
            self.used.uncounted += used is None
        if not isinstance(text, str):
            raise ValueError("an answer without text")
        return Reply(text, choice, (used and used.total_tokens) or 0, seconds)


def _sound(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise VarmError("the endpoint's URL must begin with http:// or https:// and a host")
    if parts.username or parts.password or parts.query:
        raise VarmError("the endpoint's URL has a key in it; set it in the environment, where nothing prints it")
    return url


def _is_openai(url: str) -> bool:
    parts, own = urlsplit(url), urlsplit(OPENAI)
    return (parts.scheme, parts.hostname) == (own.scheme, own.hostname)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


Job = TypeVar("Job")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Job], Result], jobs: Sequence[Job], threads: int
) -> Iterator[tuple[Job, Result | Failed]]:
    """Each job with what came of it, as they end; jobs that have not begun are dropped when the caller stops.

    Raises:
        Exception: Whatever a job raises but ``Failed``.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Result | BaseException]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def worker() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((job, work(job)))
            except BaseException as error:
                done.put((job, error))

    for _ in range(min(threads, len(jobs))):  # daemons: Ctrl-C does not wait for an answer
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in jobs:
            job, result = done.get()
            if isinstance(result, BaseException) and not isinstance(result, Failed):
                raise result
            yield job, result
    finally:
        while not waiting.empty():
            try:
                waiting.get_nowait()
            except queue.Empty:
                break
