"""Large images: what is held of their logits is bounded, and changes nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.heads import SegmentationHead, SegmentationHeadSpec
from evaluators import segmentation_cuts, segmentation_probe
from evaluators.segmentation_cuts import Cut, WindowTable
from evaluators.segmentation_probe import ImageTable, SegmentationTable, predict


@pytest.mark.parametrize("n_scales", [1, 3])
@pytest.mark.parametrize("seen", ["whole", "windows"])
def test_a_large_image_is_compared_some_classes_at_a_time_with_the_same_result(
    seen: str, n_scales: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a photograph of 12 million pixels in ADE20K's 150 classes are 7 GB."""
    generator, hw = torch.Generator().manual_seed(0), (37, 53)
    head = SegmentationHead(SegmentationHeadSpec(n_classes=11, width_in=6))
    tables: list[ImageTable] = []
    for grid in range(4, 4 + n_scales):
        patches = torch.randn(2, grid**2, 6, generator=generator).numpy()
        table = SegmentationTable(("a",), ("a",), patches, [np.zeros(hw, np.int32)])
        cuts = ((0, Cut(0, (16, 24), 0, 0)), (1, Cut(0, (16, 24), 0, 8)))
        tables.append(table if seen == "whole" else WindowTable(("a",), ("a",), table.masks, patches, (cuts,), 16))
    logits = [table.logit_map(head, 0)(hw, slice(0, 11)) for table in tables]
    wanted = logits[0] if n_scales == 1 else torch.stack([torch.softmax(one, dim=0) for one in logits]).mean(dim=0)
    assert np.array_equal(predict(head, tables, 0, hw), wanted.argmax(dim=0).numpy())
    made: list[int] = []

    def watched(map_1chw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        made.append(map_1chw.shape[1] * size[0] * size[1])
        return F.interpolate(map_1chw, size=size, mode="bilinear", align_corners=False)

    for module in (segmentation_probe, segmentation_cuts):
        monkeypatch.setattr(module, "enlarged", watched)
    monkeypatch.setattr(segmentation_probe, "LOGITS_AT_ONCE", 4 * 37 * 53 + 1)
    assert np.array_equal(predict(head, tables, 0, hw), wanted.argmax(dim=0).numpy())
    assert max(made) == 4 * 37 * 53
    monkeypatch.setattr(segmentation_probe, "LOGITS_AT_ONCE", 1)
    made.clear()
    assert np.array_equal(predict(head, tables, 0, hw), wanted.argmax(dim=0).numpy())
    assert max(made) == 37 * 53, "one class is the least"
