"""Prompts as tokens, without a tokenizer.

A token is a run of :data:`PIECE` characters, counted from the start of a message (the last run may be
shorter), and its id is the CRC-32 of their UTF-8. What a worker generated is cut in the same way, so a
conversation that repeats a reply has the same tokens, and finds them in the prefix cache. Token ids given by
the client are taken as they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from braid.errors import BadRequest

PIECE = 4
"""Characters of a token."""
_LINK_BYTES = 16


def pieces(text: str) -> list[str]:
    """The tokens of a text, as text."""
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def token_id(piece: str) -> int:
    return crc32(piece.encode("utf-8", "surrogatepass"))


def encode(text: str) -> list[int]:
    """The token ids of a text."""
    return [token_id(piece) for piece in pieces(text)]


class Prompt:
    """A prompt as token ids. ``text`` is what a person wrote of it; ``salt`` keys its KV apart."""

    __slots__ = ("_digest", "_links", "salt", "text", "tokens")

    def __init__(self, tokens: Sequence[int], text: str = "", salt: str = "") -> None:
        self.tokens = tokens
        self.text = text
        self.salt = salt
        self._links: tuple[int, list[bytes]] = 0, []
        self._digest = b""

    def __len__(self) -> int:
        return len(self.tokens)

    def links(self, block_size: int) -> list[bytes]:
        """A link of the hash chain for each full block."""
        if self._links[0] != block_size:
            self._links = block_size, chain(root(self.salt), self.tokens, block_size)
        return self._links[1]

    @property
    def digest(self) -> bytes:
        """16 bytes that all its tokens go into."""
        self._digest = self._digest or _digest(array("I", self.tokens).tobytes())
        return self._digest


def root(salt: str) -> bytes:
    """What the chain of a prompt begins with."""
    return _digest(salt.encode("utf-8", "surrogatepass"))


def chain(link: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Links of the full blocks of ``tokens``, which follow the block of ``link``."""
    found = []
    for end in range(block_size, len(tokens) + 1, block_size):
        link = _digest(link + array("I", tokens[end - block_size : end]).tobytes())
        found.append(link)
    return found


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_LINK_BYTES).digest()


def render_chat(body: Mapping[str, Any]) -> Prompt:
    """A chat's messages as one prompt.

    Raises:
        BadRequest: a message is not text.
    """
    tokens: list[int] = []
    texts = []
    messages = body["messages"]
    going_on = bool(body.get("continue_final_message"))
    for position, message in enumerate(messages):
        text = _content(message.get("content"))
        texts.append(text)
        tokens += (token_id(f"<{message.get('role')}>"), *encode(text))
        if not (going_on and position == len(messages) - 1):
            tokens.append(token_id("<end>"))
    if not going_on and body.get("add_generation_prompt", True):
        tokens.append(token_id("<assistant>"))
    return Prompt(tokens, "\n".join(texts), body.get("cache_salt") or "")


def render_completion(body: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a completion body: one or several, each a text or token ids."""
    prompt, salt = body.get("prompt"), body.get("cache_salt") or ""
    if isinstance(prompt, str):
        return [Prompt(encode(prompt), prompt, salt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [_of_ids(prompt, salt)]
        return [found for item in prompt for found in render_completion({"prompt": item, "cache_salt": salt})]
    raise BadRequest("The simulated engine needs a prompt: a text or token ids.", param="prompt")


def _of_ids(ids: list[int], salt: str) -> Prompt:
    if not all(0 <= i < 2**32 for i in ids):
        raise BadRequest("Token ids must be from 0 to 2^32 - 1.", param="prompt")
    return Prompt(ids, "", salt)


def _content(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Iterable):
        return "".join(_part(part) for part in content)
    raise BadRequest("The simulated engine takes text messages only.", param="messages")


def _part(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise BadRequest("The simulated engine takes text messages only.", param="messages")
    return text
