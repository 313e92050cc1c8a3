"""Has answers judged: sends the requests that are still open, and keeps each judgment when it arrives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from varm_merge.evaluation.endpoint import Endpoint, Failed, Reply, Usage, in_parallel

__all__ = ["Judging", "Outcome", "judge"]


class Request(Protocol):
    """Something to judge: its name in messages, and the prompt of the judge."""

    @property
    def name(self) -> str: ...
    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...


@dataclass(frozen=True)
class Judging:
    """A file of judgments that is being written.

    Attributes:
        requests: What has no judgment yet.
        already: The number of judgments that exist.
        max_tokens: The longest judgment.
        settings: Settings of each request.
        add: Keeps a judgment; it is on the disk when this returns.
        finish: Completes the file.
        unrated: Counts the judgments without a rating.
    """

    requests: Sequence[Any]
    already: int
    max_tokens: int
    settings: Mapping[str, Any]
    add: Callable[[Any, Reply], None]
    finish: Callable[[], None]
    unrated: Callable[[], int]

    def estimate(self) -> Usage:
        """Estimate what the requests use at most."""
        usage = Usage()
        for request in self.requests:
            usage.expect(request.messages, self.max_tokens)
        return usage


@dataclass
class Outcome:
    """Judgments that existed, new ones, those without a rating, and failures by request."""

    there: int
    asked: int = 0
    unrated: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def judge(judging: Judging, endpoint: Endpoint | None, concurrency: int, quiet: bool = False) -> Outcome:
    """Send the open requests, and complete the file unless one fails. ``endpoint`` may be None without requests.

    Raises:
        UserError: The endpoint takes no request, or the file cannot be written.
    """

    def reply_to(request: Request) -> Reply:
        assert endpoint is not None
        return endpoint.ask(request.messages, judging.max_tokens, **judging.settings)

    outcome = Outcome(judging.already)
    total = judging.already + len(judging.requests)
    with tqdm(total=total, initial=judging.already, unit="judgment", disable=quiet) as bar:
        for request, reply in in_parallel(reply_to, judging.requests, concurrency):
            if isinstance(reply, Failed):
                outcome.failed[request.name] = str(reply)
            else:
                judging.add(request, reply)
                outcome.asked += 1
                bar.update()
    if not outcome.failed:
        judging.finish()
    outcome.unrated = judging.unrated()
    return outcome
