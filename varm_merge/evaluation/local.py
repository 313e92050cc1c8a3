"""Generates answers with a chat model on this machine, in batches.

Batches are padded on the left. Greedy and sampled rows share a batch: a sample is the argmax of logits /
temperature plus Gumbel noise, and each row draws its noise from its own generator. So an answer depends on its
question and seed, and not on the batch or on when a run was killed.
"""

import hashlib
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from varm_common.errors import UserError
from varm_common.files import fingerprint, read_text, sha256_of
from varm_common.models import load_causal_lm, local_folder, read_tokenizer, weights_fingerprint
from varm_merge.evaluation.answers import Answer, Answers, Chat, Prompt, Settings
from varm_merge.evaluation.questions import Question

__all__ = ["LocalModel", "Sampler", "answer_locally"]

SMALL = (".json", ".jinja", ".model", ".txt", ".py")
CONTEXT_SETTINGS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names under which configs store the longest context."""
GREEDY_BELOW = 1e-4
"""Temperatures below this mean greedy decoding."""
PLAIN = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
"""Settings that a model's own generation config might have otherwise."""
MARK = "\u2713answered\u2713"
log = logging.getLogger(__name__)


class LocalModel:
    """A chat model in a folder or on the Hub; its weights are loaded for the first answer.

    The arguments are the options of ``varm-merge evaluate answers``; ``warn`` is called with messages to show.

    Raises:
        UserError: The model cannot be loaded, or is not a chat model.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        chat_template: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        max_new_tokens: int = 1024,
        trust_remote_code: bool = False,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self.name, self.device, self.dtype, self.code = name, device, dtype, trust_remote_code
        self.batch_size, self.max_new_tokens, self.warn = batch_size, max_new_tokens, warn
        self.folder, _ = local_folder(name, revision, code=trust_remote_code)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"the folder `{name}` has no config.json: it is not a model")
        with self._loading("tokenizer"):
            self.tokenizer = read_tokenizer(self.folder, name, self.code)
        if chat_template is not None:
            self.tokenizer.chat_template = read_text(chat_template)
        if not self.tokenizer.chat_template:
            raise UserError(f"`{name}` has no chat template; give one with --chat-template FILE")

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the model's files and code may raise anything
            message = str(error).strip() or type(error).__name__
            if "trust_remote_code" in message and not self.code:
                message = f"`{self.name}` has its own code, which runs only with --trust-remote-code"
            elif not isinstance(error, UserError):
                message = f"the {what} of `{self.name}` cannot be loaded: {message}"
            raise UserError(message) from error

    @cached_property
    def model(self) -> Any:
        with self._loading("model"):
            place: dict[str, Any] = {"device": None, "device_map": self.device}
            return load_causal_lm(self.folder, self.name, dtype=self.dtype, trust_remote_code=self.code, **place)

    def about(self) -> dict[str, Any]:
        """Hashes of everything that decides the answers."""
        small = sorted(path for path in self.folder.iterdir() if path.suffix in SMALL)
        files = [path for path in small if "safetensors" not in path.name]
        return {
            "weights": weights_fingerprint(self.folder, self.name),
            "model's files": fingerprint([[path.name, sha256_of(path)] for path in files]),
            "chat template": fingerprint(self.tokenizer.chat_template),
            "dtype": self.dtype,
        }

    def tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokenize a conversation as the chat template renders it for the next answer."""
        text = self._rendered(messages, add_generation_prompt=True)
        if text == self._rendered(messages):
            # The template has no generation prompt, so what it writes before an answer serves as one. A space at
            # its end belongs to the first token of the answer.
            before, mark, _ = self._rendered([*messages, {"role": "assistant", "content": MARK}]).rpartition(MARK)
            text = before.rstrip(" ") if mark else text
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, messages: Sequence[dict[str, str]], **settings: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"the chat template of `{self.name}` cannot be rendered: {error}") from error

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens that end an answer: the generation config's, the tokenizer's and the template's."""
        configured = self.model.generation_config.eos_token_id
        stops = {configured} if isinstance(configured, int) else set(configured or ())
        stops.add(self.tokenizer.eos_token_id)
        answered = self._rendered([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        after = answered.rpartition(MARK)[2].lstrip()
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        stops |= {*ids[:1]} & special
        return frozenset(stops - {None})

    @cached_property
    def context(self) -> int | None:
        settings = self.model.config.get_text_config()
        return next((int(limit) for name in CONTEXT_SETTINGS if (limit := getattr(settings, name, None))), None)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts, at most ``batch_size`` at a time.

        Raises:
            UserError: Memory does not suffice for one row, or tokenizer and weights do not fit together.
        """
        rows = [self.tokens(prompt.messages) for prompt in prompts]
        by_limit: dict[int, list[int]] = {}  # rows share a batch if their answers may have the same length
        for number, row in enumerate(rows):
            limit = self.max_new_tokens if self.context is None else self.context - len(row)
            by_limit.setdefault(max(0, min(limit, self.max_new_tokens)), []).append(number)
        answers: dict[int, Answer] = {}
        for limit, numbers in by_limit.items():
            while numbers:
                batch = numbers[: self.batch_size]
                chosen = [rows[number] for number in batch], [prompts[number] for number in batch]
                try:
                    answers.update(zip(batch, self._generated(*chosen, limit), strict=True))
                except RuntimeError as error:
                    self._halve_batch(len(batch), limit, error)
                else:
                    numbers = numbers[len(batch) :]
        return [answers[number] for number in range(len(prompts))]

    def _halve_batch(self, size: int, limit: int, error: RuntimeError) -> None:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise error
        if size == 1:
            raise UserError(f"out of memory for one answer of {limit} tokens: lower --max-new-tokens") from error
        self.batch_size = size // 2
        self.warn(f"out of memory for {size} answers at a time; continuing with {self.batch_size}")
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _generated(self, rows: Sequence[list[int]], prompts: Sequence[Prompt], limit: int) -> list[Answer]:
        if limit == 0:
            return [Answer("", "no room")] * len(rows)
        embeddings_VD = self.model.get_input_embeddings().weight
        if max(map(max, rows)) >= embeddings_VD.shape[0]:
            raise UserError(f"the tokenizer of `{self.name}` has tokens for which its weights have no row")
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        device = embeddings_VD.device
        ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        own = self.model.generation_config
        top_k, top_p = (50 if own.top_k is None else own.top_k), (1.0 if own.top_p is None else own.top_p)
        stops = sorted(self.stops) or None
        config = GenerationConfig(max_new_tokens=limit, eos_token_id=stops, pad_token_id=pad, **PLAIN)
        settings = {"generation_config": config, "tokenizer": self.tokenizer}
        sampler = LogitsProcessorList([Sampler(prompts, top_k, top_p)])
        generated_BT = self.model.generate(ids_BT, attention_mask=mask_BT, logits_processor=sampler, **settings)
        return [self._decoded(ids, limit) for ids in generated_BT[:, width:].tolist()]

    def _decoded(self, ids: list[int], limit: int) -> Answer:
        stop = next((place for place, token in enumerate(ids) if token in self.stops), None)
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cut = "length" if limit == self.max_new_tokens else "context"
        return Answer(text.strip(), cut if stop is None else "stop")


def answer_locally(
    questions: Sequence[Question], settings: Settings, model: LocalModel, done: Container[Any]
) -> Answers:
    """Answer questions on this machine, in batches of similar length.

    The longest come first, so a lack of memory shows at once. A batch of which only a part is done is answered as
    a whole: in another batch, the last bits of the logits would differ.
    """

    def length(question: Question) -> int:
        return len(model.tokens(Chat(question, 0, settings).prompt().messages))

    ordered = sorted(questions, key=length, reverse=True)
    size = max(1, model.batch_size // settings.choices)
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        if all(question.id in done for question in batch):
            continue
        chats = [Chat(question, choice, settings) for question in batch for choice in range(settings.choices)]
        for turn in range(max(len(question.turns) for question in batch)):
            active = [chat for chat in chats if turn < len(chat.question.turns)]
            for chat, answer in zip(active, model.answer([chat.prompt() for chat in active]), strict=True):
                chat.add(answer)
        for question in batch:
            if question.id not in done:
                yield question, [chat.answers for chat in chats if chat.question is question]


class Sampler(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Turns logits into logits whose argmax is a sample; rows without a temperature stay as they are.

    Args:
        prompts: The rows, with temperature and seed.
        top_k: Samples come from this many of the likeliest tokens; 0 for all.
        top_p: Samples come from the likeliest tokens with this total probability; 1 for all.
    """

    def __init__(self, prompts: Sequence[Prompt], top_k: int = 0, top_p: float = 1.0) -> None:
        self._prompts = prompts
        self._generators: list[torch.Generator] = []
        self._kept = [TopKLogitsWarper(top_k)] * (top_k > 0) + [TopPLogitsWarper(top_p)] * (top_p < 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._generators:
            digests = [hashlib.sha256(prompt.seed.encode()).digest() for prompt in self._prompts]
            seeds = [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in seeds]
        sampled_BV = scores.float().clone()
        for row, (prompt, generator) in enumerate(zip(self._prompts, self._generators, strict=True)):
            if prompt.temperature < GREEDY_BELOW:
                continue
            logits_1V = sampled_BV[row : row + 1] / prompt.temperature
            for warper in self._kept:
                logits_1V = warper(input_ids[row : row + 1], logits_1V)
            sampled_BV[row] = (logits_1V - torch.empty_like(logits_1V).exponential_(generator=generator).log())[0]
        return sampled_BV
