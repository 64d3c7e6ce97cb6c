"""Which prompts can be moved, and what keys their blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from braid.worker.prompt import shareable


def tokens(ids: list[int], **more: Any) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": ids, **more}


def test_a_token_prompt_is_shareable() -> None:
    prompt = shareable(tokens([1, 2, 3]), None)
    assert prompt is not None
    assert (prompt.tokens, prompt.salt, prompt.adapter) == ([1, 2, 3], "", "")


@pytest.mark.parametrize("prompt", ["text", {"type": "multimodal", "prompt_token_ids": [1]}, {}, None])
def test_anything_else_is_not(prompt: Any) -> None:
    assert shareable(prompt, None) is None


def test_salt_and_adapter_key_the_chain() -> None:
    lora = SimpleNamespace(lora_name="a", lora_path="/a")
    variants = [
        shareable(tokens([1, 2]), None),
        shareable(tokens([1, 2], cache_salt="s"), None),
        shareable(tokens([1, 2]), lora),
        shareable(tokens([1, 2], cache_salt="s"), lora),
    ]
    assert len({v.chain(2) for v in variants if v is not None}) == 4
