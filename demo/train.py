"""Train the demo model from nothing: tokenizer, weights and configuration into one folder.

    GOMP_SPINCOUNT=0 python -m demo.train --steps 4880 --out demo/model
    GOMP_SPINCOUNT=0 python -m demo.train --small --minutes 24 --out demo/small

The learning-rate schedule follows the share of the budget used, in minutes or in steps, so a slower machine
takes fewer steps and still ends on a decayed rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo import tasks

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant."
VOCABULARY = 1024
POSITIONS = 8192
PLAIN_BRIEF = 0.6  # share of brief replies to plain questions
CUT_OFF = 0.12  # share of proposals cut off before their end
# Qwen's splitting rule: single digits, and line breaks attached to the punctuation before them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- elif content is iterable and content is not mapping -%}"
    "{%- for part in content -%}{%- if part is string -%}{{ part }}"
    "{%- elif part is mapping and part.text is defined -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
    "{%- elif content is not none and content is defined -%}{{ content }}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + (message.role | string) + '\\n' + text(message.content) + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Turn:
    """One message; `learned` marks the assistant replies the loss is taken on."""

    role: str
    text: str
    learned: bool = False


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor


# --- examples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """What a stage trains on: shares of four kinds of conversation; the rest verify in one turn."""

    brief: float
    plain: float
    worked: float
    follow_up: float
    noise: float
    """Scale of the label noise in worked solutions."""
    right: float
    """Share of right solutions among the proposals to verify."""
    early: bool
    """Verifications stop at the first mistake, and follow-ups check noisy solutions."""


FIRST = Mix(0.08, 0.18, 0.24, 0.22, noise=1.0, right=0.5, early=True)
SECOND = Mix(0.05, 0.15, 0.22, 0.26, noise=0.7, right=0.42, early=False)
THIRD = Mix(0.04, 0.09, 0.13, 0.40, noise=0.7, right=0.42, early=False)
SOLVING = Mix(0.05, 0.13, 0.52, 0.15, noise=0.5, right=0.5, early=False)
"""Mostly worked solutions: what a model too small to learn verification as well is for."""


@dataclass(frozen=True)
class Preset:
    """A model's shape, and the mixes of its stages with the shares of the budget at which they end."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    mixes: tuple[Mix, ...]
    stage_ends: tuple[float, ...]
    rate: float
    """Peak learning rate."""


DEMO = Preset(256, 768, 4, 4, 2, mixes=(FIRST, SECOND, THIRD), stage_ends=(0.26, 0.68), rate=2e-3)
SMALL = Preset(128, 320, 4, 2, 1, mixes=(SOLVING,), stage_ends=(), rate=3e-3)


def conversation(rng: random.Random, problem: tasks.Problem, mix: Mix) -> list[Turn]:
    """One training conversation."""
    kinds = ("brief", "plain", "worked", "follow_up", "one_turn")
    shares = (mix.brief, mix.plain, mix.worked, mix.follow_up)
    kind = rng.choices(kinds, (*shares, 1 - sum(shares)))[0]
    if kind == "brief" or (kind == "plain" and rng.random() < PLAIN_BRIEF):
        suffix = tasks.BRIEF_SUFFIX if kind == "brief" else ""
        turns = [_user(problem.question + suffix), _reply(tasks.brief_answer(problem))]
    elif kind in ("plain", "worked"):
        suffix = tasks.WORKED_SUFFIX if kind == "worked" else ""
        solution = tasks.noisy_solution(problem, rng, mix.noise)
        turns = [_user(problem.question + suffix), _reply(solution.text)]
    else:
        turns = _verification_turns(rng, problem, mix, follow_up=kind == "follow_up")
    return [Turn("system", SYSTEM), *turns] if rng.random() < 0.05 else turns


def _verification_turns(rng: random.Random, problem: tasks.Problem, mix: Mix, follow_up: bool) -> list[Turn]:
    own = follow_up and mix.early
    attempt = tasks.noisy_solution(problem, rng, mix.noise) if own else _proposal(rng, problem, mix.right)
    check = _reply(tasks.verification(problem, attempt, stop_at_mistake=mix.early))
    if not follow_up:
        return [_user(tasks.verify_prompt(problem.question, attempt.text)), check]
    solution = Turn("assistant", attempt.text, learned=own or attempt.answer == problem.answer)
    return [_user(problem.question + tasks.WORKED_SUFFIX), solution, _user(tasks.VERIFY_REQUEST), check]


def _proposal(rng: random.Random, problem: tasks.Problem, right: float) -> tasks.Attempt:
    """A solution to verify: right or with one mistake, now and then cut off before its end."""
    attempt = tasks.solve(problem, rng) if rng.random() < right else tasks.corrupt(problem, rng)
    return attempt.cut(rng.randint(1, len(attempt.lines))) if rng.random() < CUT_OFF else attempt


def _user(text: str) -> Turn:
    return Turn("user", text)


def _reply(text: str) -> Turn:
    return Turn("assistant", text, learned=True)


def render(turns: list[Turn]) -> str:
    """The conversation as the chat template writes it."""
    return "".join(f"{START}{turn.role}\n{turn.text}{END}\n" for turn in turns)


def conversations(seed: int, count: int, first: int, mix: Mix) -> list[list[Turn]]:
    found = []
    for index in range(first, first + count):
        rng = random.Random(f"mix/{seed}/{index}")
        found.append(conversation(rng, tasks.make_problem("train", seed, index), mix))
    return found


# --- tokenizer and batches --------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE over sample conversations; the byte alphabet makes any text encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (
        turn.text
        for turns in conversations(seed, 20_000, 0, FIRST)
        for turn in (*turns, Turn("system", SYSTEM))
    )
    tokenizer.train_from_iterator([*texts, "system\n", "user\n", "assistant\n", "tool\n"], trainer)
    return tokenizer


def _targets(ids: list[int], turns: list[Turn], start: int, end: int) -> list[int]:
    """Next-token targets over the learned replies and their end marks, -100 elsewhere."""
    targets = [-100] * len(ids)
    position = -1
    for turn in turns:
        position = ids.index(start, position + 1)
        if turn.learned:
            stop = ids.index(end, position)
            # A header is three tokens (mark, role, line break); the last of them predicts the reply's first.
            targets[position + 2 : stop] = ids[position + 3 : stop + 1]
    return targets


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int, mix: Callable[[], Mix], pool: int = 2048
) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens; a pool is sorted by length, so little is padding."""
    ids = tokenizer.get_vocab()
    start, end = ids[START], ids[END]
    rng = random.Random(f"batches/{seed}")
    first = 0
    while True:
        chats = conversations(seed, pool, first, mix())
        first += pool
        encoded = tokenizer.encode_batch_fast([render(turns) for turns in chats], add_special_tokens=False)
        rows = [
            (one.ids, _targets(one.ids, turns, start, end)) for one, turns in zip(encoded, chats, strict=True)
        ]
        groups = _group(sorted(rows, key=lambda row: len(row[0])), tokens)
        rng.shuffle(groups)
        yield from map(_pad, groups)


def _group(rows: list[tuple[list[int], list[int]]], tokens: int) -> list[list[tuple[list[int], list[int]]]]:
    """Neighbouring rows, as many as fit `tokens` once padded to the longest."""
    groups: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([wanted + [-100] * (width - len(wanted)) for _, wanted in rows])
    return Batch(inputs, targets)


# --- model and optimisation -------------------------------------------------------------------------------


def build_model(seed: int, vocabulary: int, preset: Preset = DEMO) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    # Eager attention is the faster one on CPUs at these lengths.
    return Qwen3ForCausalLM(
        Qwen3Config(
            attn_implementation="eager",
            vocab_size=vocabulary,
            hidden_size=preset.hidden,
            intermediate_size=preset.feed_forward,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            head_dim=64,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.03,
        )
    )


def build_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(layers, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(progress: float, warmup: float = 0.02, decay_from: float = 0.65) -> float:
    """Warm up, hold, then fall along a cosine to 1 % of the peak."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    if progress < decay_from:
        return 1.0
    fall = min(1.0, (progress - decay_from) / (1 - decay_from))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall))


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state
        wanted = batch.targets != -100
        logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets[wanted])


class Progress:
    """Share of the budget used, and a line of figures every so often."""

    def __init__(self, minutes: float | None, steps: int | None) -> None:
        self.minutes, self.steps = minutes, steps
        self.began = self.printed = time.monotonic()
        self.step = self.tokens = 0
        self.loss = math.nan

    @property
    def share(self) -> float:
        if self.steps:
            return self.step / self.steps
        return (time.monotonic() - self.began) / 60 / (self.minutes or 1.0)

    def note(self, batch: Batch, loss: float) -> None:
        self.step += 1
        self.tokens += batch.inputs.numel()
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        if now - self.printed > 15:
            self.printed = now
            spent = now - self.began
            left = spent / max(self.share, 1e-6) - spent
            print(
                f"step {self.step} loss {self.loss:.4f} tokens {self.tokens / 1e6:.2f}M "
                f"{self.tokens / spent:.0f}/s {self.share:.1%} ETA {left / 60:.1f} min",
                flush=True,
            )


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    resumed = args.resume and Tokenizer.from_file(str(args.resume / "tokenizer.json"))
    tokenizer = resumed or train_tokenizer(args.seed)
    preset = SMALL if args.small else DEMO
    rate = args.rate or preset.rate
    model = build_model(args.seed, tokenizer.get_vocab_size(), preset)
    if args.resume is not None:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(args.resume, dtype=torch.float32).state_dict())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(model, rate)
    progress = Progress(args.minutes, args.steps)
    saved = time.monotonic()

    def mix() -> Mix:
        return preset.mixes[sum(progress.share >= end for end in preset.stage_ends)]

    for batch in batches(tokenizer, args.seed, args.batch_tokens, mix):
        if progress.share >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(progress.share)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.note(batch, loss.item())
        if time.monotonic() - saved > args.save_minutes * 60:
            saved = time.monotonic()
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    print(f"done: {progress.step} steps, {progress.tokens:,} tokens, loss {progress.loss:.4f}", flush=True)


# --- files ------------------------------------------------------------------------------------------------


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder beside `out` and rename file by file, so a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
        copy.load_state_dict(model.state_dict())
        copy.generation_config.eos_token_id = tokenizer.token_to_id(END)
        copy.generation_config.pad_token_id = tokenizer.token_to_id(PAD)
        copy.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", tokenizer_config())
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "additional_special_tokens": [START, END],
        "add_bos_token": False,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description="Train the demo model from nothing."
    )
    parser.add_argument(
        "--minutes", type=float, default=50.0, help="budget in minutes (ignored with --steps)"
    )
    parser.add_argument("--steps", type=int, help="budget in optimiser steps")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, help="peak learning rate; the preset's otherwise")
    parser.add_argument("--small", action="store_true", help="the smaller shape and its mix of conversations")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument(
        "--resume", type=Path, help="folder of weights to go on from, with a schedule of its own"
    )
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
