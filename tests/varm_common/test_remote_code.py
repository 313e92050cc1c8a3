"""Models that bring their own code, written for transformers 4: what transformers 5 loses without an error."""

import io
import sys
from pathlib import Path

import papers_hub
import pytest
import torch
import transformers
from internlm2.configuration_internlm2 import InternLM2Config
from internlm2.modeling_internlm2 import InternLM2ForCausalLM

from fusion_trainer.text.tokenizer import load_tokenizer
from varm_common import models
from varm_common.errors import UserError
from varm_common.models import load_causal_lm

INTERNLM2 = "internlm/internlm2-chat-20b"


@pytest.fixture
def internlm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of the other folder that an earlier test has used
    folder = tmp_path / "internlm2-chat-20b"
    folder.mkdir()
    for name, content in papers_hub.MODELS[INTERNLM2]().items():
        (folder / name).write_bytes(content)
    return folder


def test_buffers_that_are_in_no_file_are_those_that_the_code_computes(internlm2: Path) -> None:
    device = torch.device("cpu")
    loaded = load_causal_lm(internlm2, INTERNLM2, dtype="float32", device=device, trust_remote_code=True)
    config = InternLM2Config.from_pretrained(internlm2)
    built = InternLM2ForCausalLM(config).eval()
    parts = [torch.load(io.BytesIO(path.read_bytes()), weights_only=True) for path in internlm2.glob("*.bin")]
    built.load_state_dict({name: tensor.float() for part in parts for name, tensor in part.items()})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, built(input_ids=ids).logits, atol=1e-5)
    buffers = dict(loaded.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in built.named_buffers())


def test_tokenizer_code_that_drops_spaces_is_not_used(internlm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(internlm2, trust_remote_code=True)
    assert "▁" not in "".join(theirs.tokenize("sort the numbers"))
    warnings: list[str] = []
    monkeypatch.setattr(models.logger, "warning", lambda text, *values: warnings.append(text % values))
    tokenizer = load_tokenizer(internlm2, INTERNLM2, trust_remote_code=True)
    assert warnings == [f"the tokenizer code of {INTERNLM2} does not work with this transformers: not used"]
    (tokens,) = tokenizer.encode(["sort the\n numbers"])
    read = b"".join(tokenizer.surfaces[token] for token in tokens.ids.tolist()[1:])
    assert read.lstrip() == b"sort the\n numbers"
    assert tokenizer.sha256 == load_tokenizer(internlm2, INTERNLM2).sha256


def test_code_that_fails_is_a_sentence(internlm2: Path) -> None:
    (internlm2 / "tokenization_internlm2_fast.py").write_text("raise AttributeError('of another transformers')")
    (internlm2 / "modeling_internlm2.py").write_text("import transformers.no_more")
    with pytest.raises(UserError, match=r"no tokenizer of .* could be loaded: AttributeError: of another"):
        load_tokenizer(internlm2, INTERNLM2, trust_remote_code=True)
    with pytest.raises(UserError, match="cannot be loaded as a causal language model: "):
        load_causal_lm(internlm2, INTERNLM2, dtype="auto", device=torch.device("cpu"), trust_remote_code=True)
