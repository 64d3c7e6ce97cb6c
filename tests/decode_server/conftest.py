"""Tests of the engine's side need vLLM; those of the prefixes do not."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["test_samples.py", "test_service.py"]
