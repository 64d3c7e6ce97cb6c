"""A stack in one small process, `python fake_stack.py PORT`: it answers as a streaming OpenAI server does."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Handler(BaseHTTPRequestHandler):
    """Counts transfers; a prompt of one token is refused, one of two gets an empty first text."""

    protocol_version = "HTTP/1.1"
    transfers: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.reply(f'braid_kv_transfers_total{{d="0"}} {len(self.transfers)}\n'.encode())
        elif self.path == "/v1/models":
            self.reply(json.dumps({"data": [{"id": "demo"}]}).encode())
        else:
            self.reply(b"ok")

    def do_POST(self) -> None:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if len(body["prompt"]) == 1:
            self.reply(b'{"error": {"message": "too short"}}', status=400)
            return
        self.transfers.append(1)
        choices = [{"text": text} for text in ["" if len(body["prompt"]) == 2 else "a", "b"]]
        if not body.get("stream"):
            tokens = body.get("n", 1) * body["max_tokens"]
            self.reply(json.dumps({"choices": choices, "usage": {"completion_tokens": tokens}}).encode())
            return
        events = [json.dumps({"choices": [choice]}) for choice in choices]
        events += [json.dumps({"choices": [], "usage": {}}), "[DONE]"]
        self.reply("".join(f"data: {event}\n\n" for event in events).encode())

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-braid-path", "remote")
        self.send_header("x-braid-kv-transfers", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
