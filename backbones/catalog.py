"""Published backbones by name: downloaded once, checked by hash on every use.

A file lands in $XDG_CACHE_HOME/dinoscope (by default ~/.cache/dinoscope) in one step, so that an interrupted download leaves nothing.
The publisher gives no hashes. Those below are SHA-256 sums that independent projects recorded of the same URL and agree on; where none
could be confirmed, `sha256` is None, and the file is pinned when it first has been loaded: its hash goes into FILE.sha256 beside it, and
a file that differs later is refused.
"""

import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backbones.checkpoints import CheckpointError

TIMEOUT_S = 30
"""Longest silence of a server."""
_CHUNK = 1 << 20
_DINO = "https://dl.fbaipublicfiles.com/dino"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"


@dataclass(frozen=True)
class Published:
    """Where a published .pth file lies."""

    url: str
    sha256: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """What its architecture must be, where no hash proves that it is the file of that name."""

    @property
    def file(self) -> str:
        """Its name in the cache."""
        return self.url.rsplit("/", 1)[-1]


CATALOG: dict[str, Published] = {
    "dino_vits16": Published(
        f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", None, {"width": 384, "patch_px": 16}
    ),
    "dino_vits8": Published(
        f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", None, {"width": 384, "patch_px": 8}
    ),
    "dino_vitb16": Published(
        f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e",
    ),
    "dino_vitb8": Published(
        f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", None, {"width": 768, "patch_px": 8}
    ),
    "dino_resnet50": Published(
        f"{_DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth", None, {"family": "resnet", "depth": 50}
    ),
    "dinov2_vits14": Published(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "dinov2_vitb14": Published(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "dinov2_vitl14": Published(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "dinov2_vitg14": Published(
        f"{_DINOV2}/dinov2_vitg14/dinov2_vitg14_pretrain.pth",
        "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    ),
    "dinov2_vits14_reg": Published(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "dinov2_vitb14_reg": Published(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    "dinov2_vitl14_reg": Published(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
    "dinov2_vitg14_reg": Published(
        f"{_DINOV2}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth",
        "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
    ),
}
"""Names as in the publishers' torch.hub entries."""


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope"


def fetch(name: str) -> Path:
    """The checked file of a catalog name, downloaded if the cache lacks it. Raises CheckpointError."""
    entry = CATALOG[name]
    path = cache_folder() / entry.file
    pinned = _pin_of(path)
    if not path.is_file():
        _download(entry, path)
    wanted = entry.sha256 or (pinned.read_text().strip() if pinned.is_file() else None)
    if wanted is not None and (found := _sha256(path)) != wanted:
        raise CheckpointError(f"{path}: its SHA-256 is {found}, want {wanted}; delete it to download {entry.url} anew")
    return path


def pin(name: str, architecture: Mapping[str, Any]) -> None:
    """Remember the hash of a file that was published without one, once it has proved to hold a network of this `architecture`.

    Raises CheckpointError where that is not the one of the name.
    """
    entry, path = CATALOG[name], cache_folder() / CATALOG[name].file
    if differing := {key: value for key, value in entry.architecture.items() if architecture.get(key) != value}:
        held = {key: architecture.get(key) for key in differing}
        raise CheckpointError(f"{path}: holds a network of {held}, {name} has {differing}; delete the file")
    if entry.sha256 is None and not _pin_of(path).is_file():
        found = _sha256(path)
        print(f"{path}: published without a hash; from now on it must have SHA-256 {found}", file=sys.stderr)
        _pin_of(path).write_text(f"{found}\n")


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _download(entry: Published, path: Path) -> None:
    """Stream to a file beside `path`, check it, then rename; progress goes to stderr."""
    unfinished: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(entry.url, timeout=TIMEOUT_S) as reply:
            total = int(reply.headers.get("Content-Length") or 0)
            handle, unfinished_name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            unfinished = Path(unfinished_name)
            bar = tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name, file=sys.stderr)
            with os.fdopen(handle, "wb") as file, bar:
                while chunk := reply.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
        if total and unfinished.stat().st_size != total:
            raise CheckpointError(
                f"{entry.url}: the connection broke after {unfinished.stat().st_size} of {total} bytes; try again"
            )
        if entry.sha256 and (found := _sha256(unfinished)) != entry.sha256:
            raise CheckpointError(f"{entry.url}: sent a file with SHA-256 {found}, want {entry.sha256}; not kept")
        unfinished.replace(path)
    except (urllib.error.URLError, HTTPException, OSError) as error:
        raise CheckpointError(
            f"cannot download {entry.url} ({error}); fetch it on another machine and put it at {path}"
        ) from error
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
