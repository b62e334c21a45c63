"""The demo page in a real browser: it shows maps, neighbours and depth of samples and of uploads, and says what it cannot read."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import numpy as np
import pytest

from app import Served

pytestmark = pytest.mark.browser
START_S = 180
ANSWER_MS = 60_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(repo_root: Path, home: Path, *words: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start the demo as `make demo` does, in a home of its own; returns once it has printed its addresses."""
    port = free_port()
    env = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "XDG_DATA_HOME": str(home / "data")}
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), *words],
        cwd=repo_root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, deadline = "", time.monotonic() + START_S
    assert process.stdout
    while "demo: " not in said:
        line = process.stdout.readline()
        said += line
        assert line or process.poll() is None, said
        assert time.monotonic() < deadline, said
    found = {"demo": re.search(r"demo: (\S+)", said), "grpc": re.search(r"gRPC ([\d.:]+)", said)}
    return process, {name: match.group(1) for name, match in found.items() if match} | {"said": said}


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture(scope="module")
def demo(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The demo with its embedded server on free ports."""
    process, addresses = launch(repo_root, tmp_path_factory.mktemp("home"), "--server-ports", "0", "0", "0")
    yield addresses
    stop(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: install the package `chromium` to run the browser tests")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, demo: dict[str, str]) -> Iterator[Any]:
    """The page, loaded, with a list of what its console complained about."""
    page = browser.new_page(viewport={"width": 1440, "height": 1200})
    page.set_default_timeout(ANSWER_MS)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(demo["demo"])
    page.locator("#samples img").first.wait_for()
    yield page
    page.close()


def picture(page: Any, selector: str, number: int = 0) -> np.ndarray:
    """An image element's picture, as the browser got it: uint8 [H, W, 3]."""
    locator = page.locator(f"{selector} img").nth(number)
    locator.wait_for()
    reply = page.request.get(locator.get_attribute("src"))
    assert reply.ok
    decoded = cv2.imdecode(np.frombuffer(reply.body(), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded


def count_pictures(page: Any, selector: str, at_least: int) -> int:
    page.wait_for_function(f"document.querySelectorAll('{selector} img').length >= {at_least}")
    return int(page.locator(f"{selector} img").count())


def upload(page: Any, name: str, data: bytes) -> None:
    page.locator("#image input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def png(height: int = 90, width: int = 160) -> bytes:
    """A white disc on dark grey."""
    image = np.full((height, width, 3), 40, np.uint8)
    cv2.circle(image, (width // 3, height // 2), height // 4, (255, 255, 255), -1)
    return cv2.imencode(".png", image)[1].tobytes()


def test_a_click_on_a_sample_gives_maps_neighbours_and_depth(page: Any) -> None:
    page.locator("#samples img").nth(2).click()
    n_maps = count_pictures(page, "#maps", 3)
    n_masks = count_pictures(page, "#masks", 1)
    assert n_maps == n_masks + 2, "the image, the mean, and as many heads as there are masks"
    image, mean = picture(page, "#maps", 0), picture(page, "#maps", 1)
    assert image.shape == mean.shape
    assert np.abs(image.astype(int) - mean).mean() > 5, "the map is laid over the image"
    mask = picture(page, "#masks", 0)
    dimmed = mask.mean(axis=2) < 0.6 * image.mean(axis=2)
    assert 0.05 < dimmed.mean() < 0.95
    page.get_by_role("tab", name="Nearest neighbours").click()
    assert count_pictures(page, "#neighbours", 8) == 8
    assert "1.00" in page.locator("#neighbours").inner_text(), "the sample itself is its nearest neighbour"
    page.get_by_role("tab", name="Depth").click()
    assert picture(page, "#depth").std() > 5
    assert re.search(r"From [\d.]+ metre", page.locator("#depth-words").inner_text())
    assert page.complaints == []


def test_the_threshold_decides_how_much_is_shown(page: Any) -> None:
    page.locator("#samples img").nth(5).click()
    count_pictures(page, "#masks", 1)
    shown = {}
    for mass in ("0.2", "0.9"):
        before = page.locator("#masks img").first.get_attribute("src")
        box = page.locator("#mass input[type=number]")
        box.fill(mass)
        box.press("Enter")
        page.locator("#mass input[type=range]").focus()
        page.keyboard.press("Tab")
        page.wait_for_function(
            "before => { const i = document.querySelector('#masks img'); return i && i.getAttribute('src') !== before }",
            arg=before,
        )
        shown[mass] = picture(page, "#masks").mean()
    assert shown["0.2"] < shown["0.9"], "more attention shown is a brighter picture"


def test_an_upload_keeps_its_proportions(page: Any) -> None:
    upload(page, "disc.png", png())
    count_pictures(page, "#maps", 3)
    page.wait_for_timeout(500)
    height, width = picture(page, "#maps", 1).shape[:2]
    assert width / height == pytest.approx(160 / 90, rel=0.02)


@pytest.mark.parametrize(
    ("name", "data"),
    [("words.png", b"these are words, not a picture"), ("cut.png", png()[:200]), ("empty.png", b"")],
)
def test_what_is_no_image_is_refused_in_words_and_the_page_lives_on(page: Any, name: str, data: bytes) -> None:
    upload(page, name, data)
    toast = page.locator(".toast-body, [data-testid=toast-body]").first
    toast.wait_for()
    assert "This file cannot be used: " in toast.inner_text()
    assert "Traceback" not in page.content()
    page.locator("#samples img").nth(1).click()
    count_pictures(page, "#maps", 3)


def test_the_page_fits_a_phone(browser: Any, demo: dict[str, str]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(ANSWER_MS)
    page.goto(demo["demo"])
    page.locator("#samples img").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_another_server_can_be_named(browser: Any, demo: dict[str, str], repo_root: Path, tmp_path: Path) -> None:
    """A second page, without a server of its own, shows what the first one's server says."""
    process, addresses = launch(repo_root, tmp_path, "--server", f"grpc://{demo['grpc']}")
    try:
        assert "grpc" not in addresses, "no server was started"
        page = browser.new_page()
        page.set_default_timeout(ANSWER_MS)
        page.goto(addresses["demo"])
        page.locator("#samples img").nth(0).click()
        count_pictures(page, "#maps", 3)
        page.get_by_role("tab", name="Nearest neighbours").click()
        assert count_pictures(page, "#neighbours", 8) == 8
        page.close()
    finally:
        stop(process)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("grpc://127.0.0.1:{free}", "does not answer"),
        ("http://127.0.0.1:{grpc}", "Is this its gRPC port?"),
        ("http://127.0.0.1:abc", "wanted grpc://host:port or http://host:port"),
        ("127.0.0.1:8001", "wanted grpc://host:port or http://host:port"),
    ],
)
def test_no_server_at_the_address_is_one_line(demo: dict[str, str], repo_root: Path, address: str, words: str) -> None:
    at = address.format(free=free_port(), grpc=demo["grpc"].rpartition(":")[2])
    done = subprocess.run(
        [sys.executable, "app.py", "--server", at, "--port", str(free_port())],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


def test_a_name_that_no_machine_can_have_is_told_in_words() -> None:
    """No part of a host's name may be longer than 63 characters."""
    address = f"http://{'a' * 70}:8000"
    with pytest.raises(gr.Error, match=f"The address {address} cannot be used"):
        Served(address).models()
