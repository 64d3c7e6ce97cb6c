"""One typed settings object a process, validated once at start.

Each field can be given as a flag (``--queue-limit``), an environment variable (``BRAID_QUEUE_LIMIT``)
or a key of the TOML file named by ``BRAID_CONFIG``; flags win over variables, variables over the
file. Unknown flags and file keys are refused. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import os
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from braid.services import Retrievers, Verifiers

LOOPBACK = ("127.", "localhost", "[::1]", "::1")


class ProcessSettings(BaseSettings):
    """What every process has. The TOML file has one table a process (:data:`TABLES`)."""

    model_config = SettingsConfigDict(
        env_prefix="BRAID_",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    _table: str = ""

    host: str = Field("127.0.0.1", description="address the HTTP server binds")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    keys_dir: Path | None = Field(
        None,
        description="folder with the cluster's CURVE key pair (made by `braid keys`); required as "
        "soon as a ZMQ socket is not on loopback",
    )
    heartbeat_s: float = Field(0.5, gt=0, le=60, description="interval of heartbeats")
    heartbeat_misses: int = Field(6, ge=2, description="missed heartbeats after which a peer is gone")
    hang_s: float = Field(
        30.0, gt=0, description="seconds after which a peer is gone that is connected and says nothing"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("BRAID_CONFIG")
        if path is None:
            return init_settings, env_settings
        return init_settings, env_settings, _Table(settings_cls, Path(path))


TABLES = ("router", "prefill", "decode", "up", "doctor", "sim")
"""Tables of the settings file."""


class _Table(TomlConfigSettingsSource):
    """The process's own table of the TOML file; a table that no process reads is refused."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"BRAID_CONFIG names {path}, which is not a file")
        self._name = str(settings_cls.__private_attributes__["_table"].default)
        super().__init__(settings_cls, path)

    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        content = super()._read_file(file_path)
        unknown = sorted(set(content) - set(TABLES))
        if unknown:
            raise ValueError(f"[{unknown[0]}] in {file_path} is not one of {', '.join(TABLES)}")
        table = content.get(self._name, {})
        if not isinstance(table, dict):
            raise ValueError(f"[{self._name}] in {file_path} must be a table")
        return table


def _split(value: object) -> object:
    """Names with commas between them, as a variable gives them or a flag, which may be repeated."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        return value
    return [name.strip() for part in value for name in part.split(",") if name.strip()]


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Names with commas between."""


def is_loopback(endpoint: str) -> bool:
    """Whether a ZMQ endpoint or host cannot be reached from another machine."""
    address = endpoint.removeprefix("tcp://")
    return endpoint.startswith("ipc://") or address.startswith(LOOPBACK)


class RouterSettings(ProcessSettings):
    """The router: the OpenAI HTTP front door."""

    _table: str = "router"

    port: int = Field(8000, ge=0, le=65535, description="HTTP port (0: any free one)")
    link: str = Field("tcp://127.0.0.1:9100", description="ZMQ endpoint that workers connect to")
    port_file: Path | None = Field(None, description="write the bound HTTP port here once listening")
    api_keys_file: Path | None = Field(
        None, description="file with one API key a line; without it no key is asked for"
    )
    max_body_bytes: int = Field(8 * 1024 * 1024, gt=0, description="cap of a request body")
    max_n: int = Field(128, ge=1, description="most samples of one request")
    max_inflight: int = Field(256, ge=1, description="samples running at the same time")
    queue_limit: int = Field(256, ge=0, description="requests waiting for a slot; more are refused")
    group_share: float = Field(
        0.75, gt=0, le=1, description="share of max_inflight that requests of several samples may hold"
    )
    queue_timeout_s: float = Field(30.0, gt=0, description="longest wait for a slot")
    request_timeout_s: float = Field(600.0, gt=0, description="deadline of a request")
    prefill_timeout_s: float = Field(60.0, gt=0, description="deadline of a remote prefill")
    inter_token_timeout_s: float = Field(30.0, gt=0, description="longest silence of a decode worker")
    write_timeout_s: float = Field(30.0, gt=0, description="longest time a client may stop reading")
    drain_s: float = Field(30.0, ge=0, description="on SIGTERM, time for running requests to end")
    remote_min_chars: int = Field(
        0, ge=0, description="prompts of fewer characters are computed on the decode worker"
    )
    spread: Literal["pack", "spread", "auto"] = Field(
        "pack", description="samples of a group: on one decode worker, over all, or by estimated end"
    )
    kv_bandwidth: float = Field(
        1e9, gt=0, description="bytes a second that a prefill worker sends KV at, for spread `auto`"
    )
    model_order: Names = Field(
        (),
        description="models from cheap to dear, with commas between: the default of strategies over several",
    )
    local_models: Names = Field(
        (), description="models that have no prefill workers by design, with commas between"
    )
    trigger: str = Field("Let's think step by step.", description="what `cot` appends to the prompt")
    verify_pairs: bool = Field(
        True, description="use a prefill/decode pair only after a real KV transfer between them"
    )
    otlp_traces_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL that spans of requests are sent to (OTLP over HTTP), such as "
        "http://127.0.0.1:4318/v1/traces; OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is taken too",
    )
    effort: Literal["pass", "auto"] = Field(
        "pass", description="reasoning_effort without a strategy: the engine reads it, or strategy auto does"
    )
    effort_table: Path | None = Field(
        None, description="table of strategy auto, as `braid calibrate` makes it (default: the demo model's)"
    )
    group_history: int = Field(
        1000, ge=0, description="groups that GET /v1/groups/ID still knows, over all API keys"
    )
    verifiers: Verifiers = Field(
        {}, description="verifiers by name, a table each in the file (docs/strategies.md), JSON elsewhere"
    )
    retrievers: Retrievers = Field(
        {}, description="retrievers by name, a table each in the file (docs/strategies.md), JSON elsewhere"
    )

    @model_validator(mode="after")
    def _curve(self) -> RouterSettings:
        _require_keys(self.keys_dir, self.link)
        return self


Transports = Annotated[
    tuple[Literal["shm", "nixl", "collective", "zmq"], ...], NoDecode, BeforeValidator(_split)
]
"""Names of :mod:`kvtransfer.transport`, in order of preference."""


class SimulatedSettings(ProcessSettings):
    """The simulated engine (`engine` sim): made-up answers in modelled time."""

    # The router imports these classes and uses none of them: building their schemas waits for the first use.
    model_config = SettingsConfigDict(defer_build=True)

    engine: Literal["vllm", "sim"] = Field("vllm", description="what computes; `sim`: nothing does")
    sim_workers: int = Field(1, ge=1, le=1024, description="simulated workers in this process")
    sim_time_scale: float = Field(1.0, gt=0, description="seconds that a simulated second takes")
    sim_model_file: Path | None = Field(
        None, description="step times, as benchmarks/fit_sim.py writes them (default: the built-in ones)"
    )
    sim_max_model_len: int = Field(8192, ge=2, description="longest sequence in tokens")
    sim_blocks: int = Field(2048, ge=2, description="blocks of a worker's KV cache")
    sim_slots: int = Field(128, ge=1, description="most sequences that a worker runs at a time")
    sim_chunk: int = Field(512, ge=1, description="most tokens of a scheduling step: a prefill chunk")
    sim_kv: Literal["counted", "moved"] = Field(
        "counted", description="KV on its way: time passes and bytes are counted, or synthetic bytes move"
    )
    sim_kv_bytes: int = Field(4096, gt=0, multiple_of=16, description="KV bytes of a token")
    sim_bandwidth: float = Field(1e9, gt=0, description="bytes a second of counted transfers from a worker")
    sim_latency_s: float = Field(0.001, ge=0, description="what a counted transfer takes besides")
    sim_tokens: float = Field(48.0, ge=1, description="median length of a sample in tokens (lognormal)")
    sim_sigma: float = Field(0.4, ge=0, le=3, description="spread of the logarithm of the length")
    sim_accuracy: float = Field(0.6, ge=0, le=1, description="share of samples with the right answer")
    sim_answers: int = Field(4, ge=0, le=1000, description="wrong answers that the other samples give")

    @model_validator(mode="after")
    def _fits(self) -> SimulatedSettings:
        block_size = getattr(self, "block_size", 1)
        if self.engine == "sim" and self.sim_blocks * block_size < self.sim_max_model_len:
            raise ValueError(
                f"sim_blocks of {block_size} tokens do not hold one sequence of sim_max_model_len tokens"
            )
        return self


class WorkerSettings(SimulatedSettings):
    """A prefill or decode worker: one vLLM engine."""

    port: int = Field(0, ge=0, le=65535, description="HTTP port of health and metrics (0: any)")
    router: str = Field("tcp://127.0.0.1:9100", description="the router's link endpoint")
    worker: str = Field("", description="name of this worker (default: role and a random suffix)")
    model: str = Field("", description="model folder or name, as vLLM takes it (required by vLLM)")
    served_model_name: str = Field("", description="name clients use (default: the model's folder name)")
    run_dir: Path | None = Field(None, description="folder of sockets (default: a private temporary one)")
    block_size: int = Field(
        32, ge=1, description="tokens of a KV block; P and D may differ where blocks can be cut"
    )
    load_timeout_s: float = Field(60.0, gt=0, le=600, description="longest wait for a KV transfer")
    drain_s: float = Field(30.0, ge=0, description="on SIGTERM, time for running requests to end")
    kv_transports: Transports = Field(
        ("shm", "zmq"),
        min_length=1,
        description="how KV may travel, with commas between; the first that both ends have is taken",
    )
    kv_lanes: int = Field(1, ge=1, le=8, description="connections a pair for KV over zmq (decode asks)")
    kv_host: str = Field("127.0.0.1", description="address that `collective` listens on")
    kv_plaintext: bool = Field(
        False, description="allow `nixl` and `collective`, which do not encrypt, in a cluster with keys"
    )

    @model_validator(mode="after")
    def _named(self) -> WorkerSettings:
        if self.engine == "vllm" and not self.model:
            raise ValueError("model is required (--model, BRAID_MODEL or `model` in the file)")
        if self.engine == "sim" and not (self.served_model_name or "sim").startswith("sim"):
            raise ValueError("a simulated model's served_model_name must begin with `sim`")
        return self

    @model_validator(mode="after")
    def _curve(self) -> WorkerSettings:
        _require_keys(self.keys_dir, self.router)
        _require_keys(self.keys_dir, self.kv_host)
        bare = sorted({"nixl", "collective"}.intersection(self.kv_transports))
        if bare and self.keys_dir is not None and not self.kv_plaintext:
            raise ValueError(
                f"{' and '.join(bare)} would carry KV unencrypted in a cluster that has keys: leave them "
                "out of kv_transports, or set kv_plaintext if the network between workers is trusted"
            )
        return self


class PrefillSettings(WorkerSettings):
    """A prefill worker: computes the KV of a prompt once and hands it over."""

    _table: str = "prefill"

    kv_bind: str = Field("tcp://127.0.0.1:*", description="ZMQ endpoint KV is served on, one a rank")
    kv_advertise: str = Field("", description="host that decode workers reach kv_bind on")
    staging_bytes: int = Field(512 * 1024 * 1024, gt=0, description="host memory for KV to hand over")
    lease_s: float = Field(
        30.0, ge=5, description="how long KV is held for a decode worker not heard of; it says so every 2 s"
    )
    kv_piece_bytes: int = Field(
        1024 * 1024, gt=0, le=32 * 1024 * 1024, description="KV sent at a time (one block at least)"
    )
    kv_codec: Literal["none", "int8", "fp8"] = Field(
        "none", description="KV of a bfloat16 cache on its way: as it is, or in about half the bytes (lossy)"
    )
    kv_check: Literal["off", "sampled", "full"] = Field(
        "sampled", description="checksums of KV on its way: of nothing, one piece in 16, or all"
    )

    @model_validator(mode="after")
    def _kv_curve(self) -> PrefillSettings:
        _require_keys(self.keys_dir, self.kv_bind)
        return self


class DecodeSettings(WorkerSettings):
    """A decode worker: runs the samples of a group on one shared prefix."""

    _table: str = "decode"

    max_load_share: float = Field(
        0.5, gt=0, le=1, description="share of the KV cache that transfers in flight may hold"
    )
    max_kept_share: float = Field(
        0.25, ge=0, le=1, description="share of it that ended samples may hold for what goes on from them"
    )
    group_width: int = Field(
        0,
        ge=0,
        description="most samples of groups that run while single requests are about "
        "(0: an eighth of what the engine runs at a time)",
    )
    calm_s: float = Field(
        2.0, ge=0, le=600, description="seconds without a single request after which groups may take all"
    )

    def width_of(self, slots: int) -> int:
        """``group_width`` on an engine that runs ``slots`` sequences at a time."""
        return self.group_width or max(1, slots // 8)


def _require_keys(keys_dir: Path | None, endpoint: str) -> None:
    if keys_dir is None and not is_loopback(endpoint):
        raise ValueError(
            f"{endpoint} is reachable from other machines: make keys with `braid keys DIR` "
            "and set keys_dir, or use 127.0.0.1"
        )
