"""The programs as a shell starts them, without the seconds in which torch and transformers are imported.

One process has imported everything and listens on a socket. What stands on PATH as ``varm-merge``,
``fusion-trainer`` or ``mergekit-yaml`` sends it its folder, environment, arguments and open files; the process
forks, takes them over and runs the program's own entry point; the exit code comes back.
"""

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = {
    "fusion-trainer": "fusion_trainer.cli:main",
    "varm-merge": "varm_merge.cli:main",
    "mergekit-yaml": "mergekit.scripts.run_yaml:main",
}
SHIM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect({socket!r})
    asked = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(to, [b"!"], [0, 1, 2])
    to.sendall(asked + b"\\n")
    sys.exit(int(to.makefile().readline()))
"""
SERVER = """
import importlib, json, os, signal, socket, sys, threading, traceback
import torch, transformers, datasets, peft, matplotlib.figure, openai, rich.table, jinja2
import mergekit.scripts.run_yaml, mergekit.merge, mergekit.plan, varm_merge.cli, varm_merge.inspection.measure
import fusion_trainer.representations.extract, fusion_trainer.alignment.align, fusion_trainer.training.train
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, Qwen2ForCausalLM

PROGRAMS = {programs!r}
def serve(connection):
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    program, arguments, folder, environment = json.loads(connection.makefile().readline())
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{{code if code >= 0 else 128 - code}}\\n".encode())
        connection.close()
        return
    code = 70
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [program, *arguments]
        module, _, name = PROGRAMS[program].partition(":")
        try:
            getattr(importlib.import_module(module), name)(arguments, prog_name=program)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)

server = socket.socket(socket.AF_UNIX)
server.bind({socket!r})
server.listen()
print("ready", flush=True)
while True:
    serve(server.accept()[0])
"""


class Warm:
    """The programs in ``bin``, to be put on PATH.

    Args:
        folder: Where.
        environment: Of the process that imports everything: what libraries read when they are imported.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        socket = str(folder / "socket")
        for program in PROGRAMS:
            shim = self.bin / program
            shim.write_text(SHIM.format(python=sys.executable, socket=socket, program=program))
            shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(programs=PROGRAMS, socket=socket)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def end(self) -> None:
        self._server.kill()
        self._server.wait()
