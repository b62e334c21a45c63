"""Paired comparison: against counting by hand, and refused where the results are not of the same thing."""

import json
import runpy
import sys
from dataclasses import asdict
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backbones.catalog import CATALOG
from data.errors import InputError
from evaluators.compare import SCHEMA, compare, load_scored, mcnemar_exact, paired, table
from evaluators.copies import CopiesSpec
from evaluators.depth_protocol import DepthSpec, for_data
from evaluators.knn import KnnSpec
from evaluators.linear import LR_PER_256, LinearSpec
from evaluators.published_figures import DINO, DINOV2, FIGURES, REGISTERS, Figure, published_reference
from evaluators.report import make_page
from evaluators.report_groups import load_results
from evaluators.results import (
    Context,
    Measurement,
    Metric,
    load_predictions,
    load_result,
    result_json,
    result_table,
    save_result,
)
from evaluators.retrieval import RetrievalSpec
from evaluators.segmentation_protocol import SegmentationSpec
from evaluators.video_actions import VideoActionsSpec

N = 200


def make_result(path: Path, scores: np.ndarray, names: list[str] | None = None, **changes: Any) -> Path:
    """A result file whose score is right or wrong by image."""
    names = names or [f"{i:03d}.jpg" for i in range(len(scores))]
    measurement = Measurement(
        evaluator="knn", protocol="words", version=changes.pop("version", 1),
        metrics={"top1": Metric(float(scores.mean()), (0.1, 0.9), len(scores)), "top5": Metric(1.0, None, len(scores))},
        headline="top1", selected_on="train", chosen={"k": 5}, grid=[],
        predictions={"names": np.array(names), "score": scores, "groups": np.arange(len(scores)) // changes.pop("group", 1)},
    )  # fmt: skip
    context = Context(
        model={"ckpt": path.stem, "runtime": "torch"},
        data={"source": "photos", "fingerprint": changes.pop("fingerprint", {"train": "a", "val": "b"}),
              "truth_fingerprint": changes.pop("truth_fingerprint", {"val": "masks"})},
        preprocess={}, timing={}, environment={},
    )  # fmt: skip
    result = result_json(measurement, context) | changes
    save_result(path, result, measurement.predictions)
    return path


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = (rng.random(N) < 0.6).astype(np.float32)
    b = np.where(rng.random(N) < 0.2, 1.0, a).astype(np.float32)
    return a, b


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (40, 15)])
def test_mcnemar_is_twice_the_binomial_tail(only_a: int, only_b: int) -> None:
    """Oracle: exact fractions, summed by hand."""
    n = only_a + only_b
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(only_a, only_b) + 1))
    assert mcnemar_exact(only_a, only_b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_mcnemar_of_many_items_does_not_vanish_or_overflow() -> None:
    assert 0 < mcnemar_exact(4800, 5200) < 1e-3
    assert mcnemar_exact(50_000, 50_000) == 1.0


def test_a_better_network_is_found_better_and_both_ways_round(
    tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]
) -> None:
    a, b = (load_scored(make_result(tmp_path / f"{name}.json", one)) for name, one in zip("ab", scores, strict=True))
    there, back = compare(a, b), compare(b, a)
    gain = there["paired"]["score"]
    assert there["schema"] == SCHEMA
    assert gain["difference"] == pytest.approx((scores[1] - scores[0]).mean())
    assert gain["ci95"][0] > 0
    assert there["verdict"] == "b"
    assert back["verdict"] == "a"
    assert gain["mcnemar"]["only_b_right"] == back["paired"]["score"]["mcnemar"]["only_a_right"]
    assert gain["mcnemar"]["only_b_right"] == (scores[1] > scores[0]).sum() > 8
    assert gain["mcnemar"]["only_a_right"] == 0
    assert compare(a, a)["verdict"] == "neither"


def test_other_settings_are_told_since_not_the_networks_alone_differ_then(
    tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]
) -> None:
    a, b = (load_scored(make_result(tmp_path / f"{name}.json", one)) for name, one in zip("ab", scores, strict=True))
    assert compare(a, b)["settings_differ"] == []
    assert "other settings" not in table(compare(a, b))
    a.result["settings"] |= {"head": "linear1", "steps": 10, "corruption_errors": {"fog": 0.5}}
    b.result["settings"] |= {"head": "dpt", "steps": 10, "corruption_errors": {"fog": 0.4}}
    found = compare(a, b)
    assert found["settings_differ"] == ["head"]
    assert "measured with other settings (head)" in table(found)


def test_the_order_of_the_images_does_not_matter(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]) -> None:
    names = [f"{i:03d}.jpg" for i in range(N)]
    straight = load_scored(make_result(tmp_path / "a.json", scores[0]))
    turned = load_scored(make_result(tmp_path / "b.json", scores[0][::-1], names[::-1]))
    assert compare(straight, turned)["paired"]["score"]["mcnemar"] == {"only_a_right": 0, "only_b_right": 0, "p": 1.0}


def test_images_that_belong_together_are_drawn_together(scores: tuple[np.ndarray, np.ndarray]) -> None:
    """Ten copies of each image are no ten images: the interval is that of the images."""
    one = paired(*scores, np.arange(N))["ci95"]
    ten = paired(*(np.repeat(x, 10) for x in scores), np.repeat(np.arange(N), 10))["ci95"]  # type: ignore[misc]
    loose = paired(*(np.repeat(x, 10) for x in scores))["ci95"]  # type: ignore[misc]
    assert ten == pytest.approx(one)
    assert loose[1] - loose[0] < 0.5 * (one[1] - one[0])


def test_further_test_sets_are_paired_too_where_the_images_are_the_same(
    tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]
) -> None:
    a, b = (load_scored(make_result(tmp_path / f"{name}.json", one)) for name, one in zip("ab", scores, strict=True))
    names, right = np.array(["x", "y", "z"]), np.array([True, False, False])
    a.predictions.update(v2_names=names, v2_correct=right, a_names=names, a_correct=right, r_correct=right)
    b.predictions.update(v2_names=names[::-1], v2_correct=~right[::-1], a_names=names[[0, 0, 1]], a_correct=right)
    b.predictions.update(c_names=names, c_correct=right)
    a.predictions["v2_groups"] = np.array([0, 0, 1])
    found = compare(a, b)
    assert set(found["paired"]) == {"score", "v2_top1"}
    further = found["paired"]["v2_top1"]
    assert (further["a"], further["b"]) == pytest.approx((1 / 3, 2 / 3))
    assert (further["n"], further["n_groups"]) == (3, 2)
    assert further["mcnemar"]["only_b_right"] == 2
    assert further["mcnemar"]["only_a_right"] == 1
    assert "paired v2_top1: B - A +0.3333" in table(found)
    assert "note: not paired, as different images were scored: a" in table(found)
    assert found["verdict"] == "b", "the verdict stays with the test images proper"


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"v2_correct": [True, False]}, "hold no v2_names"),
        ({"v2_correct": [True, False], "v2_names": ["x"]}, "of different lengths"),
        ({"c_correct": [True, False], "c_names": ["x", "y"], "c_groups": [0]}, "of different lengths"),
    ],
)
def test_damaged_guesses_of_a_further_set_are_refused(tmp_path: Path, further: dict[str, list[Any]], said: str) -> None:
    path = make_result(tmp_path / "a.json", np.ones(4))
    kept = load_predictions(path, load_result(path))
    save_result(path, load_result(path), kept | {key: np.array(values) for key, values in further.items()})
    with pytest.raises(InputError, match=said):
        load_scored(path)


def test_a_smaller_error_is_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    error = rng.random(N)
    metrics = {"abs_rel": {"value": 0.5, "ci95": None, "n": N, "lower_is_better": True}}
    words: dict[str, Any] = {"metrics": metrics, "headline": "abs_rel"}
    a = load_scored(make_result(tmp_path / "a.json", error, **words))
    b = load_scored(make_result(tmp_path / "b.json", error * 0.9, **words))
    found = compare(a, b)
    assert found["verdict"] == "b"
    assert "mcnemar" not in found["paired"]["score"], "errors are not right or wrong"


def test_it_is_said_where_the_headline_is_no_mean_of_the_scores(
    tmp_path: Path, scores: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    pooled = {"metrics": {"ap": {"value": 0.5, "ci95": None, "n": N}}, "headline": "ap"}
    a, b = (str(make_result(tmp_path / f"{name}.json", one, **pooled)) for name, one in zip("ab", scores, strict=True))
    assert command(a, b) == 0
    assert "ap is no mean over test items; the verdict is about the mean score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": {"train": "a", "val": "other"}}, "different data"),
        ({"truth_fingerprint": {"val": "other masks"}}, "different data"),
        ({"version": 2}, "version of the protocol 1 and 2"),
        ({"evaluator": "linear"}, "evaluator 'knn' and 'linear'"),
        ({"names": [f"{i}.jpg" for i in range(1, N + 1)]}, "different test items"),
        ({"names": ["same.jpg"] * N}, "occurs twice"),
    ],
)
def test_results_of_different_things_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]
) -> None:
    a = load_scored(make_result(tmp_path / "a.json", scores[0]))
    b = load_scored(make_result(tmp_path / "b.json", scores[1], **changes))
    with pytest.raises(InputError, match=said):
        compare(a, b)


@pytest.mark.parametrize("kind", ["other schema", "no json", "damaged metric", "no predictions", "cut predictions"])
def test_files_that_are_no_results_are_refused_in_one_line(
    kind: str, tmp_path: Path, scores: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_result(tmp_path / "a.json", scores[0]), make_result(tmp_path / "b.json", scores[1])
    body = json.loads(bad.read_text())
    beside = tmp_path / "b.predictions.npz"
    if kind == "other schema":
        bad.write_text(json.dumps(body | {"schema": "other/9"}))
    elif kind == "no json":
        bad.write_text(bad.read_text()[:100])
    elif kind == "damaged metric":
        body["metrics"]["top1"]["value"] = "high"
        bad.write_text(json.dumps(body))
    elif kind == "no predictions":
        beside.unlink()
    else:
        beside.write_bytes(beside.read_bytes()[:200])
    assert command(str(good), str(bad)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "b." in lines[0]
    assert "run the evaluator again" in lines[0]


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare", *words])
        patch.delitem(sys.modules, "evaluators.compare", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("evaluators.compare", run_name="__main__")
    return int(ended.value.code or 0)


def test_the_command_prints_and_writes_what_it_found(
    tmp_path: Path, scores: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(make_result(tmp_path / f"{name}.json", one)) for name, one in zip("ab", scores, strict=True))
    assert command(a, b, "--out", a) == 2
    assert "is one of the results that are compared" in capsys.readouterr().err
    assert command(a, b, "--out", str(tmp_path / "c.json")) == 0
    said = capsys.readouterr().out
    for words in ("B is better", "only A right 0, only B right", "exact p", "95 %"):
        assert words in said
    assert "no mean over" not in said
    assert json.loads((tmp_path / "c.json").read_text())["verdict"] == "b"


def test_a_published_figure_stands_beside_the_same_network_and_benchmark_only(tmp_path: Path) -> None:
    scores = np.ones(4, np.float32)
    path = make_result(tmp_path / "a.json", scores)
    assert load_result(path)["published"] == {}
    assert load_predictions(path, load_result(path))["score"].tolist() == [1, 1, 1, 1]
    measurement = Measurement(
        evaluator="knn", protocol="", version=1, metrics={"top1_best_on_val": Metric(0.78, None, 9)}, headline="top1_best_on_val",
        selected_on="", chosen={}, grid=[], settings=asdict(KnnSpec()),
    )  # fmt: skip

    def of(ckpt: str, source: str) -> dict[str, Any]:
        data = {"source": source, "fingerprint": {}}
        context = Context(model={"ckpt": ckpt}, data=data, preprocess={}, timing={}, environment={})
        return dict(result_json(measurement, context)["published"])

    figure = {"value": 0.790, "source": "Oquab et al. 2023", "checked": True, "difference": -0.01}
    wanted = {"top1_best_on_val": figure}
    assert of("dinov2_vits14", "imagenet:/data") == wanted
    assert of("/x/dinov2_vits14_pretrain.pth", "imagenet:/data") == wanted
    assert of("mine.safetensors", "imagenet:/data") == {}
    assert of("dinov2_vits14", "/data/photos") == {}


@pytest.mark.parametrize(
    ("evaluator", "benchmark", "metric", "settings", "wanted"),
    [
        ("depth", "nyud", "rmse", asdict(DepthSpec(preset="dinov2-nyu")), 0.449),
        ("depth", "nyud", "rmse", asdict(DepthSpec(preset="dinov2-nyu", head="linear4")), 0.417),
        ("depth", "nyud", "rmse", asdict(DepthSpec(preset="dinov2-nyu", head="dpt")), 0.356),
        ("depth", "kitti", "rmse", asdict(DepthSpec(preset="dinov2-kitti", head="linear4")), 2.86),
        ("depth", "nyud", "rmse", asdict(DepthSpec(preset="dinov2")), 0.449),
        ("depth", "kitti", "rmse", asdict(for_data(DepthSpec(preset="dinov2"), "metre", 80.0)), 3.10),
        ("depth", "nyud", "rmse", asdict(DepthSpec(preset="dinov2-nyu", steps=10)), None),
        ("depth", "nyud", "rmse", asdict(DepthSpec()), None),  # a schedule of our own
        ("segmentation", "ade20k", "miou", asdict(SegmentationSpec(preset="dinov2")), 0.443),
        ("segmentation", "ade20k", "miou", asdict(SegmentationSpec(preset="dinov2-ms")), 0.472),
        ("segmentation", "ade20k", "miou", asdict(SegmentationSpec()), None),  # whole views are another protocol
        ("segmentation", "ade20k", "miou", asdict(SegmentationSpec(preset="dinov2", steps=10)), None),
        ("segmentation", "cityscapes", "miou", asdict(SegmentationSpec(preset="dinov2")), 0.666),
        ("segmentation", "voc2012", "miou", asdict(SegmentationSpec(preset="dinov2-ms")), 0.826),
        ("knn", "imagenet", "top1_best_on_val", asdict(KnnSpec()), 0.790),
        ("knn", "imagenet", "top1_best_on_val", asdict(KnnSpec(temperature=0.1)), None),
        ("linear", "imagenet", "v2_top1", asdict(LinearSpec(preset="dinov2")), 0.708),
        (
            "linear",
            "imagenet",
            "v2_top1",
            asdict(LinearSpec(preset="dinov2")) | {"lr": list(LR_PER_256)},
            0.708,
        ),  # as in a file
        ("linear", "imagenet", "v2_top1", asdict(LinearSpec(preset="dinov2", epochs=1)), None),
        ("linear", "imagenet", "v2_top1", asdict(LinearSpec(preset="dinov2", lr=(1e-3,))), None),
        ("linear", "imagenet", "v2_top1", asdict(LinearSpec()), None),
        ("video_actions", "ucf101", "top1_best_on_val", asdict(VideoActionsSpec()), 0.870),
        ("video_actions", "ucf101", "top1_best_on_val", asdict(VideoActionsSpec(preset="dinov2")), 0.870),
        ("video_actions", "ucf101", "top1_best_on_val", asdict(VideoActionsSpec(classifier="knn")), None),
    ],
)
def test_a_published_figure_belongs_to_one_protocol(
    evaluator: str, benchmark: str, metric: str, settings: dict[str, Any], wanted: float | None
) -> None:
    found = published_reference(evaluator, "dinov2_vits14", f"{benchmark}:/data", {metric: {"value": 0.5}}, settings)
    assert (found[metric]["value"] if found else None) == wanted


def test_dinos_landmarks_were_published_at_their_sizes_and_scales() -> None:
    spec = RetrievalSpec(preset="dino")
    for benchmark, wanted in (("roxford5k", 0.418), ("rparis6k", 0.631)):
        size_px, scales, cropped = spec.for_benchmark(benchmark)
        settings = asdict(spec) | {"size_px": size_px, "scales": list(scales), "queries_cropped": cropped}

        def published(**changes: object) -> dict[str, Any]:
            metrics = {"map_medium": {"value": 0.5}}
            return published_reference("retrieval", "dino_vits16", f"{benchmark}:/d", metrics, settings | changes)  # noqa: B023

        assert published()["map_medium"]["value"] == wanted
        assert published(scales=[0.5]) == published(size_px=100) == published(queries_cropped=True) == {}


@pytest.mark.parametrize(
    ("whitened", "distractors", "wanted"), [(True, 10_000, 0.858), (True, 0, None), (False, 10_000, None)]
)
def test_copydays_was_published_with_whitening_and_ten_thousand_distractors(
    whitened: bool, distractors: int, wanted: float | None
) -> None:
    """Without them copies are easier to find."""
    settings = asdict(CopiesSpec(preset="dino")) | {"whitened": whitened, "distractors": distractors}
    found = published_reference("copies", "dino_vitb8", "copydays:/data", {"map_strong": {"value": 0.5}}, settings)
    assert (found["map_strong"]["value"] if found else None) == wanted


def test_no_two_published_figures_are_of_the_same_thing() -> None:
    keys = [
        (one.evaluator, one.benchmark, one.metric, network, *sorted(one.settings.items()))
        for one in FIGURES
        for network in one.by_network
    ]
    assert len(set(keys)) == len(keys)
    assert {network for *_, network in ((one, n) for one in FIGURES for n in one.by_network)} <= set(CATALOG)


STATED = {
    ("knn", "imagenet", "top1_best_on_val", DINO), ("knn", "imagenet", "top1_best_on_val", DINOV2),
    ("knn", "imagenet", "top1_best_on_val", REGISTERS),
    ("linear", "imagenet", "top1_best_on_val", DINO), ("linear", "imagenet", "top1_best_on_val", DINOV2),
    ("linear", "imagenet", "top1_best_on_val", REGISTERS),
    ("linear", "imagenet", "v2_top1", DINOV2), ("linear", "imagenet", "v2_top1", REGISTERS),
    ("retrieval", "roxford5k", "map_hard", DINOV2), ("retrieval", "roxford5k", "map_hard", REGISTERS),
    ("copies", "copydays", "map_strong", DINO), ("segmentation", "ade20k", "miou", DINOV2), ("depth", "nyud", "rmse", DINOV2),
}  # fmt: skip
"""What the authors' READMEs and model cards state; all else stands in a paper's table that was not at hand."""


def test_only_figures_of_a_readme_or_model_card_count_as_checked() -> None:
    checked = [one for one in FIGURES if one.checked]
    assert {(one.evaluator, one.benchmark, one.metric, one.source) for one in checked} == STATED
    assert len(checked) == len(STATED), "one setting of each, not every head of NYUd or every crop of ADE20K"
    assert [one.settings["head"] for one in checked if one.evaluator == "depth"] == ["linear4"]
    assert [one.settings["layers"] for one in checked if one.evaluator == "segmentation"] == ["last4"]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda one: f"{one.benchmark}-{one.metric}-{one.source[:5]}")
def test_a_figure_that_was_not_checked_says_so_in_the_file_on_the_terminal_and_on_the_page(
    figure: Figure, tmp_path: Path
) -> None:
    network = next(iter(figure.by_network))
    measurement = Measurement(
        evaluator=figure.evaluator, protocol="", version=1, metrics={figure.metric: Metric(0.5, None, 9)},
        headline=figure.metric, selected_on="", chosen={}, grid=[], settings=dict(figure.settings),
    )  # fmt: skip
    data = {"source": f"{figure.benchmark}:/data", "fingerprint": {}}
    context = Context(model={"ckpt": network}, data=data, preprocess={}, timing={}, environment={})
    save_result(tmp_path / "a.json", result_json(measurement, context), {})
    result = load_result(tmp_path / "a.json")
    assert result["published"][figure.metric]["checked"] is figure.checked
    for text in (result_table(result), make_page(load_results([tmp_path]), "")):
        assert ("quoted from memory, not checked" in text) is not figure.checked
        assert figure.source in text
