"""RGB-D sets: packed, as a CSV, and as two folders; and depth files that are none."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data.errors import InputError
from evaluators.rgbd import open_rgbd, read_depth_m


def write_pair(root: Path, name: str, depth: np.ndarray) -> None:
    for kind, array in (("images", np.zeros((8, 8, 3), np.uint8)), ("depth_mm", depth)):
        path = root / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), array)


def test_two_folders_with_the_same_names_are_a_set_in_metres(tmp_path: Path) -> None:
    for name, millimetres in (("train/a", 1500), ("train/b", 0), ("val/c", 65535)):
        write_pair(tmp_path, name, np.full((4, 6), millimetres, np.uint16))
    splits = open_rgbd(tmp_path)
    assert [item.name for item in splits.train.items] == ["train/a.png", "train/b.png"]
    np.testing.assert_allclose(read_depth_m(splits.train, 0), np.full((4, 6), 1.5))
    assert read_depth_m(splits.train, 1).max() == 0
    assert read_depth_m(splits.val, 0).max() == pytest.approx(65.535)


def test_an_image_without_depth_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "train/a", np.ones((4, 4), np.uint16))
    write_pair(tmp_path, "val/b", np.ones((4, 4), np.uint16))
    (tmp_path / "depth_mm" / "val" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png: nothing there; wanted the depth of images/val/b\.png"):
        open_rgbd(tmp_path)


def test_a_set_without_depth_says_what_it_has(tmp_path: Path) -> None:
    write_pair(tmp_path, "train/a", np.ones((4, 4), np.uint16))
    with pytest.raises(InputError, match=r"not every image has a depth map \(kinds: image\)"):
        open_rgbd(tmp_path / "images")


@pytest.mark.parametrize("depth", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), None])
def test_a_depth_file_that_is_none_is_one_clear_error(tmp_path: Path, depth: np.ndarray | None) -> None:
    write_pair(tmp_path, "train/a", np.ones((4, 4), np.uint16) if depth is None else depth)
    write_pair(tmp_path, "val/b", np.ones((4, 4), np.uint16))
    if depth is None:
        (tmp_path / "depth_mm" / "train" / "a.png").write_bytes(b"no png")
    with pytest.raises(InputError, match="depth map"):
        read_depth_m(open_rgbd(tmp_path).train, 0)


def test_the_shared_rooms_are_read_as_packed(shared_data: Path) -> None:
    splits = open_rgbd(shared_data / "rooms")
    assert (len(splits.train.items), len(splits.val.items)) == (315, 105)
    depth = read_depth_m(splits.val, 0)
    assert depth.shape == (128, 128)
    assert 0.3 < np.median(depth[depth > 0]) < 8
