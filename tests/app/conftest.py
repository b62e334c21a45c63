"""One demo with its server, one browser, one page a module."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.app.driving import launch, open_page, stop


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one run that warns of collapse, and a link that leads out of it."""
    root = tmp_path_factory.mktemp("watched")
    write_run(root / "first", 40, ["features of different images are nearly equal <b>(spread 0.010)</b>"])
    outside = tmp_path_factory.mktemp("outside")
    write_run(outside / "secret", 3, [])
    (root / "away").symlink_to(outside)
    return root


def write_run(folder: Path, n_steps: int, warnings: list[str]) -> None:
    """What a run of so many steps leaves behind, its last line cut short."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"start": {"step": 0, "name": "tiny"}}]
    for step in range(1, n_steps + 1):
        lines.append(
            {"step": step, "loss": 6 * math.exp(-step / 20), "lr": 1e-4, "feature_spread": 0.9, "images_per_s": 12.5}
        )
    lines += [{"note": {"step": n_steps, "text": text}} for text in warnings]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    for kind in ("attention", "pca"):
        assert cv2.imwrite(str(folder / f"{kind}.png"), np.full((320, 640, 3), 99, np.uint8))


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo keeps what it keeps."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="package")
def demo(repo_root: Path, home: Path, runs: Path) -> Iterator[dict[str, str]]:
    """The demo with its embedded server on free ports."""
    process, addresses = launch(repo_root, home, "--server-ports", "0", "0", "0", "--runs", str(runs))
    yield addresses
    stop(process)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright; closed with this folder's tests, as playwright keeps an event loop in the main thread."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: install the package `chromium` to run the browser tests")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared_page(browser: Any, demo: dict[str, str]) -> Iterator[Any]:
    page = open_page(browser, demo["demo"])
    yield page
    page.close()


@pytest.fixture
def page(shared_page: Any) -> Iterator[Any]:
    """The page at 1440 pixels; its console must stay silent."""
    shared_page.complaints.clear()
    shared_page.set_viewport_size({"width": 1440, "height": 1200})
    yield shared_page
    assert shared_page.complaints == []
