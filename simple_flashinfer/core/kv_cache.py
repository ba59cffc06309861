"""Which pages hold the K/V of which request.

A running request owns ceil(num_tokens / page_size) pages, those of its tokens that are not computed yet included: a
request is admitted only when its whole prompt has room, so that a half-computed prompt never waits for pages.
All of it works on many rows at once; the cost of a step does not grow with the pool.
"""

import numpy as np

from simple_flashinfer.core.page_pool import PagePool
from simple_flashinfer.types import Int32Array, RequestTable


class KVCacheManager:
    def __init__(self, table: RequestTable, num_pages: int) -> None:
        self.table = table
        self.pool = PagePool(num_pages)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.table.page_size)

    def missing(self, rows: Int32Array) -> Int32Array:
        """Pages that each row needs beside those it has, int32 [len(rows)], so that all its tokens have a place."""
        table = self.table
        return -(-table.num_tokens[rows] // table.page_size) - table.num_pages[rows]

    def allocate(self, rows: Int32Array) -> bool:
        """Gives each row the pages it misses: to all rows, or (False) to none."""
        missing = self.missing(rows)
        total = int(missing.sum())
        if total > self.pool.num_free:
            return False
        if total:
            table = self.table
            pages = self.pool.allocate(total)
            starts = np.cumsum(missing) - missing
            columns = np.arange(total) + np.repeat(table.num_pages[rows] - starts, missing)
            table.page_table[np.repeat(rows, missing), columns] = pages
            table.num_pages[rows] += missing
        return True

    def free(self, row: int) -> None:
        self.pool.release(self.table.page_table[row, : self.table.num_pages[row]])
        self.table.num_pages[row] = 0

    def check(self, running: Int32Array) -> None:
        """Raises AssertionError unless the running rows own exactly the pages that their tokens need, and no others."""
        self.pool.check()
        table = self.table
        num_pages = table.num_pages[running]
        assert (num_pages <= -(-table.num_tokens[running] // table.page_size)).all(), "a request has pages that it can't use"
        assert (num_pages * table.page_size >= table.num_computed_tokens[running]).all(), "computed tokens have no page"
        owned = [table.page_table[row, : table.num_pages[row]] for row in running]
        pages = np.concatenate([*owned, np.empty(0, np.int32)])
        assert len(np.unique(pages)) == len(pages), "a page has two owners"
        assert len(pages) == self.pool.num_pages - self.pool.num_free, "a page is taken, but by no running request"
        idle = np.setdiff1d(np.arange(len(table.num_pages)), running)
        assert not table.num_pages[idle].any(), "a row without a request owns pages"
