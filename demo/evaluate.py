"""Measure the demo model on a held-out split, in process with vLLM, and write the table as JSON.

    python -m demo.evaluate --model demo/model --count 300 --out figures.json

The settings fit vLLM's CPU build: one core, float32, eager. No request carries a seed, because a seeded
request whose prefill is chunked ends the CPU engine of vLLM 0.32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo import tasks

Table = dict[str, Any]
_ANSWER = re.compile(r"[Tt]he answer is (-?\d+)")
_VERDICT = re.compile(r"Verification: (Yes|No)\s*$")
_RECHECK = re.compile(r"Answer (\d+), says (\d+)")
MAX_TOKENS = 320


def extract(text: str) -> int | None:
    """The last stated answer, or None."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def verdict(text: str) -> bool | None:
    """The verdict a verification ends in, or None where it has none."""
    found = _VERDICT.search(text)
    return found[1] == "Yes" if found else None


def recomputed(text: str) -> bool | None:
    """Whether the answer a verification recomputes equals the one it quotes, whatever its verdict."""
    found = _RECHECK.search(text)
    return found[1] == found[2] if found else None


def majority(answers: Sequence[int | None]) -> int | None:
    """The most frequent answer; ties go to the earliest."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda answer: counts[answer]) if counts else None


class Bench:
    """The problems, the engine and the requests put to it."""

    def __init__(self, model: str, problems: list[tasks.Problem]) -> None:
        from vllm import LLM

        self.problems = problems
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=1024,
            max_num_seqs=256,
            disable_log_stats=True,
        )
        self.tokenizer: Any = self.llm.get_tokenizer()

    def ask(self, chats: list[list[dict[str, str]]], **sampling: Any) -> list[Any]:
        """Outputs per chat, each a list of samples."""
        prompts = [{"prompt_token_ids": self.encode(chat)} for chat in chats]
        return self.generate(prompts, **sampling)

    def encode(self, chat: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def generate(self, prompts: list[Any], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 0.0, **sampling})
        return [result.outputs for result in self.llm.generate(prompts, params, use_tqdm=False)]

    def accuracy(self, answers: Sequence[int | None]) -> Table:
        """Share of right answers in all and per band."""
        right = [answer == problem.answer for answer, problem in zip(answers, self.problems, strict=True)]
        table: Table = {"all": _share(right)}
        for band in tasks.BANDS:
            table[band] = _share([r for r, p in zip(right, self.problems, strict=True) if p.band == band])
        return table


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4) if flags else math.nan


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- measurements -----------------------------------------------------------------------------------------


def greedy(bench: Bench, suffix: str) -> Table:
    outputs = bench.ask([_user(problem.question + suffix) for problem in bench.problems])
    return {
        **bench.accuracy([extract(samples[0].text) for samples in outputs]),
        "mean_tokens": round(sum(len(s[0].token_ids) for s in outputs) / len(outputs), 1),
    }


def sample_worked(bench: Bench, n: int) -> list[list[Any]]:
    chats = [_user(problem.question + tasks.WORKED_SUFFIX) for problem in bench.problems]
    return bench.ask(chats, n=n, temperature=1.0, logprobs=0)


def votes(bench: Bench, samples: list[list[Any]]) -> Table:
    """One sample (the mean over all), majority, best by mean logprob, and any right."""
    answers = [[extract(sample.text) for sample in group] for group in samples]
    singles = [bench.accuracy([group[i] for group in answers]) for i in range(len(answers[0]))]
    best = [max(group, key=_mean_logprob) for group in samples]
    lengths = [len(sample.token_ids) for group in samples for sample in group]
    return {
        "one_sample": {key: round(sum(s[key] for s in singles) / len(singles), 4) for key in singles[0]},
        "majority": bench.accuracy([majority(group) for group in answers]),
        "best_by_mean_logprob": bench.accuracy([extract(sample.text) for sample in best]),
        "any_right": bench.accuracy(
            [
                p.answer if p.answer in group else None
                for p, group in zip(bench.problems, answers, strict=True)
            ]
        ),
        "no_answer": _share([answer is None for group in answers for answer in group]),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
    }


def _mean_logprob(sample: Any) -> float:
    return float(sample.cumulative_logprob) / max(1, len(sample.token_ids))


def candidates(bench: Bench, samples: list[list[Any]]) -> list[tuple[tasks.Problem, str, bool]]:
    """A balanced set of the model's own solutions: a right and a wrong one of each problem that has both."""
    found = []
    for problem, group in zip(bench.problems, samples, strict=True):
        right = [sample.text for sample in group if extract(sample.text) == problem.answer]
        wrong = [sample.text for sample in group if extract(sample.text) not in (None, problem.answer)]
        if right and wrong:
            found += [(problem, right[0], True), (problem, wrong[0], False)]
    return found


def verification(
    bench: Bench, chosen: list[tuple[tasks.Problem, str, bool]], follow_up: bool, temperature: float
) -> Table:
    """How often the verdict agrees with the gold answer; a missing verdict counts as a wrong one."""
    chats = [
        _follow_up(p, text) if follow_up else _user(tasks.verify_prompt(p.question, text))
        for p, text, _ in chosen
    ]
    texts = [output[0].text for output in bench.ask(chats, temperature=temperature)]
    truth = [right for _, _, right in chosen]
    pairs = list(zip(map(verdict, texts), truth, strict=True))
    rechecks = list(zip(map(recomputed, texts), truth, strict=True))
    return {
        "candidates": len(pairs),
        "accuracy": _share([v is right for v, right in pairs]),
        "accepts_wrong": _share([v is True for v, right in pairs if not right]),
        "rejects_right": _share([v is False for v, right in pairs if right]),
        "no_verdict": _share([v is None for v, _ in pairs]),
        "accuracy_by_recomputed_answer": _share([v is right for v, right in rechecks]),
        "accepts_wrong_by_recomputed_answer": _share([v is True for v, right in rechecks if not right]),
    }


def _follow_up(problem: tasks.Problem, solution: str) -> list[dict[str, str]]:
    return [
        *_user(problem.question + tasks.WORKED_SUFFIX),
        {"role": "assistant", "content": solution},
        *_user(tasks.VERIFY_REQUEST),
    ]


def first_tokens(bench: Bench) -> dict[str, float]:
    """Mean probability of the first token, asked plainly."""
    mass: dict[str, float] = defaultdict(float)
    outputs = bench.ask([_user(p.question) for p in bench.problems], max_tokens=1, logprobs=10)
    for samples in outputs:
        for entry in samples[0].logprobs[0].values():
            mass[entry.decoded_token] += math.exp(entry.logprob) / len(outputs)
    return {token: round(share, 4) for token, share in sorted(mass.items(), key=lambda kv: -kv[1])[:10]}


def cot_decoding(bench: Bench, k: int) -> Table:
    """Wang & Zhou 2024: branch on the k best first tokens, go on greedily, trust the surest answer."""
    prompts = [bench.encode(_user(problem.question)) for problem in bench.problems]
    heads = bench.generate([{"prompt_token_ids": ids} for ids in prompts], max_tokens=1, logprobs=k)
    branches = [(i, token) for i, head in enumerate(heads) for token in list(head[0].logprobs[0])[:k]]
    outputs = bench.generate(
        [{"prompt_token_ids": [*prompts[i], token]} for i, token in branches], logprobs=2
    )
    scores: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for (i, token), samples in zip(branches, outputs, strict=True):
        answer = extract(bench.tokenizer.decode([token]) + samples[0].text)
        if answer is not None:
            scores[i].append((answer, _margin(samples[0], str(answer))))
    best = [max(found, key=lambda pair: pair[1])[0] if found else None for found in scores]
    return {
        "best_branch": bench.accuracy(best),
        "summed_by_answer": bench.accuracy([_summed(s) for s in scores]),
    }


def _margin(sample: Any, answer: str) -> float:
    """Mean of p(top 1) - p(top 2) over the tokens of the last stated answer, which are single digits."""
    steps = [sorted((math.exp(e.logprob) for e in step.values()), reverse=True) for step in sample.logprobs]
    tokens = [
        step[token].decoded_token for step, token in zip(sample.logprobs, sample.token_ids, strict=True)
    ]
    digits = [i for i, token in enumerate(tokens) if token.strip().isdigit()][-len(answer) :]
    return sum(steps[i][0] - steps[i][1] for i in digits) / max(1, len(digits))


def _summed(found: list[tuple[int, float]]) -> int | None:
    total: dict[int, float] = defaultdict(float)
    for answer, margin in found:
        total[answer] += margin
    return max(total, key=lambda answer: total[answer]) if total else None


def measure(bench: Bench, n: int) -> Table:
    """The whole table, section by section, with a line of progress each."""
    table: Table = {}

    def run(name: str, section: Callable[[], Any]) -> None:
        began = time.monotonic()
        table[name] = section()
        print(
            f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(table[name])}",
            file=sys.stderr,
            flush=True,
        )

    run("brief_greedy", lambda: greedy(bench, tasks.BRIEF_SUFFIX))
    run("plain_greedy", lambda: greedy(bench, ""))
    run("worked_greedy", lambda: greedy(bench, tasks.WORKED_SUFFIX))
    samples = sample_worked(bench, n)
    run(f"worked_t1_n{n}", lambda: votes(bench, samples))
    chosen = candidates(bench, samples)
    run("verification_greedy", lambda: verification(bench, chosen, follow_up=False, temperature=0.0))
    run("verification_t1", lambda: verification(bench, chosen, follow_up=False, temperature=1.0))
    run("verification_follow_up", lambda: verification(bench, chosen, follow_up=True, temperature=0.0))
    run("first_token_plain", lambda: first_tokens(bench))
    run("cot_decoding_k10", lambda: cot_decoding(bench, 10))
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate", description="Measure the demo model with vLLM."
    )
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--split", choices=tasks.SPLITS, default="test")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--core", default="0", help="core the engine is bound to")
    parser.add_argument("--out", type=Path, help="JSON file to write; standard output otherwise")
    args = parser.parse_args(argv)
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND=args.core, HF_HUB_OFFLINE="1")
    bench = Bench(args.model, list(tasks.problems(args.split, args.seed, args.count)))
    table = {"split": args.split, "count": args.count, "seed": args.seed, **measure(bench, args.samples)}
    text = json.dumps(table, indent=2) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
