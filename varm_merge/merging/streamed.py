"""A merge whose tensors are handed over one by one instead of being written; config and tokenizer are written."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import TensorWriterTask
from mergekit.options import MergeOptions

from varm_merge.merging import staging
from varm_merge.merging.mergekit_io import as_merged, swapped
from varm_merge.merging.method import METHOD_NAME
from varm_merge.merging.planning import run_state
from varm_merge.recipes import recipe_file

__all__ = ["merge_streamed"]

Save = Callable[[str, torch.Tensor], None]


def merge_streamed(config: MergeConfiguration, folder: Path, options: MergeOptions, save: Save) -> None:
    """Run a checked recipe as ``mergekit-yaml`` does, in the same order and with the same random numbers.

    Args:
        config: The recipe; mergekit rewrites it.
        folder: For everything but the weights.
        options: Of the run.
        save: Receives each tensor of the merged model, in the dtype of the result.
    """
    import mergekit.merge as merge

    def stream(_task: TensorWriterTask, **_arguments: Any) -> SimpleNamespace:
        """What mergekit's tasks use of its ``TensorWriter``."""
        return SimpleNamespace(save_tensor=lambda name, tensor, clone: save(name, tensor), finalize=lambda: None)

    run = getattr(merge.run_merge, "__wrapped__", merge.run_merge)  # the recipe was checked: not once more
    with ExitStack() as stack:
        if config.merge_method == METHOD_NAME:
            stack.enter_context(as_merged(options))
            stack.enter_context(swapped(run_state, "log", None))
            config = recipe_file.one_spelling(config)
        stack.enter_context(swapped(TensorWriterTask, "execute", stream))
        run(config, str(folder), options)
        staging.copy_code(config, folder)
