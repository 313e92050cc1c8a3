"""Tiny models of many architectures, as transformers builds, saves and loads them.

A name maps to a function, so that the modules of transformers are imported only for the architectures in use.
"""

import json
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from tiny_models import Family
from transformers import PretrainedConfig

Architecture = Callable[[], tuple[type, PretrainedConfig]]

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZE, **TOKENS}
GROUPED = {**DECODER, "num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
VISION = {**SIZE, "image_size": 8, "patch_size": 4}
DISTILBERT = {
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
}
FALCON = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = {"vocab_size": 48, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
LATENT = {  # attention of DeepSeek
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 4, "mamba_expand": 2}
SEQ2SEQ = {
    "vocab_size": 48,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
ROPE_OF_IMAGES = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def _model(class_name: str, config_name: str, *settings: Mapping[str, Any], **more: Any) -> Architecture:
    return lambda: (
        getattr(transformers, class_name),
        getattr(transformers, config_name)(**ChainMap(more, *settings)),
    )


_causal = partial(_model, "AutoModelForCausalLM")


def _gemma3() -> tuple[type, PretrainedConfig]:
    text = transformers.Gemma3TextConfig(**GROUPED, head_dim=8)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration, config


def _llava() -> tuple[type, PretrainedConfig]:
    text, vision = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=40)
    return transformers.LlavaForConditionalGeneration, config


def _mistral3() -> tuple[type, PretrainedConfig]:
    text = transformers.MistralConfig(**GROUPED, head_dim=8)
    vision = transformers.PixtralVisionConfig(**VISION)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=40, tie_word_embeddings=False
    )
    return transformers.Mistral3ForConditionalGeneration, config


def _qwen2_vl() -> tuple[type, PretrainedConfig]:
    text = {**GROUPED, "rope_parameters": ROPE_OF_IMAGES}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=40)
    return transformers.Qwen2VLForConditionalGeneration, config


def _qwen2_5_vl() -> tuple[type, PretrainedConfig]:
    text = {**GROUPED, "rope_parameters": ROPE_OF_IMAGES}
    vision = {**SIZE, "depth": 2, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=40)
    return transformers.Qwen2_5_VLForConditionalGeneration, config


def _qwen3_vl() -> tuple[type, PretrainedConfig]:
    text = {**GROUPED, "head_dim": 8, "rope_parameters": ROPE_OF_IMAGES}
    vision = {**SIZE, "depth": 3, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=40)
    return transformers.Qwen3VLForConditionalGeneration, config


ARCHITECTURES: dict[str, Architecture] = {
    # Decoders
    "afmoe": _causal("AfmoeConfig", GROUPED, EXPERTS, head_dim=8, num_shared_experts=1),
    "apertus": _causal("ApertusConfig", GROUPED),
    "arcee": _causal("ArceeConfig", GROUPED),
    "bloom": _causal("BloomConfig", vocab_size=48, hidden_size=16, n_layer=2, n_head=2),
    "cohere": _causal("CohereConfig", GROUPED),
    "cohere2": _causal("Cohere2Config", GROUPED),
    "deepseek_v2": _causal("DeepseekV2Config", DECODER, LATENT, q_lora_rank=None),
    "deepseek_v3": _causal("DeepseekV3Config", DECODER, LATENT, q_lora_rank=8, n_group=2, topk_group=1),
    "ernie4_5": _causal("Ernie4_5Config", GROUPED, head_dim=8),
    "ernie4_5_moe": _causal("Ernie4_5_MoeConfig", GROUPED, moe_intermediate_size=8, moe_k=2, moe_num_experts=3),
    "exaone4": _causal("Exaone4Config", GROUPED),
    "falcon": _causal("FalconConfig", FALCON),
    "falcon new_decoder_architecture": _causal(
        "FalconConfig", FALCON, num_kv_heads=1, new_decoder_architecture=True
    ),
    "falcon_h1": _causal("FalconH1Config", GROUPED, MAMBA, mamba_d_ssm=32, mamba_n_heads=4),
    "gemma": _causal("GemmaConfig", GROUPED, head_dim=8),
    "gemma2": _causal("Gemma2Config", GROUPED, head_dim=8),
    "gemma2 attention_bias": _causal("Gemma2Config", GROUPED, head_dim=8, attention_bias=True),
    "gemma3_text": _causal("Gemma3TextConfig", GROUPED, head_dim=8),
    "glm": _causal("GlmConfig", GROUPED, head_dim=8),
    "glm4": _causal("Glm4Config", GROUPED, head_dim=8),
    "glm4_moe": _causal(
        "Glm4MoeConfig",
        GROUPED,
        n_routed_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
    ),
    "gpt2": _causal("GPT2Config", GPT),
    "gpt_bigcode": _causal("GPTBigCodeConfig", GPT),
    "gpt_neo": _causal(
        "GPTNeoConfig", vocab_size=48, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    ),
    "gpt_neox": _causal("GPTNeoXConfig", DECODER),
    "gpt_oss": _causal("GptOssConfig", GROUPED, LOCAL_EXPERTS, head_dim=8),
    "gptj": _causal("GPTJConfig", GPT, rotary_dim=4),
    "granite": _causal("GraniteConfig", GROUPED),
    "granitemoe": _causal("GraniteMoeConfig", GROUPED, LOCAL_EXPERTS),
    "granitemoehybrid": _causal(
        "GraniteMoeHybridConfig",
        GROUPED,
        LOCAL_EXPERTS,
        MAMBA,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=8,
        mamba_n_heads=4,
        mamba_d_head=8,
    ),
    "hunyuan_v1_moe": _causal("HunYuanMoEV1Config", GROUPED, num_experts=3, moe_topk=2, head_dim=8),
    "jamba": _causal(
        "JambaConfig",
        GROUPED,
        MAMBA,
        num_experts=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "lfm2": _causal("Lfm2Config", GROUPED, layer_types=["conv", "full_attention"]),
    "llama": _causal("LlamaConfig", GROUPED),
    "llama attention_bias": _causal("LlamaConfig", GROUPED, attention_bias=True),
    "llama mlp_bias": _causal("LlamaConfig", GROUPED, mlp_bias=True),
    "llama tied": _causal("LlamaConfig", GROUPED, TIED),
    "llama4_text": _causal(
        "Llama4TextConfig", GROUPED, num_local_experts=3, head_dim=8, intermediate_size_mlp=24, moe_layers=[1]
    ),
    "mamba": _causal("MambaConfig", vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2),
    "mamba2": _causal(
        "Mamba2Config",
        vocab_size=48,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        n_groups=1,
    ),
    "minimax": _causal(
        "MiniMaxConfig", GROUPED, LOCAL_EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "mistral": _causal("MistralConfig", GROUPED, head_dim=8),
    "mixtral": _causal("MixtralConfig", GROUPED, LOCAL_EXPERTS, UNTIED),
    "mixtral tied": _causal("MixtralConfig", GROUPED, LOCAL_EXPERTS, TIED),
    "mpt": _causal("MptConfig", vocab_size=48, d_model=16, n_heads=2, n_layers=2, max_seq_len=32),
    "nemotron": _causal("NemotronConfig", GROUPED),
    "olmo": _causal("OlmoConfig", GROUPED),
    "olmo2": _causal("Olmo2Config", GROUPED),
    "olmo2 attention_bias": _causal("Olmo2Config", GROUPED, attention_bias=True),
    "olmo3": _causal("Olmo3Config", GROUPED),
    "olmoe": _causal("OlmoeConfig", GROUPED, num_experts=3, num_experts_per_tok=2),
    "opt": _causal("OPTConfig", DECODER, ffn_dim=24, word_embed_proj_dim=16),
    "phi": _causal("PhiConfig", DECODER),
    "phi qk_layernorm": _causal("PhiConfig", DECODER, qk_layernorm=True),
    "phi3": _causal("Phi3Config", GROUPED, UNTIED),
    "phi3 tied": _causal("Phi3Config", GROUPED, TIED),
    "phimoe": _causal("PhimoeConfig", GROUPED, LOCAL_EXPERTS, UNTIED),
    "qwen2": _causal("Qwen2Config", GROUPED, UNTIED),
    "qwen2 tied": _causal("Qwen2Config", GROUPED, TIED),
    "qwen2_moe": _causal("Qwen2MoeConfig", GROUPED, EXPERTS, shared_expert_intermediate_size=8),
    "qwen3": _causal("Qwen3Config", GROUPED, head_dim=8),
    "qwen3 attention_bias": _causal("Qwen3Config", GROUPED, head_dim=8, attention_bias=True),
    "qwen3_moe": _causal("Qwen3MoeConfig", GROUPED, EXPERTS, head_dim=8),
    "qwen3_next": _causal(
        "Qwen3NextConfig",
        GROUPED,
        EXPERTS,
        head_dim=8,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "rwkv": _causal("RwkvConfig", vocab_size=48, context_length=32, hidden_size=16, num_hidden_layers=2),
    "smollm3": _causal("SmolLM3Config", GROUPED),
    "stablelm": _causal("StableLmConfig", GROUPED),
    "stablelm qk_layernorm": _causal("StableLmConfig", GROUPED, qk_layernorm=True),
    "stablelm use_qkv_bias": _causal("StableLmConfig", GROUPED, use_qkv_bias=True),
    "starcoder2": _causal("Starcoder2Config", GROUPED),
    "starcoder2 use_bias=False": _causal("Starcoder2Config", GROUPED, use_bias=False),
    # Encoders, classifiers, encoder-decoders
    "albert masked": _model("AutoModelForMaskedLM", "AlbertConfig", DECODER, embedding_size=8),
    "bart": _model("AutoModelForSeq2SeqLM", "BartConfig", SEQ2SEQ, max_position_embeddings=32),
    "bert": _model("AutoModel", "BertConfig", DECODER),
    "bert masked": _model("AutoModelForMaskedLM", "BertConfig", DECODER),
    "bert classifier": _model("AutoModelForSequenceClassification", "BertConfig", DECODER),
    "bert tokens": _model("AutoModelForTokenClassification", "BertConfig", DECODER),
    "deberta_v2 masked": _model("AutoModelForMaskedLM", "DebertaV2Config", DECODER, relative_attention=True),
    "distilbert": _model("AutoModel", "DistilBertConfig", DISTILBERT),
    "distilbert classifier": _model("AutoModelForSequenceClassification", "DistilBertConfig", DISTILBERT),
    "distilbert masked": _model("AutoModelForMaskedLM", "DistilBertConfig", DISTILBERT),
    "electra masked": _model("AutoModelForMaskedLM", "ElectraConfig", DECODER, embedding_size=8),
    "gpt2 classifier": _model("AutoModelForSequenceClassification", "GPT2Config", GPT, num_labels=3),
    "llama headless": _model("AutoModel", "LlamaConfig", GROUPED),
    "llama classifier": _model("AutoModelForSequenceClassification", "LlamaConfig", GROUPED, num_labels=3),
    "modernbert masked": _model("AutoModelForMaskedLM", "ModernBertConfig", DECODER),
    "roberta": _model("AutoModel", "RobertaConfig", DECODER),
    "roberta classifier": _model("AutoModelForSequenceClassification", "RobertaConfig", DECODER),
    "roberta masked": _model("AutoModelForMaskedLM", "RobertaConfig", DECODER),
    "t5": _model("AutoModelForSeq2SeqLM", "T5Config", T5),
    "t5 gated": _model("AutoModelForSeq2SeqLM", "T5Config", T5, feed_forward_proj="gated-gelu"),
    # Images and speech
    "clip": _model("AutoModel", "CLIPConfig", text_config=DECODER, vision_config=VISION, projection_dim=16),
    "convnext": _model(
        "AutoModelForImageClassification", "ConvNextConfig", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]
    ),
    "dinov2": _model("AutoModel", "Dinov2Config", VISION),
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "resnet": _model(
        "AutoModelForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
    "swin": _model(
        "AutoModelForImageClassification",
        "SwinConfig",
        image_size=16,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
    ),
    "vit": _model("AutoModelForImageClassification", "ViTConfig", VISION),
    "wav2vec2": _model(
        "AutoModelForCTC",
        "Wav2Vec2Config",
        SIZE,
        conv_dim=[8, 8],
        conv_kernel=[3, 3],
        conv_stride=[2, 2],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "whisper": _model(
        "AutoModelForSpeechSeq2Seq",
        "WhisperConfig",
        SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
    ),
}


@dataclass(frozen=True)
class Loaded:
    """What ``from_pretrained`` loads from a folder.

    Attributes:
        faults: Tensors that are missing, unexpected, or of another shape.
        tensors: Parameters and buffers by name.
    """

    faults: dict[str, list[str]]
    tensors: dict[str, torch.Tensor]


def save_family(name: str, folder: Path, targets: int = 2) -> Family:
    """Save a pivot and ``targets`` fine-tunes of it in float32; buffers are those of the pivot."""
    model_class, config = ARCHITECTURES[name]()
    torch.manual_seed(0)
    model = getattr(model_class, "from_config", model_class)(config)
    pivot = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    paths = [folder / "pivot", *(folder / f"target_{number}" for number in range(1, targets + 1))]
    for number, path in enumerate(paths):
        if number:
            model.load_state_dict(pivot)
            tiny_models.move(model.parameters(), seed=number)
        model.save_pretrained(path)
    return Family(paths[0], tuple(paths[1:]))


def load(folder: Path) -> Loaded:
    """Load the model of ``folder`` by the class that its config names."""
    (class_name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return Loaded({kind: names for kind, names in faults.items() if names}, model.state_dict())
