"""JSON schemas from clients: grammar compilers behind must not be given unbounded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_SCHEMA_DEPTH = 64


def check_schema(schema: Mapping[str, Any]) -> str:
    """What is wrong with a schema, empty if nothing: too deep, or a ``$ref`` that is not to a
    definition in the same schema, or that leads back to itself."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        return f"has a schema nested deeper than {MAX_SCHEMA_DEPTH} levels"
    done: set[str] = set()
    for ref in _refs(schema):
        problem = _follow(schema, ref, (), done)
        if problem:
            return problem
    return ""


def _follow(root: Mapping[str, Any], ref: str, trail: tuple[str, ...], done: set[str]) -> str:
    if ref in trail or ref == "#":
        return "has a recursive schema"
    if ref in done:
        return ""
    if len(trail) > MAX_SCHEMA_DEPTH:
        return f"has a schema nested deeper than {MAX_SCHEMA_DEPTH} levels"
    target = _resolve(root, ref)
    if target is None:
        return "has a $ref that is not in the schema"
    for inner in _refs(target):
        problem = _follow(root, inner, (*trail, ref), done)
        if problem:
            return problem
    done.add(ref)
    return ""


def _resolve(root: Any, ref: str) -> Any:
    if not ref.startswith("#/"):
        return None
    node = root
    for part in ref[2:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _refs(node: Any) -> Iterator[str]:
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            ref = item.get("$ref")
            if isinstance(ref, str):
                yield ref
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _depth(node: Any) -> int:
    depth, level = 0, [node]
    while level and depth <= MAX_SCHEMA_DEPTH:
        depth += 1
        level = [c for item in level for c in (item.values() if isinstance(item, dict) else item)]
        level = [c for c in level if isinstance(c, dict | list)]
    return depth
