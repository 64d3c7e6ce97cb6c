"""What a simulated engine understands of an OpenAI body, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from braid.errors import BadRequest
from braid.sim.draws import Limits
from braid.sim.tokens import Prompt, render_chat, render_completion

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENIZE = "/tokenize"

_REFUSED = (
    *("tools", "functions", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    *("guided_grammar", "echo", "suffix", "prompt_logprobs", "use_beam_search", "best_of"),
)
"""Fields whose effect nothing made up could have."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A valid request.

    Attributes:
        logprobs: alternatives a token, None if no log-probabilities are wanted.
        greedy: all samples are the same.
    """

    chat: bool
    prompts: list[Prompt]
    n: int
    limits: Limits
    seed: int | None
    greedy: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    token_ids: bool


def parse(target: str, body: bytes, max_model_len: int) -> Ask:
    """Read a body as the engine would.

    Raises:
        BadRequest: it can't be served; the message says why.
    """
    fields = _object(body)
    _refuse(fields)
    chat = target.partition("?")[0] == CHAT
    try:
        prompts = [render_chat(fields)] if chat else render_completion(fields)
        return _read(fields, chat, prompts, max_model_len)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadRequest(f"The simulated engine can't read this body: {type(error).__name__}.") from None


def parse_tokenize(body: bytes) -> Prompt:
    """The one prompt of a ``/tokenize`` body; raises :class:`~braid.errors.BadRequest`."""
    fields = _object(body)
    return render_chat(fields) if "messages" in fields else render_completion(fields)[0]


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise BadRequest("The body is not a JSON object.")
    return fields


def _refuse(fields: Mapping[str, Any]) -> None:
    for name in _REFUSED:
        if fields.get(name) not in (None, False, [], 0) and not _unused(fields, name):
            raise BadRequest(f"The simulated engine has no {name}.", param=name)
    kind = (fields.get("response_format") or {}).get("type", "text")
    if kind != "text":
        raise BadRequest("The simulated engine has no response_format.", param="response_format")


def _unused(fields: Mapping[str, Any], name: str) -> bool:
    return name == "tools" and fields.get("tool_choice") == "none"


def _read(fields: Mapping[str, Any], chat: bool, prompts: list[Prompt], max_model_len: int) -> Ask:
    wanted = fields.get("max_completion_tokens") or fields.get("max_tokens")
    if wanted is None and not chat:
        wanted = 16  # the completions API's own default
    room = max_model_len - max(map(len, prompts))
    if room < 1:
        raise BadRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
            f"{max_model_len - room} input tokens. Please reduce its length.",
            param="messages" if chat else "prompt",
        )
    stop = fields.get("stop") or ()
    options = fields.get("stream_options") or {}
    temperature = fields.get("temperature")
    return Ask(
        chat=chat,
        prompts=prompts,
        n=int(fields.get("n") or 1),
        limits=Limits(
            most=min(room, int(wanted) if wanted is not None else room),
            least=min(room, int(fields.get("min_tokens") or 0)),
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=bool(fields.get("ignore_eos")),
        ),
        seed=fields.get("seed"),
        greedy=temperature is not None and float(temperature) == 0.0,
        stream=bool(fields.get("stream")),
        include_usage=bool(options.get("include_usage")),
        logprobs=_logprobs(fields, chat),
        token_ids=bool(fields.get("return_token_ids")),
    )


def _logprobs(fields: Mapping[str, Any], chat: bool) -> int | None:
    value = fields.get("logprobs")
    if chat:
        return int(fields.get("top_logprobs") or 0) if value else None
    return None if value is None else int(value)
