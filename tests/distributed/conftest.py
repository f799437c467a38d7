from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="session", params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two, then four ranks."""
    pool = Ranks(request.param)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    pool = Ranks(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.stop()
