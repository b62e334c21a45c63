"""Starting the demo and driving its page in Debian's chromium."""

import base64
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

START_S = 240
ANSWER_MS = 200_000
TOAST = ".toast-body, [data-testid=toast-body]"
CHOSEN = """([id, words]) => { const box = document.getElementById(id);
    return [...box.querySelectorAll('.token, input')].some(one => (one.value ?? one.innerText).includes(words)) }"""
TABS = ("Attention", "Similarity", "Search", "Depth and segmentation", "Video", "Evaluate", "Train")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(repo_root: Path, home: Path, *words: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start the demo as `make demo` does, in a home of its own; returns once it has printed its addresses."""
    env = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "XDG_DATA_HOME": str(home / "data")}
    (home / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(free_port()), *words],
        cwd=repo_root,
        env=env | {"TMPDIR": str(home / "tmp")},
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


def open_page(browser: Any, url: str, width: int = 1440) -> Any:
    """The page, loaded, with a list of what its console complained about."""
    page = browser.new_page(viewport={"width": width, "height": 1200})
    page.set_default_timeout(ANSWER_MS)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(url)
    page.locator("#samples img").first.wait_for()
    return page


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def shoot(page: Any, repo_root: Path, name: str, full: bool = True) -> None:
    """A picture for people, in a folder that git ignores; by the browser's own command, as playwright's waits for all frames' scripts."""
    folder = repo_root / ".cache" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    session = page.context.new_cdp_session(page)
    taken = session.send("Page.captureScreenshot", {"captureBeyondViewport": full})
    session.detach()
    (folder / f"{name}-{page.viewport_size['width']}.png").write_bytes(base64.b64decode(taken["data"]))


def source(page: Any, selector: str, number: int = 0) -> str:
    """Address of an image element's picture."""
    locator = page.locator(f"{selector} img").nth(number)
    locator.wait_for()
    return str(locator.get_attribute("src"))


def picture(page: Any, selector: str, number: int = 0) -> np.ndarray:
    """An image element's picture, as the browser got it: uint8 [H, W, 3]."""
    reply = page.request.get(source(page, selector, number))
    assert reply.ok
    decoded = cv2.imdecode(np.frombuffer(reply.body(), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded


def until_changed(page: Any, selector: str, before: str) -> None:
    """Wait until an image element shows another picture."""
    page.wait_for_function(
        "([s, before]) => { const i = document.querySelector(s + ' img'); return i && i.getAttribute('src') !== before }",
        arg=[selector, before],
    )


def count_pictures(page: Any, selector: str, at_least: int) -> int:
    page.wait_for_function(f"document.querySelectorAll('{selector} img').length >= {at_least}")
    return int(page.locator(f"{selector} img").count())


def set_slider(page: Any, elem_id: str, value: str) -> None:
    box = page.locator(f"#{elem_id} input[type=number]")
    box.fill(value)
    box.press("Enter")
    box.press("Tab")


def choose(page: Any, elem_id: str, words: str) -> None:
    """Choose the entry of a drop-down list that holds some words; as a person would, again where the list closed or took no click."""
    from playwright.sync_api import TimeoutError as Late  # the tests are skipped where it is not installed

    option = page.get_by_role("option").filter(has_text=words).first
    box = page.locator(f"#{elem_id} input").first
    for _ in range(10):
        box.blur()  # a box that has the focus does not open its list again
        box.click()
        with contextlib.suppress(Late):
            option.click(timeout=3000)
            page.wait_for_function(CHOSEN, arg=[elem_id, words], timeout=3000)
            return
    raise AssertionError(f"no entry {words!r} of #{elem_id} could be chosen")


def upload(page: Any, selector: str, name: str, data: bytes, mime: str = "image/png") -> None:
    page.locator(f"{selector} input[type=file]").first.set_input_files({"name": name, "mimeType": mime, "buffer": data})


def said(page: Any, words: str) -> str:
    """Wait for a message with some words, close all messages, return its text."""
    toast = page.locator(TOAST).filter(has_text=words).first
    toast.wait_for()
    text = str(toast.inner_text())
    page.wait_for_function(
        f"document.querySelectorAll('.toast-close').forEach(b => b.click()) || !document.querySelector('{TOAST}')"
    )
    return text


def png(height: int = 90, width: int = 160) -> bytes:
    """A white disc on dark grey."""
    image = np.full((height, width, 3), 40, np.uint8)
    cv2.circle(image, (width // 3, height // 2), height // 4, (255, 255, 255), -1)
    return cv2.imencode(".png", image)[1].tobytes()


def clip(path: Path, n_frames: int, fps: int = 12, size: tuple[int, int] = (96, 128), codec: str = "libx264") -> bytes:
    """A disc that wanders over dark grey."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(n_frames):
            image = np.full((*size, 3), 40, np.uint8)
            cv2.circle(image, (20 + 3 * number % 80, size[0] // 2), 14, (255, 255, 255), -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()
