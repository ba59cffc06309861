"""HTTP/1.1 that costs little: what arrives is given its time and kept, and read only after the answer's end.

A client that parses JSON between two tokens measures itself. Here a chunk costs one clock reading and httptools' parser.
"""

import asyncio
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson


@dataclass(frozen=True)
class Reply:
    """A streamed answer, read. Times are of time.perf_counter, in seconds; None is what the server did not say."""

    text: str = ""
    chunk_times: tuple[float, ...] = ()  # of chunks that carry a part of the answer, be it text, reasoning or a call
    end: float = 0.0  # of the last chunk that has a choice; it may have a finish_reason only
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None


@dataclass
class Exchange:
    """A request that was sent, and the body of its answer in the parts in which it came, each with its time."""

    started: float
    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None  # of the network

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @cached_property
    def reply(self) -> Reply:
        if self.error is not None:
            return Reply(error=self.error)
        if self.status != 200:
            return Reply(error=f"HTTP {self.status}: {self.body[:300].decode(errors='replace')}")
        return _read_stream(self.parts)


def _lines(parts: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Lines with the time at which the last of their bytes came."""
    rest = b""
    for when, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield when, line.strip()
    if rest:
        yield parts[-1][0], rest.strip()


def _read_stream(parts: list[tuple[float, bytes]]) -> Reply:
    texts: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    end, finished = 0.0, False
    for when, line in _lines(parts):
        kind, _, data = line.partition(b":")
        if kind not in {b"data", b"error"} or data.strip() == b"[DONE]":
            continue
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            return Reply(error=f"an event that is no JSON: {line[:200].decode(errors='replace')}")
        if kind == b"error" or event.get("error") or event.get("object") == "error":
            return Reply(error=f"error in the stream: {data[:300].decode(errors='replace').strip()}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            content = choice.get("text") or delta.get("content") or ""
            if content or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
                texts.append(content)
                times.append(when)
            finished |= choice.get("finish_reason") is not None
            end = when
    details = usage.get("prompt_tokens_details") or {}
    return Reply(
        text="".join(texts),
        chunk_times=tuple(times),
        end=end,
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=details.get("cached_tokens"),
        error=None if finished else "the stream ended without a finish_reason",
    )


class _Connection(asyncio.Protocol):
    """One request at a time. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: Any = None
        self._answer: Exchange | None = None
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, answer: Exchange) -> None:
        """Fills `answer`. Raises ConnectionError."""
        self.reusable, self._framed, self._now = False, False, 0.0
        if self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._answer, self._done = answer, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._answer is not None and self._answer.status and not self._framed and exc is None:
            self._end()  # a body of unknown length ends with its connection
        self._end(ConnectionResetError("the server closed the connection before the end of its answer"))

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._framed |= name.lower() in {b"content-length", b"transfer-encoding"}

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.parts.append((self._now, body))

    def on_message_complete(self) -> None:
        self.reusable = self._framed and self._parser.should_keep_alive()
        self._end()

    def _end(self, error: Exception | None = None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


class Client:
    """Requests to one base URL, over connections that are kept open as long as the server keeps them."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"{url!r} is no http or https URL")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname, parts.port or (443 if self._ssl else 80))
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"Host: {parts.netloc}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: Any) -> Exchange:
        return await self._request("POST", path, orjson.dumps(body))

    async def get(self, path: str) -> Exchange:
        return await self._request("GET", path, b"")

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _request(self, method: str, path: str, body: bytes) -> Exchange:
        """Never raises for what the network does: see Exchange.error. The clock starts before a connection is opened."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        answer = Exchange(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(request, answer)
        except TimeoutError:
            answer.error = f"no end after {self._timeout:g} s"
        except OSError as error:
            answer.error = str(error) or type(error).__name__
        return answer

    async def _send(self, request: bytes, answer: Exchange) -> None:
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                await connection.exchange(request, answer)
                break
            except ConnectionError:
                if not kept or answer.status:
                    raise  # else the server had given up a connection that was idle: take another
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, *self._address, ssl=self._ssl)
        return connection
