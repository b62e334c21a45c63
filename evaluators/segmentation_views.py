"""A network and images with masks in, what the probe learns from and what it is tested on out.

Whole views: a row an image. Crops: a row a random crop of a training image, and for the test the windows that slide over each image.
Read in this order: open_parts, Views, look.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.datasets import Dataset
from data.errors import InputError
from data.preprocess import check_view_px
from evaluators.classification import NetworkOptions, progress_bar, table_notes
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.layers import MirroredRuntime
from evaluators.segmentation_cuts import Cut, CutImages, CutMasks, WindowTable, random_cuts, window_cuts
from evaluators.segmentation_data import VOID_VALUE, MaskedImages, Masks, open_masks
from evaluators.segmentation_probe import ImageTable, SegmentationTable
from evaluators.segmentation_protocol import SegmentationSpec
from evaluators.splits import Splits, group_of, scene_column, split_dataset
from evaluators.view_batches import ViewSpec
from runtimes.runtime import Runtime, step_px


@dataclass(frozen=True)
class Parts:
    """The set, its two parts, and its classes."""

    images: dict[str, MaskedImages]
    splits: Splits
    classes: tuple[str, ...]


def open_parts(options: NetworkOptions) -> Parts:
    """Open the set. Raises InputError."""
    whole = open_masks(options.data, "classes")
    classes = whole.class_names()
    if not 2 <= len(classes) <= VOID_VALUE:
        raise InputError(f"{options.data}: its masks tell {len(classes)} class apart; wanted 2 to {VOID_VALUE}")
    group_by = scene_column(whole.dataset.items, options.group_by)
    splits = split_dataset(whole.dataset, options.train_split, options.val_split, group_by)
    splits.notes[:0] = whole.notes
    images = {"train": replace(whole, dataset=splits.train), "val": replace(whole, dataset=splits.val)}
    return Parts(images, splits, classes)


def view_px(runtime: Runtime, spec: SegmentationSpec, scale: float = 1.0) -> int:
    """Side of the view in whole patches."""
    side = (spec.size or runtime.manifest.preprocess.whole_px) * scale
    step = step_px(runtime.manifest)
    return check_view_px(max(1, round(side / step)) * step, "--size and --scales: a view's side")


@dataclass(frozen=True)
class Views:
    """What was extracted."""

    train: SegmentationTable
    tests: list[ImageTable]
    """The same test images once a scale (and mirror)."""
    counts: dict[str, Any]
    """Images of each part, and those that could not be read."""
    notes: list[str]
    cached: bool


def look(title: str, runtime: Runtime, parts: Parts, options: NetworkOptions, spec: SegmentationSpec) -> Views:
    """Run the network over both parts as `spec` says. Raises InputError and CheckFailed as `extract`."""
    px, found = view_px(runtime, spec), []
    tied_by = parts.splits.group_column

    def extracted(what: str, dataset: Dataset, side: int, mirrored: bool = False) -> FeatureTable:
        extraction = ExtractSpec(
            columns=("patches",),
            view=ViewSpec(view="whole", size_px=side),
            batch_size=options.batch_size,
            workers=options.workers,
            cache_dir=options.cache_dir,
            group_column=tied_by,
        )
        with progress_bar(f"{title}: {what}") as progress:
            table = extract(MirroredRuntime(runtime) if mirrored else runtime, dataset, extraction, progress)
        found.append((what, table))
        return table

    images, tests = parts.images["train"], list[ImageTable]()
    if spec.seen == "whole":
        features = extracted("train", images.dataset, px)
        masks: Sequence[Any] = Masks(images, features.rows)
    else:
        cut = CutImages(
            images, random_cuts(images, px, spec.crops, spec.enlarge, options.seed), px, runtime.manifest.preprocess
        )
        features = extracted("train", cut, px)
        masks = CutMasks(cut, features.rows)
    train = SegmentationTable(features.names, features.groups, features.columns["patches"], masks)
    images = parts.images["val"]
    for scale, mirrored in [(scale, m) for scale in spec.scales for m in (False, True)[: 1 + spec.mirror]]:
        if spec.seen == "whole":
            features = extracted("val", images.dataset, view_px(runtime, spec, scale), mirrored)
            tests.append(
                SegmentationTable(
                    features.names, features.groups, features.columns["patches"], Masks(images, features.rows)
                )
            )
        else:
            windows = CutImages(images, window_cuts(images, px, spec.stride, scale), px, runtime.manifest.preprocess)
            features = extracted("val", windows, px, mirrored)
            tests.append(window_table(windows, features, tied_by))
    by_part = dict(reversed(found))  # of the test images the first scale
    counts = {f"n_{what}": len(set(by_part[what].names)) for what in ("train", "val")}
    return Views(
        train,
        tests,
        counts | {"skipped": dict(one for table in by_part.values() for one in table.skipped)},
        [note for what, table in by_part.items() for note in table_notes(what, table)],
        all(table.cached for _, table in found),
    )


def window_table(cut: CutImages, features: FeatureTable, group_column: str | None) -> WindowTable:
    """Windows put together by the image they are of; an image that could not be decoded has none and is left out."""
    windows: dict[int, list[tuple[int, Cut]]] = {}
    for place, row in enumerate(features.rows):
        windows.setdefault(cut.cuts[row].row, []).append((place, cut.cuts[row]))
    items = [cut.images.dataset.items[row] for row in windows]
    return WindowTable(
        names=tuple(item.name for item in items),
        groups=tuple(group_of(item, group_column) for item in items),
        masks=Masks(cut.images, list(windows)),
        patches_mND=features.columns["patches"],
        windows=tuple(tuple(own) for own in windows.values()),
        px=cut.px,
    )
