"""Folders of small pictures with planted copies, and a network that is not one."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from backbones.checkpoints import Manifest
from curation.alterations import ALTERATIONS
from data.preprocess import Preprocess
from runtimes.runtime import Runtime


def picture(seed: int, side: int = 96) -> np.ndarray:
    """A random picture of coloured blobs, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(12):
        centre, radius = rng.integers(0, side, 2).tolist(), int(rng.integers(4, side // 3))
        cv2.circle(image, centre, radius, rng.integers(0, 256, 3).tolist(), -1)
    return image


def save(path: Path, image_HWC: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR))


def make_heap(folder: Path, n: int = 24) -> Path:
    """`n` different pictures; copies of the first six, altered in one way each and smaller; four that filters drop."""
    for seed in range(n):
        save(folder / f"o{seed:03d}.png", picture(seed))
    for seed, (kind, alter) in enumerate(ALTERATIONS.items()):
        altered = alter(picture(seed), np.random.default_rng(seed))
        save(folder / f"copy_{kind}.png", cv2.resize(altered, (80, 80)))
    save(folder / "x_small.png", picture(500, 16))
    save(folder / "x_long.png", np.tile(picture(501, 40), (6, 1, 1)))
    save(folder / "x_flat.png", np.full((64, 64, 3), 128, np.uint8))
    (folder / "x_broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


def hook(image_HWC: np.ndarray) -> bool:
    """Rejects one picture, by its first pixel."""
    return bool((image_HWC[0, 0] == picture(20)[0, 0]).all())


def boxes(image_HWC: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The upper left quarter of every picture."""
    height, width = image_HWC.shape[:2]
    return [(-5, 0, width // 2, height // 2)]


class PixelRuntime(Runtime):
    """Embeds an image as its own shrunken pixels, averaged with their mirror image, without their mean."""

    def __init__(self) -> None:
        preprocess = Preprocess(size_px=32, resize_px=32, whole_px=32)
        self.manifest = Manifest(architecture={"patch_px": 8}, preprocess=preprocess, weights_sha256="pixels")
        self.name, self.device, self.outputs = "pixels", "cpu", ("embedding",)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """The shrunken pixels, float32 [N, 192]."""
        coarse = pixels_NCHW.reshape(len(pixels_NCHW), 3, 8, 4, 8, 4).mean(axis=(3, 5))
        flat = (coarse + coarse[..., ::-1]).reshape(len(coarse), -1)
        return {"embedding": (flat - flat.mean(axis=1, keepdims=True)).astype(np.float32)}
