"""Merge recipes and score the merged models without writing their weights.

mergekit merges in this process. Each merged tensor goes through a pipe to ``fusion-trainer serve-scores``, which
holds one model at a time. Config and tokenizer lie in a temporary folder.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from varm_common.errors import UserError, reason_of
from varm_common.process_usage import CommandError, dies_with_parent, last_lines, outcome
from varm_common.tensor_stream import send_message, send_tensor
from varm_merge.comparison.scores import environment
from varm_merge.merging.streamed import merge_streamed

__all__ = ["Scorer"]

Conversations = dict[str, dict[str, Any]]
"""The sums of each conversation: ``nats``, ``bytes`` and more."""


class Scorer:
    """A running ``fusion-trainer serve-scores``. It is a context; at its end the program ends.

    Attributes:
        conversations: All conversations of the dialogues.

    Raises:
        CommandError: The program cannot use the dialogues.
    """

    def __init__(self, dialogues: Path, options: MergeOptions, device: str | None, log: Path) -> None:
        self.options, self.log = options, log
        trust = ["--trust-remote-code"] if options.trust_remote_code else []
        command = [sys.executable, "-m", "fusion_trainer", "serve-scores", "--dialogues", str(dialogues), *trust]
        with log.open("ab") as output:
            self._begin = output.tell()
            self._program = subprocess.Popen(
                [*command, "--quiet"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment(device),
                preexec_fn=dies_with_parent,
            )
        assert self._program.stdin
        assert self._program.stdout
        self._requests, self._answers = self._program.stdin, self._program.stdout
        self.conversations: list[str] = self._answer()["conversations"]

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self._program.kill()
        with suppress(OSError):
            self._requests.close()
        self._program.wait()

    def merge(self, recipe: Mapping[str, Any], name: str, conversations: Sequence[str]) -> Conversations:
        """Merge a recipe and score the result on some conversations.

        Raises:
            UserError: mergekit cannot merge it, the loss is not finite, or the model cannot be scored.
            CommandError: The program has failed.
        """
        with tempfile.TemporaryDirectory(prefix="varm-merge-") as folder:
            config = MergeConfiguration.model_validate(recipe)
            try:
                merge_streamed(config, Path(folder), self.options, partial(send_tensor, self._requests))
            except BrokenPipeError:
                self._failed()
            except Exception as error:  # a merge method raises what it likes at a value that it does not take
                send_message(self._requests, {})  # the program drops the tensors that it has received
                self._answer()
                if isinstance(error, UserError):
                    raise
                raise UserError(f"mergekit cannot merge it with {name}: {reason_of(error)}") from error
            return self.model(Path(folder), name, conversations)

    def model(self, folder: Path, name: str, conversations: Sequence[str]) -> Conversations:
        """Score the model in a folder on some conversations; raises as ``merge`` does."""
        request = {"folder": str(folder), "name": name, "conversations": list(conversations)}
        try:
            send_message(self._requests, request)
        except BrokenPipeError:
            self._failed()
        reply = self._answer()
        if "problem" in reply:
            raise UserError(reply["problem"])
        return reply["conversations"]  # type: ignore[no-any-return]

    def _answer(self) -> dict[str, Any]:
        if not (line := self._answers.readline()):
            self._failed()
        return json.loads(line)  # type: ignore[no-any-return]

    def _failed(self) -> None:
        code = self._program.wait()
        with self.log.open("rb") as output:
            raise CommandError(f"serve-scores {outcome(code)}:\n{last_lines(output, self._begin)}")
