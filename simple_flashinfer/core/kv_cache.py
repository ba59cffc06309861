"""Which pages hold the K/V of which request.

A running request owns ceil(num_tokens / page_size) pages, those of its tokens that are not computed yet included: a
request is admitted only when its whole prompt has room, so that a half-computed prompt never waits for pages.
All of it works on many rows at once; the cost of a step does not grow with the pool.

Prefix caching: a page whose tokens are all computed is sealed under a key made from them and from everything before them.
A request that begins with the same tokens shares such pages instead of computing them, up to but never including its last
token, which has to be computed for there to be logits. Shared pages are full, so nobody writes into them. A conversation's
next turn and a preempted request find their own pages in the same way.
"""

import numpy as np

from simple_flashinfer.core.page_pool import PagePool
from simple_flashinfer.core.request import Request
from simple_flashinfer.types import Int32Array, RequestTable


class KVCacheManager:
    def __init__(self, table: RequestTable, num_pages: int, prefix_caching: bool = True) -> None:
        self.table = table
        self.pool = PagePool(num_pages)
        self._prefix_caching = prefix_caching
        self._num_sealed = np.zeros_like(table.num_pages)  # pages of each row that were sealed, or found sealed

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.table.page_size)

    def allocate(self, rows: Int32Array) -> bool:
        """Gives each row the pages that its tokens need beside those it has: to all rows, or (False) to none."""
        table = self.table
        missing = -(-table.num_tokens[rows] // table.page_size) - table.num_pages[rows]
        total = int(missing.sum())
        if total > self.pool.num_free:
            return False
        if total:
            pages = self.pool.allocate(total)
            starts = np.cumsum(missing) - missing
            columns = np.arange(total) + np.repeat(table.num_pages[rows] - starts, missing)
            table.page_table[np.repeat(rows, missing), columns] = pages
            table.num_pages[rows] += missing
        return True

    def free(self, row: int) -> None:
        self.pool.release(self.table.page_table[row, : self.table.num_pages[row]])
        self.table.num_pages[row] = self._num_sealed[row] = 0

    def match(self, request: Request) -> Int32Array:
        """Pages that hold the beginning of a waiting request already, int32. They are not taken yet: see `adopt`."""
        size, tokens = self.table.page_size, request.token_ids
        found: list[int] = []
        # what is found is not computed, and has no logits
        usable = self._prefix_caching and not request.wants_prompt_logprobs
        for index in range((len(tokens) - 1) // size if usable else 0):
            page = self.pool.find(request.page_key(index, tokens[index * size : (index + 1) * size]))
            if page is None:
                break
            found.append(page)
        return np.array(found, np.int32)

    def pages_left(self, matched: Int32Array) -> int:
        """Free pages, if these were taken."""
        return self.pool.num_free - sum(self.pool.is_free(page) for page in matched.tolist())

    def adopt(self, row: int, matched: Int32Array) -> None:
        """Gives an empty row the pages that `match` found; the tokens in them count as computed."""
        self.pool.share(matched)
        self.table.page_table[row, : len(matched)] = matched
        self.table.num_pages[row] = self._num_sealed[row] = len(matched)
        self.table.num_computed_tokens[row] = len(matched) * self.table.page_size

    def seal(self, rows: Int32Array, num_computed: Int32Array, by_row: list[Request | None]) -> None:
        """Makes pages findable whose tokens are all among the first num_computed of their row, and known."""
        if not self._prefix_caching:
            return
        table, size = self.table, self.table.page_size
        num_full = num_computed // size
        for row, full in (
            zip(rows.tolist(), num_full.tolist(), strict=True) if (num_full > self._num_sealed[rows]).any() else ()
        ):
            request = by_row[row]
            assert request is not None
            for index in range(self._num_sealed[row], full):
                key = request.page_key(index, table.token_ids[row, index * size : (index + 1) * size])
                self.pool.seal(int(table.page_table[row, index]), key)
            self._num_sealed[row] = full

    def trim(self, rows: Int32Array) -> None:
        """Takes back pages that the rows' tokens do not need, after a rollback."""
        table = self.table
        needed = -(-table.num_tokens[rows] // table.page_size)
        for row, keep in zip(rows.tolist(), needed.tolist(), strict=True):
            self.pool.release(table.page_table[row, keep : table.num_pages[row]])
            table.num_pages[row] = min(keep, table.num_pages[row])

    def check(self, running: Int32Array) -> None:
        """Raises AssertionError unless the running rows own exactly the pages that their tokens need, and no others."""
        self.pool.check()
        table = self.table
        num_pages = table.num_pages[running]
        assert (num_pages <= -(-table.num_tokens[running] // table.page_size)).all(), "a request has pages that it can't use"
        assert (num_pages * table.page_size >= table.num_computed_tokens[running]).all(), "computed tokens have no page"
        owned = [table.page_table[row, : table.num_pages[row]] for row in running]
        pages = np.concatenate([*owned, np.empty(0, np.int32)])
        assert len(np.unique(pages)) == self.pool.num_pages - self.pool.num_free, (
            "a page is taken, but by no running request"
        )
        assert len(pages) == self.pool.num_owners, "a page has an owner too many"
        written = [row_pages[num_full:] for row_pages, num_full in zip(owned, self._num_sealed[running], strict=True)]
        private = np.concatenate([*written, np.empty(0, np.int32)])
        assert np.isin(pages, private).sum() == len(private), "two requests write to one page"
        idle = np.setdiff1d(np.arange(len(table.num_pages)), running)
        assert not table.num_pages[idle].any(), "a row without a request owns pages"
