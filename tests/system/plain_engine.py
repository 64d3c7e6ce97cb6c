"""Greedy answers of one plain vLLM engine, without Braid: ``plain_engine.py ASKED.json ANSWERED.json``.

Writes for each prompt the token ids and, at each, the gap between the two highest log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MAX_TOKENS = 96


def main(asked: Path, answered: Path) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    from deploy.local import demo_model

    llm = LLM(
        str(demo_model()),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=2)
    messages = [[{"role": "user", "content": prompt}] for prompt in json.loads(asked.read_text())]
    answers = []
    for output in llm.chat(messages, params, use_tqdm=False):
        completion = output.outputs[0]
        gaps = []
        for step in completion.logprobs or []:
            best = sorted((p.logprob for p in step.values()), reverse=True)
            gaps.append(best[0] - best[1])
        answers.append({"tokens": list(completion.token_ids), "gaps": gaps})
    answered.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
