"""What the server process tells the connectors of its engine, and how a request names its transfer."""

from __future__ import annotations

from typing import Any

import msgspec

from kvtransfer.digest import Check

PARAM = "braid"
"""Key in a request's ``kv_transfer_params``: a :class:`kvtransfer.wire.Key` on P, an import's name on D."""

KEEP = "braid_keep"
"""Key in a sample's ``kv_transfer_params``: the name under which its KV stays when it has ended."""


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """``kv_connector_extra_config``: what the server process tells its engine's connectors."""

    role: str
    control: str
    name: str
    epoch: int
    transports: tuple[str, ...]
    host: str = "127.0.0.1"
    lanes: int = 1
    keys_dir: str = ""
    kv_bind: str = ""
    staging_bytes: int = 0
    piece_bytes: int = 0
    check: Check = "off"
    codec: str = ""
    lease_s: float = 30.0


def param_of(params: Any, key: str = PARAM) -> Any:
    """What a request's ``kv_transfer_params`` say to us; None if nothing."""
    return params.get(key) if isinstance(params, dict) else None
