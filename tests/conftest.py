import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `pytest` finds the four files from wherever it is started


def pytest_configure(config):
    config.addinivalue_line("markers", "notebook: runs notebook.ipynb, up to 3 minutes")


@pytest.fixture
def root():
    return ROOT
