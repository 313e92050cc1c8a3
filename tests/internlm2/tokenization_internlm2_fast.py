"""A tokenizer of the kind that InternLM2's repository brings, for transformers 4.

There, the base class built the tokenizer from ``tokenizer.model``. In transformers 5 it loses the spaces.
"""

from typing import Any

from transformers import PreTrainedTokenizerFast


class InternLM2TokenizerFast(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "./tokenizer.model"}  # noqa: RUF012  transformers' name
    _auto_class = "AutoTokenizer"

    def __init__(self, vocab_file: str, **others: Any) -> None:
        super().__init__(vocab_file=vocab_file, **others)
