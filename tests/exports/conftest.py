"""The artifacts of this room's tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.exports.artifacts import NAMES, Artifact, artifact


@pytest.fixture(params=NAMES)
def exported(request: pytest.FixtureRequest) -> Artifact:
    """Each kind of network in turn."""
    return artifact(request.param)


@pytest.fixture
def v1() -> Artifact:
    """The DINOv1 one, with its depth head."""
    return artifact("v1")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, stripes across and along: 40 images to learn from, 12 to test."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, n in (("train", 20), ("val", 6)):
        for label in ("across", "along"):
            (folder / split / label).mkdir(parents=True)
            for k in range(n):
                wave = np.sin(np.arange(48) * rng.uniform(0.5, 1.5))[:, None] * 60 + rng.normal(128, 25, (48, 48))
                shades = np.clip(wave if label == "across" else wave.T, 0, 255).astype(np.uint8)
                Image.fromarray(shades).convert("RGB").save(folder / split / label / f"{k}.png")
    return folder
