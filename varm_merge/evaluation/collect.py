"""Sends requests in parallel and keeps each reply when it arrives. One that fails does not stop the others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import Any

from tqdm import tqdm

from varm_merge.evaluation.endpoint import Endpoint, Failed, Reply, Usage, estimated_tokens

__all__ = ["Judging", "Outcome", "collect", "in_parallel"]


Results = Iterable[tuple[Any, Any]]
"""Jobs, each with its result or ``Failed``."""


@dataclass
class Outcome:
    """The number of results of earlier runs and of new ones, and why jobs failed, by name."""

    there: int
    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def in_parallel(work: Callable[[Any], Any], jobs: Sequence[Any], threads: int) -> Iterator[tuple[Any, Any]]:
    """Yield each job with its result or ``Failed``, in the order in which they end.

    Raises:
        Exception: Any error of a job but ``Failed``. Jobs that have not begun are dropped.
    """

    is_over = Event()

    def attempt(job: Any) -> tuple[Any, Any]:
        if is_over.is_set():
            return job, Failed("not sent")
        try:
            return job, work(job)
        except Failed as failed:
            return job, failed
        except BaseException:
            is_over.set()  # at once, not when the main thread has its turn
            raise

    with ThreadPool(threads) as pool:  # its threads are daemons, so Ctrl-C does not wait for an answer
        yield from pool.imap_unordered(attempt, jobs)


def collect(
    results: Results, keep: Callable[[Any, Any], None], *, there: int, total: int, unit: str, quiet: bool
) -> Outcome:
    """Call ``keep`` with each job and its result. A progress bar counts from ``there`` to ``total``."""
    outcome = Outcome(there)
    with tqdm(total=total, initial=there, unit=unit, disable=quiet) as bar:
        for job, result in results:
            if isinstance(result, Failed):
                outcome.failed[job.name] = str(result)
            else:
                keep(job, result)
                outcome.new += 1
                bar.update()
    return outcome


@dataclass(frozen=True)
class Judging:
    """A file of judgments that is being written.

    Attributes:
        requests: What has no judgment yet, each with ``name`` and ``messages``.
        already: The number of judgments that exist.
        max_tokens: The longest judgment.
        settings: Settings of each request.
        add: Keeps a judgment; it is on the disk when this returns.
        unrated: Counts the judgments without a rating.
        finish: Completes the file.
    """

    requests: Sequence[Any]
    already: int
    max_tokens: int
    settings: Mapping[str, Any]
    add: Callable[[Any, Reply], None]
    unrated: Callable[[], int]
    finish: Callable[[], None] = lambda: None

    def estimate(self) -> Usage:
        """Estimate what the requests use at most."""
        prompts = sum(estimated_tokens(request.messages) for request in self.requests)
        return Usage(len(self.requests), prompts, len(self.requests) * self.max_tokens)

    def run(self, endpoint: Endpoint | None, concurrency: int, quiet: bool) -> Outcome:
        """Send the open requests, and complete the file unless one fails. Without requests, no endpoint is needed.

        Raises:
            UserError: The endpoint takes no request, or the file cannot be written.
        """

        def reply_to(request: Any) -> Reply:
            assert endpoint is not None
            return endpoint.ask(request.messages, self.max_tokens, **self.settings)

        total = self.already + len(self.requests)
        replies = in_parallel(reply_to, self.requests, concurrency)
        outcome = collect(replies, self.add, there=self.already, total=total, unit="judgment", quiet=quiet)
        if not outcome.failed:
            self.finish()
        return outcome
