"""One command, measured: elapsed time, CPU time, and the peak of anonymous memory. Linux only."""

import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

__all__ = ["CommandError", "Run", "machine", "measured", "spread", "table", "verdict"]

SAMPLE_S = 0.01


class CommandError(RuntimeError):
    """A measured command failed; the message ends with what it said last."""


@dataclass(frozen=True)
class Run:
    """Elapsed seconds, user + system seconds, and the peak of RssAnon in MiB."""

    wall_s: float
    cpu_s: float
    anonymous_mib: float


def measured(command: list[str]) -> Run:
    """Run the command to its end, sampling RssAnon of it and its descendants every 10 ms."""
    peak_kib, ended = 0, threading.Event()

    def sample(pid: int) -> None:
        nonlocal peak_kib
        while not ended.wait(SAMPLE_S):
            peak_kib = max(peak_kib, _anonymous_kib(pid))

    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        sampler = threading.Thread(target=sample, args=(process.pid,))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        ended.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            tail = "".join(log.readlines()[-5:])
            raise CommandError(f"{shlex.join(command)} exited {process.returncode}:\n{tail}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, peak_kib / 1024)


def _anonymous_kib(pid: int) -> int:
    process = Path("/proc", str(pid))
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
        children = " ".join(task.read_text() for task in process.glob("task/*/children")).split()
    except OSError:  # the process has ended
        return 0
    return (int(found[1]) if found else 0) + sum(_anonymous_kib(int(child)) for child in children)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [min – max]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def verdict(values: Sequence[float], limit: float) -> str:
    """A budget is judged by the median."""
    return "met" if median(values) <= limit else "NOT met"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (header, tuple("-" * width for width in widths), *rows)
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def machine() -> str:
    """CPU, cores, memory and versions, in one line."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for package in ("varm-merge", "mergekit", "torch", "safetensors", "transformers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    hardware = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {ram_gib:.0f} GiB"
    return f"{hardware}; {', '.join(versions)}"
