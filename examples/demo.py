"""Fine-tune two targets from one pivot, merge them with stock mergekit-yaml, and measure what the merge kept.

\b
  python examples/demo.py              under a minute on two cores; writes demo_out/ in the root of the repository
  python examples/demo.py --out DIR    the same, in another folder

The pivot is a Llama of 0.1 million parameters, and reads letters. It is trained, not for long, on two skills,
`sort:bdac>abcd` and `flip:bdac>cadb`. Each target goes on from there, with nine examples of its own skill to
one of the other. The merge is the shipped examples/demo_recipe.yaml. Nothing is downloaded.

All scores are on words that no model was trained on. Torch gets one thread: matrices this small gain little
from a second one, and the numbers do not depend on how many cores there are.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples" / "demo_recipe.yaml"
OUT = ROOT / "demo_out"  # the folder in the recipe's paths
MERGED = "merged"

# Names of one length: all texts are equally long, and no batch needs padding.
SKILLS: dict[str, Callable[[str], str]] = {
    "sort": lambda word: "".join(sorted(word)),
    "flip": lambda word: word[::-1],
}
LETTERS = "abcdefghijkl"
LENGTH = 6  # of a word, and of its answer
HELD_OUT = 1000  # words
SEED = 0
BATCH = 128
STEPS = 90


@dataclass(frozen=True)
class Stage:
    """One training run: the checkpoint's name, how often each skill is drawn, and the peak learning rate."""

    name: str
    mixture: Mapping[str, int]
    learning_rate: float


PIVOT = Stage("pivot", {"sort": 1, "flip": 3}, 3e-3)  # flipping takes longer to learn
TARGETS = (
    Stage("target_sort", {"sort": 9, "flip": 1}, 1e-3),
    Stage("target_flip", {"sort": 1, "flip": 9}, 1e-3),
)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, help="Default: demo_out")
def main(out: Path) -> None:
    """Fine-tune two tiny targets from one pivot, merge them by VaRM, and compare the four models.

    What an earlier run left in the folder is replaced.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    out = out.resolve()
    names = [PIVOT.name, *(target.name for target in TARGETS), MERGED]
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)

    torch.manual_seed(SEED)
    tokenizer = character_tokenizer()
    train(PIVOT, tokenizer, new_pivot(tokenizer), out / PIVOT.name, SEED)
    for seed, target in enumerate(TARGETS, SEED + 1):
        train(target, *load(out / PIVOT.name), out / target.name, seed)
    merge(out)

    report = json.loads((out / MERGED / "varm_weights.json").read_text("utf-8"))
    click.echo(f"\nThe targets' weights, from {MERGED}/varm_weights.json:\n\n{weights_table(report)}\n")
    click.echo(f"On {HELD_OUT} held-out words, loss in nats per answer token, and answers wholly right:\n")
    click.echo(scores_table({name: score(*load(out / name)) for name in names}))
    click.echo(f"\n{MERGED} writes {'  '.join(sample(*load(out / MERGED)))}")
    click.echo(f"{time.perf_counter() - started:.0f} s, imports not counted")


# Data and models


def words(rng: random.Random, held_out: bool) -> Iterator[str]:
    """Random words without end; one in ten, told by its checksum, is held out."""
    while True:
        word = "".join(rng.choices(LETTERS, k=LENGTH))
        if held_out == (zlib.crc32(word.encode()) % 10 == 0):
            yield word


def prompt(skill: str, word: str) -> str:
    return f"{skill}:{word}>"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and one for the beginning of the text."""
    tokens = ["<s>", "<unk>", *sorted({*LETTERS, *":>", *"".join(SKILLS)})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def new_pivot(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def load(checkpoint: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    return AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)


# Training


def train(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, checkpoint: Path, seed: int
) -> None:
    """Train ``model`` in place and save it, whole, as ``checkpoint``."""
    arguments = TrainingArguments(
        output_dir=str(checkpoint),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=stage.learning_rate,
        warmup_steps=20,
        adam_beta2=0.95,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples(stage, tokenizer, seed))
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    mixture = " : ".join(f"{count} {skill}" for skill, count in stage.mixture.items())
    seconds = result.metrics["train_runtime"]
    click.echo(f"{stage.name:12}{mixture}, {STEPS} steps, mean loss {result.training_loss:.3f}, {seconds:.0f} s")


def examples(stage: Stage, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, list[int]]]:
    """As many examples as the stage takes. Only the answers' tokens are supervised."""
    rng = random.Random(seed)
    drawn = rng.choices(list(stage.mixture), list(stage.mixture.values()), k=STEPS * BATCH)
    endless = words(rng, held_out=False)
    texts = [prompt(skill, word) + SKILLS[skill](word) for skill, word in zip(drawn, endless, strict=False)]
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) - LENGTH) + ids[-LENGTH:]}
        for ids in tokenizer(texts)["input_ids"]
    ]


# Merging


def merge(out: Path) -> None:
    """Run stock ``mergekit-yaml`` on the recipe, in the folder that the recipe's paths start from."""
    program = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    if program is None:
        raise click.ClickException(f"no mergekit-yaml beside {sys.executable}; `make setup` installs it")
    recipe = RECIPE
    if out != OUT:
        recipe = out / RECIPE.name
        recipe.write_text(RECIPE.read_text("utf-8").replace(OUT.name, out.name), "utf-8")
    arguments = [str(path.relative_to(out.parent)) for path in (recipe, out / MERGED)]
    click.echo(f"mergekit-yaml {' '.join(arguments)}")
    run = subprocess.run([program, *arguments], cwd=out.parent, capture_output=True, text=True)
    if run.returncode != 0:
        raise click.ClickException(
            f"mergekit-yaml stopped with {run.returncode}:\n{run.stdout}{run.stderr}\n"
            "`varm-merge doctor` says whether it sees the method."
        )


# Results


def weights_table(report: Mapping[str, Any]) -> str:
    """One row for each kind of unit, one column for each block; the targets are in the recipe's order."""
    rows: dict[str, dict[str, str]] = {}
    for unit in report["units"]:
        block = re.match(r"model\.layers\.(\d+)\.?", unit["unit"])
        kind = unit["unit"].removeprefix(block[0] if block else "").removesuffix(".weight") or "block"
        weights = " / ".join(f"{target['weight']:.2f}" for target in unit["targets"].values())
        rows.setdefault(kind, {})[f"block {block[1]}" if block else "no block"] = weights
    columns = sorted({column for row in rows.values() for column in row})
    targets = " / ".join(Path(target).name for target in report["targets"])
    return table([targets, *columns], [[kind, *(row.get(c, "") for c in columns)] for kind, row in rows.items()])


@torch.no_grad()
def score(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """For each skill, the loss in nats per answer token and the fraction of answers wholly right.

    Greedy decoding gets an answer right exactly when each of its tokens is the most likely one after the right
    ones before it, so one forward pass gives both numbers.
    """
    held_out = list(islice(words(random.Random(SEED), held_out=True), HELD_OUT))
    scores = {}
    for skill, answer in SKILLS.items():
        texts = [prompt(skill, word) + answer(word) for word in held_out]
        ids_BT = tokenizer(texts, return_tensors="pt")["input_ids"]
        answers_BA = ids_BT[:, -LENGTH:]
        logits_BAV = model(ids_BT[:, :-1], logits_to_keep=LENGTH).logits
        loss = torch.nn.functional.cross_entropy(logits_BAV.flatten(0, 1), answers_BA.flatten())
        right_B = (logits_BAV.argmax(-1) == answers_BA).all(-1)
        scores[skill] = (loss.item(), right_B.double().mean().item())
    return scores


def scores_table(scores: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    header = ["", *(f"{skill} {what}" for skill in SKILLS for what in ("loss", "right")), "mean loss"]
    rows = []
    for name, of in scores.items():
        cells = [cell for loss, right in of.values() for cell in (f"{loss:.3f}", f"{right:.1%}")]
        rows.append([name, *cells, f"{fmean(loss for loss, _ in of.values()):.3f}"])
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def sample(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """What a model makes of one held-out word, by each skill."""
    word = next(words(random.Random(SEED), held_out=True))
    prompts = tokenizer([prompt(skill, word) for skill in SKILLS], return_tensors="pt")
    texts = model.generate(**prompts, max_new_tokens=LENGTH, do_sample=False)
    decoded: list[str] = tokenizer.batch_decode(texts, skip_special_tokens=True)
    return decoded


if __name__ == "__main__":
    main()
