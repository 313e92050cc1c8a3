"""Checks a merged model's folder before it is published.

The checks find a model that is incomplete or does not load, and files that nobody meant to publish. They read no
weight values, run no code from the folder and print no secret.
"""

import fnmatch
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from varm_common.checkpoints import INDEX, WHOLE, read_header, weight_files
from varm_merge.merging.loading import Unloadable, loaded, numberless, patterns
from varm_merge.publishing.card import Findings

__all__ = ["look", "secrets_in"]

IGNORED = ("stage.json", "lock", "*.tmp", "*.lock", "*~", "__pycache__")
"""Bookkeeping of this project's pipeline and of other programs."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
CHECKPOINTS = ("checkpoint-*", "global_step*")
TRAINING = (
    *("optimizer[._]*", "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin", "trainer_state.json"),
    *("*_states.pt", "*.distcp"),
)
KEYS = ("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", "credentials*", "*.kdbx")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
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
ASSIGNED = rb"(?:KEY|TOKEN|SECRET)[\"']?[ \t]*=[ \t]*[\"']?(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}"
"""Not searched in JSON, which assigns nothing this way; a vocabulary may contain anything."""
TENSORS = (".safetensors", ".gguf", *(pattern.removeprefix("*") for pattern in PICKLES))
TEXT_LIMIT_BYTES = 200_000_000


def look(
    folder: Path, findings: Findings, exclude: Sequence[str] = (), allow_pickle: bool = False
) -> tuple[dict[str, Path], dict[str, str]]:
    """Check a folder before it is uploaded, with problems and remarks in ``findings``.

    ``exclude`` has patterns of files to leave out, as for ``hf upload --exclude``.

    Returns:
        The files to upload, by their path in the repository; and the files that stay here, with the reason.
    """
    files, left_out = {}, {}
    for name, why in _walk(folder, findings):
        if why:
            left_out[name] = why
        elif _is_one_of(name, exclude) or any(name.startswith(f"{pattern}/") for pattern in exclude):
            left_out[name] = "excluded"
        else:
            files[name] = folder / name
            findings.problems += _file_problems(name, folder, allow_pickle)
    if not (folder / "config.json").is_file():
        kind = "an adapter, not a merged model" if (folder / "adapter_config.json").is_file() else "not a model"
        findings.problems.append(f"`{folder}` has no config.json: it is {kind}")
    _check_weights(folder, files, findings)
    if "config.json" in files:
        findings.problems += _loading_problems(folder, files, findings)
    return files, left_out


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _walk(folder: Path, findings: Findings) -> Iterator[tuple[str, str]]:
    """Names of all files, and of folders that are not entered; with the reason if they are not published."""

    def unreadable(error: OSError) -> None:
        findings.problems.append(f"`{error.filename}` cannot be read: {error.strerror}")

    for top, folders, files in os.walk(folder, onerror=unreadable):
        for name in sorted([*folders, *files]):
            path = Path(top, name)
            shown = path.relative_to(folder).as_posix()
            why = "hidden" if name.startswith(".") else "temporary" if _is_one_of(name, IGNORED) else ""
            if name in files or path.is_symlink():
                yield shown, why
            elif why:
                folders.remove(name)
                yield f"{shown}/", why


def _file_problems(name: str, folder: Path, allow_pickle: bool) -> Iterator[str]:
    path, way = folder / name, f"remove it, or leave it out with --exclude '{name}'"
    *folders, last = name.split("/")
    if not path.is_file():
        kind = "a broken link" if path.is_symlink() and not path.exists() else "not a regular file"
        yield f"`{name}` is {kind}: {way}"
    elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        yield f"`{name}` links to a file outside the folder: copy that file here, or {way}"
    elif not os.access(path, os.R_OK):
        yield f"`{name}` cannot be read: permission denied"
    elif any(_is_one_of(part, CHECKPOINTS) for part in folders):
        yield f"`{name}` is a training checkpoint: remove that folder, or --exclude '{folders[0]}'"
    elif _is_one_of(last, TRAINING):
        yield f"`{name}` is training state, not part of the model: {way}"
    elif _is_one_of(last, KEYS):
        yield f"`{name}` has the name of a key file: {way}"
    elif _is_one_of(last, PICKLES) and not allow_pickle:
        advice = "merge to safetensors (mergekit's default), or use --exclude or --allow-pickle"
        yield f"`{name}` is a pickle, which can run code when loaded: {advice}"
    elif not name.endswith(TENSORS) and path.stat().st_size < TEXT_LIMIT_BYTES:
        for line, kind in secrets_in(path.read_bytes(), is_json=name.endswith(".json")):
            yield f"`{name}`, line {line}, seems to contain {kind}: remove it, and revoke it if it is real"


def secrets_in(content: bytes, *, is_json: bool = False) -> Iterator[tuple[int, str]]:
    """Line and kind of everything that looks like a secret; binary files are not searched."""
    if b"\0" in content[:8192]:
        return
    for kind, pattern in (SECRETS if is_json else {**SECRETS, "an assigned key": ASSIGNED}).items():
        for match in re.finditer(pattern, content):
            yield content.count(b"\n", 0, match.start()) + 1, kind


def _check_weights(folder: Path, files: Collection[str], findings: Findings) -> None:
    """Check the weight files, by index and headers."""
    header, chosen = read_header(folder), weight_files(folder)
    findings.problems += header.problems
    top = [name for name in files if "/" not in name]
    if not header.tensors and not header.problems and not any(name.endswith(TENSORS[1:]) for name in top):
        findings.problems.append(f"`{folder}` has no weights: neither {WHOLE} nor {INDEX} names a tensor")
    for name in top:
        if name.endswith(".safetensors") and name not in chosen.names:
            if chosen.named is not None:
                findings.problems.append(f"`{name}` is not named in {INDEX}: remove it, or --exclude '{name}'")
            elif chosen.names:
                findings.remarks.append(f"nothing reads `{name}` beside {chosen.names[0]}")


def _loading_problems(folder: Path, files: Collection[str], findings: Findings) -> Iterator[str]:
    """Load config and tokenizer, without code from the folder."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        needs_code = bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError) as error:
        yield f"`config.json` is not a model's config: {error}"
        return
    if needs_code:
        reason = "the model needs its own code, which was not run"
        findings.remarks.append(f"{reason}; whether it loads was not checked")
        return
    settings = {"trust_remote_code": False, "local_files_only": True}
    try:
        yield from _tensor_problems(folder, transformers.AutoConfig.from_pretrained(folder, **settings))
    except Exception as error:  # the class that the config names may raise anything
        yield f"`config.json` does not load: {_first_line(error)}"
    if not any(name in files for name in TOKENIZER):
        findings.remarks.append("there is no tokenizer: copy the pivot's files, or nobody can use the model")
        return
    try:
        transformers.AutoTokenizer.from_pretrained(folder, **settings)
    except Exception as error:  # as above
        yield f"the tokenizer does not load: {_first_line(error)}"


def _tensor_problems(folder: Path, config: Any) -> Iterator[str]:
    """Tensors that are missing, that transformers would drop, or whose shape differs from the config's."""
    import torch

    header = read_header(folder)
    if header.problems or getattr(config, "quantization_config", None):
        return  # reported already; or encoded in a way that only their quantizer knows
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in header.tensors.items()}
    try:
        result = loaded(config, tensors)
    except Unloadable:
        return
    known = {numberless(name) for name in tensors if name not in result.unexpected}
    dropped = sorted(name for name in result.unexpected if numberless(name) in known)
    unlike = ", ".join(f"`{name}`: {[*has]}, not {[*wants]}" for name, (has, wants) in result.mismatched.items())
    for difference in (
        result.missing and f"the files lack {patterns(sorted(result.missing))}",
        dropped and f"the config has fewer layers than the files, without {patterns(dropped)}",
        unlike and f"shapes differ ({unlike[:300]})",
    ):
        if difference:
            yield f"`config.json` does not fit the weight files: {difference}; `varm-merge check` shows why"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
