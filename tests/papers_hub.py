"""The papers' models and data sets on a local Hub: tiny, under their names, with files as the real ones have."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import sentencepiece
import tiny_sources
import tiny_tokenizers
import torch
import transformers
from hub_server import Hub

from fusion_trainer.data.templates import FOLDER

Files = dict[str, bytes]

CODE = Path(__file__).parent / "internlm2"
DATA_SETS = ("datasets/FuseAI/FuseChat-Mixture", "datasets/JeanKaddour/minipile")
OPENCHAT, CHATML, MISTRAL = ((FOLDER / f"{name}.jinja").read_text() for name in ("openchat", "chatml", "mistral"))
CHATS = tiny_sources.made_up_chats(16, seed=17, words=12, turns=2)
DOCUMENTS = tiny_sources.made_up_chats(64, seed=18, words=30, turns=2)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 4096}
OLD_BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
MPT = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "expansion_ratio": 2,
    "max_seq_len": 2048,
}
MPT_CONFIG = {
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "architectures": ["MPTForCausalLM"],
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in", "init_std": 0.02, "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0,
}
"""What the config of mosaicml/mpt-7b has besides the sizes."""
INTERNLM2_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2Model",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
INTERNLM2_TOKENIZERS = [
    "tokenization_internlm2.InternLM2Tokenizer",
    "tokenization_internlm2_fast.InternLM2TokenizerFast",
]


def fill(hub: Hub, revisions: Mapping[str, str]) -> None:
    """Add everything that the pipelines of the papers download.

    Args:
        hub: The Hub.
        revisions: Models that are only at this revision; their branch ``main`` is empty.
    """
    for name, files in MODELS.items():
        gated = name.startswith("meta-llama/")
        hub.add(name, files(), revision=revisions.get(name, "main"), gated=gated)
    hub.add(DATA_SETS[0], _mixture())
    hub.add(DATA_SETS[1], _minipile())


# The models


def _openchat() -> Files:
    model = tiny_sources.new_source("mistral", len(_bpe()), seed=1, **GROUPED, head_dim=8)
    return {**_pickled(model, shards=2), **_tokenizer(_bpe(), OPENCHAT), "openchat.json": b"{}"}


def _starling() -> Files:
    model = tiny_sources.new_source("mistral", len(_bpe()), seed=2, **GROUPED, head_dim=8)
    return {**_pickled(model, shards=3), **_tokenizer(_bpe(), OPENCHAT)}


def _solar() -> Files:
    model = tiny_sources.new_source("llama", len(_bpe("chatml")), seed=3, **GROUPED)
    return {**_safe(model), **_tokenizer(_bpe("chatml"), CHATML)}


def _hermes_mixtral() -> Files:
    model = tiny_sources.new_source("mixtral", len(_bpe("chatml")), seed=4, **GROUPED, head_dim=8)
    return {**_safe(model), **_tokenizer(_bpe("chatml"), CHATML)}


def _mixtral() -> Files:
    """The repository has the weights a second time, in a format of its own."""
    model = tiny_sources.new_source("mixtral", len(_bpe("")), seed=5, **GROUPED, head_dim=8)
    second = {f"consolidated.0{number}.pt": b"not to be downloaded" for number in range(8)}
    return {**_safe(model), **_tokenizer(_bpe(""), MISTRAL), **second}


def _qwen() -> Files:
    tokenizer = tiny_tokenizers.train("byte_level_bpe", special=("<|im_start|>", "<|im_end|>"))
    model = tiny_sources.new_source("qwen2", len(tokenizer) + 40, seed=6, **GROUPED, tie_word_embeddings=False)
    return {**_safe(model), **_tokenizer(tokenizer, CHATML)}


def _llama_2() -> Files:
    """The repository has its weights as safetensors and as pickles."""
    model = tiny_sources.new_source("llama", len(_bpe("")), seed=7, **GROUPED)
    return {**_pickled(model, shards=2), **_safe(model), **_tokenizer(_bpe(""), None)}


def _open_llama() -> Files:
    """Pickles that still hold the buffers of their time, and a tokenizer of SentencePiece alone."""
    model = tiny_sources.new_source("llama", sentencepiece_size(), seed=8, **GROUPED)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        **config,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
        "pad_token": None,
    }
    return {
        **_pickled(model, shards=2, more={OLD_BUFFER: torch.ones(4)}),
        "tokenizer.model": _sentencepiece(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(config | {"tokenizer_class": None}).encode(),
    }


def _mpt() -> Files:
    tokenizer = tiny_tokenizers.train("byte_level_bpe")
    model = tiny_sources.new_source("mpt", len(tokenizer) + 24, seed=9, **MPT)
    files = {**_pickled(model, shards=2), **_tokenizer(tokenizer, None)}
    code = {"configuration_mpt.py": b"raise SystemExit('code was run')", "modeling_mpt.py": b"raise SystemExit(1)"}
    return {**files, **code, "config.json": _changed(files["config.json"], MPT_CONFIG)}


def _internlm2() -> Files:
    """Code of its own, weights packed by it, pickled, and a tokenizer of SentencePiece."""
    from internlm2.configuration_internlm2 import InternLM2Config
    from internlm2.modeling_internlm2 import InternLM2ForCausalLM

    torch.manual_seed(10)
    config = InternLM2Config(vocab_size=sentencepiece_size() + 8, bias=False, **GROUPED)
    files = _pickled(InternLM2ForCausalLM(config), shards=2)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    ends = ("<unk>", "<s>", "</s>")
    added = {str(number): {"content": token, "special": True} for number, token in enumerate(ends)}
    first = sentencepiece_size()
    named = ("<|im_start|>", "<|im_end|>")
    added |= {str(first + number): {"content": token, "special": True} for number, token in enumerate(named)}
    settings = {
        **special,
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": INTERNLM2_TOKENIZERS},
        "added_tokens_decoder": added,
        "chat_template": "{{ bos_token }}" + CHATML,
    }
    return {
        **files,
        **{path.name: path.read_bytes() for path in CODE.glob("*.py")},
        "config.json": _changed(files["config.json"], {"auto_map": INTERNLM2_MAP}),
        "tokenizer.model": _sentencepiece(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
    }


MODELS: dict[str, Callable[[], Files]] = {
    "openchat/openchat_3.5": _openchat,
    "berkeley-nest/Starling-LM-7B-alpha": _starling,
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": _solar,
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": _hermes_mixtral,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _mixtral,
    "internlm/internlm2-chat-20b": _internlm2,
    "Qwen/Qwen1.5-72B-Chat": _qwen,
    "meta-llama/Llama-2-7b-hf": _llama_2,
    "openlm-research/open_llama_7b_v2": _open_llama,
    "mosaicml/mpt-7b": _mpt,
}


# Their files


def _safe(model: Any) -> Files:
    """Safetensors in shards with an index, the config and the generation config."""
    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder, max_shard_size=20_000)
        return _contents(Path(folder))


def _pickled(model: Any, shards: int, more: Mapping[str, torch.Tensor] | None = None) -> Files:
    """The same as ``.bin`` shards. Some tensors are views, as in checkpoints that were saved from a larger one."""
    tensors = {**model.bfloat16().state_dict(), **(more or {})}
    widened = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[widened] = torch.cat([tensors[widened]] * 2)[: len(tensors[widened])]
    files: Files = {}
    places = {}
    for number in range(shards):
        shard = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        own = dict(list(tensors.items())[number::shards])
        saved = io.BytesIO()
        torch.save(own, saved)
        files[shard] = saved.getvalue()
        places |= dict.fromkeys(own, shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    files["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        (getattr(model, "generation_config", None) or transformers.GenerationConfig()).save_pretrained(folder)
        return {**_contents(Path(folder)), **files}


def _tokenizer(tokenizer: Any, template: str | None) -> Files:
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        return _contents(Path(folder))


def _contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _changed(config: bytes, changes: Mapping[str, Any]) -> bytes:
    return json.dumps({**json.loads(config), **changes}).encode()


@cache
def _bpe(speaks: str = "openchat") -> transformers.PreTrainedTokenizerFast:
    special = {"openchat": (tiny_sources.END_OF_TURN,), "chatml": ("<|im_start|>", "<|im_end|>"), "": ()}
    return tiny_tokenizers.train("sentencepiece_bpe", special=special[speaks])


@cache
def _sentencepiece() -> bytes:
    """A real ``tokenizer.model``, as Llama's, OpenLLaMA's and InternLM2's are."""
    text = [
        line for part in (*tiny_tokenizers.TEXT, tiny_sources.TEXT) for line in part.split("\n") if line.strip()
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def sentencepiece_size() -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece()).get_piece_size())


# The data


def _mixture() -> Files:
    """A JSON array, as FuseAI/FuseChat-Mixture has it."""
    rows = [
        {
            "id": f"mixture_{number}",
            "conversations": [
                {"from": who, "value": text}
                for pair in chat
                for who, text in zip(("human", "gpt"), pair, strict=True)
            ],
        }
        for number, chat in enumerate(CHATS)
    ]
    card = "---\nlicense: cc-by-nc-4.0\nlanguage:\n- en\nsize_categories:\n- 10K<n<100K\n---\n# FuseChat-Mixture\n"
    return {
        ".gitattributes": b"*.parquet filter=lfs\n",
        "README.md": card.encode(),
        "fusechat_v1_clean_split_2048_filter_wrong.json": json.dumps(rows).encode(),
    }


def _minipile() -> Files:
    """Parquet in three splits, described in the card."""
    texts = [" ".join(text for pair in chat for text in pair) for chat in DOCUMENTS]
    splits = {"train": texts[:-4], "validation": texts[-4:-2], "test": texts[-2:]}
    described = "".join(
        f"  - name: {name}\n    num_bytes: {sum(map(len, rows))}\n    num_examples: {len(rows)}\n"
        for name, rows in splits.items()
    )
    info = f"dataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n{described}"
    half = len(splits["train"]) // 2
    parts = {
        "train-00000-of-00002-6fbcb5959bd01547": splits["train"][:half],
        "train-00001-of-00002-6fbcb5959bd01547": splits["train"][half:],
        "validation-00000-of-00001-a2192e61a091cecb": splits["validation"],
        "test-00000-of-00001-010a6231c4b54d31": splits["test"],
    }
    return {
        "README.md": f"---\nlanguage: en\n{info}---\n# MiniPile\n".encode(),
        **{f"data/{name}.parquet": _parquet(rows) for name, rows in parts.items()},
    }


def _parquet(texts: Sequence[str]) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), written)
    return written.getvalue()
