"""Catalog names: downloaded once, checked on every use. The publisher is played by a server on this machine."""

import functools
import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones import catalog
from backbones.catalog import CATALOG, Published, cache_folder, fetch
from backbones.checkpoints import CheckpointError, load_backbone, weights_sha256
from tests.backbones.nets import small_vit


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a name with `cut` in it breaks off half-way."""

    def do_GET(self) -> None:
        if "cut" not in self.path:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served; the cache is empty and apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def entry(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Published:
    """A network in the catalog under the name `tiny_net`, its hash known."""
    folder, url = served
    torch.save(small_vit().state_dict(), folder / "tiny.pth")
    entry = Published(f"{url}/tiny.pth", hashlib.sha256((folder / "tiny.pth").read_bytes()).hexdigest())
    monkeypatch.setitem(CATALOG, "tiny_net", entry)
    return entry


def cached() -> set[str]:
    return {file.name for file in cache_folder().iterdir()} if cache_folder().is_dir() else set()


class TestDownloads:
    def test_a_name_loads_like_a_file(self, entry: Published, capsys: pytest.CaptureFixture[str]) -> None:
        found = load_backbone("tiny_net")
        assert found.manifest.source == "tiny_net"
        assert found.manifest.weights_sha256 == weights_sha256(small_vit().state_dict())
        assert cached() == {"tiny.pth"}
        out, err = capsys.readouterr()
        assert out == ""
        assert "tiny.pth" in err  # the progress

    def test_the_second_use_needs_no_server(self, entry: Published, monkeypatch: pytest.MonkeyPatch) -> None:
        path = fetch("tiny_net")
        monkeypatch.setattr(catalog, "_download", lambda *_: pytest.fail("downloaded again"))
        assert fetch("tiny_net") == path

    def test_a_file_placed_by_hand_is_used(self, entry: Published, served: tuple[Path, str]) -> None:
        cache_folder().mkdir(parents=True)
        (served[0] / "tiny.pth").rename(cache_folder() / "tiny.pth")
        assert load_backbone("tiny_net").manifest.source == "tiny_net"

    def test_a_file_with_another_hash_is_not_kept(self, entry: Published, served: tuple[Path, str]) -> None:
        (served[0] / "tiny.pth").write_bytes(b"<html>moved</html>")
        with pytest.raises(CheckpointError, match=f"sent a file with SHA-256 .*, want {entry.sha256}; not kept"):
            fetch("tiny_net")
        assert cached() == set()

    def test_a_cached_file_that_was_altered_is_refused(self, entry: Published) -> None:
        path = fetch("tiny_net")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(CheckpointError, match=f"want {entry.sha256}; delete it to download"):
            load_backbone("tiny_net")

    def test_a_broken_connection_leaves_nothing(
        self, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (served[0] / "cut.pth").write_bytes(bytes(1000))
        monkeypatch.setitem(CATALOG, "cut_net", Published(f"{served[1]}/cut.pth"))
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            fetch("cut_net")
        assert cached() == set()


class TestPins:
    @pytest.fixture
    def unknown(self, entry: Published, monkeypatch: pytest.MonkeyPatch) -> Published:
        """The same network, its hash not known."""
        monkeypatch.setitem(CATALOG, "tiny_net", Published(entry.url))
        return entry

    def test_the_first_use_pins_the_hash_and_says_so(
        self, unknown: Published, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert load_backbone("tiny_net").manifest.source == "tiny_net"
        assert (cache_folder() / "tiny.pth.sha256").read_text() == f"{unknown.sha256}\n"
        assert f"published without a hash; from now on it must have SHA-256 {unknown.sha256}" in capsys.readouterr().err

    def test_a_file_that_is_no_network_is_not_pinned(self, unknown: Published, served: tuple[Path, str]) -> None:
        """Such as the page of a network that wants a log-in first."""
        good = (served[0] / "tiny.pth").read_bytes()
        (served[0] / "tiny.pth").write_text("<html>log in</html>")
        with pytest.raises(CheckpointError):
            load_backbone("tiny_net")
        (cache_folder() / "tiny.pth").write_bytes(good)
        load_backbone("tiny_net")
        assert (cache_folder() / "tiny.pth.sha256").read_text() == f"{unknown.sha256}\n"

    def test_another_network_than_the_names_is_not_pinned(
        self, unknown: Published, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(CATALOG, "tiny_net", Published(unknown.url, None, {"width": 384, "patch_px": 8}))
        with pytest.raises(CheckpointError, match=r"network of {'width': 64}, tiny_net has {'width': 384}; delete"):
            load_backbone("tiny_net")
        assert cached() == {"tiny.pth"}

    def test_a_file_that_differs_later_is_refused(self, unknown: Published) -> None:
        load_backbone("tiny_net")
        torch.save(small_vit(depth=1).state_dict(), cache_folder() / "tiny.pth")
        with pytest.raises(CheckpointError, match=f"want {unknown.sha256}"):
            fetch("tiny_net")

    def test_a_new_download_must_equal_the_pinned_one(self, unknown: Published, served: tuple[Path, str]) -> None:
        load_backbone("tiny_net")
        (cache_folder() / "tiny.pth").unlink()
        torch.save(small_vit(depth=1).state_dict(), served[0] / "tiny.pth")
        with pytest.raises(CheckpointError, match=f"want {unknown.sha256}"):
            fetch("tiny_net")


class TestOffline:
    def test_one_line_says_what_to_fetch_and_where_to_put_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
            monkeypatch.setenv("no_proxy", "*")
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/a/net.pth"
            monkeypatch.setitem(CATALOG, "far_net", Published(url))
            with pytest.raises(CheckpointError) as caught:
                load_backbone("far_net")
        message = str(caught.value)
        assert url in message
        assert str(tmp_path / "dinoscope" / "net.pth") in message
        assert "\n" not in message

    def test_a_file_the_server_does_not_have(self, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(CATALOG, "gone_net", Published(f"{served[1]}/gone.pth"))
        with pytest.raises(CheckpointError, match=r"gone\.pth .*404"):
            fetch("gone_net")

    def test_a_cache_that_cannot_be_written(
        self, entry: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(CheckpointError, match="cannot download"):
            fetch("tiny_net")


class TestNames:
    def test_every_published_size_is_there(self) -> None:
        v1 = {"dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8", "dino_resnet50"}
        v2 = {f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")}
        assert set(CATALOG) == v1 | v2

    def test_entries_are_well_formed_and_distinct(self) -> None:
        assert len({entry.file for entry in CATALOG.values()}) == len(CATALOG)
        hashes = [entry.sha256 for entry in CATALOG.values() if entry.sha256]
        assert len(set(hashes)) == len(hashes) == 9
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
        for name, entry in CATALOG.items():
            assert entry.sha256 or entry.architecture
            assert entry.url.startswith("https://dl.fbaipublicfiles.com/")
            assert ("reg4" in entry.url) == name.endswith("_reg")

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(CheckpointError, match=r"dinov2_vits15: is no backbone; .*dinov2_vits14"):
            load_backbone("dinov2_vits15")

    def test_a_file_of_that_name_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dinov2_vits14").mkdir()
        with pytest.raises(
            CheckpointError, match=r"dinov2_vits14: a folder without config\.json is no backbone; .*an \.onnx file"
        ):
            load_backbone("dinov2_vits14")
