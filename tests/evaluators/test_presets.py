"""What was typed wins over the preset and the data set, and those over the default: on command lines, in Python, in requests."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from data.errors import InputError
from evaluators.attention import AttentionSpec
from evaluators.copies import CopiesSpec
from evaluators.depth_protocol import DPT_LR, LINEAR_LR, DepthSpec, for_data
from evaluators.knn import KnnSpec
from evaluators.linear import LR_PER_256, LinearSpec
from evaluators.logistic import LogisticSpec
from evaluators.presets import evaluator_cli
from evaluators.retrieval import RetrievalSpec
from evaluators.segmentation_protocol import SegmentationSpec
from evaluators.video_actions import VideoActionsSpec
from evaluators.video_objects import DINO_STD, VideoObjectsSpec
from server.evaluation_options import check_options, words_of


class Stopped(Exception):
    """Raised in place of the measurement."""


def spec_of_command(monkeypatch: pytest.MonkeyPatch, name: str, words: Sequence[str]) -> Any:
    """The Spec that the command's own parser hands to its evaluator."""
    seen = []

    def run(options: object, spec: object, *more: object) -> None:
        seen.append(spec)
        raise Stopped

    module = importlib.import_module(f"evaluators.{name}")
    monkeypatch.setattr(module, "run", run)
    with pytest.raises(Stopped):
        evaluator_cli(module.main, ["--ckpt", "x", "--data", "y", *words])
    return seen[0]


@pytest.mark.parametrize(
    ("name", "preset", "words", "given", "untouched"),
    [
        ("linear", "dino", "--epochs 10 --views 0", {"epochs": 10, "views": 0}, {"lr": (1e-3,)}),
        ("linear", "dino", f"--lr {' '.join(map(str, LR_PER_256))}", {"lr": LR_PER_256}, {"epochs": 100, "views": 10}),
        ("linear", "dinov2", "--views=0", {"views": 0}, {"lr": LR_PER_256}),
        ("copies", "dino", "--size-px None", {"size_px": None}, {}),
        ("copies", "dinov2", "--group group", {"group": "group"}, {"size_px": 322}),
        ("retrieval", "dino", "--size-px 512", {"size_px": 512}, {"scales": None}),
        ("attention", "dino", "--size None", {"size": None}, {"interpolation": "bilinear"}),
        ("attention", "dino", "--interpolation None --mass 0.6", {"interpolation": None}, {"size": 480}),
        ("video_objects", "dino", "--std None", {"std": None}, {"size": 480}),
        ("segmentation", "dinov2", "--steps 600 --seen whole", {"steps": 600, "seen": "whole"}, {"size": 518}),
        ("segmentation", "dinov2-ms", "--no-mirror --scales 1.0", {"mirror": False, "scales": (1.0,)}, {"size": 644}),
        (
            "segmentation",
            "dinov2-ms",
            "--no_mirror --layers last",
            {"layers": "last", "mirror": False},
            {"stride": 0.5},
        ),
        ("depth", "dinov2-nyu", "--steps 1000 --no-mirror", {"steps": 1000, "mirror": False}, {"lr": (1e-4,)}),
        ("depth", "dinov2-kitti", "--max_depth 10", {"max_depth": 10.0}, {"steps": 38_400, "mirror": True}),
        ("depth", "dinov2-nyu", "--head dpt", {"head": "dpt"}, {"lr": (1e-4,)}),
        ("depth", "dinov2", "--head dpt --max-depth 10", {"head": "dpt", "max_depth": 10.0}, {"lr": (1e-4,)}),
        (
            "video_actions",
            "dinov2",
            "--frames 4 --pool concat",
            {"frames": 4, "pool": "concat"},
            {"classifier": "linear"},
        ),
        (
            "depth",
            "dinov2-nyu",
            "--head dpt --lr 0.001 0.003 0.01 0.03",
            {"head": "dpt", "lr": LINEAR_LR},
            {"mirror": True},
        ),
    ],
)
def test_a_setting_typed_at_its_default_wins_over_the_preset(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    preset: str,
    words: str,
    given: dict[str, Any],
    untouched: dict[str, Any],
) -> None:
    for flags in (f"--preset {preset} {words}", f"{words} --preset={preset}"):
        spec = spec_of_command(monkeypatch, name, flags.split())
        assert {key: getattr(spec, key) for key in given | untouched} == given | untouched
    assert type(spec)(preset=preset, **given) == spec, "Python and the command line agree"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"preset": "dino", "epochs": 10}),
        ("copies", {"preset": "dino", "size_px": None}),
        ("attention", {"size": None, "preset": "dino"}),
        ("video_objects", {"preset": "dino", "std": None}),
        ("segmentation", {"preset": "dinov2-ms", "mirror": False, "scales": [1.0]}),
        ("depth", {"preset": "dinov2-kitti", "max_depth": 10.0, "mirror": False}),
        ("depth", {"head": "dpt"}),
    ],
)
def test_a_request_to_the_server_means_what_the_command_means(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    check_options(name, options)
    spec = spec_of_command(monkeypatch, name, words_of(options))
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert spec == type(spec)(**plain)
    assert {key: getattr(spec, key) for key in plain} == plain


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (LinearSpec(preset="dino"), {"lr": (1e-3,), "epochs": 100, "views": 10}),
        (LinearSpec(preset="dinov2"), {"lr": LR_PER_256, "epochs": 10, "views": 10}),
        (CopiesSpec(preset="dino"), {"size_px": 320}),
        (CopiesSpec(preset="dinov2"), {"size_px": 322}),
        (AttentionSpec(preset="dino"), {"size": 480, "interpolation": "bilinear", "mass": 0.6}),
        (VideoObjectsSpec(preset="dino"), {"std": DINO_STD, "size": 480, "previous": 7}),
        (SegmentationSpec(preset="dinov2"), {"lr": (1e-3,), "steps": 40_000, "size": 518, "seen": "crops"}),
        (DepthSpec(preset="dinov2"), {"lr": (1e-4,), "steps": 38_400, "mirror": True}),
        (DepthSpec(preset="dinov2-nyu"), {"lr": (1e-4,), "steps": 38_400, "max_depth": 10.0, "mirror": True}),
        (DepthSpec(preset="dinov2-kitti"), {"lr": (1e-4,), "steps": 38_400, "max_depth": 80.0, "mirror": True}),
        (VideoActionsSpec(preset="dinov2"), {"frames": 8, "pool": "mean", "classifier": "linear"}),
        (VideoActionsSpec(preset="dino"), {"frames": 8, "pool": "mean", "classifier": "linear"}),
        (SegmentationSpec(preset="dino"), {"lr": (1e-3,), "steps": 40_000, "size": 512, "seen": "crops"}),
        (DepthSpec(preset="dino"), {"lr": (1e-4,), "steps": 38_400, "mirror": True}),
        (AttentionSpec(preset="dinov2"), {"size": 476, "interpolation": "bilinear", "mass": 0.6}),
        (VideoObjectsSpec(preset="dinov2"), {"size": 476, "std": None}),
    ],
)
def test_a_preset_sets_what_was_published_and_leaves_the_rest_alone(spec: Any, settings: dict[str, Any]) -> None:
    made, plain = asdict(spec), asdict(type(spec)())
    assert {key: made[key] for key in settings} == settings
    assert {key for key in made if made[key] != plain[key]} <= {"preset", "enlarge", *settings}


def test_a_depth_set_has_a_say_only_in_what_was_left_out() -> None:
    assert for_data(DepthSpec(), "metre", 80.0).max_depth == 80
    assert for_data(DepthSpec(max_depth=10.0), "metre", 80.0).max_depth == 10
    assert for_data(DepthSpec(preset="dinov2-nyu"), "metre", 80.0).max_depth == 10
    assert for_data(DepthSpec(), "metre", None).max_depth == 10
    assert for_data(DepthSpec(preset="dinov2"), "metre", 80.0) == DepthSpec(preset="dinov2", max_depth=80.0)
    assert for_data(DepthSpec(preset="dinov2", max_depth=10.0), "metre", 80.0).max_depth == 10
    disparity = for_data(DepthSpec(preset="dinov2-nyu"), "pixel of disparity", 150.0)
    assert (disparity.max_depth, disparity.align) == (150, True), "a preset's range is in metres"
    given = for_data(DepthSpec(max_depth=90.0, align=False), "pixel of disparity", 150.0)
    assert (given.max_depth, given.align) == (90, False)


def test_a_depth_range_typed_at_its_default_wins_over_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = spec_of_command(monkeypatch, "depth", ["--max-depth", "10"])
    assert for_data(typed, "metre", 80.0).max_depth == 10
    assert for_data(spec_of_command(monkeypatch, "depth", ["--head", "dpt"]), "metre", 80.0).max_depth == 80


def test_learning_rates_hang_on_the_head_only_where_none_were_given() -> None:
    assert DepthSpec(head="dpt").lr == DPT_LR
    assert DepthSpec(head="dpt", lr=LINEAR_LR).lr == LINEAR_LR
    assert DepthSpec(head="linear4").lr == LINEAR_LR


def test_retrieval_shows_a_benchmark_as_typed_and_else_as_the_preset_says() -> None:
    assert RetrievalSpec(preset="dino", size_px=512).for_benchmark("roxford5k") == (512, (1.0,), False)
    assert RetrievalSpec(preset="dinov2", scales=(1.0,)).for_benchmark("rparis6k") == (518, (1.0,), True)


@pytest.mark.parametrize(
    ("spec", "setting", "wanted"),
    [
        (KnnSpec, "preset", "dino or dinov2"),
        (KnnSpec, "select_on", "train or val"),
        (LinearSpec, "preset", "dino or dinov2"),
        (LinearSpec, "select_on", "train or val"),
        (LogisticSpec, "preset", "dino or dinov2"),
        (LogisticSpec, "backend", "path or sklearn"),
        (RetrievalSpec, "preset", "dino or dinov2"),
        (CopiesSpec, "preset", "dino or dinov2"),
        (AttentionSpec, "preset", "dino or dinov2"),
        (AttentionSpec, "interpolation", "bicubic or bilinear"),
        (VideoObjectsSpec, "preset", "dino or dinov2"),
        (SegmentationSpec, "preset", "dino or dinov2 or dinov2-ms"),
        (SegmentationSpec, "seen", "whole or crops"),
        (DepthSpec, "preset", "dino or dinov2 or dinov2-nyu or dinov2-kitti"),
        (DepthSpec, "head", "linear1 or linear4 or dpt"),
        (VideoActionsSpec, "preset", "dino or dinov2"),
        (VideoActionsSpec, "pool", "mean or concat"),
        (VideoActionsSpec, "classifier", "linear or knn"),
    ],
)
def test_a_word_that_python_gives_is_checked_as_a_typed_one(spec: Any, setting: str, wanted: str) -> None:
    with pytest.raises(InputError) as raised:
        spec(**{setting: "dino-v2"})
    assert str(raised.value) == f"--{setting.replace('_', '-')} dino-v2: wanted {wanted}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("knn", "wanted dino or dinov2"),
        ("attention", "wanted dino or dinov2"),
        ("depth", "wanted dino or dinov2 or dinov2-nyu or dinov2-kitti"),
        ("video_actions", "wanted dino or dinov2"),
        ("ridge", "ridge has no presets, since no protocol of it was published; leave it out"),
    ],
)
def test_a_command_says_in_one_line_which_presets_there_are(name: str, said: str) -> None:
    main = importlib.import_module(f"evaluators.{name}").main
    for words in (["--preset", "dinov3"], ["--preset=dinov3"]):
        with pytest.raises(InputError) as raised:
            evaluator_cli(main, ["--ckpt", "x", "--data", "y", *words])
        assert str(raised.value) == f"--preset dinov3: {said}"
