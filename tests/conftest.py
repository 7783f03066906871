"""What every test leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """The command line sets the number of threads, which decides last bits that other tests compare."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
