"""What the step-wise strategies share: continuing a text, parts added up, several prompts as one group."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from braid.errors import BadRequest, DeadlineExceeded, Unavailable, UpstreamFailed
from router import strategies
from router.sampler import Group, Sample
from router.strategies.branches import Branch, ForkedGroup, fork
from router.strategies.continuation import (
    NOTHING,
    check_continuable,
    continued,
    joined,
    joined_text,
    limited,
    stopping,
)
from router.strategies.options import Options
from router.strategies.run import Run
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.strategies.stepping import Stepping, steps, tree_of

CHAT = {"messages": [{"role": "user", "content": "2+2?"}]}


# The body that continues


def test_a_chat_goes_on_in_an_open_last_message() -> None:
    body = continued(CHAT, "2+2=")
    assert body["messages"] == [*CHAT["messages"], {"role": "assistant", "content": "2+2="}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert continued(CHAT, "") == CHAT


def test_what_the_client_has_begun_is_prolonged() -> None:
    begun = {"role": "assistant", "content": "So "}
    body = {"messages": [*CHAT["messages"], begun], "continue_final_message": True}
    assert continued(body, "2+2=")["messages"][-1]["content"] == "So 2+2="
    parts = {**begun, "content": [{"type": "text", "text": "So "}]}
    body = {"messages": [*CHAT["messages"], parts], "continue_final_message": True}
    assert continued(body, "4")["messages"][-1]["content"] == [{"type": "text", "text": "So 4"}]


@pytest.mark.parametrize("prompt", ["2+2=", ["2+2="]])
def test_a_completion_goes_on_in_its_prompt(prompt: Any) -> None:
    assert continued({"prompt": prompt}, "4") == {"prompt": "2+2=4"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({**CHAT, "tools": [{}]}, "tools"),
        ({"prompt": "2+2=", "echo": True}, "echo"),
    ],
)
def test_what_can_t_be_continued_is_refused_before_anything_is_drawn(
    more: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_continuable(more)
    assert caught.value.param == param


def test_tools_that_are_not_to_be_called_do_no_harm() -> None:
    check_continuable({**CHAT, "tools": [{}], "tool_choice": "none"})


def test_limits_are_of_the_next_part() -> None:
    body = {"max_completion_tokens": 50, "min_tokens": 12}
    assert limited(body, 20, done=5) == {"max_tokens": 20, "min_tokens": 7}
    assert limited(body, 4) == {"max_tokens": 4, "min_tokens": 4}, "not more than may be generated"
    assert limited(body, None, done=20) == {"min_tokens": 0}


def test_a_separator_is_one_stop_string_more() -> None:
    assert stopping({"stop": "END"}, "\n\n")["stop"] == ["\n\n", "END"]
    assert stopping({"stop": ["\n\n"], "min_tokens": 0}, "\n\n", skip_separator=True)["min_tokens"] == 1


def test_a_separator_that_both_parts_have_stands_once() -> None:
    assert joined_text("a\n\n", "b", "\n\n") == "a\n\nb"
    assert joined_text("a\n\n", "\n\nb", "\n\n") == "a\n\nb"
    assert joined_text("", "\n\nb", "\n\n") == "\n\nb"


# Parts added up


def test_parts_of_a_chat_add_up() -> None:
    def part(index: int, text: str) -> Sample:
        choice = {
            "message": {"role": "assistant", "content": text},
            "token_ids": [index],
            "logprobs": {"content": [{"token": text}]},
        }
        return Sample(index, "finished", text, "stop", 3, -1.0, choice, worker=f"d{index}")

    first = joined(NOTHING, part(0, "a"), "a", "length")
    whole = joined(first, part(1, "b"), "ab", "stop")
    assert (whole.index, whole.tokens, whole.logprob, whole.worker) == (1, 6, -2.0, "d1")
    assert whole.mean_logprob == pytest.approx(-1 / 3)
    assert whole.choice["message"] == {"role": "assistant", "content": "ab"}
    assert whole.choice["token_ids"] == [0, 1]
    assert whole.choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}


def test_parts_of_a_completion_add_up() -> None:
    def part(text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": {"tokens": [text], "text_offset": [0], "top_logprobs": None}}

    first = joined(NOTHING, Sample(0, "finished", "abc", choice=part("abc")), "abc", "length")
    whole = joined(first, Sample(1, "finished", "d", choice=part("d")), "abcd", "stop")
    assert (whole.choice["text"], whole.choice["finish_reason"], whole.logprob) == ("abcd", "stop", None)
    told = whole.choice["logprobs"]
    assert (told["tokens"], told["text_offset"]) == (["abc", "d"], [0, 3])


# Several prompts at the same time


async def silent(event: Any) -> None:
    pass


def run_of(sampler: Scripted, **options: Any) -> Run:
    return Run(sampler, Options(**options), silent)


TWO = [Branch({**CHAT, "seed": 1}, 2), Branch({**CHAT, "seed": 2}, 1, sample(9))]


async def test_branches_are_drawn_as_one_group() -> None:
    sampler = Scripted([sample(i) for i in (2, 0, 1)])
    run = run_of(sampler)
    drawn = await run.draw(fork(TWO), 3, role="step", keep=True)
    assert [one.sample.index for one in drawn] == [0, 1, 2]
    assert sampler.opened == [(TWO[0].body, 2), (TWO[1].body, 1)]
    assert sampler.kept == [True, True]
    assert sampler.after == [None, TWO[1].after]
    usage = run.usages[0]
    assert (usage.prompt_tokens, usage.completion_tokens) == (14, 30)


async def test_branches_run_at_the_same_time() -> None:
    class Meeting(Scripted):
        """Each group's samples end only once all groups have been entered."""

        here = asyncio.Barrier(2)

    class Group:
        def __init__(self, group: Any) -> None:
            self.group, self.usage = group, group.usage

        async def __aenter__(self) -> Any:
            await self.group.__aenter__()
            return self

        async def __aexit__(self, *exc: object) -> None:
            await self.group.__aexit__(*exc)

        async def __aiter__(self) -> Any:
            await Meeting.here.wait()
            async for one in self.group:
                yield one

        async def cancel(self, indices: Any = None) -> None:
            await self.group.cancel(indices)

    sampler = Meeting([sample(i) for i in range(3)])
    open_ = sampler.group
    sampler.group = lambda *a, **k: Group(open_(*a, **k))  # type: ignore[method-assign, assignment, return-value]
    async with asyncio.timeout(60):
        assert len(await run_of(sampler).draw(fork(TWO), 3)) == 3


async def test_a_branch_that_can_t_be_served_is_a_failure_of_its_samples() -> None:
    sampler = Scripted([sample(i) for i in range(3)], errors={0: Unavailable("no worker")})
    run = run_of(sampler)
    assert [one.sample.index for one in await run.draw(fork(TWO), 3)] == [2]
    assert [one.sample.error for one in run.in_order()] == ["no worker", "no worker", ""]
    assert run.stopped is None


async def test_if_no_branch_can_be_served_the_error_is_the_group_s() -> None:
    errors = {0: Unavailable("no worker"), 2: Unavailable("gone")}
    with pytest.raises(Unavailable, match="no worker"):
        await run_of(Scripted([sample(i) for i in range(3)], errors=errors)).draw(fork(TWO), 3)


async def test_on_failure_all_fails_with_one_branch() -> None:
    sampler = Scripted([sample(i) for i in range(3)], errors={2: Unavailable("gone")})
    with pytest.raises(UpstreamFailed):
        await run_of(sampler, on_failure="all").draw(fork(TWO), 3)
    assert sampler.closed


async def test_a_deadline_cancels_every_branch_and_keeps_what_has_ended() -> None:
    sampler = Scripted([sample(i) for i in (0, 2, 1)], hang_from=2)
    run = run_of(sampler, deadline_s=1.0)
    assert [one.sample.index for one in await run.draw(fork(TWO), 3)] == [0, 2]
    assert run.stopped == "deadline"
    assert [one.sample.state for one in run.in_order()] == ["finished", "stopped_early", "finished"]


async def test_a_budget_spent_by_one_branch_cancels_the_others() -> None:
    sampler = Scripted([sample(i) for i in (2, 0, 1)], hang_from=1)
    run = run_of(sampler, budget_tokens=10)
    await run.draw(fork(TWO), 3)
    assert (run.stopped, sampler.cancels) == ("budget_tokens", 1)


async def test_a_cancelled_request_leaves_no_reader_behind() -> None:
    sampler = Scripted([sample(i) for i in range(3)], hang_from=0)
    drawing = asyncio.create_task(run_of(sampler).draw(fork(TWO), 3))
    while not (sampler.opened and len(asyncio.all_tasks()) > 2):
        await asyncio.sleep(0)
    before = asyncio.all_tasks()
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    assert sampler.closed
    assert not [task for task in before if task is not asyncio.current_task() and not task.done()]


async def test_a_branch_that_ends_without_its_samples_is_declared() -> None:
    class Short(Scripted):
        def group(self, *args: Any, **more: Any) -> Any:
            made = super().group(*args, **more)
            made.mine = made.mine[:1]
            return made

    run = run_of(Short([sample(i) for i in range(3)]))
    await run.draw(fork(TWO), 3)
    assert [one.sample.state for one in run.in_order()] == ["finished", "failed", "finished"]


async def test_what_is_no_error_of_a_branch_is_raised() -> None:
    class Broken(Scripted):
        def group(self, *args: Any, **more: Any) -> Any:
            made = super().group(*args, **more)
            made.error = ZeroDivisionError()  # type: ignore[assignment]
            return made

    with pytest.raises(ZeroDivisionError):
        await run_of(Broken([sample(i) for i in range(3)])).draw(fork(TWO), 3)


def test_a_forked_group_is_a_group() -> None:
    made: Group = ForkedGroup([])
    assert made.usage.prompt_tokens == 0


def test_the_strategies_that_go_on_from_samples_are_listed() -> None:
    trees = {"beam_of_steps", "particle_filtering", "tree_of_thoughts"}
    others = {"certaindex", "cot_decoding", "beam_search", "deepconf"}
    listed = {told["id"]: told for told in strategies.describe()}
    assert trees | others <= listed.keys()
    assert all(listed[name]["schema"]["properties"]["verifier"]["default"] == "self" for name in trees)


# A step's end


async def grown(*texts: str | None, body: Any = None, scores: Any = None, **options: Any) -> Any:
    """A particle filter with one particle: a chain of steps."""
    sampler = Stepping(steps(*texts), scores)
    got, _ = await ask("particle_filtering", sampler, body, n=1, **options)
    return got, sampler


async def test_a_chain_of_steps_is_one_answer() -> None:
    got, sampler = await grown("1+1=2.|", "2+2=4.|", "The answer is 4.", scores={"1+1=2.": 0.9, "The": 0.7})
    text = "1+1=2.\n\n2+2=4.\n\nThe answer is 4."
    assert got.choice["message"]["content"] == text
    assert (got.choice["finish_reason"], got.report["answer"], got.report["chosen"]) == ("stop", "4", 2)
    assert sampler.begun == ["", "1+1=2.\n\n", "1+1=2.\n\n2+2=4.\n\n"]
    assert [body["stop"] for body, _ in sampler.opened] == [["\n\n"]] * 3
    assert [None if one is None else one.index for one in sampler.after] == [None, 0, 1]
    assert sampler.kept == [True] * 3
    assert tree_of(got.report) == [
        (0, None, 1, 0.9, False),
        (1, 0, 2, None, False),
        (2, 1, 3, 0.7, True),
    ]
    assert sampler.oracle.asked[-1] == [text], "verifiers read the whole answer so far"
    assert got.report["tokens"] == 30


async def test_the_last_step_runs_to_the_answer_s_end() -> None:
    got, sampler = await grown("a|", "b\n\nc", steps=2)
    assert "stop" not in sampler.opened[1][0]
    assert "max_tokens" not in sampler.opened[1][0]
    assert got.choice["message"]["content"] == "a\n\nb\n\nc"


async def test_a_step_cut_at_its_limit_goes_on_without_a_separator() -> None:
    got, sampler = await grown("The ans...", "wer is 4.", step_tokens=10)
    assert [body["max_tokens"] for body, _ in sampler.opened] == [10, 10]
    assert got.choice["message"]["content"] == "The answer is 4."


async def test_an_answer_has_the_client_s_limit_whatever_its_steps() -> None:
    body = {**CHAT, "max_tokens": 25}
    got, sampler = await grown("a|", "b|", "c...", body=body, step_tokens=15)
    assert [sent["max_tokens"] for sent, _ in sampler.opened] == [15, 15, 5]
    assert (got.choice["message"]["content"], got.choice["finish_reason"]) == ("a\n\nb\n\nc", "length")
    got, sampler = await grown("a|", "b|", body={**CHAT, "max_tokens": 20})
    assert (got.choice["message"]["content"], got.choice["finish_reason"]) == ("a\n\nb", "length")


async def test_an_answer_that_ends_after_a_separator_has_none_at_its_end() -> None:
    got, _ = await grown("a|", "")
    assert got.choice["message"]["content"] == "a"


async def test_a_text_that_ends_at_once_is_an_answer() -> None:
    got, _ = await grown("")
    assert (got.choice["message"]["content"], got.report["answer"]) == ("", None)


async def test_a_client_s_own_stop_string_ends_the_answer() -> None:
    sampler = Stepping(steps("a|", "b"))
    sampler.samples[1].choice["stop_reason"] = "END"  # type: ignore[index]
    got, _ = await ask("particle_filtering", sampler, {**CHAT, "stop": "END"}, n=1)
    assert sampler.opened[0][0]["stop"] == ["\n\n", "END"]
    assert got.choice["message"]["content"] == "a\n\nb"


async def test_a_template_that_strips_the_separator_is_recognised() -> None:
    """The model begins with the separator then, so a step ends before it began: the next goes past it."""
    got, sampler = await grown("a|", "|", "\n\nb|", "\n\nc")
    assert [body.get("min_tokens") for body, _ in sampler.opened] == [None, None, 1, 1]
    assert sampler.begun == ["", "a\n\n", "a\n\n", "a\n\nb\n\n"]
    assert got.choice["message"]["content"] == "a\n\nb\n\nc"


async def test_thinking_that_is_split_off_is_refused_with_the_way_out() -> None:
    made = steps("|")
    made[0].choice["message"]["reasoning"] = "hmm"
    with pytest.raises(BadRequest, match="enable_thinking"):
        await ask("particle_filtering", Stepping(made), n=1)


async def test_partial_answers_have_no_unmarked_number_for_an_answer() -> None:
    got, _ = await grown("12*3=36.|", "x", budget_tokens=10)
    assert got.report["stopped_early"] == "budget_tokens"
    assert got.report["answer"] is None
    assert (got.choice["message"]["content"], got.choice["finish_reason"]) == ("12*3=36.", "length")
    assert "no answer had ended" in got.report["note"]


@pytest.mark.parametrize("name", ["beam_of_steps", "particle_filtering", "tree_of_thoughts"])
async def test_where_nothing_comes_there_is_an_error(name: str) -> None:
    with pytest.raises(UpstreamFailed):
        await ask(name, Stepping(steps(None, None, None, None)), n=4)
    late = Stepping([sample(i) for i in range(4)], hang_from=0)
    with pytest.raises(DeadlineExceeded):
        await ask(name, late, n=4, deadline_s=0.02)


@pytest.mark.parametrize("name", ["beam_of_steps", "particle_filtering", "tree_of_thoughts"])
async def test_greedy_steps_would_all_be_the_same(name: str) -> None:
    with pytest.raises(BadRequest, match="temperature 0"):
        await ask(name, Stepping(steps()), {**CHAT, "temperature": 0}, n=4)
