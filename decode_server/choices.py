"""Turns one ended sample into the OpenAI choice that vLLM's own layer makes of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.outputs import RequestOutput

CHAT = "/v1/chat/completions"


class ChoiceMaker:
    """Makes choices of one request's samples with the parsers (tools, reasoning) it asks for."""

    def __init__(self, state: Any, target: str, body: bytes, request_id: str) -> None:
        self._state = state
        self._chat = target == CHAT
        self._request_id = request_id
        kind: Any = ChatCompletionRequest if self._chat else CompletionRequest
        self._request = kind.model_validate_json(body)

    async def make(self, output: RequestOutput) -> tuple[bytes, str]:
        """The choice as JSON (its index is 0) and its text."""
        return await self._make_chat(output) if self._chat else self._make_completion(output)

    async def _make_chat(self, output: RequestOutput) -> tuple[bytes, str]:
        serving, request = self._state.openai_serving_chat, self._request
        tokenizer = serving.renderer.tokenizer
        parser = None
        if serving.parser_cls is not None:
            parser = serving._make_parser(
                request, tokenizer, serving._effective_chat_template_kwargs(request)
            )
        response = await serving.chat_completion_full_generator(
            request,
            _one(output),
            self._request_id,
            request.model,
            [],
            tokenizer,
            RequestResponseMetadata(request_id=self._request_id),
            parser=parser,
        )
        choice = response.choices[0]
        return choice.model_dump_json().encode(), choice.message.content or ""

    def _make_completion(self, output: RequestOutput) -> tuple[bytes, str]:
        serving = self._state.openai_serving_completion
        response = serving.request_output_to_completion_response(
            [output],
            self._request,
            self._request_id,
            int(time.time()),
            self._request.model,
            serving.renderer.tokenizer,
            RequestResponseMetadata(request_id=self._request_id),
        )
        choice = response.choices[0]
        return choice.model_dump_json().encode(), choice.text


async def _one(output: RequestOutput) -> AsyncGenerator[RequestOutput, None]:
    yield output
