"""Attention as segmentation: the published rule, overlaps by hand, PASCAL VOC as distributed, and input that is none."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from backbones.checkpoints import load_backbone, save_backbone
from data.errors import CheckFailed, InputError
from evaluators.attention import AttentionRun, AttentionSpec, evaluate, main, overlaps, run
from evaluators.attention_baselines import OneHead
from evaluators.attention_maps import cell_of_pixels, head_jaccards, top_mass
from evaluators.results import load_result
from evaluators.segmentation_data import open_masks
from runtimes.open import open_runtime
from tests.backbones.nets import load_reference
from tests.evaluators.fakes import small_checkpoint


def blob_folder(root: Path, n: int = 6, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """images/ and masks/: a bright rectangle on a dark ground, and where it is."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i in range(n):
            image, mask = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8), np.zeros((40, 48), np.uint8)
            top, left = (int(k) for k in rng.integers(4, 20, 2))
            image[top : top + 14, left : left + 18] += 150
            mask[top : top + 14, left : left + 18] = 255
            for kind, array in (("images", image), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / kind / split / f"{i}.png"), array)
    return root


def voc_folder(root: Path) -> Path:
    """Two images of VOC2012 as distributed, one with two objects and a void edge, the other without an object."""
    voc = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16, :16], mask[16:, 16:], mask[0] = 1, 2, 255
    for name, numbers in (("2007_000001", mask), ("2007_000002", np.zeros((32, 32), np.uint8))):
        cv2.imwrite(str(voc / "JPEGImages" / f"{name}.jpg"), np.full((32, 32, 3), 90, np.uint8))
        for folder in ("SegmentationObject", "SegmentationClass"):
            picture = Image.fromarray(numbers * (numbers == 255) + numbers * (numbers < 255))
            picture = picture.convert("P")
            picture.putdata(numbers.flatten().tolist())
            picture.save(voc / folder / f"{name}.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000002\n")
    return root


@pytest.mark.parametrize("keep", ["0.2", "0.6"])
def test_the_patches_kept_are_those_of_the_published_script(reference: Path, keep: str) -> None:
    backbone, io = load_reference(reference / "v1_vit")
    golden = load_file(reference / "linear_features" / "features.safetensors")[f"v1_attn_mask_keep{keep}"]
    attention = backbone.model.outputs(io["native/image"][:1])["attention"].detach().numpy()
    assert np.array_equal(top_mass(attention, float(keep))[0].astype(bool), golden)


def slow_jaccards(masks: np.ndarray, truth: np.ndarray, cells: np.ndarray) -> list[list[float]]:
    found = []
    for number in sorted(set(truth[truth > 0].tolist())):
        row = []
        for mask in masks:
            both = either = 0
            for y in range(truth.shape[0]):
                for x in range(truth.shape[1]):
                    if truth[y, x] < 0:
                        continue
                    kept = cells[y, x] >= 0 and mask.reshape(-1)[cells[y, x]] == 1
                    both += kept and truth[y, x] == number
                    either += kept or truth[y, x] == number
            row.append(both / either)
        found.append(row)
    return found


def test_overlaps_are_those_of_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (3, 4, 5)).astype(np.uint8)
    truth = rng.integers(-1, 4, (18, 23)).astype(np.int32)
    cells = cell_of_pixels((18, 23), 42, 8, (5, 5))[:, :]
    cells = np.where(cells >= 20, -1, cells)  # the last row of patches was cut off
    np.testing.assert_allclose(head_jaccards(masks, truth, cells), slow_jaccards(masks, truth, cells))
    assert head_jaccards(masks, np.zeros((18, 23), np.int32), cells).shape == (0, 3)


def test_pixels_beyond_the_last_whole_patch_belong_to_none() -> None:
    cells = cell_of_pixels((4, 4), 20, 8, (2, 2))  # pixel centres at 2.5, 7.5, 12.5, 17.5 of 20; patches end at 16
    assert cells.tolist() == [[0, 0, 1, -1], [0, 0, 1, -1], [2, 2, 3, -1], [-1, -1, -1, -1]]


def test_a_head_that_sees_the_things_beats_one_that_sees_the_middle(tmp_path: Path) -> None:
    images = open_masks(blob_folder(tmp_path / "data"), "objects")
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    with open_runtime(ckpt, device="cpu", threads=1) as runtime:
        manifest = runtime.manifest
    border, centre = (
        evaluate(overlaps(OneHead(name, manifest), images, AttentionSpec()), AttentionSpec())
        for name in ("border", "centre")
    )
    assert border.metrics["jaccard"].value > 0.4
    assert border.metrics["jaccard"].value > centre.metrics["jaccard"].value + 0.1
    assert border.metrics["jaccard_fixed_head"].value == border.metrics["jaccard"].value


def test_voc_counts_each_object_and_leaves_out_void_and_empty_images(tmp_path: Path) -> None:
    for data in (str(voc_folder(tmp_path)), f"voc2012:{tmp_path}"):
        images = open_masks(data, "objects")
        mask = images.mask(0)
        assert mask[0].tolist() == [-1] * 32
        assert sorted(np.unique(mask)) == [-1, 0, 1, 2]
        with open_runtime(small_checkpoint(tmp_path / "a.safetensors"), device="cpu", threads=1) as runtime:
            found = overlaps(runtime, images, AttentionSpec())
        assert [one.shape for one in found.jaccards] == [(2, 2)]
        assert found.without_objects == 1
    assert open_masks(data, "classes").classes[15] == "person"


def test_the_command_writes_result_pictures_and_predictions(tmp_path: Path) -> None:
    data, ckpt = blob_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    out = tmp_path / "results" / "attention.json"
    options = AttentionRun(ckpt=str(ckpt), data=str(data), out=out, threads=1, baselines=("border", "untrained"))
    result = run(options)
    assert load_result(out)["metrics"] == json.loads(json.dumps(result["metrics"]))
    assert set(result["metrics"]) == {"jaccard", "jaccard_head_mean", "jaccard_fixed_head"}
    assert result["metrics"]["jaccard_head_mean"]["value"] <= result["metrics"]["jaccard"]["value"]
    assert result["selected_on"].endswith("train")
    assert result["baselines"]["border"]["difference"]["value"] < 0
    with np.load(out.with_suffix(".predictions.npz")) as saved:
        assert saved["score"].mean() == pytest.approx(result["metrics"]["jaccard"]["value"])
        assert saved["kept"].shape == (6, 2, 4, 4)
    picture = cv2.imread(str(out.with_suffix(".png")))
    assert picture is not None
    assert picture.shape[0] > 6 * 192


def test_the_command_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, ckpt = blob_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    main(AttentionRun(ckpt=str(ckpt), data=str(data), threads=1), AttentionSpec())
    printed = capsys.readouterr().out
    assert "6 test and 6 training images; split 'val' of the set" in printed
    assert "jaccard*" in printed


class TestBadInput:
    def refusal(self, tmp_path: Path, data: Path | str, **options: object) -> str:
        ckpt = small_checkpoint(tmp_path / "a.safetensors")
        with pytest.raises(InputError) as caught:
            run(AttentionRun(ckpt=str(ckpt), data=str(data), threads=1, **options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_mask_of_another_size(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data")
        cv2.imwrite(str(data / "masks/val/0.png"), np.full((40, 40), 255, np.uint8))
        assert "val/0.png: its mask has 40 x 40 pixels, the image 48 x 40" in self.refusal(tmp_path, data)

    def test_an_image_without_a_mask_and_a_set_without_masks(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data")
        assert "not every image has a mask (kinds: image)" in self.refusal(tmp_path, data / "images")
        (data / "masks/val/0.png").unlink()
        assert "nothing there; wanted the mask of images/val/0.png" in self.refusal(tmp_path, data)

    def test_masks_in_colour_or_that_are_none(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data")
        cv2.imwrite(str(data / "masks/val/0.png"), np.zeros((40, 48, 3), np.uint8))
        assert "its mask is of mode RGB" in self.refusal(tmp_path, data)
        (data / "masks/val/0.png").write_bytes(b"no png")
        assert "no PNG that can be decoded" in self.refusal(tmp_path, data)

    def test_masks_without_a_single_object(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data", n=2, splits=("val",))
        for i in range(2):
            cv2.imwrite(str(data / f"masks/val/{i}.png"), np.full((40, 48), 3, np.uint8))
        as_alpha = self.refusal(tmp_path, data)
        assert "none of the 2 masks" in as_alpha
        assert "say --mask-values ids" in as_alpha
        ids = open_masks(data, "objects", "ids")
        assert set(np.unique(ids.mask(0))) == {3}

    def test_numbers_without_a_single_object_are_not_told_to_be_read_as_numbers(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data", n=2, splits=("val",))
        for i in range(2):
            cv2.imwrite(str(data / f"masks/val/{i}.png"), np.full((40, 48), 255, np.uint8))
        told = self.refusal(tmp_path, data, mask_values="ids")
        assert "none of the 2 masks" in told
        assert "say --mask-values foreground" in told
        assert "--mask-values ids" not in told

    def test_a_split_that_is_not_there_and_numbers_out_of_range(self, tmp_path: Path) -> None:
        data = blob_folder(tmp_path / "data")
        assert "no split 'test'; its splits are: train, val" in self.refusal(tmp_path, data, val_split="test")
        with pytest.raises(InputError, match="--mass 0"):
            AttentionSpec(mass=0.0)
        with pytest.raises(InputError, match="--size is"):
            AttentionSpec(size=0)

    def test_several_processes(self, tmp_path: Path) -> None:
        assert "run in one process" in self.refusal(tmp_path, tmp_path, processes=2)

    def test_a_network_without_attention(self, tmp_path: Path) -> None:
        from tests.evaluators.fakes import MeanColourRuntime

        images = open_masks(blob_folder(tmp_path / "data"), "objects")
        with pytest.raises(InputError, match="this network has no attention, only embedding, patches"):
            overlaps(MeanColourRuntime(), images, AttentionSpec())


def test_the_shared_stamps_have_one_thing_each(shared_data: Path) -> None:
    images = open_masks(shared_data / "stamps", "objects")
    mask = images.mask(0, (128, 128))
    assert set(np.unique(mask)) == {0, 1}
    assert 0.02 < mask.mean() < 0.7


@pytest.mark.parametrize(
    "weight", ["patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "norm.weight"]
)
def test_damaged_weights_are_refused_even_where_the_attention_comes_before_them(tmp_path: Path, weight: str) -> None:
    sound = load_backbone(small_checkpoint(tmp_path / "sound.safetensors"))
    sound.model.state_dict()[weight].view(-1)[-1] = float("nan")
    save_backbone(tmp_path / "damaged.safetensors", sound.model, replace(sound.manifest, weights_sha256=""))
    out = tmp_path / "out.json"
    options = AttentionRun(
        ckpt=str(tmp_path / "damaged.safetensors"), data=str(blob_folder(tmp_path / "data")), out=out
    )
    with pytest.raises(CheckFailed, match=r"attention or embedding of 'val/0\.png' is not finite"):
        run(options)
    assert not out.exists()
