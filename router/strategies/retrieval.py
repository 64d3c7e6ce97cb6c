"""Retrieval: documents that a retriever finds are put before the question, and another strategy answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from braid.errors import BadRequest, DeadlineExceeded, UpstreamFailed
from braid.services import NAME
from router.retrievers import Document, ServiceFailed, listed
from router.sampler import Answer, Progress, Sampler
from router.strategies.following import following, n_of_then
from router.strategies.options import ManyOptions, Options
from router.strategies.prompt import with_context
from router.strategies.spec import StrategySpec
from router.verifiers import prompts

CONTEXT = "Documents that may help to answer the question:\n\n{documents}\n\nQuestion:\n"


class RetrievalOptions(ManyOptions):
    """Options of ``retrieval``; those of all strategies hold for ``then`` too."""

    model_config = ConfigDict(json_schema_extra=n_of_then)

    n: int = Field(1, ge=1, le=1024)
    """Samples, as many as `then` takes; by default as many as that draws by itself."""
    retriever: str | None = Field(None, pattern=NAME)
    """A retriever of the router by its name; may be left out where there is only one."""
    k: int = Field(4, ge=1, le=64)
    """The most documents."""
    context: str = Field(CONTEXT, min_length=1, max_length=4000)
    """What is put before the question; `{documents}` stands for the documents."""
    then: str = Field("cot", pattern=r"^[a-z][a-z0-9_]{0,63}$")
    """The strategy that answers; without `n` it draws as many samples as by itself."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own options."""

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_then(cls, given: Any) -> Any:
        then = given.get("then", cls.model_fields["then"].default) if isinstance(given, dict) else None
        if not isinstance(then, str) or "n" in given:
            return given
        return {**given, "n": following(then).options.model_fields["n"].default}

    @model_validator(mode="after")
    def _then_takes_them(self) -> Self:
        self.inner()
        return self

    @property
    def slots(self) -> int:
        """Those of ``then``."""
        return self.inner()[1].slots

    def inner(self) -> tuple[StrategySpec, Options]:
        """The strategy that answers, with its options; raises :class:`BadRequest`."""
        spec, common = following(self.then), ManyOptions.model_fields.keys()
        if both := sorted(common & self.options.keys()):
            raise BadRequest(f"{both[0]} goes beside options", param=f"reasoning.options.{both[0]}")
        given = {name: getattr(self, name) for name in self.model_fields_set & common}
        if "trigger" not in spec.options.model_fields:
            given.pop("trigger", None)  # the router's own setting
        return spec, spec.parse({**given, **self.options})


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: RetrievalOptions, progress: Progress
) -> Answer:
    """The answer of ``then`` to the question with the documents before it; its report, with the documents.

    Lewis et al. 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks" (arXiv 2005.11401),
    with the documents in one prompt. The last user message is what is searched for. Where the retriever
    fails, ``on_failure`` ``partial`` answers without documents and says so, ``all`` fails the request.
    """
    retriever = sampler.retriever(options.retriever)
    spec, inner = options.inner()
    clock = asyncio.get_running_loop().time
    until = clock() + (options.deadline_s or float("inf"))
    failed: dict[str, Any] = {}
    found: Sequence[Document] = ()
    try:
        found = await retriever.retrieve(prompts.question(body), options.k, until - clock())
    except ServiceFailed as error:
        if options.on_failure == "all":
            raise UpstreamFailed("the retriever failed; on_failure 'partial' answers without it") from None
        failed = {"retrieval_failed": error.reason}
    if until <= clock():
        raise DeadlineExceeded("nothing was retrieved within deadline_s", param="reasoning.deadline_s")
    if options.deadline_s is not None:
        inner = inner.model_copy(update={"deadline_s": until - clock()})
    prompt = with_context(body, options.context.replace("{documents}", listed(found))) if found else body
    answer = await spec.run(sampler, prompt, inner, progress)
    documents = [document.report(options.return_samples) for document in found]
    told = {"strategy": "retrieval", "then": spec.name, "retriever": retriever.name, "documents": documents}
    return Answer(answer.choice, {**answer.report, **told, **failed}, answer.usages, answer.tokens)
