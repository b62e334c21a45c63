"""RGB-D sets: packed, as a CSV, and as two folders; and depth files that are none."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data.datasets import Dataset
from data.errors import InputError
from evaluators.rgbd import MeasuredDepth, open_depth, open_rgbd, read_depth_m


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


def nyud_folder(root: Path) -> Path:
    """NYUd as its users list it: three columns, leading slashes, a pair without depth."""
    lines = {"nyu_train.txt": [], "nyu_test.txt": []}
    for listed, scene, n in (("nyu_train.txt", "kitchen_0001", 2), ("nyu_test.txt", "bathroom", 1)):
        (root / scene).mkdir(parents=True)
        for i in range(n):
            depth = np.full((480, 640), 2000 + i, np.uint16)
            depth[45:471, 41:601] = 3000 + i
            cv2.imwrite(str(root / scene / f"rgb_{i:05d}.jpg"), np.full((480, 640, 3), 90, np.uint8))
            cv2.imwrite(str(root / scene / f"sync_depth_{i:05d}.png"), depth)
            lines[listed].append(f"/{scene}/rgb_{i:05d}.jpg /{scene}/sync_depth_{i:05d}.png 518.8579")
    lines["nyu_train.txt"].append("/kitchen_0001/rgb_00009.jpg None 518.8579")
    for listed, rows in lines.items():
        (root / listed).write_text("\n".join(rows) + "\n")
    return root


def kitti_folder(root: Path) -> Path:
    """KITTI: raw drives, annotated depth in 1/256 metres, Eigen's lists."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for listed, drive, frame in (("train", "0001", 5), ("train", "0001", 6), ("train", "0001", 7), ("test", "0002", 5)):
        image = f"2011_09_26/2011_09_26_drive_{drive}_sync/image_02/data/{frame:010d}.png"
        depth = f"2011_09_26_drive_{drive}_sync/proj_depth/groundtruth/image_02/{frame:010d}.png"
        for folder, name, array in (
            ("input", image, np.full((375, 1242, 3), 90, np.uint8)),
            ("gt_depth", depth, np.full((375, 1242), 20 * 256, np.uint16)),
        ):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / folder / name), array)
        lines[listed].append(f"{image} {depth} 721.5377\n")
        (root / f"kitti_eigen_{listed}.txt").write_text("".join(lines[listed]))
    return root


def test_nyud_is_trained_without_its_border_and_scored_in_eigens_crop(tmp_path: Path) -> None:
    opened = open_depth(f"nyud:{nyud_folder(tmp_path)}")
    train, val = opened.splits.train, opened.splits.val
    assert (len(train), len(val), opened.max_depth) == (2, 1, 10.0)
    assert "1 listed images have no depth (None) and were left out" in opened.splits.notes
    assert train.image(0).shape == (427, 565, 3)
    assert read_depth_m(train, 0).shape == (427, 565)
    assert val.image(0).shape == (480, 640, 3)
    scored = MeasuredDepth(val, [0], opened.scored)[0]
    assert set(np.unique(scored)) == {0.0, 3.0}
    assert (scored > 0).sum() == 426 * 560
    assert train.fingerprint() != Dataset(train._records).fingerprint()


def test_kitti_is_cut_to_its_lower_part_and_scored_in_gargs_crop(tmp_path: Path) -> None:
    opened = open_depth(f"kitti:{kitti_folder(tmp_path)}")
    assert opened.max_depth == 80.0
    assert opened.splits.val.image(0).shape == (352, 1216, 3)
    scored = MeasuredDepth(opened.splits.val, [0], opened.scored)[0]
    assert scored.shape == (352, 1216)
    assert scored.max() == 20.0
    rows, columns = np.flatnonzero(scored.any(axis=1)), np.flatnonzero(scored.any(axis=0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (143, 349, 43, 1172)


def test_a_list_that_is_missing_or_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no nyu_train\.txt or nyudepthv2_train_files_with_gt\.txt there"):
        open_depth(f"nyud:{tmp_path}")
    root = nyud_folder(tmp_path)
    (root / "nyu_test.txt").write_text("/bathroom/rgb_00007.jpg /bathroom/sync_depth_00007.png 518.8\n")
    with pytest.raises(InputError, match=r"no bathroom/rgb_00007\.jpg, which nyu_test\.txt lists"):
        open_depth(f"nyud:{root}")
    (root / "nyu_test.txt").write_text("/../rgb.jpg /x.png 518.8\n")
    with pytest.raises(InputError, match="climbs out"):
        open_depth(f"nyud:{root}")


def test_the_shared_stereo_tiles_are_disparities(shared_data: Path) -> None:
    opened = open_depth(shared_data / "stereo")
    assert opened.unit == "pixel of disparity"
    disparity = read_depth_m(opened.splits.train, 0)
    assert disparity.max() <= (opened.max_depth or 0)
