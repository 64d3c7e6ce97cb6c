"""Search over steps: beam_of_steps, particle_filtering, tree_of_thoughts; every tree is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest, Unavailable
from router import strategies
from router.strategies.particle_filtering import logit, resample, softmax
from router.strategies.thoughts import voted
from tests.router.strategies.scripted import ask
from tests.router.strategies.stepping import Stepping, steps, tree_of

CHAT = {"messages": [{"role": "user", "content": "2+2?"}]}

# Beams

BEAMS = steps("a|", "b|", "c|", "d|", "e|", "f", "g|", "h", "i", "k")
"""Four first steps; next ones of c (e, f) and of b (g, h); then of g (i, k)."""
SCORES = {"a": 0.1, "b": 0.8, "c": 0.9, "d": 0.2, "e": 0.3, "f": 0.5, "g": 0.7, "h": 0.4, "i": 0.6, "k": 0.65}


async def beams(samples: Any = BEAMS, scores: Any = SCORES, **options: Any) -> tuple[Any, Stepping]:
    more = {key: options.pop(key) for key in ("errors", "hang_from", "draws") if key in options}
    sampler = Stepping(samples, scores, **more)
    got, _ = await ask("beam_of_steps", sampler, **{"n": 4, "width": 2, **options})
    return got, sampler


async def test_the_best_beams_go_on_and_one_that_has_ended_keeps_its_place() -> None:
    got, sampler = await beams()
    assert sampler.waves == [4, 2, 2, 2]
    assert sampler.begun == ["", "c\n\n", "b\n\n", "b\n\ng\n\n"]
    assert tree_of(got.report) == [
        (0, None, 1, 0.1, False),
        (1, None, 1, 0.8, False),
        (2, None, 1, 0.9, False),
        (3, None, 1, 0.2, False),
        (4, 2, 2, 0.3, False),
        (5, 2, 2, 0.5, True),
        (6, 1, 2, 0.7, False),
        (7, 1, 2, 0.4, True),
        (8, 6, 3, 0.6, True),
        (9, 6, 3, 0.65, True),
    ]
    assert got.report["kept"] == [[2, 1], [6, 5], [9, 8]]
    assert got.choice["message"]["content"] == "b\n\ng\n\nk"
    assert (got.report["chosen"], got.report["score"], got.report["stopped_early"]) == (9, 0.65, None)
    assert sampler.oracle.asked[1] == ["c\n\ne", "c\n\nf", "b\n\ng", "b\n\nh"]
    assert [None if one is None else one.index for one in sampler.after] == [None, 2, 1, 6]


async def test_independent_trees_keep_a_beam_each() -> None:
    """a and b begin the one tree, c and d the other, whose best is worse than both of the first."""
    samples = steps("a|", "b|", "c|", "d|", "e", "f", "g", "h")
    scores = {"a": 0.8, "b": 0.9, "c": 0.1, "d": 0.2, "e": 0.5, "f": 0.6, "g": 0.3, "h": 0.7}
    got, sampler = await beams(samples, scores, independent=True)
    assert sampler.begun == ["", "b\n\n", "d\n\n"]
    assert got.report["kept"] == [[1, 3], [5, 7]]
    assert got.choice["message"]["content"] == "d\n\nh"
    got, sampler = await beams(samples, scores)
    assert sampler.begun == ["", "b\n\n", "a\n\n"]


async def test_a_first_step_that_fails_moves_no_beam_to_another_tree() -> None:
    samples = steps(None, "b|", "c|", "d|", "e", "f", "g", "h")
    got, sampler = await beams(samples, {"b": 0.1, "c": 0.5, "d": 0.9, "e": 1.0}, independent=True)
    assert sampler.begun == ["", "b\n\n", "d\n\n"]
    assert got.choice["message"]["content"] == "b\n\ne"
    samples = steps(None, None, "c|", "d|", "e", "f")
    got, sampler = await beams(samples, {"d": 0.9, "f": 0.2}, independent=True)
    assert sampler.begun == ["", "d\n\n"]
    assert got.choice["message"]["content"] == "d\n\nf"


async def test_a_beam_whose_steps_all_fail_is_dropped() -> None:
    samples = steps("a|", "b|", "c|", "d|", None, None, "g", "h")
    got, _ = await beams(samples, SCORES)
    assert got.report["kept"] == [[2, 1], [6, 7]]
    assert got.choice["message"]["content"] == "b\n\ng"


async def test_if_every_next_step_fails_the_best_partial_answer_is_returned() -> None:
    got, _ = await beams(steps("a|", "b|", "c|", "d|", None, None, None, None), SCORES)
    assert got.report["stopped_early"] == "failed"
    assert (got.choice["message"]["content"], got.choice["finish_reason"]) == ("c", "length")
    errors = {4: Unavailable("gone"), 6: Unavailable("gone")}
    got, _ = await beams(BEAMS[:8], SCORES, errors=errors)
    assert (got.report["stopped_early"], got.report["chosen"]) == ("failed", 2)
    assert [one["state"] for one in got.report["samples"]] == ["finished"] * 4 + ["failed"] * 4


@pytest.mark.parametrize(
    ("budget", "chosen", "waves"),
    [(40, 2, [4]), (60, 5, [4, 2, 2]), (80, 5, [4, 2, 2]), (90, 5, [4, 2, 2, 2])],
)
async def test_a_budget_in_the_middle_gives_the_best_so_far(
    budget: int, chosen: int, waves: list[int]
) -> None:
    """Ten tokens a step. What has ended comes first, then what the verifier knows."""
    got, sampler = await beams(budget_tokens=budget)
    assert (got.report["chosen"], sampler.waves) == (chosen, waves)
    assert got.report["stopped_early"] == "budget_tokens"
    assert ("note" in got.report) == (chosen == 2)


async def test_the_verifier_s_tokens_are_of_the_same_budget() -> None:
    samples = [*BEAMS[:4], *steps(*["check"] * 9)[4:]]
    got, sampler = await beams(samples, SCORES, draws=True, budget_tokens=60)
    assert sampler.waves == [4, 1, 1]
    assert tree_of(got.report)[:3] == [
        (0, None, 1, 0.1, False),
        (1, None, 1, 0.8, False),
        (2, None, 1, None, False),
    ]
    assert (got.report["chosen"], got.report["tokens"]) == (1, 60)
    assert got.report["stopped_early"] == "budget_tokens"


async def test_a_deadline_in_the_middle_gives_the_best_so_far() -> None:
    got, sampler = await beams(deadline_s=1.5, hang_from=6)
    assert (got.report["stopped_early"], got.report["chosen"]) == ("deadline", 5)
    states = [one["state"] for one in got.report["samples"]]
    assert states == ["finished"] * 6 + ["stopped_early"] * 2
    assert sampler.closed


async def test_beams_that_all_end_at_once_are_one_level() -> None:
    got, sampler = await beams(steps("a", "b", "c", "d"), SCORES)
    assert (sampler.waves, got.choice["message"]["content"]) == ([4], "c")


async def test_an_unknown_score_is_the_lowest() -> None:
    got, _ = await beams(steps("a", "b", "x", "d"), {"a": 0.0, "b": None, "x": None, "d": None})
    assert got.report["chosen"] == 0
    got, _ = await beams(steps("a", "b", "c", "d"), {})
    assert (got.report["chosen"], got.report["score"]) == (0, None)


async def test_a_beam_is_judged_once_also_if_its_score_stays_unknown() -> None:
    got, sampler = await beams(steps("a", "b|", "x|", "y|", "c", "d"), {"b": 0.9, "c": 0.1, "d": 0.2})
    assert sampler.begun == ["", "b\n\n"]
    assert [text for asked in sampler.oracle.asked for text in asked].count("a") == 1
    assert got.report["kept"] == [[1, 0], [5, 4]]


async def test_width_divides_n() -> None:
    with pytest.raises(BadRequest, match="multiple of width"):
        await beams(n=6, width=4)


async def test_an_unknown_verifier_is_refused_before_anything_is_drawn() -> None:
    sampler = Stepping(BEAMS)
    with pytest.raises(BadRequest) as caught:
        await ask("beam_of_steps", sampler, n=4, width=2, verifier="judge")
    assert caught.value.param == "reasoning.verifier"
    assert sampler.opened == []


async def test_a_verifier_of_the_router_chooses_the_steps() -> None:
    samples = steps("2*3=7.|", "2*3=6.|", "The answer is 6.", "6+1=8, so 8.")
    got, sampler = await beams(samples, n=2, verifier="arithmetic")
    assert sampler.begun == ["", "2*3=6.\n\n"]
    assert [node[3] for node in tree_of(got.report)] == [0.0, 1.0, 1.0, 0.5]
    assert (got.report["answer"], got.report["chosen"]) == ("6", 2)


async def test_texts_are_in_the_tree_if_asked_for() -> None:
    got, _ = await beams(return_samples=True)
    assert got.report["tree"][6]["text"] == "b\n\ng\n\n"


async def test_completions_grow_as_chats_do() -> None:
    samples = steps("a|", "b|", "c", "d")
    for one in samples:
        text = one.choice["message"]["content"]
        del one.choice["message"]  # type: ignore[attr-defined]
        one.choice["text"] = text  # type: ignore[index]
    sampler = Stepping(samples, {"b": 0.9, "d": 0.8})
    got, _ = await ask("beam_of_steps", sampler, {"prompt": "2+2="}, n=2, width=2, cot=False)
    assert [body["prompt"] for body, _ in sampler.opened] == ["2+2=", "2+2=b\n\n"]
    assert got.choice["text"] == "b\n\nd"


# Particles


def test_logits_are_of_clipped_scores() -> None:
    assert logit(0.5) == logit(None) == 0.0
    assert logit(0.8) == pytest.approx(math.log(4))
    assert logit(0.0) == pytest.approx(-16.118, abs=1e-3)
    assert logit(1.0) == pytest.approx(16.118, abs=1e-3)


def test_resampling_weights_are_the_odds() -> None:
    """softmax(logit r) is r / (1 - r), normalised."""
    assert softmax([logit(r) for r in (0.5, 0.75, 0.8)]) == pytest.approx([1 / 8, 3 / 8, 4 / 8])


@pytest.mark.parametrize(
    ("scores", "n", "seed", "step", "places"),
    [
        ([0.0, 1.0, 0.0], 4, 7, 0, [1, 1, 1, 1]),
        ([0.5, 0.5, 0.5, 0.5], 4, 7, 0, [1, 1, 1, 2]),
        ([0.5, 0.5, 0.5, 0.5], 4, 7, 1, [1, 1, 1, 1]),
        ([0.5, None, 0.9, 0.1], 8, 0, 0, [2, 2, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_resampling_repeats(
    scores: list[float | None], n: int, seed: int, step: int, places: list[int]
) -> None:
    assert resample(scores, n, seed, step) == places


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=9), st.integers(1, 20), st.integers()
)
def test_resampling_is_a_function_of_the_seed(scores: list[float | None], n: int, seed: int) -> None:
    places = resample(scores, n, seed, 0)
    assert places == resample(scores, n, seed, 0) == sorted(places)
    assert len(places) == n
    assert set(places) <= set(range(len(scores)))


def test_without_a_seed_resampling_differs() -> None:
    assert len({tuple(resample([0.5] * 8, 8, None, 0)) for _ in range(50)}) > 1


async def test_particles_are_resampled_and_the_best_is_returned() -> None:
    """The scores leave no doubt: all go on from b, then from d; of those that ended e is the best."""
    samples = steps("a|", "b|", "c|", "d|", "x|", "y|", "e", "f", "g")
    scores = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0, "x": 0.0, "y": 0.0, "e": 0.9, "f": 0.2, "g": 0.3}
    sampler = Stepping(samples, scores)
    got, _ = await ask("particle_filtering", sampler, {**CHAT, "seed": 3}, n=3)
    assert (sampler.waves, sampler.begun) == ([3, 3, 3], ["", "b\n\n", "b\n\nd\n\n"])
    assert got.report["resampled"] == [[1, 1, 1], [3, 3, 3]]
    assert (got.choice["message"]["content"], got.report["score"]) == ("b\n\nd\n\ne", 0.9)


async def test_a_particle_that_has_ended_stays_and_is_not_extended() -> None:
    samples = steps("a", "b|", "c", "d")
    seen = set()
    for seed in range(30):
        sampler = Stepping(steps("a", "b|"), {"a": 0.6, "b": 0.6, "c": 0.9, "d": 0.8})
        sampler.samples += samples[2:]
        drawn = resample([0.6, 0.6], 2, seed, 0)
        sampler.samples = sampler.samples[: 2 + drawn.count(1)]
        got, _ = await ask("particle_filtering", sampler, {**CHAT, "seed": seed}, n=2)
        assert sampler.waves == [2, *([drawn.count(1)] if drawn.count(1) else [])]
        assert got.report["chosen"] == (2 if drawn.count(1) else 0)
        seen.add(tuple(drawn))
    assert seen == {(0, 0), (0, 1), (1, 1)}


async def test_a_particle_lost_in_the_middle_is_made_up_for() -> None:
    """Of two steps after b one fails: the other is drawn twice in its place."""
    sampler = Stepping(steps("a|", "b|", None, "d|", "e", "f"), {"a": 0.0, "b": 1.0, "e": 0.2, "f": 0.3})
    got, _ = await ask("particle_filtering", sampler, n=2)
    assert sampler.begun == ["", "b\n\n", "b\n\nd\n\n"]
    assert got.report["resampled"] == [[1, 1], [3, 3]]
    assert got.choice["message"]["content"] == "b\n\nd\n\nf"


async def test_a_budget_in_the_middle_returns_the_best_that_has_ended() -> None:
    samples = steps("a", "b|", "c|", "d|")
    got, _ = await ask("particle_filtering", Stepping(samples, {"a": 0.1, "b": 0.9}), n=2, budget_tokens=20)
    assert (got.report["chosen"], got.report["stopped_early"]) == (0, "budget_tokens")


# Thoughts


async def test_breadth_first_keeps_the_best_of_a_depth() -> None:
    samples = steps("a|", "b|", "c|", "d|", "e|", "f", "g", "h")
    scores = {"a": 0.4, "b": 0.6, "c": 0.2, "d": 0.9, "e": 0.5, "f": 0.3, "g": 0.7, "h": 0.8}
    sampler = Stepping(samples, scores)
    got, _ = await ask("tree_of_thoughts", sampler, n=2, breadth=1)
    assert sampler.begun == ["", "b\n\n", "b\n\nd\n\n", "b\n\nd\n\ne\n\n"]
    assert got.report["visited"] == [1, 3, 4]
    assert got.choice["message"]["content"] == "b\n\nd\n\ne\n\nh"


async def test_depth_first_goes_back_where_all_thoughts_are_pruned() -> None:
    """b is the better first thought, but nothing after it is worth following; a leads to an answer."""
    samples = steps("a|", "b|", "x|", "y|", "c", "d")
    scores = {"a": 0.6, "b": 0.9, "x": 0.1, "y": 0.2, "c": 0.7, "d": 0.8}
    sampler = Stepping(samples, scores)
    got, _ = await ask("tree_of_thoughts", sampler, n=2, search="dfs", prune=0.5)
    assert sampler.begun == ["", "b\n\n", "a\n\n"]
    assert got.report["visited"] == [1, 0]
    assert got.choice["message"]["content"] == "a\n\nd"


async def test_depth_first_takes_no_answer_that_is_pruned_unless_there_is_none() -> None:
    samples = steps("a", "b")
    got, _ = await ask("tree_of_thoughts", Stepping(samples, {"a": 0.2, "b": 0.3}), n=2, search="dfs")
    assert (got.report["chosen"], got.report["visited"]) == (1, [])


async def test_depth_first_visits_so_many_states() -> None:
    samples = steps("a|", "b|", "c|", "d|", "e|", "f|")
    scores = dict.fromkeys("abcdef", 0.9)
    sampler = Stepping(samples, scores)
    got, _ = await ask("tree_of_thoughts", sampler, n=2, search="dfs", visits=2)
    assert (sampler.waves, got.report["visited"]) == ([2, 2, 2], [0, 2])
    assert "no answer had ended" in got.report["note"]


async def test_thoughts_are_chosen_by_vote() -> None:
    """Three votes on the first thoughts, three on what follows the one that won."""
    first = ["The best choice is 2", "I think the best choice is Choice 1.", "**Best choice is: 2**"]
    later = ["The best choice is 9", "no idea", "The best choice is 1"]
    sampler = Stepping(steps("a|", "b|", *first, "c", "d", *later))
    got, _ = await ask("tree_of_thoughts", sampler, n=2, breadth=1, evaluate="vote", votes=3)
    assert sampler.waves == [2, 3, 2, 3]
    ballot = sampler.opened[1][0]["messages"]
    assert [message["role"] for message in ballot] == ["user"]
    assert "Choice 1:\na\n\nChoice 2:\nb\n\n" in ballot[0]["content"]
    assert "stop" not in sampler.opened[1][0]
    assert tree_of(got.report) == [
        (0, None, 1, 0.333333, False),
        (1, None, 1, 0.666667, False),
        (5, 1, 2, 0.333333, True),
        (6, 1, 2, 0.0, True),
    ]
    assert got.choice["message"]["content"] == "b\n\nc"
    assert [one.get("role") for one in got.report["samples"]] == [
        *["step"] * 2,
        *["vote"] * 3,
        *["step"] * 2,
        *["vote"] * 3,
    ]


async def test_a_single_thought_needs_no_vote() -> None:
    sampler = Stepping(steps("a|", "b"))
    got, _ = await ask("tree_of_thoughts", sampler, n=1, evaluate="vote")
    assert (sampler.waves, got.choice["message"]["content"]) == ([1, 1], "a\n\nb")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The best choice is 2.", 2),
        ("Best choice is: **Choice 3**", 3),
        ("The best choice is 1. No: the best choice is 2", 2),
        ("<think>best choice is 1</think>The best choice is 3", 3),
        ("The best choice is 4", None),
        ("The best choice is 0", None),
        ("2", None),
        ("", None),
    ],
)
def test_a_vote_is_read(text: str, number: int | None) -> None:
    assert voted(text, 3) == number


@pytest.mark.parametrize("budget", [20, 40, 50])
async def test_thoughts_stop_at_the_budget_with_the_best_so_far(budget: int) -> None:
    samples = steps("a|", "b|", "c|", "d", "e|", "f")
    sampler = Stepping(samples, {"a": 0.4, "b": 0.6, "c": 0.2, "d": 0.5, "e": 0.9, "f": 0.8})
    got, _ = await ask("tree_of_thoughts", sampler, n=2, breadth=2, budget_tokens=budget)
    assert got.report["stopped_early"] == "budget_tokens"
    assert got.choice["message"]["content"] == ("b" if budget == 20 else "b\n\nd")


def test_slots_are_what_runs_at_the_same_time() -> None:
    def slots(**options: Any) -> int:
        return strategies.get("tree_of_thoughts").parse(options).slots

    assert slots(n=4, breadth=3) == 12
    assert slots(n=4, breadth=3, search="dfs") == 4
    assert slots(n=2, breadth=2, evaluate="vote", votes=9) == 9
