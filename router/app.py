"""The router as an ASGI application: routes, keys, admission, and the end of every request."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from braid.errors import (
    BadRequest,
    BraidError,
    ClientGone,
    MethodNotAllowed,
    NotFound,
    Unavailable,
)
from braid.settings import RouterSettings
from router import efforts, models, plain, reasoning, responses, strategies
from router.admission import Admission
from router.auth import Keys
from router.cluster import RETRY_AFTER_S, Cluster
from router.direct import streamed
from router.dispatch import Job
from router.estimates import Estimates
from router.history import Entry, History
from router.http import Call, Receive, Scope, Send
from router.link import Link
from router.metrics import CONTENT_TYPE, Metrics
from router.pairs import Pairs
from router.registry import Registry
from router.retrievers import Retrievers
from router.strategies import auto
from router.tracing import make_tracer
from router.validate import Endpoint, Request, parse_body, validate
from router.verifiers import Verifiers

log = logging.getLogger("braid.router")

Handler = Callable[[Call, str], Awaitable[None]]
"""Answers a call of a tenant."""

RESPONSES, GROUPS = "/v1/responses", "/v1/groups/"
_OPEN = ("/health", "/ready")
_TARGETS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a request asks of admission; as :meth:`router.admission.Admission.slots` takes it."""

    slots: int
    tenant: str
    priority: int = 0
    until: float | None = None


class App:
    """Owns the parts of a router. :meth:`start` before the first request, :meth:`stop` after the last."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.registry = Registry()
        self.link = Link(settings, self.registry, self.metrics)
        self.pairs = Pairs(settings, self.registry, self.link, self.metrics)
        self.verifiers = Verifiers(settings.verifiers, self.metrics)
        self.retrievers = Retrievers(settings.retrievers, self.metrics)
        self.cluster = Cluster(
            settings,
            self.metrics,
            self.registry,
            self.link,
            self.pairs,
            self.verifiers,
            self.retrievers,
            Estimates(settings.kv_bandwidth),
        )
        self.admission = Admission(
            settings.max_inflight,
            settings.queue_limit,
            settings.queue_timeout_s,
            self.metrics,
            settings.group_share,
        )
        self.efforts = efforts.load(settings.effort_table)
        auto.check(self.efforts)
        self.history = History(settings.group_history)
        self._keys = Keys(settings.api_keys_file)
        self.tracer = make_tracer(settings)
        self._started = int(time.time())
        self._running: set[asyncio.Task[None]] = set()
        self._aborting = False
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
            "/cluster": ("GET", self._cluster),
            "/v1/models": ("GET", self._models),
            "/v1/strategies": ("GET", self._strategies),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._completions),
            RESPONSES: ("POST", self._responses),
            GROUPS: ("GET", self._group),
            "/tokenize": ("POST", self._passthrough),
            "/detokenize": ("POST", self._passthrough),
        }

    async def start(self) -> None:
        await self.link.start()

    async def stop(self) -> None:
        """Close the link; workers are told to stop what they still run. Idempotent."""
        await self.pairs.stop()
        await self.link.stop()
        await self.tracer.stop()
        await self.verifiers.aclose()
        await self.retrievers.aclose()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones end, and end the rest with an error at the timeout."""
        self.admission.close()
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        self._aborting = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def check_integrity(self, idle: bool = False) -> None:
        """Assert what must hold of all stores; when ``idle``, that nothing is left of any request."""
        self.cluster.check_integrity(idle)
        self.admission.check_integrity(idle)
        self.history.check_integrity(idle)
        assert not idle or not self._running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        kind = responses.ResponsesCall if scope["path"] == RESPONSES else Call
        call = kind(scope, receive, send, self.settings)
        if call.method == "POST" and call.path in self._routes:
            call.trace = self.tracer.request(f"POST {call.path}", call.headers)
        try:
            call.check_headers()
            tenant = "" if call.path in _OPEN else self._keys.check(call.header("authorization"))
            await self._route(call)(call, tenant)
        except BraidError as error:
            await self._answer_error(call, error)
        except Exception:
            log.exception("request failed", extra={**_named(call), "path": call.path})
            await self._answer_error(call, BraidError("The router failed to serve this request."))
        finally:
            call.end_trace()

    def _route(self, call: Call) -> Handler:
        route = self._routes.get(GROUPS if call.path.startswith(GROUPS) else call.path)
        if route is None:
            raise NotFound("No such path.", code="unknown_path")
        method, handler = route
        if call.method != method and not (method == "GET" and call.method == "HEAD"):
            raise MethodNotAllowed(f"This path takes {method} only.", code="method_not_allowed")
        return handler

    async def _answer_error(self, call: Call, error: BraidError) -> None:
        self.metrics.errors.labels(error.label).inc()
        try:
            await call.fail(error)
        except ClientGone:
            log.info("client gone", extra=_named(call))

    # Requests that run on workers

    async def _chat(self, call: Call, tenant: str) -> None:
        await self._generate(call, tenant, "chat", await self._body(call))

    async def _completions(self, call: Call, tenant: str) -> None:
        await self._generate(call, tenant, "completions", await self._body(call))

    async def _responses(self, call: Call, tenant: str) -> None:
        body, asked = responses.translate(await self._body(call))
        assert isinstance(call, responses.ResponsesCall)
        call.word_as(asked)
        await self._generate(call, tenant, "chat", body)

    async def _generate(self, call: Call, tenant: str, endpoint: Endpoint, body: dict[str, Any]) -> None:
        plan = reasoning.split(body, self.registry.models(), self.settings.effort)
        request = validate(endpoint, body, self.settings.max_n)
        model = self.cluster.served_model(request.model)
        priority = body.pop("priority", None) or 0  # vLLM refuses one unless it schedules by it
        if tenant:
            body["cache_salt"] = _salt(tenant, body.get("cache_salt"))
        strategy = None
        if plan is not None:
            plan = models.resolved(plan, self.cluster)
            strategy = reasoning.prepare(plan, request, self.settings, self.efforts)
        if strategy is None and call.path == RESPONSES and (request.n or 1) > 1:
            raise BadRequest("A response has one answer: choose among samples.", param="reasoning.n")
        job = Job(
            target=_TARGETS[endpoint],
            body={**body, "model": model} if request.model is not None else body,
            model=model,
            request_id=call.request_id,
            deadline=call.received + self.settings.request_timeout_s,
            n=request.n or 1,
            prompts=request.prompts,
            headers=call.headers_for_workers(),
            local=self._local(request),
            several=(request.n or 1) * request.prompts > 1,
            priority=priority,
            trace=call.trace,
            group=call.begin_group(),
        )
        call.trace.note(model=model, operation="chat" if endpoint == "chat" else "text_completion")
        label = "responses" if call.path == RESPONSES else endpoint
        n = job.n if strategy is None else strategy.options.n
        call.entry = entry = Entry(job.group, job.request_id, label, model, n)
        self.history.begin(tenant, job.group, entry)
        if strategy is None:
            call.trace.note(n=n)
            work = plain.run(self.cluster, call, job, request.stream, entry)
            await self._serve(call, label, _Claim(n * job.prompts, tenant, priority), work)
            return
        call.trace.note(strategy=strategy.spec.name, n=n)
        until = call.due(strategy.options.deadline_s)
        claim = _Claim(strategy.slots, tenant, priority, until)
        if request.stream and (found := streamed(strategy.spec, strategy.options, job, until)):
            self.metrics.strategies.labels(strategy.spec.name).inc()
            work = plain.run(self.cluster, call, found[0], True, entry, found[1])
        else:
            work = reasoning.run(self.cluster, call, job, strategy, request.stream, entry)
        await self._serve(call, label, claim, work)

    async def _passthrough(self, call: Call, tenant: str) -> None:
        body = await self._body(call)
        model = body.get("model")
        if not isinstance(model, str | None):
            raise BadRequest("model must be a model's name.", param="model")
        job = Job(
            target=call.path,
            body=body,
            model=self.cluster.served_model(model),
            request_id=call.request_id,
            deadline=call.received + self.settings.request_timeout_s,
            headers=call.headers_for_workers(),
            local="no_prompt",
            trace=call.trace,
        )
        work = plain.passthrough(self.cluster, call, job)
        await self._serve(call, call.path.strip("/"), _Claim(1, tenant), work)

    async def _body(self, call: Call) -> dict[str, Any]:
        return parse_body(await call.read_body())

    def _local(self, request: Request) -> str:
        if request.unshareable:
            return "unshareable"
        return "short" if request.chars < self.settings.remote_min_chars else ""

    async def _serve(self, call: Call, endpoint: str, claim: _Claim, work: Coroutine[Any, Any, None]) -> None:
        """Admit, run and count a request; it ends exactly once, whatever happens."""
        task = asyncio.create_task(call.while_connected(self._admitted(call, endpoint, claim, work)))
        self._running.add(task)
        outcome = "failed"
        try:
            await task
            outcome = call.outcome
        except ClientGone:
            outcome = "cancelled"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            if not self._aborting:
                raise
            raise Unavailable("This router is shutting down.", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._running.discard(task)
            work.close()
            if call.entry is not None:
                call.entry.end(outcome)

    async def _admitted(
        self, call: Call, endpoint: str, claim: _Claim, work: Coroutine[Any, Any, None]
    ) -> None:
        turn = self.admission.slots(
            claim.slots, tenant=claim.tenant, priority=claim.priority, until=claim.until
        )
        async with turn:
            self.metrics.accepted.labels(endpoint).inc()
            outcome = "failed"
            why: dict[str, Any] = {}
            try:
                await work
                outcome = call.outcome
                if outcome == "failed":
                    why = {"status": call.status}
            except (ClientGone, asyncio.CancelledError):
                outcome = "cancelled"
                raise
            except BraidError as error:
                why = {"status": error.status, "error": error.label, "detail": error.message}
                raise
            finally:
                self._ended(call, endpoint, outcome, why)

    def _ended(self, call: Call, endpoint: str, outcome: str, why: dict[str, Any]) -> None:
        seconds = asyncio.get_running_loop().time() - call.received
        self.metrics.requests.labels(endpoint, outcome).inc()
        self.metrics.duration.labels(endpoint).observe(seconds)
        fields = {"endpoint": endpoint, "outcome": outcome, "seconds": round(seconds, 4), **why}
        log.info("request", extra={**_named(call), **fields})

    # The state of the router

    async def _health(self, call: Call, tenant: str) -> None:
        await call.respond_json({"status": "ok"})

    async def _ready(self, call: Call, tenant: str) -> None:
        if self.pairs.ready():
            await call.respond_json({"status": "ready"})
            return
        raise Unavailable("No verified prefill/decode pair for each model yet.", retry_after_s=RETRY_AFTER_S)

    async def _metrics(self, call: Call, tenant: str) -> None:
        self._gauge()
        await call.respond(200, [("content-type", CONTENT_TYPE)], self.metrics.render())

    async def _cluster(self, call: Call, tenant: str) -> None:
        await call.respond_json(
            {
                "ready": self.pairs.ready(),
                "epoch": self.link.epoch,
                "models": self.registry.models(),
                "models_ready": self.pairs.ready_models(),
                "workers": self.registry.state(),
                "pairs": self.pairs.state(),
                "inflight": len(self.link.open_refs()),
            }
        )

    async def _models(self, call: Call, tenant: str) -> None:
        lengths = {
            model: min(w.hello.max_model_len for w in self.registry.all() if model in w.hello.models)
            for model in self.registry.models()
        }
        data = [
            {
                "id": model,
                "object": "model",
                "created": self._started,
                "owned_by": "braid",
                "max_model_len": length,
            }
            for model, length in lengths.items()
        ]
        await call.respond_json({"object": "list", "data": data})

    async def _group(self, call: Call, tenant: str) -> None:
        entry = self.history.find(tenant, call.path.removeprefix(GROUPS))
        if entry is None:
            raise NotFound("No group of this id is known, or it is too long ago.", code="unknown_group")
        await call.respond_json(entry.view())

    async def _strategies(self, call: Call, tenant: str) -> None:
        data = strategies.describe(trigger=self.settings.trigger, models=list(self.settings.model_order))
        services = {"verifiers": self.verifiers.describe(), "retrievers": self.retrievers.describe()}
        await call.respond_json({"object": "list", "data": data, **services})

    def _gauge(self) -> None:
        self.metrics.workers.clear()
        for worker in self.registry.all():
            self.metrics.workers.labels(worker.hello.role, worker.state).inc()
        self.metrics.pairs.clear()
        for pair in self.pairs.state():
            self.metrics.pairs.labels("verified" if pair["verified"] else "unverified").inc()


def _named(call: Call) -> dict[str, str]:
    """Fields of a log line that say which request it is about."""
    named = {"request_id": call.request_id}
    return {**named, "trace_id": call.trace.id} if call.trace.id else named


def _salt(tenant: str, given: object) -> str:
    """The cache salt of a tenant: prefix caches are shared within a tenant only, since a shared prefix
    shows in its timing. A client's own salt divides its tenant further."""
    return hashlib.sha256(f"{tenant}:{given or ''}".encode()).hexdigest()[:32]
