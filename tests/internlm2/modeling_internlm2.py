"""InternLM2 in the layout of its repository: queries, keys and values packed into ``wqkv``, group by group.

The published file is written for transformers 4. This one has its names and shapes, and runs with transformers 5.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_internlm2 import InternLM2Config


class InternLM2RotaryEmbedding(nn.Module):
    """Its tables are in no file: they are computed when the model is built."""

    def __init__(self, width: int, length: int, theta: float) -> None:
        super().__init__()
        inv_freq = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        angles_LD = torch.outer(torch.arange(length).to(inv_freq.dtype), inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles_LD.cos(), persistent=False)
        self.register_buffer("sin_cached", angles_LD.sin(), persistent=False)

    def forward(self, states_BHLD: Tensor) -> Tensor:
        length = states_BHLD.shape[-2]
        first, second = states_BHLD.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        rotated = states_BHLD * self.cos_cached[:length] + turned * self.sin_cached[:length]
        return rotated.to(states_BHLD.dtype)


class InternLM2Attention(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.width = config.hidden_size // config.num_attention_heads
        packed = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.width
        self.wqkv = nn.Linear(config.hidden_size, packed, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.rotary_emb = InternLM2RotaryEmbedding(self.width, config.max_position_embeddings, config.rope_theta)

    def forward(self, hidden_BLH: Tensor, mask_B1LL: Tensor) -> Tensor:
        batch, length, _ = hidden_BLH.shape
        packed = self.wqkv(hidden_BLH).view(batch, length, -1, self.groups + 2, self.width)
        query = packed[..., : self.groups, :].flatten(2, 3).transpose(1, 2)
        key, value = (
            packed[..., place, :].transpose(1, 2).repeat_interleave(self.groups, 1) for place in (-2, -1)
        )
        query, key = self.rotary_emb(query), self.rotary_emb(key)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1LL)
        output: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return output


class InternLM2MLP(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))
        return output


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        output: Tensor = hidden + self.feed_forward(self.ffn_norm(hidden))
        return output


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)


class InternLM2Model(InternLM2PreTrainedModel):
    _auto_class = "AutoModel"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        hidden = self.tok_embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class InternLM2ForCausalLM(InternLM2PreTrainedModel):
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return CausalLMOutputWithPast(logits=self.output(hidden).float())
