"""Lines of a streamed HTTP body.

HTTP clients split text where Unicode has line breaks, and a generated token may be one (U+0085, U+2028): an
event would be cut in its middle. An event stream's lines end with LF or CRLF.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator


class _Splitter:
    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return [line.removesuffix(b"\r").decode(errors="replace") for line in whole]

    def end(self) -> list[str]:
        return self.feed(b"\n") if self._rest else []


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a body that comes in pieces, without their ends; the last one may have none."""
    splitter = _Splitter()
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.end()


async def alines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """:func:`lines` of pieces that are awaited."""
    splitter = _Splitter()
    async for chunk in chunks:
        for line in splitter.feed(chunk):
            yield line
    for line in splitter.end():
        yield line
