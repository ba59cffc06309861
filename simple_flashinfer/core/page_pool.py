"""Which pages of the KV cache are free.

A stack of page numbers in one array: taking and giving back n pages is one slice copy, whatever the size of the pool.
The stack starts descending, and pages come back in descending order, so that a request tends to get pages in a row.
"""

import numpy as np

from simple_flashinfer.types import Int32Array


class PagePool:
    """Owns the page numbers 0 .. num_pages - 1; each is free or has exactly one owner."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stack: Int32Array = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # [: num_free] is free
        self._owned = np.zeros(num_pages, np.bool_)

    def allocate(self, n: int) -> Int32Array:
        """Takes n pages, int32 [n]. Raises ValueError, and takes nothing, when fewer are free."""
        if not 0 <= n <= self.num_free:
            raise ValueError(f"{n} pages asked for, {self.num_free} are free")
        self.num_free -= n
        pages = self._stack[self.num_free : self.num_free + n][::-1].copy()
        self._owned[pages] = True
        return pages

    def release(self, pages: Int32Array) -> None:
        """Gives distinct pages back. Raises ValueError, and changes nothing, when one of them is free already."""
        if not self._owned[pages].all():
            raise ValueError("a page was given back twice")
        self._owned[pages] = False
        self._stack[self.num_free : self.num_free + len(pages)] = pages[::-1]
        self.num_free += len(pages)

    def check(self) -> None:
        """Raises AssertionError unless every page is free or owned, and none is both. O(num_pages)."""
        free = self._stack[: self.num_free]
        assert len(np.unique(free)) == self.num_free, "a page is free twice"
        assert not self._owned[free].any(), "a page is free and owned"
        assert int(self._owned.sum()) + self.num_free == self.num_pages, "a page is lost"
