"""Starts the real daemon as users do: a process of its own, on a real port."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from typing import Any, Self

import httpx

_READY = re.compile(r"Listening on http://localhost:(\d+)|Listening on http://127\.0\.0\.1:(\d+)")
_START_SECONDS = 120


class Daemon:
    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        self.log: list[str] = []
        command = [sys.executable, "-m", "simple_flashinfer.main", "--port", "0", "--host", "127.0.0.1", *flags]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **(env or {})}
        )
        self._ports: queue.Queue[int | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.log.append(line.rstrip())
                if found := _READY.search(line):
                    self._ports.put(int(found[1] or found[2]))
        self._ports.put(None)

    def __enter__(self) -> Self:
        port = self._ports.get(timeout=_START_SECONDS)
        if port is None:
            raise RuntimeError("the daemon did not start:\n" + "\n".join(self.log))
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(5)

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path).json()

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Until no page is in use. Raises AssertionError when pages are still taken after that time."""
        deadline = time.monotonic() + seconds
        while (used := self.get("/kv_cache")["utilized_kv_cache"]) != 0:
            assert time.monotonic() < deadline, f"{used} tokens of KV cache are still in use"
            time.sleep(0.02)
