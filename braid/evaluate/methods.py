"""What is compared: a strategy with its options, and how to sample, under one name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from braid.client import EXIT_USAGE, CommandFailed

ALL = "all"
_PLAIN = re.compile(r"(?P<strategy>[a-z][a-z0-9_]{0,63})(?::(?P<n>[0-9]{1,6}))?")
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.:@-]{0,39})=(?P<rest>.+)", re.DOTALL)
_OURS = ("messages", "prompt", "stream", "stream_options", "n", "seed", "cache_salt")
_NEEDS: Mapping[str, Mapping[str, Any]] = {"rejection_sampling": {"beta": 1.0}}
"""Options without which a strategy is refused, where ``all`` asks for it."""

Catalogue = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each strategy's options, by its name."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer: its name, and the fields of a request that make it."""

    name: str
    body: Mapping[str, Any]

    @property
    def reasoning(self) -> Mapping[str, Any]:
        """The strategy and its options."""
        found: Mapping[str, Any] = self.body["reasoning"]
        return found


def parse(text: str) -> Method:
    """A method from the command line: ``strategy``, ``strategy:n``, an object with ``strategy`` and options,
    or an object of request fields with ``reasoning``; each may follow a name of its own and ``=``.

    Raises:
        CommandFailed: it is none of these.
    """
    text = text.strip()
    named = None if text.startswith("{") else _NAMED.fullmatch(text)
    rest = named["rest"].strip() if named else text
    if match := _PLAIN.fullmatch(rest):
        reasoning: dict[str, Any] = {"strategy": match["strategy"]}
        reasoning |= {"n": int(match["n"])} if match["n"] else {}
        body: dict[str, Any] = {"reasoning": reasoning}
    else:
        body = _body(rest, text)
    return Method(named["name"] if named else _name(body), body)


def _body(rest: str, text: str) -> dict[str, Any]:
    try:
        given = json.loads(rest)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        forms = 'name, name:n, or a JSON object such as \'{"strategy": "self_consistency", "n": 16}\''
        raise CommandFailed(f"--strategy {text!r} can't be read; give {forms}", EXIT_USAGE)
    body = {"reasoning": given} if "strategy" in given else given
    reasoning = body.get("reasoning", {"strategy": "direct"})
    if not isinstance(reasoning, dict) or not isinstance(reasoning.get("strategy"), str):
        raise CommandFailed(f"--strategy {text!r} needs a strategy in its reasoning", EXIT_USAGE)
    if taken := sorted(set(body) & set(_OURS)):
        raise CommandFailed(
            f"--strategy {text!r} can't set {', '.join(taken)}: these are set here", EXIT_USAGE
        )
    return {**body, "reasoning": reasoning}


def _name(body: Mapping[str, Any]) -> str:
    """``self_consistency:16``, ``adaptive_consistency(n=16, tau=0.95)``, ``cot(temperature=0)``."""
    options = {key: value for key, value in body["reasoning"].items() if key != "strategy"}
    options |= {key: value for key, value in body.items() if key != "reasoning"}
    strategy = str(body["reasoning"]["strategy"])
    if options.keys() == {"n"}:
        return f"{strategy}:{options['n']}"
    told = ", ".join(f"{key}={_short(value)}" for key, value in options.items())
    return f"{strategy}({told})" if told else strategy


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def catalogue(listed: Any) -> Catalogue | None:
    """The strategies of ``GET /v1/strategies``, None where the answer is not one."""
    try:
        return {entry["id"]: entry["schema"] for entry in listed["data"]}
    except (LookupError, TypeError):
        return None


def choose(texts: Sequence[str], known: Catalogue | None, n: int | None) -> list[Method]:
    """The methods of a command line, each with a name of its own, checked against the server's list.

    ``all`` stands for each strategy of the list. ``n`` goes to those that draw several and say nothing.

    Raises:
        CommandFailed: one is unknown to the server, has options that it refuses, or a name twice.
    """
    if known is None:
        known = {"direct": {}}
        if ALL in texts:
            raise CommandFailed("the server has no /v1/strategies: name each with --strategy")
    methods = [method for text in texts for method in (_every(known) if text == ALL else [parse(text)])]
    chosen = [_checked(_with_n(method, known, n), known) for method in methods]
    names = [method.name for method in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CommandFailed(f"two strategies are called {twice}: name one, as in better={twice}", EXIT_USAGE)
    return chosen


def _every(known: Catalogue) -> Iterable[Method]:
    for name in known:
        body = {"reasoning": {"strategy": name, **_NEEDS.get(name, {})}}
        yield Method(_name(body), body)


def _with_n(method: Method, known: Catalogue, n: int | None) -> Method:
    takes = known.get(method.reasoning["strategy"], {}).get("properties", {}).get("n", {})
    if n is None or "n" in method.reasoning or takes.get("maximum", 1) < 2:
        return method
    body = {**method.body, "reasoning": {**method.reasoning, "n": n}}
    if _refused(body["reasoning"], known) and not _refused(method.reasoning, known):
        return method  # what it takes depends on its other options
    return Method(_name(body) if method.name == _name(method.body) else method.name, body)


def _checked(method: Method, known: Catalogue) -> Method:
    strategy = method.reasoning["strategy"]
    if strategy not in known:
        close = difflib.get_close_matches(strategy, list(known), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CommandFailed(
            f"the server has no strategy {strategy!r}: {hint}it has {', '.join(known)}", EXIT_USAGE
        )
    if (error := _refused(method.reasoning, known)) is not None:
        where = ".".join(map(str, error.path))
        what = f"{where}: {error.message}" if where else error.message
        raise CommandFailed(f"{method.name}: {what}; see GET /v1/strategies", EXIT_USAGE)
    return method


def _refused(reasoning: Mapping[str, Any], known: Catalogue) -> Any:
    """The first :class:`jsonschema.ValidationError` of options by the server's schema, if any."""
    options = {key: value for key, value in reasoning.items() if key != "strategy"}
    schema = known.get(reasoning["strategy"], {})
    return next(iter(Draft202012Validator(schema).iter_errors(options)), None)


def request(method: Method, extractor: str, pattern: str | None, known: Catalogue | None) -> dict[str, Any]:
    """The fields of a method's requests. ``direct`` without options is a plain request; any other strategy
    finds answers as they are judged here, unless it says otherwise."""
    fields = {key: value for key, value in method.body.items() if key != "reasoning"}
    reasoning = dict(method.reasoning)
    if reasoning == {"strategy": "direct"}:
        return fields
    takes = (known or {}).get(reasoning["strategy"], {}).get("properties", {})
    if "extractor" in takes and "extractor" not in reasoning and extractor != "auto":
        reasoning["extractor"] = extractor
        reasoning |= {"pattern": pattern} if pattern is not None else {}
    return {**fields, "reasoning": reasoning}
