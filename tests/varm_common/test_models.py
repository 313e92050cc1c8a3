"""What is checked before a model is loaded."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from varm_common.errors import UserError
from varm_common.models import load_causal_lm


@pytest.mark.parametrize(
    ("heads", "own", "processes", "message"),
    [
        (3, 3, 2, "3 attention heads and the 3 key/value heads of a/model: it can be 3"),
        (2, 1, 2, "2 attention heads and the 1 key/value heads of a/model: no number divides both"),
        (32, 8, 16, "it can be 2, 4, 8"),
    ],
)
def test_tensor_parallel_divides_heads(heads: int, own: int, processes: int, message: str, tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=own)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refusal:
        load_causal_lm(tmp_path, "a/model", dtype="auto", device=torch.device("cpu"), tensor_parallel=processes)
    assert message in str(refusal.value)
