"""What identifies a rendered prompt on both sides of a transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtransfer.plan import chain


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as vLLM's renderer gave it: token ids and what else keys its KV blocks."""

    tokens: list[int]
    salt: str
    adapter: str

    def chain(self, block_size: int) -> bytes:
        """Its block-hash chain; see :func:`kvtransfer.plan.chain`."""
        return chain(self.tokens, block_size, f"{self.adapter}\0{self.salt}")


def shareable(prompt: Any, lora_request: Any) -> Prompt | None:
    """The prompt if its KV can be moved; None for multimodal inputs and embeddings."""
    if not isinstance(prompt, Mapping) or prompt.get("type") != "token":
        return None
    adapter = "" if lora_request is None else f"{lora_request.lora_name}:{lora_request.lora_path}"
    return Prompt(list(prompt["prompt_token_ids"]), prompt.get("cache_salt") or "", adapter)
