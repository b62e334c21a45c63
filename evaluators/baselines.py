"""What a trained backbone has to beat, as runtimes: raw pixels, gradients, colours, and the same network before any training.

All see exactly the views the checkpoint sees, so a difference in accuracy is owed to the training and to nothing else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import cv2
import numpy as np
import torch

from backbones.checkpoints import Backbone, Manifest, make_backbone, weights_sha256
from data.errors import InputError
from runtimes.runtime import Runtime, step_px
from runtimes.torch_runtime import TorchRuntime

BaselineName = Literal["pixels", "hog", "colour", "untrained"]
HOG_SIDE_PX, HOG_CELL_PX, HOG_DIRECTIONS = 64, 8, 9
PIXELS_SIDE_PX = 32
"""The pixel baseline is a 32 x 32 RGB thumbnail: 3,072 numbers."""


class PixelRuntime(Runtime):
    """The normalised view, area-averaged to 32 x 32 and flattened channel by channel: `embedding` [B, 3072]."""

    def __init__(self, manifest: Manifest) -> None:
        what = f"pixels-{PIXELS_SIDE_PX}"
        self.manifest = replace(
            manifest,
            architecture={"family": "pixels", "side_px": PIXELS_SIDE_PX},
            weights_sha256=hashlib.sha256(what.encode()).hexdigest(),
        )
        self.name = "pixels"
        self.device = "cpu"
        self.outputs = ("embedding",)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """Thumbnails of a batch [B, 3, H, W]."""
        side = PIXELS_SIDE_PX
        thumbnails = np.empty((len(pixels_NCHW), 3, side, side), dtype=np.float32)
        for image, thumbnail in zip(pixels_NCHW, thumbnails, strict=True):
            for channel in range(3):
                thumbnail[channel] = cv2.resize(image[channel], (side, side), interpolation=cv2.INTER_AREA)
        return {"embedding": thumbnails.reshape(len(thumbnails), -1)}


class HogRuntime(Runtime):
    """Histograms of oriented gradients (Dalal and Triggs 2005) of the view at 64 x 64: `embedding` [B, 1764]."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = replace(
            manifest,
            architecture={"family": "hog", "side_px": HOG_SIDE_PX},
            weights_sha256=hashlib.sha256(f"hog-{HOG_SIDE_PX}".encode()).hexdigest(),
        )
        self.name = "hog"
        self.device = "cpu"
        self.outputs = ("embedding",)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """Descriptors of a batch [B, 3, H, W]."""
        std_C11 = np.array(self.manifest.preprocess.std, np.float32)[:, None, None]  # the mean has no gradient
        described = []
        for image_CHW in pixels_NCHW:
            side = (HOG_SIDE_PX, HOG_SIDE_PX)
            small_HWC = cv2.resize((image_CHW * std_C11).transpose(1, 2, 0), side, interpolation=cv2.INTER_AREA)
            described.append(oriented_gradients(small_HWC))
        return {"embedding": np.stack(described)}


def oriented_gradients(image_HWC: np.ndarray) -> np.ndarray:
    """HOG of a float image whose sides are multiples of a cell: 8 px cells, 2 x 2 cells a block, 9 unsigned directions.

    Of the three channels, each pixel takes the strongest gradient; its weight is shared by the two nearest directions.
    Blocks are brought to length 1, cut at 0.2 and brought to length 1 again ("L2-Hys").
    """
    height, width, _ = image_HWC.shape
    dx = cv2.filter2D(image_HWC, cv2.CV_32F, np.array([[-1.0, 0.0, 1.0]]))
    dy = cv2.filter2D(image_HWC, cv2.CV_32F, np.array([[-1.0], [0.0], [1.0]]))
    strongest = (dx**2 + dy**2).argmax(axis=2)[..., None]
    dx_HW, dy_HW = (np.take_along_axis(one, strongest, axis=2)[..., 0] for one in (dx, dy))
    bins_HW = np.arctan2(dy_HW, dx_HW) % np.pi * (HOG_DIRECTIONS / np.pi) - 0.5
    lower_HW = np.floor(bins_HW).astype(np.int64)
    cells_HW = np.arange(height)[:, None] // HOG_CELL_PX * (width // HOG_CELL_PX) + np.arange(width) // HOG_CELL_PX
    histogram = np.zeros(height * width // HOG_CELL_PX**2 * HOG_DIRECTIONS)
    for direction_HW, share_HW in ((lower_HW, 1 - (bins_HW - lower_HW)), (lower_HW + 1, bins_HW - lower_HW)):
        where = cells_HW * HOG_DIRECTIONS + direction_HW % HOG_DIRECTIONS
        weight = np.hypot(dx_HW, dy_HW) * share_HW
        histogram += np.bincount(where.ravel(), weight.ravel(), minlength=len(histogram))
    cells_hwd = histogram.reshape(height // HOG_CELL_PX, width // HOG_CELL_PX, HOG_DIRECTIONS)
    corners = [cells_hwd[y : y - 1 or None, x : x - 1 or None] for y in (0, 1) for x in (0, 1)]
    blocks = np.concatenate(corners, axis=2)
    blocks = np.minimum(blocks / (np.linalg.norm(blocks, axis=2, keepdims=True) + 1e-6), 0.2)
    blocks /= np.linalg.norm(blocks, axis=2, keepdims=True) + 1e-6
    return blocks.ravel().astype(np.float32)


class ColourRuntime(Runtime):
    """Mean and spread of each channel: of the view, `embedding` [B, 6]; of each patch, `patches` [B, N, 6]."""

    def __init__(self, manifest: Manifest) -> None:
        side = step_px(manifest)
        self.manifest = replace(
            manifest,
            architecture={"family": "colour", "patch_px": side},
            weights_sha256=hashlib.sha256(f"colour-{side}".encode()).hexdigest(),
        )
        self.name = "colour"
        self.device = "cpu"
        self.outputs = ("embedding", "patches")

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """Statistics of a batch [B, 3, H, W], whose sides are multiples of the patch."""
        n, _, height, width = pixels_NCHW.shape
        side = step_px(self.manifest)
        cut = pixels_NCHW.reshape(n, 3, height // side, side, width // side, side)
        patches = np.concatenate([cut.mean(axis=(3, 5)), cut.std(axis=(3, 5))], axis=1)
        embedding = np.concatenate([pixels_NCHW.mean(axis=(2, 3)), pixels_NCHW.std(axis=(2, 3))], axis=1)
        made = {"embedding": embedding, "patches": patches.reshape(n, 6, -1).transpose(0, 2, 1)}
        return {name: np.ascontiguousarray(made[name], dtype=np.float32) for name in outputs}


def open_baseline(name: BaselineName, manifest: Manifest, device: str, seed: int) -> Runtime:
    """The baseline beside a network with this manifest. Raises InputError where its architecture is not known."""
    if name == "pixels":
        return PixelRuntime(manifest)
    if name == "hog":
        return HogRuntime(manifest)
    if name == "colour":
        return ColourRuntime(manifest)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make_backbone(manifest.architecture).eval()
    except ValueError as error:
        raise InputError(
            f"--baselines untrained: {error}; the network's manifest names no architecture to build, "
            "use --baselines pixels"
        ) from error
    return TorchRuntime(
        Backbone(model, replace(manifest, recipe=None, step=0, weights_sha256=weights_sha256(model.state_dict()))),
        device=device,
    )
