from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    """One pool of a size for all tests; its processes (0.4 GB each) start with its first test."""
    made = {size: Ranks(size) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.stop()


@pytest.fixture(scope="session", params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest, pools: dict[int, Ranks]) -> Ranks:
    """Two, then four ranks."""
    return pools[request.param]


@pytest.fixture(scope="session")
def four_ranks(pools: dict[int, Ranks]) -> Ranks:
    return pools[4]


@pytest.fixture(scope="session")
def two_ranks(pools: dict[int, Ranks]) -> Ranks:
    return pools[2]
