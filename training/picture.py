"""Pictures of what the teacher sees, on the same images all through a run: attention of each head, and patches by what they have in common.

Axes: B images, N = h * w patches, D features, C = 3 principal components.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from backbones.resnet import ResNet
from backbones.vit import ViT
from data.datasets import Dataset
from data.preprocess import Preprocess, whole_view
from data.streams import Stream

CELL_PX = 160
N_IMAGES = 6
SPACING = 1.2
"""A picture is due when the run is so many times as long as at the one before: many in the beginning, where most changes, few later."""
SHADES = (2.0, 98.0)
"""Percentiles of a component that become black and full colour."""


class Album:
    """The pictures of a run folder: `pictures/step_NNNNNN_attention.png` and `_pca.png`; links beside the folder name the latest.

    `held_out` tells whether the images drawn are kept from training.
    """

    def __init__(
        self, folder: Path, drawn: Dataset | Stream, preprocess: Preprocess, trained_on: Dataset | Stream
    ) -> None:
        self.folder, self.preprocess = folder, preprocess
        self.held_out = isinstance(drawn, Dataset) and not trained_on.shares_images(drawn)
        self.images = drawn.examples(N_IMAGES)

    def is_due(self, step: int) -> bool:
        """Whether enough of the run has gone by since the picture before."""
        return step >= SPACING * max([0, *(number for number in self.steps() if number <= step)])

    def steps(self) -> list[int]:
        """Steps of which there are pictures, in order."""
        found = (self.folder / "pictures").glob("step_*_pca.png")
        return sorted(int(path.name.split("_")[1]) for path in found if path.name.split("_")[1].isdigit())

    def path(self, step: int, kind: str) -> Path:
        """Where the picture of a step and kind lies."""
        return self.folder / "pictures" / f"step_{step:06d}_{kind}.png"

    def add(self, step: int, backbone: ViT | ResNet) -> None:
        """Draw the backbone as it is now, replacing pictures of the same step."""
        if not self.images:
            return
        (self.folder / "pictures").mkdir(exist_ok=True)
        maps_BNhw, patches_BND = self.look(backbone)
        if maps_BNhw is not None:
            self._save(step, "attention", attention_picture(self.images, maps_BNhw))
        before, kept = None, self.folder / "pictures" / ".components.npy"
        with suppress(OSError, ValueError, EOFError):  # absent at first, damaged after a power cut: colours begin anew
            before = np.load(kept, allow_pickle=False)
        scores_BNC = principal_components(patches_BND, before)
        scratch = kept.with_name(".components.part.npy")
        np.save(scratch, scores_BNC.astype(np.float32))
        os.replace(scratch, kept)
        self._save(step, "pca", pca_picture(self.images, scores_BNC))

    def look(self, backbone: ViT | ResNet) -> tuple[np.ndarray | None, np.ndarray]:
        """Attention [B, heads, h, w], None of a network that has none, and patches [B, N, D] of the images."""
        patch = backbone.patch_px if isinstance(backbone, ViT) else 1
        size_px = max(round(self.preprocess.whole_px / patch), 1) * patch
        pixels = torch.from_numpy(np.stack([whole_view(image, self.preprocess, size_px) for image in self.images]))
        was_training = backbone.training
        with torch.inference_mode():
            found = backbone.eval().outputs(pixels.to(next(backbone.parameters()).device))
        backbone.train(was_training)
        attention = found["attention"].float().cpu().numpy() if "attention" in found else None
        return attention, found["patches"].float().cpu().numpy()

    def _save(self, step: int, kind: str, picture: np.ndarray) -> None:
        path = self.path(step, kind)
        write_png(path, picture)
        link, scratch = self.folder / f"{kind}.png", self.folder / f".{kind}.part.png"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.relative_to(self.folder))
        os.replace(scratch, link)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write RGB uint8 [H, W, 3] atomically."""
    scratch = path.with_name(f".{path.stem}.part.png")
    done, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert done, "PNG holds any uint8 picture"
    scratch.write_bytes(encoded.tobytes())
    os.replace(scratch, path)


def attention_picture(images: Sequence[np.ndarray], maps_Bnhw: np.ndarray) -> np.ndarray:
    """RGB uint8: a row an image, which comes first, then the attention of each of its n heads."""
    rows = []
    for image, heads in zip(images, maps_Bnhw, strict=True):
        rows.append(np.concatenate([cell(image), *(cell(colour(head)) for head in heads)], axis=1))
    return np.concatenate(rows, axis=0)


def pca_picture(images: Sequence[np.ndarray], scores_BNC: np.ndarray) -> np.ndarray:
    """RGB uint8: images above, their patches' three components as red, green and blue below; one scale for all."""
    low, high = np.percentile(scores_BNC.reshape(-1, 3), SHADES, axis=0)
    shades = np.clip((scores_BNC - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = round(scores_BNC.shape[1] ** 0.5)
    levels = (shades * 255).astype(np.uint8).reshape(len(images), side, side, 3)
    return np.concatenate(
        [np.concatenate([cell(image), cell(map_)], axis=0) for image, map_ in zip(images, levels, strict=True)], axis=1
    )


def principal_components(patches_BND: np.ndarray, before_BNC: np.ndarray | None) -> np.ndarray:
    """Scores [B, N, 3] of all images' patches on their three strongest directions.

    A direction's sign is nobody's choice: it is taken to agree with `before_BNC`, the scores of the picture before, so that colours stay
    as training goes on; without one, to have the longer tail above 0. Of fewer than three directions the rest is 0.
    """
    rows = patches_BND.reshape(-1, patches_BND.shape[-1]).astype(np.float64)
    rows -= rows.mean(axis=0)
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    scores = np.zeros((len(rows), 3))
    n = min(3, len(singular))
    scores[:, :n] = left[:, :n] * singular[:n]
    same = before_BNC is not None and before_BNC.shape == (*patches_BND.shape[:2], 3)
    sides = (scores * before_BNC.reshape(-1, 3)).sum(axis=0) if same else (scores**3).sum(axis=0)  # type: ignore[union-attr]
    return (scores * np.where(sides < 0, -1.0, 1.0)).reshape(*patches_BND.shape[:2], 3)


def cell(picture: np.ndarray) -> np.ndarray:
    """Stretched to a cell; enlarged without smoothing."""
    smaller = min(picture.shape[:2]) >= CELL_PX
    return cv2.resize(picture, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST)


def colour(map_hw: np.ndarray) -> np.ndarray:
    """A map as RGB, from its smallest value to its largest."""
    span = float(map_hw.max() - map_hw.min())
    levels = ((map_hw - map_hw.min()) / max(span, 1e-12) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
