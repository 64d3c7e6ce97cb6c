"""Which decode workers were given which beginnings of prompts: an approximate index of their caches."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

CHUNK = 512
"""Bytes of a prompt that are hashed at a time; a shorter rest is not known."""
MOST_CHUNKS = 128
"""Only so much of a prompt's beginning is looked at."""
MOST_HOLDERS = 16
"""Workers remembered for a beginning."""


class Prefixes:
    """The ``size`` beginnings used last, each with the workers that were given it.

    It knows nothing of what a worker has evicted, so it is good for choosing among workers and for nothing
    else. A worker is any hashable key, new at each start of its engine.
    """

    def __init__(self, size: int = 16_384) -> None:
        self._size = size
        self._holders: OrderedDict[bytes, OrderedDict[Any, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def note(self, body: Mapping[str, Any], worker: object) -> None:
        """``worker`` is given ``body``'s prompt."""
        for link in _links(body):
            holders = self._holders.setdefault(link, OrderedDict())
            self._holders.move_to_end(link)
            holders[worker] = None
            holders.move_to_end(worker)
            if len(holders) > MOST_HOLDERS:
                holders.popitem(last=False)
        while len(self._holders) > self._size:
            self._holders.popitem(last=False)

    def known(self, body: Mapping[str, Any]) -> dict[Any, float]:
        """The share of ``body``'s prompt, over 0 to 1, that each worker was given as a beginning."""
        links = list(_links(body))
        found: dict[Any, float] = {}
        for count, link in enumerate(links, 1):
            for worker in self._holders.get(link, ()):
                if found.get(worker, 0.0) == (count - 1) / len(links):  # without a gap before it
                    found[worker] = count / len(links)
        return found


def _links(body: Mapping[str, Any]) -> Iterator[bytes]:
    """A hash of each beginning of the prompt, in steps of :data:`CHUNK`, and of the whole if it is not longer
    than what is looked at. The model and the salt of the cache are part of each."""
    prompt = body["messages"] if "messages" in body else body.get("prompt")
    text = msgspec.json.encode(prompt)
    running = hashlib.blake2b(digest_size=16)
    running.update(msgspec.json.encode([body.get("model"), body.get("cache_salt"), body.get("tools")]))
    for begin in range(0, min(len(text), MOST_CHUNKS * CHUNK), CHUNK):
        running.update(text[begin : begin + CHUNK])
        yield running.copy().digest()
