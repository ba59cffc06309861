"""A server under test: which model it has, which fields it takes, and how a conversation is put to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from benchmark.client import Client, Exchange

_OUTPUT_FIELDS = (("ignore_eos", "min_tokens"), ("ignore_eos",), ())  # the first that the server takes are sent
_VERSIONS = (("/version", "version"), ("/props", "build_info"))  # the second is llama.cpp's


class TargetError(Exception):
    """The server can't be measured; says why."""


@dataclass
class Target:
    """Made by `connect`."""

    name: str
    url: str
    client: Client
    endpoint: str  # "chat" or "completions"
    model: str
    version: str | None
    extra_body: dict[str, Any]
    output_fields: tuple[str, ...] = ()  # what makes outputs exactly as long as they are asked to be

    @classmethod
    async def connect(
        cls,
        name: str,
        url: str,
        *,
        endpoint: str = "chat",
        model: str | None = None,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout: float = 600,  # noqa: ASYNC109 (of each request)
    ) -> "Target":
        """Asks the server for its model and version, and tries which fields it takes. Raises TargetError."""
        target = cls(name, url, Client(url, api_key, timeout), endpoint, model or "", None, extra_body or {})
        try:
            target.model = model or await _first_model(target.client, url)
            target.version = await _version(target.client)
            for fields in _OUTPUT_FIELDS:
                target.output_fields = fields
                exchange = await target.send(["Hi"], 1)
                if exchange.status not in {400, 422}:
                    break
            if exchange.reply.error is not None:
                raise TargetError(f"{name} ({url}) refuses a request: {exchange.reply.error}")
        except BaseException:
            target.client.close()
            raise
        return target

    def describe(self) -> dict[str, Any]:
        names = ("name", "url", "endpoint", "model", "version", "extra_body", "output_fields")
        return {name: getattr(self, name) for name in names}

    async def send(self, texts: Sequence[str], output_length: int) -> Exchange:
        """texts: the user's and the model's in turn, the user's first and last."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": output_length, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        body |= {name: {"ignore_eos": True, "min_tokens": output_length}[name] for name in self.output_fields}
        if self.endpoint == "completions":
            body["prompt"] = "".join(texts)
            return await self.client.post("/v1/completions", body | self.extra_body)
        roles = ("user", "assistant")
        body["messages"] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return await self.client.post("/v1/chat/completions", body | self.extra_body)

    async def count(self, text: str) -> int:
        """Tokens of a prompt by the server's own usage, with all that the template adds. Raises TargetError."""
        reply = (await self.send([text], 1)).reply
        if reply.error is not None or reply.prompt_tokens is None:
            raise TargetError(f"{self.name} does not say how many tokens a prompt has: {reply.error or 'no usage'}")
        return reply.prompt_tokens


async def _first_model(client: Client, url: str) -> str:
    exchange = await client.get("/v1/models")
    if exchange.error is not None:
        raise TargetError(f"can't reach {url}: {exchange.error}")
    try:
        return str(orjson.loads(exchange.body)["data"][0]["id"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        said = exchange.body[:200].decode(errors="replace")
        raise TargetError(f"{url}/v1/models names no model (HTTP {exchange.status}: {said}); use --model") from None


async def _version(client: Client) -> str | None:
    for path, name in _VERSIONS:
        exchange = await client.get(path)
        try:
            if exchange.status == 200 and (version := orjson.loads(exchange.body).get(name)):
                return str(version)
        except (orjson.JSONDecodeError, AttributeError):
            pass
    return None
