"""Runs on every form of data and with both makers of views: exact when resumed, and told apart."""

from pathlib import Path

import pytest
import torch

import data.streams
from backbones.checkpoints import load_backbone
from data.errors import InputError
from data.loader import Maker
from data.streams import Stream, open_images
from tests.data.pictures import encode, noise
from tests.data.test_streams import write_tar
from training.loop import train
from training.recipes import RECIPES
from training.run_log import read_steps

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "none"}
SMOKE = RECIPES["smoke"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in three shards, one of them corrupt, and a shard that was cut."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        files = {f"{k}.png": encode(noise(40 + k, 50 - k, 12 * shard + k), "PNG") for k in range(12)}
        write_tar(root / f"s-{shard}.tar", files | ({"3.png": b"no picture"} if shard == 0 else {}))
    whole = (root / "s-1.tar").read_bytes()
    (root / "s-3.tar").write_bytes(whole[:700])
    return root


@pytest.mark.parametrize("views", ["workers", "device"])
def test_a_run_on_shards_resumes_with_the_same_bits(
    shards: Path, tmp_path: Path, views: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(shards)
    assert isinstance(images, Stream)
    monkeypatch.setattr(data.streams, "BLOCK", 5)
    whole = train(SMOKE, images, tmp_path / "whole", views=views, workers=0, **WORDS)
    for stop, workers in ((3, 0), (6, 1), (None, 0)):
        parts = train(SMOKE, images, tmp_path / "parts", views=views, workers=workers, stop_at_step=stop, **WORDS)
    one, other = load_backbone(whole), load_backbone(parts)
    assert one.manifest.step == other.manifest.step == 8
    assert one.manifest.weights_sha256 == other.manifest.weights_sha256
    assert one.manifest.data_fingerprint == images.fingerprint()
    losses = [[record["loss"] for record in read_steps(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    listed = (tmp_path / "whole" / "skipped.json").read_text()
    assert "s-0/3" in listed
    assert "s-3.tar" in listed


def test_a_run_goes_on_with_the_views_it_began_with(shards: Path, tmp_path: Path) -> None:
    images = open_images(shards)
    train(SMOKE, images, tmp_path, workers=0, stop_at_step=1, **WORDS)
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another views"):
        train(SMOKE, images, tmp_path, workers=0, views="device", **WORDS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == saved
