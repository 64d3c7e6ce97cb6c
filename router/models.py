"""Which models a strategy over several of them runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid.errors import BadRequest, NotFound
from router import strategies
from router.cluster import Cluster


def resolved(plan: Mapping[str, Any], cluster: Cluster) -> dict[str, Any]:
    """A strategy's options with the models it runs on: the client's, or the router's ``model_order``. Those
    of a strategy that another one runs (``then``) likewise.

    Raises:
        BadRequest: neither names any.
        NotFound: one of them has never been served.
    """
    found = dict(plan)
    if isinstance(plan.get("then"), str) and isinstance(plan.get("options", {}), dict):
        inner = resolved({**plan.get("options", {}), "strategy": plan["then"]}, cluster)
        del inner["strategy"]
        found |= {"options": inner} if inner else {}
    if "models" not in strategies.get(plan["strategy"]).options.model_fields:
        return found
    if found.get("models") is None:
        found["models"] = list(cluster.settings.model_order)
    _check(found["models"], cluster)
    return found


def _check(models: Any, cluster: Cluster) -> None:
    served = f"served are {', '.join(cluster.registry.models()) or 'none yet'}"
    if not models:
        raise BadRequest(
            f"name the models, cheapest first ({served}), or set model_order of the router",
            param="reasoning.models",
        )
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        return  # the options' own check says so
    if not all(cluster.registry.has_served(name) for name in models):
        raise NotFound(
            f"reasoning.models has one that is not served; {served}",
            param="reasoning.models",
            code="model_not_found",
        )
