"""The demo's drawings, and what it holds visitors to, without a browser."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest

from demo.pictures import class_colours, cosines, heat, holding, marked, principal_colours
from demo.train import curve_table, find_runs, read_log
from demo.visits import Turns, private_folder
from tests.app.conftest import write_run


def two_things(rng: np.random.Generator, turned: bool = False) -> np.ndarray:
    """Patches [4, 4, 16] of which the left half is one thing, the right half another."""
    things = np.eye(16)[[0, 3]] * 5
    grid = np.repeat(things[[1, 0] if turned else [0, 1]], 2, axis=0)[None].repeat(4, axis=0)
    return grid + 0.05 * rng.normal(size=(4, 4, 16))


def test_equal_features_have_equal_colours_in_both_images_and_in_every_call() -> None:
    rng = np.random.default_rng(0)
    blank = np.zeros((8, 8, 3), np.uint8)
    here, there = principal_colours(np.stack([two_things(rng), two_things(rng, turned=True)]), [blank, blank])
    assert np.abs(here.astype(int)[:, :4, 0] - there[:, 4:, 0]).max() < 60
    assert np.abs(here.astype(int)[:, :4, 0] - here[:, 4:, 0]).min() > 120
    again, _ = principal_colours(np.stack([two_things(rng), two_things(rng, turned=True)]), [blank, blank])
    assert np.abs(here.astype(int)[..., 0] - again[..., 0]).max() < 60, "other noise, the same sign"
    (alone,) = principal_colours(two_things(rng)[None], [blank])
    assert np.abs(here.astype(int)[..., 0] - alone[..., 0]).max() < 60, "the other image turns no colour round"


def test_patches_without_any_difference_are_black_not_noise() -> None:
    (colours,) = principal_colours(np.ones((1, 3, 3, 8)), [np.zeros((6, 6, 3), np.uint8)])
    assert colours.max() == 0


def test_a_patch_is_most_similar_to_itself_and_not_to_its_opposite() -> None:
    patches = np.array([[[1.0, 0], [0, 1]], [[-2, 0], [2, 2]]])
    assert cosines(patches[0, 0], patches) == pytest.approx(np.array([[1, 0], [-1, 0.5**0.5]]))


def test_a_mask_holds_its_share_with_the_fewest_patches() -> None:
    map_hw = np.array([[5.0, 1], [3, 1]])
    assert holding(map_hw, 0.5).sum() == 1
    assert holding(map_hw, 0.51).tolist() == [[True, False], [True, False]]
    assert holding(map_hw, 0.95).all()
    assert holding(np.full((2, 2), 0.25), 0.6).sum() >= 3


def test_drawings_keep_the_size_of_the_picture() -> None:
    picture = np.full((30, 50, 3), 128, np.uint8)
    for drawn in (
        heat(picture, np.eye(3)),
        marked(picture, 2, 2, (3, 3)),
        class_colours(np.array([[0, 7]], np.int32), picture),
    ):
        assert drawn.shape == picture.shape
        assert drawn.dtype == np.uint8


def test_one_visitor_has_one_turn_of_a_kind_and_others_have_theirs() -> None:
    turns = Turns()
    first, second = (SimpleNamespace(session_hash=name) for name in "ab")
    anyone: Any = first
    with turns.take(anyone, "video"):
        with pytest.raises(gr.Error, match="One at a time"), turns.take(anyone, "video"):
            pass
        with turns.take(anyone, "search"), turns.take(second, "video"):  # type: ignore[arg-type]
            pass
    with turns.take(anyone, "video"):
        pass


def test_of_questions_that_come_while_one_is_answered_the_last_is_answered_too_by_whoever_works() -> None:
    turns, visitor, asked = Turns(), SimpleNamespace(session_hash="a"), []

    def work(question: int) -> int:
        asked.append(question)
        if question == 1:
            with ThreadPoolExecutor() as pool:
                later = [
                    pool.submit(turns.newest, visitor, "search", work, more).result()  # type: ignore[arg-type]
                    for more in (2, 3)
                ]
            assert [one == gr.skip() for one in later] == [True, True]
            raise gr.Error("too late to matter")
        return 10 * question

    assert turns.newest(visitor, "search", work, 1) == 30  # type: ignore[arg-type]
    assert asked == [1, 3]
    with pytest.raises(ValueError, match="zero"):
        turns.newest(visitor, "search", lambda: int("zero"))  # type: ignore[arg-type]
    assert turns.newest(visitor, "search", work, 4) == 40, "a failure ends its turn"  # type: ignore[arg-type]


def test_what_a_killed_demo_left_goes_when_the_next_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "dinoscope-demo-killed"
    left.mkdir()
    (left / ".lock").touch()
    (left / "photo.jpg").touch()
    with private_folder() as living:
        assert not left.exists()
        with private_folder():
            assert living.exists(), "one that still runs keeps its uploads"
    assert list(tmp_path.iterdir()) == []


def test_runs_are_found_below_the_root_only_and_newest_first(runs: Path) -> None:
    assert find_runs(runs) == ["first"]
    assert find_runs(runs / "nothing-here") == []


def test_a_log_is_read_past_lines_that_were_cut_and_thinned_to_what_a_chart_shows(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1000, ["wary"])
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert (log.name, len(log.steps), log.notes) == ("tiny", 1000, [(1000, "wary")])
    table = curve_table(log.steps, ("loss", "absent"))
    assert len(table) <= 300
    assert table["step"].iloc[-1] == 1000
    assert set(table["curve"]) == {"loss"}
