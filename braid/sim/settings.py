"""Settings of ``braid sim``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from braid.settings import DecodeSettings, PrefillSettings


class SimSettings(PrefillSettings, DecodeSettings):
    """Simulated workers of both roles in one process."""

    _table: str = "sim"

    prefill: int = Field(1, ge=0, le=1024, description="prefill workers")
    decode: int = Field(2, ge=0, le=1024, description="decode workers")

    @model_validator(mode="before")
    @classmethod
    def _simulated(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "engine": "sim"}
