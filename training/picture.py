"""A picture of what the teacher looks at: each row an image and the attention of each head, as one PNG."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from backbones.vit import ViT
from data.preprocess import Preprocess, whole_view

CELL_PX = 160


def attention_picture(backbone: ViT, images: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    """RGB uint8 [rows * CELL_PX, (1 + heads) * CELL_PX, 3] for decoded images [H, W, 3]."""
    patch = backbone.patch_px
    size_px = max(round(preprocess.whole_px / patch), 1) * patch
    pixels = torch.from_numpy(np.stack([whole_view(image, preprocess, size_px) for image in images]))
    was_training = backbone.training
    with torch.inference_mode():
        attention_Bnhw = backbone.eval().outputs(pixels)["attention"].numpy()
    backbone.train(was_training)
    rows = []
    for image, heads in zip(images, attention_Bnhw, strict=True):
        cells = [cv2.resize(image, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)]
        cells += [colour(head) for head in heads]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)


def colour(map_hw: np.ndarray) -> np.ndarray:
    """A map as a picture, from its smallest value to its largest, enlarged without smoothing."""
    span = float(map_hw.max() - map_hw.min())
    levels = ((map_hw - map_hw.min()) / max(span, 1e-12) * 255).astype(np.uint8)
    enlarged = cv2.resize(levels, (CELL_PX, CELL_PX), interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(cv2.applyColorMap(enlarged, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
