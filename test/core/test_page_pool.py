import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from simple_flashinfer.core.page_pool import PagePool

SIZE = 20


class PagePoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(SIZE)
        self.taken = {}

    pages = Bundle("pages")

    @rule(target=pages, count=st.integers(0, SIZE + 3))
    def allocate(self, count):
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="are free"):
                self.pool.allocate(count)
            return np.empty(0, np.int32)
        pages = self.pool.allocate(count)
        assert len(set(pages.tolist())) == count
        assert not set(pages.tolist()) & {page for held in self.taken.values() for page in held}
        self.taken[id(pages)] = pages.tolist()
        return pages

    @rule(pages=consumes(pages))
    def release(self, pages):
        self.pool.release(pages)
        self.taken.pop(id(pages), None)
        if len(pages):
            with pytest.raises(ValueError, match="twice"):
                self.pool.release(pages)

    @invariant()
    def adds_up(self):
        self.pool.check()
        assert self.pool.num_free == SIZE - sum(map(len, self.taken.values()))


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
    pool.num_free -= 1
    with pytest.raises(AssertionError, match="lost"):
        pool.check()
