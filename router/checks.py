"""Checks of a sample that need no model: a pattern, a JSON schema. Both run where they can be killed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from braid.errors import BadRequest
from braid.thinking import without_thinking
from router.bounded import BoundedProcess, LimitExceeded
from router.extract import MAX_TEXT, search

MAX_JSON = 1_000_000
"""Longest JSON text in characters that is checked; a longer one does not conform."""

_schemas = BoundedProcess(limit_s=0.5)
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)


async def matches(pattern: str, text: str, field: str) -> bool:
    """Whether the caller's pattern is found in ``text``, its thinking left out; raises
    :class:`BadRequest`, naming ``field``, as :func:`router.extract.search`."""
    return await search(pattern, without_thinking(text)[-MAX_TEXT:], field) is not None


async def conforms(schema: Mapping[str, Any], text: str, field: str) -> bool:
    """Whether ``text`` (its last fenced block if it has one, its thinking left out) is JSON that conforms
    to ``schema``, of draft 2020-12. Nothing is ever fetched for a ``$ref``.

    Raises:
        BadRequest: naming ``field``: it is no schema, or takes more than 0.5 s of processor time.
    """
    text = without_thinking(text).strip()
    fenced = _FENCE.findall(text)
    text = fenced[-1] if fenced else text
    if len(text) > MAX_JSON:
        return False
    try:
        result: Any = await _schemas.call({"op": "schema", "schema": schema, "text": text})
    except LimitExceeded:
        raise BadRequest("the schema takes too long to check", param=field) from None
    if result is None or "invalid" in result:
        raise BadRequest("it is not a JSON schema of draft 2020-12", param=field)
    return bool(result["valid"])
