"""Embeddings in, embeddings in which cosines tell copies from strangers out: PCA whitening fitted on the heap.

Embeddings of self-supervised networks share a large common part, so that strangers have cosines of 0.8 and more and no published threshold
means anything. Removing the mean and giving each main direction the same weight, as copy detection does (Jegou & Chum 2012; Pizzi et al.
2022), brings strangers to about 0.

Legend: n images, D feature size, E directions kept.
"""

from dataclasses import dataclass

import numpy as np

from curation.folder import Folder, Stage, replacing
from curation.neighbours import unit_rows

FIT_ROWS = 50_000
"""Images, evenly spaced, that it is fitted on."""
ROWS_PER_DIRECTION = 4
"""With fewer images than this for each direction, the smallest directions are noise; fewer are then kept."""
_BLOCK = 65_536


@dataclass(frozen=True)
class Whitening:
    """unit((x - mean) @ directions): float32 [D] and [D, E]."""

    mean_D: np.ndarray
    directions_DE: np.ndarray

    def __call__(self, features_nD: np.ndarray) -> np.ndarray:
        """Whitened unit rows, float32 [n, E]."""
        return unit_rows((features_nD - self.mean_D) @ self.directions_DE)


def fit_whitening(features_nD: np.ndarray, directions: int) -> Whitening:
    """Fitted on at most `FIT_ROWS` unit rows; directions along which nothing varies are left out."""
    rows = np.unique(np.linspace(0, len(features_nD) - 1, min(len(features_nD), FIT_ROWS)).astype(np.int64))
    sample = np.asarray(features_nD[rows], np.float64)
    mean_D = sample.mean(axis=0)
    covariance_DD = (sample - mean_D).T @ (sample - mean_D) / len(sample)
    variance_D, vectors_DD = np.linalg.eigh(covariance_DD)
    keep = min(
        directions, max(1, len(rows) // ROWS_PER_DIRECTION), int((variance_D > 1e-10 * variance_D[-1]).sum()) or 1
    )
    scale_E = 1 / np.sqrt(np.maximum(variance_D[::-1][:keep], 1e-20))
    return Whitening(mean_D.astype(np.float32), (vectors_DD[:, ::-1][:, :keep] * scale_E).astype(np.float32))


def whitened(features: Stage, fitted_on: Stage, directions: int, folder: Folder) -> Stage:
    """The stage whose `features.npy` holds the features of a stage, whitened as fits those of another; 0 directions change nothing."""
    if directions == 0:
        return features
    stage = folder.stage("whiten", features=features.key, fitted_on=fitted_on.key, directions=directions)
    if not stage.done:
        whitening = fit_whitening(np.load(fitted_on.path / "features.npy", mmap_mode="r"), directions)
        found_nD = np.load(features.path / "features.npy", mmap_mode="r")
        with replacing(stage.path / "features.npy") as path:
            shape = (len(found_nD), whitening.directions_DE.shape[1])
            out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            for start in range(0, len(found_nD), _BLOCK):
                out[start : start + _BLOCK] = whitening(found_nD[start : start + _BLOCK])
            out.flush()
        stage.finish({"directions": shape[1]})
    return stage
