"""Messages between the router and its workers.

Every message is a msgspec tagged struct, MessagePack-encoded, one message a ZMQ frame; a multipart
ZMQ message is a batch of them, delivered in order. Unknown tags and unknown fields are refused
(:class:`WireError`), a frame over :data:`MAX_FRAME` bytes is refused before it is decoded. Pickle is
never used.

Direction and life of one dispatch (``ref`` is the router's number for it, unique in a router epoch):

===========================  ===================================================================
worker -> router             router -> worker
===========================  ===================================================================
``Hello`` (first, repeated   ``Welcome``
until welcomed)
``Beat`` every heartbeat     ``Ping`` every heartbeat
..                           ``Prefill`` -> P and ``Decode`` -> each D, sent at the same time
P: ``First`` where it was    ``First`` -> D, passed on
asked to draw, and one
``PrefillDone``              ``Cancel`` at any time, idempotent
..                           ``Forget`` -> D when nothing goes on from kept samples
D: ``Head``, ``Body``... the
last with ``end`` (mode
http), or ``Sample`` a
sample, then ``GroupDone``
(mode samples)
``Bye`` when it drains
===========================  ===================================================================

Exactly one terminal message answers a dispatch: ``PrefillDone``, ``Body(end=True)``, or
``GroupDone``; also after a ``Cancel`` (then it says so). A worker that loses the router
(:mod:`braid.liveness`) stops all work of it and says ``Hello`` again. A message that
names an unknown ``ref`` is dropped.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

_T = TypeVar("_T")

PROTOCOL = 7
MAX_FRAME = 64 * 1024 * 1024
"""Upper bound of one frame in bytes."""

Role = Literal["prefill", "decode"]
Path = Literal["remote", "local", "recomputed"]
"""How a prompt's KV came to the decode worker: ``remote`` moved from a prefill worker (or already in
D's cache where P was asked), ``local`` computed on D by decision, ``recomputed`` computed on D because
a transfer failed or was refused."""


Shape = tuple[float, float, int, float]
"""Temperature, ``top_p``, ``top_k`` and ``min_p`` of a draw."""


class WireError(ValueError):
    """A frame that is not one of our messages."""


class _Msg(msgspec.Struct, tag_field="t", forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Base of all messages."""


class Ticket(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The router's half of a transfer handle, made at dispatch from its own registry.

    ``id`` is 16 random bytes; ``attempt`` counts dispatches of the same request (fences a stopped and
    resumed worker). ``endpoints`` are the producer's KV endpoints, one per tensor-parallel rank.
    ``consumers`` is the number of ranks of each decode worker that will pull; the producer keeps the KV
    until each has. ``block_size`` is the producer's.
    """

    id: bytes
    attempt: int
    producer: str
    epoch: int
    endpoints: tuple[str, ...]
    fingerprint: str
    consumers: tuple[int, ...] = (1,)
    block_size: int = 0


class Watch(msgspec.Struct, tag="watch", forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The confidence of samples as they grow (DeepConf, Fu et al. 2025, arXiv 2508.15260).

    A token's confidence is minus the mean of its ``top`` largest log-probabilities; a group's is the mean
    over the last ``window`` tokens. ``least``: a sample is ended as soon as a whole group's is below it;
    None: none is.
    """

    window: int
    top: int
    least: float | None = None


class Verdict(msgspec.Struct, tag="verdict", forbid_unknown_fields=True, frozen=True):
    """The verdict of samples that verify: the probability of a ``yes`` in its place, where ``top`` candidates
    are looked at (:func:`braid.verdict.p_yes`)."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    top: int


class KvRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """What it took to bring one prompt's KV to one decode worker; summed over a body's prompts.

    ``transfers``: KV transfers made. ``nbytes``: KV bytes that crossed the wire. ``blocks``: blocks
    moved; ``blocks_cached``: full prompt blocks that D's prefix cache already held. ``reason``: why
    ``recomputed`` or ``local`` (a short word, a metric label). Seconds: ``queue_s`` until blocks of D's
    cache were had and asked for, ``wait_s`` from there to the first block, ``wire_s`` from the first to
    the last, ``scatter_s`` of that spent writing D's cache. ``transport``: how the bytes travelled;
    ``retries``: times a broken connection was resumed.
    """

    path: Path
    transfers: int = 0
    nbytes: int = 0
    blocks: int = 0
    blocks_cached: int = 0
    reason: str = ""
    queue_s: float = 0.0
    wait_s: float = 0.0
    wire_s: float = 0.0
    scatter_s: float = 0.0
    transport: str = ""
    retries: int = 0


class Hello(_Msg, frozen=True, tag="hello"):
    """A worker introduces itself. ``epoch`` is a random 63-bit number, new at each engine start.

    ``fingerprint`` is of ``traits``, (name, value) of all that must be equal to exchange KV. ``ranks``: its
    tensor-parallel degree; ``kv_heads``: KV heads over all ranks, 0 if its blocks can't be split by head.
    """

    protocol: int
    role: Role
    worker: str
    epoch: int
    models: tuple[str, ...]
    max_model_len: int
    block_size: int
    slots: int
    fingerprint: str
    vllm_version: str
    kv_endpoints: tuple[str, ...] = ()
    ranks: int = 1
    kv_heads: int = 0
    traits: tuple[tuple[str, str], ...] = ()
    http: str = ""
    """Base URL of the worker's own HTTP endpoint (health, metrics)."""


class Beat(_Msg, frozen=True, tag="beat"):
    """A worker's state. ``running``/``waiting``: requests in its scheduler. ``kv_usage``: share of its
    KV cache in use, 0..1. ``staging_bytes``: bytes held for unfinished transfers (P). Of D, once known:
    ``step_base_s`` + ``step_seq_s`` x batch + ``step_token_s`` x tokens attended to is how long a decode step
    takes, in seconds; ``free_blocks`` of its cache."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    staging_bytes: int = 0
    tickets: int = 0
    engine_ok: bool = True
    step_base_s: float | None = None
    step_seq_s: float | None = None
    step_token_s: float | None = None
    free_blocks: int | None = None


class Bye(_Msg, frozen=True, tag="bye"):
    """The worker drains: it ends what it has and takes nothing new."""


class First(_Msg, frozen=True, tag="first"):
    """The token that P drew behind the prompt of a ``Prefill`` with ``draw``; P sends it as soon as it is
    drawn, the router passes it on to the D whose ``Decode`` is ``drawn``.

    It is the request's first token if it comes soon after the prompt's KV and is drawn as D would draw it;
    else D draws one itself. ``shape`` is what it was drawn with."""

    ref: int
    token: int
    shape: Shape


class PrefillDone(_Msg, frozen=True, tag="prefill_done"):
    """P's terminal answer. ``status`` is an HTTP status (200; 499 cancelled); ``body`` is the
    OpenAI-shaped error body if it is not 200."""

    ref: int
    status: int
    body: bytes = b""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    compute_s: float = 0.0


class Head(_Msg, frozen=True, tag="head"):
    """Start of D's HTTP response: status and headers as vLLM's OpenAI layer made them.

    Sent together with the first body bytes, so ``kv`` is known: the first token exists (or the
    request failed) when it arrives."""

    ref: int
    status: int
    headers: tuple[tuple[str, str], ...]
    kv: KvRecord | None = None


class Body(_Msg, frozen=True, tag="body"):
    """Body bytes in order; for a stream, whole SSE events of one scheduling step.

    ``end`` is set once, on the last message; ``kv`` there is the final record. ``cut`` says that the
    response ended before it was complete (engine failure, deadline): never followed by ``[DONE]``."""

    ref: int
    data: bytes
    end: bool = False
    kv: KvRecord | None = None
    cut: str = ""


class Sample(_Msg, frozen=True, tag="sample"):
    """One finished sample of a group (mode ``samples``).

    ``index`` is the sample's number in the whole group. ``choice`` is the JSON of the OpenAI choice as
    vLLM's OpenAI layer made it. ``logprob`` is the sum of the sampled tokens' log-probabilities
    (natural log) and ``tokens`` their count. ``state``: finished | cancelled | failed. ``confidence``: what
    the dispatch's ``watch`` measures: the lowest of a group of its tokens, or the probability of a yes."""

    ref: int
    index: int
    state: Literal["finished", "cancelled", "failed"]
    choice: bytes = b""
    text: str = ""
    finish_reason: str = ""
    tokens: int = 0
    logprob: float | None = None
    error: str = ""
    confidence: float | None = None


class GroupDone(_Msg, frozen=True, tag="group_done"):
    """All samples of a share have ended. ``status`` other than 200 means that none was produced, with
    the OpenAI-shaped error in ``body``. ``choice_tokens`` counts every generated token, also those of
    cancelled samples."""

    ref: int
    status: int
    body: bytes = b""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    choice_tokens: int = 0
    kv: KvRecord | None = None


class Welcome(_Msg, frozen=True, tag="welcome"):
    """The router has registered the worker. ``router`` is the router's epoch."""

    router: int
    heartbeat_s: float


class Ping(_Msg, frozen=True, tag="ping"):
    """The router is alive."""

    router: int


class Prefill(_Msg, frozen=True, tag="prefill"):
    """Compute the KV of ``body``'s prompt(s), once, and hold it for the ticket's consumers.

    ``target`` and ``body`` are the client's path and JSON body, so that P renders exactly what D does;
    sampling fields in it have no effect here. ``deadline_s`` is relative to receipt.
    ``group``: id of the request's group, for logs."""

    ref: int
    ticket: Ticket
    target: str
    body: bytes
    request_id: str
    deadline_s: float
    group: str = ""
    draw: bool = False
    """Of a request with one sample: tell its first token (``First``)."""


class Decode(_Msg, frozen=True, tag="decode"):
    """Run ``body`` (an OpenAI request whose ``n`` is this worker's share) on D.

    ``ticket`` None means: compute the prompt here (path ``local``). ``first`` is the number of the
    share's first sample in its group: seeds are derived from it. ``mode`` ``http`` answers with
    ``Head``/``Body``; ``samples`` with ``Sample``/``GroupDone`` (``stream`` in the body is ignored).

    ``keep``: the KV of each sample stays, as far as there is room, under the name
    :func:`kept_name` until a ``Forget`` or until it has not been used for a while. ``after`` is such
    a name: the body repeats that sample's prompt and text, and what it kept is used."""

    ref: int
    target: str
    body: bytes
    request_id: str
    deadline_s: float
    mode: Literal["http", "samples"] = "http"
    first: int = 0
    ticket: Ticket | None = None
    headers: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    """Why there is no ticket (metric label), when there is none."""
    keep: bool = False
    after: str = ""
    watch: Watch | Verdict | None = None
    """In mode ``samples``: what is measured of the samples, and which are ended for it."""
    group: str = ""
    """Id of the request's group, for logs."""
    several: bool = False
    """Of a request that runs several samples at a time: they take the seats of groups."""
    priority: int = 0
    """Lower is earlier, in taking seats and where the engine schedules by priority."""
    drawn: bool = False
    """P draws the first token of the one sample: a ``First`` comes."""


class Lost(_Msg, frozen=True, tag="lost"):
    """To D: the producer of this dispatch's ticket failed or refused. Stop waiting for it; pull from
    ``ticket`` (the next attempt, on another producer) if there is one, else compute here."""

    ref: int
    reason: str
    ticket: Ticket | None = None


class Cancel(_Msg, frozen=True, tag="cancel"):
    """Stop a dispatch, or only the samples in ``samples`` (group-wide numbers). Idempotent."""

    ref: int
    samples: tuple[int, ...] | None = None


def kept_name(ref: int, number: int) -> str:
    """What a decode worker knows a kept sample by: two requests may have one id, which clients choose."""
    return f"{ref:x}-{number}"


class Forget(_Msg, frozen=True, tag="forget"):
    """To D: nothing goes on from these kept samples any more. Unknown names are passed over."""

    names: tuple[str, ...]


FromWorker = Hello | Beat | Bye | First | PrefillDone | Head | Body | Sample | GroupDone
ToWorker = Welcome | Ping | Prefill | Decode | First | Lost | Cancel | Forget

_encoder = msgspec.msgpack.Encoder()
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_from_worker(frame: bytes) -> FromWorker:
    """Decode a frame that a worker sent.

    Raises:
        WireError: it is too large, malformed, or not one of a worker's messages.
    """
    return _decode(_from_worker, frame)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Decode a frame that the router sent; raises :class:`WireError` as above."""
    return _decode(_to_worker, frame)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    if len(frame) > MAX_FRAME:
        raise WireError(f"frame of {len(frame)} bytes is over the cap of {MAX_FRAME}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(str(error)) from None
