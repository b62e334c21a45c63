"""Pictures and the page of a run: drawn from held-out images, kept over time, with colours that stay; one file that needs nothing else."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.datasets import open_dataset
from data.errors import InputError
from data.preprocess import Preprocess
from tests.training.conftest import write_images
from training.curves import MAX_POINTS, Curve, History
from training.loop import train
from training.picture import Album, principal_components
from training.probe import EvalEvery
from training.recipes import RECIPES
from training.run_log import read_steps
from training.run_page import inline

WORDS = {"recipe_name": "smoke", "source": "a <b>folder</b>", "revision": "abc123", "workers": 0}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, measured and drawn on labelled images of another folder."""
    root = tmp_path_factory.mktemp("run")
    for split, n in (("train", 3), ("val", 4)):
        for label in "ab":
            (root / "labelled" / split / label).mkdir(parents=True)
            write_images(root / "labelled" / split / label, n)
    (root / "images").mkdir()
    write_images(root / "images", 10)
    torch.set_num_threads(1)
    words = {**WORDS, "eval_data": str(root / "labelled"), "eval_every": EvalEvery(eval_every_steps=5)}
    recipe = replace(RECIPES["smoke_dinov2"], epochs=12)
    train(recipe, open_dataset(str(root / "images")), root / "run", **words)  # type: ignore[arg-type]
    return root / "run"


def test_pictures_are_kept_from_the_beginning_to_the_end(watched: Path) -> None:
    names = sorted(path.name for path in (watched / "pictures").glob("*.png"))
    steps = sorted({int(re.findall(r"\d+", name)[0]) for name in names})
    assert steps[0] == 1
    assert steps[-1] == 12
    assert 4 < len(steps) < 12, "many early, few late"
    assert len(names) == 2 * len(steps)
    for kind in ("attention", "pca"):
        assert (watched / f"{kind}.png").resolve() == (watched / "pictures" / f"step_000012_{kind}.png").resolve()
        assert cv2.imread(str(watched / f"{kind}.png")) is not None


def test_knn_is_measured_each_period_and_at_the_end(watched: Path) -> None:
    measured = [record["step"] + 1 for record in read_steps(watched / "log.jsonl") if "knn_top1" in record]
    assert measured == [5, 10, 12]


@pytest.mark.parametrize(("every", "steps"), [({}, 8), ({"eval_every_epochs": 0.25}, 2), ({"eval_every_steps": 3}, 3)])
def test_the_period_is_in_epochs_or_steps(every: dict[str, float], steps: int) -> None:
    assert EvalEvery(**every).steps(8) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "every", [{"eval_every_epochs": 0.0}, {"eval_every_epochs": math.nan}, {"eval_every_steps": 0}]
)
def test_no_period_is_refused(every: dict[str, float]) -> None:
    with pytest.raises(InputError, match="want"):
        EvalEvery(**every).steps(8)  # type: ignore[arg-type]


class Seen(HTMLParser):
    """Collects what a page would fetch, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_shows_the_run_and_fetches_nothing(watched: Path) -> None:
    text = (watched / "run.html").read_text()
    seen = Seen()
    seen.feed(text)
    assert all(link.startswith("data:image/jpeg;base64,") for link in seen.links)
    assert len(seen.links) >= 2
    assert "url(" not in text
    assert "script" not in seen.tags
    assert "b" in seen.tags
    assert "<b>folder</b>" not in text, "names are text, never markup"
    for shown in ("step 12 of 12", "k-NN top-1", "ibot", "koleo", "Learning rate", "images held out", "MFU"):
        assert shown in text
    start = json.loads((watched / "log.jsonl").read_text().splitlines()[0])["start"]
    assert start["data"] in text, "the recipe and the data's fingerprint"


def test_training_images_are_not_called_held_out(images: Path, tmp_path: Path) -> None:
    data = open_dataset(str(images))
    assert not Album(tmp_path, data, Preprocess(), data).held_out
    assert not Album(tmp_path, data.subset([0, 1]), Preprocess(), data).held_out
    assert Album(tmp_path, data.subset([0, 1]), Preprocess(), data.subset([2, 3])).held_out
    again = tmp_path / "link"
    again.symlink_to(images)
    other = open_dataset(f"{again}/")
    assert not Album(tmp_path, other.subset([0, 1]), Preprocess(), data).held_out, "the same files by another name"
    assert Album(tmp_path, other.subset([0, 1]), Preprocess(), data.subset([2, 3])).held_out


def test_a_network_without_attention_is_drawn_by_its_patches(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = open_dataset(str(images))
    album = Album(tmp_path, data, Preprocess(size_px=64, resize_px=64, whole_px=64), data)
    album.add(3, ResNet(ResNetSpec()))
    assert [path.name for path in sorted((tmp_path / "pictures").glob("*.png"))] == ["step_000003_pca.png"]
    assert inline(album, 3, "attention", 100) is None
    assert inline(album, 3, "pca", 100) is not None
    assert capfd.readouterr().err == "", "the page passes over what there is not"


@pytest.mark.parametrize("damage", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_damaged_components_of_the_picture_before_cost_its_colours_only(
    damage: bytes, images: Path, tmp_path: Path
) -> None:
    data = open_dataset(str(images))
    album = Album(tmp_path, data, Preprocess(size_px=32, resize_px=32, whole_px=32), data)
    backbone = ViT(ViTSpec(patch_px=8, width=24, depth=1, heads=3, img_px=32))
    album.add(1, backbone)
    sound = (tmp_path / "pictures" / ".components.npy").read_bytes()
    (tmp_path / "pictures" / ".components.npy").write_bytes(damage)
    album.add(2, backbone)
    assert album.steps() == [1, 2]
    assert (tmp_path / "pictures" / ".components.npy").read_bytes() == sound


def test_components_are_those_of_a_covariance_and_keep_their_sign() -> None:
    """Oracle: eigenvectors of the covariance; a mirrored network gets the colours it had."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 25, 8)) * np.array([9, 5, 3, 1, 1, 1, 1, 1])
    rows = patches.reshape(-1, 8) - patches.reshape(-1, 8).mean(axis=0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    wanted = rows @ vectors[:, ::-1][:, :3]
    found = principal_components(patches, None)
    np.testing.assert_allclose(np.abs(found.reshape(-1, 3)), np.abs(wanted), atol=1e-9)
    drifted = -patches + 0.01 * rng.normal(size=patches.shape)
    again = principal_components(drifted, found)
    assert (np.sign((again * found).sum(axis=(0, 1))) == 1).all()
    assert principal_components(np.ones((1, 4, 2)), None).shape == (1, 4, 3)


def test_a_long_curve_is_thinned_to_its_means() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(step, float(step % 2))
    assert len(curve.points) < 2 * MAX_POINTS
    assert sum(n for _, _, n in curve.points) == 100_000
    assert all(abs(y - 0.5) < 0.01 for _, y, n in curve.points if n > 1)


def test_a_log_is_read_on_from_where_it_stopped_and_survives_a_line_cut_short(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"start": {"step": 0}}\n{"step": 0, "loss": 2.0, "bad": null}\nno json\n{"step": 1, "lo')
    history = History(log)
    history.update()
    assert history.curves["loss"].points == [(0, 2.0, 1)]
    with log.open("a") as file:
        file.write('ss": 1.0}\n{"note": {"step": 1, "text": "look"}}\n')
    history.update()
    assert history.curves["loss"].points == [(0, 2.0, 1), (1, 1.0, 1)]
    assert history.notes == [(1, "look")]
    assert list(history.curves) == ["loss"]
