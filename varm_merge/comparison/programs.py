"""Python programs that are run many times, imported once: each run is a fork of a process that has imported all.

Importing torch and transformers takes longer than many an evaluation. On Linux a program's process imports what it
needs and forks itself for each run, so that no run finds anything of another; elsewhere each run is a process of
its own. A run ends when the comparison does.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from varm_common.process_usage import LINUX, CommandError, ends_with_us, measured

__all__ = ["Program"]


class Program:
    """``python -m module``, run with other arguments again and again.

    Args:
        module: The program.
        imports: Modules that each run needs.
        environment: Of its processes.
    """

    def __init__(self, module: str, imports: Sequence[str], environment: Mapping[str, str]) -> None:
        self.module, self.imports, self.environment = module, imports, dict(environment)
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str], log: Path) -> None:
        """Run it to its end; what it says is added to ``log``.

        Raises:
            CommandError: It failed; the message ends with what it said last.
        """
        if not LINUX:
            measured([sys.executable, "-m", self.module, *arguments], log=log, environment=self.environment)
            return
        begun = log.stat().st_size if log.exists() else 0
        code = self._ask(arguments, log)
        if code:
            with log.open("rb") as file:
                file.seek(begun)
                tail = file.read().decode("utf-8", "replace").splitlines()[-5:]
            raise CommandError("\n".join([f"`python -m {self.module}` exited {code}:", *tail]))

    def close(self) -> None:
        """End its process."""
        if self._process is not None and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _ask(self, arguments: Sequence[str], log: Path) -> int:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.module, *self.imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **self.environment},  # asks for GPUs, touches none
                preexec_fn=ends_with_us(),
            )
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except (
            BrokenPipeError,
            ValueError,
        ):  # it has been killed, or cannot be imported: see what a plain run says
            measured([sys.executable, "-m", self.module, *arguments], log=log, environment=self.environment)
            return 0


def _serve(module: str, imports: Sequence[str]) -> None:
    """Fork for each line of the standard input; answer with the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print as they are imported is no answer
    for name in imports:
        importlib.import_module(name)
    gc.freeze()
    ends = ends_with_us()
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            if ends:
                ends()
            said = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.argv = [module, *job["arguments"]]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
