"""The generated task: splits, determinism, solutions, mistakes and verifications."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from demo import tasks

PROBLEMS = list(tasks.problems("test", 0, 150))
MOST_CHARACTERS = 420


def _skeletons(split: tasks.Split, seed: int, count: int = 400) -> set[str]:
    return {problem.skeleton for problem in tasks.problems(split, seed, count)}


def test_splits_share_no_skeleton_whatever_the_seed() -> None:
    test, calibration, train = (
        _skeletons("test", 0),
        _skeletons("calibration", 1),
        _skeletons("train", 0, 4000),
    )
    assert not test & calibration
    assert not test & train
    assert not calibration & train


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_problem_hashes_into_the_split_it_is_served_from(split: tasks.Split) -> None:
    assert all(tasks.split_of(problem) == split for problem in tasks.problems(split, 3, 60))


def test_wording_does_not_decide_the_split() -> None:
    problem = PROBLEMS[0]
    renamed = replace(problem, question=problem.question.replace("many", "few"))
    assert tasks.split_of(renamed) == tasks.split_of(problem)


def test_the_same_seed_gives_the_same_problems() -> None:
    assert list(tasks.problems("train", 7, 30)) == list(tasks.problems("train", 7, 30))


def test_another_seed_gives_other_problems() -> None:
    assert not _skeletons("train", 7, 30) & _skeletons("train", 8, 30)


def test_a_stream_repeats_no_skeleton_and_takes_bands_in_turn() -> None:
    assert len({problem.skeleton for problem in PROBLEMS}) == len(PROBLEMS)
    assert [problem.band for problem in PROBLEMS[:7]] == list(tasks.MEASURED)


def test_a_band_can_be_asked_for() -> None:
    assert tasks.make_problem("train", 0, 5, band="easy").band == "easy"


@pytest.mark.parametrize("problem", PROBLEMS[:30], ids=lambda problem: problem.band)
def test_a_worked_solution_is_sound_arithmetic_and_ends_in_the_gold_answer(problem: tasks.Problem) -> None:
    text = tasks.solve(problem).text
    assert text.endswith(f"The answer is {problem.answer}.")
    for left, op, right, result in re.findall(r"(\d+)([*+\-])(\d+)=(\d+)", text):
        a, b = int(left), int(right)
        assert int(result) == {"*": a * b, "+": a + b, "-": a - b}[op]


def test_a_worked_solution_uses_the_numbers_of_the_question_and_no_distractor() -> None:
    for problem in PROBLEMS:
        given = sorted(int(n) for n in re.findall(r"\d+", problem.question))
        used = [n for step in problem.plan for n in (step.left, step.right) if isinstance(n, int)]
        assert given == sorted([*used, *problem.distractors])


def test_every_order_of_a_plan_leads_to_the_gold_answer() -> None:
    rng = random.Random(0)
    assert all(tasks.solve(problem, rng).answer == problem.answer for problem in PROBLEMS for _ in range(4))


def test_a_brief_answer_is_the_last_sentence_of_the_worked_solution() -> None:
    assert all(tasks.solve(p).text.endswith(tasks.brief_answer(p)) for p in PROBLEMS)


def test_a_corrupted_solution_ends_in_a_wrong_answer_and_fails_verification() -> None:
    rng = random.Random(1)
    for problem in PROBLEMS:
        attempt = tasks.corrupt(problem, rng)
        assert attempt.answer != problem.answer
        assert tasks.verification(problem, attempt).endswith("wrong.\n\nVerification: No")


def test_a_right_solution_passes_verification() -> None:
    rng = random.Random(2)
    for problem in PROBLEMS:
        check = tasks.verification(problem, tasks.solve(problem, rng))
        assert check.endswith("ok.\n\nVerification: Yes")
        assert not re.search("wrong|missing", check)


def test_a_verification_agrees_with_the_answer_of_a_noisy_solution() -> None:
    rng = random.Random(3)
    for problem in PROBLEMS:
        attempt = tasks.noisy_solution(problem, rng)
        if tasks.verification(problem, attempt).endswith("Yes"):
            assert attempt.answer == problem.answer


def test_a_cut_off_solution_is_judged_on_the_steps_it_has() -> None:
    problem = PROBLEMS[1]
    attempt = tasks.solve(problem).cut(2)
    assert "answer" not in attempt.text
    assert tasks.verification(problem, attempt).endswith("Verification: Yes")


def test_noise_leaves_some_solutions_right_and_its_scale_turns_it_off() -> None:
    rng = random.Random(4)
    noisy = [tasks.noisy_solution(p, rng).answer == p.answer for p in PROBLEMS]
    assert 0.5 < sum(noisy) / len(noisy) < 0.95
    assert all(tasks.noisy_solution(p, rng, scale=0.0).answer == p.answer for p in PROBLEMS)


def test_texts_stay_short() -> None:
    rng = random.Random(5)
    for problem in PROBLEMS:
        attempt = tasks.corrupt(problem, rng)
        assert len(problem.question) < MOST_CHARACTERS
        assert len(attempt.text) < MOST_CHARACTERS
        assert len(tasks.verification(problem, attempt)) < MOST_CHARACTERS


def test_the_command_prints_one_json_object_per_problem(capsys: pytest.CaptureFixture[str]) -> None:
    tasks.main(["--split", "calibration", "--count", "5", "--mode", "worked"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    assert all(row["prompt"] == row["question"] + tasks.WORKED_SUFFIX for row in rows)
    assert all(row["solution"].endswith(f"The answer is {row['answer']}.") for row in rows)
