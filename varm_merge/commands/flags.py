"""The flags of mergekit-yaml that decide whether and how a recipe merges, for commands that do not merge it."""

import functools
from collections.abc import Callable
from typing import Any

import click

__all__ = ["by_name_flag", "merge_flags"]


FLAGS = ("cache_dir", "lora_merge_cache", "trust_remote_code", "allow_crimes", "unsafe_truncate_embeddings")


def merge_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these flags; it receives ``options``, mergekit's ``MergeOptions``, in place of them."""

    @click.option("--cache-dir", type=click.Path(file_okay=False), help="Where models from the Hub are stored.")
    @click.option(
        "--lora-merge-cache", type=click.Path(file_okay=False), help="Where mergekit keeps merged LoRA adapters."
    )
    @click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the models.")
    @click.option("--allow-crimes", is_flag=True, help="Allow models of different architectures in one merge.")
    @click.option(
        "--unsafe-truncate-embeddings", is_flag=True, help="Cut all vocabularies to the size of the smallest."
    )
    @functools.wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        if values.get("offline"):
            from varm_merge.recipes.light_import import import_mergekit

            import_mergekit()
        from mergekit.options import MergeOptions

        flags = {name: values.pop(name) for name in FLAGS}
        options = MergeOptions(transformers_cache=flags.pop("cache_dir"), **flags)
        command(*arguments, options=options, **values)

    return with_options


def by_name_flag(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--by-name``."""
    return click.option(
        "--by-name",
        is_flag=True,
        help="Match tensors by name, as `varm-merge yaml --by-name` does.",
    )(command)
