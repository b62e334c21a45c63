"""What the authors report for their networks, beside what is measured here, where network, benchmark and evaluator are theirs.

Sources: DINO: Caron et al. 2021 and its repository's README; DINOv2: Oquab et al. 2023, tables 4, 7, 9, 10, 11, and its README; registers:
Darcet et al. 2023 and the README.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.catalog import CATALOG

DINO, DINOV2, REGISTERS = "Caron et al. 2021", "Oquab et al. 2023", "Darcet et al. 2023, DINOv2 README"


@dataclass(frozen=True)
class Figure:
    """A published value of one metric, in the metric's own unit."""

    evaluator: str
    benchmark: str
    """As in `--data benchmark:ROOT`."""
    metric: str
    by_network: Mapping[str, float]
    source: str


FIGURES = (
    Figure("knn", "imagenet", "top1", {
        "dino_vits16": 0.745, "dino_vits8": 0.783, "dino_vitb16": 0.761, "dino_vitb8": 0.774, "dino_resnet50": 0.675,
    }, DINO),
    Figure("linear", "imagenet", "top1_best_on_val", {
        "dino_vits16": 0.770, "dino_vits8": 0.797, "dino_vitb16": 0.782, "dino_vitb8": 0.801, "dino_resnet50": 0.753,
    }, DINO),
    Figure("knn", "imagenet", "top1", {
        "dinov2_vits14": 0.790, "dinov2_vitb14": 0.821, "dinov2_vitl14": 0.835, "dinov2_vitg14": 0.835,
    }, DINOV2),
    Figure("linear", "imagenet", "top1_best_on_val", {
        "dinov2_vits14": 0.811, "dinov2_vitb14": 0.845, "dinov2_vitl14": 0.863, "dinov2_vitg14": 0.865,
    }, DINOV2),
    Figure("knn", "imagenet", "top1", {
        "dinov2_vits14_reg": 0.791, "dinov2_vitb14_reg": 0.820, "dinov2_vitl14_reg": 0.838, "dinov2_vitg14_reg": 0.837,
    }, REGISTERS),
    Figure("linear", "imagenet", "top1_best_on_val", {
        "dinov2_vits14_reg": 0.809, "dinov2_vitb14_reg": 0.846, "dinov2_vitl14_reg": 0.867, "dinov2_vitg14_reg": 0.871,
    }, REGISTERS),
    Figure("attention", "voc2012", "jaccard", {"dino_vits16": 0.459, "dino_vits8": 0.447}, DINO),
    Figure("video_objects", "davis", "jf_mean", {
        "dino_vits16": 0.618, "dino_vits8": 0.699, "dino_vitb16": 0.623, "dino_vitb8": 0.714,
    }, DINO),
    Figure("video_actions", "ucf101", "top1_best_on_val", {
        "dinov2_vits14": 0.870, "dinov2_vitb14": 0.891, "dinov2_vitl14": 0.905, "dinov2_vitg14": 0.912,
    }, DINOV2),
    Figure("retrieval", "roxford5k", "map_medium", {
        "dinov2_vits14": 0.688, "dinov2_vitb14": 0.729, "dinov2_vitl14": 0.751, "dinov2_vitg14": 0.736,
    }, DINOV2),
    Figure("retrieval", "roxford5k", "map_hard", {
        "dinov2_vits14": 0.432, "dinov2_vitb14": 0.495, "dinov2_vitl14": 0.540, "dinov2_vitg14": 0.523,
    }, DINOV2),
    Figure("retrieval", "rparis6k", "map_medium", {
        "dinov2_vits14": 0.846, "dinov2_vitb14": 0.903, "dinov2_vitl14": 0.927, "dinov2_vitg14": 0.921,
    }, DINOV2),
    Figure("retrieval", "rparis6k", "map_hard", {
        "dinov2_vits14": 0.685, "dinov2_vitb14": 0.786, "dinov2_vitl14": 0.835, "dinov2_vitg14": 0.826,
    }, DINOV2),
)  # fmt: skip


def network_name(ckpt: str) -> str | None:
    """The catalog's name of a network that is given by it, or by the published file of that name; None for any other."""
    if ckpt in CATALOG:
        return ckpt
    return next((name for name, entry in CATALOG.items() if Path(ckpt).name == entry.file), None)


def published_reference(
    evaluator: str, ckpt: str, data: str, metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By metric the published value, its source, and what was measured minus it; empty where nothing comparable was published."""
    network, benchmark = network_name(ckpt), data.split(":", 1)[0] if ":" in data else None
    if network is None:
        return {}
    return {
        figure.metric: {
            "value": figure.by_network[network],
            "source": figure.source,
            "difference": round(metrics[figure.metric]["value"] - figure.by_network[network], 6),
        }
        for figure in FIGURES
        if network in figure.by_network
        and (figure.evaluator, figure.benchmark) == (evaluator, benchmark)
        and figure.metric in metrics
    }
