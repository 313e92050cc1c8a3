"""Score one model after the other in one process, without writing their weights.

Requests come on standard input as frames of ``varm_common.tensor_stream``: the tensors of a model, and a message
``{"folder": …, "name": …, "conversations": […]}``. The folder has the model's config and tokenizer; without
tensors, it has the weights, too. The answer on standard output is one line of JSON: ``conversations`` as in the
scores of ``fusion-trainer evaluate``, or ``problem``. The first line lists all conversations of the dialogues.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import PartialState

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.text.tokenizer import load_tokenizer
from fusion_trainer.training.batches import write_tokens
from fusion_trainer.training.evaluate import by_conversation, demand_finite, score
from varm_common import models
from varm_common.errors import UserError
from varm_common.tensor_stream import messages

__all__ = ["serve"]


def serve(folder: Path, batch_tokens: int, trust_remote_code: bool) -> None:
    """Answer requests until standard input ends.

    Raises:
        UserError: The dialogues cannot be used.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    state = PartialState(cpu=not torch.accelerator.is_available())
    dialogues = Dialogues(folder)
    names = [dialogues[block].conversation for block in range(len(dialogues))]
    _answer(answers, {"conversations": list(dict.fromkeys(names))})
    for request, tensors in messages(sys.stdin.buffer, state.device):
        if not request:  # the tensors are of a merge that was not finished
            tensors.clear()
            _answer(answers, {})
            continue
        try:
            source, name = Path(request["folder"]), request["name"]
            given = {"device": state.device, "trust_remote_code": trust_remote_code, "tensors": tensors or None}
            model = models.load_causal_lm(source, name, dtype="auto", **given)
            tensors.clear()
            tokens = write_tokens(dialogues, load_tokenizer(source, name, trust_remote_code))
            scored = score(model, tokens, names, batch_tokens, {*request["conversations"]})
            demand_finite(scored, model, name)
            reply: dict[str, Any] = {"conversations": by_conversation(scored)}
        except UserError as error:
            reply = {"problem": error.message}
        model = None
        gc.collect()  # the next model comes when this one's memory is free
        _answer(answers, reply)


def _answer(answers: IO[str], reply: dict[str, Any]) -> None:
    answers.write(json.dumps(reply) + "\n")
    answers.flush()
