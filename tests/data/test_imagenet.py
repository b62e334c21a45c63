"""ImageNet as distributed: class folders, flat validation images with the development kit's or Kaggle's labels, and tars."""

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from data.datasets import open_dataset
from data.errors import InputError

WNIDS = ("n01440764", "n01443537", "n02114367")
"""In the order of their names; the development kit counts them otherwise."""
ILSVRC_IDS = {"n02114367": 1, "n01440764": 2, "n01443537": 3}
VAL = ("n01443537", "n02114367", "n01440764", "n02114367")


def picture(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path.with_suffix(".jpg")), np.full((16, 16, 3), colour, np.uint8))
    path.with_suffix(".jpg").rename(path)
    return path


def train_folders(root: Path) -> None:
    for k, wnid in enumerate(WNIDS):
        for i in range(2):
            picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", 60 * k + i)


def flat_val(root: Path) -> list[Path]:
    return [picture(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", 10 * i) for i in range(1, len(VAL) + 1)]


def devkit(folder: Path) -> None:
    """As published: the leaves in an order of their own, inner nodes of the hierarchy behind them."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in ILSVRC_IDS.items()]
    rows += [(1001, "n00001740", "entity", "that which is", 2)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    truth = "".join(f"{ILSVRC_IDS[wnid]}\n" for wnid in VAL)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def val_labels(data: str) -> dict[str, str | None]:
    return {Path(item.name).name: item.label for item in open_dataset(data, "val").items}


NAMED = {f"ILSVRC2012_val_{i:08d}.JPEG": wnid for i, wnid in enumerate(VAL, start=1)}


def test_flat_validation_images_get_the_development_kits_labels(tmp_path: Path) -> None:
    train_folders(tmp_path)
    flat_val(tmp_path)
    devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    data = f"imagenet:{tmp_path}"
    assert val_labels(data) == NAMED
    train = open_dataset(data, "train")
    assert train.classes == sorted(WNIDS)
    assert train.items[0].name == "train/n01440764/n01440764_0.JPEG"
    assert train.image(0).shape == (16, 16, 3)
    assert open_dataset(data).fingerprint() == open_dataset(data).fingerprint()


def test_a_comma_in_the_path_parts_no_sets(tmp_path: Path) -> None:
    for name in ("train/n01440764/a.JPEG", "val/n01440764/b.JPEG"):
        path = tmp_path / "here, there" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    assert len(open_dataset(f"imagenet:{tmp_path / 'here, there'}")) == 2


def test_kaggles_layout(tmp_path: Path) -> None:
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    train_folders(base)
    flat_val(base)
    (base / "test").mkdir()
    rows = "".join(f"{name[:-5]},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" for name, wnid in NAMED.items())
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    for root in (tmp_path, tmp_path / "ILSVRC"):
        assert val_labels(f"imagenet:{root}") == NAMED
        assert len(open_dataset(f"imagenet:{root}", "train")) == 6


def test_class_folders_need_no_labels_beside_them(tmp_path: Path) -> None:
    train_folders(tmp_path)
    for number, wnid in enumerate(VAL, start=1):
        picture(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    assert val_labels(f"imagenet:{tmp_path}") == NAMED


def test_tars_are_read_as_they_come(tmp_path: Path) -> None:
    train_folders(tmp_path / "unpacked")
    flat_val(tmp_path / "unpacked")
    devkit(tmp_path)
    (tmp_path / "train").mkdir()
    for wnid in WNIDS:
        with tarfile.open(tmp_path / "train" / f"{wnid}.tar", "w") as archive:
            for path in sorted((tmp_path / "unpacked" / "train" / wnid).iterdir()):
                archive.add(path, path.name)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for path in sorted((tmp_path / "unpacked" / "val").iterdir()):
            archive.add(path, path.name)
    found = open_dataset(f"imagenet:{tmp_path}")
    assert val_labels(f"imagenet:{tmp_path}") == NAMED
    assert [item.label for item in found.items if item.split == "train"] == [wnid for wnid in WNIDS for _ in range(2)]
    assert found.image(0).shape == (16, 16, 3)


def test_what_is_missing_or_odd_is_said_in_one_line(tmp_path: Path) -> None:
    def refusal(root: Path) -> str:
        with pytest.raises(InputError) as caught:
            open_dataset(f"imagenet:{root}")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no images; wanted train/WNID/*.JPEG and val/" in refusal(tmp_path / "nothing")
    flat_val(tmp_path / "flat")
    assert "ILSVRC2012_validation_ground_truth.txt is not there" in refusal(tmp_path / "flat")
    devkit(tmp_path / "flat")
    (tmp_path / "flat" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    assert "no label for validation image '00000003' (2 are listed)" in refusal(tmp_path / "flat")
    (tmp_path / "flat" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n77\n")
    assert "class 77 is not in meta.mat" in refusal(tmp_path / "flat")
    (tmp_path / "flat" / "meta.mat").write_bytes(b"no matrix" * 40)
    assert "meta.mat: cannot be read" in refusal(tmp_path / "flat")
    (tmp_path / "flat" / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    assert "wanted ImageId,PredictionString" in refusal(tmp_path / "flat")
    picture(tmp_path / "odd" / "train" / "goldfish" / "1.JPEG", 1)
    assert "goldfish: no class of ImageNet; wanted folders such as n01440764" in refusal(tmp_path / "odd")
    picture(tmp_path / "v2" / "val" / "17" / "1.JPEG", 1)
    assert "17: no class of ImageNet" in refusal(tmp_path / "v2")
