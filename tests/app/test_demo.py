"""The demo page in a real browser: it shows attention of samples and of uploads, says what it cannot read, and fits every screen."""

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

import app
from data.errors import InputError
from demo.client import Served
from tests.app.driving import (
    TABS,
    count_pictures,
    free_port,
    launch,
    open_tab,
    picture,
    png,
    said,
    set_slider,
    shoot,
    source,
    stop,
    until_changed,
    upload,
)

pytestmark = pytest.mark.browser


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


HOSTILE = {
    "words.jpg": b"these are words, not a picture",
    "cut.png": png()[:200],
    "bomb.png": bomb(),
    "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>',
    "<img src=x onerror=alert(1)>.png": b"<html><script>alert(1)</script></html>",
    "empty.png": b"",
}


def test_a_visitor_meets_a_picture_and_a_click_on_a_sample_gives_the_next(page: Any, repo_root: Path) -> None:
    assert count_pictures(page, "#maps", 5) == 5, "there is attention before anybody clicks"
    before = source(page, "#maps")
    page.locator("#samples img").nth(8).click()
    until_changed(page, "#maps", before)
    n_maps, n_masks = count_pictures(page, "#maps", 5), count_pictures(page, "#masks", 4)
    assert n_maps == n_masks + 1, "the image, then the mean and each head in both"
    image, mean = picture(page, "#maps", 0), picture(page, "#maps", 1)
    assert image.shape == mean.shape
    assert np.abs(image.astype(int) - mean).mean() > 5, "the map is laid over the image"
    dimmed = picture(page, "#masks").mean(axis=2) < 0.6 * image.mean(axis=2)
    assert 0.05 < dimmed.mean() < 0.95
    shoot(page, repo_root, "attention")


def test_the_threshold_decides_how_much_is_shown_and_the_resolution_how_finely(page: Any) -> None:
    shown = {}
    for mass in ("0.2", "0.9"):
        before = source(page, "#masks")
        set_slider(page, "mass", mass)
        until_changed(page, "#masks", before)
        page.wait_for_timeout(300)
        shown[mass] = picture(page, "#masks").mean()
    assert shown["0.2"] < shown["0.9"], "more attention shown is a brighter picture"
    before = source(page, "#masks")
    set_slider(page, "size", "448")
    until_changed(page, "#masks", before)


def test_an_upload_keeps_its_proportions(page: Any) -> None:
    before = source(page, "#maps")
    upload(page, "#image", "disc.png", png())
    until_changed(page, "#maps", before)
    height, width = picture(page, "#maps", 1).shape[:2]
    assert width / height == pytest.approx(160 / 90, rel=0.02)


def test_hostile_files_are_refused_in_one_line_and_the_page_lives_on(page: Any) -> None:
    page.on("dialog", lambda dialog: page.complaints.append("a script ran"))
    for name, data in HOSTILE.items():
        upload(page, "#image", name, data)
        text = said(page, "This file cannot be used: ")
        assert "Traceback" not in text
        assert "/tmp" not in text
    before = source(page, "#maps")
    page.locator("#samples img").nth(1).click()
    until_changed(page, "#maps", before)
    # A browser cannot draw these either and says so; that is not the page's complaint.
    page.complaints[:] = [one for one in page.complaints if "Failed to load resource" not in one]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.slow
def test_every_tab_fits_the_screen(page: Any, repo_root: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for name in TABS:
        open_tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        unlabelled = page.evaluate(
            """() => [...document.querySelectorAll('input:not([type=file]):not([type=hidden]), textarea, select')]
                .filter(e => e.offsetParent && !e.labels?.length && !e.getAttribute('aria-label') && !e.placeholder)
                .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert unlabelled == [], name
        if width < 1000:  # the wide ones are kept where they are filled
            shoot(page, repo_root, f"phone-{name.split()[0].lower()}", full=False)
    open_tab(page, "Attention")


@pytest.mark.slow
def test_tabs_are_reached_by_keyboard(page: Any) -> None:
    page.get_by_role("tab", name="Attention").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.getAttribute('role') === 'tab'")
    assert page.locator("[role=tab][aria-selected=true]").inner_text() == "Similarity"
    open_tab(page, "Attention")


def test_uploads_lie_where_nobody_else_reads_and_go_with_the_demo(demo: dict[str, str], home: Path) -> None:
    (folder,) = (home / "tmp").glob("dinoscope-demo-*")
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_ending_the_demo_deletes_uploads_and_shows_a_second_model_until_then(
    browser: Any, demo: dict[str, str], repo_root: Path, tmp_path: Path
) -> None:
    """A second page, without a server of its own, shows what the first one's server says, twice."""
    address = f"grpc://{demo['grpc']}"
    process, addresses = launch(repo_root, tmp_path, "--server", address, "--beside", address)
    try:
        assert "grpc" not in addresses, "no server was started"
        page = browser.new_page(viewport={"width": 1440, "height": 1200})
        page.goto(addresses["demo"])
        count_pictures(page, "#maps", 5)
        count_pictures(page, "#beside-maps", 5)
        assert np.array_equal(picture(page, "#maps", 1), picture(page, "#beside-maps", 1)), (
            "the same model says the same"
        )
        shoot(page, repo_root, "beside")
        open_tab(page, "Search")
        assert count_pictures(page, "#neighbours", 8) == 8
        assert "need the server's REST address" in page.content()
        page.close()
    finally:
        stop(process)
    assert list((tmp_path / "tmp").glob("dinoscope-demo-*")) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("grpc://127.0.0.1:{free}", "does not answer"),
        ("http://127.0.0.1:{grpc}", "Is this its gRPC port?"),
        ("http://127.0.0.1:abc", "wanted grpc://host:port or http://host:port"),
        ("127.0.0.1:8001", "wanted grpc://host:port or http://host:port"),
    ],
)
def test_no_server_at_the_address_is_one_line(demo: dict[str, str], address: str, words: str) -> None:
    at = address.format(free=free_port(), grpc=demo["grpc"].rpartition(":")[2])
    with pytest.raises(InputError, match=words.replace("?", r"\?")) as raised:
        app.main(server=at, port=free_port())
    assert "\n" not in str(raised.value)


def test_bad_input_ends_the_program_with_status_2(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "app.py", "--server", "127.0.0.1:8001"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_name_that_no_machine_can_have_is_told_in_words() -> None:
    """No part of a host's name may be longer than 63 characters."""
    address = f"http://{'a' * 70}:8000"
    with pytest.raises(gr.Error, match=f"The address {address} cannot be used"):
        Served(address).models()
