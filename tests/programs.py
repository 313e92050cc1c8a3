"""``fusion-trainer`` as processes that can be killed, limited, and be several.

Importing torch and transformers takes seconds: one process imports everything and forks itself for each run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
FORKING = """
import gc, json, os, resource, signal, sys
import pyarrow, torch, accelerate, pandas
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, Qwen2ForCausalLM, Qwen2Tokenizer
import fusion_trainer.representations.extract
{imports}
from fusion_trainer.cli import main

gc.collect()
gc.freeze()  # a Trainer collects garbage each time it begins; among all that was imported that takes long
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    children = []
    for number, environment in enumerate(job["environments"]):
        children.append(os.fork())
        if children[-1] == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background shell
            os.environ.update(environment)
            os.chdir(job["folder"])
            said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if number else os.O_TRUNC))
            os.dup2(said, 1)
            os.dup2(said, 2)
            if "file_size" in job:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
            if "more_memory" in job:
                now = open("/proc/self/status").read().partition("VmData:")[2].split()[0]
                resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(now) + job["more_memory"],) * 2)
            exec(job.get("before", ""))
            main(job["arguments"], prog_name="fusion-trainer")
    print(*children, flush=True)
    code = 0
    for _ in list(children):
        child, status = os.wait()
        children.remove(child)
        if status and not code:  # as launchers do: when one fails, all end
            code = os.waitstatus_to_exitcode(status)
            for other in children:
                os.kill(other, signal.SIGKILL)
    print(code, flush=True)
"""


@dataclass
class Run:
    """A run that is under way: its processes, and what it says in the end."""

    processes: list[int]
    wait: Callable[[], tuple[int, str]]

    @property
    def process(self) -> int:
        return self.processes[0]

    def kill(self) -> tuple[int, str]:
        """SIGKILL all of it; what it said until then."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self.wait()


class Programs:
    """``fusion-trainer`` in forks of one process that has imported everything, and ``imports`` as well."""

    def __init__(self, folder: Path, imports: str = "") -> None:
        self.said = folder / "said.txt"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", FORKING.replace("{imports}", imports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._parent.stdout
        return self._parent.stdout.readline().strip()

    def start(
        self,
        folder: Path,
        *arguments: object,
        environments: Sequence[Mapping[str, str]] = ({},),
        **limits: Any,
    ) -> Run:
        """Start a run in ``folder``, in one process for each of ``environments``.

        ``limits``: ``file_size``, ``more_memory`` (bytes), and ``before``, Python to be run first.
        """
        job = {
            "folder": str(folder),
            "said": str(self.said),
            "arguments": [str(one) for one in arguments],
            "environments": [dict(environment) for environment in environments],
            **limits,
        }
        assert self._parent.stdin
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        processes = [int(process) for process in self._line().split()]
        return Run(processes, lambda: (int(self._line()), self.said.read_text()))

    def run(self, folder: Path, *arguments: object, **limits: Any) -> tuple[int, str]:
        return self.start(folder, *arguments, **limits).wait()

    def end(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait()


def forked(command: Callable[[], object]) -> int:
    """Run ``command`` in a fork of this process, to be killed; returns the process id."""
    process = os.fork()
    if process == 0:
        try:
            command()
        finally:
            os._exit(0)
    return process


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def wait_for(what: Callable[[], Any], process: int) -> None:
    """Poll until it is so, or the process has ended."""
    while not what() and Path(f"/proc/{process}/fd").exists():
        with suppress(PermissionError):
            if not os.listdir(f"/proc/{process}/fd"):  # ended, and not waited for yet  # noqa: PTH208
                return
        time.sleep(0.0005)


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
