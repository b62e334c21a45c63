"""RGB-D sets: packed, as a CSV, and as two folders; and depth files that are none."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.datasets import Dataset
from data.errors import InputError
from evaluators.rgbd import MeasuredDepth, open_depth, open_rgbd, read_depth_m


def write_pair(root: Path, name: str, depth: np.ndarray, image_hw: tuple[int, int] = (8, 8)) -> None:
    for kind, array in (("images", np.zeros((*image_hw, 3), np.uint8)), ("depth_mm", depth)):
        path = root / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), array)


def test_two_folders_with_the_same_names_are_a_set_in_metres(tmp_path: Path) -> None:
    for name, millimetres in (("train/a", 1500), ("train/b", 0), ("val/c", 65535)):
        write_pair(tmp_path, name, np.full((4, 6), millimetres, np.uint16), image_hw=(8, 12))
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


@pytest.mark.parametrize(
    ("shape", "fits"), [((8, 8), True), ((5, 5), True), ((16, 17), True), ((8, 6), False), ((4, 8), False)]
)
def test_depth_of_another_shape_than_its_image_is_refused_of_another_size_is_not(
    tmp_path: Path, shape: tuple[int, int], fits: bool
) -> None:
    write_pair(tmp_path, "train/a", np.full(shape, 2000, np.uint16))
    write_pair(tmp_path, "val/b", np.full(shape, 2000, np.uint16))
    train = open_rgbd(tmp_path).train
    if fits:
        assert read_depth_m(train, 0).shape == shape
    else:
        with pytest.raises(
            InputError, match=f"its depth map has {shape[1]} x {shape[0]} pixels, the image 8 x 8; wanted one shape"
        ):
            read_depth_m(train, 0)


def test_depth_of_a_photograph_that_is_shown_turned_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "train/a", np.full((8, 16), 2000, np.uint16))
    write_pair(tmp_path, "val/b", np.full((8, 8), 2000, np.uint16))
    photograph = Image.new("RGB", (16, 8))
    exif = photograph.getexif()
    photograph.save(tmp_path / "images" / "train" / "a.png", exif=exif)
    assert read_depth_m(open_rgbd(tmp_path).train, 0).shape == (8, 16)
    exif[0x0112] = 6
    photograph.save(tmp_path / "images" / "train" / "a.png", exif=exif)
    with pytest.raises(InputError, match="the image 8 x 16; wanted one shape"):
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


def nyud_mat_folder(root: Path) -> Path:
    """NYUd as its authors distribute it, with five images: MATLAB's axes reversed, scenes by address, numbers from 1."""
    h5py = pytest.importorskip("h5py")
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        images_HWCN = np.zeros((480, 640, 3, 5), np.uint8)
        depth_HWN = np.zeros((480, 640, 5), np.float32)
        for i in range(5):
            images_HWCN[..., i] = (10, 20, 30 + i)
            images_HWCN[100, 200, :, i] = 255
            depth_HWN[100:300, 200:400, i] = 2.5 + i
        file["images"], file["rawDepths"] = images_HWCN.T, depth_HWN.T
        file["depths"] = np.ones((5, 640, 480), np.float32)
        file["scenes"] = np.empty((1, 5), h5py.ref_dtype)
        for i, name in enumerate(("office_0001", "office_0001", "cafe_0002", "cafe_0003", "bath_0001")):
            text = file.create_dataset(f"#refs#/{i}", data=np.array([[ord(letter)] for letter in name], np.uint16))
            file["scenes"][0, i] = text.ref
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [2], [4], [5]]), "testNdxs": np.array([[3]])})
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


def test_the_lists_of_nyud_win_over_the_file_that_their_test_images_were_cut_from(tmp_path: Path) -> None:
    root = nyud_mat_folder(nyud_folder(tmp_path))
    assert len(open_depth(f"nyud:{root}").splits.train) == 2
    (root / "nyu_train.txt").unlink()
    assert len(open_depth(f"nyud:{root}").splits.train) == 4


def test_nyud_as_its_authors_distribute_it(tmp_path: Path) -> None:
    opened = open_depth(f"nyud:{nyud_mat_folder(tmp_path)}")
    train, val = opened.splits.train, opened.splits.val
    assert ([item.row["scene"] for item in train.items], val.items[0].row["scene"]) == (
        ["office_0001", "office_0001", "cafe_0003", "bath_0001"],
        "cafe_0002",
    )
    whole = val.image(0)
    assert (whole.shape, whole[240, 320].tolist(), whole[100, 200].tolist()) == ((480, 640, 3), [10, 20, 32], [255] * 3)
    assert whole[6].max() == whole[:, 632].max() == 0
    assert whole[7, 7].tolist() == whole[473, 631].tolist() == [10, 20, 32]
    assert train.image(3)[100 - 45, 200 - 43].tolist() == [255] * 3
    depth = read_depth_m(train, 2)
    assert (depth.shape, depth[100 - 45, 200 - 43], depth[99 - 45, 200 - 43]) == ((427, 565), 5.5, 0)
    assert MeasuredDepth(val, [0], opened.scored)[0].max() == 4.5
    assert any("795 images of the labelled part" in note for note in opened.splits.notes)
    assert len({train.fingerprint(), val.fingerprint(), train.subset([0, 1]).fingerprint()}) == 3


def test_a_damaged_nyud_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(root: Path) -> str:
        with pytest.raises(InputError) as raised:
            open_depth(f"nyud:{root}")
        return str(raised.value)

    root = nyud_mat_folder(tmp_path / "a")
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [6]]), "testNdxs": np.array([[3]])})
    assert "names image 6 of the 5" in refusal(root)
    (root / "splits.mat").write_bytes(b"no matrix" * 40)
    assert "splits.mat: cannot be read" in refusal(root)
    (root / "splits.mat").unlink()
    assert "splits.mat: nothing there" in refusal(root)
    root = nyud_mat_folder(tmp_path / "b")
    (root / "nyu_depth_v2_labeled.mat").write_bytes(b"cut short" * 99)
    assert "nyu_depth_v2_labeled.mat: no readable HDF5 file" in refusal(root)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "is HDF5; pip install h5py" in refusal(root)


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
