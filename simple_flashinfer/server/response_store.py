"""Answers of the Responses API that later requests refer to by id, in memory."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

_MAX_RESPONSES = 1000
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """input_items: its own request's. items: the whole conversation, output included and instructions not."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    items: list[dict[str, Any]]


class ResponseStore:
    """Forgets those that were not used for the longest time when there are too many, or too much in them.

    Each counts with its whole conversation, as JSON, also where it shares that with others.
    """

    def __init__(self, max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_bytes = 0

    def add(self, stored: StoredResponse) -> None:
        size = len(orjson.dumps([stored.response, stored.items]))
        self._stored[stored.response["id"]] = stored, size
        self._num_bytes += size
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            self._num_bytes -= self._stored.popitem(last=False)[1][1]

    def get(self, id_: str) -> StoredResponse | None:
        if id_ not in self._stored:
            return None
        self._stored.move_to_end(id_)
        return self._stored[id_][0]

    def remove(self, id_: str) -> bool:
        """Whether it was there."""
        stored = self._stored.pop(id_, None)
        self._num_bytes -= stored[1] if stored else 0
        return stored is not None
