"""Tiny random checkpoints of real architectures: a pivot, targets that moved away from it, tokenizers, adapters.

A target moves every parameter by noise of a size of its own, so that no two units of a merge have the same
weights: a merge that mixes units up cannot agree with the oracle.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 40
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
GROUPED = {**DECODER, "num_key_value_heads": 1}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bart": lambda: transformers.BartConfig(**ENCODER_DECODER, max_position_embeddings=32),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**DECODER),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, head_dim=8),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, head_dim=8, num_local_experts=3),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=16, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=32
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}
MODEL_CLASSES = {"bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration"}


@dataclass(frozen=True)
class Family:
    """A pivot and its targets, as folders."""

    pivot: Path
    targets: tuple[Path, ...]


def save_family(
    folder: Path, architecture: str, targets: int = 2, dtype: torch.dtype = torch.float32, **overrides: object
) -> Family:
    """Save a pivot and ``targets`` fine-tunes of it, as transformers saves them."""
    config = CONFIGS[architecture]()
    for key, value in overrides.items():
        setattr(config, key, value)
    paths = [folder / "pivot", *(folder / f"target_{number}" for number in range(1, targets + 1))]
    for number, path in enumerate(paths):
        model = new_model(architecture, config)
        if number:
            move(model.parameters(), seed=number)
        model.to(dtype).save_pretrained(path)
        if architecture == "gpt_neox":
            _add_old_buffers(path / "model.safetensors", config)
    return Family(paths[0], tuple(paths[1:]))


def new_model(architecture: str, config: PretrainedConfig) -> PreTrainedModel:
    """The pivot of ``architecture``: the same random weights at every call."""
    torch.manual_seed(0)
    if architecture in MODEL_CLASSES:
        return getattr(transformers, MODEL_CLASSES[architecture])(config)
    return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def move(tensors: Iterable[torch.Tensor], seed: int) -> None:
    """Fine-tune: move every tensor by noise, each by a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        size = 0.05 * torch.exp(torch.randn((), generator=generator))
        tensor += (size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def save_projectors(folder: Path) -> Family:
    """The vision-to-text projectors of a pivot and two fine-tunes of Qwen2-VL, without the rest of the model."""
    config = transformers.Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"])
    shapes = {"ln_q.weight": [4], "ln_q.bias": [4], "mlp.0.weight": [8, 8], "mlp.0.bias": [8]}
    shapes |= {"mlp.2.weight": [4, 8], "mlp.2.bias": [4]}
    paths = [folder / "pivot", folder / "target_1", folder / "target_2"]
    for number, path in enumerate(paths):
        config.save_pretrained(path)
        tensors = {f"visual.merger.{name}": torch.ones(shape) for name, shape in shapes.items()}
        if number:
            move(tensors.values(), seed=number)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return Family(paths[0], tuple(paths[1:]))


def resave(source: Path, folder: Path, *, shard_size: str = "1GB", pickled: bool = False) -> Path:
    """The checkpoint ``source`` once more, in shards or as the ``.bin`` files of old."""
    config = transformers.AutoConfig.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    if not pickled:
        model.save_pretrained(folder, max_shard_size=shard_size)
        return folder
    config.save_pretrained(folder)
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def edit(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def damaged(family: Family, folder: Path, tensor: str, value: float) -> Family:
    """``family`` with one element of ``tensor`` in its last target replaced by ``value``."""
    target = shutil.copytree(family.targets[-1], folder)
    edit(target, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(value))
    return Family(family.pivot, (*family.targets[:-1], target))


def train_tokenizer(folder: Path, text: str, added: Sequence[str] = ()) -> dict[str, int]:
    """Train a tokenizer on ``text``, save it beside a checkpoint; returns its vocabulary."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(vocab_size=VOCABULARY - len(added), special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    return fast.get_vocab()


def save_adapter(pivot: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter on the attention of ``pivot``, as peft saves it."""
    import peft

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(pivot)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def _add_old_buffers(checkpoint: Path, config: PretrainedConfig) -> None:
    """mergekit wants the buffers that GPT-NeoX checkpoints carried: a mask of bools, a scalar, frequencies."""
    tensors = load_file(checkpoint)
    positions = config.max_position_embeddings
    for layer in range(config.num_hidden_layers):
        attention = f"gpt_neox.layers.{layer}.attention"
        mask = torch.ones(positions, positions, dtype=torch.bool).tril()
        tensors[f"{attention}.bias"] = mask.view(1, 1, positions, positions)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.1])
    save_file(tensors, checkpoint, metadata={"format": "pt"})
