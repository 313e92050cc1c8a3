"""One command, measured: elapsed time, CPU time, and the peak of anonymous memory.

Anonymous memory is what a process has allocated. Checkpoints that are mapped from the disk do not count: the
kernel drops their pages at need. On Linux it is ``RssAnon``; elsewhere psutil's ``uss``, the memory that
would be freed if the process ended, which counts mapped pages that no other process shares. ``MEMORY`` says which.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil

from varm_common.versions import versions

__all__ = ["MEMORY", "CommandError", "Run", "ends_with_us", "machine", "measured", "spread", "table"]

LINUX = sys.platform == "linux"
MEMORY = "RssAnon" if LINUX else "USS"
"""What the peak is of."""
SAMPLE_S = 0.01
TAIL_LINES = 5


class CommandError(RuntimeError):
    """A measured command failed; the message ends with what it said last."""


@dataclass(frozen=True)
class Run:
    """Elapsed seconds, user + system seconds, peak of anonymous memory in MiB (NaN if it could not be read)."""

    wall_s: float
    cpu_s: float
    anonymous_mib: float


def measured(
    command: Sequence[str], *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Run:
    """Run the command to its end, sampling the memory of it and its descendants every 10 ms.

    Args:
        command: The program and its arguments.
        log: A file to which what it says is added; default nowhere.
        environment: Of the command; default this process's.

    Raises:
        CommandError: It cannot be started, or fails. It does not outlive an exception here, nor, on Linux, this
            process.
    """
    with log.open("ab+") if log else tempfile.TemporaryFile("wb+") as said:
        said.seek(0, os.SEEK_END)
        begun, start = said.tell(), time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdout=said, stderr=said, env=environment, preexec_fn=ends_with_us()
            )
        except OSError as error:
            raise CommandError(f"`{command[0]}` cannot be started: {error.strerror or error}") from error
        sampler = _Sampler(process)
        try:
            sampler.start()
            cpu_s = _wait(process, sampler)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sampler.ended.set()
        wall_s = time.perf_counter() - start
        sampler.join()
        if process.returncode:
            raise CommandError(f"{shlex.join(command)} {_how_it_ended(process.returncode)}:\n{_tail(said, begun)}")
    return Run(wall_s, cpu_s, sampler.peak_mib)


class _Sampler(threading.Thread):
    """The largest memory, and the last CPU time, of a process and its descendants."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.process, self.ended = process, threading.Event()
        self.peak_mib, self.cpu_s = float("nan"), float("nan")

    def run(self) -> None:
        read = _anonymous_kib if LINUX else _unique_kib
        while not self.ended.is_set():
            if kib := read(self.process.pid):
                self.peak_mib = max(kib / 1024, self.peak_mib if self.peak_mib == self.peak_mib else 0.0)
            if not hasattr(os, "wait4"):
                with suppress(psutil.Error):
                    self.cpu_s = sum(psutil.Process(self.process.pid).cpu_times()[:2])
            self.ended.wait(SAMPLE_S)


def _wait(process: subprocess.Popen[bytes], sampler: _Sampler) -> float:
    """Wait for the end; the seconds of CPU time it took."""
    if not hasattr(os, "wait4"):
        process.wait()
        return sampler.cpu_s
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _anonymous_kib(pid: int) -> int:
    process = Path("/proc", str(pid))
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
        children = " ".join(task.read_text() for task in process.glob("task/*/children")).split()
    except OSError:  # the process has ended
        return 0
    return (int(found[1]) if found else 0) + sum(_anonymous_kib(int(child)) for child in children)


def _unique_kib(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().uss
    return total // 1024


def ends_with_us() -> Callable[[], object] | None:
    """For ``preexec_fn``: the child asks the kernel to be killed when this process ends; None but on Linux."""
    if not LINUX:
        return None
    import ctypes
    import signal

    prctl, of_parent_death = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(of_parent_death, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code}" + (" (killed; was memory short?)" if code == -9 else "")
    return f"exited {code}"


def _tail(said: IO[Any], begun: int) -> str:
    said.seek(begun)
    return "\n".join(said.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [min – max]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (header, tuple("-" * width for width in widths), *rows)
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def machine() -> str:
    """CPU, cores, memory and versions, in one line."""
    ram_gib = psutil.virtual_memory().total / 2**30
    numbers = {"Python": platform.python_version(), **versions()}
    software = ", ".join(f"{package} {number}" for package, number in numbers.items())
    return f"{_processor()}, {os.cpu_count()} cores, {ram_gib:.0f} GiB; {software}"


def _processor() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()
