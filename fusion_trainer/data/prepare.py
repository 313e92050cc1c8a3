"""Chat data → a folder of dialogues, made once and shared by all models."""

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
from fusion_trainer.data.templates import find_template
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from varm_common.console import is_quiet
from varm_common.errors import demand_same
from varm_common.files import fingerprint
from varm_common.models import local_folder

__all__ = ["prepare"]


def prepare(config: PrepareConfig, beside: Path, *, quiet: bool = False, repeat: bool = True) -> Dialogues:
    """The dialogues that ``config`` describes; they are made unless they are there.

    Args:
        config: Data, pivot, template and length.
        beside: The folder in which ``dialogues-<fingerprint>`` is made if ``config`` names no folder.
        quiet: Without bar and report.
        repeat: Whether dialogues that were made earlier are reported, too.

    Raises:
        UserError: The data, the template or the tokenizer cannot be used, or the folder holds something else.
    """
    folder, _ = local_folder(config.pivot, config.pivot_revision, weights=False, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.pivot, config.trust_remote_code)
    sources = [open_source(data, name=config.data_name, split=config.data_split) for data in config.data]
    template = None  # data without turns needs none
    if config.template or tokenizer.tokenizer.chat_template:
        template = find_template(config.template, tokenizer.tokenizer, config.pivot)
    others = [_tokenizer(model, config.trust_remote_code) for model in config.fit_tokenizers]
    request: dict[str, Any] = {
        "data": [source.fingerprint for source in sources],
        "tokenizer": tokenizer.sha256,
        "template": template.sha256 if template else None,
        "max_length": config.max_length,
        "packing": config.packing,
        "bad_rows": config.bad_rows,
        "version": VERSION,
        **({"fit_tokenizers": [other.sha256 for other in others]} if others else {}),
    }
    path = config.dialogues or beside / f"dialogues-{fingerprint(request)[:12]}"
    if made := not path.exists():
        skipped = Counter[str]() if config.bad_rows == "skip" else None
        preparation = Preparation(tokenizer, template, config.max_length, config.packing, skipped, others)
        rows = conversations(sources, skipped, preparation.report.unused)
        hidden = quiet or is_quiet()
        with tqdm(rows, unit=" conversations", unit_scale=True, disable=hidden, desc="dialogues") as bar:
            write_dialogues(path, preparation.blocks(bar), preparation, request)
    dialogues = Dialogues(path)
    title = f"`{path}` holds dialogues that were made with other settings:"
    remedy = "Give another --dialogues folder, or remove that one."
    demand_same(title, request, dialogues.manifest["request"], remedy)
    if not quiet:
        click.echo(f"{dialogues.folder}\n{dialogues.report}" if made or repeat else dialogues.folder)
    return dialogues


def _tokenizer(model: str, code: bool) -> TextTokenizer:
    """The tokenizer of a folder or a Hub id, which a revision may follow: ``name@revision``."""
    name, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
    folder, _ = local_folder(name, revision or None, weights=False, code=code)
    return load_tokenizer(folder, name, code)
