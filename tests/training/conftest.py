"""Pictures without meaning, that decode and crop like real ones."""

from pathlib import Path

import cv2
import numpy as np
import pytest


def write_images(folder: Path, n: int, width: int = 48, height: int = 40) -> Path:
    """`n` smooth colourful JPEGs, 00.jpg on."""
    rng = np.random.default_rng(0)
    for i in range(n):
        small = rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.jpg"), cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images: one step of eight an epoch."""
    return write_images(tmp_path_factory.mktemp("images"), 10, 80, 72)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small images without labels, one of them broken."""
    root = write_images(tmp_path_factory.mktemp("images"), 20)
    (root / "07.jpg").write_bytes(b"not a picture")
    return root
