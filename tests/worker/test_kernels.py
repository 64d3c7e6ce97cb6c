"""What an engine on CPUs keeps of the kernels that its steps need."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from braid.heap import allocated

GROW = """
import ctypes
import torch
from braid.heap import anonymous_bytes
from braid.worker.engine import engine_environment
engine_environment("nowhere")
import vllm._custom_ops as ops
from vllm.platforms import current_platform

def own():
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes()

current_platform.import_kernels()
torch.set_num_threads(1)
steps = torch.randn(512, 256)
layers = [ops.create_onednn_mm(torch.randn(n, 256).t(), 32) for n in (256, 512, 1536)]
for layer in layers:
    ops.onednn_mm(layer, steps, None)
before = own()
for tokens in range(1, 512):
    for layer in layers:
        ops.onednn_mm(layer, steps[:tokens], None)
print(own() - before)
"""


def grown(**environment: str) -> int:
    """Bytes by which steps of every number of tokens make a process larger, as an engine's process gives back
    what it has freed: that alone may be as much as the kernels kept."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    ran = subprocess.run(
        [sys.executable, "-c", GROW], env=given | environment, capture_output=True, text=True, check=True
    )
    return int(ran.stdout.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is free is not told from what is kept")
def test_kernels_for_steps_of_all_sizes_are_not_kept() -> None:
    """The memory of workers with random prompts grew for an hour."""
    ours, theirs = grown(), grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert ours < theirs / 4


RARE = """
import torch
from braid.heap import allocated
from braid.worker.engine import engine_environment
engine_environment("nowhere")
import vllm._custom_ops as ops
from vllm.platforms import current_platform

current_platform.import_kernels()
torch.set_num_threads(1)
steps = torch.randn(512, 256)
layers = [ops.create_onednn_mm(torch.randn(n, 256).t(), 32) for n in (256, 512, 1536)]

def step(tokens):
    for layer in layers:
        ops.onednn_mm(layer, steps[:tokens], None)

step(512)
begun = allocated().in_use
for _ in range(2):
    for tokens in range(1, 32):
        step(tokens)
usual = allocated().in_use
for rare in range(100, 180):
    for tokens in range(1, 32):
        step(tokens)
    step(rare)
print((allocated().in_use - usual) / (usual - begun))
"""


@pytest.mark.engine
@pytest.mark.skipif(allocated() is None, reason="the C library does not tell")
def test_kernels_of_steps_that_come_once_do_not_gather() -> None:
    """The memory of decode workers grew in steps of 1 to 6 MiB, half an hour apart."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    ran = subprocess.run([sys.executable, "-c", RARE], env=given, capture_output=True, text=True, check=True)
    assert float(ran.stdout.splitlines()[-1]) < 0.2  # of what the sizes take that come all the time
