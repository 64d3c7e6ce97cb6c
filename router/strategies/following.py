"""The strategy that answers after another one has prepared its prompt."""

from __future__ import annotations

from typing import Any

from braid.errors import BadRequest
from router import strategies
from router.strategies.spec import StrategySpec


def following(then: str) -> StrategySpec:
    """The strategy that ``retrieval`` may be followed by; raises :class:`BadRequest` if it is none."""
    if then == "retrieval":
        raise BadRequest("retrieval can't be followed by itself", param="reasoning.then")
    return strategies.get(then)


def n_of_then(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of options with ``then`` that ``n`` is what that one takes."""
    rules = schema["allOf"] = list[dict[str, Any]]()
    for name in strategies.names():
        n = {} if name == "retrieval" else strategies.get(name).options.model_json_schema()["properties"]["n"]
        bounds = {key: n[key] for key in ("minimum", "maximum") if key in n}
        if bounds and bounds != {"minimum": 1, "maximum": 1024}:
            chosen: dict[str, Any] = {"properties": {"then": {"const": name}}}
            if name != schema["properties"]["then"]["default"]:
                chosen["required"] = ["then"]
            rules.append({"if": chosen, "then": {"properties": {"n": bounds}}})
