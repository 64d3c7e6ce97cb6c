"""What every request of a router shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from braid.errors import BadRequest, NotFound, Unavailable
from braid.settings import RouterSettings
from router.estimates import Estimates
from router.link import Link
from router.metrics import Metrics
from router.pairs import Pairs
from router.registry import Registry
from router.retrievers import Retrievers
from router.verifiers import Verifiers

RETRY_AFTER_S = 2.0
"""What a client is told to wait when no worker can serve it now."""


@dataclass(frozen=True, slots=True)
class Cluster:
    settings: RouterSettings
    metrics: Metrics
    registry: Registry
    link: Link
    pairs: Pairs
    verifiers: Verifiers
    retrievers: Retrievers
    estimates: Estimates = field(default_factory=Estimates)

    def served_model(self, model: str | None) -> str:
        """The model a request means; None means the only one.

        Raises:
            BadRequest: it is None and there are several.
            NotFound: no worker has ever served it.
            Unavailable: none serves it now.
        """
        models = self.registry.models()
        if model is None and models:
            if len(models) == 1:
                return models[0]
            raise BadRequest(f"model is missing; this router serves {', '.join(models)}.", param="model")
        if model is not None and (model in models or self.registry.has_served(model)):
            if not self.registry.ready("decode", model):
                raise Unavailable("No decode worker serves this model now.", retry_after_s=RETRY_AFTER_S)
            return model
        if not models:
            raise Unavailable("No decode worker has joined yet.", retry_after_s=RETRY_AFTER_S)
        raise NotFound(
            "No such model; /v1/models lists those that are served.", param="model", code="model_not_found"
        )

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that the stores agree with each other; when ``idle``, that nothing is in flight."""
        self.registry.check_integrity()
        self.link.check_integrity(idle)
        self.pairs.check_integrity()
