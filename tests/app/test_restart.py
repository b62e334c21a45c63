"""A page over another server: it says when that server is away, goes on by itself when it is back, and shows the heads that it has."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import app
from backbones.checkpoints import load_backbone
from backbones.heads import HeadManifest, SegmentationHead, SegmentationHeadSpec, save_head
from demo.client import Served
from demo.page import CSS, make_page
from server.config import ServerConfig
from server.run import Running
from tests.app.driving import free_port, open_page, open_tab, picture, said, shoot, source, until_changed

pytestmark = pytest.mark.browser
Start = Callable[[], Running]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a server of the bundled backbone and a segmentation head, always at the same port."""
    folder = tmp_path_factory.mktemp("heads")
    (folder / "backbone.safetensors").symlink_to(app.CHECKPOINT)
    manifest = load_backbone(app.CHECKPOINT).manifest
    torch.manual_seed(0)
    head = SegmentationHead(SegmentationHeadSpec(n_classes=3, width_in=manifest.architecture["width"]))
    about = HeadManifest(
        kind="segmentation", backbone_sha256=manifest.weights_sha256, spec={}, classes=("sky", "<i>sea</i>", "sand")
    )
    save_head(folder / "segmentation.safetensors", head, about)
    config = ServerConfig(
        models=folder,
        http_port=free_port(),
        grpc_port=0,
        metrics_port=0,
        collections=tmp_path_factory.mktemp("state"),
        samples="none",
        threads=1,
        log_level="warning",
    )
    return lambda: Running(config)


@pytest.mark.slow
def test_the_page_survives_a_restart_of_the_server(browser: Any, start: Start, repo_root: Path, tmp_path: Path) -> None:
    """One page over two lives of a server at one address; its heads are others than the bundled ones."""
    with contextlib.ExitStack() as stack:
        with start() as running:
            blocks = make_page(Served(running.addresses.http), None, app.SAMPLES, tmp_path, bundled=False)
            allowed = [str(app.SAMPLES.parent)]
            _, url, _ = blocks.launch(
                server_port=free_port(),
                prevent_thread_lock=True,
                quiet=True,
                css=CSS,
                allowed_paths=allowed,
                _frontend=False,
            )
            stack.callback(blocks.close)
            page = open_page(browser, url)
            stack.callback(page.close)
            open_tab(page, "Depth and segmentation")
            before = source(page, "#classes")
            assert picture(page, "#classes").std() > 5
            assert "This server has no depth head." in page.locator("#tab-dense").inner_text()
            legend = page.locator("#class-legend").inner_text()
            assert "%" in legend
            assert "class 0" not in legend, "classes are told by name"
        page.locator("#status .down").wait_for()
        shoot(page, repo_root, "server-away")
        page.locator("#samples img").nth(7).click()
        assert "does not answer" in said(page, "does not answer")
        with start():
            page.locator("#status .up").wait_for()
            until_changed(page, "#classes", before)
            shoot(page, repo_root, "server-back")
            open_tab(page, "Train")
            page.get_by_text("There is no run below").wait_for()
            open_tab(page, "Evaluate")
            page.get_by_text("This server has no data to evaluate on.").wait_for()
        assert page.complaints == []
