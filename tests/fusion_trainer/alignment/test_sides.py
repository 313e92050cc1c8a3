"""The processes of an alignment: results come in order, and few of them wait."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

import fusion_trainer.alignment.sides as alignment_sides
from fusion_trainer.alignment.sides import in_processes


class Threads(ThreadPoolExecutor):
    """Called as a pool of processes."""

    def __init__(self, number: int, *_: Any) -> None:
        super().__init__(number)


def test_no_more_results_wait_to_be_taken_than_there_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the processes could run ahead of the disk."""
    monkeypatch.setattr(alignment_sides, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(alignment_sides, "_work", lambda work, task: work(None, task))
    begun: list[int] = []

    def work(_sides: Any, task: int) -> int:
        begun.append(task)
        return task

    sides: Any = SimpleNamespace(config=SimpleNamespace(workers=3), map=None, corpus=None)
    for number, result in enumerate(in_processes(sides, work, range(40))):
        assert result == number
        time.sleep(0.001)  # time enough to begin all that is submitted
        assert len(begun) <= number + 1 + 4
    assert sorted(begun) == list(range(40))
