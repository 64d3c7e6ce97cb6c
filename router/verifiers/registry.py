"""The verifiers of a router, by name."""

from __future__ import annotations

from typing import Any

from braid import services
from router.metrics import Metrics
from router.services import Service, named
from router.verifiers.base import Verifier
from router.verifiers.generative import GenerativeVerifier
from router.verifiers.http import EngineVerifier, HttpVerifier
from router.verifiers.local import ArithmeticVerifier, LogprobVerifier

BUILT_IN: dict[str, services.VerifierSettings] = {
    "self": services.GenerativeVerifier(),
    "arithmetic": services.CheckVerifier(kind="check"),
    "logprob": services.LogprobVerifier(kind="logprob"),
}
"""Those that need no configuration; a table of the same name replaces one."""


class Verifiers:
    """Built once from the settings; owns the connections of those that have any, until :meth:`aclose`."""

    def __init__(self, configured: services.Verifiers, metrics: Metrics) -> None:
        """Raises:
        ValueError: a variable that holds a token is not set.
        """
        self._settings = {**BUILT_IN, **configured}
        self._services: list[Service] = []
        self._by_name = {name: self._make(name, one, metrics) for name, one in self._settings.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def get(self, name: str, param: str = "reasoning.verifier") -> Verifier:
        """The verifier called ``name``.

        Raises:
            BadRequest: there is none; it lists those that there are.
        """
        return named(self._by_name, name, "verifier", param)

    def describe(self) -> list[dict[str, Any]]:
        """Names and kinds; never a URL."""
        return [{"id": name, "kind": settings.kind} for name, settings in self._settings.items()]

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        for service in self._services:
            await service.aclose()

    def _make(self, name: str, settings: services.VerifierSettings, metrics: Metrics) -> Verifier:
        match settings:
            case services.GenerativeVerifier():
                return GenerativeVerifier(name, settings)
            case services.LogprobVerifier():
                return LogprobVerifier(name)
            case services.CheckVerifier():
                return ArithmeticVerifier(name)
        service = Service(f"verifier:{name}", settings, metrics)
        self._services.append(service)
        if isinstance(settings, services.ScoreVerifier):
            return EngineVerifier(name, service, settings)
        return HttpVerifier(name, service)
