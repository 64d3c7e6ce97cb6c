"""A cache on a device gives what one in host memory gives, in whatever order its streams do their work.

Without a GPU the kernels run in Triton's interpreter on CPU tensors, and streams are queues whose work is
done late and in an order drawn at random, as far as their events allow.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvtransfer.arena import Arena
from kvtransfer.cache import Group, HostCache
from kvtransfer.fence import Fence

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are declared

from kvtransfer.gpu import DeviceCache, Stream, pin, unpin  # noqa: E402
from kvtransfer.kernels import boxes, by_block  # noqa: E402

# Triton warns of a default of a later version when it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no GPU")]


class QueueMark:
    def __init__(self, sim: Sim) -> None:
        self.sim, self.passed = sim, False

    def set(self) -> None:
        self.passed = True

    def wait(self) -> None:
        self.sim.waits += 1
        while not self.passed:
            self.sim.step()


class Queue:
    """A stream: work, marks to set, and marks to wait for, in order."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.todo: deque[tuple[QueueMark | None, Callable[[], None]]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        self.todo.append((None, work))

    def mark(self) -> Fence:
        mark = QueueMark(self.sim)
        self.todo.append((None, mark.set))
        return mark

    def follow(self, mark: Fence) -> None:
        assert isinstance(mark, QueueMark)
        self.todo.append((mark, lambda: None))


class Sim:
    """A device of queues. ``waits``: how often the host has waited for it."""

    place = "cpu"

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.waits = 0
        self.queues: list[Queue] = []
        self.speeds: dict[Queue, int] = {}
        self.model = self.stream()
        self.locked: list[torch.Tensor] = []

    def stream(self) -> Queue:
        self.queues.append(Queue(self))
        self.speeds[self.queues[-1]] = self.random.choice([1, 1, 30])
        return self.queues[-1]

    def current(self) -> Stream:
        return self.model

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.locked.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.locked[-1]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(locked.untyped_storage().data_ptr() == storage for locked in self.locked)

    def step(self) -> None:
        ready = [q for q in self.queues if q.todo and (q.todo[0][0] is None or q.todo[0][0].passed)]
        (queue,) = self.random.choices(ready, [self.speeds[q] for q in ready])
        queue.todo.popleft()[1]()

    def cache(self, groups: list[Group], **options: Any) -> DeviceCache:
        cache = DeviceCache(groups, device=self, **options)
        self.waits = 0
        return cache

    def busy(self) -> None:
        """Have the model's stream be later than the others, or not."""
        for _ in range(self.random.choice([0, 30])):
            self.model.run(lambda: None)

    def finish(self) -> None:
        while any(queue.todo for queue in self.queues):
            self.step()


class Gpu:
    """The first CUDA device."""

    place = "cuda"
    seed = 0

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.waits = 0

    @property
    def model(self) -> Stream:
        from kvtransfer.gpu import CudaStream

        return CudaStream(self._stream)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def cache(self, groups: list[Group], **options: Any) -> DeviceCache:
        return DeviceCache(groups, **options)

    def busy(self) -> None:
        torch.cuda._sleep(20_000_000)

    def finish(self) -> None:
        torch.cuda.synchronize()


Machine = Sim | Gpu
SEEDS = range(4)


@pytest.fixture(
    params=[
        *(pytest.param(s, marks=pytest.mark.skipif(CUDA, reason="GPU")) for s in SEEDS),
        pytest.param("cuda", marks=needs_gpu),
    ]
)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if request.param != "cuda":
        yield Sim(request.param)
        return
    gpu = Gpu()
    with torch.cuda.stream(gpu._stream):
        yield gpu
    torch.cuda.synchronize()


def layer(place: str, axes: str, sizes: dict[str, int], dtype: torch.dtype) -> torch.Tensor:
    """A layer ``[B, H, ...]`` that lies in memory in the order of ``axes``, of random bytes."""
    shape = [sizes[axis] for axis in axes]
    flat = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return by_block(flat.to(place).view(dtype).view(shape), axes)


def host_of(group: Group) -> Group:
    return Group([x.cpu().contiguous() for x in group.layers], group.heads)


def empty(cache: Any, group: int, count: int) -> torch.Tensor:
    shape = cache.shapes[group]
    return torch.zeros(shape.layers, count, shape.heads, shape.row_bytes, dtype=torch.uint8)


LAYOUTS = ["BHNC", "BNHC", "HBNC", "KBHNC", "KBNHC", "BKNHC", "BHC", "BHKNC"]
DTYPES = [torch.bfloat16, torch.float32, torch.uint8]


def random_groups(place: str, draw: random.Random, axes: str) -> list[Group]:
    blocks, dtype = draw.randint(2, 9), draw.choice(DTYPES)
    groups = []
    for _ in range(draw.randint(1, 2)):
        sizes = {
            "B": blocks,
            "H": draw.randint(1, 3),
            "K": 2,
            "N": draw.choice([1, 3, 4]),
            "C": draw.choice([3, 8, 40]),
        }
        layers = [layer(place, axes, sizes, dtype) for _ in range(draw.randint(1, 3))]
        groups.append(Group(layers, sizes["H"]))
    return groups


@pytest.mark.parametrize("axes", LAYOUTS)
def test_it_moves_what_a_cache_in_host_memory_moves(machine: Machine, axes: str) -> None:
    draw = random.Random(f"{axes} {machine.seed}")
    groups = random_groups(machine.place, draw, axes)
    slot_bytes = draw.choice([1, 300, 5000, 1 << 20])
    ours = machine.cache(groups, slots=draw.randint(1, 3), slot_bytes=slot_bytes)
    theirs = HostCache([host_of(group) for group in groups])
    assert ours.shapes == theirs.shapes
    assert ours.blocks == theirs.blocks
    for group, shape in enumerate(ours.shapes):
        ids = [draw.randrange(ours.blocks) for _ in range(draw.randint(1, 12))]
        got, want = empty(ours, group, len(ids)), empty(ours, group, len(ids))
        fence = ours.gather(group, ids, got)
        theirs.gather(group, ids, want)
        assert fence is not None
        fence.wait()
        assert torch.equal(got, want)
        ids = draw.sample(range(ours.blocks), draw.randint(1, ours.blocks))
        put = draw.randrange(shape.heads)
        heads = draw.randint(1, shape.heads - put)
        wide = torch.randint(
            0, 256, (shape.layers, len(ids) + 1, shape.heads, shape.row_bytes), dtype=torch.uint8
        )
        rows = wide[:, 1:, :heads]
        fence = ours.scatter(group, ids, rows, put)
        assert fence is not None
        fence.wait()
        theirs.scatter(group, ids, rows, put)
        source, target = draw.randrange(ours.blocks), draw.randrange(ours.blocks)
        ours.copy(group, source, target)
        theirs.copy(group, source, target)
        machine.finish()
        everything = list(range(ours.blocks))
        want = empty(ours, group, ours.blocks)
        theirs.gather(group, everything, want)
        assert torch.equal(host_rows(groups[group]), want)


def host_rows(group: Group) -> torch.Tensor:
    """All rows of a group, read without the code under test."""
    host = HostCache([host_of(group)])
    rows = empty(host, 0, host.blocks)
    host.gather(0, list(range(host.blocks)), rows)
    return rows


def plain(place: str, blocks: int = 8, layers: int = 3, heads: int = 2) -> Group:
    return Group(
        [torch.zeros(blocks, heads, 4, 16, dtype=torch.int16, device=place) for _ in range(layers)], heads
    )


def fill(group: Group, value: int, block: int | None = None) -> Callable[[], None]:
    """Work that writes all blocks, or one."""

    def work() -> None:
        for tensor in group.layers:
            (tensor if block is None else tensor[block]).fill_(value)

    return work


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("slot_bytes", [1, 1000, 1 << 20])
def test_a_gather_sees_the_step_before_it_and_not_the_one_after(
    machine: Machine, slot_bytes: int, pinned: bool
) -> None:
    group = plain(machine.place)
    cache = machine.cache([group], slots=2, slot_bytes=slot_bytes)
    shape = cache.shapes[0]
    pending = []
    for step in range(1, 7):
        machine.busy()
        machine.model.run(fill(group, step))
        out = (
            machine.pinned(5 * shape.block_bytes)
            if pinned
            else torch.empty(5 * shape.block_bytes, dtype=torch.uint8)
        )
        out = out.view(shape.layers, 5, shape.heads, shape.row_bytes)
        pending.append((step, out, cache.gather(0, [7, 1, 3, 0, 2], out)))
    machine.model.run(fill(group, 99))
    assert machine.waits == 0
    for step, out, fence in pending:
        assert fence is not None
        fence.wait()
        assert (out.view(torch.int16) == step).all()


@pytest.mark.parametrize("slot_bytes", [1, 1000, 1 << 20])
def test_more_scatters_than_bounce_buffers_are_all_written(machine: Machine, slot_bytes: int) -> None:
    group = plain(machine.place, blocks=12)
    cache = machine.cache([group], slots=2, slot_bytes=slot_bytes)
    shape = cache.shapes[0]
    fences = []
    for block in range(12):
        rows = torch.full((shape.layers, 1, shape.heads, shape.row_bytes), block + 1, dtype=torch.uint8)
        fences.append(cache.scatter(0, [block], rows))
        rows.zero_()  # rows that are not pinned are not read any more
    for fence in fences:
        assert fence is not None
        fence.wait()
    for tensor in group.layers:
        for block in range(12):
            assert (tensor[block].cpu().view(torch.uint8) == block + 1).all()


def test_pinned_rows_are_scattered_from_where_they_are(machine: Machine) -> None:
    group = plain(machine.place)
    cache = machine.cache([group])
    shape = cache.shapes[0]
    rows = machine.pinned(2 * shape.block_bytes).view(shape.layers, 2, shape.heads, shape.row_bytes)
    rows.random_(generator=torch.Generator().manual_seed(3))
    fence = cache.scatter(0, [6, 2], rows)
    assert fence is not None
    fence.wait()
    assert torch.equal(host_rows(group)[:, [6, 2]], rows)


def test_scattered_rows_come_after_the_work_they_are_ordered_behind(machine: Machine) -> None:
    group = plain(machine.place)
    cache = machine.cache([group], after=machine.model)
    machine.busy()
    machine.model.run(fill(group, 7))  # a step under way, into blocks that were given away
    fence = cache.scatter(0, [1], empty(cache, 0, 1) + 1)
    assert fence is not None
    fence.wait()
    machine.finish()
    rows = host_rows(group)
    assert (rows[:, 1] == 1).all()
    assert (rows[:, 2].reshape(-1).view(torch.int16) == 7).all()


def test_a_copy_is_a_step_of_the_models_own_stream(machine: Machine) -> None:
    group = plain(machine.place)
    cache = machine.cache([group])
    for value in range(1, 5):
        machine.busy()
        machine.model.run(fill(group, value, 2))
        cache.copy(0, 2, value + 2)
    assert machine.waits == 0
    machine.finish()
    for tensor in group.layers:
        assert tensor[:, 0, 0, 0].tolist() == [0, 0, 4, 1, 2, 3, 4, 0]


def test_nothing_to_move_is_complete_at_once(machine: Machine) -> None:
    cache = machine.cache([plain(machine.place)])
    assert cache.gather(0, [], empty(cache, 0, 0)) is None
    assert cache.scatter(0, [], empty(cache, 0, 0)) is None


def test_what_does_not_fit_is_refused_and_writes_nothing(machine: Machine) -> None:
    group = plain(machine.place)
    cache = machine.cache([group])
    with pytest.raises(IndexError, match="blocks 1 to 8"):
        cache.gather(0, [1, 8], empty(cache, 0, 2))
    with pytest.raises(IndexError, match="blocks -1 to"):
        cache.scatter(0, [-1], empty(cache, 0, 1) + 1)
    with pytest.raises(IndexError, match="of a cache of"):
        cache.copy(0, 0, 8)
    with pytest.raises(ValueError, match="rows of shape"):
        cache.scatter(0, [1], empty(cache, 0, 2) + 1)
    with pytest.raises(ValueError, match="rows of shape"):
        cache.scatter(0, [1], empty(cache, 0, 1) + 1, put=1)
    with pytest.raises(ValueError, match="contiguous"):
        cache.gather(0, [1], empty(cache, 0, 2)[:, 1:])
    with pytest.raises(ValueError, match="all heads"):
        cache.gather(0, [1], empty(cache, 0, 1)[:, :, :1].contiguous())
    machine.finish()
    assert not host_rows(group).any()


@pytest.mark.parametrize(
    ("tensors", "heads", "reason"),
    [
        ([torch.zeros(4, 2, 3, 5, 4)[..., ::2, ::2]], 2, "not supported"),
        ([torch.zeros(2, 4, 3, 2, 6).permute(1, 3, 4, 2, 0)], 2, "not supported"),
        ([torch.zeros(4, 3, 8)], 2, "heads"),
        ([torch.zeros(4)], 1, "heads"),
        ([torch.zeros(4, 2, 8), torch.zeros(4, 2, 16)], 2, "different ways"),
        ([torch.zeros(4, 2, 8), torch.zeros(4, 4, 8)[:, ::2]], 2, "different ways"),
    ],
    ids=["three deep", "inside out", "odd heads", "no heads", "two shapes", "two strides"],
)
@pytest.mark.skipif(CUDA, reason="GPU")
def test_a_layout_it_does_not_know_is_refused(tensors: list[torch.Tensor], heads: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Sim(0).cache([Group(tensors, heads)])


@pytest.mark.parametrize("axes", ["BHN", "BHNCX", "BHNN", "KBNC", "BNC", ""])
def test_names_that_do_not_fit_the_axes_are_refused(axes: str) -> None:
    with pytest.raises(ValueError, match="does not name"):
        by_block(torch.zeros(2, 2, 2, 2), axes)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 12, 13, 1000])
@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 1, 1), (2, 5, 1), (4, 1, 6)], ids=str)
def test_boxes_cover_the_rows_once_and_in_order(shape: tuple[int, int, int], most: int) -> None:
    rows = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = boxes(*shape, most)
    assert all(box.rows <= most for box in cut)
    assert torch.cat([rows[box.index].flatten() for box in cut]).tolist() == rows.flatten().tolist()


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kvtransfer.kernels import _copy, _move

layout = dict(BLOCK=1 << 17, HEAD=8192, ROW=1024, TOKENS=16, RUN=32, PART=1 << 34, TOKEN=512)
layout |= dict(ALIGN=16, TILE=1024)
for kernel, options in ((_move, {"GATHER": True}), (_move, {"GATHER": False}), (_copy, {})):
    constants = {**layout, **options}
    pointers = {"table", "ids", "flat", "kind"}
    kinds = {n: "*i64" if n in pointers else "i32" for n in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    print(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_the_kernels_compile_for_hopper_and_move_16_bytes_at_a_time() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".entry") == 3
    for wide, narrow in (("ld.global.v2.b64", "ld.global.b64"), ("st.global.v2.b64", "st.global.b64")):
        assert wide in done.stdout
        assert done.stdout.count(narrow) <= 5, "only addresses and ids are read one by one"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_an_arena_is_pinned_and_gathered_into_without_a_wait() -> None:
    arena = Arena(1 << 20)
    pin(arena.memory)
    try:
        group = plain("cuda")
        cache = DeviceCache([group])
        shape = cache.shapes[0]
        out = torch.frombuffer(arena.memory, dtype=torch.uint8)[4096 : 4096 + 2 * shape.block_bytes]
        assert out.is_pinned()
        out = out.view(shape.layers, 2, shape.heads, shape.row_bytes)
        torch.cuda._sleep(400_000_000)
        fill(group, 5)()
        late = torch.cuda.Event()
        late.record()
        fence = cache.gather(0, [3, 1], out)
        cache.copy(0, 3, 1)
        assert not late.query(), "the host waited for the model"
        assert fence is not None
        fence.wait()
        assert (out.view(torch.int16) == 5).all()
        fence = cache.scatter(0, [0, 2], out.fill_(9))
        assert fence is not None
        fence.wait()
        assert (host_rows(group)[:, [0, 2]] == 9).all()
    finally:
        torch.cuda.synchronize()
        unpin(arena.memory)
    assert not torch.frombuffer(arena.memory, dtype=torch.uint8).is_pinned()
