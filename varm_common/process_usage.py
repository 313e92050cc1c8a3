"""Run a command and measure it: elapsed time, CPU time, and the peak of anonymous memory.

Anonymous memory is what a process has allocated. Checkpoints that are mapped from the disk do not count, because
the kernel can drop their pages. On Linux it is ``RssAnon``. Elsewhere it is psutil's ``uss``, the memory that
would be freed if the process ended; it includes mapped pages that no other process shares. ``MEMORY`` names which.
"""

import ctypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil

from varm_common.versions import versions

__all__ = [
    "MEMORY",
    "CommandError",
    "Run",
    "dies_with_parent",
    "last_lines",
    "machine",
    "measured",
    "outcome",
    "spread",
]

LINUX = sys.platform == "linux"
MEMORY = "RssAnon" if LINUX else "USS"
"""The kind of memory that is measured."""
PARENT_DEATH_SIGNAL = 1
"""An option of Linux's ``prctl``."""
SAMPLE_S = 0.01
LAST_LINES = 5
LIBC = ctypes.CDLL(None)
"""Loaded here, because a process that has just been forked may not load anything."""


class CommandError(RuntimeError):
    """A command failed; the message ends with the last lines of its output."""


@dataclass(frozen=True)
class Run:
    """Elapsed seconds, user + system seconds, peak of anonymous memory in MiB (NaN if it could not be read)."""

    wall_s: float
    cpu_s: float
    anonymous_mib: float


def measured(
    command: Sequence[str], *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Run:
    """Run the command to its end. Every 10 ms the memory of its process and their descendants is read.

    Args:
        command: The program and its arguments.
        log: A file to which its output is appended; by default the output is dropped.
        environment: Environment variables of the command; default those of this process.

    Raises:
        CommandError: It cannot be started, or fails. It does not outlive an exception here, nor, on Linux, this
            process.
    """
    with log.open("ab+") if log else tempfile.TemporaryFile("wb+") as output:
        output.seek(0, os.SEEK_END)
        begin, start = output.tell(), time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, preexec_fn=dies_with_parent
            )
        except OSError as error:
            raise CommandError(f"`{command[0]}` cannot be started: {error.strerror or error}") from error
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sampler.ended.set()
        wall_s = time.perf_counter() - start
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            lines = last_lines(output, begin)
            raise CommandError(f"{shlex.join(command)} {outcome(process.returncode)}:\n{lines}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, sampler.peak_kib / 1024 or float("nan"))


class _Sampler(threading.Thread):
    """The largest memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.ended, self.peak_kib = pid, threading.Event(), 0

    def run(self) -> None:
        read = _anonymous_kib if LINUX else _unique_kib
        while not self.ended.is_set():
            self.peak_kib = max(self.peak_kib, read(self.pid))
            self.ended.wait(SAMPLE_S)


def _anonymous_kib(pid: int) -> int:
    process = Path("/proc", str(pid))
    try:
        anonymous = re.search(r"^RssAnon:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
        children = " ".join(task.read_text() for task in process.glob("task/*/children")).split()
    except OSError:  # the process has ended
        return 0
    return (int(anonymous[1]) if anonymous else 0) + sum(_anonymous_kib(int(child)) for child in children)


def _unique_kib(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().uss
    return total // 1024


def dies_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; only on Linux. Also for ``preexec_fn``."""
    if LINUX:
        LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def outcome(code: int) -> str:
    """How a process ended, by its exit code, negative after a signal."""
    if code < 0:
        return f"was ended by signal {-code}" + (" (killed, perhaps because memory ran out)" if code == -9 else "")
    return f"exited {code}"


def last_lines(output: IO[Any], begin: int) -> str:
    """The last lines of a program's output, which starts at byte ``begin`` of a file."""
    output.seek(begin)
    return "\n".join(output.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [min – max]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def machine() -> str:
    """CPU, cores, memory and versions, in one line."""
    ram_gib = psutil.virtual_memory().total / 2**30
    numbers = {"Python": platform.python_version(), **versions()}
    software = ", ".join(f"{package} {number}" for package, number in numbers.items())
    return f"{_processor()}, {os.cpu_count()} cores, {ram_gib:.0f} GiB; {software}"


def _processor() -> str:
    with suppress(OSError):
        if model := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()
