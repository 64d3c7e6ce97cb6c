"""Calls of services that the operator configured: JSON by POST, bounded in time, size and number."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from braid.errors import BadRequest
from braid.services import HttpService
from router.metrics import Metrics

log = logging.getLogger("braid.router.services")

Reason = Literal["timeout", "unreachable", "redirect", "status", "too_large", "malformed"]
Reply = TypeVar("Reply")
Thing = TypeVar("Thing")


class ServiceFailed(Exception):
    """A call brought nothing that can be used; ``reason`` is its label in metrics."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class Service:
    """One configured service. Owns its connections until :meth:`aclose`.

    What it is sent and what it answers are never logged.
    """

    def __init__(self, name: str, settings: HttpService, metrics: Metrics) -> None:
        """``name`` is its label in metrics and logs.

        Raises:
            ValueError: the variable with its token is not set.
        """
        import httpx  # takes longer than the router's own import, and most routers have no service

        self._name = name
        self._settings = settings
        self._metrics = metrics
        self._turns = asyncio.Semaphore(settings.concurrency)
        self._errors = httpx.HTTPError
        self._client = httpx.AsyncClient(
            headers={"content-type": "application/json", "accept-encoding": "identity", **_bearer(settings)},
            verify=ssl.create_default_context() if settings.url.startswith("https:") else False,
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # the whole call has one
            limits=httpx.Limits(max_connections=settings.concurrency),
        )

    async def call(self, payload: Mapping[str, Any], reply: type[Reply], limit_s: float = math.inf) -> Reply:
        """What the service replies to ``payload``, as ``reply`` (a msgspec struct). Never takes longer than
        ``limit_s``, the wait for a turn included. Each call is counted once, by its outcome.

        Raises:
            ServiceFailed: it did not reply with 200 and a body of that type, in time and within its size.
        """
        outcome = "cancelled"
        try:
            told = await self._told(payload, reply, limit_s)
            outcome = "ok"
            return told
        except ServiceFailed as error:
            outcome = error.reason
            log.warning("service failed", extra={"service": self._name, "reason": error.reason})
            raise
        finally:
            self._metrics.service_calls.labels(self._name, outcome).inc()

    async def aclose(self) -> None:
        """Close its connections. Idempotent."""
        await self._client.aclose()

    async def _told(self, payload: Mapping[str, Any], reply: type[Reply], limit_s: float) -> Reply:
        try:
            async with asyncio.timeout(None if limit_s == math.inf else max(0.0, limit_s)), self._turns:
                async with asyncio.timeout(self._settings.timeout_s):
                    raw = await self._post(msgspec.json.encode(payload))
            return msgspec.json.decode(raw, type=reply)
        except TimeoutError:
            raise ServiceFailed("timeout") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise ServiceFailed("malformed") from None
        except self._errors:
            raise ServiceFailed("unreachable") from None

    async def _post(self, content: bytes) -> bytes:
        async with self._client.stream("POST", self._settings.url, content=content) as reply:
            if reply.status_code != 200:
                raise ServiceFailed("redirect" if 300 <= reply.status_code < 400 else "status")
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise ServiceFailed("malformed")  # a few compressed bytes may hide any number
            raw = bytearray()
            async for part in reply.aiter_raw():
                raw += part
                if len(raw) > self._settings.max_response_bytes:
                    raise ServiceFailed("too_large")
            return bytes(raw)


def named(known: Mapping[str, Thing], name: str, kind: str, param: str) -> Thing:
    """What ``known`` has under ``name``.

    Raises:
        BadRequest: nothing; it lists all names.
    """
    found = known.get(name)
    if found is None:
        there_are = f"there are {', '.join(known)}" if known else "this router has none"
        raise BadRequest(f"no such {kind}; {there_are}", param=param, code=kind)
    return found


def _bearer(settings: HttpService) -> dict[str, str]:
    if not settings.bearer_env:
        return {}
    token = os.environ.get(settings.bearer_env, "").strip()
    if not token:
        raise ValueError(f"{settings.bearer_env} is not set, which {settings.url} needs (bearer_env)")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{settings.bearer_env} holds no bearer token")
    return {"authorization": f"Bearer {token}"}
