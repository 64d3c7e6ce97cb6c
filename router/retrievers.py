"""Retrievers: services that find documents, chosen by name from the operator's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from braid import services
from braid.errors import BadRequest
from router.metrics import Metrics
from router.services import Service, ServiceFailed, named

MAX_QUERY = 8000
"""Only so many characters at the end of a question are searched for."""

_Label = Annotated[str, msgspec.Meta(max_length=1000)]


class Document(msgspec.Struct, frozen=True):
    """A document that was found; only its text is needed."""

    text: str
    id: _Label = ""
    title: _Label = ""
    score: float | None = None

    def report(self, with_text: bool) -> dict[str, Any]:
        """As in the reply."""
        told = {"id": self.id, "title": self.title, "score": self.score, "characters": len(self.text)}
        entry = {key: value for key, value in told.items() if value not in (None, "")}
        return entry | ({"text": self.text} if with_text else {})


def listed(documents: Sequence[Document]) -> str:
    """Their titles and texts, numbered from 1, for a prompt."""
    return "\n\n".join(
        f"[{number}] {one.title}\n{one.text}" if one.title else f"[{number}] {one.text}"
        for number, one in enumerate(documents, 1)
    )


class _Found(msgspec.Struct):
    documents: list[Document]


class Retriever(Protocol):
    """Finds documents for a question."""

    @property
    def name(self) -> str:
        """What requests call it."""

    async def retrieve(self, query: str, k: int, limit_s: float = math.inf) -> list[Document]:
        """At most ``k`` documents, best first, within ``limit_s``.

        Raises:
            ServiceFailed: none could be had.
        """


class HttpRetriever:
    """A :class:`Retriever` by a service of the operator's."""

    def __init__(self, name: str, service: Service, max_chars: int) -> None:
        self.name = name
        self._service = service
        self._max_chars = max_chars

    async def retrieve(self, query: str, k: int, limit_s: float = math.inf) -> list[Document]:
        found = await self._service.call({"query": query[-MAX_QUERY:], "k": k}, _Found, limit_s)
        left, kept = self._max_chars, []
        for document in found.documents[:k]:
            text = document.text.strip()[:left]
            if text:
                kept.append(msgspec.structs.replace(document, text=text))
                left -= len(text)
        return kept


R = TypeVar("R", bound=Retriever)


class Retrievers:
    """Built once from the settings; owns the services' connections until :meth:`aclose`."""

    def __init__(self, configured: services.Retrievers, metrics: Metrics) -> None:
        """Raises:
        ValueError: a variable that holds a token is not set.
        """
        self._services = {
            name: Service(f"retriever:{name}", settings, metrics) for name, settings in configured.items()
        }
        self._by_name = {
            name: HttpRetriever(name, service, configured[name].max_chars)
            for name, service in self._services.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def get(self, name: str | None, param: str = "reasoning.retriever") -> Retriever:
        """The retriever called ``name``; the only one there is, if None.

        Raises:
            BadRequest: there is none, or several to choose from; it lists those that there are.
        """
        return choose(self._by_name, name, param)

    def describe(self) -> list[dict[str, Any]]:
        """Names; never a URL."""
        return [{"id": name} for name in self._by_name]

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        for service in self._services.values():
            await service.aclose()


def choose(known: Mapping[str, R], name: str | None, param: str) -> R:
    """As :meth:`Retrievers.get`."""
    if name is None and len(known) > 1:
        raise BadRequest(f"name a retriever; there are {', '.join(known)}", param=param, code="retriever")
    return named(known, name if name is not None else next(iter(known), ""), "retriever", param)


__all__ = ["Document", "HttpRetriever", "Retriever", "Retrievers", "ServiceFailed", "choose"]
