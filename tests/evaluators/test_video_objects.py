"""Video object segmentation: golden propagation, the challenge's scores by hand, DAVIS as distributed, and videos that are none."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.errors import InputError
from data.preprocess import Preprocess
from evaluators.results import load_result
from evaluators.video_data import open_videos
from evaluators.video_objects import (
    VideoObjectsRun,
    VideoObjectsSpec,
    follow,
    frame_features,
    frame_hw,
    main,
    run,
)
from evaluators.video_propagation import PropagationSpec, final_labels, propagate
from evaluators.video_scores import contour, contour_f, region_jaccard, series_figures
from tests.evaluators.fakes import MeanColourRuntime, small_checkpoint


@pytest.mark.parametrize(("variant", "neighbourhood"), [("nb", 2), ("nonb", 0)])
def test_labels_travel_as_in_the_published_script(reference: Path, variant: str, neighbourhood: int) -> None:
    io = load_file(reference / "davis" / "io.safetensors")
    spec = PropagationSpec(previous=2, neighbourhood=neighbourhood)
    soft = list(propagate(list(io["features"].numpy()), io["first_seg_onehot"][0], spec))
    torch.testing.assert_close(torch.stack(soft), io[f"{variant}/soft_segs"])
    labels = np.stack([final_labels(one, (48, 72)) for one in soft])
    assert np.array_equal(labels, io[f"{variant}/final_labels"].numpy())


@pytest.mark.parametrize(
    ("hw", "patch_px", "wanted"),
    [
        ((480, 854), 16, (480, 832)),
        ((480, 854), 8, (480, 832)),
        ((1080, 1920), 16, (480, 832)),
        ((854, 480), 16, (832, 480)),
        ((480, 910), 8, (480, 896)),
        ((480, 854), 14, (476, 854)),
        ((128, 128), 16, (480, 480)),
    ],
)
def test_frames_are_seen_at_the_published_size(hw: tuple[int, int], patch_px: int, wanted: tuple[int, int]) -> None:
    assert frame_hw(hw, 480, patch_px) == wanted


def square(top: int, left: int, side: int = 20, hw: tuple[int, int] = (100, 100)) -> np.ndarray:
    mask = np.zeros(hw, bool)
    mask[top : top + side, left : left + side] = True
    return mask


class TestScores:
    def test_the_region_of_two_squares(self) -> None:
        assert region_jaccard(square(10, 10), square(10, 10)) == 1
        assert region_jaccard(square(10, 10), square(10, 20)) == pytest.approx(200 / 600)
        assert region_jaccard(square(10, 10), square(60, 60)) == 0
        empty = np.zeros((100, 100), bool)
        assert region_jaccard(empty, empty) == 1
        assert region_jaccard(empty, square(1, 1)) == 0

    def test_contours_match_within_their_tolerance_and_no_farther(self) -> None:
        reach = math.ceil(0.008 * math.hypot(100, 100))
        assert reach == 2
        truth = square(40, 40)
        assert contour_f(square(40, 40), truth) == 1
        assert contour_f(square(40, 42), truth) == 1
        assert contour_f(square(40, 43), truth) < 1
        assert contour_f(square(5, 5), square(60, 60)) == 0
        empty = np.zeros((100, 100), bool)
        assert contour_f(empty, empty) == 1
        assert contour_f(empty, truth) == contour_f(truth, empty) == 0

    def test_a_contour_is_where_a_pixel_differs_from_those_right_and_below(self) -> None:
        mask = np.zeros((4, 4), bool)
        mask[1:3, 1:3] = True
        assert contour(mask).astype(int).tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
        mask[:] = True
        assert not contour(mask).any()

    def test_recall_and_decay_of_a_series(self) -> None:
        mean, recall, decay = series_figures(np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]))
        assert mean == pytest.approx(0.65)
        assert recall == pytest.approx(5 / 8)
        # quarters end at frames 1, 3, 4, 6, 8 (counted from 1): the first is 1 to 3, the last 6 to 8
        assert decay == pytest.approx(0.9 - 0.4)
        assert series_figures(np.array([0.7])) == (pytest.approx(0.7), 1.0, 0.0)


def clip_folder(root: Path, names: tuple[str, ...] = ("a", "b"), n: int = 5, masks: str = "masks") -> Path:
    """Clips in which a red and a blue square drift over green."""
    for shift, name in enumerate(names):
        for kind in ("images", masks):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            image, mask = np.full((64, 96, 3), (40, 160, 40), np.uint8), np.zeros((64, 96), np.uint8)
            for number, (colour, top, left) in enumerate((((40, 40, 200), 8, 8), ((200, 40, 40), 40, 60)), start=1):
                left += (2 + shift) * k * (1 if number == 1 else -1)
                image[top : top + 16, left : left + 16] = colour
                mask[top : top + 16, left : left + 16] = number
            cv2.imwrite(str(root / "images" / name / f"{k:05d}.png"), image)
            cv2.imwrite(str(root / masks / name / f"{k:05d}.png"), mask)
    return root


def davis_folder(root: Path) -> Path:
    """DAVIS-2017 as distributed: one listed video, one that is not, palette masks."""
    clips = clip_folder(root / "clips", ("bear", "unlisted"))
    davis = root / "DAVIS"
    for name in ("bear", "unlisted"):
        for kind, folder, suffix in (("images", "JPEGImages", ".jpg"), ("masks", "Annotations", ".png")):
            (davis / folder / "480p" / name).mkdir(parents=True)
            for path in sorted((clips / kind / name).iterdir()):
                target = davis / folder / "480p" / name / f"{path.stem}{suffix}"
                if suffix == ".jpg":
                    cv2.imwrite(str(target), cv2.imread(str(path)))
                else:
                    picture = Image.open(path)
                    picture.putpalette([k % 256 for k in range(768)])
                    picture.save(target)
    (davis / "ImageSets/2017").mkdir(parents=True)
    (davis / "ImageSets/2017/val.txt").write_text("bear\n")
    return davis


QUICK = VideoObjectsSpec(size=64)


def test_colours_carry_coloured_squares_where_a_copy_falls_behind(tmp_path: Path) -> None:
    data, ckpt = clip_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    out = tmp_path / "results" / "objects.json"
    options = VideoObjectsRun(ckpt=str(ckpt), data=str(data), out=out, threads=1, baselines=("copy", "colour"))
    result = run(options, QUICK)
    assert load_result(out)["metrics"].keys() == {
        *("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    }
    metrics = {name: baseline["metrics"] for name, baseline in result["baselines"].items()}
    assert metrics["colour"]["j_mean"]["value"] > metrics["copy"]["j_mean"]["value"] + 0.1
    assert metrics["copy"]["j_decay"]["value"] > 0.2
    assert result["metrics"]["jf_mean"]["n"] == 4
    with Image.open(out.with_suffix(".masks") / "a" / "00003.png") as picture:
        assert picture.mode == "P"
        assert set(np.unique(np.asarray(picture))) == {0, 1, 2}
        assert picture.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # type: ignore[index]
    with np.load(out.with_suffix(".predictions.npz")) as saved:
        assert saved["names"].tolist() == ["a/1", "a/2", "b/1", "b/2"]
        assert saved["score"].mean() == pytest.approx(result["metrics"]["jf_mean"]["value"])
    picture = cv2.imread(str(out.with_suffix(".png")))
    assert picture is not None


def test_the_command_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, ckpt = clip_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    main(VideoObjectsRun(ckpt=str(ckpt), data=str(data), threads=1), QUICK)
    printed = capsys.readouterr().out
    assert "10 test images; all its videos" in printed
    assert "jf_mean*" in printed


def test_davis_is_read_as_distributed_and_its_last_frame_does_not_count(tmp_path: Path) -> None:
    davis = davis_folder(tmp_path)
    for data in (davis, f"davis:{tmp_path}"):
        videos = open_videos(data)
        assert [(video.name, len(video)) for video in videos.videos] == [("bear", 5)]
        found = follow(None, videos.videos[0], videos.score_last, QUICK)
        assert found.numbers == (1, 2)
        assert found.j.shape == (2, 3)
    assert open_videos(clip_folder(tmp_path / "own", ("a",))).score_last


def test_frames_that_are_not_padded_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind / "clip").mkdir(parents=True)
        for k in (1, 2, 3, 10, 11):
            cv2.imwrite(str(tmp_path / kind / "clip" / f"{k}.png"), np.ones((8, 8), np.uint8))
    (video,) = open_videos(tmp_path).videos
    assert [video.frame_name(k) for k in range(len(video))] == ["1", "2", "3", "10", "11"]


def test_the_preset_divides_red_by_the_scripts_deviation(tmp_path: Path) -> None:
    video = open_videos(clip_folder(tmp_path, ("a",))).videos[0]
    runtime = MeanColourRuntime(preprocess=Preprocess(size_px=32, resize_px=32, whole_px=32))
    runtime.manifest.architecture["patch_px"] = 32
    plain = next(frame_features(runtime, video, VideoObjectsSpec(), (32, 32)))
    published = next(frame_features(runtime, video, VideoObjectsSpec(preset="dino"), (32, 32)))
    np.testing.assert_allclose(published[:, 0], plain[:, 0] * 0.229 / 0.228, rtol=1e-5)
    np.testing.assert_allclose(published[:, 1:], plain[:, 1:], rtol=1e-5)


class TestBadInput:
    def refusal(self, tmp_path: Path, data: Path) -> str:
        ckpt = small_checkpoint(tmp_path / "a.safetensors")
        with pytest.raises(InputError) as caught:
            run(VideoObjectsRun(ckpt=str(ckpt), data=str(data), threads=1), QUICK)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_video_of_one_frame(self, tmp_path: Path) -> None:
        assert "a: a video of 1 frame; wanted at least 2" in self.refusal(tmp_path, clip_folder(tmp_path / "d", n=1))

    def test_an_empty_first_mask_and_none_at_all(self, tmp_path: Path) -> None:
        data = clip_folder(tmp_path / "d")
        cv2.imwrite(str(data / "masks/a/00000.png"), np.zeros((64, 96), np.uint8))
        assert "a: the mask of its first frame is empty" in self.refusal(tmp_path, data)
        (data / "masks/a/00000.png").unlink()
        assert "a: its first frame 00000 has no mask" in self.refusal(tmp_path, data)

    def test_only_the_first_mask(self, tmp_path: Path) -> None:
        data = clip_folder(tmp_path / "d", n=2)
        (data / "masks/a/00001.png").unlink()
        assert "a: no frame but the first has a mask" in self.refusal(tmp_path, data)

    def test_a_mask_or_a_frame_of_another_size(self, tmp_path: Path) -> None:
        data = clip_folder(tmp_path / "d")
        cv2.imwrite(str(data / "masks/a/00002.png"), np.ones((64, 90), np.uint8))
        assert "its mask has 90 x 64 pixels, the frame 96 x 64" in self.refusal(tmp_path, data)
        cv2.imwrite(str(data / "images/a/00002.png"), np.zeros((64, 90, 3), np.uint8))
        assert "frame 00002 has 90 x 64 pixels, the first 96 x 64" in self.refusal(tmp_path, data)

    def test_a_frame_that_cannot_be_read(self, tmp_path: Path) -> None:
        data = clip_folder(tmp_path / "d")
        (data / "images/a/00002.png").write_bytes(b"no image")
        assert "a video needs all its frames" in self.refusal(tmp_path, data)

    def test_a_set_without_videos(self, tmp_path: Path) -> None:
        data = clip_folder(tmp_path / "d")
        assert "no videos with masks (kinds: image)" in self.refusal(tmp_path, data / "images")

    def test_a_mask_that_davis_has_and_the_folder_has_not(self, tmp_path: Path) -> None:
        davis = davis_folder(tmp_path)
        (davis / "Annotations/480p/bear/00002.png").unlink()
        assert "bear/00002.png: nothing there, though DAVIS has a mask for every frame" in self.refusal(tmp_path, davis)

    def test_a_list_that_climbs_out(self, tmp_path: Path) -> None:
        davis = davis_folder(tmp_path)
        (davis / "ImageSets/2017/val.txt").write_text("../../secret\n")
        with pytest.raises(InputError, match="climbs out"):
            open_videos(davis)

    def test_settings_out_of_range(self) -> None:
        for bad in ({"top_k": 0}, {"temperature": 0.0}, {"previous": -1}, {"size": 0}):
            with pytest.raises(InputError):
                VideoObjectsSpec(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["clips", "vclips"])
def test_the_shared_clips_are_videos(shared_data: Path, name: str) -> None:
    videos = open_videos(shared_data / name)
    assert len(videos.videos) == {"clips": 14, "vclips": 12}[name]
    assert {len(video) for video in videos.videos} == {20}
    found = follow(None, videos.videos[0], videos.score_last, QUICK)
    assert found.j.shape[1] == 19
