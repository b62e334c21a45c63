"""The artifacts of this room's tests."""

import pytest

from tests.exports.artifacts import NAMES, Artifact, artifact


@pytest.fixture(params=NAMES)
def exported(request: pytest.FixtureRequest) -> Artifact:
    """Each kind of network in turn."""
    return artifact(request.param)


@pytest.fixture
def v1() -> Artifact:
    """The DINOv1 one, with its depth head."""
    return artifact("v1")
