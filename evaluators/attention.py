"""Images with object masks in, a Jaccard index out: do the heads of a frozen network look at things? (Caron et al. 2021, fig. 4)

Nothing is trained. Of each head's CLS attention over the whole image the patches that hold 60 % of the mass are kept; each
object counts with the head that covers it best, at the mask's own size. Best-of-heads rises with the number of heads, so
the mean over heads and one fixed head are told as well. With --out, pictures (image, truth, attention, kept) lie beside.
Read in this order: AttentionSpec, overlaps, evaluate, run.
Legend: n images, O objects, h w patches.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from data.decode import DecodeError
from data.errors import CheckFailed, InputError, run_cli
from data.preprocess import Interpolation, Preprocess, check_view_px, whole_view
from evaluators.attention_baselines import AttentionBaseline, open_attention_baseline
from evaluators.attention_maps import cell_of_pixels, head_jaccards, top_mass
from evaluators.bootstrap import drawn_groups, mean_interval95
from evaluators.classification import (
    NetworkOptions,
    baseline_json,
    describe_model,
    print_result,
    progress_bar,
    refuse_processes,
)
from evaluators.extract import MAX_CORRUPT_SHARE
from evaluators.picture_sheet import heat, numbers_over, save_sheet, spread_picks
from evaluators.presets import check_words, evaluator_cli, settled_by
from evaluators.results import (
    Context,
    Measurement,
    Metric,
    check_writable,
    describe_environment,
    result_json,
    save_result,
)
from evaluators.segmentation_data import MaskedImages, MaskValues, open_masks
from evaluators.splits import VAL_NAMES, group_of, pick_group_column
from runtimes.open import open_runtime
from runtimes.runtime import Runtime, step_px

VERSION = 1
HEADLINE = "jaccard"
Preset = Literal["dino", "dinov2"]
PRESETS: dict[str, dict[str, Any]] = {
    "dino": {"size": 480, "interpolation": "bilinear"},
    "dinov2": {"size": 476, "interpolation": "bilinear"},
}
"""DINO's script: 480 x 480, bilinear. DINOv2 has no such evaluation: the same, in whole patches of 14."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The protocol."""

    preset: Preset | None = None
    """dino: 480 x 480, bilinear, as the published figures; dinov2, which has no such evaluation: the same with 476 (a multiple of its
    patch). Settings given beside it win."""
    mass: float = 0.6
    """Share of a head's attention over the patches that is kept."""
    size: int | None = None
    """Side in pixels that images are squashed to; None: as attention is served (the manifest's whole view)."""
    interpolation: Interpolation | None = None
    """Filter of that resize; None: the manifest's."""

    def __post_init__(self) -> None:
        check_words(self)
        if not 0 < self.mass <= 1:
            raise InputError(f"--mass {self.mass}: wanted above 0 and up to 1")
        if self.size is not None:
            check_view_px(self.size, "--size")


@dataclass(frozen=True)
class Overlaps:
    """What was found in each readable image that has an object."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    groups: tuple[str, ...]
    jaccards: tuple[np.ndarray, ...]
    """[O, heads] an image."""
    kept: np.ndarray
    """uint8 [n, heads, h, w]: the patches that each head keeps."""
    without_objects: int
    skipped: dict[str, str]
    """Name and reason of each image that could not be decoded."""

    @property
    def best_n(self) -> np.ndarray:
        """Mean over an image's objects of the best head's index."""
        return np.array([one.max(axis=1).mean() for one in self.jaccards])

    @property
    def heads_nh(self) -> np.ndarray:
        """Mean over an image's objects of each head's index."""
        return np.array([one.mean(axis=0) for one in self.jaccards])


def overlaps(
    runtime: Runtime,
    images: MaskedImages,
    spec: AttentionSpec,
    batch_size: int = 16,
    group_column: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Overlaps:
    """Run the network over every image and compare its heads with the objects.

    Raises InputError for a mask of another size, where too many images cannot be decoded or none has an object, and
    CheckFailed for attention or an embedding that is not finite.
    """
    if "attention" not in runtime.outputs:
        raise InputError(f"this network has no attention, only {', '.join(runtime.outputs)}; wanted a ViT")
    items = images.dataset.items
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    skipped: dict[str, str] = {}
    empty = 0
    for start in range(0, len(items), batch_size):
        rows, pixels, sizes = _views(runtime, images, spec, range(start, min(start + batch_size, len(items))), skipped)
        if rows:
            kept = top_mass(_attention(runtime, pixels, [items[row].name for row in rows]), spec.mass)
            for row, hw, masks in zip(rows, sizes, kept, strict=True):
                cells = cell_of_pixels(hw, side_px(runtime, spec), step_px(runtime.manifest), masks.shape[1:])
                jaccards = head_jaccards(masks, images.mask(row, hw), cells)
                empty += not len(jaccards)
                if len(jaccards):
                    found.append((row, jaccards, masks))
        if progress:
            progress(min(start + batch_size, len(items)), len(items))
    if len(skipped) > MAX_CORRUPT_SHARE * len(items):
        name, reason = next(iter(skipped.items()))
        raise InputError(
            f"{len(skipped)} of {len(items)} images cannot be decoded (first {name!r}: {reason}), more than the "
            f"{MAX_CORRUPT_SHARE:.0%} allowed; remove or repair them"
        )
    if not found:
        read = (
            "they were read as numbers, of which 0 and 255 are none: where bright is foreground say --mask-values foreground"
            if images.numbered
            else "a grey mask's foreground is 128 and above: where its values are numbers say --mask-values ids"
        )
        raise InputError(f"none of the {len(items)} masks of {images.dataset.name} has an object; {read}")
    return Overlaps(
        names=tuple(items[row].name for row, _, _ in found),
        rows=tuple(row for row, _, _ in found),
        groups=tuple(group_of(items[row], group_column) for row, _, _ in found),
        jaccards=tuple(jaccards for _, jaccards, _ in found),
        kept=np.stack([masks for _, _, masks in found]),
        without_objects=empty,
        skipped=skipped,
    )


def preprocess_of(runtime: Runtime, spec: AttentionSpec) -> Preprocess:
    """The network's preprocessing, with what the protocol changes of it."""
    pre = runtime.manifest.preprocess
    return pre if spec.interpolation is None else replace(pre, interpolation=spec.interpolation)


def side_px(runtime: Runtime, spec: AttentionSpec) -> int:
    """Side of the view that images are squashed to."""
    side = runtime.manifest.preprocess.whole_px if spec.size is None else spec.size
    if side < step_px(runtime.manifest):
        raise InputError(f"--size {side}: smaller than one patch of {step_px(runtime.manifest)} px")
    return side


def _views(
    runtime: Runtime, images: MaskedImages, spec: AttentionSpec, rows: range, skipped: dict[str, str]
) -> tuple[list[int], np.ndarray, list[tuple[int, int]]]:
    """Rows that could be read, their views cut to whole patches, and the sizes of the images."""
    side, pre = side_px(runtime, spec), preprocess_of(runtime, spec)
    whole = side // step_px(runtime.manifest) * step_px(runtime.manifest)
    kept: list[int] = []
    views: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    for row in rows:
        try:
            image = images.dataset.image(row)
        except DecodeError as error:
            skipped[images.dataset.items[row].name] = error.reason
            continue
        views.append(whole_view(image, pre, side)[:, :whole, :whole])
        kept.append(row)
        sizes.append((image.shape[0], image.shape[1]))
    return kept, np.stack(views) if views else np.empty((0, 3, 0, 0), np.float32), sizes


def _attention(runtime: Runtime, pixels: np.ndarray, names: list[str]) -> np.ndarray:
    # The embedding is asked for as well: weights that come after the last attention may be damaged and leave it whole.
    made = runtime.run(pixels, tuple(name for name in ("attention", "embedding") if name in runtime.outputs))
    attention, embedding = made["attention"], made.get("embedding", np.zeros((len(pixels), 1)))
    good = np.isfinite(attention).all(axis=(1, 2, 3)) & np.isfinite(embedding).all(axis=1)
    good &= attention.sum(axis=(2, 3)).all(axis=1)
    if not good.all():
        raise CheckFailed(
            f"attention or embedding of {names[int(np.argmin(good))]!r} is not finite, or a head attends to nothing: the "
            "weights are damaged or overflow"
        )
    return attention


def evaluate(test: Overlaps, spec: AttentionSpec, train: Overlaps | None = None) -> Measurement:
    """The figures on `test`; the fixed head is the one that is best on `train`, or without it on `test` itself."""
    groups_n, notes = drawn_groups(test.groups)
    head = int((test if train is None else train).heads_nh.mean(axis=0).argmax())
    columns = {
        HEADLINE: test.best_n,
        "jaccard_head_mean": test.heads_nh.mean(axis=1),
        "jaccard_fixed_head": test.heads_nh[:, head],
    }
    if test.without_objects:
        notes.append(f"{test.without_objects} images without an object were left out")
    if test.skipped:
        some = ", ".join(test.skipped)[:200]
        notes.append(f"{len(test.skipped)} images could not be decoded and were left out: {some}")
    return Measurement(
        evaluator="attention",
        protocol=(
            f"patches that hold {spec.mass:g} of each head's CLS attention (last block, whole image), Jaccard index at "
            "the mask's size; best head of each object, mean over objects, then over images (Caron et al. 2021)"
        ),
        version=VERSION,
        metrics={
            name: Metric(float(values.mean()), mean_interval95(values, groups_n), len(values))
            for name, values in columns.items()
        },
        headline=HEADLINE,
        selected_on="test: each object's own best head; the fixed head: " + ("test" if train is None else "train"),
        chosen={"fixed_head": head},
        grid=[{"head": k, HEADLINE: float(value)} for k, value in enumerate(test.heads_nh.mean(axis=0))],
        settings=asdict(spec),
        notes=notes,
        predictions={
            "names": np.array(test.names),
            "score": test.best_n,
            "groups": groups_n,
            "heads": test.heads_nh,
            "objects": np.array([len(one) for one in test.jaccards]),
            "kept": test.kept,
        },
    )


@dataclass(frozen=True, kw_only=True)
class AttentionRun(NetworkOptions):
    """Options of the attention evaluator."""

    data: str
    """Images with object masks: a packed set, CSV or tar shards with `masks`, a folder with images/ and masks/ (PNG), or
    voc2012:ROOT."""
    group_by: str = "auto"
    """Column that ties images together; `auto`: stamp, scene, instance, family, concept or group; `none`."""
    mask_values: MaskValues = "auto"
    """What a mask's values mean: foreground (128 and above, one object), ids (a number an object, 255 void), auto (a
    palette means ids)."""
    baselines: tuple[AttentionBaseline, ...] = ()
    """Measured beside the network on the same images: border (how far a patch's colours are from those at the border),
    centre (a spot in the middle), untrained (same network, random weights)."""


@dataclass(frozen=True)
class Parts:
    """The part of a set that is measured, and the one that the fixed head is chosen on."""

    test: MaskedImages
    train: MaskedImages | None
    group_column: str | None
    how: str


def run(options: AttentionRun, spec: AttentionSpec = AttentionSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result; files are written where asked."""
    refuse_processes(options)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    parts = take_parts(options)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        found, measurement, seconds = _measure(runtime.name, runtime, parts, options, spec)
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=_describe_data(options, parts, found),
            preprocess=preprocess_of(runtime, spec).to_json() | {"view": "whole", "size_px": side_px(runtime, spec)},
            timing=seconds,
            environment=describe_environment(runtime.device, options.threads),
        )
        attention = _shown_attention(runtime, parts.test, found, spec) if options.out is not None else []
    baselines: dict[str, Any] = {}
    for name in options.baselines:
        with open_attention_baseline(name, manifest, options.device, options.seed) as baseline:
            _, other, seconds = _measure(name, baseline, parts, options, spec)
        baselines[name] = baseline_json(other, measurement, seconds)
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        save_sheet(picture_path(options.out), attention)
        save_result(options.out, result | {"picture_file": picture_path(options.out).name}, measurement.predictions)
    return result


def take_parts(options: AttentionRun) -> Parts:
    """Open the set and take the part to measure: a named split, `val`, `test`, or all of a set without splits."""
    images = open_masks(options.data, "objects", options.mask_values)
    items = images.dataset.items
    if not items:
        raise InputError(f"{options.data}: no images")
    tied = next((name for name in ("stamp", "scene") if name in items[0].row), None)
    group_column = (
        tied if options.group_by == "auto" and tied else pick_group_column(items, options.group_by, options.data)
    )
    present = {item.split for item in items} - {None}
    wanted = options.val_split or next((name for name in VAL_NAMES if name in present), None)
    if wanted is None and not present:
        return Parts(images, None, group_column, "all images; the set names no splits")
    rows = [row for row, item in enumerate(items) if item.split == wanted]
    if not rows:
        known = ", ".join(sorted(str(name) for name in present))
        raise InputError(
            f"{options.data}: no split {wanted or 'val'!r}; its splits are: {known}; choose with --val-split"
        )
    train_rows = [row for row, item in enumerate(items) if item.split == (options.train_split or "train")]
    train = images.subset(train_rows) if train_rows and wanted != (options.train_split or "train") else None
    return Parts(images.subset(rows), train, group_column, f"split {wanted!r} of the set")


def _measure(
    title: str, runtime: Runtime, parts: Parts, options: AttentionRun, spec: AttentionSpec
) -> tuple[Overlaps, Measurement, dict[str, float]]:
    started = time.perf_counter()
    tables = []
    for what, part in (("test", parts.test), ("train", parts.train)):
        if part is None:
            continue
        with progress_bar(f"{title}: {what}") as progress:
            tables.append(overlaps(runtime, part, spec, min(options.batch_size, 16), parts.group_column, progress))
    measurement = evaluate(tables[0], spec, tables[1] if len(tables) > 1 else None)
    return tables[0], measurement, {"evaluate_s": round(time.perf_counter() - started, 3)}


def _describe_data(options: AttentionRun, parts: Parts, found: Overlaps) -> dict[str, Any]:
    named = {"val": parts.test} | ({} if parts.train is None else {"train": parts.train})
    return {
        "source": str(options.data),
        "form": parts.test.source,
        "split": parts.how,
        "grouped_by": parts.group_column,
        "fingerprint": {what: part.dataset.fingerprint() for what, part in named.items()},
        "truth_fingerprint": {"val": parts.test.truth_fingerprint()},
        "n_train": 0 if parts.train is None else len(parts.train.dataset),
        "n_val": len(found.names),
        "skipped": found.skipped,
    }


def _shown_attention(
    runtime: Runtime, images: MaskedImages, found: Overlaps, spec: AttentionSpec
) -> list[tuple[str, list[np.ndarray]]]:
    """Rows of the picture: image, objects, the best head's attention, and what it keeps; from the worst to the best."""
    rows = []
    for pick in spread_picks(found.best_n):
        row, head = found.rows[pick], int(found.heads_nh[pick].argmax())
        image = images.dataset.image(row)
        hw = (image.shape[0], image.shape[1])
        _, pixels, _ = _views(runtime, images, spec, range(row, row + 1), {})
        attention = _attention(runtime, pixels, [found.names[pick]])[0, head]
        kept = found.kept[pick, head].astype(np.int32)
        cells = cell_of_pixels(hw, side_px(runtime, spec), step_px(runtime.manifest), (kept.shape[0], kept.shape[1]))
        covered, truth = np.where(cells < 0, 0, kept.reshape(-1)[cells]), images.mask(row, hw)
        caption = f"{found.names[pick]}   head {head}   jaccard {found.best_n[pick]:.3f}"
        rows.append((caption, [image, numbers_over(image, truth), heat(attention, hw), numbers_over(image, covered)]))
    return rows


def picture_path(out: Path) -> Path:
    """The picture beside a result file."""
    return out.with_suffix(".png")


def main(
    options: Annotated[AttentionRun, tyro.conf.arg(name="")],
    spec: Annotated[AttentionSpec, tyro.conf.arg(name="")],
) -> None:
    """Jaccard index of attention maps with object masks."""
    result = run(options, spec)
    print_result(result, options.out, options.out and picture_path(options.out))


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
