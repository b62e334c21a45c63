"""What the authors report for their networks, beside what is measured here, where network, benchmark, evaluator and settings are theirs.

Sources: DINO: Caron et al. 2021 and its repository's README; DINOv2: Oquab et al. 2023, tables 4, 7, 9, 10, 11, its README and model cards;
registers: Darcet et al. 2023 and the README. Only what the authors' READMEs and model cards state could be checked here; figures that
stand in a paper's table alone are quoted from memory, and every result and report says so of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the evaluator must have been set to for the figures to be about the same thing."""
    checked: bool = False
    """Whether the figures were compared with the README or model card of their authors."""


def of_sizes(small: float, base: float, large: float, giant: float, suffix: str = "") -> dict[str, float]:
    """One figure for each of DINOv2's four networks."""
    sizes = {"s": small, "b": base, "l": large, "g": giant}
    return {f"dinov2_vit{size}14{suffix}": value for size, value in sizes.items()}


VOTE = {"temperature": 0.07}
V1: dict[str, Any] = {"preset": "dino", "epochs": 100}
V2: dict[str, Any] = {
    "preset": "dinov2", "epochs": 10, "lr": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
}  # fmt: skip
NYU, KITTI = ({"lr": (1e-4,), "steps": 38_400, "mirror": True, "max_depth": metres} for metres in (10.0, 80.0))
OXFORD = {"size_px": 224, "scales": (1.0,), "queries_cropped": False}
PARIS = {"size_px": 512, "scales": (1.0, 2**-0.5, 0.5), "queries_cropped": False}
COPIES = {"whitened": True, "distractors": 10_000}
HEAD = {"lr": (1e-3,), "steps": 40_000, "seen": "crops"}
LINEAR = {**HEAD, "layers": "last", "scales": (1.0,), "mirror": False}
ATTENTION = {"size": 480, "interpolation": "bilinear", "mass": 0.6}
ACTIONS = {"frames": 8, "pool": "mean", "classifier": "linear"}
MULTISCALE = {**HEAD, "layers": "last4", "mirror": True}
FIGURES = (
    Figure("knn", "imagenet", "top1_best_on_val", {
        "dino_vits16": 0.745, "dino_vits8": 0.783, "dino_vitb16": 0.761, "dino_vitb8": 0.774, "dino_resnet50": 0.675,
    }, DINO, VOTE, checked=True),
    Figure("linear", "imagenet", "top1_best_on_val", {
        "dino_vits16": 0.770, "dino_vits8": 0.797, "dino_vitb16": 0.782, "dino_vitb8": 0.801, "dino_resnet50": 0.753,
    }, DINO, V1, checked=True),
    Figure("knn", "imagenet", "top1_best_on_val", of_sizes(0.790, 0.821, 0.835, 0.835), DINOV2, VOTE, checked=True),
    Figure("linear", "imagenet", "top1_best_on_val", of_sizes(0.811, 0.845, 0.863, 0.865), DINOV2, V2, checked=True),
    Figure("knn", "imagenet", "top1_best_on_val", of_sizes(0.791, 0.820, 0.838, 0.837, "_reg"), REGISTERS, VOTE, checked=True),
    Figure("linear", "imagenet", "top1_best_on_val", of_sizes(0.809, 0.846, 0.867, 0.871, "_reg"), REGISTERS, V2, checked=True),
    Figure("attention", "voc2012", "jaccard", {"dino_vits16": 0.459, "dino_vits8": 0.447}, DINO, ATTENTION),
    Figure("video_objects", "davis", "jf_mean", {
        "dino_vits16": 0.618, "dino_vits8": 0.699, "dino_vitb16": 0.623, "dino_vitb8": 0.714,
    }, DINO, {"preset": "dino", "size": 480}),
    Figure("video_actions", "ucf101", "top1_best_on_val", of_sizes(0.870, 0.891, 0.905, 0.912), DINOV2, ACTIONS),
    Figure("retrieval", "roxford5k", "map_medium", of_sizes(0.688, 0.729, 0.751, 0.736), DINOV2),
    Figure("retrieval", "roxford5k", "map_hard", of_sizes(0.432, 0.495, 0.540, 0.523), DINOV2, checked=True),
    Figure("retrieval", "rparis6k", "map_medium", of_sizes(0.846, 0.903, 0.927, 0.921), DINOV2),
    Figure("retrieval", "rparis6k", "map_hard", of_sizes(0.685, 0.786, 0.835, 0.826), DINOV2),
    Figure("retrieval", "roxford5k", "map_hard", of_sizes(0.395, 0.510, 0.557, 0.582, "_reg"), REGISTERS, checked=True),
    Figure("retrieval", "roxford5k", "map_medium", {"dino_vits16": 0.418, "dino_resnet50": 0.354}, DINO, OXFORD),
    Figure("retrieval", "roxford5k", "map_hard", {"dino_vits16": 0.137, "dino_resnet50": 0.111}, DINO, OXFORD),
    Figure("retrieval", "rparis6k", "map_medium", {"dino_vits16": 0.631, "dino_resnet50": 0.559}, DINO, PARIS),
    Figure("retrieval", "rparis6k", "map_hard", {"dino_vits16": 0.344, "dino_resnet50": 0.275}, DINO, PARIS),
    Figure("copies", "copydays", "map_strong", {"dino_vitb8": 0.858}, DINO, {**COPIES, "size_px": 320}, checked=True),
    Figure("copies", "copydays", "map_strong", {"dino_vitb16": 0.817}, DINO, {**COPIES, "size_px": 224}),
    Figure("segmentation", "ade20k", "miou", of_sizes(0.443, 0.473, 0.477, 0.490), DINOV2, LINEAR),
    Figure("segmentation", "ade20k", "miou", of_sizes(0.472, 0.513, 0.531, 0.530), DINOV2, MULTISCALE, checked=True),
    Figure("segmentation", "ade20k", "miou", {"dino_vitb8": 0.318}, DINOV2, LINEAR),
    Figure("segmentation", "ade20k", "miou", {"dino_vitb8": 0.352}, DINOV2, MULTISCALE),
    Figure("segmentation", "cityscapes", "miou", {**of_sizes(0.666, 0.694, 0.703, 0.713), "dino_vitb8": 0.569}, DINOV2, LINEAR),
    Figure("segmentation", "cityscapes", "miou", {**of_sizes(0.771, 0.800, 0.809, 0.810), "dino_vitb8": 0.662}, DINOV2, MULTISCALE),
    Figure("segmentation", "voc2012", "miou", {**of_sizes(0.811, 0.825, 0.821, 0.830), "dino_vitb8": 0.664}, DINOV2, LINEAR),
    Figure("segmentation", "voc2012", "miou", {**of_sizes(0.826, 0.849, 0.860, 0.862), "dino_vitb8": 0.756}, DINOV2, MULTISCALE),
    Figure("depth", "nyud", "rmse", of_sizes(0.449, 0.399, 0.384, 0.344), DINOV2, {**NYU, "head": "linear1"}),
    Figure("depth", "nyud", "rmse", of_sizes(0.417, 0.362, 0.333, 0.298), DINOV2, {**NYU, "head": "linear4"}, checked=True),
    Figure("depth", "nyud", "rmse", of_sizes(0.356, 0.317, 0.293, 0.279), DINOV2, {**NYU, "head": "dpt"}),
    Figure("depth", "nyud", "rmse", {"dino_vitb8": 0.555}, DINOV2, {**NYU, "head": "linear1"}),
    Figure("depth", "nyud", "rmse", {"dino_vitb8": 0.539}, DINOV2, {**NYU, "head": "linear4"}),
    Figure("depth", "nyud", "rmse", {"dino_vitb8": 0.492}, DINOV2, {**NYU, "head": "dpt"}),
    Figure("depth", "kitti", "rmse", of_sizes(3.10, 2.90, 2.78, 2.62), DINOV2, {**KITTI, "head": "linear1"}),
    Figure("depth", "kitti", "rmse", of_sizes(2.86, 2.59, 2.50, 2.35), DINOV2, {**KITTI, "head": "linear4"}),
    Figure("depth", "kitti", "rmse", of_sizes(2.34, 2.23, 2.14, 2.11), DINOV2, {**KITTI, "head": "dpt"}),
    Figure("linear", "imagenet", "v2_top1", of_sizes(0.708, 0.749, 0.776, 0.784), DINOV2, V2, checked=True),
    Figure("linear", "imagenet", "v2_top1", of_sizes(0.710, 0.756, 0.785, 0.788, "_reg"), REGISTERS, V2, checked=True),
    Figure("linear", "imagenet", "real_top1", of_sizes(0.866, 0.883, 0.895, 0.896), DINOV2, V2),
    Figure("linear", "imagenet", "a_top1", of_sizes(0.335, 0.551, 0.713, 0.759), DINOV2, V2),
    Figure("linear", "imagenet", "r_top1", of_sizes(0.537, 0.633, 0.744, 0.788), DINOV2, V2),
    Figure("linear", "imagenet", "c_mce", of_sizes(0.544, 0.427, 0.315, 0.282), DINOV2, V2),
    Figure("linear", "imagenet", "sketch_top1", of_sizes(0.412, 0.506, 0.593, 0.625), DINOV2, V2),
)  # fmt: skip


def network_name(ckpt: str) -> str | None:
    """The catalog's name of a network that is given by it, or by the published file of that name; None for any other."""
    if ckpt in CATALOG:
        return ckpt
    return next((name for name, entry in CATALOG.items() if Path(ckpt).name == entry.file), None)


def published_reference(
    evaluator: str,
    ckpt: str,
    data: str,
    metrics: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """By metric the published value, its source, whether that was `checked`, and what was measured minus it.

    Empty where nothing comparable was published.
    """
    network, benchmark = network_name(ckpt), data.split(":", 1)[0] if ":" in data else None
    if network is None:
        return {}
    return {
        figure.metric: {
            "value": figure.by_network[network],
            "source": figure.source,
            "checked": figure.checked,
            "difference": round(metrics[figure.metric]["value"] - figure.by_network[network], 6),
        }
        for figure in FIGURES
        if network in figure.by_network
        and (figure.evaluator, figure.benchmark) == (evaluator, benchmark)
        and figure.metric in metrics
        and all(_set_to(settings, name, value) for name, value in figure.settings.items())
    }


def _set_to(settings: Mapping[str, Any], name: str, wanted: Any) -> bool:
    """Whether a result was set so; lists of a file are tuples here."""
    value = settings.get(name)
    return bool((tuple(value) if isinstance(value, list) else value) == wanted)


def source_text(reference: Mapping[str, Any]) -> str:
    """Where a published figure stands, for people; of one that is not known to be checked it says so."""
    return f"{reference['source']}{'' if reference.get('checked') else ', quoted from memory, not checked'}"
