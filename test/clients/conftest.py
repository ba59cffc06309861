"""The demo model behind the real daemon, shared by all clients."""

from collections.abc import Iterator

import pytest

from test.daemon import Daemon


@pytest.fixture(scope="session")
def demo() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running
