"""Parts of the installed vLLM, without an engine. Importing vLLM takes seconds, so tests here are slow."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
