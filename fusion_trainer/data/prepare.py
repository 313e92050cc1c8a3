"""The first stage: chat data → a folder of dialogues, made once and shared by every model."""

from collections import Counter
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from fusion_trainer.config import PrepareConfig
from fusion_trainer.data.blocks import Preparation
from fusion_trainer.data.conversations import conversations
from fusion_trainer.data.dialogues import VERSION, Dialogues, write_dialogues
from fusion_trainer.data.sources import open_source
from fusion_trainer.data.templates import Template, find_template
from fusion_trainer.text.tokenizer import load_tokenizer
from varm_common.console import is_quiet
from varm_common.errors import UserError, unlike
from varm_common.files import fingerprint
from varm_common.models import local_folder

__all__ = ["prepare"]


def prepare(config: PrepareConfig, beside: Path, *, quiet: bool = False) -> Dialogues:
    """The dialogues that ``config`` asks for; made unless they are there.

    Args:
        config: Data, pivot, template and length.
        beside: Where the folder goes if ``config`` names none: ``dialogues-<fingerprint>`` in here.
        quiet: Without bar and report.

    Raises:
        UserError: The data, the template or the tokenizer cannot be used, or the folder holds something else.
    """
    folder, _ = local_folder(config.pivot, config.pivot_revision, weights=False, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.pivot, config.trust_remote_code)
    sources = [open_source(data, name=config.data_name, split=config.data_split) for data in config.data]
    template = _template(config, tokenizer.tokenizer)
    request: dict[str, Any] = {
        "data": [source.fingerprint for source in sources],
        "tokenizer": tokenizer.sha256,
        "template": template.sha256 if template else None,
        "max_length": config.max_length,
        "packing": config.packing,
        "bad_rows": config.bad_rows,
        "version": VERSION,
    }
    path = config.dialogues or beside / f"dialogues-{fingerprint(request)[:12]}"
    if path.exists():
        return _told(_demand(path, request), quiet)
    preparation = Preparation(tokenizer, template, config.max_length, config.packing)
    if config.bad_rows == "skip":
        preparation.skipped = Counter()
    rows = conversations(sources, preparation.skipped, preparation.report.unused)
    with tqdm(rows, unit=" conversations", unit_scale=True, disable=quiet or is_quiet(), desc="dialogues") as bar:
        write_dialogues(path, preparation.blocks(bar), preparation, request)
    return _told(Dialogues(path), quiet)


def _told(dialogues: Dialogues, quiet: bool) -> Dialogues:
    if not quiet:
        click.echo(f"{dialogues.folder}\n{dialogues.report}")
    return dialogues


def _template(config: PrepareConfig, tokenizer: object) -> Template | None:
    """The template; None if none was chosen and the pivot has none, which is an error only for dialogues."""
    if config.template is None and not getattr(tokenizer, "chat_template", None):
        return None
    return find_template(config.template, tokenizer, config.pivot)


def _demand(path: Path, request: dict[str, Any]) -> Dialogues:
    dialogues = Dialogues(path)
    if difference := unlike(f"`{path}` holds other dialogues:", request, dialogues.manifest["request"]):
        raise UserError(f"{difference}\nGive another --dialogues folder, or remove that one.")
    return dialogues
