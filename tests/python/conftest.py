"""Finds the package in the source tree and, unless one is named, a library that was built."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runtime" / "python"))


def pytest_configure(config):
    if "KVTIER_LIBRARY" not in os.environ:
        built = sorted(ROOT.glob("build/*/runtime/libkvtier.so"), key=lambda p: p.stat().st_mtime)
        if built:
            os.environ["KVTIER_LIBRARY"] = str(built[-1])


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(11)
