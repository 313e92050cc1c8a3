"""The files beside the weights of a merge: copied from the base model, and not left from an earlier merge."""

import json
from pathlib import Path

import architectures
import pytest
import runs
import tiny_models
import transformers

TEXT = "one two three four"


@pytest.mark.slow
def test_the_files_of_a_processor_are_those_of_the_base_model(tmp_path: Path) -> None:
    family = architectures.save_family("wav2vec2", tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(family.pivot)
    runs.merge(runs.recipe(family), tmp_path / "out")
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out").do_normalize is False


def test_generation_ends_at_the_tokens_of_the_base_model(tmp_path: Path) -> None:
    family = tiny_models.save_family(tmp_path, "mistral")
    for path in (family.pivot, *family.targets):
        tiny_models.train_tokenizer(path, TEXT)
    (family.pivot / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (family.pivot / "chat_template.json").write_text("{}")
    lines = ["tokenizer_source: base", "chat_template: chatml"]
    runs.merge(runs.recipe(family, *lines), tmp_path / "out", copy_tokenizer=True)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]
    assert not (tmp_path / "out" / "chat_template.json").exists()  # a processor would read it, not chatml


def test_no_chat_template_or_processor_of_an_earlier_merge_is_left(tmp_path: Path) -> None:
    family, out = tiny_models.save_family(tmp_path, "mistral"), tmp_path / "out"
    tiny_models.train_tokenizer(family.pivot, TEXT)
    (family.pivot / "preprocessor_config.json").write_text("{}")
    runs.merge(runs.recipe(family, "chat_template: chatml"), out, copy_tokenizer=True)
    (family.pivot / "preprocessor_config.json").unlink()
    (out / "notes.txt").touch()
    runs.merge(runs.recipe(family), out, copy_tokenizer=True)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template is None
    assert not (out / "preprocessor_config.json").exists()
    assert (out / "notes.txt").exists()


def test_an_output_folder_that_is_a_broken_link_is_kept(mistral: tiny_models.Family, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "not-mounted")
    with pytest.raises(OSError, match="out"):
        runs.merge(runs.recipe(mistral), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
