"""What of a merged model's folder may be published, and all that keeps it from being published.

Looked at before anything is sent: whether the model is whole and loads, and whether there is something among its
files that nobody meant to publish. No weight is read, no code of the folder is run, no secret is told.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_common.checkpoints import INDEX, WHOLE, read_header, weight_files
from varm_merge.loading import Unloadable, loaded, numberless, patterns

__all__ = ["Contents", "look", "secrets_in"]

TRAINING = (
    "optimizer.*",
    "optimizer_*",
    "scheduler.pt",
    "rng_state*.pth",
    "scaler.pt",
    "training_args.bin",
    "trainer_state.json",
    "*_states.pt",
    "*.distcp",
)
"""Files of an unfinished training, by name; and those in a folder that is called so:"""
CHECKPOINTS = ("checkpoint-*", "global_step*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
KEYS = ("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", "credentials*", "*.kdbx")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
BOOKKEEPING = ("stage.json", "lock", "*.tmp", "*.lock", "*~", "__pycache__")
"""Of this project's pipeline and of others."""
SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}",
    "an API key": rb"(?<![A-Za-z0-9_-])sk-(?:(?:or-v1-)?[0-9a-f]{32,}(?![A-Za-z0-9_-])"
    rb"|(?=[A-Za-z0-9_-]*[0-9])(?=[A-Za-z0-9_-]*[A-Z])[A-Za-z0-9_-]{32,})",
    "an AWS key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "an AWS secret": rb"(?i)aws_secret_access_key[\"' ]*[=:][\"' ]*[A-Za-z0-9/+]{40}",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a Google key": rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[bpars]-(?=[A-Za-z-]*[0-9])[A-Za-z0-9-]{10,}",
    "a password in an address": rb"://[^\s/:@?#\"'<>{}$`]{1,100}:[^\s/:@\"'<>{}$`]{1,200}@[A-Za-z0-9\[]",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
ASSIGNED = {
    "a key that is set": rb"(?:KEY|TOKEN|SECRET)[\"']?[ \t]*=[ \t]*[\"']?(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}",
}
"""Not looked for in JSON, which sets nothing so; a vocabulary may have anything."""
TENSORS = (".safetensors", ".gguf", *(pattern.removeprefix("*") for pattern in PICKLES))
TEXT_LIMIT_BYTES = 200_000_000


@dataclass
class Contents:
    """A folder, looked at.

    Attributes:
        files: What would be uploaded, by its path in the repository.
        left_out: What would not, and why.
        problems: What has to be mended first.
        remarks: What one should know.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def look(folder: Path, exclude: Sequence[str] = (), allow_pickle: bool = False) -> Contents:
    """All there is to say about a folder before it is uploaded.

    Args:
        folder: Of a model.
        exclude: Patterns of files to leave out, as of ``hf upload --exclude``.
        allow_pickle: Whether files that run code when they are loaded may be uploaded.
    """
    contents = Contents()
    for path in _walk(folder, folder, contents):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/") for pattern in exclude):
            contents.left_out[name] = "excluded"
        elif why := _left_out(name):
            contents.left_out[name] = why
        else:
            contents.files[name] = path
    if not (folder / "config.json").is_file():
        kind = "an adapter, no merged model" if (folder / "adapter_config.json").is_file() else "no model"
        contents.problems.append(f"`{folder}` has no config.json: it is {kind}")
    for name, path in contents.files.items():
        contents.problems += _problems_of(name, path, folder, allow_pickle)
    contents.problems += _weights(folder, contents)
    if "config.json" in contents.files:
        _loads(folder, contents)
    return contents


def _walk(folder: Path, top: Path, contents: Contents) -> Iterator[Path]:
    """All but folders, in the order of their names; hidden folders and caches are not entered."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        contents.problems.append(f"`{folder.relative_to(top)}` cannot be read: {error.strerror}")
        return
    for entry in entries:
        if not entry.is_dir() or entry.is_symlink():
            yield entry
        elif why := _left_out(entry.name):
            contents.left_out[f"{entry.relative_to(top).as_posix()}/"] = why
        else:
            yield from _walk(entry, top, contents)


def _left_out(name: str) -> str | None:
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return "hidden"
    if any(fnmatch.fnmatch(last, pattern) for pattern in BOOKKEEPING):
        return "temporary"
    return None


def _problems_of(name: str, path: Path, folder: Path, allow_pickle: bool) -> Iterator[str]:
    """What is wrong with one file."""
    way = f"remove it, or leave it out: --exclude '{name}'"
    parts = name.split("/")
    if not path.is_file():
        kind = "a link to nothing" if path.is_symlink() and not path.exists() else "no plain file"
        yield f"`{name}` is {kind}: {way}"
    elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        yield f"`{name}` is a link to a file outside the folder: copy that file here, or {way}"
    elif not os.access(path, os.R_OK):
        yield f"`{name}` cannot be read: permission denied"
    elif any(fnmatch.fnmatch(part, pattern) for part in parts[:-1] for pattern in CHECKPOINTS):
        yield f"`{name}` is a training's checkpoint: remove that folder, or --exclude '{parts[0]}'"
    elif any(fnmatch.fnmatch(parts[-1], pattern) for pattern in TRAINING):
        yield f"`{name}` is the state of a training, not of the model: {way}"
    elif any(fnmatch.fnmatch(parts[-1], pattern) for pattern in KEYS):
        yield f"`{name}` has the name of a key: {way}"
    elif not allow_pickle and any(fnmatch.fnmatch(parts[-1], pattern) for pattern in PICKLES):
        yield (
            f"`{name}` is a pickle, which runs code when it is loaded: merge to safetensors (mergekit's default), "
            "or --exclude it, or --allow-pickle"
        )
    elif not name.endswith(TENSORS) and path.stat().st_size < TEXT_LIMIT_BYTES:
        for line, kind in secrets_in(path.read_bytes(), is_json=name.endswith(".json")):
            yield f"`{name}`, line {line}, has what looks like {kind}: take it out, and revoke it if it is one"


def secrets_in(content: bytes, *, is_json: bool = False) -> Iterator[tuple[int, str]]:
    """Line and kind of what looks like a secret; a binary file has none."""
    if b"\0" in content[:8192]:
        return
    for kind, pattern in (SECRETS if is_json else SECRETS | ASSIGNED).items():
        for found in re.finditer(pattern, content):
            yield content.count(b"\n", 0, found.start()) + 1, kind


# Weights


def _weights(folder: Path, contents: Contents) -> list[str]:
    """What is wrong with the safetensors files, by index and headers."""
    top = [name for name in contents.files if "/" not in name]
    shards = [name for name in top if name.endswith(".safetensors")]
    if INDEX not in top and WHOLE not in shards:
        if any(name.endswith((".bin", ".pt", ".gguf")) for name in top):
            return []  # a problem of its own, or allowed
        if not shards:
            return [f"`{folder}` has no weights: neither {WHOLE} nor {INDEX}"]
    header, chosen = read_header(folder), weight_files(folder)
    if not header.tensors and not header.problems:
        return [f"`{WHOLE}` holds no tensor"]
    extra = [name for name in shards if name not in chosen.names]
    if chosen.named is None:
        contents.remarks += [f"`{name}` is read by nobody beside {WHOLE}" for name in extra if chosen.names]
        return header.problems
    return header.problems + [
        f"`{name}` is not named in {INDEX}: remove it, or --exclude '{name}'" for name in extra
    ]


# Loading


def _loads(folder: Path, contents: Contents) -> None:
    """Config and tokenizer load, without code of the folder's own."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        own_code = bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError) as error:
        contents.problems.append(f"`config.json` is no config: {error}")
        return
    if own_code:
        contents.remarks.append(
            "the model needs code of its own, which was not run: whether it loads is not known"
        )
        return
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        contents.problems += _missing(folder, config)
    except Exception as error:  # of whatever kind: a config is checked by the class it names
        contents.problems.append(f"`config.json` does not load: {_first_line(error)}")
    if not any(name in contents.files for name in TOKENIZER):
        contents.remarks.append("there is no tokenizer: copy the pivot's files here, or nobody can use the model")
        return
    try:
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the same
        contents.problems.append(f"the tokenizer does not load: {_first_line(error)}")


def _missing(folder: Path, config: Any) -> list[str]:
    """Tensors that no file has, that transformers would drop, or that have another shape than it wants."""
    import torch

    header = read_header(folder)
    if header.problems or not header.tensors or getattr(config, "quantization_config", None):
        return []  # problems of their own, and codes that only their quantizer knows
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in header.tensors.items()}
    try:
        found = loaded(config, tensors)
    except Unloadable:
        return []
    again = "merge again (`varm-merge check` tells what a recipe loses)"
    problems = []
    if found.missing:
        told = f"the weight files lack {patterns(sorted(found.missing))}"
        problems.append(f"{told}: transformers would load random weights there; {again}")
    read = {numberless(name) for name in tensors if name not in found.unexpected}
    if dropped := sorted(name for name in found.unexpected if numberless(name) in read):
        told = f"`config.json` has fewer layers than the weight files: transformers would drop {patterns(dropped)}"
        problems.append(f"{told}; {again}")
    for name, (given, wanted) in [*found.mismatched.items()][:1]:
        problems.append(f"`{name}` has the shape {[*given]}, and `config.json` asks for {[*wanted]}; {again}")
    return problems


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
