"""CURVE keys of the cluster, and sockets that use them.

One key pair serves a cluster: every process has both halves, encrypts with them, and a server lets in
only a client that proves the same public key. Whoever holds the folder is a member, so it is kept as
a secret (mode 0600, a Kubernetes Secret).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

PUBLIC = "public.key"
SECRET = "secret.key"
SEALED_BYTES = 64
"""An encrypted frame is at most this much longer; ZMQ bounds frames as they come."""
_DOMAIN = "braid"
_Z85_CHARS = 40

_lock = threading.Lock()
_authenticators: dict[int, ThreadAuthenticator] = {}
"""By their contexts' addresses: one whose context is closed is of an earlier one at that address."""


def make_keys(folder: Path) -> None:
    """Write a new key pair into ``folder`` (made if missing), readable by the owner only.

    Raises:
        FileExistsError: a key is there already; nothing is overwritten.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (PUBLIC, SECRET):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; remove it to make new keys")
    public, secret = zmq.curve_keypair()
    for name, key in ((PUBLIC, public), (SECRET, secret)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key + b"\n")


def load_keys(folder: Path) -> tuple[bytes, bytes]:
    """The public and secret key as z85 text.

    Raises:
        ValueError: a key is missing or is not a CURVE key.
    """
    return _load(folder / PUBLIC), _load(folder / SECRET)


def apply_curve_server(sock: zmq.Socket[Any], folder: Path | None) -> None:
    """Make ``sock`` accept only clients that hold the cluster's keys. Call before ``bind``.

    Without a folder the socket stays plain. The first call on a context starts its authenticator, a
    thread that :func:`stop_authenticator` ends; the context cannot terminate before that, and after it
    nobody gets in any more.
    """
    if folder is None:
        return
    public, secret = load_keys(folder)
    _authenticate(sock.context, public)
    sock.curve_server = True
    sock.curve_publickey = public
    sock.curve_secretkey = secret
    sock.zap_domain = _DOMAIN.encode()
    sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the authenticator nobody gets in


def apply_curve_client(sock: zmq.Socket[Any], folder: Path | None) -> None:
    """Make ``sock`` speak only to a server of the cluster. Call before ``connect``; None: plain."""
    if folder is None:
        return
    public, secret = load_keys(folder)
    sock.curve_serverkey = public
    sock.curve_publickey = public
    sock.curve_secretkey = secret


def stop_authenticator(context: zmq.Context[Any]) -> None:
    """End the context's authenticator, if it has one. Idempotent; call before ``context.term()``."""
    with _lock:
        authenticator = _known(context)
        _authenticators.pop(context.underlying, None)
    if authenticator is not None:
        authenticator.stop()


class _AllowList:
    """Answers the authenticator: only the cluster's own public key is let in."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _known(context: zmq.Context[Any]) -> ThreadAuthenticator | None:
    """The context's authenticator. One of an earlier context at its address is forgotten."""
    authenticator = _authenticators.get(context.underlying)
    if authenticator is not None and authenticator.context.closed:
        authenticator.pipe = None  # type: ignore[assignment]  # closed with its context: nothing can be said
        del _authenticators[context.underlying]
        return None
    return authenticator


def _authenticate(context: zmq.Context[Any], public: bytes) -> None:
    from zmq.auth.thread import ThreadAuthenticator

    with _lock:
        authenticator = _known(context)
        if authenticator is None:
            authenticator = ThreadAuthenticator(context)
            authenticator.start()
            _authenticators[context.underlying] = authenticator
        authenticator.configure_curve_callback(_DOMAIN, _AllowList(public))


def _load(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make keys with `braid keys`") from None
    if len(key) != _Z85_CHARS:
        raise ValueError(f"{path} is not a CURVE key: make keys with `braid keys`")
    return key
