"""API keys: compared in constant time over hashes; the keys themselves are not kept."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from braid.errors import Unauthorized


class Keys:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, file: Path | None) -> None:
        """Read one key a line; empty lines and lines that begin with ``#`` are skipped.

        Raises:
            ValueError: the file holds no key. (An empty file would otherwise open the server.)
        """
        self._hashes: list[bytes] | None = None
        if file is not None:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
            self._hashes = [_hash(line) for line in lines if line and not line.startswith("#")]
            if not self._hashes:
                raise ValueError(f"{file} holds no API key")

    def check(self, authorization: str | None) -> str:
        """The tenant of an ``Authorization`` header: empty without keys, else a digest of the key.

        Raises:
            Unauthorized: it holds none of the keys.
        """
        if self._hashes is None:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("Send a valid API key as `Authorization: Bearer KEY`.", code="invalid_api_key")
        return given.hex()


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
