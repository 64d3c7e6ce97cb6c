"""Greedy tokens of one plain vLLM engine, without Braid: ``plain_engine.py ASKED.json ANSWERED.json``.

Asked: the model, engine arguments and prompts of token ids. Answered: for each prompt the token ids and, at
each, the gap between the two highest log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(asked: Path, answered: Path) -> None:
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    spec = json.loads(asked.read_text())
    llm = LLM(spec["model"], dtype="float32", enforce_eager=True, enable_prefix_caching=False, **spec["args"])
    params = SamplingParams(temperature=0.0, max_tokens=spec["max_tokens"], ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": tokens} for tokens in spec["prompts"]]
    answers = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        gaps = []
        for step in output.outputs[0].logprobs or []:
            best = sorted((p.logprob for p in step.values()), reverse=True)
            gaps.append(best[0] - best[1])
        answers.append({"tokens": list(output.outputs[0].token_ids), "gaps": gaps})
    answered.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
