"""Fixtures shared by all rooms' tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def reference() -> Path:
    """Golden tensors of the official implementations; they travel with the repository."""
    return ROOT / "tests" / "reference"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real labelled images that lie beside the checkout; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real image sets are absent: expected them in ../shared/data beside {ROOT.name}")
    return folder
