"""Each private place of vLLM that the adapter touches is where it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvtransfer.adapter.guards import TOUCHPOINTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine


@pytest.mark.parametrize("name", TOUCHPOINTS)
def test_a_touchpoint_exists(name: str) -> None:
    import ast
    import importlib
    import inspect
    import textwrap

    module, kind, attribute = name.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind)
    if hasattr(owner, attribute):
        return
    # an attribute of the instance: EngineCore's constructor sets it
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner.__init__)))
    set_ = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attribute in set_


@pytest.fixture
def runner_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's runner with a stand-in for what the guard wraps: it draws, and rewinds what it discards."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from kvtransfer.adapter.guards import guard_seeded_chunks

    def sample(self: Any, *args: Any) -> list[float]:
        return [float(torch.rand(1, generator=g)) for _, g in sorted(self.input_batch.generators.items())]

    def bookkeep(self: Any) -> list[int]:
        return sorted(self.input_batch.generators)

    monkeypatch.setattr(GPUModelRunner, "_sample", sample)
    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", bookkeep)
    guard_seeded_chunks()
    return GPUModelRunner


def make_runner(discard: list[bool]) -> Any:
    """A minimal stand-in for a runner: row i has a generator seeded with i."""
    generators = {i: torch.Generator().manual_seed(i) for i in range(len(discard))}
    mask = np.array([*discard, True, True])  # longer than the batch, as vLLM's buffer
    return SimpleNamespace(
        input_batch=SimpleNamespace(generators=generators, num_reqs=len(discard)),
        discard_request_mask=SimpleNamespace(np=mask),
    )


def test_the_generators_of_discarded_rows_are_left_as_they_were(runner_class: Any) -> None:
    runner = make_runner([True, False, True])
    before = {i: g.get_state() for i, g in runner.input_batch.generators.items()}
    runner_class._sample(runner)
    after = {i: g.get_state() for i, g in runner.input_batch.generators.items()}
    assert [torch.equal(before[i], after[i]) for i in range(3)] == [True, False, True]


def test_samples_do_not_depend_on_the_number_of_chunks(runner_class: Any) -> None:
    chunked, whole = make_runner([True]), make_runner([False])
    runner_class._sample(chunked)
    runner_class._sample(chunked)
    chunked.discard_request_mask.np[:] = False
    assert runner_class._sample(chunked) == runner_class._sample(whole)


def test_the_bookkeeping_sees_only_the_rows_that_sampled(runner_class: Any) -> None:
    runner = make_runner([True, False, True])
    assert runner_class._bookkeeping_sync(runner) == [1]
    assert sorted(runner.input_batch.generators) == [0, 1, 2]


def test_generators_are_restored_when_sampling_fails(runner_class: Any) -> None:
    runner = make_runner([True])
    before = runner.input_batch.generators[0].get_state()
    runner.input_batch.generators[1] = "not a generator"  # the stand-in fails after row 0
    with pytest.raises(TypeError):
        runner_class._sample(runner)
    assert torch.equal(runner.input_batch.generators[0].get_state(), before)


def test_the_import_calls_are_utility_methods_of_the_engine_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    from kvtransfer.adapter.utilities import install_utilities

    names = ("braid_begin", "braid_commit", "braid_release", "braid_stats")
    for name in names:
        monkeypatch.setattr(EngineCore, name, None, raising=False)
    install_utilities()
    assert all(callable(getattr(EngineCore, name)) for name in names)


@pytest.mark.parametrize(
    "name", ["get_computed_blocks", "allocate_slots", "cache_blocks", "free", "get_block_ids"]
)
def test_the_block_manager_has_what_imports_call(name: str) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    assert callable(getattr(KVCacheManager, name))


def test_the_kernels_of_a_block_have_a_name() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a touchpoint of the CPU backend")
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    assert isinstance(_get_attn_isa(torch.float32, 32, 32, "auto"), str)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module that judges drafts, guarded, with a stand-in for the constraints."""
    from vllm.v1.sample import rejection_sampler

    from kvtransfer.adapter.guards import guard_drafts

    def constrain(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits / logits.max()

    for name, stand_in in (("apply_sampling_constraints", constrain), ("expand_batch_to_tokens", None)):
        assert callable(getattr(rejection_sampler, name))
        monkeypatch.setattr(rejection_sampler, name, stand_in)
    guard_drafts()
    return rejection_sampler


def test_a_step_without_drafts_constrains_no_logits(drafts: Any) -> None:
    constrain = drafts.apply_sampling_constraints
    assert constrain(torch.zeros(0, 7), None, None).shape == (0, 7)
    assert torch.equal(constrain(torch.full((2, 7), 3.0), None, None), torch.ones(2, 7))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_each_draft_has_the_settings_of_its_request(drafts: Any, dtype: torch.dtype) -> None:
    settings, ends = torch.tensor([5, 0, 7], dtype=dtype), torch.tensor([2, 5, 5], dtype=torch.int32)
    expanded = drafts.expand_batch_to_tokens(settings, ends, 5)
    assert torch.equal(expanded, torch.tensor([5, 5, 0, 0, 0], dtype=dtype))
    assert drafts.expand_batch_to_tokens(settings, ends, 5, 0, 1).tolist() == [5, 5, 1, 1, 1]
    none = drafts.expand_batch_to_tokens(settings, torch.zeros(3, dtype=torch.int32), 0)
    assert none.shape == (0,)


def test_ranks_are_counted_as_vllm_does_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    from kvtransfer.adapter.guards import rank_without_compiler

    compiled = sampler.batched_count_greater_than
    monkeypatch.setattr(sampler, "batched_count_greater_than", compiled)
    rank_without_compiler()
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.9], [3.0, 2.0, 1.0, 0.0]])
    ranks = sampler.batched_count_greater_than(scores, torch.tensor([[0.5], [3.0]]))
    assert ranks.tolist() == [3, 1]
    assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")
    original = compiled._torchdynamo_orig_callable
    assert torch.equal(ranks, original(scores, torch.tensor([[0.5], [3.0]])))


def test_the_sampler_is_compiled_for_one_row_and_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    from kvtransfer.adapter.guards import warm_sampler

    drawn = []

    def sample(logits: torch.Tensor) -> torch.Tensor:
        drawn.append((tuple(logits.shape), torch.is_inference_mode_enabled()))
        return logits.argmax(-1)

    assert callable(topk_topp_sampler.compiled_random_sample)
    monkeypatch.setattr(topk_topp_sampler, "compiled_random_sample", sample)
    warm_sampler(9)
    assert drawn == [((1, 9), True), ((2, 9), True)]


@pytest.fixture(name="core")
def engine_core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """EngineCore with a request, over an executor that notes what it is asked and when it is awaited."""
    from contextlib import nullcontext

    from vllm.v1.engine.core import EngineCore

    from kvtransfer.adapter.guards import sample_at_once

    monkeypatch.setattr(EngineCore, "step", EngineCore.step)
    sample_at_once()
    notes: list[str] = []

    class Asked:
        def __init__(self, name: str) -> None:
            self.name = name
            notes.append(f"ask {name}")

        def result(self) -> Any:
            notes.append(f"wait {self.name}")
            if self.name == core.fails:
                raise RuntimeError(f"{self.name} failed")
            return None if self.name == "execute" and core.tokens else "output"

    core = EngineCore.__new__(EngineCore)
    core.tokens, core.notes, core.fails, core.is_pooling_model = 3, notes, "", False
    core.scheduler = SimpleNamespace(
        has_requests=lambda: True,
        schedule=lambda _: SimpleNamespace(total_num_scheduled_tokens=core.tokens),
        get_grammar_bitmask=lambda _: notes.append("grammar"),
        update_from_output=lambda _, output: {0: output},
    )
    core.model_executor = SimpleNamespace(
        execute_model=lambda *_, **__: Asked("execute"), sample_tokens=lambda *_, **__: Asked("sample")
    )
    core._should_throttle_prefills = lambda: False
    core.log_error_detail = core.capture_iteration_details = lambda _: nullcontext()
    core._process_aborts_queue = core._attach_iteration_details = core._attach_weight_version = lambda *_: (
        None
    )
    return core


def test_samples_are_asked_for_before_a_step_is_waited_for(core: Any) -> None:
    assert core.step() == ({0: "output"}, True)
    assert core.notes == ["ask execute", "grammar", "ask sample", "wait execute", "wait sample"]


def test_a_step_without_tokens_asks_for_no_samples(core: Any) -> None:
    core.tokens = 0
    assert core.step() == ({0: "output"}, False)
    assert core.notes == ["ask execute", "wait execute"]


def test_an_engine_without_requests_has_no_step(core: Any) -> None:
    core.scheduler.has_requests = lambda: False
    assert core.step() == ({}, False)
    assert core.notes == []


@pytest.mark.parametrize("fails", ["execute", "sample"])
def test_a_step_that_fails_is_not_taken_for_an_empty_one(core: Any, fails: str) -> None:
    core.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        core.step()
