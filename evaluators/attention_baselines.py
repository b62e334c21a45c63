"""What a network's attention has to beat, as runtimes with one head: where the border's colours are not, and the middle."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from backbones.checkpoints import Manifest
from evaluators.baselines import open_baseline
from runtimes.runtime import Runtime, step_px

AttentionBaseline = Literal["border", "centre", "untrained"]
BORDER_COLOURS = 64
"""Pixels along the border that a pixel is compared with."""
SPOT = 0.25
"""Spread of the spot in the middle, as a share of the side."""


class OneHead(Runtime):
    """`attention` [B, 1, h, w] by a rule instead of a network."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        self._step = step_px(manifest)
        self.manifest = replace(
            manifest,
            architecture={"family": name, "patch_px": self._step},
            weights_sha256=hashlib.sha256(name.encode()).hexdigest(),
        )
        self.name, self.device, self.outputs = name, "cpu", ("attention",)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("attention",)) -> dict[str, np.ndarray]:
        """The rule's map of each image."""
        self.check_call(pixels_NCHW, outputs)
        rule = border_distance if self.name == "border" else middle
        maps = []
        for pixels_CHW in pixels_NCHW:
            values_HW = rule(pixels_CHW)
            h, w = (side // self._step for side in values_HW.shape)
            maps.append(values_HW.reshape(h, self._step, w, self._step).mean(axis=(1, 3)))
        return {"attention": np.stack(maps)[:, None].astype(np.float32)}


def border_distance(pixels_CHW: np.ndarray) -> np.ndarray:
    """Distance of each pixel's colour to the nearest of those along the border, [H, W]; a little above 0."""
    edge = np.concatenate([pixels_CHW[:, 0], pixels_CHW[:, -1], pixels_CHW[:, :, 0], pixels_CHW[:, :, -1]], axis=1)
    nearest_HW = np.full(pixels_CHW.shape[1:], np.inf, np.float32)
    for colour_C in edge[:, :: max(1, edge.shape[1] // BORDER_COLOURS)].T:
        np.minimum(nearest_HW, ((pixels_CHW - colour_C[:, None, None]) ** 2).sum(axis=0), out=nearest_HW)
    distance: np.ndarray = np.sqrt(nearest_HW) + 1e-6
    return distance


def middle(pixels_CHW: np.ndarray) -> np.ndarray:
    """A round spot, [H, W]."""
    y, x = (np.linspace(-0.5, 0.5, side)[:, None] for side in pixels_CHW.shape[1:])
    spot: np.ndarray = np.exp(-(y**2 + x.T**2) / (2 * SPOT**2))
    return spot


def open_attention_baseline(name: AttentionBaseline, manifest: Manifest, device: str, seed: int) -> Runtime:
    """The baseline beside a network with this manifest. Raises InputError as `open_baseline` does."""
    return open_baseline("untrained", manifest, device, seed) if name == "untrained" else OneHead(name, manifest)
