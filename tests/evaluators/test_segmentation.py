"""Linear segmentation: the head it trains is the one that is served, figures by hand, benchmarks as distributed, bad masks."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.checkpoints import CheckpointError
from backbones.heads import SegmentationHead, SegmentationHeadSpec, load_segmentation_head
from data.errors import InputError
from data.preprocess import Preprocess
from evaluators.layers import MirroredRuntime, with_layers
from evaluators.results import load_result
from evaluators.segmentation import SegmentationRun, evaluate, main, run
from evaluators.segmentation_cuts import Cut, CutImages, CutMasks, WindowTable, random_cuts, window_starts
from evaluators.segmentation_data import MaskedImages, open_masks
from evaluators.segmentation_probe import (
    SegmentationTable,
    Targets,
    TrainSpec,
    channel_scaling,
    features_at,
    folded,
    train_head,
)
from evaluators.segmentation_protocol import SegmentationSpec
from evaluators.segmentation_scores import Counts, class_iou, count, miou_difference, segmentation_metrics
from runtimes.open import open_runtime
from tests.evaluators.fakes import MeanColourRuntime, small_checkpoint

QUICK = SegmentationSpec(lr=(3e-2,), steps=60, batch=8)
GRID = 4


def parts_folder(root: Path, n_train: int = 12, n_val: int = 4) -> Path:
    """images/SPLIT/*.png with masks/SPLIT/*.png: quarters in one of three colours, each a class; a void border."""
    rng = np.random.default_rng(0)
    colours = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])
    for split, n in (("train", n_train), ("val", n_val)):
        for i in range(n):
            mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((20, 24), int))
            image = np.clip(colours[mask] + rng.integers(-20, 20, (40, 48, 3)), 0, 255)
            mask[:2] = 255
            for kind, array in (("images", image), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / kind / split / f"{i}.png"), array.astype(np.uint8))
    (root / "classes.txt").write_text("blue\ngreen\nred\n")
    return root


def ade_folder(root: Path) -> Path:
    """ADE20K as distributed, in small: 0 is unlabelled, classes count from 1."""
    ade = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (ade / kind / split).mkdir(parents=True)
        for i in range(6):
            mask = np.kron(np.array([[0, 1], [150, 1]]), np.ones((16, 16), int)).astype(np.uint8)
            cv2.imwrite(
                str(ade / "images" / split / f"ADE_{split}_{i:08d}.jpg"), np.repeat(mask[:, :, None], 3, axis=2)
            )
            cv2.imwrite(str(ade / "annotations" / split / f"ADE_{split}_{i:08d}.png"), mask)
    return root


def class_table(n: int, seed: int, hw: tuple[int, int] = (16, 16)) -> SegmentationTable:
    """Patches whose channels tell the class at their place, on scales far apart."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (n, GRID, GRID))
    patches = np.eye(3)[classes.reshape(n, -1)] * (1, 30, 0.1) + rng.normal(size=(n, GRID * GRID, 3)) * 0.02
    masks = [cv2.resize(one.astype(np.float32), hw[::-1], interpolation=cv2.INTER_NEAREST) for one in classes]
    names = tuple(f"{seed}-{i}" for i in range(n))
    return SegmentationTable(names, names, patches.astype(np.float32), [one.astype(np.int32) for one in masks])


def test_the_head_at_drawn_pixels_is_the_head_on_its_enlarged_map() -> None:
    generator = torch.Generator().manual_seed(0)
    (h, w), (height, width) = (3, 5), (17, 24)
    head = SegmentationHead(SegmentationHeadSpec(n_classes=4, width_in=6))
    patches = torch.randn(2, h * w, 6, generator=generator)
    whole = F.interpolate(head.logits(patches, (h, w)), size=(height, width), mode="bilinear", align_corners=False)
    y, x = (one.flatten() for one in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    places = torch.stack([(y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5], dim=1)
    at = head.linear(features_at(patches, (h, w), places[None].repeat(2, 1, 1)))
    torch.testing.assert_close(at.transpose(1, 2).unflatten(2, (height, width)), whole, atol=1e-5, rtol=1e-5)


def test_the_saved_head_takes_features_as_they_come() -> None:
    table = class_table(8, 0)
    mean, spread = channel_scaling(table.patches_nND, np.arange(8))
    head = SegmentationHead(SegmentationHeadSpec(n_classes=3, width_in=3))
    patches = torch.from_numpy(table.patches_nND)
    wanted = head.logits((patches - mean) / spread, table.grid)
    torch.testing.assert_close(folded(head, mean, spread).logits(patches, table.grid), wanted, atol=1e-4, rtol=1e-4)


def test_targets_are_labelled_pixels_with_their_own_class() -> None:
    table = class_table(4, 0, hw=(12, 20))
    table.masks[1][:] = -1  # type: ignore[index]
    table.masks[2][:, :10] = -1  # type: ignore[index]
    targets = Targets.of(table, np.arange(4), 3, seed=0)
    assert targets.rows.tolist() == [0, 2, 3]
    for own, row in enumerate(targets.rows):
        y, x = (((targets.places[own] + 0.5) / torch.tensor([GRID / 12, GRID / 20])) - 0.5).round().long().T.numpy()
        assert np.array_equal(table.masks[row][y, x], targets.classes[own].numpy())
        assert row != 2 or x.min() >= 10
    with pytest.raises(InputError, match="0-0: its mask holds class 2, and there are 2"):
        Targets.of(table, np.arange(4), 2, seed=0)


def test_it_learns_what_the_patches_tell_and_the_figure_says_so() -> None:
    train, test = class_table(24, 0), class_table(6, 1)
    found = evaluate(train, [test], ("a", "b", "c"), QUICK)
    assert found.measurement.metrics["miou"].value > 0.8
    again = evaluate(train, [test, test], ("a", "b", "c"), QUICK)
    assert np.mean([np.mean(a == b) for a, b in zip(found.predicted, again.predicted, strict=True)]) > 0.999


def test_the_learning_rate_is_chosen_blind_to_the_test() -> None:
    spec = SegmentationSpec(lr=(1e-7, 3e-2), steps=60, batch=8)
    found = evaluate(class_table(24, 0), [class_table(6, 1)], ("a", "b", "c"), spec).measurement
    assert found.chosen["lr"] == 3e-2
    shuffled = class_table(6, 1)
    shuffled = SegmentationTable(shuffled.names, shuffled.groups, shuffled.patches_nND, shuffled.masks[::-1])
    assert evaluate(class_table(24, 0), [shuffled], ("a", "b", "c"), spec).measurement.grid == found.grid


class TestScores:
    TRUTH = np.array([[0, 0, 1, 1], [0, 0, 1, -1]])
    FOUND = np.array([[0, 1, 1, 1], [0, 0, 0, 2]])

    def test_iou_is_taken_over_summed_pixels_without_void(self) -> None:
        counted = count(self.FOUND, self.TRUTH, 4)
        assert counted.tolist() == [[3, 2, 0, 0], [4, 3, 0, 0], [4, 3, 0, 0]]
        counts = Counts.of([counted, counted])
        iou = class_iou(counts.columns.sum(axis=0).astype(float))
        assert iou[:2].tolist() == [3 / 5, 2 / 4]
        assert np.isnan(iou[2:]).all()
        metrics = segmentation_metrics(counts, np.arange(2))
        assert metrics["miou"].value == pytest.approx((3 / 5 + 2 / 4) / 2)
        assert metrics["pixel_accuracy"].value == pytest.approx(5 / 7)
        assert metrics["class_accuracy"].value == pytest.approx((3 / 4 + 2 / 3) / 2)

    def test_the_difference_of_two_models_is_paired(self) -> None:
        ours = Counts.of([count(self.TRUTH, self.TRUTH, 4)] * 5)
        theirs = Counts.of([count(self.FOUND, self.TRUTH, 4)] * 5)
        value, (low, high) = miou_difference(ours, theirs, np.arange(5))
        assert value == pytest.approx(1 - (3 / 5 + 2 / 4) / 2)
        assert low == pytest.approx(high)


def test_the_command_writes_result_masks_picture_and_a_head_that_serves_the_same_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, ckpt = parts_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    out, head_path = tmp_path / "results" / "seg.json", tmp_path / "seg.safetensors"
    options = SegmentationRun(
        ckpt=str(ckpt), data=str(data), out=out, cache_dir=tmp_path / "cache", threads=1, baselines=("colour",)
    )
    main(options, QUICK, head_path)
    assert "miou*" in capsys.readouterr().out
    result = load_result(out)
    assert result["data"]["classes"] == ["blue", "green", "red"]
    assert set(result["per_class"]["miou"]) == {"blue", "green", "red"}
    assert result["baselines"]["colour"]["metrics"]["miou"]["value"] > 0.7
    low, high = result["baselines"]["colour"]["difference"]["ci95"]
    assert low <= result["baselines"]["colour"]["difference"]["value"] <= high
    assert cv2.imread(str(out.with_suffix(".png"))) is not None
    saved = cv2.imread(str(out.with_suffix(".masks") / "val" / "0.png"), cv2.IMREAD_UNCHANGED)
    assert saved.shape[:2] == (40, 48)

    with open_runtime(ckpt, device="cpu", threads=1, segmentation_head=head_path) as runtime:
        _, manifest = load_segmentation_head(head_path, runtime.manifest.weights_sha256)
        assert manifest.classes == ("blue", "green", "red")
        assert manifest.metrics["miou"]["value"] == result["metrics"]["miou"]["value"]
        served = runtime.run(np.zeros((1, 3, 32, 32), np.float32), ("classes",))["classes"]
        assert (served.shape, served.dtype) == ((1, 32, 32), np.int32)
    with pytest.raises(CheckpointError, match="fits the backbone"):
        open_runtime(small_checkpoint(tmp_path / "b.safetensors", seed=1), segmentation_head=head_path)


def test_several_scales_a_mirror_and_the_same_seed(tmp_path: Path) -> None:
    data, ckpt = parts_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    options = SegmentationRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1)
    spec = SegmentationSpec(lr=(3e-2,), steps=20, scales=(1.0, 1.5), mirror=True)
    first, again = run(options, spec), run(options, spec)
    assert first["metrics"] == again["metrics"]
    assert "scales 1 1.5 and mirrored" in first["protocol"]


def test_a_mirrored_view_gives_each_patch_its_own_features_again() -> None:
    runtime = MeanColourRuntime()
    runtime.manifest.architecture["patch_px"] = 16
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    plain, mirrored = (one.run(pixels, ("patches",))["patches"] for one in (runtime, MirroredRuntime(runtime)))
    np.testing.assert_allclose(plain, mirrored, atol=1e-6)


def test_four_layers_are_for_torch_alone_and_need_four_blocks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exported files and servers do"):
        with_layers(MeanColourRuntime(), (0, 1), norm=True)
    data, ckpt = parts_folder(tmp_path / "data", 2, 2), small_checkpoint(tmp_path / "a.safetensors")
    options = SegmentationRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1)
    with pytest.raises(InputError, match="needs a ViT of 4 blocks or more"):
        run(options, SegmentationSpec(lr=(3e-2,), steps=5, layers="last4"))


def test_ade20k_is_read_as_distributed(tmp_path: Path) -> None:
    for data in (ade_folder(tmp_path), f"ade20k:{tmp_path}"):
        images = open_masks(data, "classes")
        assert len(images.class_names()) == 150
        assert sorted(np.unique(images.mask(0))) == [-1, 0, 149]
    splits = {item.split for item in images.dataset.items}
    assert splits == {"train", "val"}
    with pytest.raises(InputError, match="has classes, no objects"):
        open_masks(data, "objects")


class TestBadInput:
    def refusal(self, tmp_path: Path, data: Path) -> str:
        ckpt = small_checkpoint(tmp_path / "a.safetensors")
        with pytest.raises(InputError) as caught:
            run(SegmentationRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1), QUICK)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_class_out_of_range(self, tmp_path: Path) -> None:
        data = parts_folder(tmp_path / "d")
        cv2.imwrite(str(data / "masks/train/0.png"), np.full((40, 48), 7, np.uint8))
        assert "train/0.png: its mask holds class 7, and there are 3 (0 to 2)" in self.refusal(tmp_path, data)
        (data / "classes.txt").unlink()
        assert open_masks(data, "classes").class_names() == tuple(f"class {k}" for k in range(8))

    def test_a_mask_of_another_size_or_void_everywhere(self, tmp_path: Path) -> None:
        data = parts_folder(tmp_path / "d", n_val=1)
        cv2.imwrite(str(data / "masks/val/0.png"), np.full((40, 48), 255, np.uint8))
        assert "none of the 1 test masks has a labelled pixel" in self.refusal(tmp_path, data)
        cv2.imwrite(str(data / "masks/val/0.png"), np.zeros((20, 24), np.uint8))
        assert "its mask has 24 x 20 pixels, the image 48 x 40" in self.refusal(tmp_path, data)

    def test_a_jpeg_as_mask_and_one_class(self, tmp_path: Path) -> None:
        data = parts_folder(tmp_path / "d")
        (data / "classes.txt").write_text("thing\n")
        assert "tell 1 class apart" in self.refusal(tmp_path, data)
        (data / "classes.txt").unlink()
        encoded = cv2.imencode(".jpg", np.zeros((40, 48), np.uint8))[1]
        (data / "masks/train/0.png").write_bytes(encoded.tobytes())
        assert "its mask is a JPEG" in self.refusal(tmp_path, data)

    @pytest.mark.parametrize(
        "bad", [{"lr": ()}, {"steps": 0}, {"scales": ()}, {"scales": (0.0,)}, {"size": -1}, {"held_out": 9}]
    )
    def test_settings_out_of_range(self, bad: dict) -> None:
        with pytest.raises(InputError):
            SegmentationSpec(**bad)


def test_the_shared_rooms_have_fifteen_classes(shared_data: Path) -> None:
    images = open_masks(shared_data / "rooms", "classes")
    assert images.class_names()[:2] == ("floor", "wall")
    mask = images.mask(0, images.image_hw(0))
    assert mask.shape == (128, 128)
    assert -1 <= mask.min() <= mask.max() <= 14


def test_training_spec_makes_the_same_head_twice() -> None:
    table = class_table(8, 0)
    spec = TrainSpec(lr=1e-2, weight_decay=1e-4, steps=5, batch=4, seed=3)
    one, other = (train_head(table, np.arange(8), SegmentationHeadSpec(3, 3), spec) for _ in range(2))
    assert torch.equal(one.linear.weight, other.linear.weight)


class TestCrops:
    SPEC = SegmentationSpec(lr=(3e-2,), steps=60, batch=8, seen="crops", size=32, crops=2)

    def images(self, tmp_path: Path) -> MaskedImages:
        return open_masks(parts_folder(tmp_path / "data"), "classes")

    def test_masks_are_cut_as_their_images_are(self, tmp_path: Path) -> None:
        """Each class has a colour of its own, which scaling, mirroring and filling must not part from it."""
        images = self.images(tmp_path)
        cuts = [replace(cut, recolour=None) for cut in random_cuts(images, 32, 3, (0.5, 2.0), seed=0)]
        cut = CutImages(images, cuts, 32, Preprocess())
        masks, mirrored = CutMasks(cut, range(len(cut))), {cut.mirrored for cut in cuts}
        assert (len(cut), mirrored) == (3 * 16, {False, True})
        colours = np.array([(40, 40, 200), (40, 200, 40), (200, 40, 40)])  # as cv2 wrote them: blue, green, red
        for row in range(len(cut)):
            image, mask = cut.image(row).astype(int), masks[row]
            assert image.shape == (32, 32, 3)
            nearest = np.abs(image[:, :, None] - colours).sum(axis=3).argmin(axis=2)
            assert (nearest == mask)[mask >= 0].mean() > 0.85  # the rest lies where colours meet
            assert mask.max() >= 0
        small = [row for row, one in enumerate(cuts) if min(one.scaled_hw) < 32]
        assert small
        assert all((masks[row] == -1).any() for row in small)

    def test_crops_are_the_same_each_time_and_others_for_another_seed(self, tmp_path: Path) -> None:
        images = self.images(tmp_path)
        first, again, other = (random_cuts(images, 32, 2, (0.5, 2.0), seed) for seed in (0, 0, 1))
        assert first == again != other
        prints = {CutImages(images, cuts, 32, Preprocess()).fingerprint() for cuts in (first, other)}
        assert len(prints) == 2

    def test_no_crop_that_one_class_fills_is_taken_where_others_can_be_had(self, tmp_path: Path) -> None:
        images = self.images(tmp_path)
        cut = CutImages(images, random_cuts(images, 32, 4, (1.5, 1.5), seed=0), 32, Preprocess())
        filled = 0
        for mask in CutMasks(cut, range(len(cut))):
            counts = np.bincount(mask[mask >= 0], minlength=3)
            filled += counts.max() > 0.75 * counts.sum()
        assert filled < len(cut) / 3  # by chance it would be more than half

    @pytest.mark.parametrize(
        ("side", "starts"), [(512, [0]), (500, [0]), (600, [0, 88]), (853, [0, 341]), (1200, [0, 341, 682, 688])]
    )
    def test_windows_slide_by_the_published_stride_and_end_at_the_border(self, side: int, starts: list[int]) -> None:
        assert window_starts(side, 512, 341) == starts

    def test_a_window_over_the_whole_image_is_the_whole_view(self, tmp_path: Path) -> None:
        """A square image at the window's size: one window, and the same logits as a whole view gives."""
        head = SegmentationHead(SegmentationHeadSpec(n_classes=3, width_in=3))
        table = class_table(1, 0, hw=(16, 16))
        windows = WindowTable(
            table.names, table.groups, table.masks, table.patches_nND, (((0, Cut(0, (32, 32), 0, 0)),),), 32
        )
        window, whole = (one.logit_map(head, 0)((32, 32), slice(0, 3)) for one in (windows, table))
        torch.testing.assert_close(window, whole)

    def test_where_windows_overlap_the_mean_of_their_logits_counts(self) -> None:
        head = SegmentationHead(SegmentationHeadSpec(n_classes=2, width_in=2))
        with torch.no_grad():
            head.linear.weight.copy_(torch.eye(2))
            head.linear.bias.zero_()
        patches = np.zeros((2, 4, 2), np.float32)
        patches[0, :, 0], patches[1, :, 0] = 1.0, 3.0
        cuts = ((0, Cut(0, (4, 6), 0, 0)), (1, Cut(0, (4, 6), 0, 2)))
        table = WindowTable(("a",), ("a",), [np.zeros((4, 6), np.int32)], patches, (cuts,), 4)
        found = table.logit_map(head, 0)((4, 6), slice(0, 1))[0]
        assert found[0].tolist() == pytest.approx([1, 1, 2, 2, 3, 3])

    def test_it_learns_from_crops_and_tests_by_windows(self, tmp_path: Path) -> None:
        data, ckpt = parts_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
        (data / "images/val/3.png").write_bytes(b"no picture")
        options = SegmentationRun(
            ckpt=str(ckpt), data=str(data), cache_dir=tmp_path / "cache", threads=1, baselines=("colour",)
        )
        spec = replace(self.SPEC, scales=(1.0, 1.5), mirror=True)
        with pytest.raises(InputError, match="cannot be decoded"):
            run(options, spec)
        cv2.imwrite(str(data / "images/val/3.png"), np.full((40, 48, 3), 90, np.uint8))
        result = run(options, spec)
        assert result["baselines"]["colour"]["metrics"]["miou"]["value"] > 0.6
        assert (result["data"]["n_train"], result["data"]["n_val"]) == (12, 4)
        assert "2 random crops of each image" in result["protocol"]
        assert "a window sliding by 0.666 of its side, at scales 1 1.5 and mirrored" in result["protocol"]
        assert run(options, spec)["metrics"] == result["metrics"]

    def test_presets_state_the_published_protocol(self) -> None:
        for name, px, stride in (("dinov2", 512, 341), ("dinov2-ms", 640, 320)):
            preset = SegmentationSpec(preset=name)  # type: ignore[arg-type]
            assert preset.seen == "crops"
            assert preset.size == pytest.approx(px, abs=6)  # the nearest whole patches of 14 px
            assert preset.stride == pytest.approx(stride / px)
        assert SegmentationSpec(preset="dinov2-ms").scales == (1.0, 1.32, 1.73)
