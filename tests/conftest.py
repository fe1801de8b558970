import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # of tiny tests: on a busy machine two are five times slower
sys.path.insert(0, str(ROOT))  # so that `pytest` finds the four files from wherever it is started


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes over five seconds; run with -m slow")


def pytest_collection_modifyitems(config, items):
    """`python -m pytest` leaves the slow tests to `python -m pytest -m slow`, or to their names."""
    if config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def root():
    return ROOT
