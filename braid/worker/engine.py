"""Starts the vLLM engine of a worker, with Braid's KV connector and vLLM's own OpenAI layer over it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from braid import wire
from braid.ranks import heads_of
from braid.settings import DecodeSettings, PrefillSettings, WorkerSettings, is_loopback
from braid.worker.fingerprint import Traits, config_digest, fingerprint, group_trait, model_digest
from kvtransfer.control import ControlServer
from kvtransfer.plan import Blocking, hit_unit
from kvtransfer.wire import Ready

if TYPE_CHECKING:
    from kvtransfer.adapter.layout import GroupInfo

_SOCKET_PATH_MAX = 100
"""Unix socket paths are limited to 107 bytes."""


@dataclass(slots=True)
class Engine:
    """A started engine.

    Attributes:
        llm: an ``AsyncLLM`` (or subclass).
        app: vLLM's FastAPI application over it, state initialised.
        control: link to the transfer ends in the engine's workers.
        args: the parsed vLLM arguments.
        groups: of the KV cache.
        kv_heads: KV heads over all ranks, 0 if blocks can't be split by head.
    """

    llm: Any
    app: Any
    control: ControlServer
    args: Any
    epoch: int
    endpoints: tuple[str, ...]
    groups: tuple[Blocking, ...]
    kv_heads: int
    traits: Traits

    @property
    def fingerprint(self) -> str:
        """Equal on two workers only if one may read the other's KV."""
        return fingerprint(self.traits)

    @property
    def ranks(self) -> int:
        """Tensor-parallel degree."""
        return len(self.control.ranks)

    @property
    def block_size(self) -> int:
        """Tokens that are shared or not as a whole: a block, of the largest group if they differ."""
        return hit_unit(self.groups)

    @property
    def blocks(self) -> int:
        return int(self.llm.vllm_config.cache_config.num_gpu_blocks or 0)

    @property
    def slots(self) -> int:
        return int(self.llm.vllm_config.scheduler_config.max_num_seqs)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.llm.model_config.max_model_len)

    @property
    def chunk(self) -> int:
        """Most tokens of a scheduling step."""
        return int(self.llm.vllm_config.scheduler_config.max_num_batched_tokens)

    @property
    def by_priority(self) -> bool:
        """Whether its scheduler orders requests by priority; else it refuses one other than 0."""
        return str(self.llm.vllm_config.scheduler_config.policy) == "priority"

    async def call(self, method: str, *args: Any) -> Any:
        """A utility call on the EngineCore's thread."""
        return await self.llm.engine_core.call_utility_async(method, *args)


KERNELS = 16
"""Kernels that oneDNN keeps in a process, one for each number of tokens in a step and each shape of a layer's
weights, besides those that vLLM keeps: for each shape the 32 sizes used last. oneDNN is only asked for those
that vLLM has not, so what it keeps are sizes that came once and rarely come again, and they gather for hours.
With 1,024, its own bound, the matrix products of the demo model grow by 0.7 GiB over steps of 500 sizes. With
none the products of layers that vLLM leaves to torch would make their kernels anew each time."""


def engine_environment(model: str) -> None:
    """Settings of vLLM and what it stands on that only the environment carries; what is set already stays."""
    defaults = {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS),
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def private_dir(run_dir: Path | None) -> Path:
    """A folder for this worker's sockets, mode 0700, short enough for a socket path."""
    if run_dir is not None:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(str(run_dir)) < _SOCKET_PATH_MAX - 20:
            return Path(tempfile.mkdtemp(prefix="w", dir=run_dir))
    return Path(tempfile.mkdtemp(prefix="braid-"))


async def start_engine(
    settings: PrefillSettings | DecodeSettings,
    engine_args: list[str],
    name: str,
    llm_class: Any,
    sockets: Path,
) -> Engine:
    """Start an engine and wait until it is up.

    Args:
        engine_args: vLLM's own flags, passed through.
        name: the worker's name.
        llm_class: ``AsyncLLM`` or a subclass of it.
        sockets: private folder for ipc sockets.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.usage.usage_lib import UsageContext

    from kvtransfer.adapter.layout import GroupInfo, check_config

    epoch = secrets.randbits(63)
    endpoint = f"ipc://{sockets}/kv"
    control = ControlServer(endpoint)
    args = _parse(settings, engine_args, _transfer_config(settings, name, epoch, endpoint))
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    check_config(config, _role(settings))
    llm = llm_class.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        disable_log_stats=args.disable_log_stats,
    )
    ready = await control.wait_ready(config.parallel_config.world_size)
    layout = await llm.engine_core.call_utility_async("braid_layout")
    infos = msgspec.convert(layout["groups"], tuple[GroupInfo, ...])
    kv_heads = _kv_heads(int(layout["heads"]), ready)
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    return Engine(
        llm=llm,
        app=app,
        control=control,
        args=args,
        epoch=epoch,
        endpoints=tuple(_advertised(settings, r.endpoint) for r in ready if r.endpoint),
        groups=tuple(info.blocking for info in infos),
        kv_heads=kv_heads,
        traits=_traits(settings, config, ready, infos, kv_heads, layout["sliceable"]),
    )


def hello(engine: Engine, role: wire.Role, name: str, http: str) -> wire.Hello:
    """How this worker introduces itself to the router."""
    import vllm

    return wire.Hello(
        protocol=wire.PROTOCOL,
        role=role,
        worker=name,
        epoch=engine.epoch,
        models=tuple(engine.args.served_model_name),
        max_model_len=engine.max_model_len,
        block_size=engine.block_size,
        slots=engine.slots,
        fingerprint=engine.fingerprint,
        vllm_version=vllm.__version__,
        kv_endpoints=engine.endpoints,
        ranks=engine.ranks,
        kv_heads=engine.kv_heads,
        traits=engine.traits,
        http=http,
    )


def _transfer_config(settings: WorkerSettings, name: str, epoch: int, control: str) -> str:
    producer = isinstance(settings, PrefillSettings)
    options: dict[str, Any] = {
        "role": "prefill" if producer else "decode",
        "control": control,
        "name": name,
        "epoch": epoch,
        "keys_dir": str(settings.keys_dir or ""),
        "transports": list(settings.kv_transports),
        "lanes": settings.kv_lanes,
        "host": settings.kv_host,
    }
    if isinstance(settings, PrefillSettings):
        options |= {
            "kv_bind": settings.kv_bind,
            "staging_bytes": settings.staging_bytes,
            "lease_s": settings.lease_s,
            "piece_bytes": settings.kv_piece_bytes,
            "check": settings.kv_check,
            "codec": settings.kv_codec.replace("none", ""),
        }
    return json.dumps(
        {
            "kv_connector": "BraidConnector",
            "kv_connector_module_path": "kvtransfer.adapter.connector",
            "kv_role": "kv_producer" if producer else "kv_consumer",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": options,
        }
    )


def _parse(settings: WorkerSettings, engine_args: list[str], transfer: str) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    served = settings.served_model_name or Path(settings.model).name
    parser = make_arg_parser(FlexibleArgumentParser(prog="vLLM flags (after --)"))
    args = parser.parse_args(
        [
            *("--model", settings.model),
            *("--served-model-name", served),
            *("--block-size", str(settings.block_size)),
            *engine_args,
            *("--kv-transfer-config", transfer),
        ]
    )
    validate_parsed_serve_args(args)
    return args


def _kv_heads(heads: int, ready: Sequence[Ready]) -> int:
    """The model's KV heads if every rank tells its share of them apart, else 0."""
    try:
        shares = [len(heads_of(heads, len(ready), r.rank)) for r in ready]
    except ValueError:
        return 0
    split = all(shape.heads == share for r, share in zip(ready, shares, strict=True) for shape in r.shapes)
    return heads if split else 0


def _traits(
    settings: WorkerSettings,
    config: Any,
    ready: Sequence[Ready],
    infos: Sequence[GroupInfo],
    kv_heads: int,
    sliceable: bool,
) -> Traits:
    import vllm

    model = config.model_config
    groups = [
        group_trait(info.kind, info.window, info.layers, shape.row_bytes, info.block_size)
        for info, shape in zip(infos, ready[0].shapes, strict=True)
    ]
    return (
        ("model", model_digest(settings.model, model.revision)),
        ("configuration", config_digest(model.hf_config)),
        ("vLLM version", vllm.__version__),
        ("dtype", str(model.dtype)),
        ("KV dtype", str(config.cache_config.cache_dtype)),
        ("quantization", str(model.quantization)),
        ("kernels", ", ".join(sorted({r.layout for r in ready}))),
        ("KV heads", str(kv_heads or f"not split over {len(ready)} ranks")),
        ("KV cache groups", "; ".join(groups)),
        ("block size", "any" if sliceable else ", ".join(str(info.block_size) for info in infos)),
    )


def _role(settings: PrefillSettings | DecodeSettings) -> wire.Role:
    return "prefill" if isinstance(settings, PrefillSettings) else "decode"


def _advertised(settings: WorkerSettings, endpoint: str) -> str:
    """The address decode workers connect to: a wildcard bind needs the host it is reached on."""
    host = getattr(settings, "kv_advertise", "")
    if host:
        return f"tcp://{host}:{endpoint.rsplit(':', 1)[1]}"
    if "0.0.0.0" in endpoint and not is_loopback(endpoint):
        raise ValueError("kv_bind is a wildcard: set kv_advertise to the host that decode workers reach")
    return endpoint
