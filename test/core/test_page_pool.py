from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from simple_flashinfer.core.page_pool import PagePool

SIZE = 20


class PagePoolMachine(RuleBasedStateMachine):
    """Owners take, seal, share and give back pages; what a key finds is what was sealed under it."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(SIZE)
        self.held = []
        self.content = {}  # page -> what was written into it since it was last allocated
        self.sealed = {}  # key -> content

    @rule(count=st.integers(0, SIZE + 3))
    def allocate(self, count):
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="are free"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages.tolist())) == count
        assert not set(pages.tolist()) & {page for held in self.held for page in held.tolist()}
        for page in pages.tolist():
            self.content[page] = object()
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.integers(0, 8))
    def seal(self, data, key):
        pages = data.draw(st.sampled_from(self.held))
        if len(pages):
            page = int(data.draw(st.sampled_from(pages.tolist())))
            before = self.pool.find(key)
            self.pool.seal(page, key)
            if before is None and self.pool.find(key) == page:
                self.sealed[key] = self.content[page]

    @rule(key=st.integers(0, 8))
    def share(self, key):
        page = self.pool.find(key)
        if page is not None:
            assert self.content[page] is self.sealed[key], "what was sealed was written over"
            pages = np.array([page], np.int32)
            self.pool.share(pages)
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)
        free = [page for page in pages.tolist() if self.pool.is_free(page)]
        if free:
            with pytest.raises(ValueError, match="twice"):
                self.pool.release(np.array(free, np.int32))

    @invariant()
    def adds_up(self):
        self.pool.check()
        owners = Counter(page for held in self.held for page in held.tolist())
        assert self.pool.num_free == SIZE - len(owners)
        assert self.pool.num_owners == owners.total()


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(max_examples=60, deadline=None)


def test_pages_come_in_a_row():
    pool = PagePool(8)
    first = pool.allocate(3)
    assert first.tolist() == [0, 1, 2]
    pool.release(first)
    assert pool.allocate(5).tolist() == [0, 1, 2, 3, 4]


def test_check_sees_a_lost_page():
    pool = PagePool(4)
    pool._num_blank -= 1
    with pytest.raises(AssertionError, match="lost"):
        pool.check()


def test_pages_are_forgotten_when_needed_longest_ago_first():
    pool = PagePool(4)
    first, second = pool.allocate(2), pool.allocate(1)
    for page, key in zip([*first.tolist(), *second.tolist()], "abc", strict=True):
        pool.seal(page, key)
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 4
    pool.allocate(2)  # the blank one, and the end of what was given back first
    assert [pool.find(key) is not None for key in "abc"] == [True, False, True]
    pool.allocate(1)
    assert [pool.find(key) is not None for key in "abc"] == [False, False, True]
