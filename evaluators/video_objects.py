"""Videos and the first frame's objects in, J&F out: can a frozen network's patches carry masks through a video? (DAVIS)

Nothing is trained: labels travel between patches of like features (`video_propagation`), and masks are scored at the
frames' own size as the official evaluation does (`video_scores`). With --out, the masks are written as palette PNGs beside
the result, in the layout that the official evaluation reads, with a picture (first frame, truth, followed).
Read in this order: VideoObjectsSpec, follow, evaluate, run.
Legend: n objects over all videos, C labels (background first), h w patches, H W pixels.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import tyro
from PIL import Image

from data.decode import DecodeError
from data.errors import CheckFailed, InputError, run_cli
from data.preprocess import check_view_px, normalise
from evaluators.baselines import open_baseline
from evaluators.bootstrap import drawn_groups, mean_interval95
from evaluators.classification import (
    RunOptions,
    baseline_json,
    describe_model,
    print_result,
    progress_bar,
    refuse_processes,
)
from evaluators.picture_sheet import number_colours, numbers_over, save_sheet, spread_picks
from evaluators.presets import evaluator_cli, settled_by
from evaluators.results import (
    Context,
    Measurement,
    Metric,
    check_writable,
    describe_environment,
    replacing,
    result_json,
    save_result,
)
from evaluators.video_data import MaskedVideo, VideoSet, open_videos
from evaluators.video_propagation import PropagationSpec, final_labels, propagate
from evaluators.video_scores import contour_f, region_jaccard, series_figures
from runtimes.open import open_runtime
from runtimes.runtime import Runtime, step_px

VERSION = 1
HEADLINE = "jf_mean"
SIDE_STEP_PX = 64
"""The published script rounds the long side down to multiples of this."""
DINO_STD = (0.228, 0.224, 0.225)
"""The published script divides red by 0.228, where everything else divides by 0.229."""
Preset = Literal["dino", "dinov2"]
VideoBaseline = Literal["copy", "colour", "untrained"]


PRESETS: dict[str, dict[str, Any]] = {"dino": {"std": DINO_STD}, "dinov2": {"size": 476}}
"""DINO's script divides red by 0.228, where its other evaluations divide by 0.229. DINOv2 has no such evaluation: whole patches of 14."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class VideoObjectsSpec(PropagationSpec):
    """The protocol of Caron et al. 2021."""

    preset: Preset | None = None
    """dino: red is divided by 0.228, as in the published script; dinov2, which has no such evaluation: a short side of 476 (a multiple
    of its patch). Settings given beside it win."""
    size: int = 480
    """Short side in pixels that frames are resized to; the long side follows, down to a multiple of 64."""
    std: tuple[float, float, float] | None = None
    """Standard deviations of red, green and blue that frames are divided by; None: the network's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_view_px(self.size, "--size")


def frame_hw(hw: tuple[int, int], size: int, patch_px: int) -> tuple[int, int]:
    """Size in pixels at which a frame of `hw` is seen: short side `size`, both sides whole patches.

    As published (the long side down to a multiple of 64) where patches fit into that; other patches (14 px) round down
    to whole ones.
    """
    step = SIDE_STEP_PX if SIDE_STEP_PX % patch_px == 0 else patch_px
    short = max(patch_px, size // patch_px * patch_px)
    height, width = hw
    long = max(step, int(size * max(hw) / min(hw)) // step * step)
    if max(hw) == min(hw):
        long = short
    return (long, short) if height > width else (short, long)


def frame_features(
    runtime: Runtime, video: MaskedVideo, spec: VideoObjectsSpec, hw: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Patches [N, D] of every frame, seen at `hw` pixels. Raises InputError for a frame that cannot be read."""
    pre = runtime.manifest.preprocess
    if spec.std is not None:
        pre = replace(pre, std=spec.std)
    first = first_size(video)
    for k in range(len(video)):
        try:
            image = video.image(k)
        except DecodeError as error:
            raise InputError(f"{error}; a video needs all its frames, so repair or remove it") from error
        if image.shape[:2] != first:
            raise InputError(
                f"{video.name}: frame {video.frame_name(k)} has {image.shape[1]} x {image.shape[0]} pixels, the first "
                f"{first[1]} x {first[0]}; wanted one size"
            )
        resized = cv2.resize(image, (hw[1], hw[0]), interpolation=cv2.INTER_LINEAR)
        patches = runtime.run(normalise(resized, pre)[None], ("patches",))["patches"][0]
        if not np.isfinite(patches).all():
            raise CheckFailed(f"patches of {video.name}, frame {video.frame_name(k)}, are not finite: damaged weights")
        yield patches


@dataclass(frozen=True)
class Followed:
    """One video's masks and scores."""

    name: str
    numbers: tuple[int, ...]
    """Of the objects in the first frame."""
    masks: tuple[np.ndarray, ...]
    """Object numbers of every frame, uint8 [H, W]; the first is the one that was given."""
    j: np.ndarray
    """[objects, scored frames]"""
    f: np.ndarray


def follow(runtime: Runtime | None, video: MaskedVideo, score_last: bool, spec: VideoObjectsSpec) -> Followed:
    """Carry the first frame's objects through a video and score them; without a network the first mask is copied.

    Raises InputError for frames or masks that do not fit, and where the first mask is empty.
    """
    hw = first_size(video)
    given = video.mask(0, hw)
    numbers = tuple(int(number) for number in np.unique(given[given > 0]))
    if not numbers:
        raise InputError(f"{video.name}: the mask of its first frame is empty; wanted the objects to follow")
    if runtime is None:
        masks = [given.astype(np.uint8)] * len(video)
    else:
        seen_hw = frame_hw(hw, spec.size, step_px(runtime.manifest))
        grid = tuple(side // step_px(runtime.manifest) for side in seen_hw)
        small = np.asarray(Image.fromarray(given).resize((grid[1], grid[0]), Image.Resampling.NEAREST))
        first_Chw = torch.from_numpy(np.stack([small == number for number in (0, *numbers)]).astype(np.float32))
        named = np.array([0, *numbers], np.uint8)
        masks = [given.astype(np.uint8)]
        for soft_Chw in propagate(frame_features(runtime, video, spec, seen_hw), first_Chw, spec):
            labels = Image.fromarray(named[final_labels(soft_Chw, seen_hw)])
            masks.append(np.asarray(labels.resize((hw[1], hw[0]), Image.Resampling.NEAREST)))
    scores = []
    for k in range(1, len(video) - (not score_last)):
        if video.has_mask(k):
            truth = video.mask(k, hw)
            pairs = [(masks[k] == number, truth == number) for number in numbers]
            scores.append([(region_jaccard(*pair), contour_f(*pair)) for pair in pairs])
    figures = np.array(scores)
    return Followed(video.name, numbers, tuple(masks), figures[:, :, 0].T, figures[:, :, 1].T)


def first_size(video: MaskedVideo) -> tuple[int, int]:
    """Height and width of the first frame. Raises InputError where it cannot be read."""
    try:
        height, width, _ = video.image(0).shape
    except DecodeError as error:
        raise InputError(f"{error}; a video needs all its frames, so repair or remove it") from error
    return height, width


def evaluate(followed: list[Followed], spec: VideoObjectsSpec) -> Measurement:
    """The figures over all objects of all videos; intervals are over videos."""
    names = [f"{one.name}/{number}" for one in followed for number in one.numbers]
    groups_n, notes = drawn_groups(np.array([k for k, one in enumerate(followed) for _ in one.numbers]))
    columns: dict[str, np.ndarray] = {}
    for letter in ("j", "f"):
        rows = np.array([series_figures(series) for one in followed for series in getattr(one, letter)])
        columns |= {f"{letter}_{what}": rows[:, k] for k, what in enumerate(("mean", "recall", "decay"))}
    columns = {HEADLINE: (columns["j_mean"] + columns["f_mean"]) / 2, **columns}
    return Measurement(
        evaluator="video_objects",
        protocol=(
            f"label propagation from the first frame and the {spec.previous} before, top {spec.top_k} of the patches within "
            f"{spec.neighbourhood or 'any number of'} rows and columns, temperature {spec.temperature:g}, short side "
            f"{spec.size} px; J and F as the DAVIS-2017 evaluation, mean over objects (Caron et al. 2021)"
        ),
        version=VERSION,
        metrics={
            name: Metric(
                float(values.mean()),
                mean_interval95(values, groups_n) if len(values) > 1 else None,
                len(values),
                lower_is_better=name.endswith("decay"),
            )
            for name, values in columns.items()
        },
        headline=HEADLINE,
        selected_on="nothing: no choice was made",
        chosen={},
        grid=[],
        settings=asdict(spec),
        notes=notes,
        predictions={"names": np.array(names), "score": columns[HEADLINE], "groups": groups_n, **columns},
    )


@dataclass(frozen=True, kw_only=True)
class VideoObjectsRun(RunOptions):
    """Options of the video object evaluator."""

    data: str
    """Videos with object masks: davis:ROOT (DAVIS-2017), a folder with images/CLIP/ and masks/CLIP/ (PNG), or a packed set."""
    baselines: tuple[VideoBaseline, ...] = ()
    """Measured beside the network on the same videos: copy (the first mask for every frame), colour (mean and spread of
    colour in each patch), untrained (same network, random weights)."""


def run(options: VideoObjectsRun, spec: VideoObjectsSpec = VideoObjectsSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result; files are written where asked."""
    refuse_processes(options)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    videos = open_videos(options.data)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        started = time.perf_counter()
        followed = _follow_all(runtime.name, runtime, videos, spec)
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=_describe_data(options, videos, followed),
            preprocess=manifest.preprocess.to_json()
            | {"view": "whole frames, bilinear without antialias", "short_px": spec.size}
            | ({"std": list(spec.std)} if spec.std else {}),
            timing={"evaluate_s": round(time.perf_counter() - started, 3)},
            environment=describe_environment(runtime.device, options.threads),
        )
    measurement = evaluate(followed, spec)
    baselines: dict[str, Any] = {}
    for name in options.baselines:
        started = time.perf_counter()
        if name == "copy":
            others = _follow_all(name, None, videos, spec)
        else:
            with open_baseline(name, manifest, options.device, options.seed) as baseline:
                others = _follow_all(name, baseline, videos, spec)
        timing = {"evaluate_s": round(time.perf_counter() - started, 3)}
        baselines[name] = baseline_json(evaluate(others, spec), measurement, timing)
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        _save_masks(masks_path(options.out), videos, followed)
        save_sheet(picture_path(options.out), _shown(videos, followed, measurement))
        files = {"picture_file": picture_path(options.out).name, "masks_folder": masks_path(options.out).name}
        save_result(options.out, result | files, measurement.predictions)
    return result


def _follow_all(title: str, runtime: Runtime | None, videos: VideoSet, spec: VideoObjectsSpec) -> list[Followed]:
    followed = []
    with progress_bar(f"{title}: videos") as progress:
        for k, video in enumerate(videos.videos, start=1):
            followed.append(follow(runtime, video, videos.score_last, spec))
            progress(k, len(videos.videos))
    return followed


def _describe_data(options: VideoObjectsRun, videos: VideoSet, followed: list[Followed]) -> dict[str, Any]:
    return {
        "source": str(options.data),
        "form": videos.source,
        "split": "all its videos" + (", their last frames not scored" if not videos.score_last else ""),
        "grouped_by": "video",
        "fingerprint": {"val": videos.dataset.fingerprint()},
        "truth_fingerprint": {"val": videos.truth_fingerprint()},
        "n_val": len(videos.dataset),
        "n_videos": len(videos.videos),
        "n_objects": sum(len(one.numbers) for one in followed),
        "skipped": {},
    }


def _save_masks(folder: Path, videos: VideoSet, followed: list[Followed]) -> None:
    """Every frame's numbers as a palette PNG, SEQ/FRAME.png. Raises InputError where they cannot be written."""
    palette = number_colours().flatten().tolist()
    try:
        for video, one in zip(videos.videos, followed, strict=True):
            (folder / video.name).mkdir(parents=True, exist_ok=True)
            for k, mask in enumerate(one.masks):
                picture = Image.fromarray(mask)
                picture.putpalette(palette)
                body = io.BytesIO()
                picture.save(body, "PNG")
                with replacing(folder / video.name / f"{video.frame_name(k)}.png") as scratch:
                    scratch.write_bytes(body.getvalue())
    except OSError as error:
        raise InputError(f"--out: cannot write {folder} ({error.strerror}); name another place") from error


def _shown(videos: VideoSet, followed: list[Followed], measurement: Measurement) -> list[tuple[str, list[np.ndarray]]]:
    """Rows of the picture: first frame with its mask, then of a later frame the truth and what was followed."""
    first_objects = np.cumsum([0, *(len(one.numbers) for one in followed[:-1])])
    totals = np.add.reduceat(measurement.predictions["score"], first_objects)
    scores = totals / [len(one.numbers) for one in followed]
    rows = []
    for k in spread_picks(scores):
        video, one = videos.videos[k], followed[k]
        late = max(n for n in range(1, len(video) - (not videos.score_last)) if video.has_mask(n))
        first, image = video.image(0), video.image(late)
        truth = video.mask(late, (image.shape[0], image.shape[1]))
        tiles = [numbers_over(first, one.masks[0]), numbers_over(image, truth), numbers_over(image, one.masks[late])]
        rows.append((f"{one.name}   frame {video.frame_name(late)}   J&F {scores[k]:.3f}", tiles))
    return rows


def picture_path(out: Path) -> Path:
    """The picture beside a result file."""
    return out.with_suffix(".png")


def masks_path(out: Path) -> Path:
    """The folder of masks beside a result file."""
    return out.with_suffix(".masks")


def main(
    options: Annotated[VideoObjectsRun, tyro.conf.arg(name="")],
    spec: Annotated[VideoObjectsSpec, tyro.conf.arg(name="")],
) -> None:
    """J&F of masks carried through videos by the patches of a frozen network."""
    result = run(options, spec)
    written = (picture_path(options.out), masks_path(options.out)) if options.out else ()
    print_result(result, options.out, *written)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
