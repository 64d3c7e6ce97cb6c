"""What the router knows of a strategy: its name, options and function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from braid.errors import BadRequest
from router.sampler import Answer
from router.strategies.options import Options

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A strategy as the router sees it.

    Attributes:
        name: what a request calls it: ``[a-z][a-z0-9_]*``, at most 64 characters.
        options: the model of its options; its JSON schema documents them.
        run: ``async run(sampler, body, options, progress) -> Answer``.
        summary: one line for ``GET /v1/strategies``.
    """

    name: str
    options: type[Options]
    run: Callable[..., Awaitable[Answer]]
    summary: str = ""

    def check(self) -> None:
        """Raise :class:`ValueError` if it can't be used."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError("a strategy's name is [a-z][a-z0-9_]*, at most 64 characters")
        if not (isinstance(self.options, type) and issubclass(self.options, Options)):
            raise ValueError("options must be a subclass of router.strategies.options.Options")
        if not inspect.iscoroutinefunction(self.run):
            raise ValueError("run must be an async function")
        self.options()  # every option needs a default, or the name alone would not do

    def parse(self, reasoning: Mapping[str, Any], context: Mapping[str, Any] | None = None) -> Options:
        """The options in a request's ``reasoning`` (its ``strategy`` is passed over). ``context``: what the
        router gives options to go by, such as the table of ``auto``.

        Raises:
            BadRequest: naming the field, and never its value.
        """
        given = {key: value for key, value in reasoning.items() if key != "strategy"}
        try:
            return self.options.model_validate(given, context=None if context is None else dict(context))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(["reasoning", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            takes = ", ".join(sorted(self.options.model_fields))
            raise BadRequest(f"{self.name} takes no such option; it takes {takes}", param=field[:200])
        raise BadRequest(f"{field}: {first['msg']}", param=field)

    def describe(self, **defaults: Any) -> dict[str, Any]:
        """As in ``GET /v1/strategies``: its options by name, and their JSON schema. ``defaults`` are the
        router's own, of the options that it has."""
        schema = self.options.model_json_schema()
        properties = schema["properties"]
        for name in properties.keys() & defaults.keys():
            properties[name]["default"] = defaults[name]
        parameters = [
            {
                "name": name,
                "default": option.get("default"),
                "description": " ".join(option.get("description", "").split()),
            }
            for name, option in properties.items()
        ]
        return {
            "id": self.name,
            "object": "strategy",
            "description": self.summary,
            "parameters": parameters,
            "schema": schema,
        }
