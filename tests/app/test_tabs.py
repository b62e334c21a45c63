"""Similarity, search, depth, evaluation and training on the demo page, each driven as a visitor does."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.app.conftest import write_run
from tests.app.driving import (
    TOAST,
    choose,
    count_pictures,
    open_tab,
    picture,
    png,
    said,
    set_slider,
    shoot,
    source,
    until_changed,
    upload,
)

pytestmark = pytest.mark.browser


def test_a_click_on_a_patch_shows_what_is_like_it_here_and_there(page: Any, repo_root: Path) -> None:
    open_tab(page, "Similarity")
    for one in ("#here", "#there", "#pca", "#pca-other"):
        source(page, one)
    words = page.locator("#similarity-words")
    assert "row 8 of 14, column 8 of 14" in words.inner_text()
    before = source(page, "#here")
    box = page.locator("#here img").bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"])
    until_changed(page, "#here", before)
    assert "row 13 of 14, column 2 of 14" in words.inner_text()
    assert page.locator("#across input[type=number]").input_value() == "10"
    shown = picture(page, "#here").astype(int)
    height, width = shown.shape[:2]
    clicked = shown[round(0.885 * height) : round(0.915 * height), round(0.09 * width) : round(0.12 * width)]
    assert clicked.mean() > shown.mean(), "a patch is like itself"
    assert picture(page, "#pca").std() > 10
    shoot(page, repo_root, "similarity")


def test_sliders_do_what_a_click_does(page: Any) -> None:
    before = source(page, "#here")
    set_slider(page, "down", "20")
    until_changed(page, "#here", before)
    page.get_by_text("row 3 of 14").wait_for()


def test_principal_components_keep_their_colours_when_the_same_is_asked_again(page: Any) -> None:
    """The other image is the same image: one basis gives both the same colours."""
    before = source(page, "#there")
    upload(page, "#other", "disc.png", png())
    until_changed(page, "#there", before)
    before = source(page, "#pca")
    upload(page, "#image", "disc.png", png())
    until_changed(page, "#pca", before)
    page.wait_for_timeout(500)
    assert np.array_equal(picture(page, "#pca"), picture(page, "#pca-other"))


def test_a_search_shows_the_nearest_with_distances_and_a_vote(page: Any, repo_root: Path) -> None:
    open_tab(page, "Search")
    count_pictures(page, "#neighbours", 8)
    before = source(page, "#neighbours")
    page.locator("#samples img").nth(5).click()
    until_changed(page, "#neighbours", before)
    assert count_pictures(page, "#neighbours", 8) == 8
    assert "feline 0.000" in page.locator("#neighbours").inner_text(), "the sample itself is its nearest neighbour"
    assert re.search(r"feline[\s.]*\d+%", page.locator("#vote").inner_text())
    assert "vote of the 8 nearest" in page.locator("#search-words").inner_text()
    shoot(page, repo_root, "search")


def open_own_images(page: Any) -> None:
    """Each test for itself: the ones before it may have been left out."""
    open_tab(page, "Search")
    if not page.locator("#own-add").is_visible():
        page.get_by_role("button", name="Add images of your own").click()


@pytest.mark.slow
def test_own_images_are_added_with_a_label_found_and_deleted(page: Any, repo_root: Path) -> None:
    """The label is hostile: it must be shown, not run."""
    label = "<img src=x onerror=console.error(1)>"
    open_own_images(page)
    upload(page, "#own-files", "disc.png", png())
    page.locator("#own-files").get_by_text("disc").first.wait_for()
    page.locator("#own-label textarea, #own-label input").first.fill(label)
    page.locator("#own-add").click()
    page.get_by_text("Added 1 to mine").wait_for()
    page.wait_for_function("document.querySelectorAll('#neighbours img').length === 1")
    assert label in page.locator("#neighbours").inner_text()
    assert label in page.locator("#vote").inner_text()
    shoot(page, repo_root, "search-own")
    page.get_by_role("button", name="Delete images").click()
    choose(page, "own-items", "disc.png")
    page.keyboard.press("Escape")
    page.locator("#own-delete").click()
    page.get_by_text("Deleted 1").wait_for()
    page.locator("#own-delete-all").click()
    page.get_by_text("Deleted the collection mine").wait_for()
    count_pictures(page, "#neighbours", 8)
    assert page.locator(TOAST).count() == 0, "what follows from one click is no second request"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("words.jpg", b"no picture", "these bytes are no image"), (None, b"", "Choose one or more image files")],
)
@pytest.mark.slow
def test_what_cannot_be_added_is_refused_in_words(page: Any, name: str | None, data: bytes, words: str) -> None:
    open_own_images(page)
    if name:
        upload(page, "#own-files", name, data)
        page.locator("#own-files").get_by_text("words").first.wait_for()
    page.locator("#own-add").click()
    lines = [line for line in said(page, words).splitlines() if line.strip() not in ("", "Error", "×")]
    assert len(lines) == 1, "one line, beside the message's title and its button"
    if name:
        page.locator("#own-files").get_by_role("button", name="Clear", exact=True).click()


@pytest.mark.slow
def test_depth_is_drawn_and_its_metres_are_not_praised(page: Any, repo_root: Path) -> None:
    open_tab(page, "Depth and segmentation")
    assert picture(page, "#depth").std() > 5
    words = page.locator("#depth-words").inner_text()
    assert re.search(r"[\d.]+ metre", words)
    assert "its metres are of no use" in words
    assert "This server has no segmentation head." in page.locator("#tab-dense").inner_text()
    shoot(page, repo_root, "dense")


@pytest.mark.slow
def test_an_evaluation_is_started_watched_and_read(page: Any, repo_root: Path) -> None:
    open_tab(page, "Evaluate")
    page.get_by_text("Nothing was evaluated yet").wait_for()
    page.wait_for_function("document.querySelector('#evaluation-data input').value === 'samples'")
    page.locator("#evaluation-start").click()
    page.locator("#evaluation-state").get_by_text("is done after").wait_for()
    page.locator("#leaderboard table").wait_for()
    board = page.locator("#leaderboard").inner_text()
    assert "knn on samples" in board
    assert re.search(r"\d+\.\d % \(\d+\.\d to \d+\.\d\)", board)
    page.locator("#report iframe, #report table").first.wait_for()
    shoot(page, repo_root, "evaluate")
    page.locator("#evaluation-cancel").click()
    page.get_by_text("Nothing is running.").wait_for()


@pytest.mark.slow
def test_a_run_is_watched_while_it_is_written(page: Any, repo_root: Path, runs: Path) -> None:
    open_tab(page, "Train")
    page.locator("#run-numbers").get_by_text("40", exact=True).wait_for()
    assert page.locator("#run input").first.input_value() == "first"
    warnings = page.locator("#run-warnings").inner_text()
    assert "step 40: features of different images are nearly equal <b>(spread 0.010)</b>" in warnings
    assert count_pictures(page, "#run-pictures", 2) == 2
    page.locator("#charts canvas, #charts svg").first.wait_for()
    shoot(page, repo_root, "train")
    write_run(runs / "second", 7, [])
    try:
        page.locator("#run input").first.click()
        assert page.get_by_role("option").count() >= 1
        page.wait_for_timeout(6000)
        page.locator("#run input").first.blur()
        page.locator("#run input").first.click()
        options = page.get_by_role("option").all_inner_texts()
        assert [one.strip(" ✓\n") for one in options] == ["second", "first"], "the newest first, none outside the root"
        choose(page, "run", "second")
        page.locator("#run-numbers").get_by_text("7", exact=True).wait_for()
        assert "nothing to warn of" in page.locator("#run-warnings").inner_text()
    finally:
        shutil.rmtree(runs / "second")
