"""Documents before the question, and the strategy that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from braid.errors import BadRequest, DeadlineExceeded, UpstreamFailed
from router import strategies
from router.retrievers import Document, ServiceFailed
from router.strategies.prompt import with_context
from tests.router.strategies.scripted import Scripted, ask, sample


class Shelf:
    """A retriever of given documents; ``fails`` with a reason, or is ``slow``."""

    name = "shelf"

    def __init__(self, documents: Sequence[Document] = (), fails: Any = None, slow: bool = False) -> None:
        self.documents = list(documents)
        self.fails = fails
        self.slow = slow
        self.asked: list[tuple[str, int]] = []

    async def retrieve(self, query: str, k: int, limit_s: float = 0.0) -> list[Document]:
        self.asked.append((query, k))
        if self.slow:
            await asyncio.sleep(min(limit_s, 5.0))
            raise ServiceFailed("timeout")
        if self.fails:
            raise ServiceFailed(self.fails)
        return self.documents[:k]


BOOKS = (Document("Fish swim.", "f", "Fish", 0.9), Document("Cats don't."))


def over(shelf: Shelf, *texts: str) -> Scripted:
    sampler = Scripted([sample(index, text) for index, text in enumerate(texts)])
    sampler.retrievers["shelf"] = shelf
    return sampler


async def test_documents_come_before_the_question() -> None:
    sampler = over(Shelf(BOOKS), "The answer is 4.")
    answer, _ = await ask("retrieval", sampler)
    assert sampler.prompts == [
        "Documents that may help to answer the question:\n\n[1] Fish\nFish swim.\n\n[2] Cats don't.\n\n"
        "Question:\n2+2?\nLet's think step by step."
    ]
    assert (answer.report["strategy"], answer.report["then"], answer.report["retriever"]) == (
        "retrieval",
        "cot",
        "shelf",
    )
    assert answer.report["documents"] == [
        {"id": "f", "title": "Fish", "score": 0.9, "characters": 10},
        {"characters": 11},
    ]
    assert answer.report["answer"] == "4"


async def test_the_last_question_is_searched_for() -> None:
    shelf = Shelf(BOOKS)
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?")]
    body = {"messages": [{"role": role, "content": text} for role, text in turns]}
    sampler = over(shelf, "x")
    await ask("retrieval", sampler, body, k=1)
    assert shelf.asked == [("c?", 1)]
    assert [message["content"] for message in sampler.opened[0][0]["messages"][:2]] == ["a?", "b"]


async def test_another_strategy_answers_with_its_own_options() -> None:
    sampler = over(Shelf(BOOKS), "The answer is 4.", "The answer is 5.", "The answer is 4.")
    then: dict[str, Any] = {
        "then": "self_consistency",
        "options": {"weight": "mean_logprob"},
        "return_samples": True,
    }
    answer, _ = await ask("retrieval", sampler, n=3, early_stop=False, **then)
    assert (answer.report["answer"], answer.report["n"]) == ("4", 3)
    assert answer.report["votes"][0]["weight"] < 2
    assert answer.report["documents"][0]["text"] == "Fish swim."
    assert answer.report["samples"][0]["text"] == "The answer is 4."


def test_it_draws_as_many_as_the_strategy_by_itself() -> None:
    parse = strategies.get("retrieval").parse
    assert [parse({"then": name}).n for name in ("cot", "self_consistency", "adaptive_consistency")] == [
        1,
        8,
        40,
    ]
    assert parse({"then": "self_consistency", "n": 3}).n == 3
    waves = parse({"then": "rejection_sampling", "options": {"expected": "4", "wave": 3}})
    assert (waves.n, waves.slots) == (16, 3)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 2},
        {"n": 1},
        {"then": "cot", "n": 2},
        {"then": "self_consistency", "n": 16},
        {"then": "beam_search", "n": 10},
        {"then": "beam_search", "n": 11},
        {"then": "beam_of_steps", "n": 1},
        {"then": "self_refine", "n": 8},
    ],
)
def test_its_schema_allows_as_many_samples_as_the_strategy_takes(given: dict[str, Any]) -> None:
    spec = strategies.get("retrieval")
    try:
        spec.parse(given)
        taken = True
    except BadRequest:
        taken = False
    assert Draft202012Validator(spec.describe()["schema"]).is_valid(given) is taken


def test_the_routers_trigger_is_left_out_where_it_does_not_belong() -> None:
    strategies.get("retrieval").parse({"then": "direct", "trigger": "Think."})


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"then": "nope"}, "reasoning.strategy"),
        ({"then": "retrieval"}, "reasoning.then"),
        ({"then": 5}, "reasoning.then"),
        ({"then": "cot", "n": 2}, "reasoning.n"),
        ({"then": "cot", "options": {"weight": "uniform"}}, "reasoning.weight"),
        ({"then": "self_consistency", "options": {"n": 3}}, "reasoning.options.n"),
        ({"then": "rejection_sampling"}, "reasoning"),
        ({"retriever": "http://evil/"}, "reasoning.retriever"),
    ],
)
def test_what_does_not_fit_together_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        strategies.get("retrieval").parse(given)
    assert caught.value.param == param


async def test_an_unknown_retriever_is_refused_before_anything_is_drawn() -> None:
    sampler = over(Shelf(BOOKS), "x")
    with pytest.raises(BadRequest, match="there are shelf"):
        await ask("retrieval", sampler, retriever="nope")
    assert sampler.opened == []


async def test_without_documents_the_question_is_asked_as_it_is() -> None:
    sampler = over(Shelf(), "x")
    answer, _ = await ask("retrieval", sampler)
    assert (sampler.prompts, answer.report["documents"]) == (["2+2?\nLet's think step by step."], [])


async def test_a_failing_retriever_is_said_or_fails_the_request() -> None:
    sampler = over(Shelf(fails="unreachable"), "x")
    answer, _ = await ask("retrieval", sampler)
    assert (answer.report["retrieval_failed"], answer.report["documents"]) == ("unreachable", [])
    with pytest.raises(UpstreamFailed):
        await ask("retrieval", over(Shelf(fails="unreachable"), "x"), on_failure="all")


async def test_the_deadline_is_of_both() -> None:
    with pytest.raises(DeadlineExceeded):
        await ask("retrieval", over(Shelf(slow=True), "x"), deadline_s=0.05)
    answer, _ = await ask("retrieval", over(Shelf(BOOKS), "x"), deadline_s=60)
    assert answer.report["stopped_early"] is None


def test_documents_come_before_parts_and_prompts() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    body = with_context({"messages": [{"role": "user", "content": [image]}]}, "ctx")
    assert body["messages"][0]["content"] == [{"type": "text", "text": "ctx"}, image]
    assert with_context({"prompt": ["q"]}, "ctx ") == {"prompt": "ctx q"}
    for wrong in ({"prompt": [1, 2]}, {"messages": [{"role": "system", "content": "x"}]}):
        with pytest.raises(BadRequest):
            with_context(wrong, "ctx")
