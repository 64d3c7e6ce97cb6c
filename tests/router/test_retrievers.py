"""Retrievers, against a real server on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from braid.errors import BadRequest
from braid.services import RetrieverSettings
from router.metrics import Metrics
from router.retrievers import MAX_QUERY, Document, Retriever, Retrievers, ServiceFailed
from tests.router.web import Answer, Web, always, http

Make = Callable[..., Awaitable[tuple[Retriever, Web]]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def made(answer: Answer, **fields: Any) -> tuple[Retriever, Web]:
            web = await stack.enter_async_context(Web(answer))
            retrievers = Retrievers({"wiki": RetrieverSettings(url=web.url, **fields)}, Metrics())
            stack.push_async_callback(retrievers.aclose)
            return retrievers.get("wiki"), web

        yield made


FOUND = {
    "documents": [
        {"text": " one ", "id": "1", "title": "T", "score": 2, "x": 0},
        {"text": "two"},
        {"text": ""},
    ]
}


async def test_documents_come_best_first(make: Make) -> None:
    retriever, web = await make(always(http(FOUND)))
    assert await retriever.retrieve("who?", 3) == [Document("one", "1", "T", 2.0), Document("two")]
    assert web.asked[0].payload == {"query": "who?", "k": 3}


async def test_more_than_was_asked_for_is_dropped(make: Make) -> None:
    retriever, _ = await make(always(http(FOUND)))
    assert [one.text for one in await retriever.retrieve("who?", 1)] == ["one"]


async def test_the_operators_bound_cuts_the_documents(make: Make) -> None:
    retriever, _ = await make(always(http(FOUND)), max_chars=4)
    assert [one.text for one in await retriever.retrieve("who?", 3)] == ["one", "t"]


async def test_only_the_end_of_a_long_question_is_searched_for(make: Make) -> None:
    retriever, web = await make(always(http(FOUND)))
    await retriever.retrieve("x" * 9000 + "?", 1)
    assert len(web.asked[0].payload["query"]) == MAX_QUERY
    assert web.asked[0].payload["query"].endswith("?")


@pytest.mark.parametrize("reply", [[], {"documents": [{}]}, {"documents": [{"text": 5}]}, {"results": []}])
async def test_what_is_no_documents_is_a_failure(make: Make, reply: Any) -> None:
    retriever, _ = await make(always(http(reply)))
    with pytest.raises(ServiceFailed, match="malformed"):
        await retriever.retrieve("who?", 3)


def test_a_name_may_be_left_out_where_there_is_one() -> None:
    one = RetrieverSettings(url="http://127.0.0.1:1/")
    assert Retrievers({"a": one}, Metrics()).get(None).name == "a"
    with pytest.raises(BadRequest, match="there are a, b"):
        Retrievers({"a": one, "b": one}, Metrics()).get(None)
    with pytest.raises(BadRequest, match="this router has none"):
        Retrievers({}, Metrics()).get(None)
    with pytest.raises(BadRequest, match="there are a"):
        Retrievers({"a": one}, Metrics()).get("b")
