"""CURVE keys: made once, kept secret, and only their holders get through."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from braid.keys import (
    SEALED_BYTES,
    SECRET,
    apply_curve_client,
    apply_curve_server,
    load_keys,
    make_keys,
    stop_authenticator,
)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    stop_authenticator(context)
    stop_authenticator(context)
    context.destroy(linger=0)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_keys_are_readable_by_their_owner_only(keys: Path) -> None:
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}
    assert [len(key) for key in load_keys(keys)] == [40, 40]


def test_keys_are_never_overwritten(keys: Path) -> None:
    before = load_keys(keys)
    with pytest.raises(FileExistsError):
        make_keys(keys)
    assert load_keys(keys) == before


def test_missing_or_malformed_keys_say_what_to_do(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="braid keys"):
        load_keys(tmp_path / "none")
    (keys / SECRET).write_text("short")
    with pytest.raises(ValueError, match="braid keys"):
        load_keys(keys)


def received(context: zmq.Context[Any], server_keys: Path | None, client: zmq.Socket[Any]) -> bool:
    """Whether a message of the client, set up by the caller, reaches a server with these keys."""
    # A message that is refused must not keep the context from ending.
    client.linger = 0
    client.linger = 0
    with context.socket(zmq.ROUTER) as server, client:
        apply_curve_server(server, server_keys)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"hello")
        return bool(server.poll(500))


def test_a_holder_gets_through(context: zmq.Context[Any], keys: Path) -> None:
    client = context.socket(zmq.DEALER)
    apply_curve_client(client, keys)
    assert received(context, keys, client)


def test_a_stranger_that_knows_the_public_key_does_not(context: zmq.Context[Any], keys: Path) -> None:
    client = context.socket(zmq.DEALER)
    client.curve_serverkey = load_keys(keys)[0]
    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    assert not received(context, keys, client)


def test_a_plain_client_does_not(context: zmq.Context[Any], keys: Path) -> None:
    assert not received(context, keys, context.socket(zmq.DEALER))


def test_without_keys_sockets_are_plain(context: zmq.Context[Any]) -> None:
    client = context.socket(zmq.DEALER)
    apply_curve_client(client, None)
    assert received(context, None, client)


def test_without_its_authenticator_a_server_lets_nobody_in(context: zmq.Context[Any], keys: Path) -> None:
    """ZMQ lets everybody in who knows the public key where nobody answers whether it may."""
    client = context.socket(zmq.DEALER)
    client.curve_serverkey = load_keys(keys)[0]
    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    client.linger = 0
    with context.socket(zmq.ROUTER) as server, client:
        apply_curve_server(server, keys)
        stop_authenticator(context)
        client.connect(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
        client.send(b"hello")
        assert not server.poll(500)


ANEW = """
import sys
from pathlib import Path
import zmq
from braid.keys import apply_curve_client, load_keys
from tests.braid.test_keys import received
keys = Path(sys.argv[1])
for _ in range(5):
    context = zmq.Context()
    stranger, holder = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    stranger.curve_serverkey = load_keys(keys)[0]
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    apply_curve_client(holder, keys)
    print(received(context, keys, stranger), received(context, keys, holder))
    context.destroy(linger=0)
"""


def test_a_context_at_the_place_of_one_that_has_ended_is_guarded_anew(keys: Path) -> None:
    """Authenticators were known by their context's address, which is soon another's. In a process of its own,
    as the threads of those left behind complain."""
    told = subprocess.run([sys.executable, "-c", ANEW, keys], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["False", "True"] * 5


@pytest.mark.parametrize("sealed", [False, True])
def test_the_largest_frame_arrives_with_keys_as_without(
    context: zmq.Context[Any], keys: Path, sealed: bool
) -> None:
    """An encrypted one is longer, and its connection was closed."""
    most, folder = 1 << 20, keys if sealed else None
    with context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        server.maxmsgsize = most + SEALED_BYTES
        client.linger = 0
        apply_curve_server(server, folder)
        apply_curve_client(client, folder)
        client.connect(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
        client.send(bytes(most))
        assert server.poll(10_000)
        assert len(server.recv_multipart()[1]) == most
