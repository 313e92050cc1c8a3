"""The backends of lm-evaluation-harness: what runs a model for ``--tasks``."""

__all__ = ["BACKENDS", "CHAT", "COMPLETIONS", "NEEDS", "SERVERS", "TRANSFORMERS", "VLLM"]

TRANSFORMERS, VLLM, COMPLETIONS, CHAT = BACKENDS = ("transformers", "vllm", "completions", "chat-completions")
"""Two libraries, and a server's ``/completions`` or ``/chat/completions``."""
SERVERS = (COMPLETIONS, CHAT)
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    TRANSFORMERS: (("lm_eval", "peft"), "'lm-eval[api]'"),
    VLLM: (("lm_eval", "peft", "vllm"), "'lm-eval[vllm]'"),
    **dict.fromkeys(SERVERS, (("lm_eval", "peft", "tenacity", "aiohttp", "requests"), "'lm-eval[api]'")),
}
"""The modules that a backend imports, and what to install for them."""
