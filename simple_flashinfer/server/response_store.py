"""Answers of the Responses API that later requests refer to by id: a table in memory, or in a file that processes share."""

import sqlite3
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

    def __init__(self, path: str = ":memory:", max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        """path: a file, which is made when it is not there."""
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._table = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._table.execute("PRAGMA synchronous = OFF")  # it need not outlive the daemon
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS stored (used INTEGER PRIMARY KEY, id TEXT UNIQUE, size INTEGER, content BLOB)"
        )

    def add(self, stored: StoredResponse) -> None:
        content = orjson.dumps([stored.response, stored.input_items, stored.items])
        self._table.execute(
            "REPLACE INTO stored SELECT IFNULL(MAX(used), 0) + 1, ?, ?, ? FROM stored",
            (stored.response["id"], len(content), content),
        )
        self._table.execute(
            "DELETE FROM stored WHERE used IN (SELECT used FROM "
            "(SELECT used, ROW_NUMBER() OVER latest AS number, SUM(size) OVER latest AS bytes FROM stored "
            "WINDOW latest AS (ORDER BY used DESC)) WHERE number > ? OR bytes > ?)",
            (self._max_responses, self._max_bytes),
        )

    def get(self, id_: str) -> StoredResponse | None:
        found = self._table.execute(
            "UPDATE stored SET used = (SELECT MAX(used) + 1 FROM stored) WHERE id = ? RETURNING content", (id_,)
        ).fetchall()
        return StoredResponse(*orjson.loads(found[0][0])) if found else None

    def remove(self, id_: str) -> bool:
        """Whether it was there."""
        return self._table.execute("DELETE FROM stored WHERE id = ?", (id_,)).rowcount > 0
