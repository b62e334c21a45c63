"""Video actions: UCF-101 as distributed, folders of clips, frames in their places, and videos that are none."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.decode import DecodeError
from data.errors import InputError
from evaluators import video_frames
from evaluators.extract import FeatureTable
from evaluators.results import load_result
from evaluators.video_actions import VideoActionsRun, VideoActionsSpec, check_videos, main, pooled, run
from evaluators.video_frames import Video, VideoFrames, open_actions, places, read_frames
from evaluators.view_batches import ViewSpec, decoded_batches
from tests.evaluators.fakes import SMALL, small_checkpoint

COLOURS = {"Run": (200, 40, 40), "Swim": (40, 40, 200)}


def write_video(path: Path, shades: list[tuple[int, int, int]], hw: tuple[int, int] = (48, 64)) -> Path:
    """A film of plain frames (Motion JPEG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, hw[::-1])  # type: ignore[attr-defined]
    for shade in shades:
        writer.write(np.full((*hw, 3), shade, np.uint8))
    writer.release()
    return path


def action_folder(root: Path, n_train: int = 6, n_val: int = 3) -> Path:
    """train/CLASS/*.avi and val/CLASS/*: films of two colours; one of the test clips is a folder of frames."""
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("val", n_val)):
        for label, colour in COLOURS.items():
            for i in range(n):
                shades = [
                    tuple(int(k) for k in np.clip(np.array(colour) + rng.integers(-30, 30, 3), 0, 255))
                    for _ in range(12)
                ]
                write_video(root / split / label / f"clip{i}.avi", shades)  # type: ignore[arg-type]
    frames = root / "val" / "Run" / "as_frames"
    frames.mkdir(parents=True)
    for k in range(5):
        cv2.imwrite(str(frames / f"{k}.png"), np.full((48, 64, 3), COLOURS["Run"], np.uint8))
    return root


def ucf_folder(root: Path) -> Path:
    """UCF-101 as distributed, in small."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 Run\r\n2 Swim\r\n")
    train, test = [], []
    for index, (label, colour) in enumerate(COLOURS.items(), start=1):
        for i in range(5):
            name = f"{label}/v_{label}_g{i:02d}_c01.avi"
            write_video(root / "UCF-101" / name, [colour] * 10)
            (train if i < 3 else test).append(f"{name} {index}" if i < 3 else name)
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    return root


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert places(80, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert places(3, 8) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert places(1, 4) == [0, 0, 0, 0]


def test_a_film_gives_the_frames_of_its_places(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", [(k * 10, k * 10, k * 10) for k in range(20)])
    found = [int(frame.mean().round()) for frame in read_frames(path, 4)]
    np.testing.assert_allclose(found, [20, 70, 120, 170], atol=3)
    red = read_frames(write_video(tmp_path / "b.avi", [(0, 0, 220)] * 3), 1)[0]
    assert red[..., 0].mean() > 180 > 60 > red[..., 2].mean()


def test_threads_that_decode_do_not_take_each_others_films_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def read(path: Path, wanted: int, _: object) -> list[np.ndarray]:
        decoded.append(path.name)
        time.sleep(0.01)  # as long as others need to come
        return [np.zeros((40, 40, 3), np.uint8)] * wanted

    monkeypatch.setattr(video_frames, "read_frames", read)
    frames = VideoFrames.of([Video(str(k), "a", None, tmp_path / str(k)) for k in range(8)], 4, "films")
    assert sum(len(batch.views) for batch in decoded_batches(frames, SMALL, ViewSpec(), batch_size=8, workers=4)) == 32
    assert sorted(decoded) == [str(k) for k in range(8)], "each once"


def test_frames_in_a_folder_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As tools write them that do not pad: 1.png, 2.png ... 12.png."""
    for k in range(12):
        cv2.imwrite(str(tmp_path / f"frame{k + 1}.png"), np.full((4, 4, 3), 10 * k, np.uint8))
    assert [int(frame.mean()) for frame in read_frames(tmp_path, 12)] == [10 * k for k in range(12)]


def test_a_film_that_does_not_say_how_long_it_is_is_counted(tmp_path: Path) -> None:
    """Frames one after another, without a header or an index, as recorders leave them."""
    frames = [cv2.imencode(".jpg", np.full((48, 64, 3), 10 * k, np.uint8))[1].tobytes() for k in range(20)]
    path = tmp_path / "a.mpg"
    path.write_bytes(b"".join(frames))
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) < 0
    capture.release()
    found = [int(frame.mean().round()) for frame in read_frames(path, 4)]
    np.testing.assert_allclose(found, [20, 70, 120, 170], atol=2)


def test_frames_of_a_video_are_averaged_or_set_side_by_side_and_broken_videos_left_out() -> None:
    features = np.arange(10, dtype=np.float32).reshape(5, 2)
    table = FeatureTable(
        names=("a#0", "a#1", "b#1", "c#0", "c#1"),
        labels=("x", "x", "x", "y", "y"),
        groups=("a", "a", "b", "c", "c"),
        columns={"embedding": features, "patch_mean": features + 1},
        skipped=(("b#0", "corrupt"), ("d#0", "corrupt"), ("d#1", "corrupt")),
    )
    mean, lost = pooled(table, VideoActionsSpec(frames=2))
    assert (mean.names, mean.labels, lost) == (("a", "c"), ("x", "y"), 2)
    assert mean.features.tolist() == [[1, 2], [7, 8]]
    assert mean.columns["patch_mean"].tolist() == [[2, 3], [8, 9]]
    side, _ = pooled(table, VideoActionsSpec(frames=2, pool="concat"))
    assert side.features.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert set(side.columns) == {"embedding"}


def test_the_command_tells_films_of_two_colours_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, ckpt = action_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    out = tmp_path / "actions.json"
    options = VideoActionsRun(
        ckpt=str(ckpt), data=str(data), out=out, cache_dir=tmp_path / "cache", threads=1, baselines=("pixels",)
    )
    main(options, VideoActionsSpec(frames=3, classifier="knn"))
    assert "12 training and 7 test videos, 2 classes" in capsys.readouterr().out
    result = load_result(out)
    assert result["evaluator"] == "video_actions"
    assert result["baselines"]["pixels"]["metrics"]["top1"]["value"] == 1.0
    assert result["metrics"]["top1"]["n"] == 7
    with np.load(out.with_suffix(".predictions.npz")) as saved:
        assert "val/Run/as_frames" in saved["names"].tolist()
    again = run(options, VideoActionsSpec(frames=3, classifier="knn"))
    assert again["timing"]["features_from_cache"]


def test_ucf101_is_read_as_distributed_and_fitted_linearly(tmp_path: Path) -> None:
    root, ckpt = ucf_folder(tmp_path / "ucf"), small_checkpoint(tmp_path / "a.safetensors")
    frames = open_actions(f"ucf101:{root}", 2)
    assert len(frames) == 20
    assert {item.split for item in frames.items} == {"train", "val"}
    assert frames.items[0].label == "Run"
    result = run(VideoActionsRun(ckpt=str(ckpt), data=str(root), cache_dir=None, threads=1), VideoActionsSpec(frames=2))
    assert result["metrics"]["top1"]["n"] == 4
    assert "2 evenly spaced frames a video" in result["protocol"]
    assert result["data"]["split_list"] == 1


def test_another_film_under_the_same_name_is_another_set(tmp_path: Path) -> None:
    data = action_folder(tmp_path / "d", 1, 1)
    before = open_actions(data, 2).fingerprint()
    assert open_actions(data, 2).fingerprint() == before
    assert open_actions(data, 3).fingerprint() != before
    write_video(data / "train/Run/clip0.avi", [(1, 2, 3)] * 12)
    assert open_actions(data, 2).fingerprint() != before


class TestBadInput:
    def test_a_film_that_is_none_or_has_no_frames(self, tmp_path: Path) -> None:
        (tmp_path / "a.avi").write_bytes(b"no film")
        with pytest.raises(DecodeError, match="no video that can be read"):
            read_frames(tmp_path / "a.avi", 2)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DecodeError, match="a folder without frames"):
            read_frames(tmp_path / "empty", 2)

    def test_a_film_cut_short_still_gives_its_frames_or_one_clear_reason(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.avi", [(k * 10, 0, 0) for k in range(20)])
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        assert len(read_frames(path, 4)) == 4
        path.write_bytes(data[:300])
        with pytest.raises(DecodeError):
            read_frames(path, 4)

    def test_too_many_broken_films_end_the_run(self, tmp_path: Path) -> None:
        data, ckpt = action_folder(tmp_path / "d", 3, 2), small_checkpoint(tmp_path / "a.safetensors")
        (data / "train/Run/clip0.avi").write_bytes(b"no film")
        with pytest.raises(InputError, match="cannot be decoded"):
            run(VideoActionsRun(ckpt=str(ckpt), data=str(data), cache_dir=None), VideoActionsSpec(frames=2))

    def test_sets_that_are_none(self, tmp_path: Path) -> None:
        for data, message in (
            (f"ucf101:{tmp_path}", "no ucfTrainTestlist there"),
            (tmp_path / "nothing", "no folder there"),
            (tmp_path, "no videos in class folders"),
        ):
            with pytest.raises(InputError, match=message):
                open_actions(data, 2)
        root = ucf_folder(tmp_path / "ucf")
        (root / "ucfTrainTestlist/trainlist01.txt").write_text("Fly/v.avi 1\n")
        with pytest.raises(InputError, match="class 'Fly' of Fly/v"):
            open_actions(root, 2)
        with pytest.raises(InputError, match="trainlist02"):
            open_actions(ucf_folder(tmp_path / "other"), 2, split_list=2)

    def test_settings_out_of_range(self) -> None:
        with pytest.raises(InputError, match="--frames 0"):
            VideoActionsSpec(frames=0)
        with pytest.raises(InputError, match="--split-list 4"):
            VideoActionsRun(ckpt="x", data="y", split_list=4)

    def test_fewer_training_videos_than_classes(self, tmp_path: Path) -> None:
        dataset = open_actions(action_folder(tmp_path, n_train=1, n_val=1), 2)
        train, val = (
            dataset.subset([i for i, item in enumerate(dataset.items) if item.split == split])
            for split in ("train", "val")
        )
        check_videos(train, val, "films")
        with pytest.raises(InputError, match=r"films: 1 training videos for 2 classes; wanted at least one a class"):
            check_videos(train.subset([0, 1]), val, "films")


def test_clips_of_one_film_are_held_out_and_drawn_together() -> None:
    names = [f"Run/v_Run_g{group:02d}_c{clip:02d}.avi" for group in (1, 2) for clip in (1, 2)] + ["Run/other.mp4"]
    frames = tuple(name for name in names for _ in range(2))
    table = FeatureTable(frames, ("Run",) * 10, frames, {"embedding": np.ones((10, 3), np.float32)})
    videos, _ = pooled(table, VideoActionsSpec(frames=2))
    assert videos.groups == ("Run/v_Run_g01", "Run/v_Run_g01", "Run/v_Run_g02", "Run/v_Run_g02", "Run/other.mp4")
