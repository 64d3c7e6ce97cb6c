"""Third-party strategies: the entry points of group ``braid.strategies``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

from router.strategies.spec import StrategySpec

log = logging.getLogger("braid.router.strategies")

GROUP = "braid.strategies"


def load(taken: Collection[str]) -> list[StrategySpec]:
    """The strategies that installed packages offer, in the order of their entry points' names.

    An entry point names a :class:`StrategySpec`. One that can't be loaded, is malformed, or has a name that
    is ``taken`` or was before, is logged and skipped: a broken package must not keep the router down.
    """
    found: dict[str, StrategySpec] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            spec = _checked(point)
            if spec.name in taken or spec.name in found:
                raise ValueError(f"there is a strategy {spec.name} already")
        except Exception as error:  # whatever a third party's import raises
            log.error("strategy skipped", extra={"entry_point": point.value, "reason": repr(error)[:500]})
            continue
        found[spec.name] = spec
        log.info("strategy loaded", extra={"entry_point": point.value, "strategy": spec.name})
    return list(found.values())


def _checked(point: EntryPoint) -> StrategySpec:
    spec = point.load()
    if not isinstance(spec, StrategySpec):
        raise ValueError("it must name a router.strategies.StrategySpec")
    spec.check()
    return spec
