"""KV moved between two processes without the rest of Braid: a cache each, no engine.

    python -m kvtransfer.example [shm | zmq | collective | nixl]

This process has computed a prompt's KV, block by block; another one, which it starts, wants it. Exit status 1
if what came is not what was sent.
"""

from __future__ import annotations

import hashlib
import queue
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
import zmq

from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.cache import Group, HostCache
from kvtransfer.consumer import Consumer
from kvtransfer.digest import Digests
from kvtransfer.loop import Loop
from kvtransfer.plan import CHAIN_TOKENS, chain, num_blocks
from kvtransfer.producer import Producer
from kvtransfer.transport.select import NAMES, consumer_transports, producer_transports

LAYERS, POOL, HEADS, BLOCK_SIZE, HEAD_DIM = 4, 64, 8, 16, 64
PROMPT = list(range(1000, 1200))
BLOCKS = num_blocks(len(PROMPT), BLOCK_SIZE)
EPOCH = 1
"""Of the producer; a new one each time it starts, so that nobody asks for what an earlier one had."""
FINGERPRINT = "this model, this dtype, these kernels"
LIMIT_S = 30.0


class End:
    """A cache, the thread that will own an end's sockets, and what the end says."""

    def __init__(self, fill: bool) -> None:
        shape = (LAYERS, POOL, HEADS, 2 * BLOCK_SIZE, HEAD_DIM)  # an engine's tensors, keys beside values
        self.tensors = list(torch.rand(shape) if fill else torch.zeros(shape))
        self.cache = HostCache([Group(self.tensors, HEADS)])
        self.loop, self.context = Loop("kv"), zmq.Context()
        self.events: queue.Queue[wire.Event] = queue.Queue()

    def fill(self, block_ids: Sequence[int]) -> Callable[[range, torch.Tensor], None]:
        """What gathers some of these blocks into staging memory."""
        return lambda run, out: self.cache.gather(0, block_ids[run.start : run.stop], out)

    def digest(self, block_ids: Sequence[int]) -> str:
        """A hash of these blocks over all layers."""
        blocks = torch.stack([layer[list(block_ids)] for layer in self.tensors])
        return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()

    def stop(self, end: Producer | Consumer) -> None:
        self.loop.stop()
        end.close()
        self.context.destroy(linger=0)


def produce(transport: str) -> int:
    """Serve the prompt's KV to one consumer."""
    here, key = End(fill=True), wire.Key(secrets.token_bytes(16), attempt=0)
    producer = Producer(
        here.loop,
        here.context,
        bind="tcp://127.0.0.1:*",
        epoch=EPOCH,
        shapes=here.cache.shapes,
        arena=Arena(64 << 20),  # staging: bounds what all prompts together may hold
        lease_s=LIMIT_S,
        emit=here.events.put,
        transports=producer_transports([transport]),
        piece_bytes=1 << 20,
        digests=Digests("full"),
    )
    here.loop.start()
    consumer = [sys.executable, "-m", "kvtransfer.example", transport, producer.endpoint, key.id.hex()]
    with subprocess.Popen(consumer, stdout=subprocess.PIPE, text=True) as there:
        links = chain(PROMPT, CHAIN_TOKENS)
        lease = wire.Open(key, len(PROMPT), links, FINGERPRINT, (wire.Want(0, 0, BLOCKS),), subscribers=1)
        here.loop.call_soon(lambda: producer.open(lease))
        print(here.events.get(timeout=LIMIT_S))
        mine = list(range(7, 7 + BLOCKS))  # where this engine keeps the prompt
        for first in range(0, BLOCKS, 4):  # as the engine finishes them, from its own thread
            some = mine[first : first + 4]
            producer.stage(key, 0, first, len(some), here.fill(some))
        said = there.communicate(timeout=LIMIT_S)[0]
        print(said, end="")
    if moved := here.digest(mine) in said:
        print(here.events.get(timeout=LIMIT_S))
    here.stop(producer)
    return 0 if moved else 1


def consume(transport: str, endpoint: str, key_id: str) -> int:
    """Pull the prompt's KV into blocks of this process's cache."""
    here, mine = End(fill=False), tuple(range(60, 60 - BLOCKS, -1))  # any free blocks but block 0
    consumer = Consumer(
        here.loop,
        here.context,
        here.cache,
        name="example",
        emit=here.events.put,
        transports=consumer_transports([transport]),
    )
    here.loop.start()
    load = wire.Load(
        key=wire.Key(bytes.fromhex(key_id), attempt=0),
        sources=(wire.Source(endpoint, EPOCH, first=0, last=HEADS, put=0),),
        fingerprint=FINGERPRINT,
        tokens=len(PROMPT),
        chain=chain(PROMPT, CHAIN_TOKENS),  # from its own tokens: another prompt's KV is refused
        spans=(wire.Span(0, 0, mine),),
        deadline_s=LIMIT_S,
    )
    here.loop.call_soon(lambda: consumer.load(load))
    event = here.events.get(timeout=LIMIT_S)
    here.stop(consumer)
    print(event)
    print(f"sha256 of the blocks: {here.digest(mine)}")
    return 0 if isinstance(event, wire.Loaded) else 1


def main(argv: Sequence[str]) -> int:
    match list(argv):
        case []:
            return produce("shm")
        case [transport] if transport in NAMES:
            return produce(transport)
        case [transport, endpoint, key_id]:
            return consume(transport, endpoint, key_id)
        case _:
            print(f"usage: python -m kvtransfer.example [{' | '.join(NAMES)}]", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
