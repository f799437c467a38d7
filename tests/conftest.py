"""Shared settings: two intra-op threads everywhere, hypothesis without deadlines (timing is never asserted)."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("sculpt", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("sculpt")
torch.set_num_threads(2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of steps on small matrices: two threads wait for each other longer than they compute, 20 times
    longer on a busy machine."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)
