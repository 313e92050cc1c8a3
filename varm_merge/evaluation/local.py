"""A chat model on this machine, asked in batches.

A batch is padded on the left. Greedy and sampled rows share it: sampling is the argmax of logits / temperature
plus Gumbel noise, and each row draws its noise from a generator of its own, so that an answer depends on its
question and seed, and not on what else is in the batch or when the run was killed.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from varm_common.checkpoints import fingerprint, weight_files
from varm_merge.errors import VarmError
from varm_merge.evaluation.questions import Answer, Prompt

__all__ = ["LocalModel", "Sampler"]

DOWNLOADED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.safetensors")
"""Of a model on the Hub."""
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
CONTEXT_SETTINGS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""By which configs tell how many tokens a model reads."""
GREEDY_BELOW = 1e-4
"""Temperatures that are none."""
MARK = "\u2713answered\u2713"
log = logging.getLogger(__name__)


class LocalModel:
    """A chat model in a folder or on the Hub, loaded when it is first asked.

    Args:
        name: The folder or Hub id.
        revision: Of a model on the Hub.
        chat_template: A file with a chat template to use in place of the model's own.
        device: As torch writes it; ``auto`` takes the accelerators that are there.
        dtype: Of the weights; ``auto`` as they are stored.
        batch_size: Most rows at a time; halved when memory does not suffice.
        max_new_tokens: Most tokens of an answer.
        trust_remote_code: Whether the model's own code may run.
        say: Told what the user should know.

    Raises:
        VarmError: It is no chat model that can be loaded.
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
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.batch_size, self.max_new_tokens, self.say = batch_size, max_new_tokens, say
        self.code = trust_remote_code
        self._alone_told = False
        self.folder = _folder(name, revision)
        self.tokenizer = self._loaded(transformers.AutoTokenizer, "tokenizer")
        if chat_template is not None:
            try:
                self.tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise VarmError(f"`{chat_template}` cannot be read: {error}") from error
        if not self.tokenizer.chat_template:
            raise VarmError(f"`{name}` has no chat template; give one by --chat-template FILE")

    def _loaded(self, kind: Any, what: str, **settings: Any) -> Any:
        try:
            return kind.from_pretrained(self.folder, trust_remote_code=self.code, **settings)
        except Exception as error:  # whatever a file of the model, or its code, raises
            if "trust_remote_code" in str(error) and not self.code:
                raise VarmError(
                    f"`{self.name}` brings code of its own, which runs only with --trust-remote-code"
                ) from error
            message = str(error).strip() or type(error).__name__
            raise VarmError(f"the {what} of `{self.name}` cannot be loaded: {message}") from error

    @cached_property
    def model(self) -> Any:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        found = self._loaded(
            transformers.AutoModelForCausalLM,
            "model",
            dtype=dtype,
            device_map=self.device,
            use_safetensors=True,
        )
        if len(self.tokenizer) > (rows := found.get_input_embeddings().weight.shape[0]):
            self.say(f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens, the model {rows}")
        return found.eval()

    def load(self) -> None:
        """Load the weights now."""
        assert self.model is not None

    def about(self) -> dict[str, Any]:
        """What decides its answers, by hash."""
        files = sorted(
            path for path in self.folder.iterdir() if path.suffix in SMALL_FILES and "safetensors" not in path.name
        )
        sums = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
        chosen = weight_files(self.folder)
        if chosen.problems:
            raise VarmError(f"the weights of `{self.name}`: {'; '.join(chosen.problems)}")
        if not any(name.endswith(".safetensors") for name in chosen.names):
            raise VarmError(f"`{self.name}` has no weights in safetensors")
        template = self.tokenizer.chat_template
        return {
            "weights": fingerprint(self.folder),
            "model's files": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
            "chat template": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
            "dtype": self.dtype,
        }

    def tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation as its template renders it for the next answer."""
        return list(self.tokenizer(self._asked(messages), add_special_tokens=False)["input_ids"])

    def _asked(self, messages: Sequence[dict[str, str]]) -> str:
        text = self._rendered(messages, add_generation_prompt=True)
        if text != self._rendered(messages):
            return text
        # the template knows no generation prompt; what it puts before an answer is one, a last space aside, which
        # is the beginning of the answer's first token
        answered = self._rendered([*messages, {"role": "assistant", "content": MARK}])
        before, found, _ = answered.rpartition(MARK)
        return before.rstrip(" ") if found else text

    def _rendered(self, messages: Sequence[dict[str, str]], **settings: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise VarmError(f"the chat template of `{self.name}` cannot be rendered: {error}") from error

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens that end an answer: those of the generation config, and what the template has after one."""
        told = self.model.generation_config.eos_token_id
        found = {told} if isinstance(told, int) else set(told or ())
        found.add(self.tokenizer.eos_token_id)
        answered = self._rendered([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        after = answered.rpartition(MARK)[2].lstrip()
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        found.update(ids[:1] if set(ids[:1]) <= special else ())
        return frozenset(one for one in found if one is not None)

    @cached_property
    def context(self) -> int | None:
        settings = self.model.config.get_text_config()
        return next((int(limit) for name in CONTEXT_SETTINGS if (limit := getattr(settings, name, None))), None)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers to prompts, in at most ``batch_size`` rows at a time.

        Raises:
            VarmError: Memory does not suffice for a single row, or tokenizer and weights do not belong together.
        """
        rows = [self.tokens(prompt.messages) for prompt in prompts]
        answers: dict[int, Answer] = {}
        together = []
        for number, row in enumerate(rows):
            room = self.max_new_tokens if self.context is None else self.context - len(row)
            if room <= 0:
                answers[number] = Answer("", "no room")
            elif room < self.max_new_tokens:  # alone: no row of a batch is continued beyond its context
                self._tell_alone()
                (answers[number],) = self._in_batches([row], [prompts[number]], room)
            else:
                together.append(number)
        chosen = [rows[number] for number in together], [prompts[number] for number in together]
        answers |= dict(zip(together, self._in_batches(*chosen, self.max_new_tokens), strict=True))
        return [answers[number] for number in range(len(prompts))]

    def _tell_alone(self) -> None:
        if not self._alone_told:
            self.say(
                f"{self.name} reads {self.context} tokens: answers that could go beyond are made one at a time; a "
                "lower --max-new-tokens makes them together"
            )
        self._alone_told = True

    def _in_batches(self, rows: Sequence[list[int]], prompts: Sequence[Prompt], limit: int) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(rows):
            part = slice(len(answers), len(answers) + self.batch_size)
            try:
                answers += self._generated(rows[part], prompts[part], limit)
                continue
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                size = len(rows[part])
            if size == 1:
                raise VarmError(
                    f"memory does not suffice for one answer of {limit} tokens: lower --max-new-tokens"
                )
            self.batch_size = size // 2
            self.say(f"memory does not suffice for {size} answers at a time; going on with {self.batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return answers

    @torch.inference_mode()
    def _generated(self, rows: Sequence[list[int]], prompts: Sequence[Prompt], limit: int) -> list[Answer]:
        if max(map(max, rows)) >= self.model.get_input_embeddings().weight.shape[0]:
            raise VarmError(f"the tokenizer of `{self.name}` has tokens that its weights have no row for")
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        own = self.model.generation_config
        top_k, top_p = (50 if own.top_k is None else own.top_k), (1.0 if own.top_p is None else own.top_p)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=pad,
        )
        said = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([Sampler(prompts, top_k, top_p)]),
            tokenizer=self.tokenizer,
        )
        end = "length" if limit == self.max_new_tokens else "context"
        return [self._decoded(row, end) for row in said[:, width:].tolist()]

    def _decoded(self, ids: list[int], otherwise: str) -> Answer:
        stop = next((number for number, one in enumerate(ids) if one in self.stops), None)
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.strip(), otherwise if stop is None else "stop")


class Sampler(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Logits whose argmax is a sample, for rows with a temperature; those of the others stay as they are.

    Args:
        prompts: The rows, with temperature and seed.
        top_k: How many of the likeliest tokens a sample is drawn from; 0 for all.
        top_p: The probability that these together have at least; 1 for all.
    """

    def __init__(self, prompts: Sequence[Prompt], top_k: int = 0, top_p: float = 1.0) -> None:
        self._temperatures = [prompt.temperature for prompt in prompts]
        self._seeds = [
            int.from_bytes(hashlib.sha256(prompt.seed.encode()).digest()[:8], "big") >> 1 for prompt in prompts
        ]
        self._generators: list[torch.Generator] = []
        self._kept = [TopKLogitsWarper(top_k)] * (top_k > 0) + [TopPLogitsWarper(top_p)] * (top_p < 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        sampled = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature < GREEDY_BELOW:
                continue
            logits_1V = sampled[row : row + 1] / temperature
            for warper in self._kept:
                logits_1V = warper(input_ids[row : row + 1], logits_1V)
            sampled[row] = (logits_1V - torch.empty_like(logits_1V).exponential_(generator=generator).log())[0]
        return sampled


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise VarmError(f"the folder `{name}` has no config.json: it is no model")
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # whatever the HTTP client raises without a network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VarmError(f"no model folder `{name}`, and none on the Hub: {reason}") from error
