"""What the scheduler side saves and copies a step, and what the connector refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BLOCK = 4
KEY = [b"t" * 16, 1, 0]


class FakeSteps:
    """A scheduler without a model: it makes SchedulerOutputs for a connector's scheduler side."""

    def __init__(self, role: str = "prefill") -> None:
        from kvtransfer.adapter.connector import Options, _SchedulerSide

        self.side = _SchedulerSide(Options(role, "ipc://none", "w", 1), BLOCK)
        self.blocks: dict[str, list[int]] = {}

    def step(
        self, scheduled: dict[str, int], new: list[Any] | None = None, before: dict[str, int] | None = None
    ) -> Any:
        """One step: tokens scheduled a request, the new ones, and of others the tokens before it."""
        before = before or {}
        cached = SimpleNamespace(req_ids=list(before), num_computed_tokens=list(before.values()))
        output = SimpleNamespace(
            scheduled_new_reqs=new or [],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (self.blocks[name],)),
        )
        return self.side.step(output)

    def new(self, name: str, prompt: int, computed: int = 0, key: Any = KEY, first: int = 1) -> Any:
        self.blocks[name] = list(range(first, first + -(-prompt // BLOCK)))
        args = {"kv_transfer_params": {"braid": key}} if key is not None else None
        return SimpleNamespace(
            req_id=name,
            num_computed_tokens=computed,
            prompt_token_ids=list(range(prompt)),
            sampling_params=SimpleNamespace(extra_args=args),
        )


@pytest.fixture
def steps() -> FakeSteps:
    return FakeSteps()


def saves(meta: Any) -> list[tuple[int, list[int]]]:
    assert all(key == tuple(KEY) for key, _, _ in meta.saves)
    return [(first, blocks) for _, first, blocks in meta.saves]


def test_a_prompt_of_one_step_is_saved_with_its_tail(steps: FakeSteps) -> None:
    assert saves(steps.step({"r": 10}, [steps.new("r", 10)])) == [(0, [1, 2, 3])]


def test_a_chunked_prompt_is_saved_block_by_block(steps: FakeSteps) -> None:
    assert saves(steps.step({"r": 6}, [steps.new("r", 14)])) == [(0, [1])]
    assert saves(steps.step({"r": 1}, before={"r": 6})) == []
    assert saves(steps.step({"r": 5}, before={"r": 7})) == [(1, [2, 3])]
    assert saves(steps.step({"r": 2}, before={"r": 12})) == [(3, [4])]


def test_blocks_of_the_prefix_cache_are_saved_with_the_first_step(steps: FakeSteps) -> None:
    assert saves(steps.step({"r": 2}, [steps.new("r", 14, computed=8)])) == [(0, [1, 2])]
    assert saves(steps.step({"r": 4}, before={"r": 10})) == [(2, [3, 4])]


def test_generated_tokens_are_not_saved(steps: FakeSteps) -> None:
    steps.step({"r": 8}, [steps.new("r", 8)])
    steps.blocks["r"].append(9)
    assert saves(steps.step({"r": 1}, before={"r": 8})) == []


def test_a_preempted_prompt_goes_on_where_it_was_in_its_new_blocks(steps: FakeSteps) -> None:
    steps.step({"r": 9}, [steps.new("r", 14)])
    steps.blocks["r"] = [21, 22, 23, 24]
    assert saves(steps.step({"r": 6}, before={"r": 0})) == []
    assert saves(steps.step({"r": 7}, before={"r": 6})) == [(2, [23])]
    assert saves(steps.step({"r": 1}, before={"r": 13})) == [(3, [24])]


def test_a_step_that_does_not_schedule_a_request_saves_nothing_of_it(steps: FakeSteps) -> None:
    steps.step({"r": 6}, [steps.new("r", 14)])
    assert saves(steps.step({}, before={"r": 6})) == []


def test_several_requests_are_saved_each_under_its_key(steps: FakeSteps) -> None:
    other = [b"o" * 16, 2, 1]
    new = [steps.new("r", 4), steps.new("s", 5, key=other, first=5), steps.new("plain", 4, key=None)]
    meta = steps.step({"r": 4, "s": 5, "plain": 4}, new)
    assert meta.saves == [(tuple(KEY), 0, [1]), (tuple(other), 0, [5, 6])]


def test_a_finished_request_is_forgotten(steps: FakeSteps) -> None:
    connector = _connector(steps.side)
    steps.step({"r": 4}, [steps.new("r", 14)])
    for _ in range(2):
        assert connector.request_finished_all_groups(SimpleNamespace(request_id="r"), ([],)) == (False, None)
    assert steps.side.saving == {}


def test_a_sample_copies_its_imports_tail_before_the_step() -> None:
    steps = FakeSteps("decode")
    sample = _sample("i0", 11)
    steps.side.imports.held["i0"] = _import(11, [5, 6, 7])
    assert steps.side.matched(sample, 8) == (2, False)
    steps.side.allocated(sample, SimpleNamespace(get_block_ids=lambda: ([5, 6, 9],)), 2)
    meta = steps.step({"s": 1})
    assert (meta.copies, meta.saves) == ([(7, 9)], [])
    assert steps.step({}).copies == []


@pytest.mark.parametrize("name", [None, "unknown", KEY, 5])
def test_a_request_without_an_import_matches_nothing(name: Any) -> None:
    steps = FakeSteps("decode")
    assert steps.side.matched(_sample(name, 11), 8) == (0, False)
    steps.side.allocated(_sample(name, 11), None, 0)
    assert steps.step({}).copies == []


def test_hooks_that_fail_cost_the_transfer_not_the_engine(
    steps: FakeSteps, caplog: pytest.LogCaptureFixture
) -> None:
    from kvtransfer.adapter.connector import StepMeta

    connector = _connector(steps.side)
    with caplog.at_level(logging.ERROR, "braid.kvtransfer"):
        assert connector.get_num_new_matched_tokens(None, 0) == (0, False)
        connector.update_state_after_alloc(None, None, 1)
        assert connector.build_connector_meta(None) == StepMeta()
        assert connector.request_finished_all_groups(None, ()) == (False, None)
    assert [r.getMessage() for r in caplog.records] == ["kv_hook_failed"] * 4


def test_a_worker_whose_save_fails_goes_on(steps: FakeSteps) -> None:
    from kvtransfer.adapter.connector import StepMeta

    def save(*args: Any) -> None:
        raise RuntimeError

    connector = _connector(steps.side)
    connector._worker = SimpleNamespace(save=save)  # type: ignore[assignment]
    connector._connector_metadata = StepMeta(saves=[((b"", 1, 0), 0, [1])])
    connector.wait_for_save()


def make(monkeypatch: pytest.MonkeyPatch, role: str = "SCHEDULER", groups: int = 1, **options: Any) -> Any:
    """A connector whose process is left as it is."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvtransfer.adapter import connector

    for effect in ("die_with_parent", "configure", "guard_seeded_chunks", "_install_utilities"):
        monkeypatch.setattr(connector, effect, lambda *args: None)
    extra = {"role": "decode", "control": "ipc://none", "name": "d0", "epoch": 1, **options}
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
    return connector.BraidConnector(
        SimpleNamespace(kv_transfer_config=transfer),
        KVConnectorRole[role],
        SimpleNamespace(kv_cache_groups=[group] * groups),
    )


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
def test_the_tested_version_is_taken(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    assert make(monkeypatch, role).options.name == "d0"


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0rc1", "1.0"])
def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(RuntimeError, match="not among the tested versions"):
        make(monkeypatch)


@pytest.mark.parametrize("groups", [0, 2])
def test_other_than_one_kv_cache_group_is_refused(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    with pytest.raises(RuntimeError, match="KV cache groups"):
        make(monkeypatch, groups=groups)


def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        make(monkeypatch, surprise=1)


def _connector(side: Any) -> Any:
    """A connector of the scheduler role around this side."""
    from kvtransfer.adapter.connector import BraidConnector

    connector = BraidConnector.__new__(BraidConnector)
    connector._scheduler, connector._worker = side, None
    return connector


def _sample(name: Any, prompt: int) -> Any:
    return SimpleNamespace(kv_transfer_params={"braid": name}, num_prompt_tokens=prompt)


def _import(tokens: int, blocks: list[int]) -> Any:
    from kvtransfer.adapter.imports import Import

    return Import(None, tokens, blocks, committed=True)
