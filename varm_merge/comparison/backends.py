"""The backends of lm-evaluation-harness: what runs a model for ``--tasks``."""

__all__ = ["BACKENDS", "CHAT", "COMPLETIONS", "NEEDS", "SERVERS", "TRANSFORMERS", "VLLM"]

TRANSFORMERS, VLLM, COMPLETIONS, CHAT = BACKENDS = ("transformers", "vllm", "completions", "chat-completions")
"""Two libraries, and a server's ``/completions`` or ``/chat/completions``."""
SERVERS = (COMPLETIONS, CHAT)
API = (("lm_eval", "peft", "tenacity", "aiohttp", "requests"), "'lm-eval[api]'")
NEEDS = {
    TRANSFORMERS: (("lm_eval", "peft"), "'lm-eval[api]'"),
    VLLM: (("lm_eval", "peft", "vllm"), "'lm-eval[vllm]'"),
    COMPLETIONS: API,
    CHAT: API,
}
"""The modules that a backend imports, and what to install for them."""
