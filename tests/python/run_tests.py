"""Runs the tests of this folder, or says which module is missing; ctest then counts them skipped."""

import importlib.util
import sys
from pathlib import Path

for name in ("numpy", "pytest"):
    if importlib.util.find_spec(name) is None:
        print(f"skipped: the module {name} is not installed")
        sys.exit(0)

import pytest  # noqa: E402

sys.exit(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).parent)]))
