"""Other test sets of an ImageNet classifier, on tiny copies of their real layouts."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.errors import InputError
from evaluators.classification import ClassificationRun
from evaluators.compare import compare, load_scored
from evaluators.imagenet_sets import ALEXNET_ERROR, STRATA, corruption_error, open_set, parse_sets, score
from evaluators.linear import LinearSpec, run
from tests.evaluators.fakes import SMALL, small_checkpoint

WNIDS = [f"n{number:08d}" for number in range(12)]


def picture(path: Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((40, 40, 3), shade, np.uint8))


def right_logits(answers: list[int], n_classes: int = 12) -> np.ndarray:
    return np.eye(n_classes)[answers]


def test_v2_folders_are_places_among_the_classes_not_names_to_sort(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "a.jpeg")
    extra = open_set("v2", tmp_path, WNIDS, None)  # type: ignore[arg-type]
    assert extra.dataset.items[2].name == "10/a.jpeg"  # the order of the folders' names
    assert [set(one) for one in extra.answers[:4]] == [{0}, {1}, {10}, {11}]
    numbers = [int(item.name.split("/")[0]) for item in extra.dataset.items]
    assert score(extra, right_logits(numbers), range(12)).metrics["v2_top1"].value == 1.0
    with pytest.raises(InputError, match="counts to class 11, and the classifier has 3"):
        open_set("v2", tmp_path, WNIDS[:3], None)  # type: ignore[arg-type]


def test_classes_that_are_numbers_are_in_their_own_places(tmp_path: Path) -> None:
    """ImageNet in tar shards is labelled 0 to 999, and as text 10 sorts before 2."""
    from data.datasets import open_dataset

    for number in range(12):
        picture(tmp_path / "v2" / str(number) / "a.jpeg")
    classes = sorted(str(number) for number in range(12))
    v2 = open_set("v2", tmp_path / "v2", classes, None)  # type: ignore[arg-type]
    for item, (answer,) in zip(v2.dataset.items, v2.answers, strict=True):
        assert item.name == f"{classes[answer]}/a.jpeg"
    picture(tmp_path / "val" / "10" / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "real.json").write_text("[[10, 2]]")
    (answer,) = open_set("real", tmp_path / "real.json", classes, open_dataset(tmp_path / "val")).answers
    assert {classes[number] for number in answer} == {"10", "2"}


def test_classes_whose_order_is_not_known_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "1" / "a.jpeg")
    told = [
        score(open_set("v2", tmp_path, names, None), right_logits([1]), [0]).notes
        for names in (WNIDS, ["shark", "tench"] * 6)
    ]  # type: ignore[arg-type]
    assert told[0] == ()
    assert "'shark'" in told[1][0]


def test_any_of_the_real_labels_counts_and_images_without_one_are_skipped(tmp_path: Path) -> None:
    from data.datasets import open_dataset

    for number, wnid in ((3, WNIDS[0]), (1, WNIDS[5]), (2, WNIDS[1])):
        picture(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[5, 7], [], [2]]))
    test = open_dataset(tmp_path / "val")
    extra = open_set("real", tmp_path / "real.json", WNIDS, test)
    assert [set(one) for one in extra.answers] == [{2}, set(), {5, 7}]  # by the number in the name, not by place
    found = score(extra, right_logits([0, 1, 7]), range(3))
    assert (found.metrics["real_top1"].value, found.metrics["real_top1"].n) == (0.5, 2)
    assert found.predictions["real_names"].tolist() == [test.items[0].name, test.items[2].name]
    assert found.predictions["real_predicted"].tolist() == [0, 7]
    assert found.predictions["real_correct"].tolist() == [False, True]
    picture(tmp_path / "other" / WNIDS[0] / "x.jpeg")
    picture(tmp_path / "other" / WNIDS[1] / "x.jpeg")
    with pytest.raises(InputError, match=r"is none of the 3 images of real\.json"):
        open_set("real", tmp_path / "real.json", WNIDS, open_dataset(tmp_path / "other"))
    (tmp_path / "real.json").write_text("[[1], 3]")
    with pytest.raises(InputError, match="not a list of label lists"):
        open_set("real", tmp_path / "real.json", WNIDS, test)


def test_answers_on_a_and_r_are_taken_among_their_classes(tmp_path: Path) -> None:
    for wnid in (WNIDS[2], WNIDS[9]):
        picture(tmp_path / wnid / "a.jpg")
    logits = right_logits([4, 4]) * 2 + right_logits([2, 9])
    for kind, wanted in (("a", 1.0), ("r", 1.0), ("sketch", 0.0)):
        extra = open_set(kind, tmp_path, WNIDS, None)  # type: ignore[arg-type]
        assert score(extra, logits, [0, 1]).metrics[f"{kind}_top1"].value == wanted
    picture(tmp_path / "n99999999" / "a.jpg")
    with pytest.raises(InputError, match="1 folders are no trained class, first 'n99999999'"):
        open_set("a", tmp_path, WNIDS, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["a", "r", "sketch", "v2"])
def test_the_folder_that_an_archive_unpacks_to_is_found_in_its_parent(tmp_path: Path, kind: str) -> None:
    folder = {"v2": "imagenetv2-matched-frequency-format-val", "sketch": "sketch"}.get(kind, f"imagenet-{kind}")
    picture(tmp_path / folder / ("1" if kind == "v2" else WNIDS[1]) / "a.jpg")
    outside, within = (open_set(kind, path, WNIDS, None) for path in (tmp_path, tmp_path / folder))  # type: ignore[arg-type]
    assert outside.answers == within.answers == (frozenset([1]),)


def test_corruption_errors_are_averaged_over_severities_and_divided_by_alexnets(tmp_path: Path) -> None:
    for severity in range(1, 6):
        for wnid in WNIDS[:2]:
            picture(tmp_path / "fog" / str(severity) / wnid / "a.JPEG")
            picture(tmp_path / "noise" / "shot_noise" / str(severity) / wnid / "a.JPEG")
    extra = open_set("c", tmp_path, WNIDS, None)  # type: ignore[arg-type]
    assert len(extra.dataset) == 20
    assert extra.view(SMALL).resize_px == SMALL.size_px
    guesses = [
        0 if stratum.startswith("fog") else next(iter(answer))
        for stratum, answer in zip(extra.strata, extra.answers, strict=True)
    ]
    found = score(extra, right_logits(guesses), range(20))
    assert found.errors == {"shot_noise": 0.0, "fog": 0.5}
    assert found.notes == (
        "imagenet-c: c_mce is over 10 of the 75 corruptions and severities (shot_noise, fog); published figures are over all",
    )
    mce = found.metrics["c_mce"]
    assert mce.value == pytest.approx(0.5 / ALEXNET_ERROR["fog"] / 2)
    assert mce.lower_is_better
    assert mce.ci95 == pytest.approx((0, 1 / ALEXNET_ERROR["fog"] / 2)), (
        "one photograph is always right, one always wrong in fog"
    )
    assert found.predictions["c_names"][0] == f"noise/shot_noise/1/{WNIDS[0]}/a.JPEG"
    assert found.predictions["c_groups"].tolist() == [0, 1] * 10, "two photographs, whatever was done to them"


def test_corrupted_copies_of_one_photograph_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.6
    strata = [STRATA.index(f"fog/{severity}") for severity in range(1, 6)]
    once, _ = corruption_error(right, np.full(40, strata[0]), np.arange(40))
    five, errors = corruption_error(np.tile(right, 5), np.repeat(strata, 40), np.tile(np.arange(40), 5))
    assert five.value == pytest.approx(once.value)
    assert five.ci95 == pytest.approx(once.ci95), "copies that fare alike tell no more"
    assert five.n == 200
    assert errors == {"fog": pytest.approx(1 - right.mean())}
    low, high = once.ci95 or (0, 0)
    assert low < once.value < high


def test_a_severity_that_a_resample_misses_is_left_out_of_its_mean() -> None:
    fog, snow = STRATA.index("fog/1"), STRATA.index("snow/1")
    metric, errors = corruption_error(np.array([True, False, False]), np.array([fog, fog, snow]), np.arange(3))
    assert errors == {"snow": 1.0, "fog": 0.5}
    assert metric.value == pytest.approx((1 / ALEXNET_ERROR["snow"] + 0.5 / ALEXNET_ERROR["fog"]) / 2)
    assert metric.ci95 is not None
    assert np.isfinite(metric.ci95).all()


def test_names_of_sets_are_checked_before_anything_runs(tmp_path: Path) -> None:
    assert parse_sets([f"imagenet-a:{tmp_path}"]) == {"a": tmp_path}
    for texts, message in (
        (["imagenet-x:here"], "wanted NAME:PATH"),
        ([str(tmp_path)], "wanted NAME:PATH"),
        ([f"imagenet-a:{tmp_path}"] * 2, "each name once"),
        ([f"imagenet-a:{tmp_path / 'none'}"], "nothing at"),
    ):
        with pytest.raises(InputError, match=message):
            parse_sets(texts)


def test_a_probe_is_tested_on_all_of_them_in_one_run(tmp_path: Path) -> None:
    names = WNIDS[:3]
    for split, count in (("train", 6), ("val", 3)):
        for number, wnid in enumerate(names):
            for i in range(count):
                name = f"ILSVRC2012_val_{3 * number + i + 1:08d}.JPEG" if split == "val" else f"{i}.JPEG"
                picture(tmp_path / "data" / split / wnid / name, 60 * number + 5 * i)
    for number, wnid in enumerate(names):
        picture(tmp_path / "v2" / str(number) / "a.jpeg", 60 * number)
        for kind in ("a", "r", "sketch"):
            picture(tmp_path / kind / wnid / "a.jpg", 60 * number)
        picture(tmp_path / "c" / "snow" / "1" / wnid / "a.JPEG", 60 * number)
    (tmp_path / "real.json").write_text(json.dumps([[k // 3] for k in range(9)]))
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    options = ClassificationRun(
        ckpt=str(ckpt), data=str(tmp_path / "data"), cache_dir=None, threads=1, out=tmp_path / "out.json"
    )
    sets = [f"imagenet-{kind}:{tmp_path / kind}" for kind in ("v2", "a", "r", "sketch", "c")]
    result = run(
        options, LinearSpec(min_steps=30, epochs=1), test_data=[*sets, f"imagenet-real:{tmp_path / 'real.json'}"]
    )
    assert {"v2_top1", "a_top1", "r_top1", "sketch_top1", "c_mce", "real_top1"} <= set(result["metrics"])
    assert result["metrics"]["real_top1"]["value"] == pytest.approx(result["metrics"]["top1"]["value"])
    assert list(result["settings"]["corruption_errors"]) == ["snow"]
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["v2_top1"]["n"] == 3
    assert result["metrics"]["c_mce"]["ci95"] is not None
    assert any("c_mce is over 1 of the 75" in note for note in result["notes"])
    scored = load_scored(tmp_path / "out.json")
    for kind in ("v2", "real", "a", "r", "sketch", "c"):
        n = 9 if kind == "real" else 3
        assert {len(scored.predictions[f"{kind}_{what}"]) for what in ("names", "predicted", "correct")} == {n}
    assert scored.predictions["v2_correct"].mean() == pytest.approx(result["metrics"]["v2_top1"]["value"])
    pairs = compare(scored, scored)["paired"]
    assert {name: one["n"] for name, one in pairs.items() if name != "top5"} == {
        "score": 9, "v2_top1": 3, "real_top1": 9, "a_top1": 3, "r_top1": 3, "sketch_top1": 3, "c_top1": 3,
    }  # fmt: skip


def test_a_further_set_that_cannot_be_read_is_told_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/{}/0.jpg", "train/{}/1.jpg", "val/{}/0.jpg"):
        for number, wnid in enumerate(WNIDS[:2]):
            picture(tmp_path / "data" / name.format(wnid), 60 * number)
    (tmp_path / "sketch").mkdir()
    monkeypatch.setattr("evaluators.linear.evaluate", lambda *_: pytest.fail("it was fitted"))
    options = ClassificationRun(
        ckpt=str(small_checkpoint(tmp_path / "a.safetensors")), data=str(tmp_path / "data"), cache_dir=None, threads=1
    )
    with pytest.raises(InputError, match="no class folders in it"):
        run(options, test_data=[f"imagenet-sketch:{tmp_path / 'sketch'}"])
