"""An OpenAI-compatible server that does what a test wants, right or wrong. A token is a word; a template costs five."""

import asyncio
import json
import threading
from typing import Any, Self


class FakeServer:
    """Runs in a thread of its own.

    prompt_lie: tokens added to what usage says of prompts longer than 120 words. usage: whether there is any. extra_chunks:
    text beyond max_tokens that usage does not count. short: tokens left out. refused: fields that are a 422. status: of
    requests for more than one token. broken: an error event after the first token. chunked: False ends answers by closing.
    """

    def __init__(
        self,
        *,
        prompt_lie: int = 0,
        usage: bool = True,
        extra_chunks: int = 0,
        short: int = 0,
        refused: tuple[str, ...] = (),
        status: int = 200,
        broken: bool = False,
        chunked: bool = True,
    ) -> None:
        self.prompt_lie, self.usage, self.extra_chunks, self.short = prompt_lie, usage, extra_chunks, short
        self.refused, self.status, self.broken, self.chunked = refused, status, broken, chunked
        self.requests: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(5)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self._server

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].split("\r\n")[0])
                body = await reader.readexactly(length)
                if head.startswith("get"):
                    data = {"data": [{"id": "fake"}]} if "/v1/models" in head else {"version": "1.2"}
                    self._whole(writer, 200, data)
                else:
                    await self._answer(writer, json.loads(body))
                await writer.drain()
                if not self.chunked:
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.requests.append(body)
        if unknown := [name for name in self.refused if name in body]:
            self._whole(writer, 422, {"detail": f"unexpected: {unknown}"})
            return
        wanted = body["max_tokens"]
        if self.status != 200 and wanted > 1:
            self._whole(writer, self.status, {"error": {"message": "out of order"}})
            return
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n" if self.chunked else b"\r\n"))
        self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        given = wanted - self.short if wanted > 1 else wanted
        for i in range(given + (self.extra_chunks if wanted > 1 else 0)):
            if self.broken and i == 1:
                self._event(writer, {"error": {"message": "the engine is dead"}})
            self._event(writer, {"choices": [{"delta": {"content": f" w{i}"}, "finish_reason": None}]})
            await asyncio.sleep(0.001)
        self._event(writer, {"choices": [{"delta": {}, "finish_reason": "length"}]})
        words = sum(len(message["content"].split()) for message in body["messages"])
        prompt_tokens = words + 5 + (self.prompt_lie if words > 120 else 0)
        if self.usage:
            self._event(writer, {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": given}})
        self._write(writer, b"data: [DONE]\n\n")
        if self.chunked:
            writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, data: Any) -> None:
        self._write(writer, b"data: " + json.dumps(data).encode() + b"\n\n")

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
