"""What every test leaves as it was; and how much of a large table of cases is run."""

from __future__ import annotations

import pytest
import torch

import covering
import methods


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in the processes that tests start, for the number of threads decides last bits. The command line sets another one,
    also in fixtures of whole modules, which are made before this one."""
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-pairs", action="store_true", help="run every case of every table, not a covering of it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covering(*what): run only cases that cover the table (covering.py)")
    config.addinivalue_line("markers", "xdist_group(name): on one process of several, for a fixture is made once there")
    methods.ALL_PAIRS = config.getoption("--all-pairs")


@pytest.hookimpl(trylast=True)  # after -k and -m: of what was asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-pairs"):
        return
    left_out = covering.left_out(items)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
