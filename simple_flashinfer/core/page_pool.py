"""Which pages of the KV cache are free, owned, or remembered.

A page is owned by one request or by several that begin alike (`share`). A full page may be sealed: given a key, under which
later requests find it. When its last owner gives a sealed page back it is free, but keeps what is in it until the page is
needed: free pages that hold nothing go first, then those that were given back longest ago.

Blank pages are a stack of page numbers in one array: taking and giving back n pages is one slice copy, whatever the size
of the pool. The stack starts descending, and pages come back in descending order, so that a request tends to get pages in
a row.
"""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from simple_flashinfer.types import Int32Array


class PagePool:
    """Owns the page numbers 0 .. num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        self.num_pages = num_pages
        self._owners = np.zeros(num_pages, np.int32)
        self._num_blank = num_pages
        self._blank: Int32Array = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # [: _num_blank]
        self._remembered: OrderedDict[int, None] = OrderedDict()  # sealed and without owner, longest ago first
        self._page_of: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}

    @property
    def num_free(self) -> int:
        return self._num_blank + len(self._remembered)

    def allocate(self, n: int) -> Int32Array:
        """Takes n pages, int32 [n]. Raises ValueError, and takes nothing, when fewer are free."""
        if not 0 <= n <= self.num_free:
            raise ValueError(f"{n} pages asked for, {self.num_free} are free")
        while self._num_blank < n:
            page, _ = self._remembered.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._blank[self._num_blank] = page
            self._num_blank += 1
        self._num_blank -= n
        pages = self._blank[self._num_blank : self._num_blank + n][::-1].copy()
        self._owners[pages] = 1
        return pages

    def release(self, pages: Int32Array) -> None:
        """One owner gives distinct pages back. Raises ValueError, and changes nothing, when one of them has none."""
        if not (self._owners[pages] > 0).all():
            raise ValueError("a page was given back twice")
        self._owners[pages] -= 1
        left = pages[self._owners[pages] == 0]
        if self._key_of:
            sealed = np.fromiter((page in self._key_of for page in left.tolist()), np.bool_, len(left))
            # the end of a text is less likely to be met again than its beginning: it is forgotten first
            for page in left[sealed][::-1].tolist():
                self._remembered[page] = None
            left = left[~sealed]
        self._blank[self._num_blank : self._num_blank + len(left)] = left[::-1]
        self._num_blank += len(left)

    def seal(self, page: int, key: Hashable) -> None:
        """Makes an owned page findable. Nothing happens when another page has the key, or this page has one already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: Hashable) -> int | None:
        return self._page_of.get(key)

    def is_free(self, page: int) -> bool:
        return not self._owners[page]

    def share(self, pages: Int32Array) -> None:
        """One more owner for pages that `find` gave."""
        for page in pages[self._owners[pages] == 0].tolist():
            del self._remembered[page]
        self._owners[pages] += 1

    @property
    def num_owners(self) -> int:
        """Over all pages."""
        return int(self._owners.sum())

    def check(self) -> None:
        """Raises AssertionError unless every page is blank, remembered or owned, and only one of them. O(num_pages)."""
        blank, remembered = self._blank[: self._num_blank], np.fromiter(self._remembered, np.int32, len(self._remembered))
        free = np.concatenate([blank, remembered])
        assert len(np.unique(free)) == len(free), "a page is free twice"
        assert not self._owners[free].any(), "a page is free and owned"
        assert (self._owners >= 0).all()
        assert int((self._owners > 0).sum()) + len(free) == self.num_pages, "a page is lost"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages do not agree"
        assert not self._key_of.keys() & set(blank.tolist()), "a blank page has a key"
        assert self._remembered.keys() <= self._key_of.keys(), "a page without a key is remembered"
