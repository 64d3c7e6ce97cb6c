"""What the scheduler side saves and copies a step, and what the connector refuses."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtransfer import wire
from kvtransfer.plan import Blocking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BLOCK = 4
KEY = [b"t" * 16, 1, 0]


class FakeSteps:
    """A scheduler without a model: it makes SchedulerOutputs for a connector's scheduler side."""

    def __init__(self, role: str = "prefill", groups: tuple[Blocking, ...] = (Blocking(BLOCK),)) -> None:
        from kvtransfer.adapter.options import Options
        from kvtransfer.adapter.scheduler import SchedulerSide

        self.side = SchedulerSide(Options(role, "ipc://none", "w", 1, ("zmq",)), groups)
        self.blocks: dict[str, tuple[list[int], ...]] = {}

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
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: self.blocks[name]),
        )
        return self.side.step(output)

    def new(self, name: str, prompt: int, computed: int = 0, key: Any = KEY, first: int = 1) -> Any:
        ids = iter(range(first, 1000))
        self.blocks[name] = tuple(
            [next(ids) for _ in range(-(-prompt // group.block_size))] for group in self.side.groups
        )
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
    assert all((key, group) == (tuple(KEY), 0) for key, group, _, _ in meta.saves)
    return [(first, blocks) for _, _, first, blocks in meta.saves]


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
    steps.blocks["r"][0].append(9)
    assert saves(steps.step({"r": 1}, before={"r": 8})) == []


def test_a_preempted_prompt_goes_on_where_it_was_in_its_new_blocks(steps: FakeSteps) -> None:
    steps.step({"r": 9}, [steps.new("r", 14)])
    steps.blocks["r"] = ([21, 22, 23, 24],)
    assert saves(steps.step({"r": 6}, before={"r": 0})) == []
    assert saves(steps.step({"r": 7}, before={"r": 6})) == [(2, [23])]
    assert saves(steps.step({"r": 1}, before={"r": 13})) == [(3, [24])]


def test_a_preempted_prompt_that_is_told_as_new_goes_on_where_it_was(steps: FakeSteps) -> None:
    """vLLM's second model runner hears of resumed requests as of new ones."""
    steps.step({"r": 9}, [steps.new("r", 14)])
    assert saves(steps.step({"r": 6}, [steps.new("r", 14, first=21)])) == []
    assert saves(steps.step({"r": 7}, before={"r": 6})) == [(2, [23])]


def test_a_step_that_does_not_schedule_a_request_saves_nothing_of_it(steps: FakeSteps) -> None:
    steps.step({"r": 6}, [steps.new("r", 14)])
    assert saves(steps.step({}, before={"r": 6})) == []


def test_several_requests_are_saved_each_under_its_key(steps: FakeSteps) -> None:
    other = [b"o" * 16, 2, 1]
    new = [steps.new("r", 4), steps.new("s", 5, key=other, first=5), steps.new("plain", 4, key=None)]
    meta = steps.step({"r": 4, "s": 5, "plain": 4}, new)
    assert meta.saves == [(tuple(KEY), 0, 0, [1]), (tuple(other), 0, 0, [5, 6])]


def test_of_a_windowed_group_only_what_a_sample_sees_is_saved_and_in_the_step_that_fills_it() -> None:
    steps = FakeSteps(groups=(Blocking(BLOCK), Blocking(BLOCK, 6)))
    meta = steps.step({"r": 10}, [steps.new("r", 18)])
    assert meta.saves == [(tuple(KEY), 0, 0, [1, 2])]
    steps.blocks["r"][1][0] = 0  # it left the window
    meta = steps.step({"r": 7}, before={"r": 10})
    assert meta.saves == [(tuple(KEY), 0, 2, [3, 4]), (tuple(KEY), 1, 2, [8, 9])]
    steps.blocks["r"][1][1:3] = [0, 0]
    meta = steps.step({"r": 1}, before={"r": 17})
    assert meta.saves == [(tuple(KEY), 0, 4, [5]), (tuple(KEY), 1, 4, [10])]


def test_a_block_that_is_gone_costs_the_transfer(caplog: pytest.LogCaptureFixture) -> None:
    steps = FakeSteps(groups=(Blocking(BLOCK, 6),))
    new = steps.new("r", 10)
    steps.blocks["r"][0][1] = 0
    with caplog.at_level(logging.ERROR, "braid.kvtransfer"):
        meta = steps.step({"r": 10}, [new])
    assert (meta.saves, meta.spoiled) == ([], [tuple(KEY)])
    assert steps.side.saving == {}


def test_a_finished_request_is_forgotten(steps: FakeSteps) -> None:
    connector = _connector(steps.side)
    steps.step({"r": 4}, [steps.new("r", 14)])
    for _ in range(2):
        ended = SimpleNamespace(request_id="r", kv_transfer_params=None)
        assert connector.request_finished_all_groups(ended, ([],)) == (False, None)
    assert steps.side.saving == {}


def test_a_sample_copies_its_imports_tail_before_the_step() -> None:
    steps = FakeSteps("decode")
    sample = _sample("i0", 11)
    steps.side.imports.held["i0"] = _import(11, ([5, 6, 7],))
    assert steps.side.matched(sample, 8) == (2, False)
    steps.side.allocated(sample, SimpleNamespace(get_block_ids=lambda: ([5, 6, 9],)), 2)
    meta = steps.step({"s": 1})
    assert (meta.copies, meta.saves) == ([(0, 7, 9)], [])
    assert steps.step({}).copies == []


def test_a_sample_copies_the_tail_in_every_group_but_not_outside_its_window() -> None:
    steps = FakeSteps("decode", (Blocking(8), Blocking(BLOCK), Blocking(BLOCK, 2)))
    steps.side.imports.held["i0"] = _import(16, ([1, 2], [3, 4, 5, 6], [0, 7, 8, 9]))
    sample = _sample("i0", 16)
    assert steps.side.matched(sample, 8) == (7, False)
    targets = ([1, 21], [3, 4, 22, 23], [0, 0, 0, 24])
    steps.side.allocated(sample, SimpleNamespace(get_block_ids=lambda: targets), 7)
    assert steps.step({"s": 1}).copies == [(0, 2, 21), (1, 5, 22), (1, 6, 23), (2, 9, 24)]


@pytest.mark.parametrize("name", [None, "unknown", KEY, 5])
def test_a_request_without_an_import_matches_nothing(name: Any) -> None:
    steps = FakeSteps("decode")
    assert steps.side.matched(_sample(name, 11), 8) == (0, False)
    steps.side.allocated(_sample(name, 11), None, 0)
    assert steps.step({}).copies == []


def test_hooks_that_fail_cost_the_transfer_not_the_engine(
    steps: FakeSteps, caplog: pytest.LogCaptureFixture
) -> None:
    from kvtransfer.adapter.scheduler import StepMeta

    connector = _connector(steps.side)
    with caplog.at_level(logging.ERROR, "braid.kvtransfer"):
        assert connector.get_num_new_matched_tokens(None, 0) == (0, False)
        assert connector.build_connector_meta(None) == StepMeta()
        assert connector.request_finished_all_groups(None, ()) == (False, None)
    assert [r.getMessage() for r in caplog.records] == ["kv_hook_failed"] * 3


def test_a_tail_copy_that_cannot_be_planned_is_not_passed_over(steps: FakeSteps) -> None:
    """The engine counts those tokens as computed: without their KV it would go on to wrong tokens."""
    with pytest.raises(AttributeError):
        _connector(steps.side).update_state_after_alloc(None, None, 1)


def test_a_worker_whose_save_fails_goes_on(steps: FakeSteps) -> None:
    from kvtransfer.adapter.scheduler import StepMeta

    saved = []

    def save(key: wire.Key, *args: Any) -> None:
        if key.attempt == 1:
            raise RuntimeError
        saved.append(key)

    connector = _connector(steps.side)
    spoiled: list[wire.Key] = []
    connector._worker = SimpleNamespace(save=save, spoil=spoiled.append)  # type: ignore[assignment]
    saves = [((b"", n, 0), 0, 0, [1]) for n in (1, 2)]
    connector._connector_metadata = StepMeta(saves=saves, spoiled=[(b"", 3, 0)])
    connector.wait_for_save()
    assert saved == [wire.Key(b"", 2)], "the other prompt's blocks are its own"
    assert spoiled == [wire.Key(b"", 3)], "nobody waits for what can't be saved"


def make(monkeypatch: pytest.MonkeyPatch, side: str = "SCHEDULER", specs: Any = None, **changes: Any) -> Any:
    """A connector whose process is left as it is. ``changes``: of parallel and cache config, else options."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from kvtransfer.adapter import connector

    for effect in (
        "die_with_parent",
        "read_pings",
        "ease_waiting",
        "configure",
        "guard_seeded_chunks",
        "guard_drafts",
        "rank_without_compiler",
        "warm_sampler",
        "install_utilities",
    ):
        monkeypatch.setattr(connector, effect, lambda *args, **kwargs: None)
    degrees = dict.fromkeys(PARALLEL, 1)
    config = {**degrees, "enable_prefix_caching": True, "cache_dtype": "auto", **dict.fromkeys(KINDS, False)}
    config |= {name: changes.pop(name) for name in list(changes) if name in config}
    extra = {"role": "decode", "control": "ipc://none", "name": "d0", "epoch": 1, "transports": ["zmq"]}
    transfer = SimpleNamespace(kv_connector_extra_config={**extra, **changes})
    part = SimpleNamespace(**config, dtype=torch.float32, get_vocab_size=lambda: 8)
    groups = [
        KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate([full()] if specs is None else specs)
    ]
    return connector.BraidConnector(
        SimpleNamespace(
            kv_transfer_config=transfer, parallel_config=part, cache_config=part, model_config=part
        ),
        KVConnectorRole[side],
        KVCacheConfig(8, [], groups),
    )


PARALLEL = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)


KINDS = ("use_mla", "is_hybrid", "has_inner_state", "is_attention_free")
"""What vLLM knows of a model before it is loaded."""


def full(**changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    fields = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return FullAttentionSpec(**{**fields, **changes})


def windowed(window: int, **changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    fields = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return SlidingWindowSpec(**{**fields, **changes}, sliding_window=window)


def state_space() -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=BLOCK, shapes=((8,),), dtypes=(torch.float32,))


def chunked_local() -> Any:
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    return ChunkedLocalAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, attention_chunk_size=8
    )


@pytest.mark.parametrize("side", ["SCHEDULER", "WORKER"])
def test_the_tested_version_is_taken(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    assert make(monkeypatch, side).options.name == "d0"


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0rc1", "1.0"])
def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(RuntimeError, match="not among the tested versions"):
        make(monkeypatch)


def test_the_groups_of_a_model_are_known_by_block_size_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(monkeypatch, specs=[full(), windowed(9)])
    assert made._scheduler.groups == (Blocking(BLOCK), Blocking(BLOCK, 9))
    assert [info.layers for info in made.groups] == [("layer0",), ("layer1",)]


@pytest.mark.parametrize(
    ("specs", "cut"),
    [
        (lambda: [full()], True),
        (lambda: [full(block_size=32)], True),
        (lambda: [full(), windowed(9)], False),
        (lambda: [windowed(9)], False),
        (lambda: [full(head_size_v=16)], False),
    ],
    ids=["full", "blocks of 32", "two groups", "window", "values longer than keys"],
)
def test_blocks_can_be_cut_only_where_tokens_can_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, specs: Any, cut: bool
) -> None:
    from vllm.platforms import current_platform

    expected = cut and current_platform.is_cpu()
    assert make(monkeypatch, specs=[_headed(spec) for spec in specs()]).sliceable == expected


def _headed(spec: Any) -> Any:
    """With a head size that the CPU's kernels have."""
    same = spec.head_size == spec.head_size_v
    return replace(spec, head_size=32, head_size_v=32 if same else 64)


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (list, "no KV cache"),
        (lambda: [full(), state_space()], "one state a sequence"),
        (lambda: [chunked_local()], "ChunkedLocalAttentionSpec"),
    ],
    ids=["attention free", "state space", "chunked"],
)
def test_layers_that_cannot_be_moved_are_refused(
    monkeypatch: pytest.MonkeyPatch, specs: Any, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        make(monkeypatch, specs=specs())


@pytest.mark.parametrize("degree", PARALLEL)
def test_other_than_tensor_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, degree: str) -> None:
    with pytest.raises(RuntimeError, match="parallelism is not supported"):
        make(monkeypatch, "SCHEDULER", None, **{degree: 2})


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("is_hybrid", "has_inner_state"), "one state a sequence"),
        (("is_attention_free", "has_inner_state"), "state-space"),
        (("is_attention_free",), "no KV cache"),
    ],
)
def test_kinds_of_models_are_refused_before_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        make(monkeypatch, "SCHEDULER", None, **dict.fromkeys(kinds, True))


def test_mla_without_prefix_caching_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("prefill", "decode"):
        with pytest.raises(RuntimeError, match="no prefix caching for MLA"):
            make(monkeypatch, use_mla=True, enable_prefix_caching=False, role=role)


def test_only_decode_needs_prefix_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shares prompts by prefix caching"):
        _made(monkeypatch, "decode")
    assert _made(monkeypatch, "prefill").options.role == "prefill"


def _made(monkeypatch: pytest.MonkeyPatch, role: str) -> Any:
    return make(monkeypatch, enable_prefix_caching=False, role=role)


def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        make(monkeypatch, surprise=1)


def _connector(side: Any) -> Any:
    """A connector of the scheduler role around this side."""
    from kvtransfer.adapter.connector import BraidConnector

    connector = BraidConnector.__new__(BraidConnector)
    connector._scheduler, connector._worker, connector._pool = side, None, None
    return connector


def _sample(name: Any, prompt: int) -> Any:
    params = {"braid": name}
    return SimpleNamespace(request_id="s", kv_transfer_params=params, all_token_ids=list(range(prompt)))


def _import(tokens: int, blocks: tuple[list[int], ...]) -> Any:
    from kvtransfer.adapter.imports import Import

    return Import(None, range(tokens), tokens, blocks, committed=True)


class FakeConsumer:
    """Says what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def load(self, spec: Any) -> None:
        self.told.append(spec)

    def unload(self, key: Any, reason: str) -> None:
        self.told.append((key, reason))


def worker(block_size: int) -> tuple[Any, list[Any], list[FakeConsumer]]:
    """A decode rank's side with blocks of 32 tokens, the events it emits and the consumers it makes."""
    from kvtransfer.adapter.worker import WorkerSide
    from kvtransfer.cache import Group

    side, events, made = WorkerSide.__new__(WorkerSide), list[Any](), [FakeConsumer()]

    def new(cache: Any, emit: Any) -> Any:
        made.append(FakeConsumer())
        made[-1].emit = emit  # type: ignore[attr-defined]
        return made[-1]

    side._groups, side._block_size, side._producer = [Group([torch.zeros(9, 1, 32, 8)])], block_size, None
    side._translations, side._consumers = {}, {0: made[0]}  # type: ignore[dict-item]
    side._control = SimpleNamespace(emit=events.append)  # type: ignore[assignment]
    side._new_consumer = new  # type: ignore[method-assign]
    return side, events, made


def load(block_size: int, number: int = 1) -> Any:

    key = wire.Key(bytes([number]) * 16, 1)
    return wire.Load(key, (), "fp", 40, b"", (wire.Span(0, 0, (4, 5)),), 1.0, block_size)


@pytest.mark.parametrize(("ours", "theirs"), [(32, 32), (32, 0), (0, 64), (0, 0)])
def test_blocks_of_our_size_are_loaded_as_they_are(ours: int, theirs: int) -> None:
    side, _, made = worker(ours)
    side._command(load(theirs))
    assert [consumer.told for consumer in made] == [[load(theirs)]]


def test_blocks_of_each_other_size_have_a_consumer_of_their_own() -> None:

    side, events, made = worker(32)
    for number, theirs in enumerate((64, 16, 64)):
        side._command(load(theirs, number))
    assert [[spec.spans for spec in consumer.told] for consumer in made] == [
        [],
        [(wire.Span(0, 0, (1,)),), (wire.Span(0, 0, (2,)),)],
        [(wire.Span(0, 0, (1, 2, 3)),)],
    ]
    failed = wire.Failed(load(64, 0).key, "timeout")
    made[1].emit(failed)  # type: ignore[attr-defined]
    assert events == [failed]
    assert [failed.key in translation for translation in side._translations.values()] == [False, False]


def test_an_unload_finds_the_consumer_that_loads() -> None:

    side, _, made = worker(32)
    command, other = load(64), load(32, 2)
    side._command(command)
    for key in (command.key, other.key):
        side._command(wire.Unload(key, "cancelled"))
    assert made[1].told[1:] == [(command.key, "cancelled")]
    assert made[0].told == [(other.key, "cancelled")]


def test_a_load_that_is_in_flight_already_fails() -> None:

    side, events, _ = worker(32)
    side._command(load(64))
    side._command(load(64))
    assert events == [wire.Failed(load(64).key, "duplicate")]
