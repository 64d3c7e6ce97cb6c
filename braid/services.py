"""Settings of what the router asks beside its workers: verifiers and retrievers, by name.

An operator writes them as tables of the settings file (``[router.verifiers.NAME]``,
``[router.retrievers.NAME]``); a client chooses among the names and never gives a URL.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_settings import NoDecode

NAME = r"^[a-z][a-z0-9_-]{0,63}$"
"""What verifiers and retrievers may be called."""
VERIFY = "Is the solution correct? Verify step by step."
"""How a verification is asked for; the demo model is trained on it."""

_Word = Annotated[str, StringConstraints(pattern=r"^\S{1,32}$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class HttpService(_Table):
    """A service that the router sends JSON to by POST. Redirects are not followed, proxies not used."""

    url: str = Field(max_length=2048)
    """Whole address, ``http`` or ``https``, without user and password."""
    timeout_s: float = Field(10.0, gt=0, le=600)
    """Longest wait for one reply, not counting the wait for its turn."""
    bearer_env: str = Field("", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    """Name of the variable with the bearer token; read at start, where it must be set."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Calls at the same time; others wait."""
    max_response_bytes: int = Field(1024 * 1024, ge=2, le=64 * 1024 * 1024)
    """A longer reply counts as a failure."""

    @model_validator(mode="after")
    def _is_an_address(self) -> Self:
        parts = urlsplit(self.url)
        named = parts.hostname and parts.port != 0  # both refuse what is malformed
        if parts.scheme not in ("http", "https") or not named or any(map(str.isspace, self.url)):
            raise ValueError("url must be a whole http or https address")
        if "@" in parts.netloc:
            raise ValueError("url must hold no user or password: name the token's variable in bearer_env")
        return self


class GenerativeVerifier(_Table):
    """A model reads the answer and ends its verification with a verdict (GenRM)."""

    kind: Literal["generative"] = "generative"
    model: str = Field("", max_length=256)
    """Model that verifies; empty: the one that answered."""
    template: str = Field(VERIFY, min_length=1, max_length=8000)
    """Asked as the next user turn after the answer. With ``{answer}`` in it, it is a prompt of its own, in
    which ``{question}`` stands for the question."""
    yes: tuple[_Word, ...] = Field(("yes",), min_length=1, max_length=16)
    """Verdicts for the answer, in any case."""
    no: tuple[_Word, ...] = Field(("no",), min_length=1, max_length=16)
    """Verdicts against it."""
    k: int = Field(1, ge=1, le=64)
    """Verification chains an answer."""
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Longest chain; default: to the end of the model's window (512 after a plain prompt, where engines would
    stop at 16)."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Default: 0 for one chain, 1 for several."""
    top_logprobs: int = Field(20, ge=1, le=1000)
    """So many of the verdict's candidates are looked at; engines allow 20 unless told otherwise."""

    @model_validator(mode="after")
    def _verdicts_differ(self) -> Self:
        if {word.casefold() for word in self.yes} & {word.casefold() for word in self.no}:
            raise ValueError("a word can't be both a yes and a no")
        if self.k > 1 and self.temperature == 0:
            raise ValueError("several chains at temperature 0 are all the same")
        return self


class HttpVerifier(HttpService):
    """A service that scores: it gets ``messages`` or ``prompt``, ``answer`` and ``extracted``, and replies
    ``{"score": 0..1, "feedback": "..."}``, the feedback if it has any."""

    kind: Literal["http"]


class ScoreVerifier(HttpService):
    """A reward model behind an engine's score or pooling endpoint, in the shapes of vLLM's."""

    kind: Literal["score"]
    api: Literal["score", "pooling"] = "score"
    """``score``: question and answer as a pair of texts. ``pooling``: the conversation."""
    model: str = Field("", max_length=256)
    """Model name that the engine is asked for; empty: its only one."""
    activation: Literal["none", "sigmoid"] = "none"
    """What makes the engine's number a score of 0 to 1: nothing, or the logistic function."""
    steps: Literal["last", "min", "mean", "product"] = "last"
    """How rewards of several steps (``pooling``) become one."""


class LogprobVerifier(_Table):
    """exp of the mean log-probability of the answer's tokens."""

    kind: Literal["logprob"]


class CheckVerifier(_Table):
    """The share of right equations in the answer, by exact arithmetic."""

    kind: Literal["check"]


VerifierSettings = Annotated[
    GenerativeVerifier | HttpVerifier | ScoreVerifier | LogprobVerifier | CheckVerifier,
    Field(discriminator="kind"),
]


class RetrieverSettings(HttpService):
    """A service that finds documents: it gets ``query`` and ``k``, and replies ``{"documents": [{"text":
    "...", "id": "...", "title": "...", "score": 0.5}]}``, best first; only the text is needed."""

    max_chars: int = Field(16_000, ge=1, le=10_000_000)
    """Characters of all documents of a request; what is over is cut."""


def _decoded(value: object) -> object:
    """A table as a flag or variable gives it, in JSON."""
    return json.loads(value or "{}") if isinstance(value, str) else value


_Name = Annotated[str, StringConstraints(pattern=NAME)]
Verifiers = Annotated[dict[_Name, VerifierSettings], NoDecode, BeforeValidator(_decoded)]
Retrievers = Annotated[dict[_Name, RetrieverSettings], NoDecode, BeforeValidator(_decoded)]
