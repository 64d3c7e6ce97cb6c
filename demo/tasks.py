"""Generated word problems with arithmetic: questions, worked solutions, mistakes and verifications.

Everything is a pure function of (split, seed, index) or of a `random.Random` the caller owns.

Splits are disjoint by construction: a problem's skeleton (its operations, numbers and what is asked, without
names and wording) is hashed, and the hash alone decides the split. A generator draws until the hash falls
into the split it serves, so no seed yields a skeleton in two splits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Split = Literal["train", "calibration", "test"]
Band = Literal["easy", "medium", "hard"]
Op = Literal["*", "+", "-"]
Mistake = Literal["digit", "carry", "operand", "skip", "copy"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
BANDS: tuple[Band, ...] = ("easy", "medium", "hard")
MEASURED: tuple[Band, ...] = ("easy", "medium", "hard", "hard", "medium", "hard", "hard")
"""Turns of the bands where accuracy is measured: hard problems are where samples differ."""
BRIEF_SUFFIX = "\nAnswer briefly."
WORKED_SUFFIX = "\nLet's think step by step."
VERIFY_REQUEST = "Is the solution correct? Verify step by step."
OPENINGS = ("First, ", "Step by step: ", "We count ", "Let me see: ")
STEP_BREAK = "\n\n"

# Rate of a deliberate mistake per worked step in training solutions; see README.md, "Label noise".
NOISE = {"*": 0.11, "+": 0.07, "-": 0.07}
MISTAKE_WEIGHTS: dict[Mistake, float] = {
    "digit": 0.5,
    "carry": 0.3,
    "operand": 0.1,
    "skip": 0.05,
    "copy": 0.05,
}

_NAMES = ("Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam")
_ITEMS = (
    "apples",
    "pens",
    "coins",
    "stamps",
    "beads",
    "cards",
    "eggs",
    "nails",
    "shells",
    "buttons",
    "nuts",
    "tiles",
)
_HOLDERS = ("boxes", "bags", "crates", "packs", "trays", "jars", "sacks", "baskets")
_GAINS = ("finds {n} more {i}", "gets {n} more {i}", "buys {n} more {i}", "is given {n} {i}")
_LOSSES = ("gives away {n} {i}", "sells {n} {i}", "loses {n} {i}", "throws out {n} {i}")
_ASIDES = (
    "{o} has {n} {i}.",
    "The shop is {n} years old.",
    "Each one costs {n} cents.",
    "The trip takes {n} minutes.",
)


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, by its index in the plan."""

    index: int


@dataclass(frozen=True)
class Step:
    """One planned operation; operands are numbers of the question or earlier results."""

    op: Op
    left: int | Ref
    right: int | Ref


@dataclass(frozen=True)
class Line:
    """One carried-out step as a solution states it."""

    op: Op
    left: int
    right: int
    result: int

    @property
    def text(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result}."


@dataclass(frozen=True)
class Problem:
    """A question with its plan; the last step of the plan gives the answer."""

    question: str
    band: Band
    plan: tuple[Step, ...]
    distractors: tuple[int, ...]
    answer: int = field(default=0)

    @property
    def skeleton(self) -> str:
        return f"total|{self.plan}|{self.distractors}"

    @property
    def orders(self) -> tuple[tuple[int, ...], ...]:
        """Equally good sequences: two products that open the plan may be computed either way round."""
        natural = tuple(range(len(self.plan)))
        if len(self.plan) > 1 and self.plan[1].op == "*":
            return natural, (1, 0, *natural[2:])
        return (natural,)


@dataclass(frozen=True)
class Attempt:
    """A solution as written: a line (or None where a step is skipped) per step of `order`.

    `answer` is None where the solution is cut off before its end.
    """

    order: tuple[int, ...]
    lines: tuple[Line | None, ...]
    answer: int | None
    opening: str = OPENINGS[0]

    @property
    def text(self) -> str:
        parts = [line.text for line in self.lines if line is not None]
        if self.answer is not None:
            parts.append(f"The answer is {self.answer}.")
        return self.opening + STEP_BREAK.join(parts)

    def cut(self, steps: int) -> Attempt:
        """The first `steps` steps, without an answer."""
        return replace(self, lines=self.lines[:steps], answer=None)


# --- problems ---------------------------------------------------------------------------------------------


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to: 2 % test, 2 % calibration, the rest training, by skeleton hash."""
    bucket = int.from_bytes(hashlib.blake2b(problem.skeleton.encode(), digest_size=4).digest()) % 100
    return "test" if bucket < 2 else "calibration" if bucket < 4 else "train"


def make_problem(split: Split, seed: int, index: int, band: Band | None = None) -> Problem:
    """The problem at `index` of the stream (split, seed). Bands take turns unless one is given."""
    rng = random.Random(f"{split}/{seed}/{index}/{band}")
    turns = BANDS if split == "train" else MEASURED
    chosen = band or turns[index % len(turns)]
    while True:
        problem = _draw(rng, chosen)
        if problem is not None and split_of(problem) == split:
            return problem


def problems(split: Split, seed: int, count: int) -> Iterator[Problem]:
    """The first `count` problems of the stream (split, seed), without repeated skeletons."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        problem = make_problem(split, seed, index)
        index += 1
        if problem.skeleton not in seen:
            seen.add(problem.skeleton)
            yield problem


def _draw(rng: random.Random, band: Band) -> Problem | None:
    """One random problem, or None where an intermediate value leaves its range."""
    name, other = rng.sample(_NAMES, 2)
    item, holders, more_holders = rng.choice(_ITEMS), *rng.sample(_HOLDERS, 2)
    first = (
        (rng.randint(12, 29), rng.randint(12, 39))
        if band == "hard"
        else (rng.randint(2, 9), rng.randint(12, 99))
    )
    sentences = [f"{name} has {first[0]} {holders} with {first[1]} {item} each."]
    plan = [Step("*", *first)]
    if band != "easy":
        second = (rng.randint(2, 9), rng.randint(12, 99))
        sentences.append(f"{other} brings {second[0]} {more_holders} with {second[1]} {item} each.")
        plan += [Step("*", *second), Step("+", Ref(0), Ref(1))]
    for _ in range(2 if band == "hard" and rng.random() < 0.4 else 1):
        op: Op = rng.choice(("+", "-"))
        amount = rng.randint(12, 99 if band == "easy" else 399)
        phrase = rng.choice(_GAINS if op == "+" else _LOSSES).format(n=amount, i=item)
        sentences.append(f"{name} {phrase}.")
        plan.append(Step(op, Ref(len(plan) - 1), amount))
    distractors: tuple[int, ...] = ()
    if rng.random() < {"easy": 0.2, "medium": 0.5, "hard": 0.7}[band]:
        distractors = (rng.randint(12, 99),)
        aside = rng.choice(_ASIDES).format(o=other, n=distractors[0], i=item)
        sentences.insert(rng.randint(1, len(sentences)), aside)
    sentences.append(f"How many {item} are there now?")
    draft = Problem(" ".join(sentences), band, tuple(plan), distractors)
    lines = _carry_out(draft, draft.orders[0], {})
    if not all(
        line and 0 < line.result < 10_000 and (line.op != "-" or line.left > line.right) for line in lines
    ):
        return None
    return replace(draft, answer=_final(lines))


# --- solutions and mistakes -------------------------------------------------------------------------------


def brief_answer(problem: Problem) -> str:
    return f"The answer is {problem.answer}."


def solve(problem: Problem, rng: random.Random | None = None) -> Attempt:
    """A right solution; `rng` picks the opening and the order of the steps."""
    order = rng.choice(problem.orders) if rng else problem.orders[0]
    lines = _carry_out(problem, order, {})
    return Attempt(order, lines, problem.answer, rng.choice(OPENINGS) if rng else OPENINGS[0])


def noisy_solution(problem: Problem, rng: random.Random, scale: float = 1.0) -> Attempt:
    """A solution in which each step goes wrong with its rate in `NOISE`; a mistake is carried forward."""
    struck = [i for i, step in enumerate(problem.plan) if rng.random() < scale * NOISE[step.op]]
    mistakes = {i: _pick_mistake(rng, problem.plan[i]) for i in struck}
    mistakes = {i: kind for i, kind in mistakes.items() if kind not in ("skip", "copy")}
    return _attempt(problem, rng, mistakes)


def corrupt(problem: Problem, rng: random.Random) -> Attempt:
    """A solution with one mistake, carried forward, whose answer is wrong."""
    while True:
        index = rng.randrange(len(problem.plan))
        attempt = _attempt(problem, rng, {index: _pick_mistake(rng, problem.plan[index])})
        if attempt.answer != problem.answer:
            return attempt


def _attempt(problem: Problem, rng: random.Random, mistakes: dict[int, Mistake]) -> Attempt:
    order = rng.choice(problem.orders)
    lines = _carry_out(problem, order, mistakes, rng)
    answer = _final(lines)
    if "copy" in mistakes.values():
        answer = _misread(answer, rng)
    return Attempt(order, lines, answer, rng.choice(OPENINGS))


def _pick_mistake(rng: random.Random, step: Step) -> Mistake:
    """A kind of mistake that fits the step: only adding or taking away a given number can be skipped."""
    kinds = dict(MISTAKE_WEIGHTS)
    if step.op == "*" or isinstance(step.right, Ref):
        del kinds["skip"]
    if isinstance(step.right, Ref):
        del kinds["operand"]
    return rng.choices(list(kinds), list(kinds.values()))[0]


def _carry_out(
    problem: Problem, order: tuple[int, ...], mistakes: dict[int, Mistake], rng: random.Random | None = None
) -> tuple[Line | None, ...]:
    """Carry the plan out in `order`; `rng` is needed only where there are mistakes."""
    values: dict[int, int] = {}
    lines: list[Line | None] = []
    for index in order:
        step = problem.plan[index]
        left = values[step.left.index] if isinstance(step.left, Ref) else step.left
        right = values[step.right.index] if isinstance(step.right, Ref) else step.right
        line: Line | None = _compute(step.op, left, right)
        if index in mistakes and rng is not None:
            line = _spoil(problem, _compute(step.op, left, right), mistakes[index], rng)
        values[index] = left if line is None else line.result
        lines.append(line)
    return tuple(lines)


def _compute(op: Op, left: int, right: int) -> Line:
    return Line(op, left, right, {"*": left * right, "+": left + right, "-": abs(left - right)}[op])


def _spoil(problem: Problem, line: Line, mistake: Mistake, rng: random.Random) -> Line | None:
    if mistake == "skip":
        return None
    if mistake == "copy":
        return line
    if mistake == "operand":
        return _compute(line.op, line.left, _other_number(problem, line.right, rng))
    if mistake == "carry":
        return replace(line, result=_miscarry(line.result, rng))
    return replace(line, result=_misread(line.result, rng))


def _other_number(problem: Problem, wrong: int, rng: random.Random) -> int:
    """A number of the question other than `wrong`; a distractor where there is one."""
    given = [n for step in problem.plan for n in (step.left, step.right) if isinstance(n, int) and n != wrong]
    return rng.choice([n for n in problem.distractors if n != wrong] or given or [wrong + 1])


def _misread(value: int, rng: random.Random) -> int:
    """`value` with one digit changed, most often by one."""
    digits = list(str(value))
    while True:
        place = rng.randrange(len(digits))
        digit = int(digits[place]) + rng.choice((-3, -2, -1, -1, 1, 1, 2, 3))
        if 0 <= digit <= 9 and not (digit == 0 and place == 0 and len(digits) > 1):
            return int("".join([*digits[:place], str(digit), *digits[place + 1 :]]))


def _miscarry(value: int, rng: random.Random) -> int:
    """`value` off by one carry or borrow."""
    shift = rng.choice((10, -10, 100, -100) if value > 150 else (10, -10))
    return value + shift if value + shift > 0 else value - shift


def _final(lines: tuple[Line | None, ...]) -> int:
    """The answer the lines lead to."""
    return next(line.result for line in reversed(lines) if line is not None)


# --- verification -----------------------------------------------------------------------------------------


def verification(problem: Problem, attempt: Attempt, stop_at_mistake: bool = False) -> str:
    """Check an attempt step by step, to its end or to its first mistake, and end in the verdict.

    Each check computes the step afresh from right values, quotes what the attempt says and compares, so a
    mistake that is carried forward shows in every step after it. A cut-off attempt is judged on the steps
    it has.
    """
    right = _carry_out(problem, attempt.order, {})
    said = [(line.result if line else None) for line in attempt.lines]
    checks = [(_recompute(line), line.result, s) for line, s in zip(right, said, strict=False) if line]
    if attempt.answer is not None:
        checks.append((f"Answer {problem.answer}", problem.answer, attempt.answer))
    if stop_at_mistake:
        first = next((i for i, (_, expected, stated) in enumerate(checks) if expected != stated), len(checks))
        checks = checks[: first + 1]
    lines = [_compare(*check) for check in checks]
    verdict = "Yes" if all(expected == stated for _, expected, stated in checks) else "No"
    return STEP_BREAK.join([*lines, f"Verification: {verdict}"])


def _compare(work: str, expected: int, said: int | None) -> str:
    statement = "missing" if said is None else f"says {said}"
    return f"{work}, {statement}, {'ok' if expected == said else 'wrong'}."


def _recompute(line: Line) -> str:
    """A step the long way round: a two-digit product by tens and ones."""
    head = f"{line.left}{line.op}{line.right}="
    if line.op == "*" and line.left > 9:
        tens, ones = line.right // 10 * 10, line.right % 10
        return f"{head}{line.left * tens}+{line.left * ones}={line.result}"
    return f"{head}{line.result}"


def verify_prompt(question: str, solution: str) -> str:
    """The one-turn request to verify a proposed solution."""
    return f"{question}\nProposed solution:\n{solution}\n{VERIFY_REQUEST}"


# --- command line -----------------------------------------------------------------------------------------


def record(problem: Problem, identity: str, mode: Literal["plain", "brief", "worked"]) -> dict[str, str]:
    """One JSONL row: the prompt of the given mode, the gold answer as text and what led to it."""
    suffix = {"plain": "", "brief": BRIEF_SUFFIX, "worked": WORKED_SUFFIX}[mode]
    return {
        "id": identity,
        "prompt": problem.question + suffix,
        "answer": str(problem.answer),
        "band": problem.band,
        "question": problem.question,
        "solution": solve(problem).text,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.tasks", description="Print problems as JSONL.")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("plain", "brief", "worked"), default="plain")
    args = parser.parse_args(argv)
    for number, problem in enumerate(problems(args.split, args.seed, args.count)):
        print(json.dumps(record(problem, f"{args.split}-{args.seed}-{number}", args.mode)))


if __name__ == "__main__":
    main()
