"""Benchmarks as they are distributed, each through the command's own parser: `python -m evaluators.NAME --data BENCHMARK:ROOT`."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.errors import InputError
from evaluators import parity
from evaluators.parity import ParityRun, ParitySpec
from evaluators.presets import evaluator_cli
from evaluators.results import load_result
from evaluators.segmentation import SegmentationRun
from evaluators.segmentation_data import CITYSCAPES, open_masks
from evaluators.segmentation_views import open_parts
from tests.data.test_imagenet import NAMED, devkit, flat_val, picture, train_folders
from tests.evaluators.fakes import small_checkpoint
from tests.evaluators.test_attention import voc_folder
from tests.evaluators.test_copies import copydays
from tests.evaluators.test_retrieval import oxford_folder
from tests.evaluators.test_rgbd import kitti_folder, nyud_folder, nyud_mat_folder
from tests.evaluators.test_segmentation import ade_folder
from tests.evaluators.test_video_actions import ucf_folder
from tests.evaluators.test_video_objects import davis_folder


def imagenet_folder(root: Path) -> Path:
    train_folders(root)
    flat_val(root)
    devkit(root / "ILSVRC2012_devkit_t12" / "data")
    return root


def paris_folder(root: Path) -> Path:
    """The layout of Revisited Oxford under the other name."""
    folder = (oxford_folder(root) / "roxford5k").rename(root / "rparis6k")
    (folder / "gnd_roxford5k.pkl").rename(folder / "gnd_rparis6k.pkl")
    return root


def voc_with_training(root: Path) -> Path:
    lists = voc_folder(root) / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000001\n2007_000002\n")
    (lists / "val.txt").write_text("2007_000001\n")
    return root


def cityscapes_folder(root: Path) -> Path:
    """Two cities; masks of ids as annotated: road, car, licence plate (counts as nothing), unlabelled."""
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        for i in range(2):
            ids = np.kron(np.array([[7, 26], [34 - 33 * i, 0]]), np.ones((16, 32), int)).astype(np.uint8)
            stem = f"{city}_{i:06d}_000019"
            for path, array in (
                (root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", np.dstack([ids * 5] * 3)),
                (root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", ids),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), array)
    return root


def measured(tmp_path: Path, name: str, data: str, words: str) -> dict[str, Any]:
    """The result that the command writes."""
    ckpt, out = small_checkpoint(tmp_path / "a.safetensors"), tmp_path / "out" / "result.json"
    common = ["--ckpt", str(ckpt), "--data", data, "--out", str(out), "--cache-dir", "None", "--threads", "1"]
    evaluator_cli(importlib.import_module(f"evaluators.{name}").main, [*common, *words.split()])
    return load_result(out)


@pytest.mark.parametrize(
    ("name", "benchmark", "folder", "words", "headline", "n"),
    [
        ("knn", "imagenet", imagenet_folder, "--k 1 3", "top1", 4),
        ("logistic", "imagenet", imagenet_folder, "--C 1", "top1", 4),
        ("copies", "copydays", copydays, "--size-px 32", "map_strong", 6),
        ("retrieval", "roxford5k", oxford_folder, "--size-px 64 --scales 1", "map_medium", 2),
        ("retrieval", "rparis6k", paris_folder, "--preset dino --size-px 64", "map_medium", 2),
        ("segmentation", "ade20k", ade_folder, "--lr 0.03 --steps 2 --batch 4", "miou", 6),
        ("segmentation", "voc2012", voc_with_training, "--lr 0.03 --steps 2 --batch 4", "miou", 1),
        ("segmentation", "cityscapes", cityscapes_folder, "--lr 0.03 --steps 2 --batch 4", "miou", 2),
        ("attention", "voc2012", voc_folder, "", "jaccard", 1),
        ("depth", "nyud", nyud_folder, "--lr 0.01 --steps 3 --group-by none", "abs_rel", 1),
        ("depth", "nyud", nyud_mat_folder, "--lr 0.01 --steps 3 --group-by none", "abs_rel", 1),
        ("depth", "kitti", kitti_folder, "--lr 0.01 --steps 3 --group-by none", "abs_rel", 1),
        ("video_objects", "davis", davis_folder, "--size 64", "jf_mean", 2),
        ("video_actions", "ucf101", ucf_folder, "--frames 2 --classifier knn", "top1", 4),
    ],
)
def test_a_benchmark_as_distributed(
    tmp_path: Path, name: str, benchmark: str, folder: Callable[[Path], Path], words: str, headline: str, n: int
) -> None:
    data = f"{benchmark}:{folder(tmp_path / 'benchmark')}"
    result = measured(tmp_path, name, data, words)
    assert (result["evaluator"], result["data"]["source"]) == (name, data)
    assert (result["headline"], result["metrics"][result["headline"]]["n"]) == (headline, n)


@pytest.mark.parametrize(
    ("benchmark", "folder", "n"),
    [
        ("imagenet", imagenet_folder, 4),
        ("copydays", copydays, 5),
        ("roxford5k", oxford_folder, 6),
        ("rparis6k", paris_folder, 6),
        ("ade20k", ade_folder, 6),
        ("voc2012", voc_with_training, 1),
        ("cityscapes", cityscapes_folder, 2),
        ("nyud", nyud_folder, 1),
        ("kitti", kitti_folder, 1),
        ("davis", davis_folder, 5),
        ("ucf101", ucf_folder, 4),
    ],
)
def test_two_runtimes_can_be_compared_on_the_test_images_of_every_benchmark(
    tmp_path: Path, benchmark: str, folder: Callable[[Path], Path], n: int
) -> None:
    ckpt, data = str(small_checkpoint(tmp_path / "a.safetensors")), f"{benchmark}:{folder(tmp_path / 'benchmark')}"
    found = parity.run(ckpt, ckpt, ParityRun(data=data, threads=1), ParitySpec(evaluators=()))
    assert (found["features"]["embedding"]["n"], found["complaints"]) == (n, [])


@pytest.mark.parametrize(
    "line", ["{name}", "/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png", "JPEGImages/{name}.jpg x.png"]
)
def test_the_larger_training_list_of_voc_names_images_or_paths(tmp_path: Path, line: str) -> None:
    voc = voc_with_training(tmp_path) / "VOCdevkit" / "VOC2012"
    (voc / "SegmentationClass").rename(voc / "SegmentationClassAug")
    names = ["2007_000001", "2007_000002"]
    listed = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    listed.write_text("".join(f"{line.format(name=name)}\n" for name in names))
    images = open_masks(voc, "classes")
    assert [item.name for item in images.dataset.items if item.split == "train"] == names
    assert images.source == "PASCAL VOC 2012, SegmentationClassAug"
    for leads_out in ("/../secret.jpg x.png", "//secret.jpg x.png", "../secret"):
        listed.write_text(f"{leads_out}\n")
        with pytest.raises(InputError, match=r"trainaug\.txt: .* climbs out of the set's folder"):
            open_masks(voc, "classes")


def test_voc_learns_from_the_semantic_boundaries_dataset_where_it_is_there(tmp_path: Path) -> None:
    voc = voc_folder(tmp_path) / "VOCdevkit" / "VOC2012"
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000002\n")
    (lists / "val.txt").write_text("2007_000001\n")
    added = tmp_path / "benchmark_RELEASE" / "dataset"
    (added / "cls").mkdir(parents=True)
    classes = np.kron(np.array([[0, 20], [7, 0]]), np.ones((10, 12), int)).astype(np.uint8)
    for name in ("2008_000009", "2007_000001"):  # the second is one of VOC's validation
        savemat(added / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": classes, "CategoriesPresent": [7, 20]}})
        picture(added / "img" / f"{name}.jpg", 90)
    (added / "train.txt").write_text("2008_000009\n")
    (added / "val.txt").write_text("2007_000001\n")
    images = open_masks(f"voc2012:{tmp_path}", "classes")
    assert [(item.name, item.split) for item in images.dataset.items] == [
        ("2007_000002", "train"), ("2008_000009", "train"), ("2007_000001", "val"),
    ]  # fmt: skip
    np.testing.assert_array_equal(images.mask(1), classes)
    assert images.mask(2).max() == 2, "VOC's own masks test"
    (added / "cls" / "2008_000009.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut short")
    with pytest.raises(InputError, match=r"2008_000009: its mask is no \.mat file"):
        open_masks(f"voc2012:{tmp_path}", "classes").mask(1)


def test_cityscapes_ids_become_its_nineteen_classes(tmp_path: Path) -> None:
    images = open_masks(f"cityscapes:{cityscapes_folder(tmp_path)}", "classes")
    assert (len(images.classes), images.classes[0], images.classes[13]) == (19, "road", "car")
    masks = [images.mask(row) for row in (0, 1)]
    assert [sorted(np.unique(mask)) for mask in masks] == [[-1, 0, 13], [-1, 0, 13]]
    assert masks[0][0, 0] == 0
    assert masks[0][0, -1] == 13
    with pytest.raises(InputError, match="has classes, no objects"):
        open_masks(tmp_path, "objects")
    next(iter((tmp_path / "gtFine").rglob("*.png"))).unlink()
    with pytest.raises(InputError, match=r"labelIds\.png: nothing there"):
        open_masks(tmp_path, "classes")


def grouped(data: object, group_by: str = "auto") -> str | None:
    """The column that ties a set's images together for segmentation."""
    return open_parts(SegmentationRun(ckpt="-", data=str(data), group_by=group_by)).splits.group_column


def own_set_like_ade(root: Path, highest: int) -> Path:
    """images/ and annotations/ with training/ and validation/, as ADE20K's, under names of one's own and with a class 0."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(6):
            mask = np.kron(np.array([[0, 1], [highest, 255]]), np.ones((16, 16), int)).astype(np.uint8)
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), np.repeat(mask[:, :, None], 3, axis=2))
            cv2.imwrite(str(root / "annotations" / split / f"{i}.png"), mask)
    return root


@pytest.mark.parametrize("highest", [2, 200])
def test_folders_like_those_of_ade20k_are_ones_own_where_no_name_shows_it(tmp_path: Path, highest: int) -> None:
    data = own_set_like_ade(tmp_path / "data", highest)
    result = measured(tmp_path, "segmentation", str(data), "--lr 0.03 --steps 2 --batch 4")
    assert (result["data"]["n_classes"], result["data"]["n_val"]) == (highest + 1, 6)
    assert any(
        f"if it is ADE20K, whose classes count from 1, name it ade20k:{data}" in note for note in result["notes"]
    )
    assert open_masks(data, "objects").mask(0).max() > 0, "its numbers may be objects, too"


def test_a_set_that_is_called_ade20k_and_is_not_is_one_clear_error(tmp_path: Path) -> None:
    images = open_masks(f"ade20k:{own_set_like_ade(tmp_path, 200)}", "classes")
    with pytest.raises(
        InputError, match=r"holds 200; wanted 0 for nothing, 1 to 150, .* a set of your own without ade20k:"
    ):
        images.mask(0)


@pytest.mark.parametrize("mark", ["images", "list", "folder"])
def test_ade20k_is_known_by_its_names(tmp_path: Path, mark: str) -> None:
    root = own_set_like_ade(tmp_path / ("ADEChallengeData2016" if mark == "folder" else "data"), 150)
    if mark == "images":
        for kind in ("images", "annotations"):
            (root / kind / "validation" / "0.png").rename(root / kind / "validation" / "ADE_val_00000001.png")
    elif mark == "list":
        (root / "objectInfo150.txt").write_text("")
    images = open_masks(root, "classes")
    assert (images.source, len(images.classes), images.notes) == ("ADE20K", 150, ())
    assert open_masks(root.parent if mark == "folder" else root, "classes").source == "ADE20K"


def test_images_of_one_city_are_held_out_and_drawn_together(tmp_path: Path) -> None:
    cities = cityscapes_folder(tmp_path)
    assert [grouped(cities), grouped(cities, "none")] == ["scene", None]
    shutil.rmtree(tmp_path / "leftImg8bit" / "train" / "bochum")
    assert grouped(cities) is None, "the images of a single city are all there is to choose on"


def test_intervals_are_over_images_where_there_are_too_few_scenes_to_draw(tmp_path: Path) -> None:
    """Of a single test city all resamples would be alike, and the interval of no width."""
    data = f"cityscapes:{cityscapes_folder(tmp_path / 'cities')}"
    result = measured(tmp_path, "segmentation", data, "--lr 0.03 --steps 2 --batch 4")
    assert result["data"]["grouped_by"] == "scene"
    assert "the test part is of 1 group only: intervals are over its single items, and too narrow" in result["notes"]


def test_predicted_masks_of_cityscapes_are_in_the_numbers_of_its_own(tmp_path: Path) -> None:
    """So that its authors' evaluation reads them: road is 7, a car 26."""
    data = f"cityscapes:{cityscapes_folder(tmp_path / 'cities')}"
    measured(tmp_path, "segmentation", data, "--lr 0.03 --steps 2 --batch 4")
    (first, *_) = sorted((tmp_path / "out" / "result.masks").rglob("*.png"))
    assert set(np.unique(np.asarray(Image.open(first))).tolist()) == {7, 26} <= set(CITYSCAPES)


def test_two_views_of_a_room_are_of_one_scene(shared_data: Path) -> None:
    """As for depth, which reads the same set."""
    assert grouped(shared_data / "rooms") == "objects"


def test_cityscapes_with_training_ids_alone_has_the_same_classes(tmp_path: Path) -> None:
    annotated = open_masks(cityscapes_folder(tmp_path / "ids"), "classes")
    root = cityscapes_folder(tmp_path / "trained")
    for row, path in enumerate(sorted((root / "gtFine").rglob("*.png"))):
        trained = np.where(annotated.mask(row) < 0, 255, annotated.mask(row)).astype(np.uint8)
        cv2.imwrite(str(path).replace("labelIds", "labelTrainIds"), trained)
    for path in (root / "gtFine").rglob("*labelIds.png"):
        path.unlink()
    images = open_masks(root, "classes")
    assert images.classes == annotated.classes
    for row in range(len(images.dataset)):
        np.testing.assert_array_equal(images.mask(row), annotated.mask(row))


def test_a_probe_of_imagenet_is_tested_on_every_further_set(tmp_path: Path) -> None:
    root, extra = imagenet_folder(tmp_path / "imagenet"), tmp_path / "extra"
    wnids = sorted(set(NAMED.values()))
    for number, wnid in enumerate(wnids):
        picture(extra / "v2" / "imagenetv2-matched-frequency-format-val" / str(number) / "a.jpeg", 50 * number)
        for kind in ("a", "r", "sketch/sketch"):
            picture(extra / kind / wnid / "a.jpg", 50 * number)
        picture(extra / "c" / "weather" / "snow" / "3" / wnid / "a.JPEG", 50 * number)
    labels = [[wnids.index(wnid)] for wnid in NAMED.values()]
    (extra / "real").write_text(json.dumps([*labels[:-1], []]))
    sets = " ".join(f"imagenet-{kind}:{extra / kind}" for kind in ("v2", "real", "a", "r", "sketch", "c"))
    words = f"--lr 0.01 --epochs 1 --min-steps 5 --select-on val --test-data {sets}"
    metrics = measured(tmp_path, "linear", f"imagenet:{root}", words)["metrics"]
    assert {name: metrics[f"{name}_top1"]["n"] for name in ("v2", "real", "a", "r", "sketch")} == {
        "v2": 3, "real": 3, "a": 3, "r": 3, "sketch": 3,
    }  # fmt: skip
    assert metrics["c_mce"]["n"] == 3
