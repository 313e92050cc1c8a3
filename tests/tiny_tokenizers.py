"""Tokenizers of the three kinds that models have, trained on a little text."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT = [
    "The quick brown fox jumps over the lazy dog. A chat between a user and an assistant.",
    "user assistant system USER: ASSISTANT: GPT4 Correct User: GPT4 Correct Assistant: [INST] [/INST]",
    "Sort the numbers 3, 1, 2: the answer is 1, 2, 3. Hello, how are you? I am fine, thank you!",
    "def add(a, b):\n    return a + b\n\n\nWhat is 12 + 34? It is 46.  Two  spaces.   Three.",
    "Grüße aus Köln, naïve café. 日本語のテキスト。 你好，世界！ 🙂🚀",
]
KINDS = ("byte_level_bpe", "sentencepiece_bpe", "unigram")


@cache
def shared(kind: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """``train(kind, special=special)``, made once; for reading only."""
    return train(kind, special=special)


def train(
    kind: str, text: Iterable[str] = TEXT, size: int = 600, special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer: ``byte_level_bpe`` (GPT-2, Qwen2), ``sentencepiece_bpe`` (Llama) or ``unigram`` (T5).

    The first has no BOS, as Qwen2 and GPT-NeoX; the others put ``<s>`` before every text.
    """
    return {"byte_level_bpe": _byte_level_bpe, "sentencepiece_bpe": _sentencepiece_bpe, "unigram": _unigram}[kind](
        list(text), size, list(special)
    )


def _byte_level_bpe(text: list[str], size: int, special: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def _sentencepiece_bpe(text: list[str], size: int, special: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        initial_alphabet=["▁", *_most_frequent(text, 59)],  # the trainer's own choice among equals is by chance
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True, prepend_scheme="never")
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in text], trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = []  # bytes are tokens as any other; the trainer knows no way to say so
    return _with_bos(Tokenizer.from_str(json.dumps(state)), special)


def _most_frequent(text: list[str], count: int) -> list[str]:
    """The characters, white space aside, that occur most, the lower code point first among equals."""
    counts = Counter(char for line in text for char in line if not char.isspace())
    return sorted(counts, key=lambda char: (-counts[char], char))[:count]


def _unigram(text: list[str], size: int, special: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = UnigramTrainer(
        vocab_size=size - len(BYTES),
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    ascii_only = [line.replace("\n", " ").encode("ascii", "ignore").decode() for line in text]
    tokenizer.train_from_iterator(ascii_only, trainer)
    state = json.loads(tokenizer.to_str())
    special_pieces, pieces = state["model"]["vocab"][:3], state["model"]["vocab"][3:]
    pieces = sorted(([piece, round(score, 1)] for piece, score in pieces), key=lambda pair: (-pair[1], pair[0]))
    state["model"]["vocab"] = [*special_pieces, *([byte, -20.0] for byte in BYTES), *pieces]
    state["model"]["byte_fallback"] = True
    return _with_bos(Tokenizer.from_str(json.dumps(state)), special)


def _with_bos(tokenizer: Tokenizer, special: list[str]) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast
