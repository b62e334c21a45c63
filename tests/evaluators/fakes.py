"""A small real data set and a runtime whose features can be predicted, for tests of everything above them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from backbones.checkpoints import Manifest, save_backbone
from backbones.vit import ViT, ViTSpec
from data.preprocess import Preprocess
from runtimes.runtime import Runtime

SMALL = Preprocess(size_px=32, resize_px=32, whole_px=32)
COLOURS = {"blue": (200, 40, 40), "green": (40, 200, 40), "red": (40, 40, 200)}
"""BGR, as OpenCV writes it."""


def colour_folder(root: Path, n_train: int = 8, n_val: int = 4, seed: int = 0, contrast: int = 100) -> Path:
    """train/COLOUR/*.png and val/COLOUR/*.png: noisy patches of three colours; low contrast makes them hard to tell."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", n_train), ("val", n_val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = rng.integers(-40, 40, (40, 40, 3))
                image = (np.array(colour) - 120) * contrast / 100 + 120 + noise
                image = np.clip(image, 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), image)
    return root


def small_checkpoint(path: Path, seed: int = 0) -> Path:
    """A ViT of 16 channels with random weights, for views of 32 pixels in 16 patches."""
    torch.manual_seed(seed)
    model = ViT(ViTSpec(patch_px=8, width=16, depth=2, heads=2, img_px=32))
    save_backbone(path, model, Manifest(architecture={}, preprocess=SMALL, source="random"))
    return path


class MeanColourRuntime(Runtime):
    """`embedding`: mean of each channel; `patches`: means of the four quarters. Counts what it was asked for."""

    def __init__(self, weights: str = "w", preprocess: Preprocess = SMALL, spoil: int | None = None) -> None:
        self.manifest = Manifest(
            architecture={"family": "mean-colour"}, preprocess=preprocess, source="test", weights_sha256=weights
        )
        self.name = "fake"
        self.device = "cpu"
        self.outputs = ("embedding", "patches")
        self.images = 0
        self.die_after: int | None = None
        self.spoil = spoil

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        if self.die_after is not None and self.images >= self.die_after:
            raise KeyboardInterrupt
        half = pixels_NCHW.shape[2] // 2
        quarters = [
            pixels_NCHW[:, :, y : y + half, x : x + half].mean(axis=(2, 3)) for y in (0, half) for x in (0, half)
        ]
        embedding = pixels_NCHW.mean(axis=(2, 3))
        if self.spoil is not None and self.images <= self.spoil < self.images + len(embedding):
            embedding[self.spoil - self.images] = np.nan
        self.images += len(pixels_NCHW)
        made = {"embedding": embedding, "patches": np.stack(quarters, axis=1)}
        return {name: made[name].astype(np.float32) for name in outputs}
