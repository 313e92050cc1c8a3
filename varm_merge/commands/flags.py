"""The flags of mergekit-yaml that decide whether and how a recipe merges, for commands that do not merge it."""

import functools
from collections.abc import Callable
from typing import Any

import click

__all__ = ["by_name_flag", "merge_flags"]


def merge_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command those flags; it receives ``options``, mergekit's ``MergeOptions``, in place of them."""

    @click.option("--cache-dir", type=click.Path(file_okay=False), help="Of models from the Hub.")
    @click.option(
        "--lora-merge-cache", type=click.Path(file_okay=False), help="Where mergekit keeps merged LoRA adapters."
    )
    @click.option("--trust-remote-code", is_flag=True, help="Run code that the model repositories bring along.")
    @click.option("--allow-crimes", is_flag=True, help="Mix architectures.")
    @click.option("--unsafe-truncate-embeddings", is_flag=True, help="Cut vocabularies to the smallest.")
    @functools.wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        from mergekit.options import MergeOptions

        own = {"cache_dir": "transformers_cache"}
        names = (
            "cache_dir",
            "lora_merge_cache",
            "trust_remote_code",
            "allow_crimes",
            "unsafe_truncate_embeddings",
        )
        options = MergeOptions(**{own.get(name, name): values.pop(name) for name in names})
        command(*arguments, options=options, **values)

    return with_options


def by_name_flag(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--by-name``."""
    return click.option(
        "--by-name", is_flag=True, help="Merge tensors by their names, as `varm-merge yaml --by-name` does."
    )(command)
